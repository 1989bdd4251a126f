"""Routing replay for Mixture-of-Experts models: recorded experts are chosen again.

A small weight update changes some of the router's top-k choices, and the token ratio then compares two different
networks. Replay keeps the choice: r2 records it in the trainer's old-policy forward pass, r3 in the rollout
(arXiv 2510.11370, arXiv 2512.01374). Differences from a frozen router:

* Only the selection is replayed. The scores are computed from the present logits at the recorded experts, with the same
  operations as in that model's router (`moe/scores.py`), so an unchanged selection changes no bit, and the router has
  its gradient.
* Replay is a look-up by position and layer, never a queue, because gradient checkpointing runs the forward pass twice.
* The routers are transformers' own modules with a forward hook. It does nothing outside `recording`,
  `recording_generation` and `replaying`, and all of its state is on the routers, so a deep copy is independent.

Routes are (positions, MoE layers, k), uint8 up to 256 experts and int16 above, in the order of the router's top-k.
No router chooses one expert twice, so k equal numbers mark a position without a record (`is_unrecorded`): padding and
the last token of a rollout. There the router itself chooses.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from sapo_trl.model import find_routers
from sapo_trl.moe.records import GenerationRecord, RouteRecord, route_dtype
from sapo_trl.moe.scores import scoring_of
from sapo_trl.rollout.rows import Row

Record = TypeVar("Record", RouteRecord, GenerationRecord)

Mode = Literal["none", "record", "r2", "r3"]

# Attribute of a router that `attach` sets: (tape, layer, its scoring)
TAP = "route_tap"


class PackPositions(Protocol):
    """Where the tokens of a pack's rows lie; both as in `update.packing.PackInputs`."""

    @property
    def expand(self) -> Tensor | None: ...

    @property
    def collapse(self) -> Tensor | None: ...


# ------------------------------------------------------------------------------------------------------------- set-up


@dataclass(frozen=True)
class Routing:
    """What a run does with the experts' selection, and why.

    Attributes:
        mode: `none`: it is ignored; `record`: it is compared with the later selection for the metrics, and not
        replayed;
            `r2` and `r3`: it is replayed.
        reason: why nothing is recorded; empty in the other modes.
        shape: (MoE layers, experts) where the selection is recorded, else zeros.
    """

    mode: Mode
    reason: str = ""
    shape: tuple[int, int] = (0, 0)

    @property
    def is_recorded(self) -> bool:
        """Whether rows get routes."""
        return self.mode != "none"

    @property
    def replays(self) -> bool:
        """Whether the update uses the recorded experts."""
        return self.mode in ("r2", "r3")

    @property
    def follows_generation(self) -> bool:
        """Whether the routes are those of the rollout."""
        return self.mode == "r3"

    @property
    def num_experts(self) -> int:
        """Experts of a layer."""
        return self.shape[1]

    def context(
        self, model: nn.Module, pack: Sequence[Row], inputs: PackPositions
    ) -> AbstractContextManager[RouteRecord | None]:
        """`routed` in training, where the selection is recorded."""
        if not self.is_recorded or not model.training:
            return nullcontext()
        return routed(model, pack, inputs, replay=self.replays)

    def __str__(self) -> str:
        if self.mode == "none":
            return f"not recorded: {self.reason}"
        return "recorded, not replayed" if self.mode == "record" else self.mode


def prepare_routing(model: nn.Module, replay: str, follows_generation: bool) -> Routing:
    """Attach recording and replay to a Mixture-of-Experts model; a dense one is left as it is.

    Args:
        replay: `none`, `r2` or `r3`.
        follows_generation: whether each rollout is one `generate` of transformers or vLLM.

    Raises:
        ValueError, NotImplementedError: `replay` is asked for, and the model or the rollout does not allow it.
    """
    if replay == "r3" and not follows_generation:
        raise ValueError(
            "routing_replay='r3' records one generation, and can't follow a conversation with tools or a rollout_func; "
            "use routing_replay='r2'."
        )
    try:
        attach(model)
    except (ValueError, NotImplementedError) as error:
        if replay != "none":
            raise
        return Routing("none", str(error))
    modes: dict[str, Mode] = {"none": "record", "r2": "r2", "r3": "r3"}
    tape = tape_of(model)
    return Routing(modes[replay], shape=(tape.num_layers, tape.num_experts))


