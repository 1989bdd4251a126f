"""The model that a command names: whether it is there, and its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin

from sapo_trl.cli.shapes import model_config
from sapo_trl.model import check_model_path
from sapo_trl.vision import load_processor, sees


def require_model(name: str | None) -> str:
    """The name of a model: a Hub id, or a folder that is there.

    Raises:
        ValueError: no name, or a folder that is not there; says how a tiny recipe's model is made.
    """
    if not name:
        raise ValueError(
            "no model: set model_name_or_path to a Hub id or a folder, or give a config, as in --config tiny/sapo."
        )
    try:
        check_model_path(name)
    except ValueError as error:
        raise ValueError(f"{error}{cold_start_hint(name)}") from error
    return name


def cold_start_hint(model: str) -> str:
    """How to make the model of a tiny recipe, as a sentence; empty for every other model.

    >>> cold_start_hint("runs/tiny-moe/model")
    ' Make it, once: sapo-trl cold-start --output_dir runs/tiny-moe --moe'
    """
    folder = Path(model).parent
    flags = {"tiny": "", "tiny-moe": " --moe", "tiny-vl": " --vl"}
    if Path(model).name != "model" or folder.name not in flags:
        return ""
    return f" Make it, once: sapo-trl cold-start --output_dir {folder}{flags[folder.name]}"


def adapter_base(name: str) -> str | None:
    """The model that the adapter in a folder belongs to; None where the folder holds a model, or is none.

    Raises:
        ValueError: the adapter's config names no model.
    """
    path = Path(name).expanduser() / "adapter_config.json"
    if not path.is_file() or path.with_name("config.json").exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. Save the adapter again.") from error
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    if not base:
        raise ValueError(f"{path} has no base_model_name_or_path. Write the adapter's model there.")
    return base


def load_tokenizer(
    name: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """The tokenizer of a model, of one that sees pictures its processor. It is loaded first, and so shows whether a Hub
    id can be reached.

    Raises:
        ValueError: neither the folder nor the Hub has one that can be read, or a package for it is missing.
    """
    try:
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        if sees(config := model_config(name, **options)):
            return load_processor(name, config, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", **options)
    except ImportError as error:
        raise ValueError(f"the processor of {name} needs a package that is missing: {str(error).strip()}") from error
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the model {name} does not exist here and can't be had from the Hub: {reason}") from error
    if tokenizer is None:
        raise ValueError(f"the model {name} has no tokenizer.")
    return tokenizer
