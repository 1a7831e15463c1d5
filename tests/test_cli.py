from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

import midtune
from midtune import cli
from midtune.commands import COMMANDS
from midtune.config import RunConfig, dump_config
from midtune.errors import InputError, Interrupted, RunStopped
from midtune.network import HUB_OFFLINE, OFFLINE, hub_is_offline, is_offline
from midtune.runs import RunFolder
from midtune.stages.at_work import at_work

HEAVY = {
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "datasets",
    "reasoning_gym",
    "math_verify",
    "scipy",
    "numpy",
    "pyarrow",
    "jinja2",
}
Run = Callable[..., SimpleNamespace]
Stage = Callable[..., list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    for name in ("MIDTUNE_DEBUG", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """A function: command line → exit code, stdout, stderr."""

    def command(*arguments: str) -> SimpleNamespace:
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        out, err = capsys.readouterr()
        return SimpleNamespace(code=caught.value.code, out=out, err=err)

    with mock.patch.dict(os.environ):
        yield command


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """A function that puts something else in a stage's place; returns the arguments of every call, by name."""

    def replace(name: str, function: Callable[..., dict[str, Any]] = lambda **_: {}) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def run(**arguments: Any) -> dict[str, Any]:
            calls.append(arguments)
            return function(**arguments)

        monkeypatch.setitem(sys.modules, f"midtune.stages.{name}", SimpleNamespace(run=run))
        return calls

    return replace


@pytest.fixture
def trained(stage: Stage) -> list[dict[str, Any]]:
    """What the train stage was called with; it does nothing else."""
    return stage("train", lambda **_: {"schema": 1, "blocks": [3], "score": float("nan")})


def one_error(result: SimpleNamespace, code: int = 2) -> str:
    assert result.code == code
    assert result.out == ""
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: ")
    return lines[0]


def make_run(folder: Path, **values: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(RunConfig.model_validate(values)))
    return folder


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert not HEAVY & imported_by(arguments)


def test_showing_a_task_imports_no_models_libraries() -> None:
    assert not {"torch", "transformers", "trl", "datasets"} & imported_by(["tasks", "chain_sum"])


def imported_by(arguments: list[str]) -> set[str]:
    """The modules that a command has imported when it ends, in a process of its own."""
    code = (
        "import sys\nfrom midtune.cli import main\n"
        f"try:\n    main({arguments})\n"
        "except SystemExit as done:\n"
        "    print(*sys.modules, file=sys.stderr)\n    raise\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(midtune.__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def test_version(run: Run) -> None:
    assert run("--version").out == f"midtune {midtune.__version__}\n"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_pipe_of_another_encoding_gets_what_it_can_write(encoding: str) -> None:
    sweep = Path(midtune.__file__).parents[1] / "recipes/results/sweep-tiny-chain-sum.json"
    line = [sys.executable, "-m", "midtune", "compare", str(sweep), str(sweep)]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    found = subprocess.run(line, capture_output=True, env=environment)
    assert found.returncode == 0, found.stderr
    assert b"closeness to the middle" in found.stdout and b"----+----" in found.stdout


def test_a_shell_completes_commands_and_options() -> None:
    line = [sys.executable, "-m", "midtune"]
    for words, wanted in (("midtune vo", "vote"), ("midtune train --sam", "--samples")):
        asked = {"_MIDTUNE_COMPLETE": "complete_bash", "COMP_WORDS": words}
        asked["COMP_CWORD"] = str(words.count(" "))
        found = subprocess.run(line, capture_output=True, text=True, env=os.environ | asked)
        assert found.stdout.split() == [wanted], found.stderr


def test_alone_it_shows_the_help(run: Run) -> None:
    result = run()
    assert result.code == 0
    assert "Usage: midtune" in result.out


@pytest.mark.parametrize(("name", "command"), cli.COMMANDS.items())
def test_every_command_has_a_stage_and_a_printer(name: str, command: cli.Command) -> None:
    module, function = command.printer.split(".")
    assert find_spec(f"midtune.stages.{command.stage or name}") is not None
    assert callable(getattr(import_module(f"midtune.report.{module}"), function))


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_with_an_example(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert result.code == 0
    assert f"Example: midtune {command}" in " ".join(result.out.split())
    assert "--json" in result.out
    assert "\x1b" not in result.out


def test_help_reads_defaults_and_choices_from_the_configuration(run: Run) -> None:
    text = " ".join(run("train", "--help").out.split())
    assert (
        "learning rate; auto: what moves the policy by a hundredth of its entropy a step (default: auto)"
        in text
    )
    assert "nf4|none" in text
    for panel in ("Model", "Task", "Blocks", "Training", "Evaluation", "Output"):
        assert f" {panel}: --" in text


def test_options_reach_the_configuration(run: Run, trained: list[dict[str, Any]]) -> None:
    result = run(
        *("train", "smollm2-135m", "--task", "reasoning-gym:gcd", "--task-arg", "max_value=9"),
        *("--task-arg", "names=[a, b]", "--layers", "14", "--steps", "3", "--lr", "1e-4", "--seed", "7"),
        *("--prompts-per-step", "2", "--group-size", "3", "--max-new-tokens", "5", "--samples", "1"),
        *("--eval-size", "9", "--quantize", "none", "--algorithm", "dr_grpo", "--baseline", "measured"),
        *("--set", "training.top_p=0.9", "--set", "training.epsilon=null", "--out", "here", "--json"),
    )
    assert result.code == 0, result.err
    (call,) = trained
    config = call["config"]
    assert (config.model.name, config.model.quantize) == ("smollm2-135m", "none")
    assert (config.task.name, config.task.args) == (
        "reasoning-gym:gcd",
        {"max_value": 9, "names": ["a", "b"]},
    )
    assert (config.blocks.layers, config.blocks.top_k) == ("14", 1)
    assert (config.training.steps, config.training.lr, config.training.top_p) == (3, 1e-4, 0.9)
    assert (config.training.prompts_per_step, config.training.group_size) == (2, 3)
    assert (config.training.max_new_tokens, config.training.algorithm) == (5, "dr_grpo")
    assert (config.evaluation.samples, config.task.eval_size, config.evaluation.baseline) == (
        1,
        9,
        "measured",
    )
    assert config.seed == 7
    assert (call["out"], call["resume"]) == (Path("here"), None)


def test_recipe_lies_under_the_options(run: Run, trained: list[dict[str, Any]]) -> None:
    Path("r.yaml").write_text("model: {name: m}\ntask: {name: a.jsonl}\ntraining: {steps: 5, lr: 1e-3}\n")
    assert run("train", "--recipe", "r.yaml", "--steps", "6", "--json").code == 0
    training = trained[0]["config"].training
    assert (training.steps, training.lr) == (6, 1e-3)


def test_json_is_all_of_stdout(run: Run, stage: Stage) -> None:
    def chatty(config: RunConfig, *, terminal: Any, **_: Any) -> dict[str, Any]:
        print("a library talks")
        terminal.message("working")
        return {"score": float("nan"), "path": Path("a"), "name": "é"}

    stage("train", chatty)
    result = run("train", "--json")
    assert json.loads(result.out) == {"score": None, "path": "a", "name": "é"}
    assert "a library talks" in result.err
    assert "working" in result.err
    assert "working" not in run("train", "--json", "--quiet").err


def test_the_settings_of_a_probe_reach_its_stage(run: Run, stage: Stage) -> None:
    calls = stage("probe")
    asked = ["--method", "sweep", "--layers", "2-5", "--budget", "90 steps", "--seeds", "3", "--steps", "7"]
    assert run("probe", *asked, "--json").code == 0
    config = calls[0]["config"]
    assert (config.probe.method, config.probe.layers) == ("sweep", "2-5")
    assert (config.probe.budget, config.probe.seeds, config.training.steps) == ("90 steps", 3, 7)
    assert config.blocks.layers is None


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ("merge runs/a --out b", {"target": Path("runs/a"), "out": Path("b")}),
        ("report runs/x", {"folders": [Path("runs/x")], "out": None}),
        ("report x y --out a.html", {"folders": [Path("x"), Path("y")], "out": Path("a.html")}),
        ("compare a b.json", {"files": [Path("a"), Path("b.json")], "top_k": 5, "out": None}),
        (
            "compare a b c --top-k 3 --out d.svg",
            {"files": [Path("a"), Path("b"), Path("c")], "top_k": 3, "out": Path("d.svg")},
        ),
    ],
)
def test_what_is_no_setting_reaches_the_stage(
    run: Run, stage: Stage, line: str, arguments: dict[str, Any]
) -> None:
    command, *rest = line.split()
    calls = stage(COMMANDS[command].stage or command)
    assert run(command, *rest, "--json").code == 0
    assert [{name: call[name] for name in call if name != "terminal"} for call in calls] == [arguments]
    assert f"midtune {command} --help" in one_error(run(command))


def test_report_prints_the_page(run: Run, stage: Stage) -> None:
    stage("report", lambda **_: {"page": "a b.html", "runs": []})
    assert run("report", "runs/x").out == "a b.html\n"
    assert json.loads(run("report", "x", "--json").out)["page"] == "a b.html"


@pytest.mark.parametrize("budget", ["20", "m", "-3m", "0 steps", "5 minutes"])
def test_a_budget_that_cannot_be_read_is_refused(run: Run, budget: str) -> None:
    found = run("probe", f"--budget={budget}")
    assert found.code == 2
    assert f"`probe.budget` on the command line was '{budget}', but it must be a time such as" in found.err
    assert found.err.count("\n") == 1


def test_an_unknown_way_to_rank_is_refused(run: Run) -> None:
    said = one_error(run("probe", "--method", "gradient"))
    assert "`probe.method` on the command line was 'gradient', but it must be 'race' or 'sweep'" in said


def test_a_probe_is_resumed_from_its_folder(run: Run, stage: Stage, elsewhere: Path) -> None:
    calls = stage("probe")
    make_run(elsewhere / "old", task={"name": "reasoning-gym:chain_sum"}, seed=5)
    assert run("probe", "--resume", "old", "--json").code == 0
    assert (calls[0]["config"].seed, calls[0]["resume"]) == (5, elsewhere / "old")


def test_compare_of_files(run: Run) -> None:
    rows = [{"block": block, "score": block * 0.1, "rank": 4 - block} for block in range(4)]
    about = {"model": "m", "task": "t", "method": "gradient", "seed": 0, "num_blocks": 4}
    Path("a.json").write_text(json.dumps({**about, "blocks": rows}))
    found = run("compare", "a.json", "a.json", "--top-k", "1", "--json", "--quiet")
    assert json.loads(found.out)["pairs"][0]["kendall"] == {"value": 1.0, "low": None, "high": None}
    assert "m on t, gradient, seed 0, 4 of 4 blocks" in run("compare", "a.json", "a.json", "--top-k", "1").out
    assert "ask for 1 to 4 with --top-k" in one_error(run("compare", "a.json", "a.json"))
    assert "b.json is not a probe.json" in one_error(run("compare", "a.json", "b.json"))


def test_eval_of_a_model_a_run_and_a_patch(run: Run, stage: Stage) -> None:
    found = stage("evaluate")
    assert run("eval", "m", "--task", "a.jsonl", "--json").code == 0
    folder = make_run(Path("runs/x"), model={"name": "base"}, task={"name": "b.jsonl"}, seed=3)
    assert run("eval", "runs/x", "--samples", "2", "--json").code == 0
    (folder / "patch").mkdir()
    (folder / "patch" / "patch.json").write_text("{}")
    assert run("eval", "runs/x/patch", "--task", "c.jsonl", "--json").code == 0
    calls = [(call["target"], config) for call in found for config in call["configs"]]
    assert [(target, c.model.name, c.task.name, c.seed) for target, c in calls] == [
        ("m", "m", "a.jsonl", 0),
        ("runs/x", "base", "b.jsonl", 3),
        ("runs/x/patch", "base", "c.jsonl", 3),
    ]
    assert calls[1][1].evaluation.samples == 2
    assert "no task was given for m" in one_error(run("eval", "m"))
    several = ["--task", "a.jsonl", "--task", "b.jsonl", "--samples", "8", "--k", "1,8", "--json"]
    assert run("eval", "m", *several).code == 0
    asked = [(config.task.name, config.evaluation.k) for config in found[-1]["configs"]]
    assert asked == [("a.jsonl", [1, 8]), ("b.jsonl", [1, 8])]
    few = one_error(run("eval", "m", "--task", "a.jsonl", "--samples", "2", "--k", "1,4"))
    assert "pass@4 was asked for, but 2 samples are drawn for each problem; use --samples 4 or more" in few
    assert "`evaluation.k" in one_error(run("eval", "m", "--task", "a.jsonl", "--k", "none"))


def test_eval_prints_a_table(run: Run, stage: Stage) -> None:
    score = {"score": 0.5, "low": 0.4, "high": 0.625, "n": 300}
    found = {
        "model": "m",
        "patch": [3],
        "task": "t",
        "quantize": "nf4",
        "greedy": score,
        "sampled": None,
        "tasks": [{"task": "t", "scores": {"greedy": score}, "before": None, "gain": None}],
        "lm_eval": [],
        "worse": None,
    }
    stage("evaluate", lambda target, configs, **_: found)
    out = run("eval", "m", "--task", "t.jsonl").out
    assert "m with trained blocks 3 (nf4)" in out
    row = ["t", "greedy", "0.500", "0.400", "to", "0.625", "300"]
    assert row in [line.split() for line in out.splitlines()]
    gain = {"value": -0.25, "low": -0.4, "high": -0.1}
    compared = {"task": "t", "scores": {"greedy": score}, "before": {"greedy": {**score, "score": 0.75}}}
    found |= {"tasks": [{**compared, "gain": {"greedy": gain}}], "worse": ["t"]}
    out = run("eval", "m", "--task", "t.jsonl").out
    row = ["t", "greedy", "0.750", "0.500", "-0.250", "-0.400", "to", "-0.100", "300"]
    assert row in [line.split() for line in out.splitlines()]
    assert "Worse than the base: t." in out
    assert "\x1b" not in out


def test_a_vote_takes_the_settings_of_the_first_run(run: Run, stage: Stage) -> None:
    calls = stage("vote")
    for name, seed in (("x", 3), ("y", 4)):
        make_run(Path("runs", name), model={"name": "base"}, task={"name": f"{name}.jsonl"}, seed=seed)
    assert run("vote", "runs/x", "runs/y", "--samples", "2", "--json").code == 0
    assert run("vote", "runs/y", "runs/x", "--task", "z.jsonl", "--quantize", "none", "--json").code == 0
    assert [call["targets"] for call in calls] == [["runs/x", "runs/y"], ["runs/y", "runs/x"]]
    first, second = (call["config"] for call in calls)
    assert (first.task.name, first.seed, first.evaluation.samples) == ("x.jsonl", 3, 2)
    assert (second.task.name, second.seed, second.model.quantize) == ("z.jsonl", 4, "none")
    assert "'runs/gone' does not exist" in one_error(run("vote", "runs/x", "runs/gone"))
    assert "midtune vote --help" in one_error(run("vote"))


def test_vote_prints_a_table(run: Run, stage: Stage) -> None:
    def score(value: float) -> dict[str, Any]:
        return {"score": value, "low": value - 0.1, "high": value + 0.1, "n": 300}

    found = {
        "model": "m",
        "task": "t",
        "quantize": "none",
        "base": score(0.2),
        "runs": [
            {"run": "runs/x", "blocks": [3], "score": score(0.4), "sampled": score(0.25)},
            {"run": "runs/[y]", "blocks": [4, 5], "score": score(0.5), "sampled": score(0.35)},
        ],
        "vote": score(0.6),
        "gain_over_best": {"value": 0.1, "low": -0.02, "high": 0.22},
        "solved_by_any": 0.7,
        "solved_by_all": 0.125,
        "overlap": [[1.0, 0.375], [0.375, 1.0]],
    }
    stage("vote", lambda targets, config, **_: found)
    for name in ("x", "[y]"):
        make_run(Path("runs", name), task={"name": "t.jsonl"})
    result = run("vote", "runs/x", "runs/[y]")
    lines = result.out.splitlines()
    words = [line.split() for line in lines]
    assert "m (unquantized) on t, 300 problems" in lines
    assert ["base", "model", "0.200", "0.100", "to", "0.300"] in words
    assert ["1", "runs/x", "3", "0.400", "0.300", "to", "0.500", "0.250"] in words
    assert ["2", "runs/[y]", "4,", "5", "0.500", "0.400", "to", "0.600", "0.350"] in words
    assert ["vote", "0.600", "0.500", "to", "0.700"] in words
    text = " ".join(result.out.split())
    assert "gain over run 2, the best here, is +0.100 (95% interval -0.020 to +0.220)." in text
    assert "At least one run solves 70.0% of the problems, all of them solve 12.5%." in text
    assert [line for line in words if "38%" in line] == [["1", "38%"], ["2", "38%"]]


@pytest.mark.parametrize("arguments", [["runs/x"], ["--out", "runs/x"]])
def test_resume_takes_everything_from_the_run(
    run: Run, trained: list[dict[str, Any]], arguments: list[str]
) -> None:
    make_run(Path("runs/x"), task={"name": "a.jsonl"}, training={"steps": 9})
    assert run("train", "--resume", *arguments, "--json", "--quiet").code == 0
    (call,) = trained
    assert call["config"].training.steps == 9
    assert (call["resume"], call["out"]) == (Path("runs/x").absolute(), None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runs/x", "--steps", "3"], "--steps was given too"),
        (["runs/x", "--seed", "0", "--set", "seed=1"], "--set, --seed was given too"),
        ([], "got none"),
        (["runs/x", "--out", "runs/y"], "got two folders"),
        (["nowhere"], "is not a run folder"),
    ],
)
def test_resume_of_nothing_or_with_more(
    run: Run, trained: list[dict[str, Any]], arguments: list[str], words: str
) -> None:
    make_run(Path("runs/x"), task={"name": "a.jsonl"})
    assert words in one_error(run("train", "--resume", *arguments))
    assert not trained


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--stepz", "3"], "--steps"),
        (["train", "--steps", "many"], "--steps"),
        (["train", "--steps"], "--steps"),
        (["train", "a", "b"], "midtune train --help"),
        (["teach"], "teach"),
        (["eval"], "midtune eval --help"),
        (["merge", "runs/x"], "--out"),
        (["train", "--steps", "0"], "`training.steps` on the command line"),
        (["train", "--algorithm", "ppo"], "'grpo', 'dr_grpo'"),
        (["train", "--group-size", "1"], "at least 2"),
        (["train", "--set", "training.lrr=1"], "`training.lr`"),
        (["train", "--set", "training.lr"], "--set part.key=value"),
        (["train", "--set", "model=tiny"], "`model.name`"),
        (["train", "--task-arg", "max_terms"], "--task-arg key=value"),
        (["train", "--recipe", "none.yaml"], "recipe none.yaml does not exist"),
        (["train", "smollm2-135m"], "no task was given for smollm2-135m"),
        (["tasks", "--task-arg", "=3"], "--task-arg key=value"),
        (["tasks", "check"], "needs the task to check"),
        (["tasks", "chain_sum", "gcd"], "one task is shown at a time"),
        (["tasks", "check", "mine.py"], "task file mine.py does not exist"),
        (["train", "--template", "r2"], "`task.template`"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    run: Run, trained: list[dict[str, Any]], elsewhere: Path, arguments: list[str], words: str
) -> None:
    assert words in one_error(run(*arguments))
    assert not trained
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize(
    ("error", "code"),
    [(InputError("a. b."), 2), (RunStopped("all rewards are zero."), 3), (Interrupted("saved."), 130)],
)
def test_errors_of_our_own_become_one_line(run: Run, stage: Stage, error: Exception, code: int) -> None:
    def fail(**_: Any) -> dict[str, Any]:
        raise error

    stage("train", fail)
    assert one_error(run("train"), code) == f"error: {error}"


def test_ctrl_c(run: Run, stage: Stage) -> None:
    def fail(**_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    stage("train", fail)
    assert one_error(run("train"), 130) == "error: interrupted."


def test_a_bug_is_one_line_and_says_where_the_run_is(run: Run, stage: Stage) -> None:
    def fail(config: RunConfig, **_: Any) -> dict[str, Any]:
        with at_work(RunFolder.open(make_run(Path("runs/tiny"))), "train"):
            raise RuntimeError("shapes\ndo not match")

    stage("train", fail)
    line = one_error(run("train"), 1)
    assert "RuntimeError: shapes do not match (the run is in runs/tiny)" in line
    assert "--debug" in line


def test_debug_shows_the_traceback(run: Run, stage: Stage) -> None:
    def fail(**_: Any) -> dict[str, Any]:
        raise RuntimeError("broken")

    stage("train", fail)
    result = run("train", "--debug")
    assert result.code == 1
    assert "Traceback" in result.err and "in fail" in result.err


def test_tasks_are_listed_one_a_line(run: Run) -> None:
    result = run("tasks")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert "reasoning-gym:chain_sum" in lines
    assert lines == sorted(lines)
    assert json.loads(run("tasks", "--json").out)["tasks"] == lines


def test_a_task_is_shown_with_its_arguments(run: Run) -> None:
    found = json.loads(run("tasks", "chain_sum", "--task-arg", "max_terms=2", "--json").out)
    assert found["task"] == "reasoning-gym:chain_sum"
    assert found["arguments"]["max_terms"] == 2
    assert found["question"] and found["answer"]
    text = run("tasks", "chain_sum", "--task-arg", "max_terms=2").out
    assert found["question"] in text and "max_terms=2" in text
    assert "chain_sum" in one_error(run("tasks", "chain_summ"))


def test_one_s_own_task_is_shown_and_checked(run: Run, elsewhere: Path) -> None:
    (elsewhere.parent / "mine.py").write_text(
        "def rows(): return [{'prompt': f'{n}?', 'answer': n} for n in range(9)]\n"
        "def reward(completions, answer, **columns):\n"
        "    return [float(c[-1]['content'] == str(a)) for c, a in zip(completions, answer)]\n"
    )
    shown = run("tasks", "../mine.py")
    assert shown.code == 0, shown.err
    assert "a right answer, which `reward` gives 1" in shown.out
    checked = run("tasks", "check", "../mine.py")
    assert checked.code == 0, checked.err
    assert "../mine.py can be trained on" in checked.out
    assert "6 problems to train on and 3 to evaluate on" in checked.out


def test_rewards_are_repeated_and_weighted(run: Run, trained: list[dict[str, Any]]) -> None:
    assert run("train", "--json", "--reward", "math", "--reward", "format=0.2", "--template", "r1").code == 0
    assert run("train", "--json", "--set", "task.reward=math").code == 0
    assert run("train", "--json").code == 0
    asked = [found["config"].task.reward for found in trained]
    assert asked == [["math", "format=0.2"], ["math"], None]
    assert trained[0]["config"].task.template == "r1"


def test_offline_is_told_to_midtune_and_the_hub(
    run: Run, trained: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (OFFLINE, HUB_OFFLINE):
        monkeypatch.setenv(name, "0")
    assert run("train", "--json").code == 0
    assert not is_offline() and not hub_is_offline()
    assert run("train", "--json", "--offline").code == 0
    assert is_offline() and hub_is_offline()


@pytest.mark.parametrize(("problems", "code"), [(0, 0), (2, 1)])
def test_a_doctor_that_finds_problems_ends_with_exit_code_1(
    run: Run, stage: Stage, problems: int, code: int
) -> None:
    checks = [{"name": "trl", "status": "problem", "found": "not installed", "fix": "pip install trl"}]
    result = {"checks": checks * problems, "problems": problems, "warnings": 1}
    stage("doctor", lambda terminal, **asked: result)
    shown = run("doctor")
    assert (shown.code, shown.err) == (code, "")
    assert shown.out.count("not installed") == problems
    shown = run("doctor", "--json")
    assert shown.code == code
    assert json.loads(shown.out) == result


def test_a_dry_run_trains_nothing(run: Run, stage: Stage) -> None:
    trained, calls = stage("train"), stage("dry_run")
    assert run("train", "m", "--task", "a.jsonl", "--dry-run", "--out", "runs/y", "--json").code == 0
    assert [(call["config"].model.name, call["out"]) for call in calls] == [("m", Path("runs/y"))]
    assert not trained


# What is shown.

HOSTILE = "a\x1b[31mred\x07\x9b2J\u202eback\x00\r\x1b]0;title\x07"


def test_messages_of_errors_have_no_controls_and_an_end(run: Run, stage: Stage) -> None:
    def fail(**_: Any) -> dict[str, Any]:
        raise InputError(HOSTILE + "x" * 10**6)

    stage("train", fail)
    line = one_error(run("train"))
    assert line.startswith("error: ared2Jback]0;titlexxx")
    assert line.endswith("… (996,030 characters left out)")
    assert len(line) < 4100


def test_json_says_all_and_the_terminal_obeys_none_of_it(run: Run, stage: Stage) -> None:
    stage("train", lambda *_, **__: {"note": HOSTILE + "\ud800é"})
    result = run("train", "--json")
    assert json.loads(result.out) == {"note": HOSTILE + "\ud800é"}
    assert result.out.isprintable() or set(result.out) - set("\n") == {
        letter for letter in result.out if letter.isprintable()
    }


def test_what_a_stage_reports_has_no_controls(run: Run, stage: Stage) -> None:
    def report(terminal: Any, **_: Any) -> dict[str, Any]:
        terminal.message(HOSTILE)
        print(HOSTILE)
        with terminal.training(1, HOSTILE):
            pass
        return {
            "problems": 0,
            "warnings": 0,
            "checks": [{"status": "ok", "name": "a", "found": HOSTILE, "fix": ""}],
        }

    stage("doctor", report)
    result = run("doctor")
    assert result.code == 0
    assert result.err == "ared2Jback]0;title\n" * 3
    assert "ared2Jback]0;title" in result.out
    assert not {"\x1b", "\x9b", "\x07", "\u202e", "\r"} & set(result.out)


@pytest.mark.parametrize("word", ["x" * 300, "x" * 5000, "a/" * 3000, "\udcff\udcfe"])
@pytest.mark.parametrize(
    "arguments", [["merge", "--out", "o"], ["report"], ["eval"], ["train", "--recipe"], ["vote"], ["compare"]]
)
def test_arguments_that_are_no_paths_are_one_error(run: Run, arguments: list[str], word: str) -> None:
    assert "unexpected" not in one_error(run(*arguments, word))