@dataclass
class Tape:
    """What the routers of one model share: at most one record and one replayed selection at a time."""

    num_layers: int
    top_k: int
    num_experts: int
    record: RouteRecord | GenerationRecord | None = None
    selection: Tensor | None = None  # (positions, layers, k)


def attach(model: nn.Module) -> None:
    """Prepare a model, wrapped or not, for recording and replay; to be called again after PEFT has copied a router.

    Raises:
        ValueError: the model has no router module, or a router with one expert per token.
        NotImplementedError: a router of a family that is not in `SCORES`.
    """
    routers = find_routers(model)
    if not routers:
        others = sorted({type(module).__name__ for module in model.modules() if "Router" in type(module).__name__})
        found = f"routes with {', '.join(others)}" if others else "is dense"
        raise ValueError(
            f"{type(model).__name__} {found}; routing replay needs mixture-of-experts layers with transformers' "
            "TopKRouter modules. Set routing_replay: none (in place of grpo-r2: algorithm: grpo)."
        )
    scores = [scoring_of(router.module) for router in routers]
    first: Any = routers[0].module
    if first.top_k < 2:
        raise ValueError(
            "routing replay needs at least 2 experts per token, and this model chooses 1: positions without a record "
            "are marked by equal numbers. Set routing_replay: none."
        )
    tape = Tape(1 + max(router.layer for router in routers), first.top_k, first.num_experts)
    for router, score in zip(routers, scores, strict=True):
        if TAP not in vars(router.module):  # a deep copy has its hook and tap, but a tape of its own
            router.module.register_forward_hook(_route)
        vars(router.module)[TAP] = (tape, router.layer, score)


def tape_of(model: nn.Module) -> Tape:
    """The tape that `attach` put on the routers inside `model`."""
    for module in model.modules():
        if TAP in vars(module):
            return vars(module)[TAP][0]
    raise ValueError(f"{type(model).__name__} is not prepared for routing replay: call attach(model) first.")


def _route(router: nn.Module, args: tuple, output: tuple) -> tuple | None:
    """Forward hook: (logits (T, experts), scores (T, k), experts (T, k)) -> the same with the recorded experts."""
    tape, layer, score = vars(router)[TAP]
    if tape.record is None and tape.selection is None:
        return None
    logits, scores, own = output
    if tape.record is not None:
        tape.record.put(layer, own.detach(), logits.detach())
    if tape.selection is None:
        return None
    chosen = _look_up(tape.selection, layer, own)
    return logits, score(router, logits, chosen).to(scores.dtype), chosen


def _look_up(selection: Tensor, layer: int, own: Tensor) -> Tensor:
    """Recorded experts of a layer, the router's own choice where nothing was recorded; (T, k) like `own`."""
    if len(own) != len(selection):
        raise ValueError(
            f"the routes hold {len(selection)} positions and this forward pass has {len(own)}. Arrange the rows' "
            "routes as the pack is: pack_routes([row.routes for row in pack], inputs.collapse)."
        )
    recorded = selection[:, layer]
    unrecorded = is_unrecorded(recorded).to(own.device).unsqueeze(-1)
    return torch.where(unrecorded, own, recorded.to(own.device, own.dtype))


# -------------------------------------------------------------------------------------------------- record and replay


@contextmanager
def _recording(model: nn.Module, kind: type[Record]) -> Generator[Record]:
    tape = tape_of(model)
    record = kind(tape.num_layers, route_dtype(tape.num_experts))
    before, tape.record = tape.record, record
    try:
        yield record
    finally:
        tape.record = before


