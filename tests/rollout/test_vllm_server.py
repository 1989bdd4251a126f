"""A real `vllm serve` on a CPU (`make test-vllm`): a run through a server that is killed and starts again."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import prompts, sapo_config
from test_vllm_engine import APART, CLOSE, ENV, ROLLOUTS, ROOT
from vllm_worker import AHEAD, Measured, build

from sapo_trl.rollout.server import EXTENSION, KEY
from sapo_trl.tiny import build_tokenizer

pytestmark = pytest.mark.vllm

SECRET = "a key of the test"
# vLLM's build for CPUs is another distribution, and its command asks for the version of the usual one
METADATA = "Metadata-Version: 2.1\nName: vllm\nVersion: 0.30.0+cpu\n"


class Server:
    """`vllm serve` of a model, in a process group of its own."""

    def __init__(self, folder: Path, model: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log, self.process = f"http://127.0.0.1:{self.port}", folder / "server.log", None
        alias = folder / "alias/vllm-0.30.0+cpu.dist-info"
        alias.mkdir(parents=True)
        (alias / "METADATA").write_text(METADATA)
        self.command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, "--host", "127.0.0.1"]
        self.command += ["--port", str(self.port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "64"]
        self.command += ["--logprobs-mode", "processed_logprobs", "--worker-extension-cls", EXTENSION]
        self.command += ["--distributed-executor-backend", "uni"]  # starts sooner, with the next variable
        paths = os.pathsep.join([str(alias.parent), str(ROOT)])
        self.env = os.environ | ENV | {"PYTHONPATH": paths, "VLLM_SERVER_DEV_MODE": "1", KEY: SECRET}
        self.env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command, env=self.env, stdout=log, stderr=log, start_new_session=True, cwd=self.log.parent
            )

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def server(tmp_path):
    found = Server(tmp_path, build("server", tmp_path / "model", build_tokenizer()))
    found.start()
    yield found
    found.kill()


def trainer(tmp_path, url, **given):
    fields = {"on_collapse": "stop", "engine_check_every": 1}
    fields |= {"num_mini_batches": 2, "max_steps": 6, "logging_steps": 1, "learning_rate": 1e-2}
    fields |= {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url, "lr_scheduler_type": "constant"}
    config = sapo_config(tmp_path / "run", **(fields | given))
    reward = lambda completions, completion_ids, **_: [float(sum(ids) % 3) for ids in completion_ids]  # noqa: E731
    model = str(tmp_path / "model")
    return Measured(model, reward, config, prompts(), processing_class=build_tokenizer())


def test_a_run_survives_the_end_of_its_server(tmp_path, server, monkeypatch, capsys):
    """A tied head and experts, and a server that is killed between a sync and the rollout after it."""
    monkeypatch.setenv(KEY, "another")
    with pytest.raises(ConnectionError, match=rf"at {server.url} does not take the key \(401\). Set VLLM_API_KEY"):
        trainer(tmp_path, server.url)  # it waits until the server is there
    monkeypatch.setenv(KEY, SECRET)
    run = trainer(tmp_path, server.url)
    assert "vLLM server, float32 (its --dtype); weights by a folder" in capsys.readouterr().out
    client, load, syncs = run.vllm_generation.vllm_client, run.vllm_generation.sync_weights, []

    def sync():
        load()
        syncs.append(len(list(client.folder.iterdir())))
        if len(syncs) == 2:
            server.kill()
            server.start()

    run.vllm_generation.sync_weights = sync
    with pytest.warns(UserWarning, match=rf"server at {server.url} restarted \(1 in this run\)"):
        run.train()
    assert syncs == [1] * ROLLOUTS and client.num_restarts == 1  # one copy of the weights stays for the next start
    assert len(run.gaps) == ROLLOUTS and all(gap["now"] < CLOSE and gap["tokens"] > 50 for gap in run.gaps)
    assert all(gap["before"] > APART for gap in run.gaps[1:])
    log = [record for record in run.state.log_history if "loss" in record]
    assert max(record["sampling/engine_check"] for record in log if "sampling/engine_check" in record) < 1
    ahead = trainer(tmp_path, server.url, on_collapse="none", **AHEAD)
    ahead.train()
    assert [gap["step"] for gap in ahead.gaps] == [0, 0, 2]
    assert all(gap["now"] < CLOSE and gap["tokens"] > 50 for gap in ahead.gaps)
    assert all(gap["before"] > APART for gap in ahead.gaps[1:])
    groups = [ahead.completions[i : i + 4] for i in range(0, len(ahead.completions), 4)]  # of one prompt
    assert all(len({str(ids) for ids in group}) > 1 for group in groups)
    assert all(SECRET.encode() not in path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
