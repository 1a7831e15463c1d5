from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from midtune.report.page import Run, comparison_page, run_page
from tests.report.toy_run import toy_report, toy_run

SECTIONS = ["asked", "gain", "training", "problems", "ranking", "cost", "commands"]
EVIL = "<script>alert(1)</script>\"'&{{ 7191 * 7 }}<!-- --> $x$ http"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "br"}


class Read(HTMLParser):
    """What a page consists of: `sections` and `ids` in order, `attributes`, and its `text` without the style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self._open: list[str] = []
        self._words: list[str] = []
        self.feed(page)
        assert self._open == []

    @property
    def text(self) -> str:
        return " ".join(" ".join(self._words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.attributes += [(tag, key, value) for key, value in given.items()]
        self.ids += [given["id"]] if "id" in given else []
        self.sections += [given["aria-labelledby"]] if tag == "section" else []
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self._words.append(data)


def test_a_page_says_what_was_asked_gained_and_spent() -> None:
    page = Read(run_page(toy_run()))
    assert page.sections == SECTIONS
    for words in (
        "toy on sums",
        "toy, v1, linear layers in 4-bit NF4",
        "sums (min_terms=2)",
        "blocks 2, 3",
        "the ranking of runs/probe (sweep)",
        "GRPO, 20 steps of 8 prompts × 4 completions of at most 16 tokens",
        "Learning rate 0.0002 KL weight 0 Temperature 1 Seed 7",
        "greedy 25.0% 20 to 30 50.0% 45 to 55 +25.0 +20 to +30",
        "unquantized 25.0%",
        "300 held-out problems",
        "Seconds per step, 2.0x faster than full training",
        "midtune, first prompts measured 5.00 s rollout 2.50 s (50%), reward 0.50 s (10%), update 2.00 s (40%)",
        "full training, first prompts measured 10.0 s rollout 3.00 s (30%), reward 0.50 s (5%), update 6.50 s (65%)",
        "midtune, mean of the run measured 4.00 s",
        "All training steps together took 80.0 s.",
        "Peak memory, 75% less than full training",
        "rollout measured 1.00 GiB reward measured 256.0 MiB update measured 512.0 MiB",
        "What is 2 + 3? Answer: 5 Before score 0 It is 6. After score 1 It is 5.",
        "Measured by the sweep method",
        "midtune train --recipe 'runs/my toy/config.yaml'",
        "midtune merge 'runs/my toy' --out merged",
        "vllm serve merged",
        "midtune 0.1.0",
    ):
        assert words in page.text


def test_figures_have_words_for_those_who_do_not_see_them() -> None:
    page = Read(run_page(toy_run()))
    labels = [value for _, key, value in page.attributes if key == "aria-label"]
    # The mean of steps 1 and 2 is 1.5 / 40, that of 19 and 20 is 19.5 / 40.
    assert labels == [
        "Reward over 20 steps: 0.0375 in the mean of the first 2, 0.487 of the last 2.",
        "Completion length, tokens over 20 steps: 28.5 in the mean of the first 2, 10.5 of the last 2.",
        "C(k) of 4 blocks by depth; the highest is block 2's.",
        "Gain of every block against the seconds of a training step.",
    ]
    assert ("html", "lang", "en") in page.attributes
    assert ("th", "scope", "row") in page.attributes and ("th", "scope", "col") in page.attributes
    assert "completion" not in page.ids and max(Counter(page.ids).values()) == 1


def test_a_page_of_a_run_without_a_rate_shows_what_it_became() -> None:
    run = toy_run()
    config = {**run.config, "training": {**run.config["training"], "lr": "auto"}}
    metrics = [{**line, "lr": 1e-4 * line["step"], "step_kl": 1e-3} for line in run.metrics]
    page = Read(run_page(replace(run, config=config, metrics=metrics)))
    assert "Learning rate auto KL weight 0" in page.text
    labels = [value for _, key, value in page.attributes if key == "aria-label"]
    assert labels[2:4] == [
        "KL of a step, as a share of the entropy over 20 steps: 0.001 in the mean of the first 2, 0.001 of the last 2.",
        "Learning rate over 20 steps: 0.00015 in the mean of the first 2, 0.00195 of the last 2.",
    ]


def widths(page: str) -> list[float]:
    """The parts of the bars in percent, in order."""
    return [float(width) for width in re.findall(r'<i class="\w+" style="width: ([0-9.]+)%"', page)]


def test_bars_are_on_one_scale() -> None:
    memory = [25, 100, 100, 25, 50]
    assert widths(run_page(toy_run())) == [25, 5, 20, 30, 5, 65, 25, 5, 10, *memory]
    report = toy_report()
    report["time"] |= {"compared_step": None, "full_source": "estimated"}
    report["memory"] |= {"full_source": "estimated"}
    page = run_page(toy_run(report=report))
    assert widths(page) == [25, 5, 10, 30, 5, 65, *memory]
    assert page.count('<div class="parts estimated"') == 2
    assert "full training estimated 10.0 s rollout" in Read(page).text


def test_notes_are_shown_beside_the_gains() -> None:
    note = "In steps 11 to 20 it collapsed."
    assert note in Read(run_page(toy_run(report=toy_report(notes=[note])))).text


def test_qlora_stands_beside_full_training_where_it_was_measured() -> None:
    report = toy_report()
    report["time"] |= {"qlora_step": 20.0, "qlora_source": "measured"}
    report["memory"] |= {"qlora_peak": 2**31, "qlora_source": "estimated"}
    text = Read(run_page(toy_run(report=report))).text
    assert "QLoRA, first prompts measured 20.0 s" in text
    assert "QLoRA estimated 2.00 GiB" in text


def test_peaks_of_phases_are_shown_where_they_were_measured() -> None:
    report = toy_report()
    assert "allocator" not in Read(run_page(toy_run())).text
    report["memory"] |= {"source": "cuda_allocated", "reserved": 3 * 2**29}
    assert (
        "CUDA's allocator had taken 1.50 GiB from the card at most."
        in Read(run_page(toy_run(report=report))).text
    )
    for none in ({**report["memory"], "phases": None}, {"peak": 2**30, "source": "resident", "saving": None}):
        page = Read(run_page(toy_run(report={**report, "memory": none})))
        assert "Peak memory of each phase" not in page.text


def test_what_a_run_has_not_left_has_no_section() -> None:
    report = toy_report(sampled=None, deployed=None)
    report["time"] |= {"full_step": None, "compared_step": None, "speedup": None}
    report["memory"] |= {"full_peak": None, "saving": None}
    bare = Run(path="r", config={}, report=report)
    page = Read(run_page(bare))
    assert page.sections == ["asked", "gain", "cost", "commands"]
    assert "none" not in page.text.lower()
    assert "unquantized" not in page.text.lower() and "than full training" not in page.text
    nothing = {**toy_run().probe, "blocks": [{"block": 0, "score": None, "rank": 1}]}  # type: ignore[dict-item]
    assert "ranking" not in Read(run_page(toy_run(probe=nothing))).sections
    assert "training" not in Read(run_page(toy_run(metrics=[{"step": 1, "reward": None}]))).sections


@pytest.mark.parametrize("score", [{"score": 3.0, "low": None, "high": None, "n": 1}, None])
def test_scores_that_are_no_fractions(score: dict[str, Any] | None) -> None:
    report = toy_report(sampled=None, deployed=None)
    report["quality"]["after"] = score or {"score": 3.0, "low": 2.0, "high": 4.2, "n": 9}
    page = run_page(toy_run(report=report))
    assert "gain, points" not in page
    assert "3 2 to 4.2" in Read(page).text if score is None else page.count('<b class="after"') == 0


def test_nothing_that_people_wrote_becomes_markup() -> None:
    run = toy_run()
    evil = replace(
        run,
        path=EVIL,
        config={**run.config, "task": {"args": {EVIL: EVIL}, "reward": EVIL}},
        report=toy_report(model=EVIL, task=EVIL, probe=EVIL),
        problems=[{**run.problems[0], "prompt": EVIL, "answer": EVIL}],
        environment={"device": EVIL, "versions": {EVIL: EVIL}},
        probe={**run.probe, "model": EVIL, "task": EVIL, "method": EVIL},  # type: ignore[dict-item]
    )
    for page in (run_page(evil), comparison_page([evil, run])):
        assert "<script" not in page and "50337" not in page
        read = Read(page)
        assert EVIL.split("{{")[0] in read.text
        assert not [key for _, key, _ in read.attributes if key.startswith("on")]


@pytest.mark.parametrize("page", [run_page(toy_run()), comparison_page([toy_run(), toy_run(metrics=[])])])
def test_a_page_needs_no_network(page: str) -> None:
    assert "http://" not in page and "https://" not in page and "@import" not in page
    assert "default-src 'none'" in page
    for tag, key, value in Read(page).attributes:
        assert key not in ("src", "srcset", "data", "action"), tag
        assert not key.endswith("href") or value.startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(\"?([^)]*)\)", page))


def test_figures_take_the_colours_of_the_page() -> None:
    page = run_page(toy_run())
    assert "@media screen and (prefers-color-scheme: dark)" in page and "@media print" in page
    figures = "".join(re.findall(r'role="img".*?</svg>', page, re.DOTALL))
    assert not re.search(r"#[0-9a-f]{6}\b(?=[;\"])", figures)
    light, dark = (
        set(re.findall(r"--(\w+):", style)) for style in re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    )
    assert set(re.findall(r"var\(--(\w+)\)", page)) <= light == dark


def test_runs_are_compared_in_a_table_and_by_their_rewards() -> None:
    other = toy_run(path="runs/other", report=toy_report(sampled=None, blocks=[5]), metrics=[])
    page = comparison_page([toy_run(), other])
    text = Read(page).text
    assert "2 runs compared" in text
    gain = "+25.0 +20 to +30"
    assert f"runs/my toy toy sums 2, 3 {gain} {gain} {gain} 4.00 s 80.0 s 1.00 GiB" in text
    assert f"runs/other toy sums 5 {gain} - {gain} 4.00 s - 1.00 GiB" in text
    assert "Training reward" in text
    assert "Training reward" not in Read(comparison_page([other, other])).text


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_scrolls_no_page_sideways(width: int, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    run = toy_run()
    endless = {**run.problems[0], "prompt": "x" * 3000, "before": {"completion": "y" * 3000, "score": 0.0}}
    long = replace(
        run,
        path="runs/" + "z" * 200,
        report=toy_report(model="m" * 200, task="t" * 200, blocks=list(range(48))),
        problems=[endless],
    )
    pages = [run_page(run), run_page(long), comparison_page([run, long, run])]
    frames = "".join(f'<iframe width={width} srcdoc="{html.escape(page)}"></iframe>' for page in pages)
    # A window is no narrower than 500 pixels, a frame may be.
    measure = """onload = () => { document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(
        frame => [frame.contentDocument.documentElement.scrollWidth, frame.contentDocument.body.innerText.length])) }"""
    (tmp_path / "frames.html").write_text(
        f"<!doctype html><meta charset=utf-8><body>{frames}<script>{measure}</script>"
    )
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--hide-scrollbars", "--dump-dom"),
            (tmp_path / "frames.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = re.search(r"<title>(.*?)</title></head>", done.stdout)
    assert title is not None, done.stderr
    for scrolled, letters in json.loads(html.unescape(title[1])):
        assert scrolled == width
        assert letters > 500