def recording(model: nn.Module) -> AbstractContextManager[RouteRecord]:
    """Context of one forward pass that records what the routers select, also while other routes are replayed.

    Afterwards `record.routes()` is (positions, layers, k).
    """
    return _recording(model, RouteRecord)


def recording_generation(model: nn.Module) -> AbstractContextManager[GenerationRecord]:
    """Context of one `model.generate`; afterwards `record.rows(prompt_lengths, completion_lengths)`."""
    return _recording(model, GenerationRecord)


@contextmanager
def replaying(model: nn.Module, routes: Tensor | None) -> Generator[None]:
    """Context in which forward passes use the experts of `routes` (positions, layers, k). None: the routers choose.

    The backward pass belongs inside too, because gradient checkpointing runs the forward pass again.

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


@contextmanager
def routed(model: nn.Module, rows: Sequence[Row], inputs: PackPositions, replay: bool = True) -> Generator[RouteRecord]:
    """Context of a pack's forward and backward pass, which replays the rows' routes; rows without routes get its own.

    Yields the record of the routers' own selection, for `changed_selections`. In an empty pack, and without `replay`,
    the routers choose; the recorded routes then only show how far the routers have moved.
    """
    known = [row.routes for row in rows if row.routes is not None]
    routes = pack_routes(known, inputs.collapse) if known and replay else None
    with replaying(model, routes), recording(model) as record:
        yield record
    if rows and not known:
        own = split_routes(record.routes(), [len(row) for row in rows], inputs.expand)
        for row, part in zip(rows, own, strict=True):
            row.routes = part


def is_unrecorded(routes: Tensor) -> Tensor:
    """True where no selection is recorded, (...) from (..., k)."""
    return (routes == routes[..., :1]).all(-1)


def pack_routes(routes: Sequence[Tensor], collapse: Tensor | None) -> Tensor:
    """Routes of a pack's rows, each (P + C, layers, k), at the pack's positions, (T, layers, k).

    `collapse` is that of `packing.PackInputs`. Rows that share a prompt have the same routes there up to rounding, and
    those of one of them are taken. Padding is marked unrecorded.
    """
    if collapse is None:
        return torch.cat(list(routes))
    return torch.cat([*routes, torch.zeros_like(routes[0][:1])]).index_select(0, collapse)


def split_routes(routes: Tensor, lengths: Sequence[int], expand: Tensor | None) -> list[Tensor]:
    """The inverse of `pack_routes`, as copies, so that no row keeps the memory of its pack."""
    flat = routes if expand is None else routes.index_select(0, expand)
    return [part.clone() for part in flat.split(list(lengths))]


def changed_selections(recorded: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
    """(changed, counted), both (T, layers) bool, from routes (T, layers, k).

    Changed: the sets of experts differ; their order does not matter. Counted: there is a record to compare with.
    """
    if recorded.shape != now.shape:
        raise ValueError(f"routes of shape {tuple(recorded.shape)} cannot be compared with {tuple(now.shape)}.")
    counted = ~is_unrecorded(recorded)
    differs = (recorded.sort(dim=-1).values != now.sort(dim=-1).values).any(-1)
    return differs & counted, counted


# ------------------------------------------------------------------------------------------------------------- memory


def replay_bytes(num_tokens: int, moe_layers: int, k: int, num_experts: int) -> int:
    """Memory of the routes of `num_tokens` tokens, prompts included.

    >>> replay_bytes(1_000_000, 48, 8, 128)  # Qwen3-30B-A3B
    384000000
    """
    return num_tokens * moe_layers * k * route_dtype(num_experts).itemsize


def replay_plan(tape: Tape, num_rows: int, row_tokens: int) -> str:
    """One line on the memory of a rollout's routes."""
    size = num_rows * replay_bytes(row_tokens, tape.num_layers, tape.top_k, tape.num_experts)
    shape = f"{tape.num_layers} layers x {tape.top_k} of {tape.num_experts} experts"
    return f"{shape}, up to {size / 2**20:.1f} MiB for {num_rows} rows of {row_tokens} tokens"
