"""Measuring the update against TRL's, side by side: the same weights, the same stored rollouts, gradients compared.

Measured is one optimizer step's forward and backward passes, without the optimizer, which is the same on both sides.
Time is process CPU time on one thread (a GPU: CUDA events), A B C C B A, medians. TRL is measured at its default
(8 rows a device batch, activation checkpointing) and at the best of a sweep. Memory on a CPU is the peak of resident
memory, one process per side, over what that process held before the update.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel

from bench.cases import SHAPES, TRL_DEFAULT, Case, Rollouts, Setting, Side, build, make_model, make_rollouts
from sapo_trl.metrics.step import StepMetrics
from sapo_trl.monitor.watchdog import Watchdog
from sapo_trl.trainer import SAPOTrainer
from sapo_trl.update import update as update_module
from sapo_trl.update.finite import replica_checksum
from sapo_trl.validation import PHASE_LIMITS

Mark = float | torch.Event  # a point in time: CPU seconds of this process, or a CUDA event

# TRL pads every device batch to the rollout's longest row, so a few of them tell the time and the peak of all.
SWEEP_ROWS = 16
PEAK_DEVICE_BATCHES = 2


def mark(device: str) -> Mark:
    """A point in time on the device's clock."""
    if device == "cpu":
        return time.process_time()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed_s(start: Mark, end: Mark) -> float:
    """Seconds between two `mark`s."""
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert isinstance(start, torch.Event) and isinstance(end, torch.Event)
    end.synchronize()
    return start.elapsed_time(end) / 1000


def one_update(
    side: Side, device: str = "cpu", device_batches: int | None = None, keep_gradients: bool = False
) -> float:
    """Seconds of one update; its gradients are left in the model. `device_batches`: only so many, for a peak."""
    trainer = side.trainer
    side.activate()
    if not keep_gradients:
        side.model.zero_grad(set_to_none=True)
    accumulation = trainer.args.gradient_accumulation_steps
    trainer.current_gradient_accumulation_steps = accumulation
    data, generations = trainer.train_dataset, trainer.num_generations
    assert isinstance(data, Dataset) and generations is not None
    batch = [row for row in data for _ in range(generations)]
    outside: list[float] = []
    original = trainer._generate_and_score_completions

    def timed(inputs):
        started = mark(device)
        output = original(inputs)
        outside.append(elapsed_s(started, mark(device)))
        return output

    trainer._generate_and_score_completions = timed
    trainer._step = 0
    started = mark(device)
    for i in range(device_batches or accumulation):
        trainer.accelerator.gradient_state._set_sync_gradients(i == accumulation - 1)
        trainer.training_step(side.model, batch, None)
    if isinstance(trainer, SAPOTrainer) and device_batches is None:
        trainer._agree()  # what comes between the backward pass and the optimizer step
    total = elapsed_s(started, mark(device))
    trainer._generate_and_score_completions = original
    return total - sum(outside)


@dataclass
class Measured:
    """What `measure` found, per side: seconds of every run, and gradients of the first; matmul rates in between."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    flops_per_second: list[float] = field(default_factory=list)
    gradients: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def limit_ratio(self, flops: float) -> float:
        """Seconds of ours over those of `flops` at the rate measured beside them; median."""
        pairs = zip(self.seconds["ours"], self.flops_per_second, strict=True)
        return statistics.median(seconds * rate / flops for seconds, rate in pairs)


def palindrome(names: Sequence[str], repeats: int, fewer: dict[str, int] | None = None) -> list[str]:
    """A B C C B A ..., so that a drifting machine hits all sides alike; names of `fewer` leave after so many rounds."""
    fewer = fewer or {}
    rounds = [[name for name in names if i < fewer.get(name, repeats)] for i in range(repeats)]
    return [name for i, there in enumerate(rounds) for name in (there if i % 2 == 0 else reversed(there))]


def measure(
    sides: dict[str, Side], schedule: Sequence[str], case: Case, keep_gradients: Sequence[str] = ()
) -> Measured:
    """Run the sides in the order of `schedule`; after every run of `ours` the machine's matmul rate at that moment."""
    found = Measured()
    for name in schedule:
        found.seconds.setdefault(name, []).append(one_update(sides[name], case.device))
        if name == "ours":
            found.flops_per_second.append(matmul_flops_per_second(case))
        if name in keep_gradients and name not in found.gradients:
            found.gradients[name] = gradients(sides[name].model)
    return found


