"""What the client of a vLLM server asks and says, against a server of the test; a real one: `test_vllm_server.py`."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import sapo_config
from safetensors.torch import load_file
from trl.generation import vllm_client

from sapo_trl.rollout import server as module
from sapo_trl.rollout.server import EXTENSION, KEY, ServerClient, server_client
from sapo_trl.rollout.vllm_weights import PolicyWeights


class Fake(ThreadingHTTPServer):
    """Answers with the number of its start as token and log-prob, and knows which weights that start was given."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.starts, self.loaded, self.asked, self.fails, self.restarts_at = 1, {}, [], [], set()
        self.now = 0.0
        self.extension, self.logprobs_mode = EXTENSION, "processed_logprobs"
        self.url = f"http://127.0.0.1:{self.server_port}"

    def answer(self, path: str, body: dict) -> dict:
        self.asked.append(path)
        if len(self.asked) in self.restarts_at:
            self.starts += 1
        if path == "/v1/models":
            return {"data": [{"id": "m"}]}
        if path == "/server_info":
            model = {"dtype": "torch.float16", "logprobs_mode": self.logprobs_mode}
            told = {"instance_id": str(self.starts), "model_config": model}
            return {"vllm_config": told | {"parallel_config": {"worker_extension_cls": self.extension}}}
        if path == "/collective_rpc":
            assert body["method"] == "load_policy"
            self.loaded[self.starts] = body["args"][0]
        if path == "/v1/completions":
            self.now += 100  # longer than anybody waits for a server that is away
            logprobs = {"tokens": ["token_id:7"], "token_logprobs": [-self.starts], "top_logprobs": [None]}
            return {"choices": [{"prompt_token_ids": [1], "token_ids": [7], "logprobs": logprobs}]}
        return {"results": [None]}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, answer = 200, {"error": "no"}
        if self.headers.get("Authorization") != "Bearer right":
            status = 401
        elif self.server.fails:
            status = self.server.fails.pop(0)
        if status == 0:  # it ends while it generates
            self.server.now += 100
            return
        if status == 200:
            answer = self.server.answer(self.path.partition("?")[0], json.loads(body or b"{}"))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    do_POST = do_GET

    def log_message(self, *args):
        pass


def advance(server: Fake, seconds: float) -> None:
    server.now += seconds


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setenv(KEY, "right")
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda: True)
    with Fake() as server:
        clock = SimpleNamespace(monotonic=lambda: server.now, sleep=lambda seconds: advance(server, seconds))
        monkeypatch.setattr(module, "time", clock)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def config(tmp_path, url, **fields):
    fields = {"vllm_server_base_url": url, "vllm_server_timeout": 5.0} | fields
    return sapo_config(tmp_path, use_vllm=True, vllm_mode="server", **fields)


def test_weights_go_by_a_folder_and_again_to_a_server_that_restarted(tmp_path, fake):
    client = server_client(config(tmp_path, fake.url + "/"))
    assert client.dtype == "float16"
    head = torch.arange(6.0).view(2, 3).T  # not contiguous
    client.update_named_params(None, [("head", head), ("norm", torch.ones(2))])
    first = Path(fake.loaded[1])
    client.update_named_params(None, [("head", -head)])
    second = Path(fake.loaded[1])
    assert not first.exists() and [path.parent for path in second.iterdir()] == [second]
    assert load_file(next(second.iterdir()))["head"].equal(-head)
    fake.fails = [0, 503, 500]  # a server that ends; then one that has the first weights again
    fake.restarts_at = {len(fake.asked) + 1}
    with pytest.warns(UserWarning) as warned:
        found = client.generate([[1]])
    assert found["logprobs"] == [[[-2]]] and fake.loaded == {1: str(second), 2: str(second)} and fake.starts == 2
    assert fake.asked[-6:] == [
        "/server_info", "/server_info", "/collective_rpc", "/reset_prefix_cache", "/v1/completions", "/server_info",
    ]  # fmt: skip
    said = [str(one.message) for one in warned]
    assert said[0].startswith(f"wait 1, at most 5 s: the vLLM server at {fake.url} does not answer (ConnectionError).")
    assert f"the vLLM server at {fake.url} restarted (1 in this run)" in said[1] and len(said) == 2
    fake.restarts_at = set(range(len(fake.asked), len(fake.asked) + 40))
    with pytest.warns(UserWarning), pytest.raises(ConnectionError, match=f"{fake.url} restarted 4 times in one"):
        client.generate([[1]])


def test_over_nccl_a_restart_ends_the_run(tmp_path, fake):
    client = ServerClient(config(tmp_path, fake.url))
    assert client.generate([[1]])["completion_ids"] == [[7]]
    fake.starts = 2
    for call in (lambda: client.generate([[1]]), lambda: client.update_named_params([], [])):
        with pytest.raises(ConnectionError, match=rf"{fake.url} restarted: .*--resume_from_checkpoint true"):
            call()


def test_what_a_server_lacks_is_said_in_one_sentence(tmp_path, fake, monkeypatch):
    def refused(pattern, url=fake.url, **fields):
        with pytest.raises(ConnectionError, match=pattern) as error:
            server_client(config(tmp_path, url, **fields))
        assert "\n" not in str(error.value) and url in str(error.value) and "right" not in str(error.value)

    fake.fails = [404]
    refused("answers 404 to /v1/models: .*docs/engines.md")
    fake.fails = [500] * 4
    with pytest.warns(UserWarning, match="wait 1, at most 5 s"):
        refused("answers 500 to /v1/models")
    fake.logprobs_mode = "raw_logprobs"
    refused("before the temperature, which is 0.7. Start it with --logprobs-mode processed_logprobs", temperature=0.7)
    server_client(config(tmp_path, fake.url))
    fake.extension = ""
    refused("can't read weights from a folder.*--worker-extension-cls sapo_trl.rollout.vllm_weights.PolicyWeights")
    monkeypatch.setenv(KEY, "the wrong one")
    refused(r"does not take the key \(401\). Set VLLM_API_KEY")
    with pytest.warns(UserWarning, match="wait 1, at most 0.1 s"):
        refused("does not answer .*Is it running", url="http://127.0.0.1:9", vllm_server_timeout=0.1)


def test_only_the_first_process_has_a_client(tmp_path, fake):
    assert server_client(sapo_config(tmp_path)) is None
    assert server_client(sapo_config(tmp_path, use_vllm=True)) is None
    assert server_client(SimpleNamespace(use_vllm=True, vllm_mode="server", process_index=1)) is None


def test_the_extension_is_found_by_its_name():
    assert f"{PolicyWeights.__module__}.{PolicyWeights.__qualname__}" == EXTENSION
