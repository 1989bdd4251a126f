"""A checkpoint's folder: written beside its place, hashed, renamed; the newest valid one is found, older ones leave."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sapo_trl import faults

MANIFEST = "manifest.json"
RUN_STATE = "run_state_{}.safetensors"
FORMAT = 2  # of manifest and run state
_NAME = re.compile(r"checkpoint-(\d+)")


class DamagedCheckpoint(ValueError):
    """A checkpoint that can't be resumed from, with the reason and what to do."""


def staging_of(folder: Path) -> Path:
    """Where a checkpoint is written before it gets its name; nobody takes this name for a checkpoint."""
    return folder.with_name(f".{folder.name}.partial")


def _replaced(folder: Path) -> Path:
    """Where a checkpoint waits while another one of the same step takes its name."""
    return folder.with_name(f".{folder.name}.replaced")


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

    A kill at any moment leaves either the finished checkpoint or none: the rename is the last thing that happens. One
    of the same step that is there already steps aside first, and `remove_leftovers` brings it back after a kill.
    """
    paths = sorted(path for path in staging.rglob("*") if path.is_file() and path.name != MANIFEST)
    files = {str(path.relative_to(staging)): entry for path, entry in zip(paths, _entries(paths), strict=True)}
    faults.inject("save.hashed", step_of(final))
    content = {"format": FORMAT, **facts, "files": files}
    manifest = staging / MANIFEST
    manifest.write_text(json.dumps(content | {"sha256": _digest(content)}, indent=2) + "\n")
    for path in [*paths, manifest, staging, *(path for path in staging.rglob("*") if path.is_dir())]:
        _flush(path)
    faults.inject("save.manifest", step_of(final))
    if final.exists():
        os.replace(final, _replaced(final))
        faults.inject("save.replacing", step_of(final))
    os.replace(staging, final)
    _flush(final.parent)
    faults.inject("save.renamed", step_of(final))
    shutil.rmtree(_replaced(final), ignore_errors=True)
    return sum(entry["bytes"] for entry in files.values())


def _entries(paths: list[Path]) -> list[dict[str, Any]]:
    """Size and sha256 of each file; several at a time, because hashing leaves the interpreter lock."""
    with ThreadPoolExecutor() as threads:
        hashes = threads.map(_sha256, paths)
        return [{"bytes": path.stat().st_size, "sha256": sha256} for path, sha256 in zip(paths, hashes, strict=True)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content: dict) -> str:
    """sha256 of a manifest without its own."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
    for path in gone:  # renamed first: a kill in between must not leave a checkpoint with some of its files
        os.replace(path, path.with_name(f".{path.name}.deleted"))
        faults.inject("save.rotating", step_of(found[-1]))
    remove_leftovers(run_folder)
    return gone


def remove_leftovers(run_folder: Path) -> None:
    """Delete what a run that was killed has left of a save or of a rotation; a checkpoint that had stepped aside and
    was not replaced gets its name back."""
    for path in run_folder.glob(".checkpoint-*.*"):
        name = path.with_name(path.stem.removeprefix("."))
        if path.suffix == ".replaced" and not name.exists():
            os.replace(path, name)
        else:
            shutil.rmtree(path, ignore_errors=True)


# ---- check -----------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `publish` wrote beside the files.

    Raises:
        DamagedCheckpoint: it is not there, or not as it was written.
    """
    if not folder.is_dir():
        raise DamagedCheckpoint(f"{folder} is not a folder.")
    path = folder / MANIFEST
    if not path.is_file():
        lost = any(folder.glob(RUN_STATE.format("*"))) or not (folder / "trainer_state.json").is_file()
        raise DamagedCheckpoint(
            f"{path} is missing: the checkpoint lost a file, or is none."
            if lost
            else f"{folder} was written by another trainer ({MANIFEST} is missing): what it was trained with, and "
            "where in its rollout it stopped, is not known. Start a new run from its weights: model_name_or_path: "
            f"{folder}."
        )
    try:
        manifest = json.loads(path.read_text())
        whole = _digest({name: value for name, value in manifest.items() if name != "sha256"}) == manifest["sha256"]
    except (ValueError, AttributeError, KeyError) as error:
        raise DamagedCheckpoint(f"{path} is damaged ({type(error).__name__}: {error}).") from None
    if not whole:
        raise DamagedCheckpoint(f"{path} is damaged: it does not have the sha256 that it names.")
    if manifest["format"] != FORMAT:
        raise DamagedCheckpoint(f"{folder} was written by another version of sapo_trl. Resume with that version.")
    return manifest


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there as they were written.

    Raises:
        DamagedCheckpoint: the file and what is wrong with it.
    """
    manifest = read_manifest(folder)
    if manifest["model_only"]:
        raise DamagedCheckpoint(
            f"{folder} was saved with save_only_model: it has weights and no optimizer, so a run can't go on from it. "
            f"Start a new one with model_name_or_path: {folder}."
        )
    written = {folder / name: entry for name, entry in manifest["files"].items()}
    for path, entry in written.items():
        if not path.is_file():
            raise DamagedCheckpoint(f"{path} is missing: the checkpoint lost a file.")
        if path.stat().st_size != entry["bytes"]:
            raise DamagedCheckpoint(f"{path} has {path.stat().st_size} bytes, and {entry['bytes']} were written.")
    for path, found in zip(written, _entries(list(written)), strict=True):
        if found != written[path]:
            raise DamagedCheckpoint(f"{path} is damaged: its sha256 is not the one in {MANIFEST}.")
    return manifest


def newest_valid(run_folder: Path) -> tuple[Path | None, list[str]]:
    """(the newest checkpoint that can be resumed from, a sentence for each newer one that can't)."""
    skipped = []
    for folder in reversed(checkpoints_in(run_folder)):
        try:
            verify(folder)
            return folder, skipped
        except (DamagedCheckpoint, OSError) as error:
            skipped.append(f"skipped {folder.name}: {error}")
    return None, skipped
