"""Make the small mathematics model that the recipes `tiny/` train: `sapo-trl cold-start --output_dir runs/tiny`.

Writes `model/` (with its tokenizer), `train.jsonl` and `test.jsonl` into `--output_dir`, with `--vl` also `pictures/`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sapo_trl.cli.threads import bound_threads


def main(argv: Sequence[str] | None = None) -> int:
    """Make the model and the data; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output_dir", required=True, help="folder for model/, train.jsonl and test.jsonl")
    parser.add_argument("--moe", action="store_true", help="Qwen3-MoE with 8 experts instead of dense Qwen3")
    parser.add_argument("--vl", action="store_true", help="Qwen3-VL, and problems about pictures: tiny-vl/")
    parser.add_argument("--calculator", action="store_true", help="teach calls of a calculator: tiny/calculator")
    parser.add_argument("--steps", type=int, default=1000, help="supervised steps of 16 problems × 2 styles")
    parser.add_argument("--seed", type=int, default=0, help="initial weights and problems")
    parser.add_argument("--num_train", type=int, default=4096, help="problems in train.jsonl")
    parser.add_argument("--num_test", type=int, default=256, help="problems in test.jsonl")
    arguments = vars(parser.parse_args(argv))
    print(f"cold start: loading torch, transformers and TRL. {bound_threads()}", flush=True)
    from sapo_trl import tiny, tiny_vl
    from sapo_trl.cli.terminal import refuse  # only now: it takes seconds, and torch reads the number of threads

    try:
        if arguments.pop("vl"):
            if any([arguments.pop("moe"), arguments.pop("calculator")]):
                raise ValueError("--vl goes neither with --moe nor with --calculator.")
            cold_start = tiny_vl.cold_start
        else:
            cold_start = tiny.cold_start
        for name in ("steps", "num_train", "num_test"):
            if arguments[name] < 1:
                raise ValueError(f"--{name} {arguments[name]} is less than 1.")
        cold_start(**arguments)
    except (ValueError, OSError) as error:
        return refuse(error)
    return 0
