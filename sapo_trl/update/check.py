"""A measurement before the first rollout: are the update's log-probs those of the model's own forward pass?

It finds heads with a multiplier or another layer, and layers that carry state from row to row, without knowing them by
name.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from sapo_trl.model import inner_model
from sapo_trl.rollout.rows import Row
from sapo_trl.update.attention import LayoutError
from sapo_trl.update.packing import PackedForward

# Tokens of the row that is compared
CHECK_TOKENS = 64

# Mean difference that counts as rounding; one unit in the last place of the largest logit comes on top
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.05}


def packed_equals_plain(forward: PackedForward, model: nn.Module, ids: Tensor) -> float:
    """Compare the update's log-probs with the model's own; where packs differ, `forward` takes the padded layout.

    Every process must call it, with ids of its own; they decide together. It takes at most six forward passes.

    Args:
        model: the wrapped policy, with its token head.
        ids: prompt and completion of a real row, (T,), T >= 2; the first `CHECK_TOKENS` of them are used.

    Returns:
        The mean of |update's log-prob - model's own| over the tokens of a row, of the worst row. It is not the largest
        difference, because in half precision a router near a tie may choose another expert for single tokens.

    Raises:
        ValueError: the padded layout differs too.
    """
    # the mode of the model inside: an evaluation sets only that one, and a wrapper still says that it trains
    was_training = inner_model(model, forward.accelerator).training
    model.eval()  # with dropout no two passes are equal
    try:
        off, bound = _difference(forward, model, ids)
        failure = f"packs are off the model's own log-probs by {off:.2g}"
    except LayoutError as error:
        off, bound, failure = torch.inf, 0.0, str(error)
    if not off <= bound and forward.layout != "padded":  # NaN is not
        forward.use_padded(failure)
        off, bound = _difference(forward, model, ids)
    model.train(was_training)
    if not off <= bound:
        raise ValueError(
            f"the update's log-probs are off those of {type(inner_model(model, forward.accelerator)).__name__}'s own "
            f"forward by {off:.2g} a token, and rounding explains {bound:.2g}: its logits are not softcap(W h + b). "
            "Use a model without a multiplier or a layer of its own at the head, or, if TRL knows this head, TRL's "
            "GRPOTrainer with loss_type: sapo."
        )
    return off


@torch.no_grad()
def noise_in_training(forward: PackedForward, model: nn.Module, ids: Tensor) -> float:
    """Mean |difference| of two passes over one pack in training mode, 0 if rounding explains it.

    It finds what the modules of a model don't show, such as a dropout that the forward pass calls as a function, or
    noise on a router. Every process must call it; the random state is as it was afterwards.
    """
    device = forward.accelerator.device
    was_training = inner_model(model, forward.accelerator).training
    model.train()
    inputs = forward.build_inputs(_rows(forward, ids))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        first, second = (forward(model, inputs).logps.float() for _ in range(2))
    model.train(was_training)
    off = (first - second).abs().mean().item()
    return off if off > ROUNDING[precision(forward, model)] else 0.0


def precision(forward: PackedForward, model: nn.Module) -> torch.dtype:
    """The number format in which a forward pass rounds: TF32, which a GPU may use for float32, rounds like float16."""
    dtype = forward.compute_dtype(inner_model(model, forward.accelerator))
    is_tf32 = forward.accelerator.device.type == "cuda" and dtype == torch.float32
    return torch.float16 if is_tf32 else dtype


@torch.no_grad()
def _difference(forward: PackedForward, model: nn.Module, ids: Tensor) -> tuple[float, float]:
    """(mean difference of the worst row, the difference that rounding explains), on rows of one prompt."""
    device, rows = forward.accelerator.device, _rows(forward, ids)
    packed = forward(model, forward.build_inputs(rows)).logps.float().split([row.num_trained for row in rows])
    off, largest = [], []
    for row, ours in zip(rows, packed, strict=True):
        with forward.accelerator.autocast():
            inputs = {"input_ids": row.input_ids[None]}
            if row.images is not None and forward.pictures is not None:
                kinds = (inputs["input_ids"] == forward.pictures.token).int()
                inputs |= {"pixel_values": row.images.pixels, "image_grid_thw": row.images.grid}
                inputs["mm_token_type_ids"] = kinds
            given = {name: value.to(device) for name, value in inputs.items()}
            logits = model(**given, use_cache=False).logits[0].float()
        logits = logits[row.predicting.to(device)] / forward.temperature
        plain = logits.log_softmax(-1).gather(1, row.targets.to(device)[:, None]).squeeze(1)
        off.append((ours - plain).abs().mean())
        largest.append(logits.abs().max())
    dtype = precision(forward, model)
    bound = ROUNDING[dtype] + torch.finfo(dtype).eps * torch.stack(largest).max()
    worst, explained = forward.accelerator.gather(torch.stack([torch.stack(off).max(), bound])).view(-1, 2).amax(0)
    return worst.item(), explained.item()


def _rows(forward: PackedForward, ids: Tensor) -> list[Row]:
    """Two rows of one prompt, with a picture where prompts have any."""
    kept, images, pictures = ids.cpu()[:CHECK_TOKENS], None, forward.pictures
    prompt, end = kept.tensor_split([len(kept) // 2])
    if pictures is not None:
        # a placeholder in the text would ask for an image
        prompt, end = (x.masked_fill(x == pictures.token, forward.pad_token_id) for x in (prompt, end))
        if pictures.blank is not None:
            prompt, images = torch.cat([pictures.blank.input_ids[:1], prompt]), pictures.blank.images
    ends, key = [end, end.flip(0)[: 1 + len(end) // 2]], 0 if forward.share_prompts else None
    rows = [Row(torch.cat([prompt, x]), len(prompt), torch.ones(len(x)).bool(), 1.0, key) for x in ends]
    return [replace(row, images=images) for row in rows]
