r"""A vision-language model small enough for a laptop: Qwen3-VL, its processor, and generated pictures to reason about.

The same idea as `tiny.py`: the cold start teaches two styles in equal parts, answering at once (mostly wrong) and
reading the picture step by step (more often right), so that there is a choice to learn. Classes, chat format and
tokenizer are Qwen3-VL's at a small size: a picture of 48 × 48 pixels is 36 patches, of which the model gets 9 tokens.
"""

from __future__ import annotations

import json
import random
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tokenizers import AddedToken
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from sapo_trl.files import write_text
from sapo_trl.tiny import (
    MICRO_BATCH,
    Problem,
    build_tokenizer,
    make_problems,
    style_mixture,
    style_report,
    train_styles,
)
from sapo_trl.vision import Qwen3VLProcessor

SIDE = 48  # pixels of a picture
PATCH, MERGE = 8, 2  # pixels of a patch; patches of a token on either side
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
MAX_ANSWER_TOKENS = 48  # the longest right answer has 36

# Qwen3-VL's chat format without tools: every picture is one placeholder, which the processor repeats.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


# --------------------------------------------------------------------------------------------------- processor, model


def build_processor() -> Qwen3VLProcessor:
    """Qwen3-VL's processor over the byte tokenizer of `tiny.py`."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in VISION_TOKENS])
    tokenizer.chat_template = CHAT_TEMPLATE
    size = {"shortest_edge": (PATCH * MERGE) ** 2, "longest_edge": (2 * SIDE) ** 2}  # pixels of a whole picture
    pictures = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, size=size)
    return Qwen3VLProcessor(pictures, tokenizer, chat_template=CHAT_TEMPLATE)


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """A new Qwen3-VL: the text model of `tiny.build_model`, and two vision layers 64 wide (1.1 M parameters)."""
    ids: dict[str, Any] = {token: tokenizer.convert_tokens_to_ids(token) for token in VISION_TOKENS}
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 384,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]},
        "initializer_range": 0.06,  # as in `tiny.build_model`
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "out_hidden_size": 128,
        "num_position_embeddings": (SIDE // PATCH) ** 2,
        "deepstack_visual_indexes": [0],
        "initializer_range": 0.06,
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random stream does not move
        torch.manual_seed(seed)
        return Qwen3VLForConditionalGeneration(config)


# --------------------------------------------------------------------------------------------------- generated pictures


@dataclass(frozen=True)
class PictureProblem(Problem):
    """A problem about a picture of `SIDE` × `SIDE` pixels."""

    picture: Image.Image

    @property
    def key(self) -> str:
        return f"{self.prompt} {zlib.crc32(self.picture.tobytes()):08x}"

    @property
    def columns(self) -> dict[str, Any]:
        return {"images": [self.picture]}


COLOURS = {"r": (214, 39, 40), "g": (44, 160, 44), "b": (31, 119, 180)}  # red, green, blue
CELL = PATCH * MERGE  # pixels of a token of the model
UNIT = PATCH  # pixels of a length of 1


def _canvas() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    return picture, ImageDraw.Draw(picture)


def _problem(kind: str, prompt: str, steps: str, answer: int, picture: Image.Image) -> PictureProblem:
    boxed = f"\\boxed{{{answer}}}"
    return PictureProblem(prompt, str(answer), boxed, f"{steps} {boxed}", kind, picture)


def _counting(rng: random.Random) -> PictureProblem:
    """Discs and squares in three rows: `how many r?`, read row by row and counted, `r.g bbr .gr 3`."""
    picture, draw = _canvas()
    wanted, rows = rng.choice(list(COLOURS)), []
    for y in range(0, SIDE, CELL):
        row = ""
        for x in range(0, SIDE, CELL):
            colour = rng.choice([wanted, *COLOURS, "."])
            row += colour
            if colour == ".":
                continue
            shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
            inset = rng.randrange(2, 5)
            shape((x + inset, y + inset, x + CELL - 1 - inset, y + CELL - 1 - inset), fill=COLOURS[colour])
        rows.append(row)
    number = "".join(rows).count(wanted)
    return _problem("counting", f"how many {wanted}?", f"{' '.join(rows)} {number}", number, picture)


def _bars(rng: random.Random) -> PictureProblem:
    """A bar chart of three heights up to 6: `r*b+g?`, worked as `r=4 b=6 g=3 4*6=24 24+3=27`."""
    picture, draw = _canvas()
    heights = {}
    for place, name in enumerate(rng.sample(list(COLOURS), 3)):
        heights[name] = height = rng.randrange(1, 7)
        x = place * CELL
        draw.rectangle((x + 2, SIDE - height * UNIT, x + CELL - 3, SIDE - 1), fill=COLOURS[name])
    a, b, c = order = rng.sample(list(COLOURS), 3)
    product = heights[a] * heights[b]
    answer = product + heights[c]
    read = " ".join(f"{name}={heights[name]}" for name in order)
    steps = f"{read} {heights[a]}*{heights[b]}={product} {product}+{heights[c]}={answer}"
    return _problem("bars", f"{a}*{b}+{c}?", steps, answer, picture)


def _fill(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colour: Any) -> None:
    """Fill a rectangle: left, top, right and bottom in lengths of 1."""
    left, top, right, bottom = (UNIT * x for x in box)
    draw.rectangle((left, top, right - 1, bottom - 1), fill=colour)


def _area(rng: random.Random) -> PictureProblem:
    """A rectangle without one of its corners: `area?`, worked as `6*5=30 2*3=6 30-6=24`."""
    picture, draw = _canvas()
    width, height = rng.randrange(2, 7), rng.randrange(2, 7)
    cut_x, cut_y = rng.randrange(1, width), rng.randrange(1, height)
    left, top = rng.randrange(7 - width), rng.randrange(7 - height)
    right, bottom = left + width, top + height
    _fill(draw, (left, top, right, bottom), COLOURS[rng.choice(list(COLOURS))])
    x, y = rng.choice((left, right - cut_x)), rng.choice((top, bottom - cut_y))
    _fill(draw, (x, y, x + cut_x, y + cut_y), "white")
    whole, cut = width * height, cut_x * cut_y
    steps = f"{width}*{height}={whole} {cut_x}*{cut_y}={cut} {whole}-{cut}={whole - cut}"
    return _problem("area", "area?", steps, whole - cut, picture)


KINDS: dict[str, Callable[[random.Random], PictureProblem]] = {"counting": _counting, "bars": _bars, "area": _area}


def _write(folder: Path, split: str, problems: Sequence[Any]) -> None:
    """`<split>.jsonl`, and the pictures beside it, which it names by their paths from there."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, problem in enumerate(problems):
        path = f"pictures/{split}-{number:05}.png"
        problem.picture.save(folder / path)
        rows.append({"prompt": problem.prompt, "answer": problem.answer, "kind": problem.kind, "image": path})
    write_text(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def cold_start(
    output_dir: str | Path,
    steps: int = 1000,
    seed: int = 0,
    num_train: int = 2048,
    num_test: int = 256,
    num_check: int = 256,
) -> dict[str, dict[str, float]]:
    """`tiny.cold_start` for a model that sees; writes `pictures/` besides."""
    output_dir, start = Path(output_dir), time.perf_counter()
    print(f"cold start: drawing {steps * MICRO_BATCH:,} pictures", flush=True)
    processor = build_processor()
    model = build_model(processor.tokenizer, seed)
    rows = style_mixture(make_problems(steps * MICRO_BATCH, seed, generators=KINDS))
    train_styles(model, processor, rows, output_dir, seed, accumulates=False)
    model.save_pretrained(output_dir / "model")
    processor.save_pretrained(output_dir / "model")
    _write(output_dir, "train", make_problems(num_train, seed + 1, generators=KINDS))
    _write(output_dir, "test", make_problems(num_test, seed, split="test", generators=KINDS))
    print(f"cold start: {steps} steps in {time.perf_counter() - start:.0f} s, written to {output_dir}")
    checked = make_problems(num_check, seed + 1, split="test", generators=KINDS)
    return style_report(model, processor, checked, max_new_tokens=MAX_ANSWER_TOKENS)
