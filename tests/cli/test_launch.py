"""The accelerate file: what the launcher would ignore, replace or fail on later is one sentence of check.py."""

import json

import pytest
import yaml
from test_cli import ROOT

from sapo_trl.cli import check, train
from sapo_trl.cli.launch import read_launch

RECIPE = ["--config", str(ROOT / "configs/qwen3-8b/sapo.yaml")]
ZERO3 = yaml.safe_load((ROOT / "configs/accelerate/zero3.yaml").read_text())
DDP = yaml.safe_load((ROOT / "configs/accelerate/ddp.yaml").read_text())
SECTION = ZERO3["deepspeed_config"]


def zero(**changed) -> dict:
    """The ZeRO-3 file with another DeepSpeed section."""
    return ZERO3 | {"deepspeed_config": {name: x for name, x in (SECTION | changed).items() if x != "gone"}}


FILE_DECIDES = dict.fromkeys(
    ("zero_stage", "offload_optimizer_device", "offload_param_device", "zero3_save_16bit_model"), "gone"
)
REFUSED = [
    (DDP | {"num_proceses": 8}, "unknown key 'num_proceses'. Did you mean 'num_processes'?"),
    (DDP | {"num_processes": "8"}, "num_processes: '8' is a str, and int is needed"),
    (DDP | {"num_processes": True}, "num_processes: True is a bool, and int is needed"),
    (DDP | {"use_cpu": "no"}, "use_cpu: 'no' is a str, and bool is needed"),
    (DDP | {"distributed_type": False}, "distributed_type: False is not one of NO, MULTI_GPU, DEEPSPEED, FSDP. Set"),
    (DDP | {"distributed_type": "MULTI_CPU"}, "'MULTI_CPU' is not one of NO, MULTI_GPU, DEEPSPEED, FSDP. Did you mean"),
    (DDP | {"distributed_type": "DEEPSPED"}, "Did you mean 'DEEPSPEED'?"),
    (DDP | {"mixed_precision": False}, "mixed_precision: False is not one of no, fp16, bf16, fp8. Set it in quotes"),
    (DDP | {"mixed_precision": "bf17"}, "Did you mean 'bf16'?"),
    (DDP | {"mixed_precision": "fp16"}, "mixed_precision: fp16 contradicts bf16=True, fp16=False of the config"),
    (DDP | {"num_processes": 7, "num_machines": 2}, "num_processes: 7 is no multiple of num_machines: 2"),
    (DDP | {"num_processes": 0}, "num_processes: 0 is no multiple of num_machines: 1, both at least 1"),
    (DDP | {"machine_rank": 1}, "machine_rank: 1 is not below num_machines: 1"),
    (DDP | {"num_machines": 2}, "num_machines: 2 needs main_process_ip"),
    (DDP | {"distributed_type": "NO"}, "distributed_type: NO starts one process, not num_processes: 8"),
    ({k: x for k, x in DDP.items() if k != "num_processes"}, "num_processes is missing"),
    ({k: x for k, x in DDP.items() if k != "distributed_type"}, "distributed_type is missing"),
    (DDP | {"deepspeed_config": SECTION}, "deepspeed_config has no effect with distributed_type: MULTI_GPU"),
    (DDP | {"deepspeed_config": [3]}, "deepspeed_config: [3] is a list, and dict is needed"),
    (DDP | {"distributed_type": "DEEPSPEED"}, "distributed_type: DEEPSPEED needs deepspeed_config"),
    (DDP | {"distributed_type": "FSDP", "fsdp_config": {"offload_params": False}}, "only fsdp_version: 2"),
    (DDP | {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 3}}, "fsdp_version: 3 is not one of 1, 2"),
    (ZERO3 | {"use_cpu": True}, "with use_cpu: true accelerate runs plain DDP instead of DEEPSPEED"),
    (zero(zero_stagee=3), "unknown key 'zero_stagee', which the launcher would ignore. Did you mean 'zero_stage'?"),
    (zero(zero_stage="3"), "deepspeed_config: zero_stage: '3' is a str, and int is needed"),
    (zero(zero_stage=1), "zero_stage: 1 is not one of 2, 3"),
    (zero(gradient_accumulation_steps=3), "gradient_accumulation_steps: 3 contradicts gradient_accumulation_steps="),
    (zero(gradient_clipping=7.0), "gradient_clipping: 7.0 contradicts max_grad_norm="),
    (zero(deepspeed_config_file="ds.json"), "zero_stage, offload_optimizer_device, offload_param_device, zero3_save"),
    (
        {k: x for k, x in zero(**FILE_DECIDES, deepspeed_config_file="nowhere/ds.json").items() if "mixed" not in k},
        "deepspeed_config_file nowhere/ds.json does not exist",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("launch", "told"), REFUSED, ids=[told[:40] for _, told in REFUSED])
def test_check_refuses(launch, told, tmp_path, capsys):
    path = tmp_path / "launch.yaml"
    path.write_text(yaml.safe_dump(launch))
    assert check.main([*RECIPE, "--config_file", str(path)]) == 1
    errors = capsys.readouterr().err
    assert told in errors.splitlines()[-1] and errors.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("configs/accelerate/*.yaml"), *ROOT.glob("tests/launch/*.yaml")]), ids=lambda x: x.name
)
def test_every_file_that_is_used_here_is_passed(path):
    assert read_launch(str(path), None)["distributed_type"] in ("NO", "MULTI_GPU", "DEEPSPEED", "FSDP")


def test_a_deepspeed_file_of_its_own(tmp_path, capsys):
    inner, path = tmp_path / "ds.json", tmp_path / "launch.yaml"
    launch = zero(**FILE_DECIDES, deepspeed_config_file=str(inner))
    del launch["mixed_precision"]
    path.write_text(yaml.safe_dump(launch))
    inner.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    assert check.main([*RECIPE, "--config_file", str(path)]) == 0
    assert "8 GPU(s) with 80 GiB, zero3" in capsys.readouterr().out
    inner.write_text("{}")
    assert check.main([*RECIPE, "--config_file", str(path)]) == 1
    assert "is no JSON with zero_optimization.stage" in capsys.readouterr().err


@pytest.mark.parametrize(("processes", "status"), [(1, 1), (2, 0)])
def test_processes_count_in_the_batch_arithmetic(processes, status, tmp_path, capsys):
    path, words = tmp_path / "launch.yaml", ["--num_generations", "32", "--per_device_train_batch_size", "4"]
    path.write_text(yaml.safe_dump(DDP | {"num_processes": processes}))
    words += ["--gradient_accumulation_steps", "1", "--config_file", str(path)]
    assert check.main([*RECIPE, *words]) == status
    told = capsys.readouterr().err
    assert ("num_generations=32 does not divide the rollout of 16 completions" in told) == (status == 1)


def test_the_command_line_wins(tmp_path):
    path = tmp_path / "launch.yaml"
    path.write_text(yaml.safe_dump(DDP | {"num_processes": -1}))
    assert read_launch(str(path), 4)["num_processes"] == 4


def test_training_refuses_the_launchers_precision_too(monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert train.main(["--config", str(ROOT / "configs/tiny/sapo.yaml")]) == 1
    assert "accelerate's mixed_precision: bf16 contradicts bf16=False, fp16=False" in capsys.readouterr().err
