"""Faults on purpose, to see what a run does then: `SAPO_TRL_FAULT=action:place[:step=N][:process=I][:file=NAME]`.

    SAPO_TRL_FAULT=kill:save.optimizer:step=8          SIGKILL in a save (file=optimizer: in the middle of it)
    SAPO_TRL_FAULT=nan:gradient:step=3+:process=1      one NaN in a gradient of one process, from step 3 on
    SAPO_TRL_FAULT=hang:reward:process=1               a reward that never comes back
    SAPO_TRL_FAULT=disk_full:save.weights              no space left
    SAPO_TRL_FAULT=flip:save.published:file=optimizer  one flipped bit in a finished checkpoint (tear: half a file)
    SAPO_TRL_FAULT=refuse:rollout                      an engine that does not answer (exit: a process dies)

Without the variable every call is one look-up.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from torch import nn

from sapo_trl.errors import did_you_mean
from sapo_trl.rollout.rows import Row

VARIABLE = "SAPO_TRL_FAULT"
OF_A_SAVE = {
    "save.begin": "before a save writes anything",
    "save.weights": "with the weights written",
    "save.optimizer": "with optimizer, schedule and random states written",
    "save.run_state": "with the rollout written",
    "save.trainer_state": "with trainer_state.json written",
    "save.hashed": "with all files hashed",
    "save.manifest": "with the manifest written",
    "save.replacing": "with an older checkpoint of the same step set aside",
    "save.renamed": "with the checkpoint under its name",
    "save.published": "when a checkpoint is finished",
    "save.rotating": "while an older checkpoint is deleted",
    "save.rotated": "when older ones are deleted",
}
OF_A_ROW = {"advantage": "advantage", "old_logprobs": "old_logps", "reference_logprobs": "ref_logps"}
OF_A_STEP = {
    "rollout": "before a rollout is generated",
    "reward": "before it is rewarded",
    "update": "before the passes of an optimizer step",
    "gradient": "in the gradient, right before the optimizer step",
    **{place: f"before the update, in {name} of a row" for place, name in OF_A_ROW.items()},
}
PLACES = OF_A_SAVE | OF_A_STEP

ANYWHERE = {
    "kill": "a process killed by the system (SIGKILL)",
    "exit": "a process that dies",
    "hang": "a process that waits for ever",
    "disk_full": "no space left on the disk",
    "refuse": "an engine or a server that does not answer",
}
DAMAGE = {
    "flip": "one flipped bit in a file",
    "tear": "the second half of a file lost",
    "delete": "a lost file",
}
NUMBERS = {"nan": "one NaN", "inf": "one infinity"}
OPTIONS = ("step", "process", "file")


@cache
def wanted() -> dict[str, str]:
    """The variable as a mapping; empty without it.

    Raises:
        ValueError: an unknown action, place or option, or two that do not go together.
    """
    text = os.environ.get(VARIABLE, "")
    if not text:
        return {}
    action, _, rest = text.partition(":")
    place, *options = rest.split(":")
    found = dict(option.partition("=")[::2] for option in options)
    words = [(action, (*ANYWHERE, *DAMAGE, *NUMBERS)), (place, PLACES), *((name, OPTIONS) for name in found)]
    for word, known in words:
        if word not in known:
            near = did_you_mean(word, known)
            raise ValueError(f"{VARIABLE}={text!r}: {word!r} is unknown; known: {', '.join(known)}.{near}")
    if (action in DAMAGE and place not in OF_A_SAVE) or (action in NUMBERS and place not in ("gradient", *OF_A_ROW)):
        raise ValueError(f"{VARIABLE}={text!r}: {action} can't happen at {place}.")
    return {"action": action, "place": place} | found


def inject(
    place: str, step: int, folder: Path | None = None, model: nn.Module | None = None, rows: Sequence[Row] = ()
) -> None:
    """Do what the variable asks for at this place and step, if anything.

    Args:
        folder: the checkpoint that `flip`, `tear` and `delete` damage.
        model: the one whose gradient gets a number that is not finite.
        rows: those of which one gets such a number.
    """
    fault = wanted()
    if fault.get("place") != place or not _is_at(fault.get("step", "0+"), step):
        return
    if fault.get("process", os.environ.get("RANK", "0")) != os.environ.get("RANK", "0"):
        return
    action, name = fault["action"], fault.get("file", "")
    if action in NUMBERS:
        _spoil(float(action), place, model, rows)
    elif action in ANYWHERE:
        if name and folder is not None:
            _damage(folder, name, "tear")
        _act(action)
    elif folder is not None:
        _damage(folder, name, action)


def _is_at(wanted_step: str, step: int) -> bool:
    number = int(wanted_step.removesuffix("+"))
    return step == number or (wanted_step.endswith("+") and step > number)


def _act(action: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "exit":
        os._exit(9)
    elif action == "disk_full":
        raise OSError(errno.ENOSPC, "No space left on device (injected)")
    elif action == "refuse":
        raise ConnectionRefusedError(errno.ECONNREFUSED, "the inference engine refused the connection (injected)")
    while action == "hang":
        time.sleep(1)


def _spoil(number: float, place: str, model: nn.Module | None, rows: Sequence[Row]) -> None:
    if model is not None:
        next(p.grad for p in model.parameters() if p.grad is not None).view(-1)[0] = number
    elif place == "advantage" and rows:
        rows[0].advantage = number
    else:
        known = [x for row in rows if (x := vars(row)[OF_A_ROW[place]]) is not None]
        if known:
            known[0][0] = number


def _damage(folder: Path, name: str, action: str) -> None:
    path = next(path for path in sorted(folder.rglob("*")) if path.is_file() and name in path.name)
    content = bytearray(path.read_bytes())
    if action == "delete":
        path.unlink()
    elif action == "tear":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
