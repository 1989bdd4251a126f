"""Vision-language models: their processor, and the tokens that stand for pictures."""

from __future__ import annotations

import io
from typing import Any

import transformers
from PIL import Image
from transformers import AutoProcessor, PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import is_torchvision_available

# What configs call the tokens that only a processor may write: a sampled one would ask for a picture that is not there
_PLACEHOLDERS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def placeholders(config: PretrainedConfig) -> list[int]:
    """Ids of the tokens that stand for pictures and their borders; none of a text model.

    >>> placeholders(transformers.Qwen3VLConfig()), placeholders(transformers.Qwen3Config())
    ([151652, 151653, 151655, 151656], [])
    """
    given = config.to_dict()
    return sorted({given[name] for name in _PLACEHOLDERS if given.get(name) is not None})


def sees(config: PretrainedConfig) -> bool:
    """Whether a model is one of pictures and text."""
    return "vision_config" in config.to_dict()


class Qwen3VLProcessor(transformers.Qwen3VLProcessor):
    """Qwen3-VL's processor without its half for videos, which needs torchvision.

    It has the name of the whole one, so that what it saves is loaded as that elsewhere.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs):
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template, **kwargs)


def load_processor(name: str, config: PretrainedConfig, **options: Any) -> ProcessorMixin:
    """The processor of a vision-language model; without torchvision that of Qwen3-VL for pictures alone.

    Args:
        config: of the model.
        options: of `from_pretrained`.

    Raises:
        OSError, ValueError, ImportError: it is not there, or needs a package that is not.
    """
    has_no_videos = config.model_type in ("qwen3_vl", "qwen3_vl_moe") and not is_torchvision_available()
    kind = Qwen3VLProcessor if has_no_videos else AutoProcessor
    return kind.from_pretrained(name, padding_side="left", **options)


def text_tokenizer(processing: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """The tokenizer inside a processor, or itself."""
    return processing.tokenizer if isinstance(processing, ProcessorMixin) else processing


def tokens_of_picture(processing: PreTrainedTokenizerBase | ProcessorMixin, picture: bytes) -> int:
    """Placeholders that a processor of Qwen's kind writes for a picture, from the head of its file.

    Raises:
        ValueError: a model of text has no processor.
    """
    if not isinstance(processing, ProcessorMixin):
        raise ValueError("the prompts have pictures, and the model is one of text. Choose a vision-language model.")
    width, height = Image.open(io.BytesIO(picture)).size
    images: Any = processing.image_processor
    return images.get_number_of_image_patches(height, width, {}) // images.merge_size**2
