"""Two CPU processes under `accelerate launch` against one: the engine is really there, and it changes nothing.

MULTI_CPU would be the obvious `distributed_type`, but accelerate 1.15 then starts one process without saying so.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

LAUNCH = Path(__file__).parents[1] / "launch"
LOGGED = (
    "loss",
    "entropy",
    "ratio/mean",
    "ratio/max",
    "effective_update_ratio",
    "update/forwarded_tokens",
    "gate/pull_neg_mean",
    "ratio/p90",
)


def launch(folder: Path, engine: str | None, models: str, *more: str) -> subprocess.CompletedProcess:
    """`launch/worker.py` when it has ended, on one process, or on two under an engine.

    A model's result lies in `<folder>/<model>.json`.
    """
    command = [str(LAUNCH / "worker.py"), str(folder), models]
    if engine is None:
        command = [sys.executable, *command]
    else:
        config = ["--config_file", str(LAUNCH / f"{engine}.yaml"), "--main_process_port", "0"]
        flags = ["--engine"] if engine.startswith("zero") else []
        command = [sys.executable, "-m", "accelerate.commands.launch", *config, *command, *flags, *more]
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=400)


def run(folder: Path, engine: str | None, models: str, *more: str) -> dict[str, dict]:
    """The results by model; a launch that trains several spares the imports of its processes."""
    done = launch(folder, engine, models, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    return {model: json.loads((folder / f"{model}.json").read_text()) for model in models.split(",")}


def flat(tensors: dict) -> torch.Tensor:
    return torch.cat([torch.tensor(tensors[name]).flatten() for name in sorted(tensors)])


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one"), None, "dense,moe")


@pytest.fixture(scope="module", params=["ddp", "zero2", "zero3"])
def two(request, tmp_path_factory):
    return request.param, run(tmp_path_factory.mktemp(request.param), request.param, "dense,moe")


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_two_processes_equal_one(one, two, model):
    engine, results = two
    alone, together = one[model], results[model]
    expected = {"ddp": ("DistributedDataParallel", 0), "zero2": ("DeepSpeedEngine", 2), "zero3": ("DeepSpeedEngine", 3)}
    assert (together["wrapped"], together["stage"], together["processes"]) == (*expected[engine], 2)
    assert (alone["wrapped"], alone["processes"]) == (type_name(model), 1)
    for mine, theirs in zip(alone["log"], together["log"], strict=True):
        for name in LOGGED:
            assert theirs[name] == pytest.approx(mine[name], rel=2e-4, abs=1e-6), name  # a loss is a sum near 0
    for name in ("sampling/engine_check", "sampling/one_row"):  # stored log-probs are off by 0.3 and 0.3 a token
        mine, theirs = ([r[name] for r in result["log"] if name in r] for result in (alone, together))
        assert len(mine) == 2 and min(mine + theirs) > 0.1
        assert name == "sampling/one_row" or theirs == pytest.approx(mine, rel=2e-4)
    balance = [
        (r["update/imbalance_before_dealing"], r["update/imbalance"])
        for r in together["log"]
        if "update/imbalance" in r
    ]
    # rows move in every rollout; not with experts and a router loss, where rows may hold routes by then
    assert len(balance) == (2 if model == "dense" else 0) and all(after < before for before, after in balance)
    if model == "moe":
        assert [r["routing/changed_frac"] > 0 for r in together["log"]] == [False, True, False, True]
    off_policy = [record["log_ratio/abs_mean"] for record in together["log"]]
    assert off_policy[0] == off_policy[2] == 0 and min(off_policy[1], off_policy[3]) > 0.05
    if engine == "ddp":
        for mine, theirs in zip(alone["gradients"], together["gradients"], strict=True):
            a, b = flat(mine), flat(theirs)
            assert (a - b).norm() < 1e-5 * a.norm()
    a, b = flat(alone["parameters"]), flat(together["parameters"])
    assert (a - b).norm() < 1e-5 * a.norm()
    # process 0 has half the memory, process 1 the longer prompt: both settle on what one process with both settles on
    first, second = together["budgets"]
    assert first == second == [pytest.approx(alone["budgets"][0][0], rel=0.02), 1]


def test_a_retry_on_one_process_changes_nothing(tmp_path, one):
    """Process 1 runs out of memory in its first pack and starts the mini-batch again, while process 0 waits."""
    together = run(tmp_path, "ddp", "dense", "--fail")["dense"]
    assert [record["update/oom_retries"] for record in together["log"]] == [1, 1, 1, 1]  # of the run so far
    a, b = flat(one["dense"]["parameters"]), flat(together["parameters"])
    assert (a - b).norm() < 1e-5 * a.norm()


def test_no_retry_beside_a_router_loss(tmp_path):
    """That loss is a collective inside the mini-batch: a retry would meet the wrong one."""
    done = launch(tmp_path, "ddp", "moe", "--fail")
    assert done.returncode != 0 and not (tmp_path / "moe.json").exists()
    assert "other processes are in the middle of it: set max_tokens_per_pack:" in done.stderr


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Results by model of one process, and of two."""
    worker, env, models = (
        str(LAUNCH / "fsdp2_worker.py"),
        os.environ | {"OMP_NUM_THREADS": "1"},
        ("dense", "moe", "tied"),
    )
    results = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]):
        output = tmp_path_factory.mktemp("shards")
        command = [sys.executable, *launcher, worker, str(output), ",".join(models)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append({model: json.loads((output / f"{model}.json").read_text()) for model in models})
    return results


@pytest.mark.parametrize("model", ["dense", "moe", "tied"])
def test_two_shards_under_fsdp2_equal_one_process(shards, model):
    """Two optimizer steps, several packs each; every pack is synchronised, so no process ever holds the sum of all
    gradients."""
    alone, together = (results[model] for results in shards)
    assert together["parameters_here"] < 0.6 * together["parameters"] == 0.6 * alone["parameters_here"]
    assert min(together["packs"]) > 1 and not together["waited_with_sums"]
    for mine, theirs in zip(alone["gradients"], together["gradients"], strict=True):
        assert mine.keys() == theirs.keys()
        a, b = flat(mine), flat(theirs)
        assert (a - b).norm() < 2e-6 * a.norm() and a.norm() > 1e-3


def type_name(model: str) -> str:
    return {"dense": "Qwen3ForCausalLM", "moe": "Qwen3MoeForCausalLM"}[model]
