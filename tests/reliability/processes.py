"""Runs of `scripts/train.py`, or of any function, in processes of their own: alone or several together, in seconds."""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml
from conftest import ForkedWorker, tiny_model

from sapo_trl.cli.train import main
from sapo_trl.rollout import ahead
from sapo_trl.tiny import build_tokenizer

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# What the launcher would set, but for the ranks
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "DS_ACCELERATOR": "cpu"}

CONFIG = {
    "algorithm": "sapo", "dtype": "float32", "prompt_format": "plain", "reward_funcs": ["tiny_rewards.length"],
    "per_device_train_batch_size": 8, "num_generations": 4, "num_mini_batches": 4, "learning_rate": 0.01,
    "lr_scheduler_type": "constant", "max_steps": 6, "bf16": False, "use_cpu": True, "activation_checkpointing": False,
    "max_completion_length": 6, "logging_steps": 1, "report_to": "none", "save_strategy": "steps", "save_steps": 2,
    "router_aux_loss_coef": 0.0, "on_collapse": "none",
}  # fmt: skip
REWARDS = """
import os
def length(completions, **kwargs):
    return [float(len(x) % 5) for x in completions]
def some(prompts, completions, **kwargs):
    # one reward for all completions of every third prompt
    return [0.5 if int(p.split("+")[0]) % 3 == 0 else float(len(x) % 4) for p, x in zip(prompts, completions)]
"""


def zero(stage: int) -> dict[str, str]:
    """What `accelerate launch` sets for ZeRO."""
    return {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false", "ACCELERATE_MIXED_PRECISION": "no", "DS_ACCELERATOR": "cpu",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none", "LOCAL_WORLD_SIZE": "2",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    }  # fmt: skip


@dataclass(frozen=True)
class Done:
    """How a process ended: its status (negative: the signal that killed it), and what it printed."""

    status: int
    out: str
    err: str
    seconds: float

    @property
    def said(self) -> str:
        return self.out + self.err


class Zygote:
    """The process of `zygote.py`; importing takes seconds, so there is one for all tests."""

    def __init__(self):
        environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts")])}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        atexit.register(self.process.kill)

    def ask(self, **request):
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request, default=str), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


@cache
def zygote() -> Zygote:
    return Zygote()


class Run:
    """Processes that were started together."""

    def __init__(self, call: tuple, processes: int, env: dict[str, str], paths: list):
        self.output = tempfile.mkdtemp() + "/said"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [
            {"RANK": i, "LOCAL_RANK": i, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            for i in range(processes)
        ]
        each = [{k: str(v) for k, v in (env | (rank if processes > 1 else {})).items()} for rank in ranks]
        self.started = time.monotonic()
        self.pids = zygote().ask(call=call, paths=paths, output=self.output, env=each)
        self.found: dict[int, int] = {}

    def said(self, i: int = 0) -> str:
        return "".join(Path(f"{self.output}.{i}.{kind}").read_text() for kind in ("out", "err"))

    def poll(self) -> bool:
        """Whether all have ended."""
        for pid in self.pids:
            if pid not in self.found and (status := zygote().ask(poll=pid)) is not None:
                self.found[pid] = status
        return len(self.found) == len(self.pids)

    def until(self, text: str, i: int = 0, timeout: float = 60) -> None:
        """Wait for process `i` to print a text."""
        while text not in self.said(i):
            assert not self.poll() and time.monotonic() < self.started + timeout, self.said(i)[-3000:]
            time.sleep(0.02)

    def send(self, number: int, i: int = 0) -> None:
        os.kill(self.pids[i], number)

    def ends(self, timeout: float = 120, after_first: float = 15) -> list[Done]:
        """How each process ended. A launcher ends the others a while after the first has failed: so does this."""
        failed_at = None
        while not self.poll():
            now = time.monotonic()
            if failed_at is None and any(self.found.values()):
                failed_at = now
            if now > self.started + timeout or (failed_at is not None and now > failed_at + after_first):
                for pid in set(self.pids) - self.found.keys():
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        texts = [
            [Path(f"{self.output}.{i}.{kind}").read_text() for kind in ("out", "err")] for i in range(len(self.pids))
        ]
        seconds = time.monotonic() - self.started
        return [Done(self.found[pid], *text, seconds) for pid, text in zip(self.pids, texts, strict=True)]


def train_with_forked_worker(arguments: list[str]) -> int:
    """`scripts/train.py`, without the seconds of imports of a new process for the rollouts ahead."""
    ahead.start_process = ForkedWorker
    return main(arguments)


class World:
    """A folder with a tiny model, 64 prompts and a reward, for runs of `scripts/train.py`."""

    def __init__(self, folder: Path, **fields):
        self.folder, self.run_folder = folder, folder / "run"
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer, model = build_tokenizer(), tiny_model(build_tokenizer())
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(64)]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "tiny_rewards.py").write_text(REWARDS)
        files = {"model_name_or_path": folder / "model", "dataset_name": folder / "train.jsonl"}
        self.config = CONFIG | {name: str(path) for name, path in files.items()} | fields

    def start(self, fault: str = "", processes: int = 1, env: dict | None = None, **fields) -> Run:
        fields = {"output_dir": str(self.run_folder)} | self.config | fields
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(fields))
        env = (env or {}) | ({"SAPO_TRL_FAULT": fault} if fault else {})
        paths, entry = [str(self.folder)], ("sapo_trl.cli.train", "main")
        if fields.get("rollouts_ahead"):
            paths, entry = [*paths, str(HERE), str(HERE.parent)], ("processes", "train_with_forked_worker")
        return Run((*entry, [["--config", str(path)]]), processes, env, paths)

    def train(self, fault: str = "", **fields) -> Done:
        """One process from its start to its end."""
        return self.start(fault, **fields).ends()[0]

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.run_folder.glob("checkpoint-*"))

    def leftovers(self) -> list[str]:
        return sorted(path.name for path in self.run_folder.glob(".checkpoint-*"))


def call(module: str, function: str, *arguments, processes: int = 1, env: dict | None = None) -> list[Done]:
    """A function of a module in this folder, in processes of their own."""
    paths = [str(HERE), str(HERE.parent)]
    return Run((module, function, list(arguments)), processes, env or {}, paths).ends()
