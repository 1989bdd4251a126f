"""Faults on purpose, to see what a run does then: `SAPO_TRL_FAULT=action:place[:step=N]...`.

    SAPO_TRL_FAULT=kill:save.optimizer:step=8          SIGKILL in the middle of a save
    SAPO_TRL_FAULT=nan:gradient:step=3:process=1       one NaN in a gradient of one process
    SAPO_TRL_FAULT=hang:reward:process=1               a reward that never comes back
    SAPO_TRL_FAULT=disk_full:save.weights              no space left
    SAPO_TRL_FAULT=flip:save.published:file=optimizer  one flipped bit in a finished checkpoint (tear: half a file)

Without the variable every call is one look-up.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from torch import nn

from sapo_trl.errors import did_you_mean

VARIABLE = "SAPO_TRL_FAULT"
PLACES = (
    "save.begin", "save.weights", "save.optimizer", "save.run_state", "save.trainer_state", "save.manifest",
    "save.renamed", "save.published", "save.rotated", "gradient", "reward", "update", "rollout",
)  # fmt: skip


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _exit() -> None:
    os._exit(9)


def _hang() -> None:
    while True:
        time.sleep(1)


def _disk_full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device (injected)")


ACTIONS: dict[str, Callable[[], None]] = {"kill": _kill, "exit": _exit, "hang": _hang, "disk_full": _disk_full}
OF_A_FOLDER, OF_A_MODEL = ("flip", "tear", "delete"), ("nan",)


@cache
def _wanted() -> dict[str, str]:
    """The variable as a mapping; empty without it.

    Raises:
        ValueError: an unknown action, place or option.
    """
    text = os.environ.get(VARIABLE, "")
    if not text:
        return {}
    action, _, rest = text.partition(":")
    place, *options = rest.split(":")
    actions = [*ACTIONS, *OF_A_FOLDER, *OF_A_MODEL]
    for word, known in ((action, actions), (place, PLACES)):
        if word not in known:
            near = did_you_mean(word, known)
            raise ValueError(f"{VARIABLE}={text!r}: {word!r} is unknown; known: {', '.join(known)}.{near}")
    found = dict(option.partition("=")[::2] for option in options)
    if unknown := found.keys() - {"step", "process", "file"}:
        raise ValueError(f"{VARIABLE}={text!r}: {', '.join(sorted(unknown))} is no option; known: step, process, file.")
    return {"action": action, "place": place} | found


def inject(place: str, step: int, folder: Path | None = None, model: nn.Module | None = None) -> None:
    """Do what the variable asks for at this place and step, if anything.

    Args:
        folder: the checkpoint that `flip`, `tear` and `delete` damage.
        model: the one whose gradient gets a NaN.
    """
    wanted = _wanted()
    if wanted.get("place") != place or wanted.get("step", str(step)) != str(step):
        return
    if wanted.get("process", os.environ.get("RANK", "0")) != os.environ.get("RANK", "0"):
        return
    action = wanted["action"]
    if action in ACTIONS:
        ACTIONS[action]()
    elif action in OF_A_FOLDER and folder is not None:
        _damage(next(path for path in sorted(folder.iterdir()) if wanted.get("file", "") in path.name), action)
    elif action == "nan" and model is not None:
        next(p.grad for p in model.parameters() if p.grad is not None).view(-1)[0] = float("nan")


def _damage(path: Path, action: str) -> None:
    content = bytearray(path.read_bytes())
    if action == "delete":
        path.unlink()
    elif action == "tear":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
