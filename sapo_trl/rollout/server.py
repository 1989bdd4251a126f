"""A vLLM server as rollout engine: the key, a server that is away for a while, one that restarted, and the weights.

TRL 1.16 talks to `vllm serve` and hands weights over by NCCL, from GPU to GPU. On a CPU they go through a folder that
the server reads (`FolderClient`). Three things are not in TRL's client: it sends no key; it takes completions of a
server that restarted, and so has its first weights again, for the policy's; and it doesn't say which server failed.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
import warnings
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import torch
from requests.adapters import HTTPAdapter
from safetensors.torch import save_file

from sapo_trl.config import SAPOConfig
from sapo_trl.files import masked
from sapo_trl.trl_seams import VLLMClient

KEY = "VLLM_API_KEY"  # vLLM's own name: the server reads the same variable
EXTENSION = "sapo_trl.rollout.vllm_weights.PolicyWeights"
BUSY = (408, 429, 500, 502, 503, 504)  # HTTP statuses that are worth another try; of 500 only ERRORS
ERRORS = 3  # a server that is about to end answers 500, and so does one that can't do what it was asked
RESTARTS = 3  # of the server while one rollout is generated
AT_ONCE = 64  # requests of a rollout, as many as TRL sends of those with images
HOW = "docs/engines.md has the command that starts one"


class ServerSession(requests.Session):
    """Requests to one server: with the key, again while it doesn't answer, and with its URL in the error.

    Args:
        patience_s: how long a request waits for a server that is away, from its first failure. Answers take any time.
    """

    def __init__(self, url: str, patience_s: float):
        super().__init__()
        self.url, self.patience_s, self.num_waits = masked(url), patience_s, 0
        self.mount(url, HTTPAdapter(pool_maxsize=AT_ONCE))
        if key := os.environ.get(KEY):
            self.headers["Authorization"] = f"Bearer {key}"

    def request(self, method, url, *args, **kwargs):
        """As in `requests`.

        Raises:
            ConnectionError: no answer in time, or one that is no success.
        """
        deadline, errors = None, 0
        while True:
            try:
                response = super().request(method, url, *args, **({"timeout": (10, None)} | kwargs))
            except requests.RequestException as error:
                reason = f"does not answer ({type(error).__name__}). Is it running? {HOW}"
                is_final = False
            else:
                if response.ok:
                    return response
                status, text = response.status_code, masked(response.text[:300])
                errors += status == 500
                is_final = status not in BUSY or errors > ERRORS
                reason = f"answers {status} to {urlsplit(url).path}: {text}. {HOW}"
                if status in (401, 403):
                    reason = f"does not take the key ({status}). Set {KEY} to what the server was started with"
            said = f"the vLLM server at {self.url} {reason}"
            if is_final or (deadline is not None and time.monotonic() >= deadline):
                raise ConnectionError(f"{said}; vllm_server_base_url says where.")
            if deadline is None:
                deadline, self.num_waits = time.monotonic() + self.patience_s, self.num_waits + 1
                warnings.warn(f"wait {self.num_waits}, at most {self.patience_s:g} s: {said}.", stacklevel=2)
            time.sleep(min(1.0, self.patience_s))


class ServerClient(VLLMClient):
    """TRL's client, which knows the server that it talks to.

    Raises:
        ConnectionError: no server, another key, or a server without what the weights need.
    """

    session: ServerSession

    def __init__(self, config: SAPOConfig):
        url = config.vllm_server_base_url or f"http://{config.vllm_server_host}:{config.vllm_server_port}"
        super().__init__(url.rstrip("/"), "", 0, config.vllm_group_port, config.vllm_server_timeout)
        told = self.get_server_info()
        self.dtype = told["model_config"]["dtype"].removeprefix("torch.")
        self.instance = told["instance_id"]  # another one after every start
        self.num_restarts = 0
        if told["model_config"]["logprobs_mode"] != "processed_logprobs" and config.temperature != 1:
            raise ConnectionError(
                f"the vLLM server at {self.session.url} gives log-probs before the temperature, which is "
                f"{config.temperature:g}. Start it with --logprobs-mode processed_logprobs."
            )
        self._check_transfer(told)

    def check_server(self, total_timeout: float = 0.0, retry_interval: float = 2.0) -> None:
        """Called by TRL before the first request: wait for the server, with a session of our own from here on."""
        self.session = ServerSession(self.base_url, total_timeout)
        self.session.get(f"{self.base_url}/v1/models")

    def generate(self, *args, **kwargs) -> dict[str, Any]:
        """TRL's; none of a server that started in between, whose weights are not the policy's."""
        return self._of_one_start(partial(super().generate, *args, **kwargs))

    def generate_seeded(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        limits: Sequence[int],
        generation_kwargs: dict[str, Any] | None = None,
        **sampling,
    ) -> dict[str, Any]:
        """The same with a seed and a limit of tokens for each prompt, which is a request of its own: all prompts of
        one request would be sampled with the same random numbers."""
        ask = super().generate

        def one(prompt: list[int], seed: int, limit: int) -> dict[str, Any]:
            options = {**(generation_kwargs or {}), "seed": seed}
            return ask([prompt], max_tokens=limit, generation_kwargs=options, **sampling)

        def every() -> list[dict[str, Any]]:
            with ThreadPoolExecutor(min(AT_ONCE, len(prompts))) as threads:
                return list(threads.map(one, prompts, seeds, limits))

        answers = self._of_one_start(every)
        return {name: [row for found in answers for row in found[name]] for name in answers[0]}

    def _of_one_start(self, generate: Callable[[], Any]) -> Any:
        for _ in range(RESTARTS + 1):
            found = generate()
            if not self._has_restarted():
                return found
            self._restore()
        raise ConnectionError(f"the vLLM server at {self.session.url} restarted {RESTARTS + 1} times in one rollout.")

    def update_named_params(self, metadata, named_params) -> None:
        """TRL's; a server that restarted would never join, and the trainer would wait."""
        if self._has_restarted():
            self._restore()
        super().update_named_params(metadata, named_params)

    def _has_restarted(self) -> bool:
        return self.get_server_info()["instance_id"] != self.instance

    def _check_transfer(self, told: dict[str, Any]) -> None:
        """Whether the server can take weights; NCCL is checked by TRL when it joins."""

    def _restore(self) -> None:
        raise ConnectionError(
            f"the vLLM server at {self.session.url} restarted: its weights are the first ones, and its NCCL group is "
            "gone. Go on with --resume_from_checkpoint true."
        )


