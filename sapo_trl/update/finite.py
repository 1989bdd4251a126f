"""Keeps numbers that are not finite out of the weights: such an optimizer step is skipped, counted and explained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sapo_trl.checkpoints.weights import is_sharded
from sapo_trl.rollout.rows import MiniBatch, Row
from sapo_trl.update.update import Update

MOST_NAMED = 3


class NonFiniteError(RuntimeError):
    """Too many optimizer steps in a row gave numbers that are not finite, or the weights themselves are not."""


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def nonfinite(model: nn.Module, loss: Tensor) -> Tensor:
    """1.0 on the device if this process's loss or gradient is not finite, else 0.0, (); nobody waits for it here."""
    gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients) if gradients else loss.new_zeros(())
    return 1.0 - (norm.to(loss.device).isfinite() & loss.isfinite()).float()


def nonfinite_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that hold a number that is not finite on this process."""
    with torch.no_grad():
        flags = [(name, local(p).isfinite().all()) for name, p in model.named_parameters() if p.numel()]
        if not flags or torch.stack([flag for _, flag in flags]).all():
            return []
        return [name for name, flag in flags if not flag]


def replica_checksum(model: nn.Module, accelerator: Accelerator) -> Tensor | float:
    """A number that is equal on processes with equal parameters, exact in float32; 0.0 where there are no replicas.

    Sums the parameters' bits as integers: one pass over the weights, and any single changed bit changes the sum.
    """
    if accelerator.num_processes == 1 or is_sharded(model):
        return 0.0
    total = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    with torch.no_grad():
        for p in model.parameters():
            kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[p.element_size()]
            total += p.detach().contiguous().view(kind).sum(dtype=torch.int64)
    return (total % 2**24).float()


def check_replicas(checksums: Sequence[float], step: int) -> None:
    """Raise if processes that should hold the same parameters do not, before anything is written.

    Raises:
        RuntimeError: names the step and the processes that differ from the first.
    """
    different = [i for i, x in enumerate(checksums) if x != checksums[0]]
    if different:
        raise RuntimeError(
            f"before optimizer step {step} process(es) {', '.join(map(str, different))} of {len(checksums)} hold other "
            "parameters than process 0: their updates have drifted apart. Nothing was saved since; resume from the "
            "last checkpoint, and look for a number that only one process has changed."
        )


class FiniteGuard:
    """Decides whether an optimizer step happens.

    Args:
        max_skipped: steps skipped in a row before the run ends.

    Attributes:
        in_a_row, total: skipped steps.
    """

    def __init__(self, update: Update, accelerator: Accelerator, max_skipped: int):
        self.update, self.accelerator, self.max_skipped = update, accelerator, max_skipped
        self.in_a_row = self.total = 0

    def passed(self) -> None:
        """A step with finite numbers on all processes."""
        self.in_a_row = 0

    def skip(self, model: nn.Module, mini_batch: MiniBatch, step: int) -> str:
        """Drop the gradients of all processes, so that the optimizer leaves weights and moments alone; why, in words.

        Raises:
            NonFiniteError: the last of `max_skipped` steps in a row.
        """
        self.in_a_row, self.total = self.in_a_row + 1, self.total + 1
        causes = gather_object([self._cause(model, mini_batch)])
        model.zero_grad(set_to_none=True)
        found = "; ".join(f"process {i}: {cause}" for i, cause in enumerate(causes) if cause) or "gradients only"
        message = (
            f"optimizer step {step} (mini-batch {mini_batch.index} of its rollout) skipped: numbers that are not "
            f"finite ({found}). {self.in_a_row} in a row, {self.total} in all."
        )
        if self.in_a_row >= self.max_skipped:
            raise NonFiniteError(
                f"{message} The run ends after max_skipped_steps={self.max_skipped} in a row. The weights are those of "
                f"step {step - self.in_a_row}. Lower learning_rate, or look at the rows named above."
            )
        return message

    def _cause(self, model: nn.Module, mini_batch: MiniBatch) -> str:
        """Packs and rows whose own numbers are not finite, else the parameters whose gradient is not."""
        rows = [f"pack {i}: {text}" for i, pack in enumerate(mini_batch.packs) for text in self._bad_rows(model, pack)]
        if rows:
            return ", ".join(rows[:MOST_NAMED]) + (f" and {len(rows) - MOST_NAMED} more" if len(rows) > 3 else "")
        names = [n for n, p in model.named_parameters() if p.grad is not None and not local(p.grad).isfinite().all()]
        return f"gradient of {', '.join(names[:MOST_NAMED])} and {len(names)} in all" if names else ""

    def _bad_rows(self, model: nn.Module, pack: Sequence[Row]) -> list[str]:
        """`row 3 (its advantage)` for every row of a pack whose numbers are not finite."""
        if not pack or self.update.engine.packs_are_collective:  # others don't take part in this pass
            return []
        with torch.no_grad(), self.update.engine.without_backward(model):
            parts = self.update.numbers_of(model, list(pack))
        found: dict[int, str] = {}
        for name, (values, rows) in parts.items():
            for row in rows[~values.isfinite()].unique().tolist():
                found.setdefault(row, f"row {row} of {len(pack)} ({name})")
        return list(found.values())
