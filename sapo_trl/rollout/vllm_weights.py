"""vLLM's side of a change of weights on a CPU, in the process of the trainer or in a server's worker.

A server's worker imports this by name, so it needs neither TRL nor the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor


def reload_and_pack(model: Any, reload: Callable[[], Any]) -> None:
    """Call `reload`, by which vLLM loads `model` again, and pack what vLLM forgets there: experts and a tied head."""
    layers = [module for module in model.modules() if hasattr(module, "quant_method")]
    for layer in layers:
        if hasattr(layer.quant_method, "moe_kernel"):  # with it, new weights of experts are taken for packed ones
            layer.quant_method.moe_kernel = None
    reload()
    for layer in layers:
        if hasattr(layer, "tie_weights"):  # a head, which got no weights of its own where it is tied
            layer.quant_method.process_weights_after_loading(layer)


class PolicyWeights:
    """What a worker of `vllm serve --worker-extension-cls sapo_trl.rollout.vllm_weights.PolicyWeights` can do more."""

    model_runner: Any  # of vLLM's worker, whose methods these become
    reload_weights: Callable[..., None]

    def load_policy(self, folder: str) -> None:
        """Take the weights in a folder's safetensors files, under the names of a checkpoint on the Hub."""

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for path in sorted(Path(folder).iterdir()):
                yield from load_file(path).items()

        reload_and_pack(self.model_runner.get_model(), lambda: self.reload_weights(weights_iterator=tensors()))
