"""What a run needs and this machine has not installed, before anything loads."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from transformers.integrations import get_available_reporting_integrations

from sapo_trl.cli.parse import RunArguments
from sapo_trl.errors import did_you_mean
from sapo_trl.trl_seams import ALL_ATTENTION_FUNCTIONS

# Attention kernel -> (module, package); transformers also takes the package `kernels` for each of them
ATTENTION = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
    "flash_attention_4": ("flash_attn", "flash-attn-4"),
}


def missing_packages(run: RunArguments) -> Iterator[str]:
    """One sentence for each package that the run needs and that is missing, and for an unknown kernel, with the fix."""
    config, model = run.config, run.model
    if config.use_vllm and find_spec("vllm") is None:
        yield "use_vllm is set and vLLM is not installed: pip install -e '.[vllm]', or --use_vllm false."
    if missing := {*(config.report_to or [])} - {*get_available_reporting_integrations()}:
        yield f"report_to names {', '.join(sorted(missing))}, which is not installed here: pip install it."
    if config.use_liger_kernel and find_spec("liger_kernel") is None:
        yield "use_liger_kernel is set and liger-kernel is not installed: pip install liger-kernel, or remove it."
    for field in ("load_in_4bit", "load_in_8bit"):
        if vars(model)[field] and find_spec("bitsandbytes") is None:
            yield f"{field} is set and bitsandbytes is not installed: pip install -e '.[quant]', or --{field} false."
    kernel = (model.attn_implementation or "").rpartition("|")[2]  # without "paged|"
    known = dict.fromkeys(("sdpa", "eager", *ATTENTION, *ALL_ATTENTION_FUNCTIONS))
    if kernel and "/" not in kernel and kernel not in known:
        yield f"attn_implementation={kernel!r} is unknown; known: {', '.join(known)}.{did_you_mean(kernel, known)}"
    module, package = ("kernels", "kernels") if "/" in kernel else ATTENTION.get(kernel, ("", ""))
    if module and find_spec(module) is None and find_spec("kernels") is None:
        yield (
            f"attn_implementation={model.attn_implementation} needs {package}, which is not installed: pip install "
            f"{package}, or --attn_implementation sdpa, with which rows are packed too."
        )


def require_packages(run: RunArguments) -> None:
    """Refuse a run that this machine has not all packages for.

    Raises:
        ValueError: the first sentence of `missing_packages`.
    """
    if (sentence := next(missing_packages(run), None)) is not None:
        raise ValueError(sentence)
