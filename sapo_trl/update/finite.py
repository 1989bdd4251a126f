"""Keeps numbers that are not finite out of the weights: such an optimizer step is skipped, counted and explained."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from sapo_trl.files import way_back
from sapo_trl.model import held_here, is_sharded
from sapo_trl.rollout.rows import MiniBatch, Row
from sapo_trl.update.update import Update

MOST_NAMED = 3
# A prime, so that no change of a single bit, which adds a power of 2, leaves the sum of the bits the same modulo it;
# below 2^24, so that float32 holds it exactly.
PRIME = 2**24 - 3

LOGGER = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Too many optimizer steps in a row gave numbers that are not finite, or the weights themselves are not."""


class DriftError(RuntimeError):
    """Processes that should hold the same parameters do not."""


class BeforeOptimizerStep(TrainerCallback):
    """Calls `agree` right before the optimizer step, after everybody else has had their hands on the gradients."""

    def __init__(self, agree: Callable[[], None]):
        self.agree = agree

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.agree()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def nonfinite_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that hold a number that is not finite on this process."""
    with torch.no_grad():
        flags = [
            (name, held.isfinite().all()) for name, p in model.named_parameters() if (held := held_here(p)).numel()
        ]
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
    return (total % PRIME).float()


def check_replicas(checksums: Sequence[float], step: int) -> None:
    """Raise if processes that should hold the same parameters do not, before anything is written.

    Raises:
        DriftError: names the step and the processes that differ from the first.
    """
    different = [i for i, x in enumerate(checksums) if x != checksums[0]]
    if different:
        raise DriftError(
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
        failure: why the run has to end, or empty.
    """

    def __init__(self, update: Update, accelerator: Accelerator, max_skipped: int):
        self.update, self.accelerator, self.max_skipped = update, accelerator, max_skipped
        self.reset()

    def reset(self) -> None:
        """A run begins."""
        self.in_a_row = self.total = 0
        self.failure = ""

    def found(self, model: nn.Module, loss: Tensor) -> Tensor:
        """1.0 on the device if this process's loss or gradient is not finite, else 0.0, (); nobody waits for it here.

        DeepSpeed has clipped and stepped already: it leaves out a step whose gradient is not finite by itself. With
        float16 the loss scaler does, and such gradients are a part of how it works.
        """
        is_finite = loss.isfinite()
        if self.update.engine.is_deepspeed:
            is_finite = is_finite & self.update.engine.has_stepped(model)
        elif self.accelerator.scaler is None:
            gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients) if gradients else loss.new_zeros(())
            is_finite = is_finite & norm.to(loss.device).isfinite()
        return 1.0 - is_finite.float()

    def passed(self) -> None:
        """A step with finite numbers on all processes."""
        self.in_a_row = 0

    def skip(self, model: nn.Module, mini_batch: MiniBatch, step: int) -> None:
        """Drop the gradients of all processes, so that the optimizer leaves weights and moments alone; say why.

        The last of `max_skipped` steps in a row sets `failure`.

        Raises:
            NonFiniteError: the weights themselves are not finite, or the engine has made the step.
        """
        self.in_a_row, self.total = self.in_a_row + 1, self.total + 1
        places = gather_object([(self._cause(model, mini_batch), nonfinite_parameters(model)[:MOST_NAMED])])
        causes = "; ".join(f"process {i}: {cause}" for i, (cause, _) in enumerate(places) if cause)
        config = self.update.config
        number = mini_batch.index % (config.num_mini_batches * config.num_iterations)  # a rollout ahead is older
        place = f"optimizer step {step} (mini-batch {number} of its rollout)"
        if bad := sorted({name for _, names in places for name in names}):
            raise NonFiniteError(
                f"{place}: the weights are not finite ({', '.join(bad)}), so no step can bring them back ({causes}). "
                f"{way_back(config.folder)}"
            )
        if self.update.engine.has_stepped(model):
            raise NonFiniteError(
                f"{place}: the loss is not finite ({causes}), and DeepSpeed has made the step inside the backward "
                f"pass. Nothing is saved. {way_back(config.folder)}"
            )
        if self.accelerator.scaler is None and not self.update.engine.is_deepspeed:
            model.zero_grad(set_to_none=True)
        message = (
            f"{place} skipped: numbers that are not finite ({causes}). {self.in_a_row} in a row, {self.total} in all."
        )
        if self.accelerator.is_main_process:
            LOGGER.warning(message)
        if self.in_a_row >= self.max_skipped:
            self.failure = (
                f"{message} The run ends after max_skipped_steps={self.max_skipped} in a row. The weights are those of "
                f"step {step - self.in_a_row}, and a checkpoint holds them. Look at the rows named above, or start a "
                "new run from it (model_name_or_path) with a lower learning_rate."
            )

    def _cause(self, model: nn.Module, mini_batch: MiniBatch) -> str:
        """Packs and rows whose own numbers are not finite, else that the gradient is not, with the row to look at."""
        if self.update.engine.packs_are_collective:  # others don't take part in the passes that would show the rows
            return f"loss or gradient of {len(mini_batch.rows)} rows in {len(mini_batch.packs)} pack(s)"
        rows, largest = [], (-1.0, "")
        for i, pack in enumerate(mini_batch.packs):
            if pack:
                found, extreme = self._rows(model, pack)
                rows += [f"pack {i}: {text}" for text in found]
                largest = max(largest, (extreme[0], f"row {extreme[1]} of {len(pack)} in pack {i}"))
        if rows:
            return ", ".join(rows[:MOST_NAMED]) + (f" and {len(rows) - MOST_NAMED} more" if len(rows) > 3 else "")
        if all(p.grad is None or local(p.grad).isfinite().all() for p in model.parameters()):
            return ""
        at = f"{largest[0]:.3g}, is in {largest[1]}"
        return f"the gradient, with finite numbers in every row; the largest log-ratio, {at}"

    def _rows(self, model: nn.Module, pack: Sequence[Row]) -> tuple[list[str], tuple[float, int]]:
        """(`row 3 (advantage)` for every row whose numbers are not finite, the largest |log-ratio| and its row)."""
        with torch.no_grad(), self.update.engine.without_backward(model):
            parts = self.update.numbers_of(model, list(pack))
        found: dict[int, str] = {}
        for name, (values, rows) in parts.items():
            for row in rows[~values.isfinite()].unique().tolist():
                found.setdefault(row, f"row {row} of {len(pack)} ({name})")
        (policy_logps, rows), (old_logps, _) = parts["policy log-probs"], parts["old log-probs"]
        sizes = (policy_logps - old_logps).abs().nan_to_num(nan=math.inf)
        if not len(sizes):
            return list(found.values()), (-1.0, 0)
        return list(found.values()), (float(sizes.max()), int(rows[sizes.argmax()]))
