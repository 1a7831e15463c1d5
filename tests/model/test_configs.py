import json
from collections.abc import Callable
from pathlib import Path

import pytest

from midtune.errors import InputError
from midtune.model import configs
from midtune.model.configs import config_of
from midtune.model.sizes import sizes_of
from tests.model import fake_hub


def test_models_are_known_by_id_and_by_their_own_name() -> None:
    assert config_of("Qwen/Qwen3-8B").num_hidden_layers == 36
    assert config_of("qwen3-8b").to_dict() == config_of("Qwen/Qwen3-8B").to_dict()
    assert config_of("llama-3.1-8b").vocab_size == 128256
    assert config_of("smollm2-135m").num_hidden_layers == 30
    assert config_of("tiny").num_hidden_layers == 12


def test_a_folder_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen3-8b").mkdir()
    sizes = {**config_of("qwen3-4b").to_dict(), "num_hidden_layers": 3, "layer_types": None}
    (tmp_path / "qwen3-8b" / "config.json").write_text(json.dumps(sizes))
    assert config_of("qwen3-8b").num_hidden_layers == 3


def test_a_name_nobody_knows() -> None:
    with pytest.raises(InputError, match="did you mean `Qwen3-8B`"):
        config_of("Qwen3-8Bn")


def test_a_model_that_the_hub_does_not_give(use_hub: Callable[[str], None]) -> None:
    # Tests are offline.
    with pytest.raises(InputError, match=r"could not be fetched \(We couldn't connect to .*; give a folder"):
        config_of("org/other")
    with fake_hub.serve({}) as address:
        use_hub(address)
        with pytest.raises(
            InputError, match=r"could not be fetched \(org/other is not a local folder and .*\)"
        ):
            config_of("org/other")


def test_a_hub_that_does_not_answer_is_given_up(
    use_hub: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "REACH_TIMEOUT_S", 0.1)
    with fake_hub.serve({}, delay_s=1.0) as address:
        use_hub(address)
        with pytest.raises(InputError, match=r"could not be fetched \(no answer within"):
            config_of("org/other")


def test_a_damaged_configuration_is_named(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", "quantization_config": "x"}')
    with pytest.raises(InputError, match=r"config\.json cannot be read \(.*\); correct it or fetch it again"):
        config_of(str(folder))


def test_every_shipped_model_is_listed_once() -> None:
    names = [name.partition("/")[2] for name in json.loads(configs.SHIPPED.read_text())]
    assert [config_of(name).model_type for name in names]
    assert len({name.lower().replace("-instruct", "") for name in names}) == len(names) == 29


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"model_type": "bart"}, "is an encoder-decoder"),
        ({"model_type": "longcat_flash"}, "has two attentions in each block"),
        ({"model_type": "recurrent_gemma"}, "remembers a text in its blocks instead of a cache"),
        ({"model_type": "bert"}, "is an encoder, which fills gaps in a text"),
        ({"model_type": "vit"}, "has no language model in transformers"),
        ({"model_type": "diffusion_gemma"}, "does not write one token after another"),
        (
            {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}},
            "with gptq quantization",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_by_its_configuration(
    folder: Path, settings: dict[str, object], why: str
) -> None:
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=why):
        config_of(str(folder))


@pytest.mark.parametrize(
    ("name", "billions"),
    [("Qwen3-30B-A3B", 30.5), ("Qwen3.5-4B", 4.2), ("gemma-4-E4B", 7.5), ("gpt-oss-20b", 20.9)],
)
def test_mixtures_and_text_parts_are_counted_whole(name: str, billions: float) -> None:
    assert sizes_of(config_of(name)).total / 1e9 == pytest.approx(billions, abs=0.05)
