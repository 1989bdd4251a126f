"""One sentence for each setting of a plan that runs, but not as it should, with the value to set.

What would fail is refused elsewhere, and a run that does not fit gets its nearest change from `memory_plan`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from sapo_trl.batch_plan import BatchPlan
from sapo_trl.cli.memory_plan import GIB, Setup, memory, vllm_cache_tokens
from sapo_trl.cli.shapes import Shape
from sapo_trl.data.loading import check_enough_prompts

GAIN = 1.5  # how many times as many rows a setting must bring to be worth a sentence


def advice(shape: Shape, setup: Setup, positions: int | None) -> Iterator[str]:
    """All of it.

    Args:
        positions: of the model; None: unlimited.
    """
    if setup.pack_tokens < setup.row_tokens:
        yield (
            f"max_tokens_per_pack: {setup.pack_tokens} is less than the longest row, which is a pack of its own, and "
            f"the memory above is counted for {setup.row_tokens} tokens. Set max_tokens_per_pack: {setup.row_tokens}, "
            "or a smaller max_completion_length."
        )
    if setup.vllm == "colocate":
        yield from _engine_length(shape, setup, positions)
        yield from _cache(shape, setup)


def enough_prompts(prompts: int, plan: BatchPlan) -> Iterator[str]:
    """Where the training set, of so many prompts, does not fill a rollout."""
    try:
        check_enough_prompts(prompts, plan.prompts_per_rollout)
    except ValueError as error:
        yield str(error)


def _engine_length(shape: Shape, setup: Setup, positions: int | None) -> Iterator[str]:
    length, longest = setup.vllm_tokens or positions, setup.row_tokens
    if length is None:
        return
    holds = vllm_cache_tokens(shape, setup)
    if positions is not None and length > positions:
        yield (
            f"vllm_max_model_length: {length} is more than the model's {positions} positions, and vLLM will not start. "
            f"Set vllm_max_model_length: {longest}."
        )
    elif length < longest:
        yield (
            f"vllm_max_model_length: {length} cuts rows that may have {longest} tokens (max_prompt_tokens + "
            f"max_completion_length). Set vllm_max_model_length: {longest}."
        )
    elif longest <= holds < length:
        what = f"vllm_max_model_length: {length}" if setup.vllm_tokens else f"the model's {length} positions"
        yield (
            f"vLLM starts only where its cache holds one row of the engine's length: it holds {holds} tokens, and "
            f"{what} {'is' if setup.vllm_tokens else 'are'} more. Set vllm_max_model_length: {longest}."
        )


def _cache(shape: Shape, setup: Setup) -> Iterator[str]:
    """Rows that wait because the cache is full, and the setting under which more fit."""
    holds = memory(shape, setup).vllm_rows or 0
    if holds >= setup.engine_rows:
        return
    known = f"vLLM's cache holds {holds} of the longest rows, and an engine generates {setup.engine_rows}"
    if not setup.vllm_sleeps:
        known += f"; awake, vLLM keeps {setup.vllm_frac * setup.gpu_bytes / GIB:.0f} GiB from the update"
    tried = [replace(setup, vllm_sleeps=setup.vllm_may_sleep, vllm_frac=twentieths / 20) for twentieths in range(2, 19)]
    fits = [memory(shape, one).fits for one in tried]
    # the largest share that fits is left out: the arithmetic is not exact to a twentieth of the GPU
    fit = [(memory(shape, one).vllm_rows or 0, one) for one, more in zip(tried, fits[1:]) if more]
    most, best = max(fit, key=lambda pair: min(pair[0], setup.engine_rows), default=(0, setup))
    if most >= GAIN * max(holds, 1):
        sleep = "" if setup.vllm_sleeps == setup.vllm_may_sleep else "vllm_enable_sleep_mode: true and "
        rows = "all of them" if most >= setup.engine_rows else f"{most}"
        yield f"{known}. Set {sleep}vllm_gpu_memory_utilization: {best.vllm_frac:g} for {rows}."
    elif setup.row_tokens * holds * shape.cached_per_token < 2 * shape.total:  # both of all GPUs of the engine
        parallel = 2 * setup.vllm_parallel
        may_widen = setup.num_gpus % parallel == 0 and setup.vllm_may_sleep  # neither goes with a rollout ahead
        wider = f"vllm_tensor_parallel_size: {parallel}, or " if may_widen else ""
        yield (
            f"{known}. For these few every token reads weights that are larger than their keys and values, and no "
            f"share of the GPU changes that. Set {wider}a smaller max_completion_length."
        )
