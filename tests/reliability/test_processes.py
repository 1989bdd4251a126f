"""Processes that do not belong together are refused before a model loads, by every one of them, in one sentence."""

import json
import os

import pytest
from processes import World, call

from sapo_trl.processes import Facts, difference


def each_its_own(paths: list[str], folder: str) -> int:
    """`sapo-trl train` with the config of this process."""
    import sys

    import sapo_trl.processes
    from sapo_trl.cli.train import main

    sapo_trl.processes.SECONDS = 1.0
    sys.path.insert(0, folder)
    return main(["--config", paths[int(os.environ["RANK"])]])


CASES = [
    ({"learning_rate": 0.02}, "has learning_rate=0.02, and process 0 on"),
    ({"output_dir": "elsewhere"}, "does not see the output_dir"),
    ({"max_samples": 32}, "has dataset=32 rows"),
]


@pytest.mark.parametrize("fields, told", CASES, ids=[next(iter(fields)) for fields, _ in CASES])
def test_two_processes(tmp_path, fields, told):
    world = World(tmp_path / "world", per_device_train_batch_size=4, output_dir=str(tmp_path / "run"))
    (tmp_path / "world/model/model.safetensors").unlink()  # so loading it would be another error
    paths = []
    for rank, more in enumerate(({}, fields)):
        more = {name: str(tmp_path / x) if name == "output_dir" else x for name, x in more.items()}
        paths.append(str(tmp_path / f"{rank}.yaml"))
        (tmp_path / f"{rank}.yaml").write_text(json.dumps(world.config | more))  # JSON is YAML
    done = call("test_processes", "each_its_own", paths, str(world.folder), processes=2)
    assert [x.status for x in done] == [1, 1]
    for x in done:
        assert x.err.splitlines()[-1].startswith("error: process 1 on ") and told in x.err, x.err[-2000:]
    assert not list(tmp_path.glob("*/.seen*"))


def facts(host="a", device="cuda:0", **settings) -> Facts:
    return Facts(host, device, {"torch": "2.13.0", "learning_rate": 1e-6} | settings, "")


@pytest.mark.parametrize(
    "others, told",
    [
        ([facts(device="cuda:1"), facts("b"), facts("b", "cuda:1")], ""),
        ([facts("b", torch="2.12.0")], "process 1 on b has torch=2.12.0, and process 0 on a has 2.13.0. Install"),
        ([facts("b", deepspeed="0.19.8")], "process 1 on b has deepspeed=0.19.8, and process 0 on a has none"),
        ([facts("b"), facts()], "process 2 on a and process 0 both use cuda:0"),
        ([facts(device="cpu"), facts(device="cpu")], ""),
    ],
)  # fmt: skip
def test_differences(others, told):
    message = difference([facts(), *others])
    assert message.startswith(told) and bool(message) == bool(told)
