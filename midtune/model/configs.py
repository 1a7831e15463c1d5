"""Read a model's configuration without its weights; plans are made from it."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midtune.errors import WHY, InputError, explained, reason
from midtune.model.hub import PACKAGED
from midtune.model.sources import NAMES, TINY, check_config
from midtune.network import REACH_TIMEOUT_S, within

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SHIPPED = Path(__file__).parent.parent / "assets" / "models.json"


def config_of(name: str, *, trust_remote_code: bool = False, network: bool = True) -> PretrainedConfig:
    """Read a model's configuration from a folder, from midtune's own copies, or from the hub.

    `name` is a folder, `tiny`, a hub id, or the last part of the id of a model whose sizes midtune ships (`qwen3-8b`).
    Raises InputError if it is none of these, cannot be trained, or the hub is needed and cannot be asked.
    """
    from transformers import AutoConfig

    from midtune.model.architectures import check_trainable

    folder = TINY if name == "tiny" else Path(name).expanduser()
    if (folder / "config.json").is_file():
        return read_config(folder, name, trust_remote_code=trust_remote_code)
    shipped: dict[str, dict[str, Any]] = json.loads(SHIPPED.read_text(encoding="utf-8"))
    wanted = PACKAGED[name].hub_id if name in PACKAGED else name
    for known, sizes in shipped.items():
        if _plain(wanted) in (_plain(known), _plain(known.partition("/")[2])):
            return AutoConfig.for_model(**sizes)
    if network and name.count("/") == 1 and not folder.exists():
        try:
            found = within(
                REACH_TIMEOUT_S, lambda: AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            )
            check_trainable(found, name)
            return found
        except (OSError, ValueError) as error:
            raise InputError(
                f"the configuration of {name} is not shipped with midtune and could not be fetched "
                f"({reason(error)}); give a folder that holds its config.json, or one of {', '.join(shipped)}."
            ) from None
    names = [*NAMES, *(known.partition("/")[2] for known in shipped)]
    (near,) = difflib.get_close_matches(name, names, n=1, cutoff=0)
    raise InputError(
        f"`{name}` is no folder with a config.json and no model that midtune ships the sizes of; "
        f"did you mean `{near}`?"
    )


def read_config(folder: Path, name: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read the configuration in a model folder.

    Raises InputError if it cannot be read or has an impossible count, or the model, called `name`, cannot be trained.
    """
    from transformers import AutoConfig

    from midtune.model.architectures import check_trainable

    path = folder / "config.json"
    check_config(path)
    with explained(f"{path} cannot be read ({WHY}); correct it or fetch it again."):
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        check_trainable(config, name)
    return config


def _plain(name: str) -> str:
    return name.lower().removesuffix("-instruct").removesuffix("-it").removesuffix("-base")
