"""The prompts of a `SAPOTrainer`: TRL's batches, or those of a `PromptSource` where the run mixes datasets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from datasets import Dataset

from sapo_trl.mixture import shares_of
from sapo_trl.rollout.prompts import PromptSource
from sapo_trl.rollout.rollout import Rollout
from sapo_trl.rollout.rows import Row
from sapo_trl.trainer_rollout import RolloutTrainer


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
        chosen = self._prompts.next(self.plan.prompts_per_rollout)
        rows, num_tokens = self._generated_rows(rollout, self._inputs_of(chosen))
        if self.args.mixture:
            self._log_datasets([chosen], [rollout])
        return rollout, rows, num_tokens

    def _inputs_of(self, chosen: Sequence[int]) -> list[dict]:
        """This process's part of the chosen rows of the training set, each `num_generations` times."""
        repeated = [row for row in chosen for _ in range(self.num_generations)]
        num_local = len(repeated) // self.accelerator.num_processes
        first = self.accelerator.process_index * num_local
        dataset: Dataset = self.train_dataset  # ty: ignore[invalid-assignment] (a stream is refused)
        return [dict(dataset[row]) for row in repeated[first : first + num_local]]

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
                self._log_all({f"data/{name}/{what}": values[own].nanmean().item()})
