"""Runs under `accelerate launch`: cases of exact resume on two processes, each against its uninterrupted run.

Arguments: the file for the result, then `case:step,step` for each case. Every process compares what it holds; process 0
writes case -> step -> differences found by any process. What an uninterrupted run gave is kept beside the result, and a
later launch only resumes: under ZeRO-3 a process can hold one engine only.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "reliability"))
import torch
from accelerate.utils import gather_object
from conftest import tiny_model
from reliability_world import CASES, TOKENIZER, Outcome, differences, make, outcome, quiet
from torch import nn


def uninterrupted(output: str, name: str, model: nn.Module) -> Outcome:
    """Of the run that was never stopped, which is trained if no launch before has done it."""
    path = Path(f"{output}.{name}.{os.environ['RANK']}.pt")
    if not path.exists():
        with quiet():
            trainer = make(Path(f"{output}.{name}"), name, model)
            trainer.train()
        torch.save(vars(outcome(trainer)), path)
    return Outcome(**torch.load(path, weights_only=False))


def main(output: str, *wanted: str) -> None:
    cases = {name: steps.split(",") if steps else [] for name, steps in (text.rsplit(":", 1) for text in wanted)}
    # before the first configuration: ZeRO-3 partitions whatever loads later
    models = {name: [tiny_model(TOKENIZER, CASES[name].moe) for _ in range(1 + len(ks))] for name, ks in cases.items()}
    found = {}
    for name, ks in cases.items():
        expected, found[name] = uninterrupted(output, name, models[name].pop()), {}
        for k in ks:
            with quiet() as out:
                trainer = make(Path(f"{output}.{name} from {k}"), name, models[name].pop())
                trainer.train(resume_from_checkpoint=f"{output}.{name}/checkpoint-{k}")
            mine = differences(expected, outcome(trainer), int(k))
            said = [line for line in out.getvalue().splitlines() if "NOT" in line]
            found[name][k] = [line for lines in gather_object([mine + said]) for line in lines]
            engine = trainer.model_wrapped
            stage = engine.zero_optimization_stage() if type(engine).__name__ == "DeepSpeedEngine" else 0
            facts = {"engine": type(engine).__name__, "stage": stage, "processes": trainer.accelerator.num_processes}
            if trainer.accelerator.is_main_process:
                Path(output).write_text(json.dumps(facts | {"found": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
