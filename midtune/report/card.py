"""A model card for what a run is given away as: its README.md, for a person and for the hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from midtune.report.formats import blocks_text, interval_texts, percent_text, with_interval
from midtune.report.summary import COMPARED, are_fractions

# What a run can be given away as → what people call it.
FORMS = {
    "patch": "the trained blocks alone",
    "nf4": "4-bit, as trained",
    "hf": "unquantized",
    "gguf": "GGUF",
}
_TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

`vllm serve {name}` serves it"""
_HOW = {
    "hf": f"{_TRANSFORMERS}.",
    "nf4": f"```bash\npip install transformers bitsandbytes\n```\n\n{_TRANSFORMERS}, from vLLM 0.28 on with "
    "`pip install vllm-bnb-plugin` and in bfloat16 or float16.",
    "gguf": "```bash\nllama-server -m {name}\n```\n\nAnything else that is built on llama.cpp loads it too.",
    "patch": "The patch belongs to the base model above, which it needs beside it.\n\n```bash\npip install midtune\n"
    "{fetch}midtune eval {here}\nmidtune merge {here} --out merged\n```",
}


def model_card(
    report: Mapping[str, Any],
    form: str,
    name: str,
    *,
    exports: Mapping[str, Any] | None = None,
    base: str | None = None,
    licence: str | None = None,
) -> str:
    """The card, as Markdown with the hub's metadata on top.

    Args:
        report: report.json; empty for a patch without its run.
        form: a key of `FORMS`, which says how to load it.
        name: what to load it by: `org/name` on the hub, or the folder's or file's own name.
        exports: the `forms` of export.json, for the table of scores.
        base: the base model's id on the hub, where it has one.
        licence: the base model's, where it is known, such as `apache-2.0`.
    """
    about = {
        "base_model": base,
        "license": licence,
        "pipeline_tag": "text-generation",
        "library_name": "transformers" if form in ("hf", "nf4") else None,
    }
    front = [f"{key}: {value}" for key, value in about.items() if value]
    parts = [
        "\n".join(["---", *front, "tags:", "- midtune", "- reinforcement-learning", "---"]),
        f"# {name}",
        _summary(report, form, base),
    ]
    if scores := _scores(report, exports or {}):
        parts += ["## What it gained", scores]
    of_base = f"is {licence}" if licence else "is not known here; look it up before you pass this on"
    on_hub = "/" in name
    fetch = f"hf download {name} --local-dir patch\n" if on_hub else ""
    parts += [
        "## How to load it",
        _HOW[form].format(name=name, fetch=fetch, here="patch" if on_hub else name),
    ]
    parts += ["## Licence", f"The licence of the base model {of_base}. It holds for this model too."]
    return "\n\n".join(parts) + "\n"


def form_scores(report: Mapping[str, Any], exports: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Greedy scores before and after in every form that was scored: the run's own first, then the exports'."""
    found = {"in the run": report["quality"]} if report else {}
    scored = {FORMS[form]: export["scores"] for form, export in exports.items() if export["scores"]}
    deployed = report.get("deployed")
    if deployed and FORMS["hf"] not in scored:
        found[FORMS["hf"]] = deployed
    return {**found, **scored}


def form_rows(report: Mapping[str, Any], exports: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the table of forms, as text: form, before, after, gain, each with its 95% interval."""
    kinds = form_scores(report, exports)
    fractions = are_fractions(kinds)
    return [
        [name, *(with_interval(*interval_texts(found[part], fractions)) for part in COMPARED)]
        for name, found in kinds.items()
    ]


def _summary(report: Mapping[str, Any], form: str, base: str | None) -> str:
    if not report:
        return f"Blocks of {base or 'a language model'}, trained with reinforcement learning by midtune."
    trained, total = report["trainable_parameters"], report["total_parameters"]
    return (
        f"{base or report['model']} after reinforcement learning of {blocks_text(report['blocks'])} alone on "
        f"{report['task']}: {percent_text(trained / total)} of its parameters were trained, by midtune, and all others "
        f"are the base model's. This is {FORMS[form]}."
    )


def _scores(report: Mapping[str, Any], exports: Mapping[str, Any]) -> str:
    kinds = form_scores(report, exports)
    if not kinds:
        return ""
    unit = "gain, points" if are_fractions(kinds) else "gain"
    rows = [["form", "before", "after", unit], ["---", "---:", "---:", "---:"], *form_rows(report, exports)]
    problems = max(found["after"]["n"] for found in kinds.values())
    note = (
        f"Greedy answers to {problems:,} held-out problems, which training never saw; in brackets 95% intervals, the "
        "gain's paired by problem. Each form is compared with the base model in the same form. A block that was "
        "trained over 4-bit weights makes up for a part of what they lost, so a gain belongs to its form."
    )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{note}"
