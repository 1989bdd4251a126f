"""One rollout ahead: while the update runs on a rollout, the next one is generated with the weights of its beginning.

An engine has `start`, which hands it the policy's weights of this moment and a job, and `join`, which waits for the
answer. Between the two nobody writes the weights that it uses, and no other process of the run waits for it. There is
the worker process of a CPU, below, and vLLM (`vllm_ahead.py`).
"""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from typing import Protocol

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from sapo_trl.config import SAPOConfig
from sapo_trl.model import without_adapters
from sapo_trl.rollout.rollout import Rollout
from sapo_trl.rollout.rows import MiniBatch, rows_from_lists
from sapo_trl.rollout.vllm import MIXED
from sapo_trl.rollout.worker import Job, Place, Reply, Setup, shared_tensors

_ALIGNMENT = 64  # bytes
# Every generated token makes the cache anew. glibc gives such memory back to the system and gets it again page by page:
# a rollout of the tiny model took 1.21 s, and 1.13 s when it keeps it.
_KEEPS_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}


class Engine(Protocol):
    """What generates one job at a time; every process of a run must make the same calls, in the same order."""

    def start(self, job: Job) -> None: ...

    def join(self) -> Reply: ...

    def close(self) -> None: ...


class WorkerEngine:
    """Generates with a copy of a model, in a process of its own on the CPU (`worker.py`)."""

    def __init__(self, model: PreTrainedModel | PeftModel, autocast: torch.dtype | None, threads: int):
        self.model = without_adapters(model)
        places, size = _places(self.model.state_dict())
        descriptor = _shared_memory(size)
        self.tensors = shared_tensors(descriptor, places)
        self.connection, theirs = Pipe()
        self.process = start_process(theirs.fileno(), descriptor, threads)
        theirs.close()  # or nobody would notice that the process is gone
        adapters = {}
        if isinstance(model, PeftModel):
            names = sorted(model.peft_config, key=lambda name: name != model.active_adapter)
            adapters = {name: copy.copy(model.peft_config[name]) for name in names}
        for config in adapters.values():
            if "init_lora_weights" in vars(config):  # some ways of it decompose the weights, which are not there yet
                vars(config)["init_lora_weights"] = True
        base = self.model
        self._send(Setup(type(base), base.config, base.generation_config, adapters, places, descriptor, autocast))
        os.close(descriptor)

    @torch.no_grad()
    def start(self, job: Job) -> None:
        """Generate one completion per prompt with the weights that the model has now."""
        for name, tensor in self.model.state_dict().items():
            self.tensors[name].copy_(tensor)
        self._send(job)

    def join(self) -> Reply:
        """The completions; waits for them.

        Raises:
            RuntimeError: the process has ended, or says what went wrong.
        """
        try:
            reply: Reply = self.connection.recv()
        except (EOFError, ConnectionError):
            status = self.process.wait()
            how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
            raise RuntimeError(
                f"the rollout worker (process {self.process.pid}) ended {how} while it generated the rollout ahead. "
                "Resume from the last checkpoint; if memory was short, rollouts_ahead: 0 spares a copy of the weights."
            ) from None
        if reply.error:
            raise RuntimeError(f"the rollout worker failed: {reply.error}")
        return reply

    def close(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        self.connection.close()
        self.tensors.clear()

    def _send(self, message: Setup | Job) -> None:
        with suppress(ConnectionError):  # `join` says why the process is gone
            self.connection.send(message)


def start_process(connection: int, memory: int, threads: int) -> subprocess.Popen:
    """A process of `worker.py` that shares two descriptors, and not the script that trains."""
    path, arguments = os.pathsep.join(entry or os.getcwd() for entry in sys.path), (connection, os.getpid(), threads)
    return subprocess.Popen(
        [sys.executable, "-P", "-c", f"from sapo_trl.rollout.worker import main; main{arguments}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=(connection, memory),
        start_new_session=True,  # Ctrl-C is for the trainer, which then ends this one in order
        env={
            **os.environ,
            **_KEEPS_MEMORY,
            "PYTHONPATH": path,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": str(threads),
        },
    )


def _places(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Place], int]:
    """(place of every tensor, bytes in all); tensors that are one in the model, such as a tied head, have one place."""
    starts: dict[tuple, int] = {}
    places, size = {}, 0
    for name, tensor in tensors.items():
        start = starts.setdefault((tensor.data_ptr(), tensor.shape, tensor.dtype), size)
        if start == size:
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        places[name] = Place(start, tuple(tensor.shape), tensor.dtype)
    return places, size


def _shared_memory(size: int) -> int:
    """Descriptor of `size` bytes without a name, which are free again when nobody maps them, however processes end."""
    if sys.platform == "linux":
        descriptor = os.memfd_create("sapo_trl weights")  # not in /dev/shm, which containers keep small
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.truncate(descriptor, size)
    return descriptor


class RolloutsAhead:
    """The rollout that is generated while another one is trained on.

    Args:
        vllm: makes the engine where the trainer generates with vLLM; None: a worker process.
        reason: why the trainer's own decoding loop, which alone runs in the worker, can't be used; None: it can.

    Attributes:
        pending: that rollout once it is there, its rows as its only mini-batch; it can be saved and loaded.
        seconds: of the last one that was generated: on the clock, and of the processor.

    Raises:
        ValueError: the worker can't generate what the trainer would.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        config: SAPOConfig,
        accelerator: Accelerator,
        vllm: Callable[[], Engine] | None,
        reason: str | None,
    ):
        if vllm is None and type(without_adapters(model)).__module__ == "__main__":
            raise ValueError(
                f"rollouts_ahead={config.rollouts_ahead} copies the model into a process of its own, which can't "
                f"import {type(without_adapters(model)).__name__} from a script. Move the class into a module."
            )
        if vllm is None and reason is not None:
            raise ValueError(
                f"rollouts_ahead={config.rollouts_ahead} needs the trainer's own decoding loop, and here {reason}. Set "
                "rollouts_ahead: 0."
            )
        self.model, self.config, self.vllm = model, config, vllm
        self.autocast, self.process = MIXED.get(accelerator.mixed_precision), accelerator.process_index
        self.device = accelerator.device
        self.pending: Rollout | None = None
        self.seconds = (0.0, 0.0)
        self._started: tuple[list[list[int]], int] | None = None  # prompts and optimizer step of what is generated now
        self._engine: Engine | None = None

    @contextmanager
    def running(self) -> Generator[None]:
        """Inside, the engine runs; a worker and this process share the threads that this process had."""
        usual = torch.get_num_threads()
        self.pending = self._started = None
        if self.vllm is not None:
            self._engine = self.vllm()
        else:
            threads = max(1, usual // 2)
            self._engine = WorkerEngine(self.model, self.autocast, threads)
            torch.set_num_threads(max(1, usual - threads))
        try:
            yield
        finally:
            self._engine.close()
            torch.set_num_threads(usual)

    @property
    def has_begun(self) -> bool:
        """Whether a rollout is there or under way."""
        return self.pending is not None or self._started is not None

    def start(
        self,
        prompt_ids: list[list[int]],
        limits: list[int],
        sampling: GenerationConfig | None,
        place: tuple[int, int],
        step: int,
    ) -> None:
        """Begin to generate with the weights of optimizer step `step`, which is now.

        Args:
            limits: most tokens of each completion; empty: those of `sampling`.
            sampling: how the worker samples; vLLM knows.
            place: number of the rollout in the run, and of the generation in the rollout.
        """
        assert self._engine is not None and not self.has_begun
        # a stream of its own for every generation and process, so that no evaluation and no resume moves it
        seed = random.Random(f"{self.config.seed} {self.process} {place}").getrandbits(32)
        self._engine.start(Job(prompt_ids, limits, sampling, seed))
        self._started = prompt_ids, step

    def join(self) -> None:
        """Wait for what is generated, if anything is: it is `pending` then."""
        if self._started is None or self._engine is None:
            return
        prompt_ids, step = self._started
        reply = self._engine.join()
        rows = rows_from_lists(prompt_ids, reply.ids, None)
        for row, logps in zip(rows, reply.logps, strict=True):
            row.sampler_logps = torch.tensor(logps, device=self.device)
        self.pending = Rollout(mini_batches=[MiniBatch(rows, [], 0, 0.0, 0.0, 0.0, 0.0)], weights_step=step)
        self.seconds, self._started = (reply.seconds, reply.cpu_seconds), None

    def take(self, prompt_ids: Sequence[list[int]]) -> tuple[list[list[int]], list[list[float]], int]:
        """(ids, log-probs, step of the weights) of the rollout that was started last; waits for it.

        Raises:
            RuntimeError: it was generated for other prompts.
        """
        rollout = self.taken()
        rows, ids, logps = rollout.mini_batches[0].rows, [], []
        for row in rows:
            assert row.sampler_logps is not None
            ids.append(row.input_ids.tolist())
            logps.append(row.sampler_logps.tolist())
        if [x[: row.num_prompt] for x, row in zip(ids, rows, strict=True)] != list(prompt_ids):
            raise RuntimeError(
                "the rollout ahead was generated for other prompts than the data gives now. rollouts_ahead reads them "
                "from `_get_train_sampler` and `train_dataset` one rollout before. Set rollouts_ahead: 0."
            )
        return [x[row.num_prompt :] for x, row in zip(ids, rows, strict=True)], logps, rollout.weights_step

    def taken(self) -> Rollout:
        """The rollout that was started last, as it would be saved; waits for it."""
        self.join()
        assert self.pending is not None
        rollout, self.pending = self.pending, None
        return rollout
