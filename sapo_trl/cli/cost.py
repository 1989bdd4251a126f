"""How long does a run take, and what does it cost? An estimate before anything loads, from peak rates of GPUs.

Three things take time in a rollout, one after the other:

    generation  each token reads the weights and the keys and values of its row: the memory's bandwidth decides, and how
                many rows are generated at once
    log-probs   a forward pass over the rollout for old and for reference log-probs
    update      forward and backward pass, 2 + 4 operations a weight and token, 2 more with activation checkpointing

Nothing here was measured: rows are taken to be `MEAN_FILL` as long as the longest one allowed, and a GPU to reach fixed
shares of its peak rates. Not counted: evaluation, saving, loading, rewards that are slower than generation, and what is
spared by shared prompts and by rows whose advantage is 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sapo_trl.batch_plan import BatchPlan
from sapo_trl.cli.memory_plan import Setup, memory, vllm_cache_tokens
from sapo_trl.cli.shapes import Shape

MEAN_FILL = 0.5  # length of a row over the longest one
MOE_FACTOR = 0.5  # of the utilisation: an expert's matrix products are small
READ_UTILISATION = {"colocate": 0.5, "server": 0.5, "no": 0.1}  # share of the bandwidth while generating
SERVER_FRAC = 0.9  # of its GPUs that a vLLM server takes, at most half of it for weights
MOST_GPUS = 1024


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, by its vendor's sheet; utilisation and price are assumptions.

    Attributes:
        peak: bfloat16 operations per second, without sparsity.
        bandwidth: of its memory, bytes per second.
        memory: GiB.
        utilisation: share of `peak` that the passes over a dense model reach.
        price: US dollars an hour.
    """

    peak: float
    bandwidth: float
    memory: float
    utilisation: float
    price: float


GPUS = {
    "a100": Gpu(312e12, 2.0e12, 80, 0.40, 1.5),
    "h100": Gpu(989e12, 3.35e12, 80, 0.30, 2.5),
    "h200": Gpu(989e12, 4.8e12, 141, 0.30, 3.5),
}


@dataclass(frozen=True)
class Estimate:
    """Seconds of one rollout by phase, and what the run takes.

    Attributes:
        tokens: of a rollout, prompts and completions.
        rollouts: of the run; None where its length is given in epochs.
        num_gpus: for training and for a vLLM server.
    """

    tokens: float
    seconds: dict[str, float]
    rollouts: float | None
    num_gpus: int

    @property
    def rollout_hours(self) -> float:
        """Of all phases."""
        return sum(self.seconds.values()) / 3600

    @property
    def hours(self) -> float | None:
        """Of the whole run."""
        return None if self.rollouts is None else self.rollouts * self.rollout_hours


def estimate(shape: Shape, setup: Setup, plan: BatchPlan, gpu: Gpu, max_steps: int, fill: float) -> Estimate:
    """The time of a run whose rows are `fill` times as long as the longest; `max_steps` -1 is not known."""
    row = fill * setup.row_tokens
    tokens, servers = plan.completions_per_rollout * row, server_gpus(shape, setup)
    # a weight's product and sum; in attention, causal, the same for scores and values
    forward = tokens * (2 * shape.active + 2 * shape.layers * shape.query * row)
    rate = setup.num_gpus * gpu.peak * _utilisation(shape, gpu)
    backward = (1 if shape.is_lora else 2) + setup.checkpointing
    passes = plan.steps_per_rollout * plan.effective_batch / plan.completions_per_rollout
    seconds = {
        "generation": _generation_s(shape, setup, plan, gpu, fill),
        "log-probs": forward * setup.logprob_passes / rate,
        "update": forward * (1 + backward) * passes / rate,
    }
    rollouts = None if max_steps < 1 else max_steps / plan.steps_per_rollout
    return Estimate(tokens, seconds, rollouts, setup.num_gpus + servers)


def _utilisation(shape: Shape, gpu: Gpu) -> float:
    return gpu.utilisation * (MOE_FACTOR if shape.num_experts else 1)


