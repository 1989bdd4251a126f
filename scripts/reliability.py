"""Run the whole reliability matrix: `python scripts/reliability.py [pytest's arguments]`.

`tests/reliability` with everything that the default suite leaves out, in two processes side by side.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests/reliability"
RESUME = TESTS / "test_resume.py"


def matrix(words: Sequence[str]) -> int:
    """Run all tests; the exit status of the first half that failed, or 0."""
    others = sorted(str(path) for path in TESTS.glob("test_*.py") if path != RESUME)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started, running = time.monotonic(), []
    for files in ([str(RESUME)], others):
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115, read when its process has ended
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-W", "ignore", *files, *words]
        running.append((subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=ROOT), output))
    for process, output in running:
        process.wait()
        output.seek(0)
        print(output.read(), flush=True)
    print(f"the reliability matrix took {(time.monotonic() - started) / 60:.1f} minutes")
    return next((process.returncode for process, _ in running if process.returncode), 0)


if __name__ == "__main__":
    sys.exit(matrix(sys.argv[1:]))
