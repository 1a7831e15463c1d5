"""Bad command lines and recipes, drawn by seed: each ends with one error or does what it can, and none surprises.

Run it with `pytest -m slow -s tests/test_fuzz.py`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import typer.main

from midtune import cli
from midtune.config import KEYS, RunConfig, dump_config

pytestmark = pytest.mark.slow

DRAWN = 250
LONGEST_S = 60
WORDS = [
    *("", " ", "\t", "0", "1", "2", "-1", "-0", "1.5", "1e-5", "1e400", "nan", "inf", "9" * 30, "9" * 5000),
    *("true", "null", "~", "[]", "{}", "[1, 2]", "{a: 1}", "[[]]", "- a", "a: b", "*a", "&a [*a]", "!!int a"),
    *(
        "!!python/object:os.system",
        "2001-99-99",
        "0x1F",
        "1:30",
        "'",
        '"',
        "\\",
        "%s",
        "{x}",
        "[bold]",
        "$(ls)",
    ),
    *("x" * 300, "x" * 9000, "a/" * 3000, "é", "\u202eab", "a\x1b[31mb", "\udcff", "\ud83d", "😀" * 200),
    *("-", "--", "---", "=", "a=b", "=1", "a=", "..", "/", "~/x", "./x", "/dev/null", "/dev/zero", "a/b/c"),
    *("org/name", "tiny", "smollm2-135m", "middle", "best", "10-12", "12-10", "3,7", "3,,7", ",", "-3", "99"),
    *("24GB", "0GB", "-4GB", "9999999999GB", "RTX 4090", "cpu", "cuda:99", "20m", "0 steps", "9e9h"),
    *("reasoning-gym:chain_sum", "reasoning-gym:", "reasoning-gym:nope", "tiny-programs", "frozen-lake"),
    *("http://127.0.0.1:1", "file:///etc/passwd", "hf://a", "org/name:x:y", "exact", "exact=nan", "math=-1"),
    *(
        "good.jsonl",
        "broken.jsonl",
        "empty.csv",
        "binary.parquet",
        "folder",
        "task.py",
        "task.py:nope",
        "run",
    ),
    *("model.gguf", "recipe.yaml", "nothing.yaml", "probe.json"),
]
# Words that mean something somewhere, so that lines get further.
GOOD = [word for word in WORDS[WORDS.index("org/name") :] if word not in (",", "-3", "3,,7")] + [
    "1",
    "2",
    "7",
]
# Which of the commands may reach a stage: none of these trains, loads a model or asks the network.
STAGES = {
    "train": ["--dry-run", "--offline"],
    "plan": ["--offline"],
    "tasks": ["--offline"],
    "report": [],
    "compare": [],
    "merge": [],
}
# The others are ended by a key that nobody knows, if not before.
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
REFUSED = ["probe", "eval", "vote", "bench"]


def make_files(folder: Path, rng: random.Random) -> None:
    rows = [json.dumps({"question": f"{n} + {n}", "answer": str(2 * n)}) for n in range(20)]
    (folder / "good.jsonl").write_text("\n".join(rows))
    (folder / "broken.jsonl").write_text("\n".join(rows) + '\n{"question": ')
    (folder / "empty.csv").write_text("")
    (folder / "binary.parquet").write_bytes(rng.randbytes(500))
    (folder / "model.gguf").write_bytes(b"GGUF" + rng.randbytes(500))
    (folder / "task.py").write_text(
        "def load_rows(split):\n    raise OSError(28, 'No space left on device')\n"
    )
    (folder / "folder").mkdir()
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(dump_config(RunConfig()))
    (folder / "run" / "report.json").write_text("[]")
    (folder / "probe.json").write_text('{"schema": 1, "blocks": [{}]}')


def draw_recipe(rng: random.Random) -> bytes:
    """A recipe with some keys set to anything, or with bytes of it changed."""
    data: dict[str, Any] = json.loads(RunConfig().model_dump_json())
    anything = [*WORDS, None, True, -1, 0, 10**20, 1e308, [], {}, [{}], {"a": {"b": []}}, ["x"] * 50]
    for key in rng.sample(KEYS, rng.choice([0, 1, 1, 2])):
        part, _, name = key.rpartition(".")
        (data[part] if part else data)[name] = rng.choice(anything)
    if rng.random() < 0.2:
        data[rng.choice([*data, "nope", ""])] = rng.choice(anything)
    text = bytearray(json.dumps(data, indent=1).encode())
    if rng.random() < 0.3:
        for _ in range(rng.randint(1, 5)):
            text[rng.randrange(len(text))] = rng.choice(b"\x00\xff{}[]:,\"'&*!|>%@`#- \n\t09a")
    return bytes(text[: rng.randrange(len(text))] if rng.random() < 0.1 else text)


def draw_line(rng: random.Random) -> list[str]:
    command = rng.choice([*STAGES, *STAGES, *REFUSED])
    flags = [
        option
        for parameter in COMMANDS[command].params
        for option in parameter.opts
        if option not in ("--resume", "--debug", "--help", "-h")
    ]
    line = [command, *STAGES.get(command, ["--set", "no.key=1"])]
    if command == "tasks" and rng.random() < 0.7:
        line += ["check"] if rng.random() < 0.5 else []
        line.append(rng.choice(GOOD))
    if command in ("report", "compare", "merge", "eval", "vote"):
        line.append(rng.choice(["run", *GOOD, *WORDS]))
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        words = GOOD if rng.random() < 0.6 else WORDS
        match rng.randrange(6):
            case 0:
                line.append(rng.choice(words))
            case 1 | 2:
                line += ["--set", f"{rng.choice(KEYS)}={rng.choice(words)}"]
            case 3 if "--recipe" in flags:
                line += ["--recipe", rng.choice(["recipe.yaml"] * 9 + WORDS)]
            case _:
                line += [rng.choice(flags), rng.choice(words)]
    return line


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_unexpected(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(seed)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    make_files(tmp_path, rng)

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {LONGEST_S} s")

    signal.signal(signal.SIGALRM, stop)
    ends: Counter[int] = Counter()
    wrong, slowest = [], 0.0
    for _ in range(DRAWN):
        (tmp_path / "recipe.yaml").write_bytes(draw_recipe(rng))
        line = draw_line(rng)
        started = time.monotonic()
        signal.alarm(LONGEST_S)
        with pytest.raises(SystemExit) as caught:
            cli.main(line)
        signal.alarm(0)
        slowest = max(slowest, time.monotonic() - started)
        out, err = capsys.readouterr()
        code = caught.value.code or 0
        ends[code] += 1
        good = code == 0 or (code == 2 and err.count("error: ") == 1 and out == "")
        if not good or "error: unexpected" in err or "Traceback" in err or len(err) > 10_000 or "\x1b" in err:
            shown = [word if len(word) < 100 else f"{word[:20]}…{len(word)}" for word in line]
            recipe = (tmp_path / "recipe.yaml").read_bytes() if "recipe.yaml" in line else b""
            (tmp_path / f"wrong-{len(wrong)}.yaml").write_bytes(recipe)
            wrong.append(f"{shown} ended with {code}: {err[-500:]}")
    with capsys.disabled():
        print(
            f"\nseed {seed}: {dict(ends)} of {DRAWN} by exit code, the slowest {slowest:.1f} s, {len(wrong)} wrong"
        )
    assert not wrong, "\n".join(wrong) + f"\n{os.getcwd()}"
