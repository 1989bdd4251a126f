"""Run the whole reliability matrix: `python scripts/reliability.py [pytest's arguments]`.

`tests/reliability` with everything that the default suite leaves out, in two processes side by side. Without
arguments of pytest, the outcome of every test goes to `docs/results/reliability.json`.
`python scripts/reliability.py page` injects the faults of `sapo_trl/faults.py` into runs of a tiny model, goes on from
what they have left, and writes `docs/faults.md`, in some minutes; only what that page lacks, so delete it to renew all.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from sapo_trl import faults
from sapo_trl.files import write_json, write_text
from sapo_trl.monitor.files import versions

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests/reliability"
RESUME = TESTS / "test_resume.py"
RESULT = ROOT / "docs/results/reliability.json"

# What is injected -> fields of the run. Six steps, four to a rollout, saved after every second one.
LIMITS = {"phase_limits": dict.fromkeys(("rollout", "reward", "update", "save"), 5.0)}
FAULTS: dict[str, dict[str, Any]] = {
    **{f"kill:{place}:step=4": {} for place in faults.OF_A_SAVE if place not in ("save.replacing", "save.rotating")},
    "kill:save.optimizer:step=4:file=optimizer": {},
    "kill:save.replacing:step=4": {},  # goes on from step 2 in a folder that has a checkpoint of step 4
    "kill:save.rotating:step=4": {"save_total_limit": 1},
    **{f"kill:{place}:step=5": {} for place in ("rollout", "reward", "update", "gradient")},
    "exit:update:step=4:process=1": {"processes": 2},
    **{f"hang:{place}:step=5": LIMITS for place in ("reward", "update")},
    "hang:reward:step=5:process=1": {"phase_limits": {"reward": 5.0}, "processes": 2},
    "hang:save.optimizer:step=4": LIMITS,
    "disk_full:save.weights:step=4": {},
    "refuse:rollout:step=5": {},
    **{f"{action}:save.published:step=6:file=optimizer": {} for action in faults.DAMAGE},
    **{f"{number}:gradient:step=4": {} for number in faults.NUMBERS},
    **{f"nan:{place}:step=4": {"beta": 0.1} for place in faults.OF_A_ROW},
    "nan:gradient:step=4:process=1": {"processes": 2},
    "nan:gradient:step=3+": {},
}


def matrix(words: Sequence[str]) -> int:
    """Run all tests; the exit status of the first half that failed, or 0."""
    others = sorted(str(path) for path in TESTS.glob("test_*.py") if path != RESUME)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started, running = time.monotonic(), []
    folder = tempfile.TemporaryDirectory()
    reports = [Path(folder.name) / f"{half}.xml" for half in range(2)]
    for files, report in zip(([str(RESUME)], others), reports, strict=True):
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115, read when its process has ended
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-W", "ignore", f"--junitxml={report}", *files]
        command += words
        running.append((subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=ROOT), output))
    for process, output in running:
        process.wait()
        output.seek(0)
        print(output.read(), flush=True)
    minutes = (time.monotonic() - started) / 60
    print(f"the reliability matrix took {minutes:.1f} minutes")
    if not words:
        facts = {"command": "python scripts/reliability.py", "minutes": round(minutes, 1)}
        write_json(RESULT, facts | outcomes(reports))
    folder.cleanup()
    return next((process.returncode for process, _ in running if process.returncode), 0)


def outcomes(reports: Sequence[Path]) -> dict[str, Any]:
    """The machine, the versions, and each test's outcome with its seconds, from pytest's reports."""
    cases = [case for report in reports for case in ElementTree.parse(report).iter("testcase")]
    files: dict[str, dict[str, str]] = {}
    for case in cases:
        bad = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        name, seconds = case.get("classname", "").rpartition(".")[2], float(case.get("time", 0))
        files.setdefault(name, {})[case.get("name", "")] = f"{bad[0] if bad else 'passed'}, {seconds:.1f} s"
    passed = sum(outcome.startswith("passed") for tests in files.values() for outcome in tests.values())
    machine = {"cores": os.cpu_count(), "system": platform.system(), "machine": platform.machine()}
    return {"passed": passed, "of": len(cases), "machine": machine, "versions": versions(), "tests": files}


def page(path: Path) -> None:
    """Write the page of faults from runs: those that it lacks, so that a run which was stopped goes on."""
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    from processes import World

    lines = path.read_text().splitlines() if path.exists() else []
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| `")]
    found = {fault.strip("`"): cells for fault, _, *cells in rows}
    simulated = {**faults.ANYWHERE, **faults.DAMAGE, **faults.NUMBERS}
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder) / "world", write_report=False)
        for fault, fields in FAULTS.items():
            if fault not in found:
                found[fault] = observed(world, fault, dict(fields))
                print(fault, *found[fault], sep=" | ", flush=True)
            table = list(INTRODUCTION)
            for name in (name for name in FAULTS if name in found):
                action, place, *_ = name.split(":")
                cells = [f"`{name}`", f"{simulated[action]} {faults.PLACES[place]}", *found[name]]
                table.append(f"| {' | '.join(cells)} |")
            write_text(path, "\n".join(table) + "\n")


INTRODUCTION = (
    "# Faults",
    "",
    "What a run does when something goes wrong: observed by `python scripts/reliability.py page` on a tiny model that",
    "trains for six steps, four to a rollout, and saves after every second one. `SAPO_TRL_FAULT=<fault>` before any",
    "command injects a fault; `sapo_trl/faults.py` has the actions and places. Each run is then started again with",
    "`resume_from_checkpoint: true`. A negative status is the signal that ended a process; two processes have two.",
    "",
    "| fault | simulates | exit status | what it says | left on the disk | resumed |",
    "|---|---|---|---|---|---|",
)


def observed(world, fault: str, fields: dict[str, Any]) -> list[str]:
    """The cells from the exit status on: of a run with the fault, and of the one that goes on."""
    shutil.rmtree(world.run_folder, ignore_errors=True)
    processes = fields.pop("processes", 1)
    fields |= {"per_device_train_batch_size": 8 // processes, "processes": processes}
    if "save.replacing" in fault:
        world.start(max_steps=4).ends()
        fields["resume_from_checkpoint"] = str(world.run_folder / "checkpoint-2")
    done = world.start(fault, **fields).ends(after_first=20)
    kept = [*world.checkpoints(), *world.leftovers(), *(x.name for x in world.run_folder.glob("model.safetensors"))]
    again = world.start(**fields | {"resume_from_checkpoint": True}).ends()
    said = [line.removeprefix("resume: ") for line in again[0].out.splitlines() if line.startswith(("resume", "skip"))]
    before, after = (", ".join(str(x.status) for x in runs) for runs in (done, again))
    cells = [before, sentence(world, done), ", ".join(kept), "; ".join([f"status {after}", *said])]
    cells = [cell.replace(str(world.run_folder), "RUN").replace("|", "\\|") for cell in cells]
    return [re.sub(r"[\d,]+ bytes free", "N bytes free", cell) for cell in cells]


def sentence(world, done: Sequence[Any]) -> str:
    """The error, the report of a hang, the last warning, the exception that nobody caught, or what was counted."""
    place = r"\[\S*?(pair\.cc|\d+\.\d+)\S*?\](:\d+)?"  # gloo's line of source, and its address
    lines = [re.sub(place, "[…]", line) for x in done for line in x.err.splitlines()]
    told = [line for line in lines if line.startswith("error: ") or " hangs: " in line]
    uncaught = [line for line in lines if re.match(r"[\w.]*Error: ", line)]
    path = world.run_folder / "warnings.jsonl"
    warned = [json.loads(line)["message"] for line in path.read_text().splitlines()] if path.exists() else []
    records = [json.loads(line) for line in (world.run_folder / "metrics.jsonl").read_text().splitlines()]
    names = ("log_ratio/clamped_frac", "kl_clamped_frac")
    counted = [f"`{name}` {x[name]:.2g} at step {x['step']}" for x in records for name in names if x.get(name)]
    return [*told[:1], *warned[-1:], *uncaught[-1:], *counted[:1], "nothing"][0]


if __name__ == "__main__":
    if sys.argv[1:] != ["page"]:
        sys.exit(matrix(sys.argv[1:]))
    page(ROOT / "docs/faults.md")
