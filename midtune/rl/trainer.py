"""TRL's GRPOTrainer, with the seams replaced that training one block changes.

TRL and Transformers keep losses, advantages, logging, schedules, trackers and the loop; midtune's sampler is TRL's
`rollout_func`. Replaced: `_prepare_inputs` (micro-batches of whole groups, so a prompt is computed once; advantages TRL
does not know), `_compute_loss` (slices of a micro-batch after memory ran out), `_get_per_token_logps_and_entropies`
(the tail from boundary states), the reference model (the original blocks instead of a second model), what a checkpoint
holds (only trained tensors), that it is whole and the same for any number of processes. These are private methods of
TRL 1.16; a parity test guards them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.training_args import ParallelMode
from trl import GRPOConfig, GRPOTrainer

from midtune import processes
from midtune.device import random_state, set_random_state
from midtune.errors import MidtuneError
from midtune.measure.meter import Meter
from midtune.model.memory import RowLimit, slices
from midtune.model.policy import Policy
from midtune.rl.advantages import Values
from midtune.rl.algorithms import Advantages
from midtune.rl.checks import check_trainable, compare_log_probs, frozen_checksums
from midtune.rl.gradients import Bf16Gradients
from midtune.rl.prompts import PromptChooser
from midtune.rl.tail import completion_log_probs
from midtune.rl.trust_region import divergence
from midtune.rl.turns import figures_of, token_advantages, turns_of
from midtune.rollout.sampling import Rollout, Sampler, Sampling
from midtune.runs import checkpoints_in
from midtune.whole import written_whole

TRAINED_TENSORS, KNOWN_PROMPTS = "trained.safetensors", "prompts.safetensors"
# Initial loss scale in fp16, where single tokens' gradients would vanish. It halves when gradients overflow, which
# wastes a rollout, and doubles after this many steps without an overflow.
FIRST_LOSS_SCALE, SCALE_GROWS_AFTER = 2.0**12, 200
# How TRL averages a loss over completions: over tokens, as a sum that it divides itself, or over rows.
LOSS_MEANS = {
    "bnpo": "tokens",
    "cispo": "sum",
    "dapo": "sum",
    "dr_grpo": "rows",
    "grpo": "rows",
    "luspo": "rows",
}


class LayerGRPOTrainer(GRPOTrainer):
    """GRPO on the trained blocks of a policy.

    Each of several processes holds the policy and computes its own groups. Their gradients are averaged after a step's
    last backward pass: it ends with the trained block, so there is nothing to overlap that with.

    Args:
        sampler: draws the completions; its policy, already thawed or given LoRA, is trained.
        args: TRL's settings; `beta > 0` compares with the blocks as they are now.
        rows: training rows in the order they are used, one per prompt, each once.
        meter: receives the phases `rollout` and `reward`.
        tail_arguments: for `completion_log_probs`; see `tail_settings`.
        update_rows: most completions that go through an update together; None: a whole micro-batch.
        bf16_gradients: holds gradients until a step's last micro-batch; None: they stay in `.grad`.
    """

    _name = "LayerGRPO"
    args: GRPOConfig

    def __init__(
        self,
        sampler: Sampler,
        sampling: Sampling,
        args: GRPOConfig,
        rewards: list[Callable[..., list[float]]],
        rows: list[dict[str, Any]],
        *,
        meter: Meter,
        callbacks: list[TrainerCallback] | None = None,
        lr_multipliers: Mapping[int, float] | None = None,
        tail_arguments: Mapping[str, Any] | None = None,
        update_rows: int | None = None,
        advantages: Advantages | None = None,
        bf16_gradients: Bf16Gradients | None = None,
        on_message: Callable[[str], None] | None = None,
    ) -> None:
        self.sampler, self.sampling = sampler, sampling
        self.policy = policy = sampler.policy
        self.lr_multipliers = lr_multipliers or {}
        self.tail_arguments = tail_arguments or {}
        self.meter = meter
        self.own_advantages = advantages
        self.chooser: PromptChooser | None = None
        self.bf16_gradients = bf16_gradients
        self.environments: list[Any] | None
        # The current groups: TRL's inputs, and their `rollout`.
        self._piece: dict[str, Any] = {}
        self._compared = False
        # Seconds that the last checkpoint took.
        self.checkpoint_s = 0.0
        # Share of the last rollout's completions cut at the limit.
        self.cut_share = 0.0
        self._buffered_inputs: list[dict[str, Any]] | None = None
        # TRL loads a second model when it sees a beta, so it gets beta after it is built.
        beta, args.beta = args.beta, 0.0
        super().__init__(
            model=policy.model,
            args=args,
            reward_funcs=rewards,
            train_dataset=Dataset.from_list(rows),
            processing_class=policy.tokenizer,
            callbacks=callbacks,
        )
        args.beta = self.beta = beta
        # TRL seeds each process differently, and adapters begin at random.
        set_random_state(policy.device, processes.from_main(lambda: random_state(policy.device)))
        broadcast([parameter.data for parameter in policy.trained_parameters().values()])
        # Wrapping the model would send all of it, and hold gradients twice.
        self.accelerator.prepare_model = functools.partial(
            self.accelerator.prepare_model, evaluation_mode=True
        )
        if policy.compute_dtype == torch.float16:
            # accelerate makes one only on cards, and would compute in fp16 what is fp32 here.
            self.accelerator.scaler = torch.amp.GradScaler(
                policy.device.type, init_scale=FIRST_LOSS_SCALE, growth_interval=SCALE_GROWS_AFTER
            )
        if beta > 0:
            policy.keep_reference()
            self.ref_model = policy.reference  # only ever handed back to the log-prob method below
        self.rollout_func = self._sample
        if not sampler.is_policy:
            # TRL then calls its `sync_weights`, and corrects for the difference of its log-probs.
            self.use_vllm, self.vllm_mode, self.vllm_generation = True, "server", sampler
            self._last_loaded_step = -1
        self.update_rows = RowLimit(
            "the update",
            "lower --max-new-tokens or --group-size, or add --set training.recompute=true",
            update_rows,
            on_message,
            # Processes that average together must do the same passes.
            halves=self.accelerator.num_processes == 1,
            on_oom_hint=sampler.limits.rows.on_oom_hint,
        )
        # accelerate's `cuda` has no number; a tensor there has one.
        computes_on = torch.empty(0, device=self.accelerator.device).device
        if computes_on != policy.device:
            raise MidtuneError(
                f"the model is on {policy.device}, but the trainer computes on {computes_on}; choose a "
                "card with --device, or with CUDA_VISIBLE_DEVICES before Python starts."
            )
        check_trainable(policy)
        self._frozen = frozen_checksums(policy)

    def check_frozen(self) -> None:
        """Repeat the checks of the first step, and raise MidtuneError if a frozen tensor changed."""
        check_trainable(self.policy)
        found = frozen_checksums(self.policy)
        moved = [name for name, checksum in self._frozen.items() if found.get(name) != checksum]
        if moved:
            raise MidtuneError(f"{moved[0]} is frozen, but training changed it.")

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        made = self.optimizer is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if made:
            return optimizer
        times = {
            id(p): times
            for k, times in self.lr_multipliers.items()
            for p in self.policy.blocks[k].parameters()
        }
        groups = []
        for group in optimizer.param_groups:
            for factor in sorted({times.get(id(p), 1.0) for p in group["params"]}):
                own = [p for p in group["params"] if times.get(id(p), 1.0) == factor]
                # Schedules multiply each group's initial rate.
                groups.append({**group, "params": own, "lr": group["lr"] * factor})
        optimizer.param_groups[:] = groups
        return optimizer

    def _sample(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Completions of a step's prompts, as TRL's `rollout_func` returns them."""
        # Free the last step's boundary states before sampling makes new ones.
        self._piece, self._buffered_inputs = {}, None
        place, last = processes.index(), processes.count() - 1
        sampling = replace(self.sampling, others=(place * len(prompts), (last - place) * len(prompts)))
        with self.meter.phase("rollout"):
            rollout = self.sampler.sample(prompts, sampling, boundary_block=self.policy.trained[0])
            self.accelerator.wait_for_everyone()
        self._piece["rollout"] = rollout
        found: dict[str, Any] = {
            "prompt_ids": [ids for ids in rollout.prompts() for _ in range(self.num_generations)],
            "completion_ids": rollout.completions(),
            "logprobs": None if self.sampler.is_policy else rollout.unpadded(rollout.log_probs),
        }
        if rollout.drawn is not None:
            found["env_mask"] = rollout.unpadded(rollout.drawn)
        return found

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.bf16_gradients is not None and self.accelerator.sync_gradients:
            self.bf16_gradients.put_back()
        if self.accelerator.num_processes > 1 and self.accelerator.sync_gradients:
            for parameter in self.policy.trained_parameters().values():
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        if self.accelerator.scaler is not None and self.accelerator.sync_gradients:
            self.accelerator.scaler.unscale_(self.optimizer.optimizer)
        return loss

    def _calculate_rewards(self, *args: Any) -> torch.Tensor:
        self.environments = self._piece["rollout"].environments
        with self.meter.phase("reward"):
            rewards = super()._calculate_rewards(*args)
        weighted = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        weighted[rewards.isnan().all(1)] = torch.nan
        # TRL gathers all processes' rewards; keep this one's, as many as its prompts.
        own = slice(self.accelerator.process_index * len(args[1]), None)
        self._rewards: Values = weighted[own][: len(args[1])].double().cpu().numpy()
        return rewards

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        parts = self.args.steps_per_generation
        if self._buffered_inputs is None or self._step % (parts * self.num_iterations) == 0:
            # TRL would reset environments it knows of.
            self.environments = None
            if self.chooser is not None:
                with self.meter.phase("rollout"):
                    chosen = self.chooser.choose(self.state.global_step)
                generation_batch = [row for row in chosen for _ in range(self.num_generations)]
            batch = self._generate_and_score_completions(self.sampler.begin(generation_batch))
            rollout = batch["rollout"] = self._piece["rollout"]
            if self.chooser is not None:
                self.chooser.learn(torch.from_numpy(self._rewards).reshape(-1, self.num_generations))
            for name, value in figures_of(rollout.episodes).items():
                self._metrics["train"][name].append(self._mean(value))
            # TRL's figure also counts completions that a stop string ended.
            self.cut_share = self._mean(float(rollout.cut.float().mean()))
            if self.own_advantages is not None:
                advantages = self._form_advantages(self.own_advantages, rollout)
                batch["advantages"] = advantages.to(batch["advantages"])
            # Replaced by the update's own, which round as those after the step do.
            batch["before"] = torch.stack([rollout.log_probs, rollout.entropies], -1)
            groups = len(rollout.prompt_ids)
            self._buffered_inputs = [groups_of(batch, part) for part in slices(groups, groups // parts)]
        return self._buffered_inputs[self._step % parts]

    @staticmethod
    def _mean(figure: float) -> float:
        """The mean of the processes' figures, each a mean over as many completions."""
        return statistics.fmean(processes.gathered([figure]))

    def _form_advantages(self, form: Advantages, rollout: Rollout) -> torch.Tensor:
        """Advantages of the completions just scored [N·G], or of the tokens of episodes [N·G, C]."""
        turns = [
            turns_of(episode, reward)
            for episode, reward in zip(rollout.episodes, self._rewards, strict=False)
        ]
        found = form(self._rewards.reshape(-1, self.num_generations), turns)
        if isinstance(found, np.ndarray):
            return torch.from_numpy(found).flatten()
        return token_advantages(rollout.episodes, found, rollout.completion_ids.size(1))

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """The loss of a micro-batch. Its gradient is taken here, so the returned loss has none."""
        assert self._buffered_inputs is not None
        earlier = self._buffered_inputs[: self._step % self.args.steps_per_generation]
        logged = copy.deepcopy(self._metrics["train"])
        begun = False

        def run(groups: int) -> torch.Tensor:
            nonlocal begun
            if begun:
                # A failed pass may have left part of its gradient: begin the step again.
                model.zero_grad()
                if self.bf16_gradients is not None:
                    self.bf16_gradients.clear()
                for part in earlier:
                    self._take_gradient(model, part, groups)
                self._metrics["train"] = copy.deepcopy(logged)
            begun = True
            return self._take_gradient(model, inputs, groups)

        count = len(inputs["rollout"].prompt_ids)
        return self.update_rows.fitting(count, self.num_generations, run)

    def _take_gradient(self, model: Any, inputs: dict[str, Any], groups: int) -> torch.Tensor:
        """Accumulate a micro-batch's gradient, `groups` groups at a time; returns its loss."""
        total = torch.zeros((), device=self.accelerator.device)
        for part in slices(len(inputs["rollout"].prompt_ids), groups):
            piece = self._piece = groups_of(inputs, part)
            loss = super()._compute_loss(model, piece) * self._share(piece, inputs)
            self.accelerator.backward(loss)
            total += loss.detach()
        return total.requires_grad_()

    def _share(self, piece: dict[str, Any], inputs: dict[str, Any]) -> float:
        """Weight of a piece's loss in its micro-batch's. Of these TRL takes the mean, also over processes."""
        if (mean := LOSS_MEANS.get(self.loss_type)) is None:
            raise MidtuneError(
                f"midtune cannot slice a loss of type {self.loss_type}; choose another algorithm."
            )
        if mean == "tokens":
            # Over the tokens of the whole step, however it is divided.
            micro_batches = self.args.steps_per_generation * self.accelerator.num_processes
            return float(piece["rollout"].scored.sum() / inputs["num_items_in_batch"] * micro_batches)
        return 1.0 if mean == "sum" else len(piece["advantages"]) / len(inputs["advantages"])

    def _scored_for_update(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies with gradient; groups without advantages keep those of sampling.

        Their part of the loss is exactly zero if only advantages weigh it: no KL term, no entropy bonus and no choice
        of tokens by entropy. TRL still counts them where it normalises.
        """
        rollout: Rollout = self._piece["rollout"]
        prompts = teaching(self._piece)
        weighed_otherwise = self.beta > 0 or self.top_entropy_quantile < 1 or self._entropy_bonus_enabled
        if weighed_otherwise or len(prompts) == len(rollout.prompt_ids):
            log_probs, entropies = self._scored(rollout)
        else:
            # Every trained tensor gets a gradient, zero if need be: Adam moves on its momentum.
            zero = torch.stack([p.flatten()[0] for p in self.policy.trained_parameters().values()]).sum() * 0
            log_probs, entropies = rollout.log_probs + zero, rollout.entropies
            if len(prompts) > 0:
                rows = rollout.rows_of(prompts)
                scored = self._scored(rollout.groups(prompts))
                log_probs = log_probs.index_copy(0, rows, scored[0])
                entropies = entropies.index_copy(0, rows, scored[1])
        self._piece["before"].copy_(torch.stack([log_probs, entropies], -1).detach())
        return log_probs, entropies

    def taught_tokens(self) -> int:
        """How many scored tokens the step's groups that teach have, in all processes."""
        found = torch.zeros((), dtype=torch.long, device=self.policy.device)
        for part in self._buffered_inputs or []:
            rollout = part["rollout"]
            found += rollout.scored[rollout.rows_of(teaching(part))].sum()
        return int(self.accelerator.reduce(found, "sum"))

    def step_kl(self, most: int) -> float:
        """KL of the policy before the optimizer's step from the policy now, on the groups that teach.

        It is a share of their entropy before the step, on the first `most` completions of each group.
        """
        found = torch.zeros(2, dtype=torch.float64, device=self.policy.device)
        for part in self._buffered_inputs or []:
            if len(prompts := teaching(part)) > 0:
                groups = part["rollout"].groups(prompts, most)
                with torch.no_grad():
                    after, _ = self._scored_in_slices(groups)
                log_probs, entropies = part["before"][part["rollout"].rows_of(prompts, most)].unbind(-1)
                kl = divergence(log_probs, after, groups.scored)
                found += torch.stack([kl, entropies.double().sum()])
        kl, entropy = self.accelerator.reduce(found, "sum").tolist()
        return float(kl / max(entropy, 1e-9)) if math.isfinite(kl) else math.inf

    def _scored(self, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
        scored = completion_log_probs(
            self.policy,
            rollout,
            temperature=self.temperature,
            entropy_gradient=self._entropy_bonus_enabled,
            **self.tail_arguments,
        )
        if not self._compared:
            compare_log_probs(self.policy, rollout, scored[0])
            self._compared = True
        return scored

    def _scored_in_slices(self, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies without gradient, one micro-batch at a time."""

        def run(groups: int) -> tuple[torch.Tensor, torch.Tensor]:
            found = [
                completion_log_probs(self.policy, rollout.groups(part), temperature=self.temperature)
                for part in slices(len(rollout.prompt_ids), groups)
            ]
            log_probs, entropies = (torch.cat(values) for values in zip(*found, strict=True))
            return log_probs, entropies

        groups = self.args.per_device_train_batch_size // self.num_generations
        return self.update_rows.fitting(groups, self.num_generations, run)

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        reference = model is self.ref_model and self.ref_model is not None
        with self.policy.reference() if reference else contextlib.nullcontext():
            if torch.is_grad_enabled():
                return *self._scored_for_update(), None
            log_probs, entropies = self._scored_in_slices(self._piece["rollout"])
        if self.use_vllm and not reference:
            # Until now the rollout held vLLM's log-probs.
            self._piece["rollout"] = replace(self._piece["rollout"], log_probs=log_probs, entropies=entropies)
        return log_probs, entropies, None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: a checkpoint of a few blocks is no model to publish."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Have the main process write a whole checkpoint or none; the two newest are kept."""
        if processes.is_main():
            self._write_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, model: Any, trial: Any) -> None:
        started = time.perf_counter()
        step, kept = self.state.global_step, Path(self.args.output_dir)
        with written_whole(kept / f"checkpoint-{step}") as folder, self._as_one() as args:
            # Transformers makes a folder of this name in here.
            args.output_dir = str(folder.parent)
            super()._save_checkpoint(model, trial)
        found = checkpoints_in(kept)
        newest = sorted(known for known in found if known <= step)[-(self.args.save_total_limit or 1) :]
        for known in found.keys() - newest:
            # Checkpoints of later steps were damaged when the run resumed from here.
            shutil.rmtree(found[known], ignore_errors=True)
        self.checkpoint_s = time.perf_counter() - started

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().contiguous() for name, p in self.policy.trained_parameters().items()}
        save_file(tensors, folder / TRAINED_TENSORS)
        if self.chooser is not None:
            save_file(self.chooser.state(), folder / KNOWN_PROMPTS)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # All processes draw the same numbers, and each keeps its own.
        with self._as_one():
            super()._load_rng_state(checkpoint)

    @contextlib.contextmanager
    def _as_one(self) -> Iterator[GRPOConfig]:
        """Inside, files are those of one process, which any number can read."""
        args: GRPOConfig = self.args
        self.args = alone = copy.copy(args)
        alone.__class__ = OneProcess
        try:
            yield alone
        finally:
            self.args = args

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self.policy, Path(resume_from_checkpoint))
        if self.chooser is not None:
            self.chooser.load(load_file(Path(resume_from_checkpoint) / KNOWN_PROMPTS))


class OneProcess(GRPOConfig):
    """Settings of a trainer that seems to be alone."""

    world_size, process_index, parallel_mode = 1, 0, ParallelMode.NOT_DISTRIBUTED


def load_trained(policy: Policy, checkpoint: Path) -> None:
    """Set a policy's trained parameters to a checkpoint's."""
    tensors = load_file(checkpoint / TRAINED_TENSORS)
    with torch.no_grad():
        for name, parameter in policy.trained_parameters().items():
            parameter.copy_(tensors[name])


def teaching(inputs: dict[str, Any]) -> torch.Tensor:
    """The numbers of the groups that have advantages, which those of equal rewards do not."""
    return inputs["advantages"].reshape(len(inputs["rollout"].prompt_ids), -1).any(1).nonzero()[:, 0]


def groups_of(batch: dict[str, Any], groups: slice) -> dict[str, Any]:
    """The part of a batch (TRL's inputs of whole groups, and their `rollout`) of some groups, sharing its memory."""
    rollout: Rollout = batch["rollout"]
    rows = rollout.rows_of(groups)
    part = {
        key: value[rows] if torch.is_tensor(value) and value.dim() > 0 else value
        for key, value in batch.items()
    }
    part["rollout"] = rollout.groups(groups)
    return part
