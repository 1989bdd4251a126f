"""The process that generates one rollout ahead: a copy of the policy, and the trainer's own decoding loop.

It gets a `Setup` and then one job after another over a connection, and answers each. The weights lie in memory that it
shares with the trainer, who writes them while this process waits. It ends with its trainer, however that ends.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from sapo_trl.model import without_adapters
from sapo_trl.rollout.generation import unfinished_only
from sapo_trl.rollout.outside import plain_sampling
from sapo_trl.trl_seams import no_init_weights


class Place(NamedTuple):
    """Where a tensor lies in the shared memory; tied weights have one place."""

    start: int  # bytes
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Setup:
    """What the copy of the policy is made of.

    Attributes:
        model_class, config, generation_config: of the transformers model inside all wrappers.
        adapters: PEFT's configurations by adapter, the active one first; empty without PEFT.
        places: name in the state dict -> place of the tensor.
        descriptor: of the shared memory.
        autocast: number format of mixed precision, or None.
    """

    model_class: type[PreTrainedModel]
    config: PretrainedConfig
    generation_config: GenerationConfig
    adapters: dict[str, PeftConfig]
    places: dict[str, Place]
    descriptor: int
    autocast: torch.dtype | None


class Job(NamedTuple):
    """Token ids of a prompt per completion, the most tokens of each (empty: those of the sampling), how to sample
    (None: the engine knows), and the seed of the random stream."""

    prompt_ids: list[list[int]]
    limits: list[int]
    sampling: GenerationConfig | None
    seed: int


class Reply(NamedTuple):
    """The completions' ids and log-probs, one list per prompt, and the seconds that they took; or what went wrong."""

    ids: list[list[int]]
    logps: list[list[float]]
    seconds: float
    cpu_seconds: float
    error: str = ""


def shared_tensors(descriptor: int, places: Mapping[str, Place]) -> dict[str, Tensor]:
    """The tensors that lie in the shared memory; whoever maps it sees what the other one writes."""
    memory = mmap.mmap(descriptor, 0)
    found = {}
    for name, place in places.items():
        count = torch.Size(place.shape).numel()
        if not count:  # frombuffer takes no empty part
            found[name] = torch.empty(place.shape, dtype=place.dtype)
            continue
        found[name] = torch.frombuffer(memory, dtype=place.dtype, count=count, offset=place.start).view(place.shape)
    return found


def build_copy(setup: Setup) -> PreTrainedModel:
    """A model like the policy, whose parameters are the shared tensors."""
    with no_init_weights():
        model = setup.model_class(setup.config)
    if setup.adapters:  # initialized, for some draw what no state dict holds
        (active, config), *others = setup.adapters.items()
        adapted = get_peft_model(model, config, adapter_name=active)
        for name, config in others:
            adapted.add_adapter(name, config)
        model = without_adapters(adapted)
    model.load_state_dict(shared_tensors(setup.descriptor, setup.places), assign=True)
    model.generation_config = setup.generation_config
    model.eval()
    return model


@torch.inference_mode()
def generate(model: PreTrainedModel, job: Job) -> tuple[list[list[int]], list[list[float]]]:
    """(ids, log-probs) of one completion per prompt, up to its end token, from the trainer's own decoding loop."""
    assert job.sampling is not None
    prompts = [torch.tensor(ids) for ids in job.prompt_ids]
    padded, mask = (
        pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")
        for rows, value in ((prompts, job.sampling.pad_token_id), ([torch.ones_like(x) for x in prompts], 0))
    )
    torch.manual_seed(job.seed)
    columns: list[Tensor] = []
    with unfinished_only(model, job.limits, columns), plain_sampling(model):
        drawn: Any = model.generate(  # ty: ignore[not-callable]
            input_ids=padded, attention_mask=mask, generation_config=job.sampling
        )
    logps = torch.stack(columns, dim=1)  # (B, C), NaN after a row's end
    rows = zip(drawn[:, padded.shape[1] :], logps, ~logps.isnan(), strict=True)
    kept = [(ids[is_there].tolist(), values[is_there].tolist()) for ids, values, is_there in rows]
    return [ids for ids, _ in kept], [values for _, values in kept]


def serve(connection: Connection) -> None:
    """Answer jobs until the trainer closes the connection; an error is the last answer."""
    try:
        setup: Setup = connection.recv()
        model = build_copy(setup)
        while True:
            job: Job = connection.recv()
            started, cpu_started = time.perf_counter(), time.process_time()
            with torch.autocast("cpu", dtype=setup.autocast, enabled=setup.autocast is not None):
                found = generate(model, job)
            connection.send(Reply(*found, time.perf_counter() - started, time.process_time() - cpu_started))
    except (EOFError, ConnectionError):
        return
    except Exception as error:
        connection.send(Reply([], [], 0.0, 0.0, f"{type(error).__name__}: {error}"))


def main(descriptor: int, parent: int, threads: int) -> None:
    """Serve the trainer `parent` over the socket `descriptor`."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: this process ends with its trainer
    if os.getppid() == parent:  # or the trainer went before the kernel was told
        torch.set_num_threads(threads)
        serve(Connection(descriptor))
