"""The prompts of a `SAPOTrainer`: TRL's batches, or those of a `PromptSource` for mixtures and dynamic sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from datasets import Dataset
from transformers import TrainerCallback

from sapo_trl.evaluation.training import EvaluationRecord
from sapo_trl.mixture import shares_of
from sapo_trl.rollout.prompts import PromptSource
from sapo_trl.rollout.refill import Places, Round
from sapo_trl.rollout.rollout import Rollout
from sapo_trl.rollout.rows import Row, equal_reward_rows
from sapo_trl.trainer_rollout import RolloutTrainer
from sapo_trl.update.balance import placed_rows

TRL_EPSILON = 1e-4  # added to a standard deviation of rewards


class EndWithoutPrompts(TrainerCallback):
    """Ends a run, with a checkpoint where it writes any, when too few unsolved prompts are left for a rollout."""

    def __init__(self, trainer: PromptTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        """After the last mini-batch of a rollout."""
        if self.trainer._ends_for_lack_of_prompts():
            self.trainer.accelerator.print(f"step {state.global_step}: {self.trainer._solved()}; training ends")
            control.should_training_stop, control.should_save = True, args.save_strategy != "no"
        return control


class PromptTrainer(RolloutTrainer):
    """A trainer that chooses the prompts of its rollouts itself where the configuration asks for it.

    TRL's dataloader then only counts the steps. Every process holds the same source.
    """

    _prompts: PromptSource | None = None

    def _new_prompts(self) -> PromptSource | None:
        """The source of a run that begins."""
        if not self.args.chooses_prompts:
            return None
        assert isinstance(self.train_dataset, Dataset)  # a stream is refused
        sets = self.args.mixture
        tasks = list(self.train_dataset["task"]) if sets else [""] * len(self.train_dataset)
        return PromptSource(tasks, shares_of(sets) or {"": 1.0}, self.args.seed if self.shuffle_dataset else None)

    def _shuffled(self, num_rows: int) -> list[int]:
        return torch.randperm(num_rows).tolist()

    def _next_rollout(self, generation_batch: list[dict]) -> tuple[Rollout, list[Row], float]:
        """(rollout, its rows on this process, trained tokens as mean over processes), generated and scored."""
        rollout = Rollout(order=self._shuffled(len(generation_batch)))
        if self._prompts is None:
            return rollout, *self._generated_rows(rollout, generation_batch)
        wanted = self._prompts.counts(self.plan.prompts_per_rollout)
        if not wanted:
            raise ValueError(f"{self._solved()}: nothing is left to train on")
        if self.args.dynamic_sampling:
            rollout, rows, num_tokens = self._filled_rollout(rollout, wanted)
        else:
            chosen = self._prompts.take_first(wanted)
            rows, num_tokens = self._generated_rows(rollout, self._inputs_of(chosen))
            self._note(self._prompts, [chosen], [rollout])
        if self._ahead is not None and self.args.rewards_choose_prompts:
            self._begin_next(self._ahead)
        return rollout, rows, num_tokens

    def _filled_rollout(self, rollout: Rollout, wanted: dict[str, int]) -> tuple[Rollout, list[Row], float]:
        """The same from as many rounds of generation as it takes until every prompt's rewards differ, or as allowed."""
        assert self._prompts is not None
        num, world = self.num_generations, self.accelerator.num_processes
        places = Places(wanted, self._prompts.tasks, self._prompts.num_left, unit=world // math.gcd(world, num))
        logged = {name: len(values) for name, values in self._metrics["train"].items()}
        rounds: list[Round] = []
        while len(rounds) < self.args.dynamic_sampling_max_rounds and (more := places.refill(rounds)):
            had = [row for one in rounds for row in one.chosen]
            chosen = self._prompts.take(more, had) if rounds else self._prompts.take_first(more)
            part = Rollout(refills=len(rounds))
            rows, _ = self._generated_rows(part, self._inputs_of(chosen))
            equal = equal_reward_rows(part.total_rewards(self.reward_weights), num)[::num].tolist()
            rounds.append(Round(chosen, part, rows, [not x for x in equal]))
        taken, left = places.fill(rounds)
        self._prompts.give_back(left)
        first = rounds[0].rollout
        rollout.texts, rollout.weights_step = first.texts, first.weights_step
        rollout.rewards = torch.cat([one.rollout.rewards for one in rounds])
        self._merge_metrics(logged, rounds)
        self._log_all(places.cost(rounds, num))
        self._note(self._prompts, [one.chosen for one in rounds], [one.rollout for one in rounds])
        rows = self._rows_of(rounds, taken)
        tokens = torch.tensor([float(sum(row.num_trained for row in rows))], device=self.accelerator.device)
        return rollout, rows, self.accelerator.gather(tokens).mean().item()

    def _rows_of(self, rounds: Sequence[Round], taken: Sequence[tuple[int, int]]) -> list[Row]:
        """This process's part of the completions of the taken prompts, whichever process has generated them."""
        num, process = self.num_generations, self.accelerator.process_index
        place_of = {prompt: place for place, prompt in enumerate(taken)}
        placed = [
            (place_of[r, j // num] * num + j % num, row)
            for r, one in enumerate(rounds)
            for j, row in enumerate(one.rows, start=process * len(one.rows))
            if (r, j // num) in place_of
        ]
        if self.scale_rewards == "batch":  # TRL has divided by the deviation of a round
            totals = [one.rollout.total_rewards(self.reward_weights).view(-1, num) for one in rounds]
            rewards = torch.stack([totals[r][i] for r, i in taken])
            spread = rewards[~rewards.isnan()].std() + TRL_EPSILON
            advantages = ((rewards - rewards.nanmean(dim=1, keepdim=True)) / spread).nan_to_num(nan=0.0)
            advantages = advantages.flatten().masked_fill(equal_reward_rows(rewards.flatten(), num), 0.0).tolist()
            for place, row in placed:
                row.advantage = advantages[place]
        return placed_rows(placed, len(taken) * num // self.accelerator.num_processes, self.accelerator)

    def _merge_metrics(self, logged: dict[str, int], rounds: Sequence[Round]) -> None:
        """One value for each metric that the rounds have logged: of all completions, and sums of seconds.

        Args:
            logged: values of each metric before them.
        """
        record, metrics = EvaluationRecord(None, self.num_generations), self._metrics["train"]
        for one in rounds:
            record.add(one.rollout.rewards)
        new = {name: values[logged.get(name, 0) :] for name, values in metrics.items()}
        found = record.values(new, self.reward_func_names, self.reward_weights, accuracy="")
        for name, values in new.items():
            if len(values) > 1:
                metrics[name][logged.get(name, 0) :] = [sum(values) if name.startswith("time/") else found[name]]

    def _note(self, source: PromptSource, chosen: Sequence[list[int]], rollouts: Sequence[Rollout]) -> None:
        """What the rollout's rounds say about the prompts: into the metrics, and which of them are solved."""
        threshold = self.args.drop_solved_above
        if threshold is not None:
            right = torch.cat([rollout.right() for rollout in rollouts]).view(-1, self.num_generations)
            rates = right.nanmean(dim=1).tolist()
            flat = [row for rows in chosen for row in rows]
            source.drop([row for row, rate in zip(flat, rates, strict=True) if rate >= threshold])
            self._log_all({"data/prompts_left": sum(source.num_left.values())})
        self._log_all({"data/prompts": sum(map(len, chosen))} | source.metrics())
        if self.args.mixture:
            self._log_datasets(chosen, rollouts)

    def _solved(self) -> str:
        """How many prompts are left of a run that drops solved ones."""
        assert self._prompts is not None
        left = sum(self._prompts.num_left.values())
        return (
            f"{left} of {len(self._prompts.tasks)} prompts are left unsolved (drop_solved_above="
            f"{self.args.drop_solved_above:g}), fewer than the {self.plan.prompts_per_rollout} of a rollout"
        )

    def _ends_for_lack_of_prompts(self) -> bool:
        """Whether the rollout that ends now was the last one that the unsolved prompts suffice for."""
        is_between = self.state.global_step % self.plan.steps_per_rollout == 0
        return is_between and self._prompts is not None and not self._prompts.counts(self.plan.prompts_per_rollout)

    def _count_prompts(self, rows: Sequence[Row], num_tokens: float, num_generations: int) -> float:
        """Give the rows of a batch the trained tokens of their prompts, where the average of the loss needs them.

        Returns `num_tokens`, trained tokens as mean over processes, without those of prompts that do not count.
        """
        if self.args.aggregation != "prompt-mean" and not self.args.zero_variance_filter:
            return num_tokens
        accelerator = self.accelerator
        local = torch.tensor([[row.num_trained, row.advantage] for row in rows], device=accelerator.device)
        lengths, advantages = accelerator.gather(local).view(-1, num_generations, 2).unbind(-1)
        tokens = lengths.sum(dim=1).clamp(min=1)
        if self.args.zero_variance_filter:
            tokens = tokens.masked_fill((advantages == 0).all(dim=1), 0)
        first = accelerator.process_index * len(rows)
        own = tokens.repeat_interleave(num_generations)[first : first + len(rows)]
        for row, n in zip(rows, own.tolist(), strict=True):
            row.group_tokens = int(n)
        return lengths[tokens > 0].sum().item() / accelerator.num_processes

    def _rows_ahead(self, number: int) -> list[int]:
        """Those of the source, which keeps them for the rollout's turn; none if too few unsolved prompts are left."""
        if self._prompts is None:
            return super()._rows_ahead(number)
        self._prompts.ahead = self._prompts.take(self._prompts.counts(self.plan.prompts_per_rollout))
        return self._part_of(self._prompts.ahead)

    def _part_of(self, chosen: Sequence[int]) -> list[int]:
        """This process's part of the chosen rows of the training set, each `num_generations` times."""
        repeated = [row for row in chosen for _ in range(self.num_generations)]
        num_local = len(repeated) // self.accelerator.num_processes
        first = self.accelerator.process_index * num_local
        return repeated[first : first + num_local]

    def _inputs_of(self, chosen: Sequence[int]) -> list[dict]:
        """The same with their columns."""
        dataset: Dataset = self.train_dataset  # ty: ignore[invalid-assignment] (a stream is refused)
        return [dict(dataset[row]) for row in self._part_of(chosen)]

    def _log_datasets(self, chosen: Sequence[list[int]], rollouts: Sequence[Rollout]) -> None:
        """Reward, accuracy and length of each dataset of a mixture, over all processes."""
        assert self._prompts is not None
        tasks = [self._prompts.tasks[row] for rows in chosen for row in rows for _ in range(self.num_generations)]
        total = torch.cat([rollout.total_rewards(self.reward_weights) for rollout in rollouts])
        right = torch.cat([rollout.right() for rollout in rollouts])
        lengths = [torch.tensor(rollout.lengths, device=total.device) for rollout in rollouts]
        length = torch.cat([self.accelerator.gather(local) for local in lengths]).float()
        for name in self.args.mixture:
            own = torch.tensor([task == name for task in tasks], device=total.device)
            for what, values in (("reward", total), ("accuracy", right), ("length", length)):
                if own.any():  # a dataset that is all solved has none
                    self._log_all({f"data/{name}/{what}": values[own].nanmean().item()})
