"""What can be exported, and that it is what was trained; merged tensors are tested in model/test_patch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import midtune
from midtune.config import RunConfig, load_config
from midtune.errors import InputError
from midtune.model.export import require_finite
from midtune.model.loading import load_policy
from midtune.model.patch import apply_patch, save_patch
from midtune.model.quantize import forbid_cpu_packing
from midtune.model.sources import resolve
from midtune.report.terminal import Terminal
from midtune.runs import RunFolder
from midtune.stages import export, train
from midtune.stages.report import read_run
from tests.model import toy_gguf
from tests.stages.conftest import Configured


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="is neither a run folder nor a patch folder; give a folder that `train`"
    ):
        export.run(tmp_path, out=tmp_path / "merged", terminal=Terminal(quiet=True))
    assert not (tmp_path / "merged").exists()


def test_a_run_that_has_not_finished_is_refused(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", "")
    run.begin("{}", "cpu", 0)
    with pytest.raises(InputError, match="has no trained patch yet; finish it with `midtune train --resume"):
        export.run(run.path, out=tmp_path / "merged", terminal=Terminal(quiet=True))


@pytest.fixture
def trained(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> tuple[Path, RunConfig]:
    """A copy of a finished run, to which an export adds, and its configuration."""
    run = shutil.copytree(finished[0], tmp_path / "run")
    return run, load_config(run / "config.yaml", {})


def test_the_4_bit_form_scores_as_the_run_and_loads_without_midtune(
    trained: tuple[Path, RunConfig], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, config = trained
    out, quiet = tmp_path / "out", Terminal(quiet=True)
    found = export.run(run, out=out, terminal=quiet, to="nf4", config=config, score=True)
    assert found["scores"] == RunFolder.open(run).read_json(run / "report.json")["quality"]
    assert found["dtype"] == "float32" and found["tensors"] == 11

    policy = load_policy(resolve(config.model.name), device="cpu")
    apply_patch(policy, run / "patch")
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == policy.tokenizer.chat_template
    assert model.generation_config.eos_token_id == policy.stop_token_ids
    ids = torch.arange(3, 30).view(1, -1)
    # On CPUs with AVX512-BF16 bitsandbytes would compute in bf16.
    forbid_cpu_packing(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, policy.model(ids).logits)
    for name, tensor in policy.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    skipped = model.config.quantization_config.llm_int8_skip_modules
    assert {"model.layers.2.self_attn", "model.layers.2.mlp"} <= set(skipped)
    assert "| 4-bit, as trained |" in (out / "README.md").read_text()


def test_a_calibrated_run_is_exported_resumed_and_loaded_as_it_was_trained(
    configured: Configured, tmp_path: Path
) -> None:
    config, quiet = configured(model__rounding="calibrated", training__steps=1), Terminal(quiet=True)
    report = train.run(config, out=tmp_path / "run", resume=None, terminal=quiet)
    found = export.run(
        tmp_path / "run", out=tmp_path / "out", terminal=quiet, to="nf4", config=config, score=True
    )
    assert found["scores"] == report["quality"]
    written = load_policy(resolve(str(tmp_path / "out")), device="cpu").model
    loaded, _ = midtune.load(tmp_path / "run", quantize="nf4", device="cpu")
    ids = torch.arange(3, 30).view(1, -1)
    with torch.no_grad():
        assert torch.equal(written(ids).logits, loaded(ids).logits)
    resumed = train.run(config, out=None, resume=tmp_path / "run", terminal=quiet)
    assert resumed["quality"] == report["quality"]


def test_nothing_is_calibrated_where_nothing_is_in_4_bit(configured: Configured, tmp_path: Path) -> None:
    config = configured(model__rounding="calibrated", model__quantize="none")
    with pytest.raises(
        InputError, match="--quantize none puts nothing into 4-bit; leave out model.rounding=calibrated"
    ):
        train.run(config, out=tmp_path / "run", resume=None, terminal=Terminal(quiet=True))


def test_forms_add_up_in_the_run_folder(trained: tuple[Path, RunConfig], tmp_path: Path) -> None:
    run, config = trained
    quiet = Terminal(quiet=True)
    export.run(run, out=tmp_path / "hf", terminal=quiet, config=config, score=True)
    found = export.run(run, out=tmp_path / "bf16", terminal=quiet, to="nf4", dtype="bf16", config=config)
    assert found["forms"].keys() >= {"hf", "nf4"} and found["scores"] is None
    assert found["forms"]["hf"]["scores"]["after"]["n"] == 8
    assert read_run(RunFolder.open(run)).exports.keys() == found["forms"].keys()
    assert "What was exported" in (run / "report.html").read_text()
    stored = load_file(tmp_path / "bf16" / "model.safetensors")
    assert stored["model.layers.2.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_blocks_go_into_the_gguf_they_came_from(tmp_path: Path) -> None:
    base = toy_gguf.write(tmp_path / "toy.gguf", matrices=np.float16)
    policy = load_policy(resolve(str(base)), device="cpu")
    policy.thaw(1)
    with torch.no_grad():
        for parameter in policy.trained_parameters().values():
            parameter.add_(0.01)
    save_patch(policy, tmp_path / "patch")
    found = export.run(tmp_path / "patch", out=tmp_path / "out", terminal=Terminal(quiet=True), to="gguf")
    file = tmp_path / "out" / "toy-midtune.gguf"
    assert (found["path"], found["dtype"]) == (str(file), "F16")
    assert "llama-server -m toy-midtune.gguf" in (tmp_path / "out" / "README.md").read_text()
    tensors = policy.deployed_blocks(as_stored=True)
    read = load_policy(resolve(str(file)), quantize="none", device="cpu").model.state_dict()
    assert tensors and all(torch.equal(read[name], tensor.float()) for name, tensor in tensors.items())


def test_fp16_that_overflows_becomes_bf16(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = toy_gguf.write(tmp_path / "toy.gguf", scale=40.0)
    policy = load_policy(resolve(str(base)), device="cpu")
    policy.thaw(1)
    save_patch(policy, tmp_path / "patch")
    assert {t.dtype for t in load_file(tmp_path / "patch" / "patch.safetensors").values()} == {torch.float16}
    found = export.run(tmp_path / "patch", out=tmp_path / "out", terminal=Terminal(quiet=True))
    assert found["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    ids = torch.arange(3, 9)
    with torch.no_grad():
        assert model(ids.view(1, -1)).logits.isfinite().all()
    with pytest.raises(InputError, match="no finite logits in float16; export it with --dtype bf16"):
        require_finite(Path(policy.source.folder), ids.tolist(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"to": "onnx"}, "there is no form `onnx` to export to; choose hf, nf4 or gguf"),
        ({"to": "gguf", "dtype": "int8"}, "gguf has bf16, fp16, fp32, file"),
        ({"to": "nf4", "dtype": "file"}, "nf4 has bf16, fp16, fp32"),
        ({"to": "hf", "base": Path("b.gguf")}, "--base names a GGUF file, and hf is made from"),
        ({"to": "gguf"}, "is no GGUF file, and the blocks go into one; .* --base"),
    ],
)
def test_impossible_exports_are_refused(
    trained: tuple[Path, RunConfig], tmp_path: Path, asked: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        export.run(trained[0], out=tmp_path / "out", terminal=Terminal(quiet=True), **asked)
    assert not (tmp_path / "out").exists()