def sweep_s(side: Side, case: Case) -> float:
    """Seconds of one update of TRL, extrapolated from its first `SWEEP_ROWS` rows."""
    accumulation = side.trainer.args.gradient_accumulation_steps
    batches = min(accumulation, max(1, SWEEP_ROWS // side.setting.rows))
    return one_update(side, case.device, batches) * accumulation / batches


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all gradients by parameter name."""
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def worst_error(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
    """(largest, its parameter) of |difference| / |theirs|, by norms; both sides must have the same parameters."""
    if ours.keys() != theirs.keys():
        raise ValueError(f"gradients of different parameters: {sorted(ours.keys() ^ theirs.keys())}.")
    errors = {n: float((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-12)) for n in theirs}
    return max((error, name) for name, error in errors.items())


@contextmanager
def counted_positions(model: PreTrainedModel) -> Generator[list[int]]:
    """Inside, every forward pass of the backbone adds its number of input positions to the yielded list."""
    seen: list[int] = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0] if args else kwargs["input_ids"]).numel()), with_kwargs=True
    )
    yield seen
    hook.remove()


@contextmanager
def timed_metrics() -> Generator[list[float]]:
    """Inside, CPU seconds of `token_metrics` and `StepMetrics.reduce` are added to the yielded list."""
    seconds: list[float] = []

    def timed(function: Callable) -> Callable:
        def call(*args):
            started = time.process_time()
            result = function(*args)
            seconds.append(time.process_time() - started)
            return result

        return call

    per_token, reduce = timed(update_module.token_metrics), timed(StepMetrics.reduce)
    with patch.object(update_module, "token_metrics", per_token), patch.object(StepMetrics, "reduce", reduce):
        yield seconds


def guards_s(side: Side, repeats: int = 20) -> dict[str, float]:
    """CPU seconds of one optimizer step, medians: the check for finite numbers, the checksum of the parameters (taken
    with several processes only, measured as if there were two) and the watchdog's phases."""
    trainer = side.trainer
    assert isinstance(trainer, SAPOTrainer)
    two: Any = SimpleNamespace(num_processes=2, device=trainer.accelerator.device)
    watchdog = Watchdog(PHASE_LIMITS, True, Path(tempfile.gettempdir()), 0)

    def phases() -> None:
        for name in ("rollout", "reward", "update", "update", "save"):
            with watchdog.phase(name, 1):
                pass

    loss = torch.zeros((), device=trainer.accelerator.device)
    parts: dict[str, Callable[[], object]] = {
        "finite": lambda: float(trainer._finite.found(side.model, loss)),
        "checksum": lambda: float(replica_checksum(side.model, two)),
        "watchdog": phases,
    }
    found: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repeats):
        for name, part in parts.items():
            started = time.process_time()
            part()
            found[name].append(time.process_time() - started)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def useful_flops(case: Case, rollouts: Rollouts, model: PreTrainedModel) -> float:
    """Floating-point operations (2 a multiply-add) of forward and backward that any exact update needs.

    Active rows only, a group's prompt once; the weights' products 6 per weight and position, causal attention
    6 n^2 H D a layer for a row of n positions, and the head at trained tokens.
    """
    config = model.config
    body = sum(p.numel() for n, p in model.named_parameters() if "layers" in n and p.ndim >= 2)
    if case.is_moe:
        experts = sum(p.numel() for n, p in model.named_parameters() if "experts" in n)
        body -= experts * (1 - config.num_experts_per_tok / config.num_experts)
    head = config.vocab_size * config.hidden_size
    width = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    active = rollouts.active
    trained = pairs = 0
    for i, (prompt, completion) in enumerate(zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True)):
        n, p = len(prompt) + len(completion), len(prompt)
        trained += active[i] * len(completion)
        pairs += active[i] * (n * n - (p * p if i % rollouts.generations else 0))
    return 6.0 * (body * rollouts.useful_tokens + head * trained + width * pairs)


def matmul_flops_per_second(case: Case) -> float:
    """Best of five rounds, in the case's precision: the MLP's product on a CPU, a product of 8192^3 on a GPU."""
    shape = SHAPES[case.shape]
    rows, inner, columns = 2048, shape["hidden_size"], shape["intermediate_size"]
    if case.device != "cpu":
        rows = inner = columns = 8192
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    a = torch.randn(rows, inner, device=case.device, dtype=dtype)
    b = torch.randn(inner, columns, device=case.device, dtype=dtype)
    best = 0.0
    for _ in range(5):
        started = mark(case.device)
        for _ in range(20):
            a @ b
        best = max(best, 20 * 2 * rows * inner * columns / elapsed_s(started, mark(case.device)))
    return best


