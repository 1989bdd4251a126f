"""The update benchmark on one GPU: Qwen3's shapes and a small Mixture-of-Experts, random weights, nothing downloaded.

bf16 autocast over fp32 weights, flash-attention where installed, else sdpa for TRL and torch's variable-length kernel
for us, where its trial succeeds (`kernel` in the record says). One model per case, shared by both sides; TRL's best is
searched over 1, 2, 4 and 8 rows a device batch with and without checkpointing, settings that do not fit the memory
counted. Time is CUDA events, memory `max_memory_allocated`. The smallest shape is also run in fp32, and the bf16
gradients of both sides are compared with that. A wall-clock budget drops the cases that no longer fit and names them.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from rich.console import Console
from transformers import PreTrainedModel

from bench.cases import TRL_DEFAULT, Case, Rollouts, Setting, Side, build, make_model, make_rollouts
from bench.report import record, table
from bench.update import (
    gradients,
    matmul_flops_per_second,
    measure,
    one_update,
    palindrome,
    sweep_s,
    useful_flops,
)
from sapo_trl.files import write_json
from sapo_trl.trainer import SAPOTrainer

# Tokens per pack that leave room in 80 GB beside fp32 weights and gradients, without checkpointing
TOKENS_PER_PACK = {"qwen3-0.6b": 16384, "qwen3-1.7b": 8192, "qwen3-4b": 4096, "qwen3-8b": 2048, "moe-64": 8192}
GRID = tuple((rows, checkpointing) for checkpointing in (True, False) for rows in (8, 4, 2, 1))
# What matters most first, because the budget cuts the end: (shape, lengths, repeats)
PLAN = (
    ("qwen3-0.6b", "1k", 5), ("qwen3-1.7b", "1k", 5), ("moe-64", "1k", 5), ("qwen3-4b", "1k", 3),
    ("qwen3-8b", "1k", 3), ("qwen3-0.6b", "8k", 3), ("moe-64", "8k", 3), ("qwen3-1.7b", "8k", 3),
    ("qwen3-4b", "8k", 2), ("qwen3-8b", "8k", 2),
)  # fmt: skip
# Share of the measured matmul rate that TRL's padded update is taken to reach when a case's time is estimated
ASSUMED_UTILISATION = 0.25
CASE_OVERHEAD_S = 20.0  # building the model, kernels compiled on first use, the sweep's short runs
TARGETS = {"ratio_vs_default": 5.0, "ratio_vs_best": 3.0, "useful_mfu_frac": 0.30, "bf16_error_ratio": 1.1}
COLUMNS = (
    "case", "ours_s", "trl_default_s", "trl_best_s", "trl_best_setting", "ratio_vs_default", "ratio_vs_best",
    "useful_mfu_frac", "activation_peak_ratio", "bf16_error_ratio",
)  # fmt: skip


def flash_or_sdpa() -> str:
    """`flash_attention_2` where the package is installed."""
    return "flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa"


def gpu_cases(attention: str) -> tuple[Case, ...]:
    """The plan as cases; the first of a case's settings is TRL's default."""
    settings = tuple(Setting(rows, checkpointing, attention) for rows, checkpointing in GRID)
    return tuple(
        Case(
            shape=shape, lengths=lengths, repeats=repeats, settings=settings, device="cuda", bf16=True,
            tokens_per_pack=TOKENS_PER_PACK[shape],
        )
        for shape, lengths, repeats in PLAN
    )  # fmt: skip


class DoesNotFitError(RuntimeError):
    """A case that no setting of one side fits into the device's memory."""


