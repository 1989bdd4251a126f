"""Vision-language models: their processor, and the tokens that stand for pictures."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoProcessor, PretrainedConfig, ProcessorMixin
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


class Qwen3VLProcessor(transformers.Qwen3VLProcessor):
    """Qwen3-VL's processor without its half for videos, which needs torchvision.

    It has the name of the whole one, so that what it saves is loaded as that elsewhere.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs):
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template, **kwargs)


def load_processor(name: str, **options: Any) -> ProcessorMixin:
    """The processor of a vision-language model; without torchvision that of Qwen3-VL for pictures alone.

    Raises:
        OSError, ValueError, ImportError: it is not there, or needs a package that is not.
    """
    kind = AutoProcessor
    if not is_torchvision_available() and "qwen3_vl" in transformers.AutoConfig.from_pretrained(name).model_type:
        kind = Qwen3VLProcessor
    return kind.from_pretrained(name, padding_side="left", **options)
