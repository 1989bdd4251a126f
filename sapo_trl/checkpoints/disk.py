"""The run's folder: it can be written, has space for what will be saved, and stays there while a run trains."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import nn
from transformers import TrainerCallback

from sapo_trl.checkpoints.folder import checkpoints_in
from sapo_trl.config import SAPOConfig
from sapo_trl.files import way_back

# Spare space that a save must leave: logs, completions and the report go on growing.
SPARE_BYTES = 64 * 2**20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What torch.save says, without an errno, when a write fails.
IN_THE_WAY = (IsADirectoryError, NotADirectoryError, PermissionError)  # something else lies where a file should
TORCH_WRITE_ERRORS = ("PytorchStreamWriter", "inline_container", "iostream")

LOGGER = logging.getLogger(__name__)


class DiskError(OSError):
    """The run's folder can't be written; names the folder, and the bytes where they are the reason."""


# ---- before a run and before a save ----------------------------------------------------------------------------------


def require_output(config: SAPOConfig, model: str | nn.Module, saves_adapter: bool) -> None:
    """Raise unless the output folder can be written and the checkpoints that will lie there at once fit.

    Args:
        model: a folder, whose weight files are counted; a model; or a name on the Hub, of which nothing is known yet.
        saves_adapter: checkpoints hold adapters, whose size is not counted.

    Raises:
        DiskError: names the folder, the bytes that are needed and those that are free.
    """
    folder = config.folder
    probe, metrics = folder / f".written-by-{os.getpid()}", folder / "metrics.jsonl"
    if metrics.is_dir():
        raise DiskError(
            f"{metrics} is a folder, and metrics are written there. Move it away, or set another output_dir."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise DiskError(f"output_dir {folder} can't be written: {error}. Set another output_dir.") from None
    weights = 0 if saves_adapter else _weight_bytes(model)
    if config.save_strategy == "no" or not weights:
        return
    size = weights if config.save_only_model else 3 * weights  # AdamW keeps two numbers a weight
    at_once = 1 if config.save_total_limit is None else config.save_total_limit + 1
    missing = max(1, at_once - len(checkpoints_in(folder)))
    require_space(folder, missing * size + weights, f"{missing} checkpoint(s) and the model")


def _weight_bytes(model: str | nn.Module) -> int:
    if isinstance(model, str):
        return sum(path.stat().st_size for path in Path(model).glob("*.safetensors"))
    return sum(p.numel() * p.element_size() for p in model.parameters())


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise if the disk of `folder` has fewer than `needed` bytes free.

    Raises:
        DiskError: names the folder, the bytes that are needed and those that are free.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed + SPARE_BYTES:
        raise DiskError(
            f"{what} need(s) {needed:,} bytes in {folder}, and its disk has {free:,} bytes free ({SPARE_BYTES:,} are "
            "kept for logs). Free some, set another output_dir, or a smaller save_total_limit."
        )


# ---- in a run --------------------------------------------------------------------------------------------------------


@contextmanager
def explained(folder: Path, consequence: str = "") -> Generator[None]:
    """Inside, an error of a write says which folder it was for, the bytes that are free there, and how to go on.

    Args:
        consequence: a sentence on what was not finished, with a space after it.

    Raises:
        DiskError: in place of the errors of Python, safetensors and torch.
    """
    try:
        yield
    except DiskError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        place = getattr(error, "filename", None)
        if isinstance(error, IN_THE_WAY) and folder.absolute() in Path(str(place)).absolute().parents:
            raise DiskError(
                f"{place} can't be written: {error}. Move it away. {consequence}{way_back(folder)}"
            ) from error
        is_write = isinstance(error, SafetensorError) or any(text in str(error) for text in TORCH_WRITE_ERRORS)
        if not is_write and getattr(error, "errno", None) not in FULL:
            raise
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        raise DiskError(
            f"{folder} could not be written; its disk is full or limited ({free:,} bytes free). {consequence}Free some "
            f"space. {way_back(folder)} ({error})"
        ) from error


class OutputFolder(TrainerCallback):
    """Notices after every optimizer step that the run's folder was deleted or replaced, on the main process.

    Attributes:
        is_lost: it was; the trainer tells the other processes and sets `is_agreed`, and a checkpoint is saved in the
            folder that is made again.
    """

    def __init__(self):
        self.is_lost = self.is_agreed = False
        self._handle: int | None = None  # kept open: the system does not give its inode to another folder

    def on_train_begin(self, args, state, control, **kwargs):
        self.is_lost = self.is_agreed = False
        if state.is_world_process_zero:
            self._open(args.output_dir)

    def on_train_end(self, args, state, control, **kwargs):
        self._close()

    def on_step_end(self, args, state, control, **kwargs):
        if self.is_agreed:
            self.is_lost = self.is_agreed = False
            control.should_save = True
        if self._handle is None or self._is_there(args.output_dir):
            return
        self.is_lost = True
        self._open(args.output_dir)
        LOGGER.warning(
            f"step {state.global_step}: the output folder {args.output_dir} is gone, with all checkpoints and files "
            "that it held. It is made again, and a checkpoint is saved after the next step."
        )

    def _is_there(self, folder: str) -> bool:
        assert self._handle is not None
        try:
            return os.path.samestat(os.stat(folder), os.fstat(self._handle))
        except OSError:
            return False

    def _open(self, folder: str) -> None:
        self._close()
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._handle = os.open(folder, os.O_RDONLY)

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
        self._handle = None
