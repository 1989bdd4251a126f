"""vLLM inside the training process: its number format, its weights after an update, and the experts that it chose.

TRL 1.16 makes the engine and generates with it; three things are not right there, each by measurement on a CPU:

* It names no number format, and vLLM serves a float32 checkpoint in bfloat16: log-probs are 0.04 off.
* Its sync calls the model's `load_weights`, which fails on a CPU, where weights are packed after loading. vLLM's own
  `reload_weights` packs again, all but a tied head and the experts, which keep the old weights without a word.
* It does not hand on the experts that vLLM recorded.

On a GPU the sync stays TRL's; whether it is right is measured in every run (`UpdatePlan.engine_check`). A server:
`server.py`.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import PreTrainedModel

from sapo_trl.config import SAPOConfig
from sapo_trl.model import find_routers
from sapo_trl.rollout.vllm_weights import reload_and_pack
from sapo_trl.trl_seams import VLLMGeneration, engine_runner, send_weights_by, sent_parameters

MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}


def engine_arguments(config: SAPOConfig, accelerator: Accelerator, model: PreTrainedModel) -> dict[str, Any]:
    """What vLLM's `LLM` is told beside TRL's arguments.

    `vllm_dtype: auto` is what the trainer computes in. On a CPU vLLM runs eagerly, because compiling takes minutes. The
    experts of prompt tokens that vLLM finds in its cache were chosen under other weights, or by nobody: under r3 it
    looks for none.
    """
    own = str(MIXED.get(accelerator.mixed_precision, model.dtype)).removeprefix("torch.")
    arguments: dict[str, Any] = {"dtype": own if config.vllm_dtype == "auto" else config.vllm_dtype}
    if accelerator.device.type == "cpu":
        arguments["enforce_eager"] = True
    if config.replay == "r3":
        arguments |= {"enable_return_routed_experts": True, "enable_prefix_caching": False}
    return arguments


def engine_dtype(generation: VLLMGeneration | None) -> torch.dtype:
    """What the engine computes in; bfloat16, which engines serve unless told otherwise, where it can't be asked.

    Every process must call it, because only the first one talks to a server.
    """
    if generation is None:
        return torch.bfloat16
    if generation.mode == "server":
        told = [vars(generation.vllm_client)["dtype"]] if generation.accelerator.is_main_process else [""]
        return getattr(torch, broadcast_object_list(told)[0])
    return generation.llm.llm_engine.model_config.dtype


def prepare_engine(generation: VLLMGeneration, config: SAPOConfig) -> list[tuple[str, str]]:
    """Correct the sync where it has to be; (name, the engine in words) for the announcement of a run."""
    number_format = str(engine_dtype(generation)).removeprefix("torch.")
    if generation.mode == "server":
        way = "a folder" if generation.accelerator.device.type == "cpu" else "NCCL"
        return [("rollout engine", f"vLLM server, {number_format} (its --dtype); weights by {way}")]
    text = f"vLLM in this process, {number_format}"
    if generation.accelerator.device.type == "cpu":
        _sync_on_cpu(generation)
        text += ", eager; weights are packed again after an update"
    return [("rollout engine", text + (", without prefix caching (r3)" if config.replay == "r3" else ""))]


def _sync_on_cpu(generation: VLLMGeneration) -> None:
    """Let the engine load an update's weights as vLLM itself loads a checkpoint, with what it forgets there."""

    def sync() -> None:
        # a layer is packed when its last tensor is there, which can be after adapters have left the weights again
        copies = ((name, tensor.clone()) for name, tensor in sent_parameters(generation))
        load = partial(generation.llm.collective_rpc, "reload_weights", kwargs={"weights_iterator": copies})
        reload_and_pack(engine_runner(generation).get_model(), load)
        generation.llm.reset_prefix_cache()

    send_weights_by(generation, sync)


@contextmanager
def recording_engine(generation: VLLMGeneration) -> Generator[list[Any]]:
    """Inside, the list holds what vLLM's `generate` returns, one `CompletionOutput` per prompt."""
    generate, outputs = generation.llm.generate, []

    def recorded(*args, **kwargs):
        found = generate(*args, **kwargs)
        outputs.extend(completion for request in found for completion in request.outputs)
        return found

    vars(generation.llm)["generate"] = recorded
    try:
        yield outputs
    finally:
        del vars(generation.llm)["generate"]


def engine_routes(outputs: Sequence[Any], lengths: Sequence[int], model: nn.Module) -> list[Tensor]:
    """Routes per completion, (P + C, MoE layers, k); the last token, which vLLM never forwards, is not recorded.

    Args:
        lengths: P + C of each.
        model: the policy. vLLM records every decoder layer, and zeros for one without experts.

    Raises:
        RuntimeError: the engine recorded nothing, or another number of positions.
    """
    layers = sorted({int(re.findall(r"\.layers\.(\d+)\.", router.name)[-1]) for router in find_routers(model)})
    routes = []
    for output, length in zip(outputs, lengths, strict=True):
        recorded = np.empty((0, 0, 0)) if output.routed_experts is None else output.routed_experts[:, layers]
        known = (recorded != recorded[..., :1]).any(-1).sum()  # no router chooses one expert twice
        if known != (length - 1) * len(layers):
            raise RuntimeError(
                f"vLLM recorded the experts of {known} selections, and {length} tokens, of which it forwards all but "
                f"the last, have {(length - 1) * len(layers)} in {len(layers)} layers. Set routing_replay: r2, which "
                "needs nothing of the engine."
            )
        chosen = torch.from_numpy(recorded if recorded.dtype == np.uint8 else recorded.astype(np.int16))
        routes.append(torch.cat([chosen, torch.zeros_like(chosen[:1])]))
    return routes
