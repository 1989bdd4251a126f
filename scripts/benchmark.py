"""Measure beside the others: the verifier, the update, the whole step, the update on a GPU.

    python scripts/benchmark.py rewards           the verifier beside math-verify
    python scripts/benchmark.py update [--quick]  the update beside TRL's, same weights and stored rollouts
    python scripts/benchmark.py step              the whole step beside TRL's, by phase, with real generation;
                                                  *-ahead: all cores, one rollout ahead
    python scripts/benchmark.py gpu --minutes 9   the update on one GPU, Qwen3 shapes with random weights;
                                                  --tests --output gpu.json: and the tests of tests/gpu, in one file

Timings of a shared machine are noise; the ratios within one run are what to read.
"""

import argparse
import json
import os
from importlib.metadata import version
from pathlib import Path

STEP_WORLDS = ["stored", "demo", "mid", "demo-ahead", "mid-ahead"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("rewards", "update", "step", "gpu"))
    parser.add_argument("--quick", action="store_true", help="update: the headline case alone, fewer repeats")
    parser.add_argument("--repeats", type=int, default=5, help="rewards: repetitions")
    parser.add_argument("--worlds", nargs="+", choices=STEP_WORLDS, default=STEP_WORLDS, help="step: which comparisons")
    parser.add_argument("--model", help="step: folder of a cold-started tiny model (default: random weights)")
    parser.add_argument("--minutes", type=float, default=9.0, help="gpu: stop adding cases in time for this limit")
    parser.add_argument("--tests", action="store_true", help="gpu: run tests/gpu too, results in the file of --output")
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    parser.add_argument("--plot", type=Path, help="update: write the picture here as PNG")
    arguments = parser.parse_args()
    if arguments.what == "update":
        from bench.report import benchmark_update

        benchmark_update(arguments.quick, arguments.output, arguments.plot)
    elif arguments.what == "step":
        from bench.step_report import benchmark_step

        benchmark_step(tuple(arguments.worlds), arguments.model, arguments.output)
    elif arguments.what == "gpu":
        from bench.gpu import benchmark_gpu, check_device

        try:
            check_device()
        except RuntimeError as error:
            parser.exit(1, f"{error}\n")
        if arguments.tests and arguments.output is None:
            parser.error("--tests writes its results into the file of --output, which is missing")
        benchmark_gpu(arguments.minutes, arguments.output)
        if arguments.tests:
            add_tests(arguments.output)
    else:
        rewards(arguments.repeats, arguments.output)


def add_tests(output: Path) -> None:
    """Run the tests for a GPU, and write what they give into the record that is there."""
    from bench.gpu_tests import run_tests

    from sapo_trl.files import write_json

    write_json(output, json.loads(output.read_text(encoding="utf-8")) | {"tests": run_tests()})


def rewards(repeats: int, output: Path | None) -> None:
    from bench.report import machine
    from bench.rewards import benchmark_rewards

    from sapo_trl.files import write_json
    from sapo_trl.monitor.files import command_line, versions

    facts = {"command": f"python {command_line()}", "machine": machine() | {"load_before": os.getloadavg()[0]}}
    facts["versions"] = versions() | {"math-verify": version("math-verify")}
    result = benchmark_rewards(repeats=repeats)
    print(result.summary())
    numbers = vars(result) | {"one_worker_ratio": result.one_worker_ratio}
    if output is not None:
        write_json(output, facts | {"result": numbers})


if __name__ == "__main__":
    main()
