"""The Slurm scripts, run with stand-ins for Slurm's commands and the launchers."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "scontrol": 'echo "scontrol $*" >> said; [ "$1" = requeue ] || printf "node7\\nnode9\\n"',
    # two machines, one after the other; the second job step is told to end by scancel
    "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || exit $?; done',
    "scancel": 'echo "scancel $*" >> said; touch signalled',
    "accelerate": 'printf "%s|" accelerate "$@" >> said; echo >> said; kill -USR1 $$; ' + "{then}",
    "trl": 'echo "trl $*" >> said',
}


def start(tmp_path, script: str, *words: str, then: str = "exit 0") -> subprocess.Popen:
    (tmp_path / "bin").mkdir()
    for name, text in COMMANDS.items():
        path = tmp_path / "bin" / name
        path.write_text("#!/usr/bin/env bash\n" + text.replace("{then}", then) + "\n")
        path.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "node[7,9]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    env = os.environ | slurm | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    return subprocess.Popen(["bash", str(ROOT / "scripts/slurm" / script), *words], cwd=tmp_path, env=env)


def said(tmp_path) -> list[str]:
    return (tmp_path / "said").read_text().splitlines()


def test_one_launcher_on_each_machine(tmp_path):
    """The launchers live on after SIGUSR1, which the stand-in sends itself. Words with spaces stay whole."""
    assert start(tmp_path, "train.sbatch", "--config", "my file.yaml").wait(30) == 0
    lines = said(tmp_path)
    expected = "accelerate|launch|--config_file|configs/accelerate/zero3-multinode.yaml|--num_machines|2|"
    expected += "--num_processes|16|--machine_rank|{}|--main_process_ip|node7|--main_process_port|21234|-m|sapo_trl|"
    expected += "train|--config|my file.yaml|--resume_from_checkpoint|latest|"
    assert lines == ["scontrol show hostnames node[7,9]", expected.format(0), expected.format(1)]


@pytest.mark.parametrize("status", [0, 3])
def test_the_status_is_that_of_the_training(tmp_path, status):
    assert start(tmp_path, "train.sbatch", then=f"exit {status}").wait(30) == status
    assert not any("requeue" in line for line in said(tmp_path))


def test_near_the_time_limit_the_run_saves_and_is_queued_again(tmp_path):
    job = start(
        tmp_path, "train.sbatch", then="until [ -e signalled ]; do sleep 0.05; done; sleep 0.3; echo saved >> said"
    )
    until = time.monotonic() + 30
    while not (tmp_path / "said").exists() or len(said(tmp_path)) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 0
    lines = said(tmp_path)
    assert lines[2] == "scancel --signal=USR1 41234" and "saved" in lines and lines[-1] == "scontrol requeue 41234"


def test_the_server(tmp_path):
    assert start(tmp_path, "vllm.sbatch", "Qwen/Qwen3-8B", "--dtype", "bfloat16").wait(30) == 0
    words = "--tensor_parallel_size 8 --host 0.0.0.0 --port 8000 --dtype bfloat16"
    assert said(tmp_path) == [f"trl vllm-serve --model Qwen/Qwen3-8B {words}"]


def test_the_dockerfile_copies_what_is_there():
    lines = [line.split() for line in (ROOT / "Dockerfile").read_text().splitlines()]
    sources = [word for line in lines if line[:1] == ["COPY"] for word in line[1:-1]]
    assert {"constraints.txt", "pyproject.toml", "configs", "sapo_trl"} <= set(sources)
    assert all((ROOT / source).exists() for source in sources)
