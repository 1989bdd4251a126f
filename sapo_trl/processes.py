"""Before any weights load: do the processes of a launch run the same thing, each on its device, in one folder?"""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.utils import gather_object

from sapo_trl.checkpoints.resume import SILENT, identity
from sapo_trl.config import SAPOConfig
from sapo_trl.monitor.files import PACKAGES, versions

SECONDS = 10.0  # a file of another machine may show up late: network file systems keep listings for some seconds
NOT_COMPARED = {*SILENT, "threads", "local_rank", "log_level", "log_level_replica"}  # may differ between machines


class Facts(NamedTuple):
    """What a process says about itself.

    Attributes:
        settings: versions, every setting and a digest of the training set, as plain data without secrets.
        probe: the file by which the others find the main process's output folder.
    """

    host: str
    device: str
    settings: dict[str, Any]
    probe: str


def check_processes(config: SAPOConfig, dataset: Any) -> None:
    """Raise, on every process alike, if the processes of a launch do not belong together; nothing with one process.

    Raises:
        ValueError: another version, setting or data, two processes on one GPU, or an output folder that is not shared.
    """
    if config.world_size == 1:
        return
    probe = config.folder / f".seen-{platform.node()}-{os.getpid()}"
    is_main = config.process_index == 0
    if is_main:
        probe.write_text("")
    packages = {name: version for name, version in versions().items() if name in PACKAGES}
    settings = {k: x for k, x in (identity(config, dataset) | packages).items() if k not in NOT_COMPARED}
    try:
        found = gather_object([Facts(platform.node(), str(config.device), settings, probe.name)])
        seen = gather_object([_appears(config.folder / found[0].probe)])
    finally:
        if is_main:
            probe.unlink(missing_ok=True)
    if message := difference(found):
        raise ValueError(message)
    if not all(seen) and not config.save_on_each_node:
        rank = seen.index(False)
        raise ValueError(
            f"process {rank} on {found[rank].host} does not see the output_dir {config.output_dir} of process 0 on "
            f"{found[0].host}: every process writes its part of a checkpoint there. Set one on a file system that all "
            "machines share, by its absolute path."
        )


def difference(found: list[Facts]) -> str:
    """What is wrong with the processes of a launch, as a sentence; empty where nothing is."""
    first, users = found[0], {}
    for rank, facts in enumerate(found):
        who = f"process {rank} on {facts.host}"
        for name in sorted(first.settings.keys() | facts.settings.keys()):
            ours, theirs = facts.settings.get(name, "none"), first.settings.get(name, "none")
            if ours != theirs:
                fix = "the same version on every machine" if name in PACKAGES else "every machine with the same values"
                verb = "Install" if name in PACKAGES else "Start"
                return f"{who} has {name}={ours}, and process 0 on {first.host} has {theirs}. {verb} {fix}."
        if "cuda" in facts.device and (other := users.setdefault((facts.host, facts.device), rank)) != rank:
            return (
                f"{who} and process {other} both use {facts.device}. Start one process per GPU by torchrun or "
                "accelerate launch, which set LOCAL_RANK."
            )
    return ""


def _appears(path: Path) -> bool:
    """Whether a file is there, or comes within `SECONDS`."""
    until = time.monotonic() + SECONDS
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True
