"""Processes that no longer hold the same parameters: noticed before the next optimizer step, and nothing is written."""

import json
from types import SimpleNamespace

import pytest
import torch
from processes import World, call

from sapo_trl.update.finite import DriftError, check_replicas, replica_checksum


def drifting(argv: list[str], folder: str, step: int) -> int:
    """`scripts/train.py` in which process 1 changes one bit of one parameter after a step."""
    import os
    import sys

    from transformers import TrainerCallback

    from sapo_trl import SAPOTrainer
    from sapo_trl.cli.train import main

    class Drift(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == step and os.environ["RANK"] == "1":
                bits = list(model.parameters())[4].detach().view(torch.int32).view(-1)
                bits[7] ^= -(2**31)  # the sign

    usual = SAPOTrainer.__init__

    def init(self, *args, **kwargs):
        usual(self, *args, **kwargs)
        self.add_callback(Drift())

    SAPOTrainer.__init__ = init
    sys.path.insert(0, folder)
    return main(argv)


@pytest.mark.parametrize(
    "step, told",
    [(3, "before optimizer step 4 process(es) 1 of 2"), (6, "before optimizer step 7")],
)
def test_one_changed_bit_on_one_of_two_processes(tmp_path, step, told):
    """Saves are at 2, 4 and 6. After the last step it is noticed before the model is written."""
    world = World(tmp_path / "world", per_device_train_batch_size=4, save_steps=2, max_steps=6)
    if step == 6:
        world.config |= {"save_strategy": "no", "save_steps": 500}
    world.run_folder.mkdir()
    (world.folder / "config.json").write_text("{}")
    path = world.folder / "config.yaml"
    path.write_text(json.dumps(world.config | {"output_dir": str(world.run_folder)}))  # JSON is YAML
    done = call("test_replicas", "drifting", ["--config", str(path)], str(world.folder), step, processes=2)
    assert [x.status for x in done] == [1, 1]
    for x in done:
        assert told in x.err and "hold other parameters than process 0: their updates have drifted apart" in x.err
        assert "Traceback" not in x.err
    assert world.checkpoints() == (["checkpoint-2"] if step == 3 else [])
    assert not (world.run_folder / "model.safetensors").exists()


TWO = SimpleNamespace(num_processes=2, device=torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_single_bit_changes_the_checksum(dtype):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3).to(dtype)
    size = model.weight.element_size()
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    bits = model.weight.detach().view(kind)
    before = float(replica_checksum(model, TWO))
    for place in range(8 * size):
        mask = -(2 ** (8 * size - 1)) if place == 8 * size - 1 else 2**place
        bits[1, 2] ^= mask
        assert float(replica_checksum(model, TWO)) != before, place
        bits[1, 2] ^= mask
    assert float(replica_checksum(model, TWO)) == before < 2**24


def test_one_process_needs_no_checksum():
    assert replica_checksum(torch.nn.Linear(2, 2), SimpleNamespace(num_processes=1, device="cpu")) == 0.0


def test_the_processes_that_differ_are_named():
    check_replicas([5.0, 5.0, 5.0], 3)
    with pytest.raises(DriftError, match=r"before optimizer step 3 process\(es\) 1, 3 of 4 hold other parameters"):
        check_replicas([5.0, 6.0, 5.0, 7.0], 3)
