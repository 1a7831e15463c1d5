"""`midtune push`: put a run's patch, or an exported form of it, on the hub, with a model card."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from midtune.errors import InputError, reason
from midtune.model.patch import DESCRIPTION, read_patch, require_patch
from midtune.model.sources import hub_id, licence_of
from midtune.network import hub_is_offline, transport_errors
from midtune.report.card import model_card
from midtune.report.terminal import Terminal
from midtune.runs import RunFolder
from midtune.whole import MANIFEST

CARD = "README.md"


def run(
    target: str,
    repository: str,
    *,
    export: Path | None,
    token_file: Path | None,
    token_env: str | None,
    public: bool,
    dry_run: bool,
    out: Path | None,
    terminal: Terminal,
) -> dict[str, Any]:
    """Send the patch of `target`, or the folder or GGUF file `export` that was made of it, to `repository` on the hub.

    Nothing else is sent. The token comes from `token_file` or the variable `token_env`, and from nowhere else; with
    `dry_run` none is needed, and what would be sent is written to `out`, by default a folder of the repository's name.

    Returns `repository`, whether it is `public`, the `files` and their `bytes`, and the `url` or the `folder` written.

    Raises InputError if there is no such run, export or token, or the hub refuses.
    """
    if repository.count("/") != 1:
        raise InputError(f"`{repository}` is not a valid hub id; write it as `org/name`.")
    token = None if dry_run else _token(token_file, token_env)
    patch_folder = require_patch(target)
    content = _content(patch_folder, repository, export)
    size = sum(len(each) if isinstance(each, bytes) else each.stat().st_size for each in content.values())
    found = {"repository": repository, "public": public, "files": sorted(content), "bytes": size}
    if not dry_run:
        terminal.message(f"sending {len(content)} files to {repository}")
        return {**found, "url": _send(repository, content, str(token), public), "folder": None}
    folder = out or Path(repository.rpartition("/")[2])
    if folder.exists():
        raise InputError(f"{folder} exists already; choose another folder with --out.")
    for name, each in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(each, bytes):
            (folder / name).write_bytes(each)
        else:
            shutil.copyfile(each, folder / name)
    return {**found, "url": None, "folder": str(folder)}


def _token(file: Path | None, variable: str | None) -> str:
    if (file is None) == (variable is None):
        raise InputError(
            "a token is read only from where you say: give one of --token-file FILE and --token-env NAME, or --dry-run."
        )
    token = os.environ.get(variable, "") if variable else Path(str(file)).read_text(encoding="utf-8")
    if not token.strip():
        raise InputError(
            f"{variable or file} holds no token; create one with write access on the hub's settings page."
        )
    return token.strip()


def _content(patch_folder: Path, repository: str, export: Path | None) -> dict[str, Path | bytes]:
    """Name in the repository → what is sent under it."""
    patch, run = read_patch(patch_folder), RunFolder(patch_folder.absolute().parent)
    root = export or patch_folder
    if not root.exists():
        raise InputError(f"{root} does not exist; make it with `midtune export`.")
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
    names = {file.name if root.is_file() else file.relative_to(root).as_posix(): file for file in files}
    content: dict[str, Path | bytes] = {
        name: file for name, file in names.items() if not name.startswith(".")
    }
    form = "patch" if export is None else _form(names)
    if export is None and CARD in content:
        # PEFT writes a card of its own, which the manifest knows.
        content.pop(MANIFEST, None)
    exports = run.path / "export.json"
    card = model_card(
        run.read_json(run.report) if run.report.is_file() else {},
        form,
        repository,
        exports=run.read_json(exports)["forms"] if exports.is_file() else None,
        base=hub_id(patch.base_model),
        licence=licence_of(patch.base_model, None),
    )
    return {**content, CARD: card.encode()}


def _form(names: dict[str, Path]) -> str:
    """The form that these files are, as `midtune export` names it."""
    if any(name.endswith(".gguf") for name in names):
        return "gguf"
    if "config.json" not in names or DESCRIPTION in names:
        raise InputError(
            "--export names no exported model; give a folder or a file that `midtune export` wrote."
        )
    return "nf4" if "quantization_config" in names["config.json"].read_text(encoding="utf-8") else "hf"


def _send(repository: str, content: dict[str, Path | bytes], token: str, public: bool) -> str:
    """Create the repository if needed and commit the files; returns the commit's address."""
    from huggingface_hub import CommitOperationAdd, HfApi, constants, errors

    if hub_is_offline():
        raise InputError("work is offline; leave out --offline, or see with --dry-run what would be sent.")
    api = HfApi(endpoint=constants.ENDPOINT, token=token)
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        if not public and not api.model_info(repository).private:
            raise InputError(
                f"{repository} is there already, and public; add --public, or choose another name."
            )
        files = [
            CommitOperationAdd(name, each if isinstance(each, bytes) else str(each))
            for name, each in content.items()
        ]
        made = api.create_commit(repository, files, commit_message="Add a block trained with midtune")
    except errors.HFValidationError:
        raise InputError(f"`{repository}` is not a valid hub id; write it as `org/name`.") from None
    except transport_errors() as error:
        raise InputError(
            f"{repository} was not sent ({reason(error)}); see that the token may write there, and do it again."
        ) from None
    return str(made.commit_url)
