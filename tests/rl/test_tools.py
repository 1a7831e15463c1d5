"""Environments written for TRL, whose methods are tools: the same tokens, masks and rewards as in TRL's own loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from midtune.errors import InputError
from midtune.model.policy import Policy
from midtune.rl.tools import ToolSpeech, tools_for
from midtune.rollout.decoding import Decoder, Drawn
from midtune.rollout.episodes import EpisodeSampler
from midtune.rollout.sampling import Sampling, SamplingLimits, padded
from tests.tasks.toy_data import load

Load = Callable[..., Policy]
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
FILE = '''
def rows():
    return [{"prompt": [{"role": "user", "content": f"Reach {n}."}], "goal": n} for n in range(8)]

class Environment:
    def __init__(self):
        self.reward = 0.0

    def reset(self, goal, **kwargs) -> str | None:
        self.place, self.goal, self.reward = 0, goal, 0.0
        return f" You are at {self.place}."

    def move(self, steps: int, back: bool = False) -> str:
        """
        Walk along.

        Args:
            steps: How many steps.
            back: Whether to walk backwards.

        Returns:
            Where that leads.
        """
        if steps > 9:
            raise ValueError("That is too far.")
        self.place += -steps if back else steps
        self.reward = float(self.place == self.goal)
        return f"You are at {self.place}."

def reward(environments, **kwargs):
    return [environment.reward for environment in environments]
'''


def call(steps: int, **more: Any) -> str:
    arguments = ", ".join([f'"steps": {steps}', *(f'"{key}": {value}' for key, value in more.items())])
    return f'<tool_call>\n{{"name": "move", "arguments": {{{arguments}}}}}\n</tool_call>'


# What the members of a group of four say, turn by turn.
SAID = [
    [call(2), "There."],
    [call(1) + "\n" + call(3, back="true"), call(12), call(4), "So far."],
    ["I stay."],
    ['<tool_call>\n{"name": "fly", "arguments": {}}\n</tool_call>', "<tool_call>\n{broken</tool_call>"],
]


@pytest.fixture(params=["qwen2_5", "qwen3"])
def policy(load: Load, request: pytest.FixtureRequest) -> Policy:
    policy = load("qwen3", "none", vocab_size=264, eos_token_id=260, max_position_embeddings=4096)
    policy.tokenizer.add_special_tokens(
        {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    )
    policy.tokenizer.chat_template = (TEMPLATES / f"{request.param}.jinja").read_text()
    return policy


def script(policy: Policy) -> list[list[list[int]]]:
    tokenizer = policy.tokenizer
    return [
        [tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"] for text in texts]
        for texts in SAID
    ]


class Scripted(GRPOTrainer):
    """TRL's own trainer, except that what the model says is given."""

    script: list[list[list[int]]]

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        said = [turns.pop(0) for turns in self.script if turns]
        assert len(said) == len(prompt_ids)
        return said, None


def test_turns_are_those_of_trls_loop(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "walk.py"
    path.write_text(FILE)
    task = load(path, eval_size=2, max_turns=6, tools=tools_for)
    row = {**task.train[0], "goal": 2}
    assert task.game is not None
    theirs = Scripted(
        model=policy.model,
        args=GRPOConfig(
            str(tmp_path),
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=2000,
            use_cpu=True,
            report_to="none",
        ),
        reward_funcs=[task.reward],
        train_dataset=Dataset.from_list(task.train),
        processing_class=copy.deepcopy(policy.tokenizer),
        environment_factory=task.game.make,
    )
    theirs.script = script(policy)
    expected = theirs._generate_and_score_completions([dict(row) for _ in range(4)])

    said = script(policy)

    def draw(decoder: Decoder, sampling: Sampling, limits: list[int], *_: Any, **__: Any) -> Drawn:
        now = [turns.pop(0) for turns in said if turns]
        assert len(now) == len(limits)
        ids, mask = padded(policy, now, "right")
        unknown = torch.zeros(ids.shape)
        return Drawn(ids, unknown, unknown, mask.sum(1), torch.zeros(len(now), dtype=torch.bool))

    # Not to be tried, which would take from the script.
    policy.decoder = Decoder
    monkeypatch.setattr(Decoder, "draw", draw)
    matches = task.game.matches(4)
    begun = [match.reset(row)["prompt"] for match in matches]
    sampler = EpisodeSampler(policy, SamplingLimits(plain=True), task.game)
    episodes = sampler.play(begun, Sampling(2000, 0.0, group_size=4))
    for number, episode in enumerate(episodes):
        kept = expected["prompt_mask"][number].bool()
        assert episode.prompt == expected["prompt_ids"][number][kept].tolist()
        kept = expected["completion_mask"][number].bool()
        assert episode.ids == expected["completion_ids"][number][kept].tolist()
        drawn = [place for turn in episode.turns for place in range(turn.start, turn.stop)]
        assert drawn == expected["tool_mask"][number][kept].nonzero()[:, 0].tolist()
    assert [len(episode.turns) for episode in episodes] == [2, 4, 1, 2]
    rewards = task.reward(environments=[match.environment for match in matches])
    assert rewards == [environment.reward for environment in theirs.environments]
    assert [match.environment.place for match in matches] == [2, 2, 0, 0]


def test_a_template_without_tools_is_refused(load: Load) -> None:
    with pytest.raises(InputError, match="knows no tools; let the model act by text with --set task.actions"):
        ToolSpeech(load("qwen3", "none"), "it", object())


def test_a_method_without_types_is_refused(policy: Policy) -> None:
    class Untyped:
        def move(self, steps):  # type: ignore[no-untyped-def]
            """Walk."""

    with pytest.raises(InputError, match="a method of it cannot be described to the model"):
        ToolSpeech(policy, "it", Untyped())


def test_text_prompts_and_classes_without_tools_are_refused(policy: Policy, tmp_path: Path) -> None:
    class Moving:
        def move(self) -> None:
            """Walk."""

    with pytest.raises(InputError, match="leave out --prompt-format plain"):
        ToolSpeech(policy, "it", Moving()).prompt_ids("Go.")
    path = tmp_path / "walk.py"
    path.write_text(FILE.replace("def move", "def _move"))
    with pytest.raises(InputError, match="no public method but `reset`"):
        load(path, eval_size=2, tools=tools_for)