def _generation_s(shape: Shape, setup: Setup, plan: BatchPlan, gpu: Gpu, fill: float) -> float:
    """Steps of decoding times their seconds, on one engine; all engines work side by side.

    A step makes one token of each row that the cache holds, and reads all weights (of a Mixture-of-Experts too: many
    rows together reach nearly every expert) and the keys and values of these rows, half written on average.
    """
    row, rows, parts = fill * setup.row_tokens, setup.engine_rows, setup.vllm_parallel
    completion = fill * setup.completion_tokens
    if setup.vllm == "server":
        rows, parts = plan.completions_per_rollout, server_gpus(shape, setup)
        setup = replace(setup, vllm_frac=SERVER_FRAC, vllm_parallel=parts)
    at_once = rows if setup.vllm == "no" else max(1, min(rows, vllm_cache_tokens(shape, setup) // row))
    steps, context = max(rows / at_once, 1) * completion, row - completion / 2
    read = 2 * shape.total / parts + at_once * context * shape.cached_per_token / min(parts, shape.key_heads)
    computed = 2 * shape.active * at_once / parts / (gpu.peak * _utilisation(shape, gpu))
    return steps * (read / (gpu.bandwidth * READ_UTILISATION[setup.vllm]) + computed)


def server_gpus(shape: Shape, setup: Setup) -> int:
    """The fewest GPUs, a power of 2, on which a vLLM server keeps half of its memory for rows; 0 without a server."""
    if setup.vllm != "server":
        return 0
    n = 1
    while 2 * shape.total / n > SERVER_FRAC / 2 * setup.gpu_bytes:
        n *= 2
    return n


def fewest_gpus(shape: Shape, setup: Setup) -> tuple[int, str] | None:
    """(GPUs, engine) of the fewest GPUs, a power of 2, into which the run fits with the same rollout; None: none do."""
    whole, n = setup.engine in ("none", "ddp"), 1
    while n <= MOST_GPUS:
        engine = setup.engine if not whole else "none" if n == 1 else "zero3"
        fewer = replace(setup, num_gpus=n, engine=engine, rows=max(1, setup.rows * setup.num_gpus // n))
        if n >= setup.vllm_parallel and memory(shape, fewer).fits:
            return n, engine
        n *= 2
    return None


def estimate_lines(shape: Shape, setup: Setup, plan: BatchPlan, gpu: Gpu, max_steps: int) -> list[tuple[str, str]]:
    """(name, value) pairs of all of it for a table; on a CPU the tokens alone."""
    mean, most = (estimate(shape, setup, plan, gpu, max_steps, fill) for fill in (MEAN_FILL, 1.0))
    row = MEAN_FILL * setup.row_tokens
    tokens = [
        ("tokens of a rollout", f"{mean.tokens / 1e6:.3g}M = {plan.completions_per_rollout} rows x {row:.0f}"),
        ("tokens of an optimizer step", f"{plan.effective_batch * row / 1e6:.3g}M = {plan.effective_batch} rows"),
    ]
    if setup.on_cpu:
        return [("GPUs", "none: use_cpu"), *tokens, ("hours and cost", "not estimated for a CPU")]
    reads, experts = READ_UTILISATION[setup.vllm], f" x {MOE_FACTOR:g} for experts" if shape.num_experts else ""
    seconds = ", ".join(f"{phase} {_seconds(mean.seconds[phase])}" for phase in mean.seconds)
    return [
        ("GPUs", _gpus(shape, setup)),
        *tokens,
        ("time of a rollout", seconds),
        ("the whole run", _run(mean, gpu, max_steps)),
        ("with all rows the longest", _run(most, gpu, max_steps)),
        ("assumed, not measured", f"rows {MEAN_FILL:g} x the longest, {gpu.peak / 1e12:.0f} TFLOP/s x "
         f"{gpu.utilisation:g}{experts}, {gpu.bandwidth / 1e12:g} TB/s x {reads:g} while generating; no evaluation"),
    ]  # fmt: skip


def _gpus(shape: Shape, setup: Setup) -> str:
    """How many GPUs the plan has, and the fewest that would do."""
    fewest, servers = fewest_gpus(shape, setup), server_gpus(shape, setup)
    needed = f"not even {MOST_GPUS} hold it" if fewest is None else f"the memory needs {fewest[0]} under {fewest[1]}"
    server = f", and {servers} or more for the vLLM server" if servers else ""
    return f"{setup.num_gpus} under {setup.engine} in this plan{server}; {needed}"


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"


def _run(found: Estimate, gpu: Gpu, max_steps: int) -> str:
    if found.hours is None:
        return f"{found.rollout_hours:.3g} h a rollout; set max_steps for all of them"
    cost = found.hours * found.num_gpus * gpu.price
    return (
        f"{found.hours:,.{0 if found.hours >= 10 else 1}f} h for {max_steps} steps = {found.rollouts:g} rollouts; "
        f"${cost:,.0f} = {found.num_gpus} GPUs x ${gpu.price:g} an hour"
    )
