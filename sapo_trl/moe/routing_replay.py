"""Routing replay for mixture-of-experts models: the experts chosen once are chosen again.

A small weight update flips some of the router's top-k choices, and the token ratio then compares two different
networks. Replay fixes the choice: r2 records it in the trainer's old-policy forward, r3 in the rollout
(arXiv 2510.11370, arXiv 2512.01374). Differences from a frozen router:

* Only the selection is replayed. The scores are computed from the live logits at the recorded experts, with the same
  operations as that model's router, so an unchanged selection changes no bit and the router keeps its gradient.
* Replay is a look-up by position and layer, never a queue: gradient checkpointing forwards twice.
* The routers are transformers' own modules with a forward hook. It does nothing outside `recording`,
  `recording_generation` and `replaying`, and all of its state lives on the routers, so a deep copy is independent.

Routes are (positions, MoE layers, k), uint8 up to 256 experts and int16 above, in the order of the router's top-k.
No router chooses one expert twice, so k equal numbers mark a position without a record (`is_unrecorded`): padding and
the last token of a rollout. Such a position is routed live.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from sapo_trl.rollout.rows import Row
from sapo_trl.update.packing import PackInputs

# (router, logits (T, experts), chosen (T, k)) -> scores (T, k). The caller casts to the dtype of the router's own.
Scoring = Callable[[nn.Module, Tensor, Tensor], Tensor]


def softmax_scores(router: nn.Module, logits: Tensor, chosen: Tensor) -> Tensor:
    """softmax over all experts in float32, read at the chosen ones (transformers modeling_jamba.py)."""
    return F.softmax(logits, dtype=torch.float, dim=-1).gather(-1, chosen)


def normalised_softmax_scores(router: nn.Module, logits: Tensor, chosen: Tensor) -> Tensor:
    """The same, divided by its sum over the chosen experts (modeling_mixtral.py, modeling_qwen3_vl_moe.py)."""
    scores = softmax_scores(router, logits, chosen)
    return scores / scores.sum(dim=-1, keepdim=True)


def qwen_scores(router: nn.Module, logits: Tensor, chosen: Tensor) -> Tensor:
    """One of the two above, by `norm_topk_prob` (modeling_qwen3_moe.py)."""
    return (normalised_softmax_scores if router.norm_topk_prob else softmax_scores)(router, logits, chosen)


def softmax_of_chosen_scores(router: nn.Module, logits: Tensor, chosen: Tensor) -> Tensor:
    """softmax over the chosen experts only (modeling_gpt_oss.py, modeling_granitemoe.py)."""
    return F.softmax(logits.gather(-1, chosen), dim=-1, dtype=logits.dtype)


def sigmoid_scores(router: nn.Module, logits: Tensor, chosen: Tensor) -> Tensor:
    """sigmoid at the chosen experts, normalised and scaled (modeling_deepseek_v3.py); the bias only selects."""
    scores = logits.sigmoid().gather(-1, chosen)
    if router.norm_topk_prob:
        scores = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    return scores * router.routed_scaling_factor


_FAMILIES: dict[Scoring, str] = {
    qwen_scores: "FlexOlmo Mellum Olmoe Qwen2Moe Qwen3Moe Qwen3Next Qwen3OmniMoeThinkerText Qwen4ExpText",
    normalised_softmax_scores: "MiniMax Mixtral Qwen3OmniMoeText Qwen3VLMoeText Qwen3_5Moe",
    softmax_scores: "Jamba",
    softmax_of_chosen_scores: "GptOss GraniteMoe GraniteMoeHybrid GraniteMoeShared GraniteMoeSWA",
    sigmoid_scores: "DeepseekV3 DeepseekV32 Dots1 ExaoneMoe Glm4Moe Glm4MoeLite Glm4vMoeText GlmMoeDsa KimiLinear "
    "MiMoV2Flash SolarOpen",
}
# Class name of the router in lower case (transformers writes TopKRouter and TopkRouter) -> its scores.
SCORES: dict[str, Scoring] = {
    f"{name}topkrouter".lower(): score for score, names in _FAMILIES.items() for name in names.split()
}


def _scoring(router: nn.Module) -> Scoring:
    """The scores of a router, whose class PEFT or FSDP may have extended but not given another `forward`."""
    for cls in type(router).__mro__:
        if cls.__name__.lower() in SCORES and cls.forward is type(router).forward:
            return SCORES[cls.__name__.lower()]
    raise NotImplementedError(
        f"{type(router).__name__} scores its experts in a way that routing replay does not reproduce. Supported "
        f"families: {', '.join(' '.join(_FAMILIES.values()).split())}. Set routing_replay: none."
    )


def find_routers(model: nn.Module) -> list[tuple[int, nn.Module]]:
    """(layer, router) of every router, layers counted 0 .. in the order of the model's modules.

    PEFT's `modules_to_save` holds copies of a module next to the original: the copies share the original's layer.

    Raises:
        ValueError: the model has no router module, or a router with one expert per token.
        NotImplementedError: a router of a family that is not in `SCORES`.
    """
    layers: dict[str, int] = {}
    routers = []
    for name, module in model.named_modules():
        if any(cls.__name__.lower().endswith("topkrouter") for cls in type(module).__mro__):
            place = re.split(r"\.(?:original_module|modules_to_save)\b", name)[0]
            _scoring(module)
            routers.append((layers.setdefault(place, len(layers)), module))
    if not routers:
        others = sorted({type(module).__name__ for module in model.modules() if "Router" in type(module).__name__})
        found = f"routes with {', '.join(others)}" if others else "is dense"
        raise ValueError(
            f"{type(model).__name__} {found}; routing replay needs mixture-of-experts layers with transformers' "
            "TopKRouter modules. Set routing_replay: none."
        )
    if routers[0][1].top_k < 2:
        raise ValueError(
            "routing replay needs at least 2 experts per token, and this model chooses 1: positions without a record "
            "are marked by equal numbers. Set routing_replay: none."
        )
    return routers


@dataclass
class Tape:
    """What the routers of one model share. At most one record and one selection are active at a time."""

    num_layers: int
    top_k: int
    num_experts: int
    record: RouteRecord | GenerationRecord | None = None
    selection: Tensor | None = None  # (positions, layers, k)

    def look_up(self, layer: int, live: Tensor) -> Tensor:
        """Recorded experts of a layer, the live ones where nothing was recorded; (T, k) like `live`."""
        if len(live) != len(self.selection):
            raise ValueError(
                f"the routes hold {len(self.selection)} positions and this forward pass has {len(live)}. Lay the rows' "
                "routes out as the pack was: pack_routes([row.routes for row in pack], inputs.collapse)."
            )
        recorded = self.selection[:, layer]
        unrecorded = is_unrecorded(recorded).to(live.device).unsqueeze(-1)
        return torch.where(unrecorded, live, recorded.to(live.device, live.dtype))


def attach(model: nn.Module) -> None:
    """Prepare a model, wrapped or not, for recording and replay. Again after PEFT has added copies of a router.

    Raises:
        ValueError, NotImplementedError: as `find_routers`.
    """
    routers = find_routers(model)
    tape = Tape(1 + max(layer for layer, _ in routers), routers[0][1].top_k, routers[0][1].num_experts)
    for layer, router in routers:
        if "route_tap" not in vars(router):  # a copied router has its hook and tap, but a tape of its own
            router.register_forward_hook(_route)
        router.route_tap = (tape, layer, _scoring(router))


def _route(router: nn.Module, args: tuple, output: tuple) -> tuple | None:
    """Forward hook: (logits (T, experts), scores (T, k), experts (T, k)) -> the same with the recorded experts."""
    tape, layer, score = router.route_tap
    if tape.record is None and tape.selection is None:
        return None
    logits, scores, live = output
    if tape.record is not None:
        tape.record.put(layer, live.detach(), logits.detach())
    if tape.selection is None:
        return None
    chosen = tape.look_up(layer, live)
    return logits, score(router, logits, chosen).to(scores.dtype), chosen


def tape_of(model: nn.Module) -> Tape:
    """The tape that `attach` put on the routers inside `model`."""
    for module in model.modules():
        if "route_tap" in vars(module):
            return module.route_tap[0]
    raise ValueError(f"{type(model).__name__} is not prepared for routing replay: call attach(model) first.")


def route_dtype(num_experts: int) -> torch.dtype:
    """The smallest integer type that holds every expert's index."""
    return torch.uint8 if num_experts <= 256 else torch.int16


