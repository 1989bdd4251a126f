"""The forward pass: rows to packs to log-probs and entropies.

A pack is a list of rows, end to end in one sequence of T tokens, with positions that restart at every row, no attention
mask and no cache; a prompt that several of its rows share is in it once. Attention alone decides which tokens a row
attends to (`sapo_trl/update/attention.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from sapo_trl.model import has_dropout, head_shape, inner_model, layout_of, text_config
from sapo_trl.rollout.rows import MiniBatch, Row, set_prompt_keys, tokens_forwarded
from sapo_trl.trl_seams import attention_name
from sapo_trl.update.attention import TORCH_VARLEN, packed_attention, plan_segments, torch_varlen_trial
from sapo_trl.update.cpu_norm import norms_of, quick_norms
from sapo_trl.update.head import PackOutputs, add_token_head
from sapo_trl.update.pictures import Pictures, pictures_of

# Prompts are shared from this share of saved tokens on: cutting and joining costs a few per cent. On the benchmark's
# dense shape and packs of 1024 tokens a saving of 4 % took 6 % longer, 10 % took 8 % less time, 28 % took 18 % less.
SHARE_FROM = 0.08

# The budget under `auto` before the first rollout, whose prompts the memory probe needs.
UNSETTLED_TOKENS = 16384


def send(x: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device, without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


@dataclass
class _Pack:
    """A pack while it is being filled."""

    rows: list[Row] = field(default_factory=list)
    prompts: set[int] = field(default_factory=set)
    tokens: int = 0
    cost: float = 0.0

    def tokens_of(self, row: Row) -> int:
        """Tokens that the row adds; its prompt may be there already."""
        return len(row) - (row.num_prompt if row.prompt_key in self.prompts else 0)

    def put(self, row: Row, pair_cost: float) -> None:
        added = self.tokens_of(row)
        self.rows.append(row)
        self.tokens += added
        self.cost += added + pair_cost * len(row) ** 2
        if row.prompt_key is not None:
            self.prompts.add(row.prompt_key)


def _fill_packs(rows: Sequence[Row], max_tokens: int, pair_cost: float) -> list[_Pack]:
    """One prompt after another, the one with most tokens first, so that small groups fill what large ones leave."""
    tokens = Counter()
    for row in rows:
        tokens[row.prompt_key] += len(row)
    place = {key: i for i, (key, _) in enumerate(tokens.most_common())}
    packs: list[_Pack] = []
    for row in sorted(rows, key=lambda row: (place[row.prompt_key], -len(row))):
        fits = [pack for pack in packs if pack.tokens + pack.tokens_of(row) <= max_tokens]
        same_prompt = [pack for pack in fits if row.prompt_key in pack.prompts]
        pack = max(same_prompt or fits, key=lambda pack: pack.tokens, default=None)
        if pack is None:
            pack = _Pack()
            packs.append(pack)
        pack.put(row, pair_cost)
    return packs


def plan_packs(
    rows: Sequence[Row], max_tokens: int, pair_cost: float = 0.0, num_packs: int | None = None
) -> list[list[Row]]:
    """Cut rows into packs of at most `max_tokens` tokens, a shared prompt counted once; the costliest pack first.

    Prompt after prompt, the longest rows first, a row goes to a pack that holds its prompt, else to the one that it
    fills best, so that a prompt is in few packs; a row longer than the budget gets a pack of its own. With `num_packs`
    there are exactly so many packs, balanced by cost, some possibly empty: processes that take part in collectives must
    run equally many, and should meet at packs of similar cost.

    Args:
        pair_cost: c in a pack's cost, tokens + c * sum of length^2 over its rows (`attention_pair_cost`).
    """
    if num_packs is not None:
        packs = [_Pack() for _ in range(num_packs)]
        for row in sorted(rows, key=lambda row: -len(row)):
            min(packs, key=lambda pack: pack.cost + pack.tokens_of(row)).put(row, pair_cost)
    else:
        packs = _fill_packs(rows, max_tokens, pair_cost)
    return [pack.rows for pack in sorted(packs, key=lambda pack: -pack.cost)]


def plan_padded(rows: Sequence[Row], max_tokens: int, num_packs: int | None = None) -> list[list[Row]]:
    """The same for the padded layout: rows of similar length, so that rows x longest stays within the budget."""
    packs: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -len(row)):
        if not packs or (len(packs[-1]) + 1) * len(packs[-1][0]) > max_tokens:
            packs.append([])
        packs[-1].append(row)
    return packs + [[] for _ in range((num_packs or 0) - len(packs))]


def attention_pair_cost(config: PretrainedConfig) -> float:
    """Cost of attending from one token to another, relative to forwarding one token through the weights.

    A row of n tokens takes 2 N n operations in the N weights that a token passes (experts: the chosen ones) and
    2 H D n^2 per layer in causal attention of H heads of size D, so its cost is n + c n^2 tokens, c = H D / N_layer.
    Only the balance between packs depends on it, so it is 0 where the config does not say how wide a layer is.
    """
    if not hasattr(config, "intermediate_size"):
        return 0.0
    hidden, (heads, kv_heads, size) = config.hidden_size, head_shape(config)
    is_moe = hasattr(config, "moe_intermediate_size")
    wide = config.moe_intermediate_size * config.num_experts_per_tok if is_moe else config.intermediate_size
    return heads * size / (2 * hidden * size * (heads + kv_heads) + 3 * hidden * wide)


@dataclass(frozen=True)
class PackInputs:
    """Model inputs of a pack and where to read it.

    Attributes:
        predict, targets, rows: of the n trained tokens, (n,): the position among the T flattened ones that predicts the
            token, its id, and the index of its row within the pack.
        expand: positions of the rows' tokens end to end, (sum of lengths,); None where that is the pack itself.
        collapse: the inverse, (T,): an index into `expand` for each position, one past its end for padding.
    """

    model_inputs: dict
    predict: Tensor
    targets: Tensor
    rows: Tensor
    expand: Tensor | None = None
    collapse: Tensor | None = None


def row_positions(rows: Sequence[Row]) -> tuple[list[Tensor], int]:
    """(each row's positions in the pack, (length,); T): rows end to end, shared prompts where they first occur."""
    prompts: dict[int | None, Tensor] = {}
    positions, end = [], 0
    for row in rows:
        shared = prompts.get(row.prompt_key) if row.prompt_key is not None else None
        first = 0 if shared is None else row.num_prompt
        own = torch.arange(end, end + len(row) - first)
        positions.append(own if shared is None else torch.cat([shared, own]))
        prompts[row.prompt_key] = positions[-1][: row.num_prompt]
        end += len(own)
    return positions, end


def pack_inputs(
    rows: Sequence[Row], layout: str, pad_token_id: int, device: torch.device, pictures: Pictures | None = None
) -> PackInputs:
    """Inputs of one forward pass over the rows, built on the host and copied without waiting for the device.

    A row that only joins for its blank picture counts as padding.
    """
    everything = [*rows, *(pictures.more_rows(rows) if pictures else ())]
    lengths = torch.tensor([len(row) for row in everything])
    longest = int(lengths.max())
    if layout == "padded":
        num_positions = len(everything) * longest
        positions = [i * longest + torch.arange(len(row)) for i, row in enumerate(everything)]
    else:
        positions, num_positions = row_positions(everything)
    flat, filled = torch.cat(positions[: len(rows)]), torch.cat(positions)
    ids, places = torch.full((num_positions,), pad_token_id), torch.zeros(num_positions, dtype=torch.long)
    ids[filled] = torch.cat([row.input_ids for row in everything])
    places[filled] = torch.cat([torch.arange(len(row)) for row in everything])
    expand = collapse = None
    if not torch.equal(flat, torch.arange(num_positions)):
        expand, collapse = flat, torch.full((num_positions,), len(flat))
        collapse[flat] = torch.arange(len(flat))
        expand, collapse = send(expand, device), send(collapse, device)
    if layout == "padded":
        mask = (torch.arange(longest) < lengths[:, None]).long()
        inputs: dict[str, Any] = {"input_ids": send(ids.view_as(mask), device), "attention_mask": send(mask, device)}
    else:
        if pictures is not None:  # in time, height and width, (3, 1, T)
            places = places.expand(3, -1).clone()
            places[:, filled] = torch.cat([pictures.places(row) for row in everything], dim=1)
            places = places[:, None]
        else:
            places = places[None]
        inputs = {"input_ids": send(ids[None], device), "position_ids": send(places, device)}
    if pictures is not None:
        more = pictures.inputs(everything, ids.view(len(everything), -1) if layout == "padded" else ids[None])
        inputs |= {name: send(value, device) for name, value in more.items()}
    if layout == "segments":
        inputs["segments"] = plan_segments(everything)
    if layout == "flash":
        bounds = send(F.pad(lengths[: len(rows)].cumsum(0), (1, 0)).int(), device)
        inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
        inputs |= {"expand": expand, "collapse": collapse}
    predict = torch.cat([own[row.predicting] for own, row in zip(positions, rows)])
    index = torch.arange(len(rows)).repeat_interleave(torch.tensor([row.num_trained for row in rows]))
    targets = torch.cat([row.targets for row in rows])
    return PackInputs(inputs, *(send(x, device) for x in (predict, targets, index)), expand, collapse)


class PackedForward:
    """Plans packs, and forwards them through a (wrapped) model in the layout that fits it.

    Args:
        model: the policy; a token head with this `temperature` is added to it, and to `ref_model`.
        max_tokens: budget of a pack, lowered where one does not fit; `auto` until `MemoryProbe.settle` has run.
        share_prompts: forward a prompt once per pack where that saves at least `SHARE_FROM` of the tokens.
        has_images: prompts contain images.
    """

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | None,
        accelerator: Accelerator,
        pad_token_id: int,
        temperature: float,
        cast_lm_head_to_fp32: bool,
        max_tokens: int | str,
        share_prompts: bool,
        has_images: bool = False,
    ):
        self.accelerator, self.pad_token_id, self.temperature = accelerator, pad_token_id, temperature
        self.max_tokens, self._budget = UNSETTLED_TOKENS, "as many tokens a pack as fit"
        if not isinstance(max_tokens, str):
            self.max_tokens, self._budget = max_tokens, f"at most {max_tokens} tokens a pack"
        policy = inner_model(model, accelerator)
        self.layout, self.reason = layout_of(accelerator.unwrap_model(model))
        self.kernel = attention_name(text_config(policy))
        if self.layout == "segments" and self.kernel == "sdpa" and accelerator.device.type == "cuda":
            self._try_torch_varlen(policy)
        self.pictures = pictures_of(policy, self.layout, pad_token_id, has_images)
        # dropout would draw one mask for the prompt of several rows
        self.share_prompts = share_prompts and self.layout != "padded" and not has_dropout(model)
        self.pair_cost = attention_pair_cost(text_config(policy)) if self.layout != "padded" else 0.0
        self.norms = norms_of(policy) if accelerator.device.type == "cpu" else []
        for each in (model, ref_model):
            if each is not None:
                add_token_head(inner_model(each, accelerator), temperature, cast_lm_head_to_fp32)

    def __str__(self) -> str:
        shared = "shared prompts forwarded once" if self.share_prompts else "prompts not shared"
        return f"{self.layout} layout ({self.reason}), {self._budget}, {shared}"

    def compute_dtype(self, policy: PreTrainedModel) -> torch.dtype:
        """The precision of the matrix products of a forward pass."""
        halves = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return halves.get(self.accelerator.mixed_precision, policy.dtype)

    def use_padded(self, reason: str) -> None:
        """Take the padded layout from now on, because the packed one does not fit this model."""
        self.layout, self.reason, self.share_prompts, self.pair_cost = "padded", reason, False, 0.0
        if self.pictures is not None:
            self.pictures = replace(self.pictures, find_places=None)

    def _try_torch_varlen(self, policy: PreTrainedModel) -> None:
        """Take one kernel call for all rows where torch has one for this GPU, precision and width."""
        failure = torch_varlen_trial(text_config(policy), self.accelerator.device, self.compute_dtype(policy))
        if failure is None:
            self.layout, self.kernel = "flash", TORCH_VARLEN
            self.reason = "torch.nn.attention.varlen, equal to sdpa at the start"
        else:
            self.reason += f"; torch.nn.attention.varlen: {failure}"

    def plan(self, rows: Sequence[Row], num_packs: int | None = None) -> list[list[Row]]:
        """Packs of one part of the rollout on this process."""
        if self.layout == "padded":
            return plan_padded(rows, self.max_tokens, num_packs)
        return plan_packs(rows, self.max_tokens, self.pair_cost, num_packs)

    def plan_equal(self, parts: Sequence[Sequence[Row]], counts: Sequence[float]) -> tuple[list, list[float]]:
        """(packs of each part, as many as on the process that needs most and at least one; the counts as means over
        processes); one gather for both."""
        plans = [self.plan(rows) for rows in parts]
        local = torch.tensor([*(float(len(plan)) for plan in plans), *counts], device=self.accelerator.device)
        everywhere = self.accelerator.gather(local).view(-1, len(local)).cpu()
        needed = everywhere[:, : len(parts)].amax(0).clamp(min=1).int().tolist()
        for k, rows in enumerate(parts):
            if len(plans[k]) < needed[k]:
                plans[k] = self._extended(plans[k], rows, needed[k])
        return plans, everywhere[:, len(parts) :].mean(0).tolist()

    def _extended(self, plan: list[list[Row]], rows: Sequence[Row], num_packs: int) -> list[list[Row]]:
        """The rows in `num_packs` packs: balanced, or with empty ones where repeated prompts would break the budget."""
        balanced = self.plan(rows, num_packs)
        fits = max(map(tokens_forwarded, balanced)) <= max([self.max_tokens, *map(tokens_forwarded, plan)])
        return balanced if fits else plan + [[] for _ in range(num_packs - len(plan))]

    def share(self, rows: Sequence[Row]) -> None:
        """Mark rows that may share their prompts, if planning them so saves enough."""
        if not self.share_prompts:
            return
        set_prompt_keys(rows)
        shared = sum(tokens_forwarded(pack) for pack in self.plan(rows))
        if shared > (1 - SHARE_FROM) * sum(len(row) for row in rows):
            for row in rows:
                row.prompt_key = None

    def cost(self, rows: Sequence[Row]) -> float:
        """Cost of forwarding rows together, in tokens through the weights."""
        return tokens_forwarded(rows) + self.pair_cost * sum(len(row) ** 2 for row in rows)

    def plan_mini_batches(
        self, parts: Sequence[list[Row]], active: Sequence[list[Row]], rollout_tokens: float
    ) -> list[MiniBatch]:
        """Cut the `active` rows of each part, those that this process forwards, into packs.

        The counts are those of the parts' own rows, wherever they are forwarded.
        """
        for rows in active:
            self.share(rows)
        counted = [[row for row in rows if row.group_tokens != 0] for rows in parts]
        tokens = [float(sum(row.num_trained for row in rows)) for rows in counted]
        plans, means = self.plan_equal(active, [*tokens, *(float(len(rows)) for rows in counted)])
        num_tokens, num_rows = means[: len(parts)], means[len(parts) :]
        return [
            MiniBatch(parts[k], plans[k], k, num_tokens[k], rollout_tokens, num_rows[k], sum(num_rows))
            for k in range(len(parts))
        ]

    @contextmanager
    def packed(self, model: nn.Module) -> Generator[None]:
        """Context of every forward and backward pass."""
        with packed_attention(inner_model(model, self.accelerator), self.layout), quick_norms(self.norms):
            yield

    def build_inputs(self, pack: Sequence[Row]) -> PackInputs:
        """Inputs of a pack; for an empty one two tokens, so that all processes take part in the same collectives."""
        rows = pack or [Row(torch.full((2,), self.pad_token_id), 1, torch.ones(1, dtype=torch.bool), 0.0)]
        inputs = pack_inputs(rows, self.layout, self.pad_token_id, self.accelerator.device, self.pictures)
        if self.layout == "flash":
            inputs.model_inputs["kernel"] = self.kernel
        return inputs

    def __call__(self, model: nn.Module, inputs: PackInputs, router_logits: bool = False) -> PackOutputs:
        """One pack through the model."""
        extra = {"output_router_logits": True} if router_logits else {}
        with self.packed(model), self.accelerator.autocast():
            outputs = model(**inputs.model_inputs, predict=inputs.predict, targets=inputs.targets, **extra)
        logits = outputs.router_logits or ()
        if inputs.expand is not None:  # shared prompts once for each of their rows
            logits = tuple(x.index_select(0, inputs.expand) for x in logits)
        return PackOutputs(outputs.logps, outputs.entropies, logits)
