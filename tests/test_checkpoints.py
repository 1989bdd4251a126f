"""A resumed run continues with the parameters that were saved, experts included, or stops and says why not."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import length_reward, prompts, sapo_config, sapo_trainer, tiny_model
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

from sapo_trl import SAPOTrainer
from sapo_trl.checkpoints import weights as checkpoints
from sapo_trl.checkpoints.folder import publish, read_manifest, staging_of
from sapo_trl.checkpoints.resume import checkpoint_of
from sapo_trl.checkpoints.weights import HASH_FILE, compare_hash, load_weights, parameter_hash

FIELDS = {"learning_rate": 1e-2, "router_aux_loss_coef": 0.0, "logging_steps": 1, "num_mini_batches": 2}
SAVING = FIELDS | {"save_strategy": "steps", "save_steps": 2}


class AtStep(TrainerCallback):
    """Parameters when training starts (after a resume) and at each step."""

    def __init__(self):
        self.at = {}

    def keep(self, step, model):
        self.at[step] = {name: p.detach().clone() for name, p in model.named_parameters()}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.keep("begin", model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.keep(state.global_step, model)


def differing(a: dict, b: dict) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]


@pytest.fixture(scope="module")
def moe_run(tmp_path_factory, tokenizer):
    """(folder, parameters at each step) of a tiny Qwen3-MoE trained for 4 steps, saved at 2 and 4."""
    folder, seen = tmp_path_factory.mktemp("moe"), AtStep()
    model = tiny_model(tokenizer, moe=True)
    sapo_trainer(folder, tokenizer, model, max_steps=4, callbacks=[seen], **SAVING).train()
    return folder, seen.at


def reshard(folder, model) -> None:
    """The same weights as one file per 20 kB, with an index."""
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3 and not (folder / "model.safetensors").exists()


def signed_again(folder) -> None:
    """A manifest for files that a test has changed."""
    facts = {name: value for name, value in read_manifest(folder).items() if name not in ("files", "sha256", "format")}
    publish(folder.rename(staging_of(folder)), folder, facts)


@pytest.mark.parametrize("kind", ["one file", "shards"])
def test_a_resumed_moe_has_its_trained_experts(tmp_path, tokenizer, moe_run, kind):
    folder, at = moe_run
    start = tiny_model(tokenizer, moe=True)
    base = {name: p.detach().clone() for name, p in start.named_parameters()}
    experts = [name for name in base if ".experts." in name]
    assert len(experts) == 4 and set(experts) <= set(differing(base, at[2]))  # training moved every one of them
    checkpoint = shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    if kind == "shards":
        load_weights(start, checkpoint)
        reshard(checkpoint, start)
        signed_again(checkpoint)
    resumed = AtStep()
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer, True), max_steps=4, callbacks=[resumed], **SAVING)
    Trainer._load_from_checkpoint(trainer, str(checkpoint))  # what happens without this project's loader
    reverted = dict(trainer.model.named_parameters())
    assert differing(at[2], reverted) == experts and not set(experts) & set(differing(base, reverted))
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert differing(resumed.at["begin"], at[2]) == []
    assert set(experts) <= set(differing(resumed.at[4], at[2]))  # and they train on


def test_the_best_model_comes_back_with_its_experts(tmp_path, tokenizer):
    """The first checkpoint is the best: at the end of training the model has its parameters again."""
    seen = AtStep()
    fields = SAVING | {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    fields |= {"metric_for_best_model": "score", "greater_is_better": True, "eval_dataset": prompts(4)}
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer, True), max_steps=4, callbacks=[seen], **fields)
    trainer._evaluate = lambda *_: {"eval_score": 1 / trainer.state.global_step}
    trainer.train()
    assert trainer.state.best_global_step == 2 and differing(seen.at[2], seen.at[4])
    assert differing(seen.at[2], dict(trainer.model.named_parameters())) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "bfloat16 with a float32 head"])
def test_loading_is_exact_in_every_type(tmp_path, tokenizer, dtype):
    model = tiny_model(tokenizer, moe=True)
    model.to(dtype if isinstance(dtype, torch.dtype) else torch.bfloat16)
    if isinstance(dtype, str):
        model.lm_head.float()
        model.lm_head.weight.data += 1e-4  # not a bfloat16 number
    model.save_pretrained(tmp_path)
    saved, before = parameter_hash(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    objects = [id(p) for p in model.parameters()]
    for p in model.parameters():
        p.data.mul_(1.5)
    assert parameter_hash(model) != saved
    load_weights(model, tmp_path)
    assert parameter_hash(model) == saved and differing(before, dict(model.named_parameters())) == []
    assert objects == [id(p) for p in model.parameters()]  # the optimizer's references stay good


class Two(torch.nn.Module):
    def __init__(self, dtype=torch.float32, shape=(2, 3), names=("a", "b")):
        super().__init__()
        for name in names:
            self.register_parameter(name, torch.nn.Parameter(torch.full(shape, 1.5, dtype=dtype)))


def test_the_hash_is_of_names_types_shapes_and_bytes():
    """Against the same bytes put together by hand."""
    data = torch.full((6,), 1.5).numpy().tobytes()
    expected = hashlib.sha256(b"a torch.float32 (2, 3)\n" + data + b"b torch.float32 (2, 3)\n" + data).hexdigest()
    assert parameter_hash(Two()) == expected == parameter_hash(Two(names=("b", "a")))
    others = [Two(torch.bfloat16), Two(shape=(3, 2)), Two(names=("a", "c"))]
    one_bit = Two()
    one_bit.b.data[1, 2] = 1.5000001
    hashes = {parameter_hash(model) for model in [*others, one_bit]}
    assert len(hashes) == 4 and expected not in hashes


def test_processes_that_drifted_apart_are_noticed_at_the_save(tmp_path, monkeypatch):
    state = SimpleNamespace(is_main_process=True, num_processes=2, process_index=1)
    monkeypatch.setattr(checkpoints, "gather_object", lambda mine: [*mine, "0" * 64])
    with pytest.raises(RuntimeError, match="2 processes hold different parameters"):
        checkpoints.save_hash(Two(), tmp_path, state)
    assert not (tmp_path / HASH_FILE).exists()
    monkeypatch.setattr(checkpoints, "gather_object", lambda mine: mine * 2)
    checkpoints.save_hash(Two(), tmp_path, state)
    assert "equal those saved" in compare_hash(Two(), tmp_path, state)
    with pytest.raises(ValueError, match="process 1 has"):
        compare_hash(Two(torch.bfloat16), tmp_path, state)
    monkeypatch.setattr(checkpoints, "is_sharded", lambda model: True)
    assert "NOT compared: hashed as whole tensors, now on 2 process" in compare_hash(Two(), tmp_path, state)


def edit(path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.layers.1.self_attn.q_proj.weight"), "1 missing_keys .*layers.1.self_attn.q_proj"),
        (lambda t: t.update(stray=torch.ones(2)), r"1 unexpected_keys \(stray\)"),
        (
            lambda t: t.pop("model.layers.0.mlp.experts.3.up_proj.weight"),
            "could not be converted to Qwen3Moe",
        ),
    ],
    ids=["missing", "unexpected", "one expert missing"],
)
def test_loading_is_strict(tmp_path, tokenizer, change, message):
    model = tiny_model(tokenizer, moe=True)
    model.save_pretrained(tmp_path)
    edit(tmp_path / "model.safetensors", change)
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path)


def test_changed_parameters_are_noticed(tmp_path, tokenizer, moe_run, capsys):
    checkpoint = shutil.copytree(moe_run[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    model = tiny_model(tokenizer, moe=True)
    trainer = sapo_trainer(tmp_path, tokenizer, model, max_steps=4, **SAVING)
    load_weights(trainer.model, checkpoint)
    assert "equal those saved" in compare_hash(trainer.model, checkpoint, trainer.accelerator)
    edit(checkpoint / "model.safetensors", lambda t: t["lm_head.weight"][0].add_(1e-3))
    with pytest.raises(ValueError, match=r"model.safetensors is damaged: its sha256 is not the one in manifest.json"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    signed_again(checkpoint)
    saved = json.loads((checkpoint / HASH_FILE).read_text())["hashes"][0]
    with pytest.raises(ValueError, match=rf"{HASH_FILE} says {saved}, process 0 has [0-9a-f]{{64}}"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / HASH_FILE).unlink()
    assert "NOT compared" in compare_hash(trainer.model, checkpoint, trainer.accelerator)


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("optimizer.pt", None),
        ("optimizer.pt", 500),
        ("model.safetensors", 3000),
        ("model.safetensors", None),
        ("trainer_state.json", 40),
        ("rng_state.pth", None),
        ("manifest.json", 40),
        ("model-00002-of-00010.safetensors", None),
    ],
)
def test_a_torn_checkpoint_names_the_file(tmp_path, tokenizer, moe_run, name, cut):
    checkpoint = shutil.copytree(moe_run[0] / "checkpoint-4", tmp_path / "checkpoint-4")
    shutil.copytree(moe_run[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    if name.startswith("model-"):
        reshard(checkpoint, tiny_model(tokenizer, moe=True))
        signed_again(checkpoint)
    assert checkpoint_of(str(checkpoint), tmp_path) == (checkpoint, [])
    path = checkpoint / name
    path.write_bytes(path.read_bytes()[:cut]) if cut else path.unlink()
    with pytest.raises(
        ValueError, match=rf"{name} (is missing|is damaged|has {cut} bytes).*Resume from .*checkpoint-2"
    ):
        checkpoint_of(str(checkpoint), tmp_path)
    folder, notes = checkpoint_of("latest", tmp_path)
    assert folder == tmp_path / "checkpoint-2" and notes[0].startswith("skipped checkpoint-4: ") and name in notes[0]


def test_lora_on_experts_trains_and_resumes(tmp_path, tokenizer):
    """Adapters on the fused expert tensors under routing replay, and a KL reference that is an adapter as well."""

    def trainer(steps, seen):
        return SAPOTrainer(
            tiny_model(tokenizer, moe=True),
            length_reward,
            sapo_config(tmp_path, max_steps=steps, algorithm="grpo-r2", beta=0.01, **SAVING),
            prompts(),
            processing_class=tokenizer,
            callbacks=[seen],
            peft_config=LoraConfig(
                r=2,
                target_modules=["q_proj"],
                target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            ),
        )

    seen, resumed = AtStep(), AtStep()
    trainer(3, seen).train()
    moved = differing(seen.at["begin"], seen.at[3])
    assert all(".lora_" in name for name in moved)
    assert sum(".experts." in name for name in moved) == 2 * 2 * 2  # layers x parameters x (A, B)
    again = trainer(3, resumed)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert differing(resumed.at["begin"], seen.at[2]) == []
    assert differing(resumed.at[3], seen.at[2])


@pytest.fixture(scope="module")
def zero_3(tmp_path_factory):
    """Results of `launch/checkpoint_worker.py` by kind."""
    launch, output = Path(__file__).parent / "launch", tmp_path_factory.mktemp("zero_3")
    command = ["accelerate.commands.launch", "--config_file", str(launch / "zero3.yaml"), "--main_process_port", "0"]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(launch / "checkpoint_worker.py"), str(output), "full,lora"],
        capture_output=True, text=True, timeout=400, env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {kind: json.loads((output / f"{kind}.json").read_text()) for kind in ("full", "lora")}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_zero_3_processes_get_their_experts_back(zero_3, kind):
    """DeepSpeed's own loader, hashes over shards, Mixture-of-Experts blocks as leaf modules."""
    result = zero_3[kind]
    assert (result["stage"], result["processes"], result["leaves"]) == (3, 2, ["Qwen3MoeSparseMoeBlock"] * 2)
    assert result["hash"]["sharded"] and len(set(result["hash"]["hashes"])) == 2
    moved = result["differences"]
    assert len(moved["begin 2"]) == (4 if kind == "full" else 8)  # layers x tensors, twice that for A and B
    assert min(moved["begin 2"] + moved["2 3"]) > 1e-4 and set(moved["2 reloaded"]) == {0.0}
