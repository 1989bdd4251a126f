"""A checkpoint's folder: written beside its place, hashed, renamed; the newest valid one is found, older ones leave."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from sapo_trl.checkpoints.weights import check_files

MANIFEST = "manifest.json"
RUN_STATE = "run_state_{}.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")
# Spare room that a save must leave: logs, completions and the report go on growing.
SPARE_BYTES = 64 * 2**20


class DamagedCheckpoint(ValueError):
    """A checkpoint that can't be resumed from, with the reason and what to do."""


def staging_of(folder: Path) -> Path:
    """Where a checkpoint is written before it gets its name; nobody takes this name for a checkpoint."""
    return folder.with_name(f".{folder.name}.partial")


def checkpoints_in(run_folder: Path) -> list[Path]:
    """`checkpoint-<step>` folders, oldest step first."""
    found = [path for path in run_folder.glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


# ---- write -----------------------------------------------------------------------------------------------------------


def publish(staging: Path, final: Path, facts: dict) -> int:
    """Hash everything in `staging` into its manifest, flush it to the disk, and give it its name. Returns its bytes.

    A kill at any moment leaves either the finished checkpoint or none: the rename is the last thing that happens.
    """
    files = {}
    for path in sorted(p for p in staging.rglob("*") if p.is_file() and p.name != MANIFEST):
        files[str(path.relative_to(staging))] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        _flush(path)
    manifest = staging / MANIFEST
    manifest.write_text(json.dumps(facts | {"files": files}, indent=2) + "\n")
    _flush(manifest)
    for folder in [staging, *(p for p in staging.rglob("*") if p.is_dir())]:
        _flush(folder)
    if final.exists():  # the same step saved again
        shutil.rmtree(final)
    os.replace(staging, final)
    _flush(final.parent)
    return sum(entry["bytes"] for entry in files.values())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Make sure that what was written survives a power cut, and not only the process."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rotate(run_folder: Path, limit: int | None, protected: Iterable[Path]) -> list[Path]:
    """Delete the oldest checkpoints beyond `limit`, never a protected one nor the newest; returns those deleted."""
    found = checkpoints_in(run_folder)
    kept = {path.resolve() for path in protected} | {path.resolve() for path in found[-1:]}
    excess = 0 if limit is None else len(found) - max(limit, len(kept & {path.resolve() for path in found}))
    gone = [path for path in found if path.resolve() not in kept][: max(excess, 0)]
    for path in gone:
        shutil.rmtree(path, ignore_errors=True)
    return gone


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise if the disk of `folder` has fewer than `needed` bytes free.

    Raises:
        OSError: names the folder, the bytes that are needed and those that are free.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed + SPARE_BYTES:
        raise OSError(
            f"{what} needs {needed / 2**20:,.0f} MiB in {folder}, and its disk has {free / 2**20:,.0f} MiB free "
            f"({SPARE_BYTES / 2**20:.0f} MiB are kept for logs). Free some, or set output_dir or save_total_limit."
        )


# ---- check -----------------------------------------------------------------------------------------------------------


def verify(folder: Path) -> None:
    """Raise unless every file is there as it was written.

    A folder without a manifest and without our run state was written by another trainer: its files are checked for
    their structure only.

    Raises:
        DamagedCheckpoint: the file and what is wrong with it.
    """
    if not folder.is_dir():
        raise DamagedCheckpoint(f"{folder} is not a folder.")
    path = folder / MANIFEST
    if not path.is_file():
        if any(folder.glob(RUN_STATE.format("*"))):
            raise DamagedCheckpoint(f"{path} is missing: the checkpoint lost a file.")
        check_files(folder)
        return
    try:
        manifest = json.loads(path.read_text())
        files = manifest["files"]
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
        raise DamagedCheckpoint(f"{path} is damaged ({error}).") from None
    if manifest.get("model_only"):
        raise DamagedCheckpoint(
            f"{folder} was saved with save_only_model: it has weights and no optimizer, so a run can't go on from it. "
            f"Start a new one with model_name_or_path: {folder}."
        )
    for name, entry in files.items():
        file = folder / name
        if not file.is_file():
            raise DamagedCheckpoint(f"{file} is missing: the checkpoint lost a file.")
        if file.stat().st_size != entry["bytes"]:
            raise DamagedCheckpoint(f"{file} has {file.stat().st_size} bytes, and {entry['bytes']} were written.")
        if _sha256(file) != entry["sha256"]:
            raise DamagedCheckpoint(f"{file} is damaged: its sha256 is not the one in {MANIFEST}.")


def newest_valid(run_folder: Path) -> tuple[Path | None, list[str]]:
    """(the newest checkpoint that can be resumed from, a sentence for each newer one that can't)."""
    skipped = []
    for folder in reversed(checkpoints_in(run_folder)):
        try:
            verify(folder)
            return folder, skipped
        except ValueError as error:
            skipped.append(f"skipped {folder.name}: {error}")
    return None, skipped
