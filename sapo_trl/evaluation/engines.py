"""Engines of an evaluation besides transformers' generate: vLLM in this process, and a server over HTTP.

An engine is called with prompts, a number of samples and a seed (`samples.Engine`); here it is the last three arguments
of a function whose others `functools.partial` fills.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from sapo_trl.evaluation.sampling import Completion, Prompt
from sapo_trl.files import masked
from sapo_trl.model import render

RETRIES = 5  # of one request, after 1, 2, 4, 8 and 16 seconds
TIMEOUT_S = 3600.0  # of one request: a long completion on a busy server
BUSY = (408, 429, 500, 502, 503, 504)  # HTTP statuses that are worth another try


def load_vllm(model: str, seed: int = 0) -> Any:
    """A vLLM engine in this process, in the checkpoint's number format: vLLM by itself serves float32 in bfloat16.

    Raises:
        ValueError: vLLM is not installed.
    """
    try:
        from vllm import LLM  # ty: ignore[import-not-found]  (an extra)
    except ImportError as error:
        raise ValueError(
            f"--engine vllm: vLLM can't be imported ({error}). pip install -e '.[vllm]', or --engine transformers."
        ) from error
    own = AutoConfig.from_pretrained(model).dtype
    arguments = {"dtype": str(own).removeprefix("torch.")} if own is not None else {}
    # on a CPU compiling takes minutes
    return LLM(model=model, seed=seed, enforce_eager=not torch.cuda.is_available(), **arguments)


def _named(max_new_tokens: int = 256, temperature: float = 1.0, top_p: float = 1.0) -> dict[str, Any]:
    """How vLLM and OpenAI's interface name what `sample_completions` takes, with the same defaults."""
    return {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}


def sample_with_vllm(
    llm: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    num_samples: int = 1,
    seed: int = 0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **sampling: Any,
) -> list[list[Completion]]:
    """`num_samples` completions of each prompt; given parameters keep vLLM from the model's own generation config."""
    from vllm import SamplingParams  # ty: ignore[import-not-found]

    # The chat template already holds the special tokens.
    texts = [render(tokenizer, prompt, chat_template_kwargs) for prompt in prompts]
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    shared = _named(**sampling) | {"n": num_samples}
    params = [SamplingParams(seed=seed + i, **shared) for i in range(len(rows))]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in rows], params)
    # decoded here: vLLM's text leaves out the beginning of a character whose end was cut
    return [
        [
            Completion(
                str(tokenizer.decode(list(x.token_ids), skip_special_tokens=True)),
                len(x.token_ids), x.finish_reason == "length", tuple(x.token_ids),
            )
            for x in output.outputs
        ]
        for output in outputs
    ]  # fmt: skip


def sample_from_server(
    base_url: str,
    model: str,
    prompts: Sequence[Prompt],
    num_samples: int = 1,
    num_connections: int = 64,
    seed: int = 0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **sampling: Any,
) -> list[list[Completion]]:
    """`num_samples` completions of each prompt from a server that speaks OpenAI's HTTP interface.

    One request per sample, so that each has its own seed and length; `OPENAI_API_KEY` is sent where it is set. What a
    request leaves out the server decides: start vLLM with `--generation-config vllm`, or it cuts to the model's top_k.
    `chat_template_kwargs` is sent with chat messages, under that name: vLLM and SGLang read it.

    Raises:
        ConnectionError: no answer, or none of this interface, with the URL.
    """
    shared = _named(**sampling) | {"model": model}
    of_chat = {"chat_template_kwargs": dict(chat_template_kwargs)} if chat_template_kwargs else {}

    def one(number: int) -> Completion:
        prompt = prompts[number // num_samples]
        is_text = isinstance(prompt, str)
        url = f"{base_url.rstrip('/')}/{'completions' if is_text else 'chat/completions'}"
        body = shared | {"prompt" if is_text else "messages": prompt, "seed": (seed + number) % 2**31}
        body |= {} if is_text else of_chat
        answer = _post(url, body)
        try:
            choice = answer["choices"][0]
            text = choice["text"] if is_text else choice["message"]["content"]
            return Completion(text or "", answer["usage"]["completion_tokens"], choice["finish_reason"] == "length")
        except (KeyError, IndexError, TypeError) as error:
            raise ConnectionError(f"{url} answered without choices or usage: {str(answer)[:200]}") from error

    with ThreadPoolExecutor(num_connections) as threads:
        flat = list(threads.map(one, range(len(prompts) * num_samples)))
    return [flat[first : first + num_samples] for first in range(0, len(flat), num_samples)]


def _post(url: str, body: dict[str, Any]) -> Any:
    """The JSON that a server answers; tried again where it is busy or does not answer."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    for retry in range(RETRIES + 1):
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            reason, is_final = f"{error} {_said(error)}".strip(), error.code not in BUSY
        except http.client.InvalidURL as error:
            reason, is_final = str(error), True
        except (OSError, ValueError, http.client.HTTPException) as error:  # such as an answer that was cut
            reason, is_final = str(error) or type(error).__name__, False
        if is_final or retry == RETRIES:
            break
        time.sleep(2.0**retry)
    raise ConnectionError(masked(f"the server at {url} can't be used: {reason}. Check --base_url and --model."))


def _said(error: urllib.error.HTTPError) -> str:
    """The beginning of what came with a status, which may be cut too."""
    try:
        return error.read(300).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""
