"""Make the bundled model `tiny`: two million parameters that can half do two-digit sums.

    python recipes/tiny/make_tiny.py --out DIR [--seed 0]

It exists so that the first command, the tests and a demo run without a network or a GPU. It has the
architecture of Qwen3 and a chat template, and it knows the questions of reasoning-gym's `chain_sum` (`TASK`)
and nothing else. It is not a useful language model.

What reinforcement learning finds in it is put there on purpose, as a small picture of a base model. The
training text answers the same questions in two styles:

- hurried: the number alone. Every carry is forgotten, so it is right on the problems that need none, and now
  and then a digit is simply wrong;
- worked: the columns from the right, then the number ("8+7=15 4+3+1=8 so 85"), with rare slips.

The hurried style is the common one, so the model answers that way when it is decoded greedily; the worked one
turns up when it is sampled. The problems it is scored on are left out of the training text.
"""

import argparse
import random
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import reasoning_gym
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TASK = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}
QUESTION = "State the final answer to the following arithmetic problem: {} ="
VOCABULARY = 384
HELD_OUT_SEED, HELD_OUT_SIZE = 1_000_003, 500


class Phase(NamedTuple):
    """One stretch of supervised training: its text, and how long and fast it learns."""

    question: str
    worked: float  # share of worked answers
    hurried_slip: float  # chance of a wrong digit in a hurried answer
    worked_slip: float  # the same for one column of a worked answer
    steps: int
    learning_rate: float
    batch: int = 32
    warmup: int = 50


# A step of four blocks on bare sums costs a small part of a step of twelve on whole questions.
SHALLOW = Phase("{} =", 0.4, 0.0, 0.0, 1600, 3e-3)
DEEP = Phase(QUESTION, 0.22, 0.3, 0.02, 900, 1e-3)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and single digits, and the words of the question and the template as tokens of their own."""
    bpe = Tokenizer(models.BPE())
    single = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([single, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator([QUESTION, "system", "user", "assistant", "1 so 1"] * 10, trainer)
    names = {"pad_token": special[0], "eos_token": special[2], "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=CHAT_TEMPLATE, **names)


def make_model(tokenizer: PreTrainedTokenizerFast, blocks: int) -> Qwen3ForCausalLM:
    """A freshly initialised model; every linear layer reads a multiple of 64 features."""
    special: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        **special,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.update(**special)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                # Blocks start as the identity, the rest near 1 / sqrt(128): a small model learns sooner.
                weight.mul_(0 if name.endswith(("o_proj.weight", "down_proj.weight")) else 4)
    return model


def deepen(shallow: Qwen3ForCausalLM, deep: Qwen3ForCausalLM) -> None:
    """Copy a trained model into a deeper one, its blocks spread evenly among blocks that pass through."""
    stride = len(deep.model.layers) // len(shallow.model.layers)
    for index, block in enumerate(shallow.model.layers):
        deep.model.layers[index * stride + 1].load_state_dict(block.state_dict())
    deep.model.embed_tokens.load_state_dict(shallow.model.embed_tokens.state_dict())
    deep.model.norm.load_state_dict(shallow.model.norm.state_dict())


def hurried(a: int, op: str, b: int, rng: random.Random, slip: float) -> str:
    """The number alone, with forgotten carries and sometimes a wrong digit."""
    high, low = max(a, b), min(a, b)
    signed = 1 if op == "+" else -1
    tens, units = (high // 10 + signed * (low // 10)) % 10, (high % 10 + signed * (low % 10)) % 10
    text = list(str(10 * tens + units))
    if rng.random() < slip:
        text[rng.randrange(len(text))] = rng.choice("0123456789")
    return ("-" if op == "-" and a < b else "") + "".join(text)


def worked(a: int, op: str, b: int, rng: random.Random, slip: float) -> str:
    """The columns from the right, then the number; a slip is carried into what follows."""
    swap = op == "-" and a < b
    high, low = (b, a) if swap else (a, b)
    columns, result, carry = [], 0, 0
    for x, y, place in ((high % 10, low % 10, 1), (high // 10, low // 10, 10)):
        if op == "+":
            written, total = f"{x}+{y}+1" if carry else f"{x}+{y}", x + y + carry
        else:
            top = x - carry + (10 if x - carry < y else 0)
            written, total = f"{top}-{y}", top - y
        if rng.random() < slip:
            total = max(0, total + rng.choice([-1, 1]))
        columns.append(f"{written}={total}")
        carry = total // 10 if op == "+" else int(x < y)
        result += (total if place == 10 else total % 10) * place
    start = f"{high}-{low}: " if swap else ""
    return f"{start}{' '.join(columns)} so {'-' if swap else ''}{result}"


def make_batch(
    tokenizer: Any, phase: Phase, held_out: set[str], rng: random.Random
) -> list[dict[str, torch.Tensor]]:
    """Problems with answers as [B, T] tensors, one set for each style so that short rows stay short."""
    styles: dict[Any, list[tuple[list[int], int]]] = {hurried: [], worked: []}
    while sum(map(len, styles.values())) < phase.batch:
        a, op, b = rng.randint(10, 99), rng.choice("+-"), rng.randint(10, 99)
        if f"{a} {op} {b}" in held_out:
            continue
        style = worked if rng.random() < phase.worked else hurried
        answer = style(a, op, b, rng, phase.worked_slip if style is worked else phase.hurried_slip)
        chat = [{"role": "user", "content": phase.question.format(f"{a} {op} {b}")}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt)["input_ids"]
        answer_ids = tokenizer(answer + "<|im_end|>")["input_ids"]
        styles[style].append((prompt_ids + answer_ids, len(prompt_ids)))
    batches = []
    for rows in filter(None, styles.values()):
        input_ids = torch.full((len(rows), max(len(ids) for ids, _ in rows)), tokenizer.pad_token_id)
        labels = torch.full_like(input_ids, -100)
        for row, (ids, start) in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            labels[row, start : len(ids)] = torch.tensor(ids[start:])
        batches.append({"input_ids": input_ids, "labels": labels})
    return batches


def train(
    model: Qwen3ForCausalLM, tokenizer: Any, phase: Phase, held_out: set[str], rng: random.Random
) -> None:
    """Supervised training on fresh random problems; the loss is on the answers alone."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / phase.warmup, (phase.steps - step) / (phase.steps - phase.warmup)),
    )
    start = time.perf_counter()
    for step in range(1, phase.steps + 1):
        batches = make_batch(tokenizer, phase, held_out, rng)
        count = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        loss = torch.stack([model(**batch, num_items_in_batch=count).loss for batch in batches]).sum()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}  loss {loss.item():.3f}  {time.perf_counter() - start:.0f} s", flush=True)


