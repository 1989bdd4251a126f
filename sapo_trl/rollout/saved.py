"""A planned rollout as plain tensors and numbers, and back: a run that was killed goes on in the middle of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sapo_trl.rollout.rollout import Rollout
from sapo_trl.rollout.rows import LOGPS_KEYS, Images, MiniBatch, Row

# Row attributes that may be unknown, each a tensor whose first dimension differs from row to row.
OPTIONAL = (*LOGPS_KEYS, "routes")


def rollout_state(rollout: Rollout) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the host, numbers for JSON) of the mini-batches with all of their rows.

    Rows may lie in a pack of this process and among the rows of another one's mini-batch, or the reverse.
    """
    places: dict[int, int] = {}
    rows: list[Row] = []
    for batch in rollout.mini_batches:
        for row in [*batch.rows, *(row for pack in batch.packs for row in pack)]:
            if id(row) not in places:
                places[id(row)] = len(rows)
                rows.append(row)
    tensors, numbers = _rows_state(rows)
    numbers["weights_step"] = rollout.weights_step
    numbers["mini_batches"] = [
        {
            "rows": [places[id(row)] for row in batch.rows],
            "packs": [[places[id(row)] for row in pack] for pack in batch.packs],
            "index": batch.index,
            "num_tokens": batch.num_tokens,
            "num_rollout_tokens": batch.num_rollout_tokens,
            "num_rows": batch.num_rows,
            "num_rollout_rows": batch.num_rollout_rows,
        }
        for batch in rollout.mini_batches
    ]
    return tensors, numbers


def rollout_from_state(tensors: dict[str, Tensor], numbers: dict[str, Any], device: torch.device) -> Rollout:
    """The inverse of `rollout_state`; what the device computes with lies on `device`."""
    rows = _rows_from_state(tensors, numbers, device)
    batches = [
        MiniBatch(
            [rows[i] for i in batch["rows"]],
            [[rows[i] for i in pack] for pack in batch["packs"]],
            batch["index"],
            batch["num_tokens"],
            batch["num_rollout_tokens"],
            batch["num_rows"],
            batch["num_rollout_rows"],
        )
        for batch in numbers["mini_batches"]
    ]
    return Rollout(mini_batches=batches, weights_step=numbers.get("weights_step", 0))


def _rows_state(rows: Sequence[Row]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {
        "input_ids": torch.cat([row.input_ids for row in rows]),
        "trained": torch.cat([row.trained for row in rows]),
    }
    numbers: dict[str, Any] = {
        "lengths": [len(row) for row in rows],
        "num_prompt": [row.num_prompt for row in rows],
        "advantages": [row.advantage for row in rows],
        "prompt_keys": [row.prompt_key for row in rows],
        "group_tokens": [row.group_tokens for row in rows],
        "known": {},
    }
    for name in OPTIONAL:
        known = {i: value for i, row in enumerate(rows) if (value := vars(row)[name]) is not None}
        if known:
            numbers["known"][name] = {i: len(value) for i, value in known.items()}
            tensors[name] = torch.cat(list(known.values())).cpu()
    images = {row.images.key: row.images for row in rows if row.images is not None}  # once for all rows of a prompt
    if images:
        numbers["images"] = {key: [len(one.pixels), len(one.grid)] for key, one in images.items()}
        numbers["images_of"] = {i: row.images.key for i, row in enumerate(rows) if row.images is not None}
        tensors["pixel_values"] = torch.cat([one.pixels for one in images.values()])
        tensors["image_grid_thw"] = torch.cat([one.grid for one in images.values()])
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, numbers


def _rows_from_state(tensors: dict[str, Tensor], numbers: dict[str, Any], device: torch.device) -> list[Row]:
    lengths, num_prompt = numbers["lengths"], numbers["num_prompt"]
    ids = tensors["input_ids"].split(lengths)
    trained = tensors["trained"].split([n - prompt for n, prompt in zip(lengths, num_prompt, strict=True)])
    rows = [
        Row(*fields)
        for fields in zip(ids, num_prompt, trained, numbers["advantages"], numbers["prompt_keys"], strict=True)
    ]
    for row, tokens in zip(rows, numbers["group_tokens"], strict=True):
        row.group_tokens = tokens
    for name, sizes in numbers["known"].items():
        parts = tensors[name].to(device).split(list(sizes.values()))
        for i, part in zip(sizes, parts, strict=True):
            setattr(rows[int(i)], name, part)
    images = numbers.get("images", {})
    if images:
        pixels = tensors["pixel_values"].split([n for n, _ in images.values()])
        grids = tensors["image_grid_thw"].split([n for _, n in images.values()])
        known = {key: Images(*parts, key) for key, *parts in zip(images, pixels, grids, strict=True)}
        for i, key in numbers["images_of"].items():
            rows[int(i)].images = known[key]
    return rows
