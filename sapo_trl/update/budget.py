"""What happens when a pack does not fit into memory: smaller packs from then on, counted and announced."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from sapo_trl.rollout.rows import Row, tokens_forwarded
from sapo_trl.update.packing import PackedForward


class PackTooLarge(Exception):
    """A pack of a mini-batch ran out of memory.

    Attributes:
        pack: its rows.
        synchronised: whether other processes wait for this one's gradients.
    """

    def __init__(self, pack: Sequence[Row], synchronised: bool, message: str):
        super().__init__(message)
        self.pack, self.synchronised = pack, synchronised


class PackBudget:
    """Lowers the tokens of a pack after one did not fit; `oom_retries` counts how often."""

    def __init__(self, forward: PackedForward):
        self.forward, self.oom_retries = forward, 0

    def lower(self, pack: Sequence[Row], message: str, can_retry: bool) -> None:
        """Halve the budget of packs after `pack` did not fit.

        Raises:
            torch.OutOfMemoryError: the pack is a single row, or other processes are in the middle of it.
        """
        tokens = tokens_forwarded(pack)
        if not can_retry or len(pack) < 2:
            reason = (
                "it is a single row: set activation_checkpointing: true or a smaller max_completion_length"
                if len(pack) < 2
                else f"other processes are in the middle of it: set max_tokens_per_pack: {tokens // 2}"
            )
            raise torch.OutOfMemoryError(
                f"a pack of {tokens} tokens ({len(pack)} rows) does not fit into memory and can't be cut, because "
                f"{reason}. {message}"
            )
        self.forward.max_tokens, self.oom_retries = max(1, tokens // 2), self.oom_retries + 1
        warnings.warn(
            f"a pack of {tokens} tokens did not fit into memory; from now on packs hold {self.forward.max_tokens}. "
            f"Set max_tokens_per_pack: {self.forward.max_tokens} to plan so from the start.",
            stacklevel=2,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