@dataclass
class RouteRecord:
    """Live selection of one forward pass. A recomputation of it (gradient checkpointing) is not recorded again."""

    num_layers: int
    dtype: torch.dtype
    layers: dict[int, Tensor] = field(default_factory=dict)
    entropies: dict[int, Tensor] = field(default_factory=dict)

    def put(self, layer: int, selection: Tensor, logits: Tensor) -> None:
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
    """Live selections of every forward pass of one `generate`: the prompts, whole or in chunks, then single tokens."""

    num_layers: int
    dtype: torch.dtype
    passes: list[Tensor] = field(default_factory=list)  # (batch x width, layers, k)
    _current: dict[int, Tensor] = field(default_factory=dict)

    def put(self, layer: int, selection: Tensor, logits: Tensor) -> None:
        self._current[layer] = selection.to(self.dtype)
        if len(self._current) == self.num_layers:  # one tensor per pass, not one per layer and pass
            self.passes.append(torch.stack([self._current[i] for i in range(self.num_layers)], dim=1))
            self._current = {}

    def rows(
        self, prompt_lengths: Sequence[int], completion_lengths: Sequence[int], prompt_width: int | None = None
    ) -> list[Tensor]:
        """Routes per sample, (P + C, layers, k), in the order of the batch.

        The last token of a sample is marked unrecorded: generation samples it and need not forward it.

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


@contextmanager
def recording(model: nn.Module, kind: type = RouteRecord) -> Iterator:
    """Context of one forward pass: records what the routers themselves select, also while other routes are replayed.

    Afterwards `record.routes()` is (positions, layers, k).
    """
    tape = tape_of(model)
    before, tape.record = tape.record, kind(tape.num_layers, route_dtype(tape.num_experts))
    try:
        yield tape.record
    finally:
        tape.record = before


def recording_generation(model: nn.Module):
    """Context of one `model.generate`; afterwards `record.rows(prompt_lengths, completion_lengths)`."""
    return recording(model, GenerationRecord)


@contextmanager
def replaying(model: nn.Module, routes: Tensor | None) -> Iterator[None]:
    """Inside, forward passes use the experts of `routes` (positions, layers, k). None: live routing.

    The backward pass belongs inside too: gradient checkpointing forwards again.

    Raises:
        ValueError: routes of another model; inside, a forward pass over another number of positions.
    """
    tape = tape_of(model)
    if routes is not None:
        _check_routes(routes, tape)
    before, tape.selection = tape.selection, routes
    try:
        yield
    finally:
        tape.selection = before


def _check_routes(routes: Tensor, tape: Tape) -> None:
    expected = f"(positions, {tape.num_layers} MoE layers, {tape.top_k} experts per token)"
    if routes.dim() != 3 or tuple(routes.shape[1:]) != (tape.num_layers, tape.top_k):
        raise ValueError(f"routes of shape {tuple(routes.shape)} are another model's: this one needs {expected}.")
    if routes.dtype.is_floating_point:
        raise ValueError(f"routes are {routes.dtype}, not indices of {tape.num_experts} experts.")
    within = ((routes >= 0) & (routes <= tape.num_experts - 1)).all()  # 256 does not fit into uint8
    # on a GPU this is checked there, without waiting for it
    torch._assert_async(within, f"routes are not indices of {tape.num_experts} experts; they are another model's.")


def is_unrecorded(routes: Tensor) -> Tensor:
    """True where no selection is recorded, (...) from (..., k)."""
    return (routes == routes[..., :1]).all(-1)


def pack_routes(routes: Sequence[Tensor], collapse: Tensor | None) -> Tensor:
    """Routes of a pack's rows, each (P + C, layers, k), at the pack's positions, (T, layers, k).

    `collapse` is that of `packing.PackInputs`; rows that share a prompt have the same routes there up to rounding, and
    those of one of them are taken. Padding is marked unrecorded.
    """
    if collapse is None:
        return torch.cat(list(routes))
    return torch.cat([*routes, torch.zeros_like(routes[0][:1])]).index_select(0, collapse)


def split_routes(routes: Tensor, lengths: Sequence[int], expand: Tensor | None) -> list[Tensor]:
    """The inverse of `pack_routes`: each row's own copy, so that no row keeps its pack's memory alive."""
    flat = routes if expand is None else routes.index_select(0, expand)
    return [part.clone() for part in flat.split(list(lengths))]


@contextmanager
def routed(model: nn.Module, rows: Sequence[Row], inputs: PackInputs, replay: bool = True) -> Iterator[RouteRecord]:
    """Context of a pack's forward and backward pass: replays the rows' routes; rows without routes get this pass's.

    Yields the record of the live selection, for `changed_selections`. An empty pack is routed live, and so is every
    pack without `replay`: then the routes only show how far the router has moved.
    """
    known = bool(rows) and rows[0].routes is not None
    routes = pack_routes([row.routes for row in rows], inputs.collapse) if known and replay else None
    with replaying(model, routes), recording(model) as record:
        yield record
    if rows and not known:
        own = split_routes(record.routes(), [len(row) for row in rows], inputs.expand)
        for row, part in zip(rows, own, strict=True):
            row.routes = part


def moe_shape(model_config: PretrainedConfig) -> tuple[int, int, int]:
    """(MoE layers, experts per token, experts) of the text model, read off an empty model: no weights are loaded.

    Raises:
        ValueError, NotImplementedError: as `find_routers`, so this is also the check before the model loads.
    """
    with torch.device("meta"):
        model = AutoModel.from_config(model_config.get_text_config())
    routers = find_routers(model)
    return len(routers), routers[0][1].top_k, routers[0][1].num_experts


def replay_bytes(num_tokens: int, moe_layers: int, k: int, num_experts: int) -> int:
    """Memory of the routes of `num_tokens` tokens, prompts included.

    >>> replay_bytes(1_000_000, 48, 8, 128)  # Qwen3-30B-A3B
    384000000
    """
    return num_tokens * moe_layers * k * route_dtype(num_experts).itemsize


@dataclass(frozen=True)
class Routing:
    """What is done with the experts' selection: mode none, record, r2 or r3."""

    mode: str
    reason: str = ""
    shape: tuple[int, int] = (0, 0)

    @property
    def is_recorded(self) -> bool:
        return self.mode != "none"

    @property
    def replays(self) -> bool:
        return self.mode in ("r2", "r3")

    @property
    def num_experts(self) -> int:
        return self.shape[1]

    def context(self, model: nn.Module, pack: Sequence[Row], inputs: PackInputs):
        """Context of a pack's passes: routes recorded where its rows have none, replayed under r2 and r3."""
        if not self.is_recorded or not model.training:
            return nullcontext()
        return routed(model, pack, inputs, replay=self.replays)

    def recording_generation(self, model: nn.Module):
        return recording_generation(model)