def peak_mb(side: str, case: Case, setting: Setting) -> float:
    """Peak resident memory of one update over what the process held before, measured in a process of its own."""
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); from bench.update import measure_peak; "
        "print('PEAK', measure_peak(sys.argv[2], *map(json.loads, sys.argv[3:])))"
    )
    arguments = [str(Path(__file__).parents[1]), side, json.dumps(asdict(case)), json.dumps(asdict(setting))]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the memory measurement of {side}, {setting.name} failed:\n{done.stderr[-2000:]}")
    return float(next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("PEAK")))


def measure_peak(side: str, case_fields: dict, setting_fields: dict) -> float:
    """MiB. Gradients exist beforehand, as in training. Linux: the kernel's own high-water mark, reset before."""
    torch.set_num_threads(1)
    case, setting = Case(**case_fields), Setting(**setting_fields)
    run = build(side, make_model(case), make_rollouts(case), case, setting)
    for p in run.model.parameters():
        p.grad = torch.zeros_like(p)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_mb("VmRSS")
    batches = PEAK_DEVICE_BATCHES if side == "trl" else 1
    one_update(run, device_batches=min(batches, run.trainer.args.gradient_accumulation_steps), keep_gradients=True)
    return _status_mb("VmHWM") - before


def _status_mb(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def run_case(case: Case, schedule: Sequence[str] | None = None) -> dict:
    """All numbers of one CPU case: TRL's settings swept for the best, then the sides in turn, then the peaks.

    schedule: order of `default`, `best` and `ours`, in place of the case's repeats.
    """
    torch.set_num_threads(1)
    model, rollouts = make_model(case), make_rollouts(case)
    ours = build("ours", model, rollouts, case, Setting(case.num_rows, False))
    theirs = {s: build("trl", model, rollouts, case, s) for s in case.settings}
    one_update(ours)  # warms up; the first one checks the packed passes as well
    with counted_positions(model) as forwarded:
        one_update(ours)
    sweep = {} if len(theirs) == 2 else {s: sweep_s(side, case) for s, side in theirs.items()}
    best = min(sweep, key=sweep.__getitem__) if sweep else case.settings[1]
    sides = {"default": theirs[TRL_DEFAULT], "best": theirs[best], "ours": ours}
    with timed_metrics() as overhead:
        schedule = schedule or palindrome(list(sides), case.repeats, {"default": case.default_repeats})
        found = measure(sides, schedule, case, keep_gradients=("ours", "best"))
    with counted_positions(model) as padded:
        one_update(theirs[best], device_batches=1)
    error, parameter = worst_error(found.gradients["ours"], found.gradients["best"])
    flops = useful_flops(case, rollouts, model)
    result = {
        "case": case.name, "rows": case.num_rows, "tokens_per_pack": case.tokens_per_pack,
        "repeats": {name: len(seconds) for name, seconds in found.seconds.items()},
        "seconds": found.seconds,
        "ours_s": found.median("ours"), "trl_default_s": found.median("default"), "trl_best_s": found.median("best"),
        "trl_best_setting": best.name, "trl_sweep_s": {s.name: seconds for s, seconds in sweep.items()},
        "ratio_vs_default": found.median("default") / found.median("ours"),
        "ratio_vs_best": found.median("best") / found.median("ours"),
        "gradient_error": error, "gradient_error_parameter": parameter,
        "useful_flops": flops, "matmul_flops_per_second": found.flops_per_second,
        "limit_ratio": found.limit_ratio(flops),
        "useful_tokens": rollouts.useful_tokens, "forwarded_tokens": sum(forwarded),
        "trl_forwarded_tokens": sum(padded) * case.num_rows // best.rows,
        "metrics_overhead_frac": sum(overhead) / sum(found.seconds["ours"]),
        "guards_s": guards_s(ours),
    }  # fmt: skip
    result["guards_overhead_frac"] = sum(result["guards_s"].values()) / result["ours_s"]
    return result | (peaks(case, best) if case.peak_runs else {})


def peaks(case: Case, best: Setting) -> dict:
    """Activation peaks in MiB, medians of runs in processes of their own."""
    wanted = {"ours": Setting(case.num_rows, False), "trl_default": TRL_DEFAULT, "trl_best": best}
    measured = {
        name: [peak_mb("ours" if name == "ours" else "trl", case, setting) for _ in range(case.peak_runs)]
        for name, setting in wanted.items()
    }
    ours, default, fastest = (statistics.median(values) for values in measured.values())
    return {
        "peak_runs_mb": measured,
        "ours_peak_mb": ours, "trl_default_peak_mb": default, "trl_best_peak_mb": fastest,
        "activation_peak_ratio": ours / default, "activation_peak_ratio_vs_best": ours / fastest,
    }  # fmt: skip
