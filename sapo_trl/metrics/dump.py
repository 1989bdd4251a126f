"""Log-ratios of single steps on disk, for Figures 2-3 of the paper."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sapo_trl.objective import LossInputs


class RatioDump:
    """Log-ratios of one process's rows in one optimizer step; `report/ratios.py` reads and draws them."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Forget the packs of a mini-batch that starts again."""
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self.num_rows = 0

    def add(self, tokens: LossInputs) -> None:
        """Add one pack. This waits for the device, which no other part of an update does."""
        advantages = torch.zeros(tokens.num_rows, device=tokens.rows.device).scatter_(0, tokens.rows, tokens.advantages)
        rows = tokens.rows + self.num_rows
        self.parts.append((tokens.token_log_ratio.detach().cpu(), rows.cpu(), advantages.cpu()))
        self.num_rows += tokens.num_rows

    def save(self, output_dir: str, step: int, mini_batch: int, process: int) -> None:
        """`dump/step_<n>_process_<p>.npz` with log_ratio (T,), rows (T,), advantages (R,), step and mini_batch."""
        if not self.parts:
            return
        log_ratio, rows, advantages = (torch.cat(parts).numpy() for parts in zip(*self.parts, strict=True))
        path = Path(output_dir) / "dump" / f"step_{step:06d}_process_{process}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")  # a report of a running run reads whole files only
        with part.open("wb") as file:
            np.savez(file, log_ratio=log_ratio, rows=rows, advantages=advantages, step=step, mini_batch=mini_batch)
        part.replace(path)