def prepare_routing(model: nn.Module, replay: str, follows_generation: bool) -> Routing:
    """Record the experts' selection of a Mixture-of-Experts model.

    Raises:
        ValueError, NotImplementedError: `replay` is asked for and the model or the rollout does not allow it.
    """
    if replay == "r3" and not follows_generation:
        raise ValueError(
            "routing_replay='r3' records while transformers generates, and can't follow a conversation with tools or a "
            "rollout_func; use routing_replay='r2'."
        )
    try:
        attach(model)
    except (ValueError, NotImplementedError) as error:
        if replay != "none":
            raise
        return Routing("none", str(error))
    tape = tape_of(model)
    return Routing("record" if replay == "none" else replay, "", (tape.num_layers, tape.num_experts))


def replay_plan(tape: Tape, num_rows: int, row_tokens: int) -> str:
    """One line on the memory of a rollout's routes."""
    size = num_rows * replay_bytes(row_tokens, tape.num_layers, tape.top_k, tape.num_experts)
    shape = f"{tape.num_layers} layers x {tape.top_k} of {tape.num_experts} experts"
    return f"{shape}, up to {size / 2**20:.1f} MiB for {num_rows} rows of {row_tokens} tokens"


def changed_selections(recorded: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """(changed, counted), both (T, layers) bool, from routes (T, layers, k).

    Changed: the sets of experts differ; their order does not matter. Counted: there is a record to compare with.
    """
    if recorded.shape != live.shape:
        raise ValueError(f"routes of shape {tuple(recorded.shape)} cannot be compared with {tuple(live.shape)}.")
    counted = ~is_unrecorded(recorded)
    differs = (recorded.sort(dim=-1).values != live.sort(dim=-1).values).any(-1)
    return differs & counted, counted


def selection_change(recorded: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Share of token x layer pairs whose set of experts changed: (overall (), per layer (layers,))."""
    changed, counted = changed_selections(recorded, live)
    return changed.sum() / counted.sum().clamp(min=1), changed.sum(0) / counted.sum(0).clamp(min=1)
