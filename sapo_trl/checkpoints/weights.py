"""Checkpoints that come back as they were saved: strict loading, and a hash of the parameters to prove it.

transformers 5 holds the experts of a layer as one tensor in memory and writes them one by one, under the Hub's names.
Its Trainer (5.23) resumes by reading those names into the model with strict=False: none fits, and every expert keeps
the base weights without an error. Here a checkpoint goes through `from_pretrained`, which converts, and every
parameter must be covered.

Who loads what: a single process and DDP, `load_weights`; LoRA adapters, PEFT; ZeRO and FSDP, their engine, whose own
files hold the tensors under the model's names. Whoever loaded, the hash is compared.
"""

from __future__ import annotations

import copy
import hashlib
import json
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from sapo_trl.model import held_here, is_sharded

HASH_FILE = "parameter_hash.json"
REFERENCE = "reference.safetensors"


# ---------------------------------------------------------------------------------------------------------------- load


def load_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Copy the weights of a saved model into `model`, bit for bit; its parameters stay the same objects.

    One file or shards, safetensors or .bin, in the Hub's names or the model's. Costs one copy of the model on the CPU.

    Raises:
        ValueError: weights missing from the folder, unknown to the model or of another shape. By name, except for an
            expert missing from a layer, which transformers' report names just before.
    """
    # One type that holds all of the model's exactly: a single `dtype` would round a float32 head of a bfloat16 model
    dtype = reduce(torch.promote_types, {parameter.dtype for parameter in model.parameters()})
    try:
        loaded: Any = type(model).from_pretrained(
            folder, config=copy.deepcopy(model.config), dtype=dtype, output_loading_info=True
        )
        saved, report = loaded
    except RuntimeError as error:  # a shape, or the experts of a layer that do not make one tensor
        raise ValueError(
            f"the weights in {folder} could not be converted to {type(model).__name__}'s: {error} Resume from a folder "
            "that this model was saved to."
        ) from error
    wrong = {kind: sorted(names) for kind, names in report.items() if names}
    if wrong:
        counts = "; ".join(f"{len(names)} {kind} ({_first(names)})" for kind, names in wrong.items())
        raise ValueError(
            f"the weights in {folder} do not cover {type(model).__name__} exactly: {counts}. A parameter that is not "
            "loaded would keep its old value silently. Resume from a folder that this model was saved to."
        )
    values = saved.state_dict()
    for name, tensor in model.state_dict().items():
        tensor.copy_(values[name])


def save_reference(model: nn.Module, folder: Path) -> None:
    """Write the parameters of a reference model that moves while a run trains (`sync_ref_model`)."""
    save_file({name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}, folder / REFERENCE)


@torch.no_grad()
def load_reference(model: nn.Module, folder: Path) -> None:
    """The inverse of `save_reference`."""
    saved = load_file(folder / REFERENCE)
    for name, p in model.named_parameters():
        p.copy_(saved[name])


def _first(names: list, limit: int = 3) -> str:
    return ", ".join(map(str, names[:limit])) + (", ..." if len(names) > limit else "")


# ---------------------------------------------------------------------------------------------------------------- hash


def parameter_hash(model: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of all parameters and saved buffers; 64 hexadecimal digits.

    One tensor at a time is copied to the CPU. Under ZeRO-3 and FSDP2 it covers the shards of this process.
    """
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if isinstance(tensor, Tensor):
            held = held_here(tensor.detach() if isinstance(tensor, DTensor) else tensor)
            total.update(f"{name} {held.dtype} {tuple(held.shape)}\n".encode())
            total.update(held.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def save_hash(model: nn.Module, folder: str | Path, accelerator: Accelerator) -> None:
    """Write `HASH_FILE`: one hash, or one for each process that holds shards. Every process must call it.

    Raises:
        RuntimeError: processes that should hold the same parameters do not.
    """
    hashes, sharded = gather_object([parameter_hash(model)]), is_sharded(model)
    if not sharded and len(set(hashes)) > 1:
        raise RuntimeError(
            f"the {len(hashes)} processes hold different parameters at {folder} ({_first(hashes)}): "
            "their updates have drifted apart. Check that every process ran the same number of optimizer steps."
        )
    if accelerator.is_main_process:
        record = {"sharded": sharded, "hashes": hashes if sharded else hashes[:1]}
        (Path(folder) / HASH_FILE).write_text(json.dumps(record, indent=2) + "\n")


def compare_hash(model: nn.Module, folder: str | Path, accelerator: Accelerator) -> str:
    """Compare the parameters just loaded with the hash saved beside them; says in one sentence what was compared.

    Raises:
        ValueError: they differ. The file and both hashes are named.
    """
    path = Path(folder) / HASH_FILE
    if not path.is_file():
        return f"parameters of {folder} NOT compared: it has no {HASH_FILE} (saved by another trainer)"
    record, sharded = json.loads(path.read_text()), is_sharded(model)
    world = accelerator.num_processes
    if record["sharded"] != sharded or (sharded and len(record["hashes"]) != world):
        saved = f"{len(record['hashes'])} shard(s)" if record["sharded"] else "whole tensors"
        return f"parameters of {folder} NOT compared: hashed as {saved}, now on {world} process(es) of another engine"
    expected, found = record["hashes"][accelerator.process_index if sharded else 0], parameter_hash(model)
    if found != expected:
        raise ValueError(
            f"the parameters loaded from {folder} are not those that were saved: {path} says {expected}, process "
            f"{accelerator.process_index} has {found}. The weights, their dtype, or the base model under an adapter "
            "changed. Restore them, or start a new run with model_name_or_path set to this folder."
        )
    return f"parameters of {folder} equal those saved (sha256 {found[:12]})"
