"""How gradients of a mini-batch's packs are synchronised between processes: alone, DDP, DeepSpeed or FSDP."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from sapo_trl.trl_seams import set_sync_gradients


class Engine:
    """Contexts of the passes over packs under the accelerator's engine.

    Attributes:
        packs_are_collective: the passes over every pack are collectives (ZeRO, FSDP), or leave sums in the engine that
            can't be taken back.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        kind = accelerator.distributed_type
        self.is_deepspeed = kind == DistributedType.DEEPSPEED
        self.packs_are_collective = kind in (DistributedType.DEEPSPEED, DistributedType.FSDP)

    @property
    def is_alone(self) -> bool:
        return self.accelerator.num_processes == 1

    def synchronises(self, is_last: bool) -> bool:
        """Whether gradients are summed over processes after this pack.

        DDP does so after the last pack. DeepSpeed can't wait for it, and FSDP2 would keep the gradient of the whole
        model on every process while it waits.
        """
        return is_last or self.packs_are_collective

    def pack(self, model: nn.Module, is_last: bool) -> AbstractContextManager:
        """Context of a pack's forward and backward pass."""
        return nullcontext() if self.synchronises(is_last) else self.accelerator.no_sync(model)

    def without_backward(self, model: nn.Module) -> AbstractContextManager:
        """Context of a forward pass that no backward pass follows; DDP expects one after a synchronised forward."""
        return nullcontext() if self.packs_are_collective else self.accelerator.no_sync(model)

    def has_stepped(self, model: Any) -> bool:
        """Whether the optimizer step was made inside the backward pass; DeepSpeed leaves it out where it saw a gradient
        that is not finite."""
        return self.is_deepspeed and model.was_step_applied()

    def backward(self, loss: Tensor, is_last: bool) -> None:
        set_sync_gradients(self.accelerator, is_last)  # tells DeepSpeed where the optimizer step ends
        self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed else {}))
