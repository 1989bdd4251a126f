"""The rows of a rollout: one `Row` per completion, without padding.

TRL generates, scores and normalises, and hands over a padded dictionary. Its padding is removed once, here, and the
update only knows tokens that exist.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sapo_trl.trl_seams import split_pixel_values_by_grid

# Attribute of a row -> TRL's key
LOGPS_KEYS = {
    "sampler_logps": "sampling_per_token_logps",
    "old_logps": "old_per_token_logps",
    "ref_logps": "ref_per_token_logps",
}

# What TRL adds to the dictionary for images of other families than Qwen's; they are refused, not dropped silently.
OTHER_IMAGE_KEYS = ("pixel_attention_mask", "image_sizes", "image_position_ids", "spatial_shapes", "num_tiles")


class Images(NamedTuple):
    """The pictures of one prompt, as Qwen's processors give them, on the host.

    Attributes:
        pixels: (patches, features).
        grid: patches of each picture in time, height and width, (pictures, 3).
        key: a digest; equal for equal pictures.
    """

    pixels: Tensor
    grid: Tensor
    key: str


@dataclass
class Row:
    """A prompt and its completion.

    Ids and masks stay on the host, where packs are planned, because building inputs must not wait for the device.

    Attributes:
        input_ids: prompt then completion, (P + C,), on the host.
        num_prompt: P >= 1.
        trained: (C,) bool, on the host; False for tokens that the policy did not write (tool output), True for n.
        advantage: A.
        group_tokens: trained tokens of all completions of its prompt, 0 where the prompt counts in no average of the
            loss; None: not known, and it counts.
        prompt_key: equal for rows that may share the forward pass over their prompt; None: it is not shared.
        old_logps, ref_logps, sampler_logps: log-probs of the n trained tokens, (n,), or None until known.
        repeated_logps: of a few rows whose old log-probs are those of their update: log-probs by the pass that the
            other rows' old ones come from, (n,). The difference is numerical noise.
        routes: recorded experts of a Mixture-of-Experts model, (P + C, MoE layers, k), or None until known.
        images: of the prompt; None for text.
    """

    input_ids: Tensor
    num_prompt: int
    trained: Tensor
    advantage: float
    prompt_key: int | None = None
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    sampler_logps: Tensor | None = None
    repeated_logps: Tensor | None = None
    routes: Tensor | None = None
    images: Images | None = None
    group_tokens: int | None = None
    num_trained: int = field(init=False)

    def __post_init__(self):
        if self.num_prompt < 1:
            raise ValueError("a row needs at least one prompt token: the first completion token is predicted from it.")
        self.num_trained = int(self.trained.sum())

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def predicting(self) -> Tensor:
        """Positions whose hidden state predicts a trained token, (n,)."""
        return self.trained.nonzero().squeeze(1) + self.num_prompt - 1

    @property
    def targets(self) -> Tensor:
        """The trained tokens, (n,)."""
        return self.input_ids[self.num_prompt :][self.trained]


@dataclass
class MiniBatch:
    """The rows of one optimizer step on this process, cut into packs.

    Attributes:
        rows: all rows; those without a forward pass count in the denominators.
        packs: the rows that are forwarded; every process has the same number of packs, some possibly empty.
        index: the number of updates since the weights that the rollout was generated with.
        num_tokens: trained tokens of the mini-batch, mean over processes.
        num_rollout_tokens: trained tokens of the whole rollout, mean over processes.
        num_rows, num_rollout_rows: rows that count in averages, likewise.
        num_generations: completions of a prompt, where they are not those of training.
    """

    rows: list[Row]
    packs: list[list[Row]]
    index: int
    num_tokens: float
    num_rollout_tokens: float
    num_rows: float
    num_rollout_rows: float
    num_generations: int | None = None


def rows_from_padded(batch: dict) -> list[Row]:
    """TRL's rollout dictionary as rows.

    Args:
        batch: `prompt_ids`, `prompt_mask` (B, P), left-padded; `completion_ids`, `completion_mask` (B, C),
            right-padded; `advantages` (B,); optionally `tool_mask`, `sampling_per_token_logps`,
            `old_per_token_logps`, `ref_per_token_logps` (B, C), `pixel_values`, `image_grid_thw` and `num_images`.

    Raises:
        NotImplementedError: the rollout carries images in another form than Qwen's.
    """
    images = _images_by_row(batch)
    host = {key: batch[key].cpu() for key in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}
    present = host["completion_mask"].bool()
    trained = present & batch["tool_mask"].cpu().bool() if "tool_mask" in batch else present
    advantages = batch["advantages"].tolist()
    rows = []
    for i, prompt_mask in enumerate(host["prompt_mask"].bool()):
        prompt = host["prompt_ids"][i][prompt_mask]
        rows.append(
            Row(
                input_ids=torch.cat([prompt, host["completion_ids"][i][present[i]]]),
                num_prompt=len(prompt),
                trained=trained[i][present[i]],
                advantage=advantages[i],
                images=images[i],
            )
        )
    flat = trained.flatten().nonzero().squeeze(1)
    for name, key in LOGPS_KEYS.items():
        if batch.get(key) is not None:
            set_logps(rows, name, batch[key].flatten().index_select(0, flat.to(batch[key].device)))
    return rows


def _images_by_row(batch: dict) -> list[Images | None]:
    """Pictures of each row; the completions of one prompt, which are neighbours, hold the same object."""
    num_rows = len(batch["prompt_ids"])
    other = [key for key in OTHER_IMAGE_KEYS if key in batch]
    if other or ("pixel_values" in batch) != ("image_grid_thw" in batch):
        raise NotImplementedError(
            f"the rollout carries images in a form that is not Qwen's ({', '.join(other) or 'no image_grid_thw'}); "
            "models whose processor gives pixel_values and image_grid_thw can be trained (Qwen2-VL to Qwen3.5)."
        )
    if "pixel_values" not in batch:
        return [None] * num_rows
    split = split_pixel_values_by_grid(batch)
    parts = zip(batch["num_images"], split["pixel_values"], split["image_grid_thw"], strict=True)
    rows: list[Images | None] = []
    last: tuple[Tensor, Tensor, Images] | None = None
    for count, pixels, grid in parts:
        if count and (last is None or not (torch.equal(grid, last[1]) and torch.equal(pixels, last[0]))):
            last = pixels, grid, _images(pixels.cpu(), grid.cpu())
        rows.append(last[2] if count and last else None)
    return rows


def _images(pixels: Tensor, grid: Tensor) -> Images:
    digest = hashlib.blake2b(pixels.contiguous().view(torch.uint8).numpy(), digest_size=16)
    digest.update(grid.numpy().tobytes())
    return Images(pixels, grid, digest.hexdigest())


def rows_from_lists(
    prompt_ids: Sequence[list[int]], completion_ids: Sequence[list[int]], trained: Sequence[list[int]] | None
) -> list[Row]:
    """Rows before their rewards are known, with advantage NaN; `trained` is 0 for tokens of tools, None: all are 1."""
    masks = [[1] * len(ids) for ids in completion_ids] if trained is None else trained
    return [
        Row(torch.tensor([*prompt, *completion]), len(prompt), torch.tensor(mask, dtype=torch.bool), math.nan)
        for prompt, completion, mask in zip(prompt_ids, completion_ids, masks, strict=True)
    ]


def set_prompt_keys(rows: Sequence[Row]) -> None:
    """Rows with the same prompt tokens and pictures get the same `prompt_key`, whatever group of the dataset they come
    from."""
    keys: dict[tuple[bytes, str], int] = {}
    for row in rows:
        prompt = row.input_ids[: row.num_prompt].numpy().tobytes(), row.images.key if row.images else ""
        row.prompt_key = keys.setdefault(prompt, len(keys))


def equal_reward_rows(rewards: Tensor, num_generations: int) -> Tensor:
    """True for rows whose whole group got the same reward, (B,) from rewards (B,); NaN (no reward) does not count.

    The rewards decide and not the advantages: by rounding, (r - mean)/(std + 1e-4) of eight equal rewards such as 0.1
    is not 0 but 1e-5 to 1e-3, and such rows would be forwarded.
    """
    groups = rewards.view(-1, num_generations)
    least, most = groups.nan_to_num(nan=torch.inf).amin(dim=1), groups.nan_to_num(nan=-torch.inf).amax(dim=1)
    equal = least >= most
    return equal.repeat_interleave(num_generations)


def reward_interval(rewards: Tensor, num_generations: int) -> tuple[float, float]:
    """95 % interval of the mean reward from rewards (B,), over prompts, because completions of one prompt are alike.

    NaN for fewer than two prompts. Completions without a reward (NaN) do not count.
    """
    prompts = rewards.view(-1, num_generations).nanmean(dim=1)
    prompts = prompts[~prompts.isnan()]
    if len(prompts) < 2:
        return math.nan, math.nan
    error = 1.96 * prompts.std() / len(prompts) ** 0.5
    return (prompts.mean() - error).item(), (prompts.mean() + error).item()


def set_logps(rows: Sequence[Row], name: str, logps: Tensor) -> None:
    """Give each row its part of log-probs that lie end to end, (sum of n,); `name` is one of `LOGPS_KEYS`."""
    parts = logps.split([row.num_trained for row in rows]) if rows else ()
    for row, part in zip(rows, parts, strict=True):
        setattr(row, name, part)


def gathered(rows: Sequence[Row], name: str) -> Tensor | None:
    """The inverse of `set_logps`, also for `routes`: the rows' parts end to end; None where no row has one.

    Raises:
        ValueError: some rows have it and others have not.
    """
    parts = [part for row in rows if (part := vars(row)[name]) is not None]
    if len(parts) not in (0, len(rows)):
        raise ValueError(f"{len(parts)} of {len(rows)} rows of a pack have {name}: all of them must, or none.")
    return torch.cat(parts) if parts else None


def tokens_forwarded(rows: Sequence[Row]) -> int:
    """Tokens of rows that lie in one pack: a prompt that several of them share counts once."""
    shared = {row.prompt_key: row.num_prompt for row in rows if row.prompt_key is not None}
    own = sum(len(row) - (0 if row.prompt_key is None else row.num_prompt) for row in rows)
    return own + sum(shared.values())
