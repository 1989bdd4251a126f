"""The order of prompts: TRL's, also after a resume in a later epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from sapo_trl.trl_seams import RepeatSampler


class EpochSampler(RepeatSampler):
    """TRL's `RepeatSampler`, whose order depends on the epoch and not on how often it was iterated.

    TRL draws one permutation after another from one generator, so a resumed run repeats the first epoch's order. Here
    the permutations of the epochs before are drawn and left out: the order of every epoch is TRL's.

    Args:
        epoch: gives the epoch that begins, 0, 1, ...
        arguments: TRL's.
    """

    def __init__(self, epoch: Callable[[], int], **arguments):
        super().__init__(**arguments)
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle and self.seed is not None:
            self.generator.manual_seed(self.seed)
            for _ in range(self.epoch()):
                torch.randperm(self.num_samples, generator=self.generator)
        return super().__iter__()
