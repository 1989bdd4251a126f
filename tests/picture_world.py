"""A Qwen3-VL of two text and two vision layers, patches of 4 pixels, and rollouts with pictures in TRL's form."""

import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from sapo_trl.tiny_vl import build_processor


def small_processor():
    """The tiny one with patches of 4 pixels."""
    made = build_processor()
    size = {"shortest_edge": 64, "longest_edge": 1024}
    made.image_processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=size)
    return made


def small_model(processor, moe: bool = False):
    """Two text and two vision layers, weights large enough that pixels show in log-probs."""
    torch.manual_seed(0)
    text = {
        "vocab_size": len(processor.tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        "pad_token_id": processor.tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0], "initializer_range": 0.3,
    }  # fmt: skip
    marks = {
        "image_token_id": processor.image_token_id, "video_token_id": processor.video_token_id,
        "vision_start_token_id": processor.vision_start_token_id, "vision_end_token_id": processor.vision_end_token_id,
    }  # fmt: skip
    if moe:
        text |= {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2}
        config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, **marks)
        return Qwen3VLMoeForConditionalGeneration(config)
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **marks))


def with_images(model, processor) -> dict:
    """Eight rows in TRL's form with 0, 1 or 2 images before the prompt, of one or two placeholders each."""
    g = torch.Generator().manual_seed(3)
    text = lambda n: torch.randint(3, processor.vision_start_token_id, (n,), generator=g).tolist()  # noqa: E731
    grids, counts, prompts, completions = [], [1, 0, 2, 1, 0, 1, 2, 0], [], []
    for count, length in zip(counts, [5, 9, 1, 12, 7, 3, 8, 2], strict=True):
        prompt = text(3)
        for _ in range(count):
            grids.append([1, 2, 2 * (1 + len(grids) % 2)])
            marks = [processor.image_token_id] * (1 + (len(grids) - 1) % 2)
            prompt = [processor.vision_start_token_id, *marks, processor.vision_end_token_id, *prompt]
        prompts.append(prompt)
        completions.append(text(length))
    pad = lambda lists, side: torch.nn.utils.rnn.pad_sequence(  # noqa: E731
        [torch.tensor(x) for x in lists], batch_first=True, padding_side=side
    )
    ones = lambda lists: [[1] * len(x) for x in lists]  # noqa: E731
    patches = sum(h * w for _, h, w in grids)
    batch = {
        "prompt_ids": pad(prompts, "left"), "prompt_mask": pad(ones(prompts), "left"),
        "completion_ids": pad(completions, "right"), "completion_mask": pad(ones(completions), "right"),
        "advantages": torch.tensor([1.2, -0.7, 0.4, -1.5, 0.0, 0.9, -0.2, 2.0]),
        "pixel_values": torch.randn(patches, 3 * 2 * 4 * 4, generator=g), "image_grid_thw": torch.tensor(grids),
        "num_images": counts,
    }  # fmt: skip
    whole = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    batch["mm_token_type_ids"] = (whole == processor.image_token_id).int()
    old = torch.full(batch["completion_ids"].shape, -5.5)  # about the policy's: uniform over 268 tokens is -5.6
    batch["old_per_token_logps"] = old + 0.5 * torch.randn(old.shape, generator=g)
    batch["num_items_in_batch"] = 4 * batch["completion_mask"].sum()
    return batch


def with_pictures(num: int) -> Dataset:
    """Prompts of which three in four have one picture or two, in other colours and sizes."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"{i}+1="}],
                "images": [Image.new("RGB", (8 * (1 + i % 3), 8), (16 * i, 255 - 16 * i, 90))] * (i % 4 // 2 + i % 2),
            }
            for i in range(num)
        ]
    )


def content_reward(completions, **kwargs):
    return [float(len(completion[0]["content"]) % 5) for completion in completions]
