"""Records of the experts that the routers selected, in one forward pass or while a batch was generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor


def route_dtype(num_experts: int) -> torch.dtype:
    """The smallest integer type that holds every expert's index."""
    return torch.uint8 if num_experts <= 256 else torch.int16


@dataclass
class RouteRecord:
    """The routers' own selection in one forward pass. The second pass of gradient checkpointing is not recorded."""

    num_layers: int
    dtype: torch.dtype
    layers: dict[int, Tensor] = field(default_factory=dict)
    entropies: dict[int, Tensor] = field(default_factory=dict)

    def put(self, layer: int, selection: Tensor, logits: Tensor) -> None:
        """Keep a layer's selection (T, k) and the entropy of its logits (T, experts)."""
        if layer not in self.layers:
            self.entropies[layer] = torch.special.entr(logits.float().softmax(-1)).sum(-1)
        first = self.layers.setdefault(layer, selection.to(self.dtype))
        if len(first) != len(selection):
            raise ValueError(
                f"a record holds one forward pass: it has {len(first)} positions, and another pass brought "
                f"{len(selection)}. Open recording(model) once per pack."
            )

    def routes(self) -> Tensor:
        """(positions, layers, k)."""
        if len(self.layers) != self.num_layers:
            raise ValueError(f"{len(self.layers)} of {self.num_layers} MoE layers were forwarded inside recording().")
        return torch.stack([self.layers[layer] for layer in range(self.num_layers)], dim=1)

    def router_entropies(self) -> Tensor:
        """Entropy in nats of the routers' distributions over all experts, (positions, layers)."""
        return torch.stack([self.entropies[layer] for layer in range(self.num_layers)], dim=1)


@dataclass
class GenerationRecord:
    """Selections in every forward pass of one `generate`: the prompts, whole or in chunks, then single tokens."""

    num_layers: int
    dtype: torch.dtype
    passes: list[Tensor] = field(default_factory=list)  # (batch x width, layers, k)
    _current: dict[int, Tensor] = field(default_factory=dict)

    def put(self, layer: int, selection: Tensor, logits: Tensor) -> None:
        """Keep a layer's selection (T, k); logits are not used."""
        self._current[layer] = selection.to(self.dtype)
        if len(self._current) == self.num_layers:  # one tensor per pass, not one per layer and pass
            self.passes.append(torch.stack([self._current[i] for i in range(self.num_layers)], dim=1))
            self._current = {}

    def rows(
        self, prompt_lengths: Sequence[int], completion_lengths: Sequence[int], prompt_width: int | None = None
    ) -> list[Tensor]:
        """Routes per sample, (P + C, layers, k), in the order of the batch.

        The last token of a sample is marked unrecorded, because generation samples it and does not forward it.

        Args:
            prompt_width: width of the left-padded prompts; default: the longest prompt.

        Raises:
            ValueError: the passes are not those of a plain `generate` with a cache over this batch.
        """
        width = max(prompt_lengths) if prompt_width is None else prompt_width
        grid = self._grid(len(prompt_lengths), width, width + max(completion_lengths) - 1)
        rows = []
        for i, (prompt, completion) in enumerate(zip(prompt_lengths, completion_lengths, strict=True)):
            known = grid[i, width - prompt : width + completion - 1]
            rows.append(torch.cat([known, torch.zeros_like(grid[i, :1])]))
        return rows

    def _grid(self, batch: int, prompt_width: int, needed: int) -> Tensor:
        """(batch, width, layers, k): every position that was forwarded, left padding included."""
        positions = [len(routes) for routes in self.passes]
        widths = [n // batch for n in positions]
        ends = list(accumulate(widths))
        prefill = ends.index(prompt_width) + 1 if prompt_width in ends else None
        plain = prefill is not None and all(width == 1 for width in widths[prefill:])
        if not plain or any(n % batch for n in positions) or ends[-1] < needed:
            raise ValueError(
                f"{len(positions)} forward passes over {sum(positions)} positions are not one generation of {batch} "
                f"prompts padded to {prompt_width} tokens up to position {needed}: prompts once, then one token per "
                "pass. Recording needs transformers' generate with its cache; no continuous batching, no beams."
            )
        return torch.cat([routes.view(batch, -1, *routes.shape[1:]) for routes in self.passes], dim=1)