@dataclass
class GpuRun:
    """One case on the device: its model, its stored rollouts, and what did not fit."""

    case: Case
    model: PreTrainedModel = field(init=False)
    rollouts: Rollouts = field(init=False)
    out_of_memory: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.model, self.rollouts = make_model(self.case), make_rollouts(self.case)

    def side(self, kind: str, setting: Setting, case: Case | None = None) -> Side:
        """A trainer of `ours` or `trl` around the shared model."""
        return build(kind, self.model, self.rollouts, case or self.case, setting)

    def attempt(self, what: str, side: Side, call: Callable[[Side], float]) -> float | None:
        """`call(side)`, or None with a note where the memory did not suffice."""
        try:
            return call(side)
        except torch.OutOfMemoryError:
            self.out_of_memory.append(what)
        side.model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        return None

    def ours(self) -> tuple[Side, str]:
        """Our side at the case's budget; where that does not fit at half of it, a quarter, then with checkpointing."""
        case, attention = self.case, self.case.settings[0].attention
        for divisor, checkpointing in ((1, False), (2, False), (4, False), (1, True), (4, True)):
            tried = replace(case, tokens_per_pack=case.tokens_per_pack // divisor)
            name = f"ours, {tried.tokens_per_pack} tokens a pack, checkpointing {'on' if checkpointing else 'off'}"
            side = self.side("ours", Setting(case.num_rows, checkpointing, attention), tried)
            if self.attempt(name, side, lambda side: one_update(side, case.device)) is not None:
                return side, name
        raise DoesNotFitError(f"{case.name} does not fit this device's memory: tried {', '.join(self.out_of_memory)}.")

    def theirs(self) -> tuple[dict[Setting, Side], dict[Setting, float]]:
        """TRL's sides that fit and their seconds, from the first device batches of an update."""
        sides, seconds = {}, {}
        for setting in self.case.settings:
            side = self.side("trl", setting)
            one_update_s = self.attempt(setting.name, side, self._warm_sweep_s)
            if one_update_s is not None:
                sides[setting], seconds[setting] = side, one_update_s
        if not sides:
            raise DoesNotFitError(f"no setting of TRL fits this device's memory for {self.case.name}.")
        return sides, seconds

    def _warm_sweep_s(self, side: Side) -> float:
        one_update(side, self.case.device, 1)  # kernels are compiled on first use
        return sweep_s(side, self.case)


def fp32_gradients(case: Case) -> dict[str, torch.Tensor]:
    """TRL's own gradients without autocast, two rows at a time: what bf16 is compared with."""
    torch.set_float32_matmul_precision("highest")
    exact = replace(case, bf16=False)
    side = build("trl", make_model(exact), make_rollouts(exact), exact, Setting(2, False))
    one_update(side, case.device)
    found = gradients(side.model)
    del side
    gc.collect()
    AcceleratorState._reset_state(reset_partial_state=True)  # or the next trainers could not choose bf16
    return found


def distance(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all gradients over the norm of the exact ones."""
    difference = sum(float((found[name].float() - exact[name]).double().pow(2).sum()) for name in exact)
    return (difference / sum(float(x.double().pow(2).sum()) for x in exact.values())) ** 0.5


def peak_gib(side: Side, device_batches: int | None) -> float:
    """Peak of allocated memory during one update over what was held before, gradients among it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    one_update(side, "cuda", device_batches, keep_gradients=True)
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def run_gpu_case(case: Case, with_fp32: bool) -> dict:
    """All numbers of one case."""
    exact = fp32_gradients(case) if with_fp32 else None
    run = GpuRun(case)
    ours, ours_setting = run.ours()
    theirs, sweep = run.theirs()
    best = min(sweep, key=sweep.__getitem__)
    default = Setting(TRL_DEFAULT.rows, TRL_DEFAULT.checkpointing, case.settings[0].attention)
    sides = {"best": theirs[best], "ours": ours}
    if default in theirs:
        sides = {"default": theirs[default]} | sides
    kept = ("ours", "best") if with_fp32 else ()
    found = measure(sides, palindrome(list(sides), case.repeats), case, kept)
    ours_s = found.median("ours")
    assert isinstance(ours.trainer, SAPOTrainer)
    layout, kernel = ours.trainer._forward.layout, ours.trainer._forward.kernel
    result = {
        "case": case.name, "attention": best.attention, "ours_setting": ours_setting,
        "layout": layout, "kernel": kernel,
        "trl_best_setting": best.name, "repeats": case.repeats,
        "trl_sweep_s": {s.name: seconds for s, seconds in sweep.items()}, "out_of_memory": run.out_of_memory,
        "seconds": found.seconds, "ours_s": ours_s, "trl_best_s": found.median("best"),
        "ratio_vs_best": found.median("best") / ours_s,
        "useful_mfu_frac": 1 / found.limit_ratio(useful_flops(case, run.rollouts, run.model)),
        "useful_tokens": run.rollouts.useful_tokens,
    }  # fmt: skip
    if default in theirs:
        result |= {"trl_default_s": found.median("default"), "ratio_vs_default": found.median("default") / ours_s}
    if exact is not None:
        errors = {name: distance(found.gradients[name], exact) for name in kept}
        result |= {"bf16_error": errors["ours"], "trl_bf16_error": errors["best"]}
        result["bf16_error_ratio"] = errors["ours"] / errors["best"]
    if case.device == "cuda":
        peaks = {name: peak_gib(side, None if name == "ours" else 1) for name, side in sides.items()}
        result |= {f"{name}_peak_gib": peak for name, peak in peaks.items()}
        result["activation_peak_ratio"] = peaks["ours"] / peaks.get("default", peaks["best"])
    return result


def estimated_s(case: Case, flops_per_second: float) -> float:
    """Seconds that a case will take: TRL's padded positions, for the sweep and the repeats, and the overhead."""
    rollouts = make_rollouts(case)
    longest = case.prompt + max(map(len, rollouts.completion_ids))
    with torch.device("meta"):
        model = make_model(replace(case, device="meta"))
    padded = replace(rollouts, rewards=[float(i) for i in range(case.num_rows)])
    per_token = useful_flops(case, padded, model) / padded.useful_tokens
    update_s = per_token * longest * case.num_rows / (flops_per_second * ASSUMED_UTILISATION)
    runs = 2.2 * case.repeats + len(case.settings) * min(1.0, 16 / case.num_rows)
    return update_s * runs + CASE_OVERHEAD_S


def run_cases(
    cases: tuple[Case, ...], minutes: float, started: float, save: Callable[[list[dict], list[str]], None]
) -> tuple[list[dict], list[str]]:
    """(results, dropped): each case that fits what is left of `minutes` since `started`, the others with the reason.

    `save` is called after every case, so that a run that is stopped keeps what it measured.
    """
    results, dropped = [], []
    rate = matmul_flops_per_second(cases[0])
    for i, case in enumerate(cases):
        need, left = estimated_s(case, rate), minutes * 60 - (time.monotonic() - started)
        if need > left:
            dropped.append(f"{case.name}: about {need:.0f} s needed, {max(left, 0):.0f} s left")
            continue
        try:
            results.append(run_gpu_case(case, with_fp32=i == 0) | {"matmul_flops_per_second": rate})
            print(f"{case.name}: {results[-1]['ratio_vs_best']:.2f}x TRL's best", flush=True)
        except (torch.OutOfMemoryError, DoesNotFitError) as error:
            dropped.append(f"{case.name}: {str(error).splitlines()[0]}")
        save(results, dropped)
        gc.collect()
        if case.device == "cuda":
            torch.cuda.empty_cache()
    return results, dropped


def check_device() -> None:
    """Raises RuntimeError without a CUDA device."""
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"the GPU benchmark found no CUDA device (torch {torch.__version__}); it times CUDA kernels and would say "
            "nothing on a CPU. There, run `python scripts/benchmark.py update`."
        )


def benchmark_gpu(minutes: float, output: Path | None) -> list[dict]:
    """Run what fits in `minutes`, print a table, what was dropped, and the first case as JSON last."""
    started = time.monotonic()
    device = torch.cuda.get_device_properties(0)
    facts = {"gpu": device.name, "gpu_memory_gib": device.total_memory / 2**30, "targets": TARGETS}

    def save(results: list[dict], dropped: list[str]) -> None:
        if output is not None:
            write_json(output, record(results, **facts, dropped=dropped))

    results, dropped = run_cases(gpu_cases(flash_or_sdpa()), minutes, started, save)
    save(results, dropped)
    Console(width=190).print(table(results, COLUMNS))
    for line in dropped:
        print(f"dropped: {line}")
    names = [name for name in COLUMNS if results and name in results[0]]
    print(json.dumps({name: results[0][name] for name in names} | {"dropped": len(dropped)}), flush=True)
    return results
