"""The results of `pytest tests/gpu` as data, for the one file that somebody with a GPU sends."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

FOLDER = Path(__file__).parents[2] / "tests" / "gpu"
LIMIT_S = 540.0


def run_tests(folder: Path = FOLDER, limit_s: float = LIMIT_S) -> dict:
    """Run the tests of a folder in a process of their own, for at most `limit_s` seconds.

    Returns:
        Seconds of all, counts of tests, and by name the last lines of what each one that did not pass says.
    """
    with tempfile.TemporaryDirectory() as here:
        report = Path(here) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(folder)]
        try:
            subprocess.run(command, cwd=folder.parents[1], timeout=limit_s)
        except subprocess.TimeoutExpired:
            return {"not_finished_after_s": limit_s}
        if not report.is_file():
            return {"not_run": "pytest wrote no report"}
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    found = {"seconds": float(suite.attrib["time"]), "tests": int(suite.attrib["tests"])}
    for kind in ("failure", "error", "skipped"):
        cases = [(case, said) for case in suite.iter("testcase") for said in case.findall(kind)]
        found[kind] = {case.attrib["name"]: _end(said) for case, said in cases}
    return found


def _end(said: ElementTree.Element) -> str:
    lines = (said.text or said.attrib.get("message", "")).strip().splitlines()
    return "\n".join(lines[-12:])