class FolderClient(ServerClient):
    """Hands weights over by a folder that the server reads, and once more to a server that restarted.

    The folder is `vllm-weights` in the run's, with one file a tensor: as much disk as two copies of the weights.
    """

    def __init__(self, config: SAPOConfig):
        self.folder = config.folder.absolute() / "vllm-weights"
        shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was killed
        weakref.finalize(self, shutil.rmtree, self.folder, True)  # at the end of the run
        self.handed_over: Path | None = None
        super().__init__(config)

    def _check_transfer(self, told: dict[str, Any]) -> None:
        if told["parallel_config"]["worker_extension_cls"] != EXTENSION:
            raise ConnectionError(
                f"the vLLM server at {self.session.url} can't read weights from a folder, the way they take from a "
                f"CPU. Start it with --worker-extension-cls {EXTENSION}."
            )

    def init_communicator(self, device: torch.device | str | int = 0) -> None:
        """No group of processes is needed."""

    def update_named_params(self, metadata, named_params) -> None:
        """Write the (name, tensor) pairs, let the server load them, and remove those before."""
        new, old = self.folder / uuid.uuid4().hex, self.handed_over
        new.mkdir(parents=True)
        for i, (name, tensor) in enumerate(named_params):
            save_file({name: tensor.detach().cpu().contiguous()}, new / f"{i:06}.safetensors")
        self.handed_over = new
        self._load()
        if old is not None:
            shutil.rmtree(old)

    def _load(self) -> None:
        assert self.handed_over is not None
        self.instance = self.get_server_info()["instance_id"]  # before: one that starts while it loads is noticed
        body = {"method": "load_policy", "args": [str(self.handed_over)]}
        self.session.post(f"{self.base_url}/collective_rpc", json=body)

    def _restore(self) -> None:
        self.num_restarts += 1
        warnings.warn(
            f"the vLLM server at {self.session.url} restarted ({self.num_restarts} in this run): it gets the weights "
            "again, and the rollout is generated again.",
            stacklevel=2,
        )
        self._load()
        self.reset_prefix_cache()  # of the first weights; after an update TRL does it


def server_client(config: SAPOConfig) -> ServerClient | None:
    """The client of a run's server, made before a model loads; None without a server, and on all processes but one."""
    if not config.use_vllm or config.vllm_mode != "server" or config.process_index != 0:
        return None
    return FolderClient(config) if config.device.type == "cpu" else ServerClient(config)
