"""A real vLLM in the training process, on a CPU (`make test-vllm`): each case is a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_worker import build

from sapo_trl.tiny import build_tokenizer

pytestmark = pytest.mark.vllm

ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip
ROLLOUTS, CLOSE, APART = 3, 1e-4, 0.1


ROOT = Path(__file__).parents[2]


def run(case: str, folder: Path) -> tuple[dict, str]:
    """(what the worker measured, what it printed)."""
    command = [sys.executable, str(Path(__file__).parent / "vllm_worker.py"), case, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENV, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("RESULT ")[2].splitlines()[0]), done.stdout


@pytest.mark.parametrize("case", ["dense", "sampler", "moe-lora", "r3"])
def test_the_engine_has_the_policys_weights_after_every_sync(tmp_path, case):
    result, printed = run(case, tmp_path)
    assert "rollout engine           vLLM in this process, float32" in printed  # vLLM would serve bfloat16
    gaps, trained = result["gaps"], [gap for gap in result["gaps"] if gap["mode"] == "train"]
    assert len(trained) == ROLLOUTS and all(gap["now"] < CLOSE and gap["tokens"] > 50 for gap in gaps)
    assert all(gap["before"] > APART for gap in trained[1:])  # or equal log-probs would say nothing about the sync
    checks = [record["sampling/engine_check"] for record in result["log"] if "sampling/engine_check" in record]
    assert len(checks) == ROLLOUTS and max(checks) < 1
    if case == "dense":
        assert len(result["evaluations"]) == 2 and sum(gap["mode"] == "eval" for gap in gaps) == 4
    if case == "sampler":  # the engine's log-probs are the old ones, of the first mini-batch too
        drift = [record["log_ratio/abs_mean"] for record in result["log"]]
        assert all(0 < drift[i] < CLOSE < 0.01 < drift[i + 1] for i in (0, 2, 4))
    if case == "r3":  # what vLLM chose is what the policy chooses before an update, and not after it
        changed = [record["routing/changed_frac"] for record in result["log"]]
        assert changed[::2] == [0, 0, 0] and min(changed[1::2]) > 0.05


def test_a_rollout_ahead_in_a_thread(tmp_path):
    """Of the weights of the step it claims, while evaluations with others come between; the same from a checkpoint in
    the middle of a rollout, and a second time."""
    result, printed = run("ahead", tmp_path)
    assert "vLLM; one rollout ahead, in a thread" in printed
    trained = [gap for gap in result["gaps"] if gap["mode"] == "train"]
    assert [gap["step"] for gap in trained] == [0, 0, 2]
    assert all(gap["now"] < CLOSE and gap["tokens"] > 50 for gap in result["gaps"])
    assert all(gap["before"] > APART for gap in trained[1:])
    assert len(result["gaps"]) == 3 + 2 * 6 and len(result["evaluations"]) == 6
    log = result["log"]
    assert [record["sampling/weights_age"] for record in log] == [0, 1, 2, 3, 2, 3]
    checks = [record["sampling/engine_check"] for record in log if "sampling/engine_check" in record]
    assert len(checks) == 2 and max(checks) < 1
    assert all(record["time/ahead_generation_s"] > 0 for record in log if "time/ahead_wait_s" in record)
    assert result["equal"] and result["resumed"] and "exact" not in printed
    assert not result["draws"] and result["lengths"] == [4, 2]


def test_an_evaluation_gives_what_transformers_gives(tmp_path):
    """Greedy completions of a float32 model, token by token; in bfloat16 they would part."""
    model, problems = build("sampler", tmp_path / "model", build_tokenizer()), tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"prompt": f"{i}+{i}=", "answer": str(2 * i)}) + "\n" for i in range(12)))
    texts = {}
    for engine in ("transformers", "vllm"):
        output = tmp_path / engine / "result.json"
        words = ["--model", model, "--dataset_name", str(problems), "--prompt_format", "plain", "--num_samples", "1"]
        words += ["--temperature", "0", "--max_new_tokens", "24", "--engine", engine, "--output", str(output)]
        command = [sys.executable, str(ROOT / "scripts/evaluate.py"), *words]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENV, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        (samples,) = output.parent.glob("*.samples.jsonl")
        kept = [json.loads(line) for line in samples.read_text().splitlines()]
        texts[engine] = {row["problem"]: row["completion"] for row in kept if "completion" in row}
    assert len(texts["vllm"]) == 12 and len(set(texts["vllm"].values())) > 6
    assert texts["vllm"] == texts["transformers"]
