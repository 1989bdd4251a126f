"""Everything beside weights and optimizer that decides the next number of a run, saved and restored in one place.

One file per process: tensors in safetensors, numbers as JSON in its header, so nothing is unpickled. transformers saves
weights, optimizer, scheduler, random states and the callbacks' states; this module saves the rest: the place within the
rollout, the rollout itself, open logging windows, adaptive controllers and the budget of packs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sapo_trl.checkpoints.folder import RUN_STATE
from sapo_trl.rollout.rollout import Rollout
from sapo_trl.rollout.saved import rollout_from_state, rollout_state

ROLLOUTS = ("rollout", "ahead")


@dataclass
class RunState:
    """One process's state between two optimizer steps.

    Attributes:
        micro_step: TRL's `_step`, device batches seen.
        tr_loss, total_loss, last_logged: transformers' open logging window: sum of losses since the last log (),
            sum of those logged, and the step of the last log.
        metrics: values waiting for the next log, `train` and `eval`.
        rollout: the one that is trained on, or None between two rollouts.
        table: TRL's completions, rewards and advantages of a rollout that were not shown yet; empty where none wait.
        entropy: coefficient and last entropy of the adaptive control; empty without one.
        budget: tokens of a pack, retries, what the memory probe has settled, and what the config had asked for.
        prompts: of the `PromptSource`; empty where the prompts come in TRL's order.
        ahead: the rollout after it, where `rollouts_ahead` has generated it.
        skipped: optimizer steps skipped for numbers that were not finite: in a row, and in all.
        rewards: by name, what `state_dict` of a reward function has given, where JSON keeps it as it is.
    """

    micro_step: int
    tr_loss: Tensor
    total_loss: float
    last_logged: int
    metrics: dict[str, dict[str, list[float]]]
    rollout: Rollout | None
    table: dict[str, Any]
    entropy: dict[str, float]
    budget: dict[str, Any]
    skipped: dict[str, int]
    prompts: dict[str, Any] = field(default_factory=dict)
    ahead: Rollout | None = None
    rewards: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path, process: int) -> int:
        """Write the process's file; returns its bytes."""
        tensors = {"tr_loss": self.tr_loss.detach().cpu()}
        numbers = {name: value for name, value in vars(self).items() if name not in ("tr_loss", *ROLLOUTS)}
        for name in ROLLOUTS:
            if (rollout := vars(self)[name]) is not None:
                parts, numbers[name] = rollout_state(rollout)
                tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        path = folder / RUN_STATE.format(process)
        save_file(tensors, path, metadata={"state": json.dumps(numbers)})
        return path.stat().st_size

    @classmethod
    def load(cls, folder: Path, process: int, device: torch.device) -> RunState:
        """The state that `save` wrote."""
        with safe_open(folder / RUN_STATE.format(process), "pt") as file:
            numbers = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name in ROLLOUTS:
            if (saved := numbers.setdefault(name, None)) is not None:
                parts = {part.removeprefix(f"{name}."): x for part, x in tensors.items() if part.startswith(f"{name}.")}
                numbers[name] = rollout_from_state(parts, saved, device)
        return cls(tr_loss=tensors["tr_loss"].to(device), **numbers)


def holds_completions(folder: Path) -> bool:
    """Whether a checkpoint has completions that are yet to be trained on: it lies within a rollout, or one is ahead."""
    with safe_open(folder / RUN_STATE.format(0), "pt") as file:
        numbers = json.loads(file.metadata()["state"])
    return any(numbers.get(name) is not None for name in ROLLOUTS)