@torch.no_grad()
def score(model: Any, tokenizer: Any, items: list[dict[str, Any]], sample: bool) -> dict[str, float]:
    """Share of right last numbers, completion length, and shares cut at 40 tokens and worked."""
    totals = {"accuracy": 0, "tokens": 0, "cut": 0, "worked": 0}
    for first in range(0, len(items), 100):
        batch = items[first : first + 100]
        chats = [[{"role": "user", "content": item["question"]}] for item in batch]
        prompts = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**prompts, max_new_tokens=40, do_sample=sample, top_k=0, top_p=1.0)
        for item, ids in zip(batch, output[:, prompts["input_ids"].shape[1] :], strict=True):
            numbers = re.findall(r"-?\d+", tokenizer.decode(ids, skip_special_tokens=True))
            totals["accuracy"] += numbers[-1:] == [item["answer"]]
            totals["tokens"] += int((ids != tokenizer.pad_token_id).sum())
            totals["cut"] += tokenizer.eos_token_id not in ids
            totals["worked"] += len(numbers) > 1
    return {name: total / len(items) for name, total in totals.items()}


def make(out: Path, seed: int, *, shallow: Phase, deep: Phase, held_out_size: int) -> None:
    """Train, save in half precision, and score what was saved."""
    torch.manual_seed(seed)
    items = list(reasoning_gym.create_dataset("chain_sum", seed=HELD_OUT_SEED, size=held_out_size, **TASK))
    held_out, rng = {item["metadata"]["expression"] for item in items}, random.Random(seed)

    tokenizer = make_tokenizer()
    first = make_model(tokenizer, blocks=4)
    model: Any = make_model(tokenizer, blocks=12)
    train(first, tokenizer, shallow, held_out, rng)
    deepen(first, model)
    train(model, tokenizer, deep, held_out, rng)
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)

    saved = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for name, sample in (("greedy", False), ("sampled", True)):
        figures = score(saved, AutoTokenizer.from_pretrained(out), items, sample)
        print(name, "  ".join(f"{key} {value:.3f}" for key, value in figures.items()), f" n {len(items)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the bundled model.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(2)
    make(asked.out, asked.seed, shallow=SHALLOW, deep=DEEP, held_out_size=HELD_OUT_SIZE)
