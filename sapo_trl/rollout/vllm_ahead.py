"""vLLM, in this process or as a server, that generates one rollout ahead in a thread while the trainer goes on.

Weights go to the engine in the main thread, and only while the engine is idle. Nor does the thread talk to other
processes of the run: for a server, prompts are gathered before it starts, and its answer is shared when it is joined.
Every request has a seed of its own, so nothing depends on what the thread meets.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list, gather_object

from sapo_trl.rollout.server import ServerClient
from sapo_trl.rollout.worker import Job, Reply
from sapo_trl.trl_seams import VLLMGeneration, engine_runner

SEED_BITS = 48  # a seed is added to (one for each completion of a prompt) and goes through JSON

# Of TRL's engine and of a request alike; the rest differs from prompt to prompt
_SAMPLING = (
    "generation_kwargs", "repetition_penalty", "temperature", "top_p", "top_k", "logprobs", "structured_outputs_regex",
)  # fmt: skip


class BackgroundVLLM:
    """TRL's vLLM engine, one job at a time in a thread.

    Args:
        num_generations: completions of a prompt, which lie beside each other in a job.
        step: gives the optimizer step, by which the engine's weights are known to be those of now.
    """

    def __init__(self, generation: VLLMGeneration, num_generations: int, step: Callable[[], int]):
        self.generation, self.num_generations, self.step = generation, num_generations, step
        self.accelerator, self.is_server = generation.accelerator, generation.mode == "server"
        self._synced: int | None = None  # the step whose weights `start` has sent last
        self._thread = ThreadPoolExecutor(1, "rollout-ahead")
        self._answer: Future[Reply] | None = None  # of a server: on the first process only
        self._num_local = 0
        on_gpu = self.accelerator.device.type == "cuda" and not self.is_server
        self._stream = torch.cuda.Stream(self.accelerator.device) if on_gpu else None
        if self.accelerator.device.type == "cpu" and not self.is_server:
            sampler = engine_runner(generation).sampler.topk_topp_sampler
            sampler.forward = sampler.forward_native  # the one for CPUs draws from the trainer's random numbers too

    def start(self, job: Job) -> None:
        """Generate one completion per prompt with the weights that the policy has now. Every process must call it."""
        if self.step() != self._synced:  # an evaluation may have sent them already, which does no harm
            self.generation.sync_weights()
            self._synced = self.step()
        self._num_local, generate, seeds = len(job.prompt_ids), self._here, random.Random(job.seed)
        limits = job.limits or [self.generation.max_completion_length] * self._num_local
        if self.is_server:
            generate, num = self._on_server, self.num_generations
            ids, limits = gather_object(job.prompt_ids)[::num], gather_object(limits)[::num]
            if not self.accelerator.is_main_process:
                return
            self.generation.vllm_client.reset_prefix_cache()
        else:
            ids = job.prompt_ids
            self.generation.llm.reset_prefix_cache()  # rounding depends on what is found there: nothing, in every run
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.accelerator.device))
        drawn = [seeds.getrandbits(SEED_BITS) for _ in ids]
        self._answer = self._thread.submit(_timed, generate, ids, drawn, limits)

    def join(self) -> Reply:
        """The completions of this process; waits for them. Every process must call it.

        Raises:
            RuntimeError: what went wrong in the thread.
        """
        error, reply = None, None
        if self._answer is not None:
            error = self._answer.exception()
            reply = self._answer.result() if error is None else _failed(error)
            self._answer = None
        if self.is_server:
            (reply,) = broadcast_object_list([reply])
        assert reply is not None
        if reply.error:
            raise RuntimeError(f"vLLM failed while it generated the rollout ahead: {reply.error}") from error
        if not self.is_server:
            return reply
        own = slice(first := self.accelerator.process_index * self._num_local, first + self._num_local)
        return Reply(reply.ids[own], reply.logps[own], reply.seconds, reply.cpu_seconds)

    def close(self) -> None:
        """Wait until the engine is idle: nothing ends a request from outside, and whoever comes next needs it."""
        self._thread.shutdown()

    def _here(self, ids: list[list[int]], seeds: list[int], limits: list[int]) -> tuple[list, list]:
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            with own_requests(self.generation.llm, seeds, limits):
                _, completions, logprobs, _ = self.generation.generate(ids, None, self.num_generations)
            if self._stream is not None:
                self._stream.synchronize()
        return completions, logprobs

    def _on_server(self, ids: list[list[int]], seeds: list[int], limits: list[int]) -> tuple[list, list]:
        sampling = {name: vars(self.generation)[name] for name in _SAMPLING}
        sampling |= {"n": self.num_generations, "min_p": self.generation.min_p or 0.0}
        found = cast(ServerClient, self.generation.vllm_client).generate_seeded(ids, seeds, limits, **sampling)
        return found["completion_ids"], found["logprobs"]


@contextmanager
def own_requests(llm: Any, seeds: Sequence[int], limits: Sequence[int]) -> Generator[None]:
    """Inside, each prompt that vLLM's `generate` gets has a seed and a limit of tokens of its own."""
    generate = llm.generate

    def with_own(prompts, sampling_params, **kwargs):
        each = [sampling_params.clone() for _ in seeds]
        for params, seed, limit in zip(each, seeds, limits, strict=True):
            params.seed, params.max_tokens = seed, limit
        return generate(prompts, sampling_params=each, **kwargs)

    vars(llm)["generate"] = with_own
    try:
        yield
    finally:
        del vars(llm)["generate"]


def _timed(generate: Callable[..., tuple[list, list]], *args) -> Reply:
    started, cpu_started = time.perf_counter(), time.thread_time()
    ids, logprobs = generate(*args)
    logps = [[of_token[0] for of_token in row] for row in logprobs]
    return Reply([list(row) for row in ids], logps, time.perf_counter() - started, time.thread_time() - cpu_started)


def _failed(error: BaseException) -> Reply:
    return Reply([], [], 0.0, 0.0, f"{type(error).__name__}: {error}")
