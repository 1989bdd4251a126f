"""Pictures in packs: what a vision-language model of Qwen's kind takes besides the ids of its rows.

In the padded layout the model itself computes positions in time, height and width. Rows that lie end to end get them
row by row from the same function of the model, and a prompt that several rows share brings its pictures once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sapo_trl.rollout.rows import Images, Row


@dataclass(frozen=True)
class Pictures:
    """How a model gets the pictures of a pack.

    Attributes:
        token: the placeholder that stands for one part of a picture.
        find_places: the model's own `get_rope_index`, for rows end to end; None in the padded layout.
        blank: a row of one white picture and no trained token, which joins packs without any, so that every pass goes
            through the vision tower: processes meet there, and its gradients are zeros and not missing. None where no
            prompt has pictures.
    """

    token: int
    find_places: Callable[..., Any] | None
    blank: Row | None

    def more_rows(self, rows: Sequence[Row]) -> list[Row]:
        """What joins a pack of these rows."""
        return [] if self.blank is None or any(row.images is not None for row in rows) else [self.blank]

    def places(self, row: Row) -> Tensor:
        """Positions of a row's tokens in time, height and width, (3, length)."""
        count = torch.arange(len(row))
        if row.images is None or self.find_places is None:
            return count.expand(3, -1)
        ids = row.input_ids[: row.num_prompt][None]
        kinds = (ids == self.token).int()
        prompt = self.find_places(ids, mm_token_type_ids=kinds, image_grid_thw=row.images.grid)[0][:, 0]
        return torch.cat([prompt, (prompt.max() + 1 + count[: len(row) - row.num_prompt]).expand(3, -1)], dim=1)

    def inputs(self, rows: Sequence[Row], ids: Tensor) -> dict[str, Tensor]:
        """Pixels in the order of their placeholders, on the host; empty for rows of text.

        Args:
            ids: of the rows as a batch, (rows, longest), or end to end, (1, T); on the host.

        Raises:
            ValueError: a completion holds a placeholder.
        """
        own: dict[object, Images] = {}
        for i, row in enumerate(rows):
            if row.images is not None:
                is_shared = self.find_places is not None and row.prompt_key is not None
                own.setdefault((row.prompt_key,) if is_shared else i, row.images)
        if not own:
            return {}
        if any(self.token in row.input_ids[row.num_prompt :] for row in rows):
            raise ValueError(
                f"a completion holds the image placeholder, token {self.token}: images in answers of tools are not "
                "supported, and the policy must not sample it."
            )
        pixels, grids = (torch.cat(parts) for parts in zip(*((x.pixels, x.grid) for x in own.values()), strict=True))
        kinds = {"mm_token_type_ids": (ids == self.token).int()} if self.find_places is None else {}
        return {"pixel_values": pixels, "image_grid_thw": grids, **kinds}


def pictures_of(policy: PreTrainedModel, layout: str, pad_token_id: int, has_images: bool) -> Pictures | None:
    """How this model gets pictures in a layout of its packs; None for one of text.

    Raises:
        NotImplementedError: prompts have pictures, and the model is not of Qwen's kind.
    """
    given: dict[str, Any] = policy.config.to_dict()
    token, vision = given.get("image_token_id"), given.get("vision_config", {})
    if token is None:
        return None
    blank = None
    if has_images and not {"spatial_merge_size", "in_channels", "temporal_patch_size", "patch_size"} <= vision.keys():
        raise NotImplementedError(
            f"{type(policy).__name__} gets pictures in a form that is not Qwen's; models whose processor gives "
            "pixel_values and image_grid_thw can be trained (Qwen2-VL to Qwen3.5)."
        )
    if has_images:
        side = vision["spatial_merge_size"]  # patches of a token on either side
        width = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
        picture = Images(torch.ones(side * side, width), torch.tensor([[1, side, side]]), "blank")
        blank = Row(torch.tensor([token, pad_token_id]), 1, torch.zeros(1, dtype=torch.bool), 0.0, images=picture)
    base: Any = policy.base_model
    return Pictures(token, None if layout == "padded" else base.get_rope_index, blank)
