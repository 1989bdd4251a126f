"""A number that is not finite never reaches the weights: the step is skipped everywhere, counted and explained."""

import itertools
import json
import math
import shutil

import pytest
import torch
from conftest import prompts, sapo_trainer, tiny_model
from processes import World, zero
from reliability_world import quiet
from safetensors.torch import load_file
from transformers import TrainerCallback

from sapo_trl import faults
from sapo_trl.monitor import collapse_alarms
from sapo_trl.update.finite import NonFiniteError

FIELDS = {
    "learning_rate": 1e-2, "router_aux_loss_coef": 0.0, "num_mini_batches": 2, "max_completion_length": 6,
    "logging_steps": 1, "max_steps": 6, "disable_tqdm": True, "on_collapse": "none", "lr_scheduler_type": "constant",
}  # fmt: skip
BAD = 4  # the optimizer step with a number that is not finite; the second mini-batch of its rollout


class Steps(TrainerCallback):
    """Parameters and Adam's second moments after each step."""

    def __init__(self):
        self.weights, self.moments = {}, {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        step = state.global_step
        self.weights[step] = torch.cat([p.detach().flatten() for p in model.parameters()])
        moments = [x["exp_avg_sq"].flatten() for x in optimizer.optimizer.state.values()]
        self.moments[step] = torch.cat(moments) if moments else None


def fault(monkeypatch, text: str) -> None:
    monkeypatch.setenv(faults.VARIABLE, text)
    faults.wanted.cache_clear()


@pytest.fixture(autouse=True)
def no_fault():
    faults.wanted.cache_clear()
    yield
    faults.wanted.cache_clear()


def log(trainer, name: str) -> dict[int, float]:
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}


def warned(folder) -> list[dict]:
    path = folder / "warnings.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [record for record in records if "not finite" in record["message"]]


def assert_skipped_once(trainer, seen: Steps, folder, cause: str, on_loss: bool) -> None:
    assert sorted(seen.weights) == list(range(1, 7)) and all(x.isfinite().all() for x in seen.weights.values())
    for kind in (seen.weights, seen.moments):
        assert kind[BAD].equal(kind[BAD - 1]) and not kind[BAD + 1].equal(kind[BAD])
    assert log(trainer, "update/skipped_steps") == {1: 0, 2: 0, 3: 0, 4: 1, 5: 1, 6: 1}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {x["step"]: x["loss"] for x in records if "loss" in x}
    assert (losses.pop(BAD) is None) == on_loss and all(math.isfinite(x) for x in losses.values())
    (record,) = warned(folder)
    assert record["step"] == BAD - 1  # optimizer steps made
    assert f"optimizer step {BAD} (mini-batch 1 of its rollout) skipped" in record["message"]
    assert cause in record["message"] and "1 in a row, 1 in all" in record["message"]


# ---- where it enters -------------------------------------------------------------------------------------------------

ENTRIES = {
    "nan:advantage": ("pack 0: row 0 of 8 (advantage)", True),
    "inf:advantage": ("pack 0: row 0 of 8 (advantage)", True),
    "nan:gradient": ("the gradient, with finite numbers in every row; the largest log-ratio", False),
    "inf:gradient": ("the gradient, with finite numbers in every row; the largest log-ratio", False),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_step_is_skipped_wherever_it_enters(tmp_path, tokenizer, monkeypatch, entry):
    cause, on_loss = ENTRIES[entry]
    fault(monkeypatch, f"{entry}:step={BAD}")
    seen, fields = Steps(), FIELDS | {"skip_zero_advantage": False}  # every row is in a pack
    with quiet():
        trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), callbacks=[seen], **fields)
        trainer.train()
    assert_skipped_once(trainer, seen, tmp_path, cause, on_loss)


@pytest.mark.parametrize(
    "entry", ["nan:old_logprobs", "inf:old_logprobs", "nan:reference_logprobs", "inf:reference_logprobs"]
)
def test_a_log_prob_that_is_not_finite_takes_its_token_out(tmp_path, tokenizer, monkeypatch, entry):
    """Log-ratios are bounded, and one that is not a number moves nothing: the step is made without that token."""
    fault(monkeypatch, f"{entry}:step={BAD}")
    seen = Steps()
    with quiet():
        trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), callbacks=[seen], **FIELDS, beta=0.05)
        trainer.train()
    assert all(x.isfinite().all() for x in seen.weights.values()) and not seen.weights[BAD].equal(seen.weights[BAD - 1])
    assert set(log(trainer, "update/skipped_steps").values()) == {0} and not warned(tmp_path)
    assert all(math.isfinite(x) for x in log(trainer, "loss").values())
    clamped = log(trainer, "log_ratio/clamped_frac" if "old" in entry else "kl_clamped_frac")
    assert clamped[BAD] > 0 and clamped[BAD - 1] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_objective_itself(tmp_path, tokenizer, value):
    calls = []

    def objective(tokens, config):
        calls.append(trainer.state.global_step)
        surrogate = tokens.log_ratio.exp() * tokens.advantages
        return surrogate * value if trainer.state.global_step == BAD - 1 else surrogate

    seen = Steps()
    with quiet():
        trainer = sapo_trainer(
            tmp_path, tokenizer, tiny_model(tokenizer), objective=objective, callbacks=[seen], **FIELDS
        )
        trainer.train()
    assert_skipped_once(trainer, seen, tmp_path, "(objective)", on_loss=True)
    assert calls


class Spoils(TrainerCallback):
    """Writes a NaN into a gradient when all others are done with it."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == BAD - 1:
            next(model.parameters()).grad.view(-1)[3] = math.nan


@pytest.mark.parametrize("where", ["after training_step", "in a callback"])
def test_a_gradient_that_somebody_else_spoils(tmp_path, tokenizer, where):
    seen = Steps()
    with quiet():
        trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), callbacks=[seen], **FIELDS)
    if where == "in a callback":
        trainer.add_callback(Spoils())
    else:
        usual = trainer.training_step

        def spoilt(model, *args):
            loss = usual(model, *args)
            Spoils().on_pre_optimizer_step(trainer.args, trainer.state, None, model=model)
            return loss

        trainer.training_step = spoilt
    with quiet():
        trainer.train()
    assert_skipped_once(trainer, seen, tmp_path, "the gradient", on_loss=False)


@pytest.mark.parametrize("fields", [{"max_grad_norm": 0.0}, {"logging_steps": 3}, {"gradient_accumulation_steps": 2}])
def test_other_set_ups(tmp_path, tokenizer, monkeypatch, fields):
    fault(monkeypatch, f"nan:advantage:step={BAD}")
    seen = Steps()
    fields = FIELDS | fields | {"per_device_train_batch_size": 8 // fields.get("gradient_accumulation_steps", 1)}
    with quiet():
        trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), callbacks=[seen], **fields)
        trainer.train()
    assert seen.weights[BAD].equal(seen.weights[BAD - 1]) and not seen.weights[6].equal(seen.weights[BAD])
    losses = log(trainer, "loss")
    bad = 6 if fields["logging_steps"] == 3 else BAD
    assert math.isnan(losses.pop(bad)) and all(math.isfinite(x) for x in losses.values())
    assert log(trainer, "update/skipped_steps")[6] >= (1 if fields["logging_steps"] == 1 else 1 / 3)


def test_the_entropy_control_does_not_move_with_a_skipped_step(tmp_path, tokenizer, monkeypatch):
    fault(monkeypatch, f"nan:advantage:step={BAD}")
    fields = {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_coef_delta": 0.01, "entropy_coef_max": 1.0}
    with quiet():
        trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), **FIELDS, **fields, entropy_target=10.0)
        trainer.train()
    coefficients = log(trainer, "entropy_coef")
    assert coefficients == pytest.approx({1: 0.1, 2: 0.11, 3: 0.12, 4: 0.13, 5: 0.13, 6: 0.14})
    assert math.isfinite(trainer._update.entropy.last_entropy)


# ---- the end ---------------------------------------------------------------------------------------------------------


def finite_weights(folder) -> bool:
    return all(x.isfinite().all() for x in load_file(folder / "model.safetensors").values())


def test_three_in_a_row_end_the_run_with_its_last_weights_saved(tmp_path, tokenizer, monkeypatch):
    fault(monkeypatch, "nan:advantage:step=3+")
    seen, fields = Steps(), FIELDS | {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    with quiet():
        trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), callbacks=[seen], **fields)
    with quiet(), pytest.raises(NonFiniteError, match=r"max_skipped_steps=3 in a row. The weights are those of step 2"):
        trainer.train()
    assert seen.weights[5].equal(seen.weights[2]) and 6 not in seen.weights
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]
    assert finite_weights(tmp_path / "checkpoint-5") and len(warned(tmp_path)) == 3
    saved = torch.cat([x.flatten() for x in load_file(tmp_path / "checkpoint-5/model.safetensors").values()])
    assert saved.norm() == pytest.approx(seen.weights[2].norm().item(), rel=1e-6)


def test_a_finite_step_in_between_begins_the_count_again(tmp_path, tokenizer):
    def objective(tokens, config):
        surrogate = tokens.log_ratio.exp() * tokens.advantages
        return surrogate * (1.0 if trainer.state.global_step in (0, 3) else math.nan)

    fields = FIELDS | {"max_skipped_steps": 3, "max_steps": 8}
    with quiet():
        trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), objective=objective, **fields)
    with quiet(), pytest.raises(NonFiniteError, match="3 in a row, 5 in all"):
        trainer.train()
    assert trainer.state.global_step == 7  # 2 and 3 were skipped, 4 was not, 5, 6 and 7 were


def spoil_weights(trainer) -> None:
    with torch.no_grad():
        next(trainer.model.parameters()).view(-1)[5] = math.nan


class SpoilsWeights(TrainerCallback):
    def __init__(self, step: int, saves: bool = False):
        self.step, self.saves = step, saves

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                next(model.parameters()).view(-1)[5] = math.nan
            control.should_save = control.should_save or self.saves


@pytest.mark.parametrize("who", ["the schedule", "a callback", "the guard"])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, tokenizer, who):
    fields = FIELDS | {"save_strategy": "steps", "save_steps": 1 if who == "the schedule" else 2, "save_total_limit": 1}
    fields |= {"on_collapse": "stop" if who == "the guard" else "none", "max_steps": 8}
    callback = SpoilsWeights(3, saves=who == "a callback")
    with quiet():
        trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), callbacks=[callback], **fields)
    with quiet(), pytest.raises(NonFiniteError, match=r"weights.*not finite.*embed_tokens|embed_tokens.*not finite"):
        trainer.train()
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert kept == {"checkpoint-2"} and finite_weights(tmp_path / "checkpoint-2")
    with pytest.raises(NonFiniteError, match="are not saved to .*final. checkpoint-2 is whole: go on with resume"):
        trainer.save_model(str(tmp_path / "final"))
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(NonFiniteError, match=f"are not saved to .*final. {tmp_path} holds no checkpoint to go on from"):
        trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final").exists() and not list(tmp_path.glob(".checkpoint*"))


def test_a_stop_by_the_guard_saves_finite_weights(tmp_path, tokenizer, monkeypatch):
    fault(monkeypatch, f"nan:advantage:step={BAD}")
    fields = FIELDS | {"on_collapse": "stop", "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    with quiet():
        trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), **fields)
        trainer.train()
    assert collapse_alarms(trainer) and [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{BAD}"]
    assert finite_weights(tmp_path / f"checkpoint-{BAD}")


def test_the_best_checkpoint_is_kept(tmp_path, tokenizer, monkeypatch):
    fault(monkeypatch, "nan:advantage:step=3+")
    fields = FIELDS | {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    fields |= {"metric_for_best_model": "score", "greater_is_better": True, "save_total_limit": 1}
    with quiet():
        trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), eval_dataset=prompts(4), **fields)
    trainer._evaluate = lambda *_: {"eval_score": 1 / trainer.state.global_step}
    with quiet(), pytest.raises(NonFiniteError):
        trainer.train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-5"}


def test_a_run_killed_between_two_skipped_steps_goes_on_counting(tmp_path, tokenizer, monkeypatch):
    fault(monkeypatch, "nan:advantage:step=3+")
    fields = FIELDS | {"save_strategy": "steps", "save_steps": 1}
    with quiet():
        trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), **fields)
        with pytest.raises(NonFiniteError):
            trainer.train()
        resumed = sapo_trainer(tmp_path / "again", tokenizer, tiny_model(tokenizer), **fields)
        with pytest.raises(NonFiniteError, match="3 in a row, 3 in all"):
            resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 5


# ---- several processes ---------------------------------------------------------------------------------------------


def two_processes(world: World, entry: str, env: dict | None = None, **fields) -> list:
    fields = {"per_device_train_batch_size": 4, "write_report": False, "save_steps": 1} | fields
    if env:
        fields |= {"use_cpu": False, "ddp_backend": "gloo"}
    return world.start(entry, processes=2, env=env, **fields).ends()


@pytest.mark.parametrize(
    "entry", ["nan:gradient", *(pytest.param(x, marks=pytest.mark.matrix) for x in ("nan:advantage", "inf:gradient"))]
)
def test_one_of_two_processes_skips_the_step_of_both(tmp_path, entry):
    """A gradient is spoilt on one process alone, after the two have met; an advantage before."""
    world = World(tmp_path / "world")
    done = two_processes(world, f"{entry}:step={BAD}:process=1")
    assert [x.status for x in done] == [0, 0], done[1].err[-2000:]
    weights = [load_file(world.run_folder / f"checkpoint-{i}/model.safetensors") for i in (3, 4, 5)]
    same = [all(a[name].equal(b[name]) for name in a) for a, b in itertools.pairwise(weights)]
    assert same == [True, False] and all(finite_weights(world.run_folder / x) for x in world.checkpoints())
    (record,) = warned(world.run_folder)
    cause = "row 0 of" if "advantage" in entry else "the gradient"
    assert "skipped: numbers that are not finite (" in record["message"] and "process 1: " in record["message"]
    assert cause in record["message"] and "1 in all" in record["message"]


@pytest.mark.matrix
@pytest.mark.parametrize("stage", [2, 3])
def test_under_zero(tmp_path, stage):
    """DeepSpeed steps inside the backward pass, and leaves out a step whose gradient is not finite by itself."""
    world = World(tmp_path / "world")
    done = two_processes(world, f"nan:advantage:step={BAD}:process=1", zero(stage))
    assert [x.status for x in done] == [0, 0], done[1].err[-2000:]
    weights = [load_file(world.run_folder / f"checkpoint-{i}/model.safetensors") for i in (3, 4, 5)]
    same = [all(a[name].equal(b[name]) for name in a) for a, b in itertools.pairwise(weights)]
    assert same == [True, False] and all(finite_weights(world.run_folder / x) for x in world.checkpoints())
    (record,) = warned(world.run_folder)
    assert f"optimizer step {BAD} (mini-batch 3 of its rollout) skipped" in record["message"]


@pytest.mark.matrix
def test_a_run_of_two_processes_ends_with_a_sentence(tmp_path):
    world = World(tmp_path / "world")
    for done in two_processes(world, "nan:gradient:step=3+:process=1", save_total_limit=1):
        assert done.status == 1 and "Traceback" not in done.err
        assert "The run ends after max_skipped_steps=3 in a row. The weights are those of step 2" in done.err
    assert world.checkpoints() == ["checkpoint-5"] and finite_weights(world.run_folder / "checkpoint-5")
    assert not (world.run_folder / "model.safetensors").exists()


def test_the_script_ends_with_status_1(tmp_path):
    world = World(tmp_path / "world")
    done = world.train("nan:advantage:step=3+", save_total_limit=1, on_collapse="stop", save_steps=1)
    assert done.status == 3 and world.checkpoints() == ["checkpoint-3"]  # the guard was asked to stop at once
    world = World(tmp_path / "other")
    done = world.train("nan:gradient:step=3+", save_total_limit=1)
    assert done.status == 1 and "Traceback" not in done.err and "max_skipped_steps=3" in done.err
    assert world.checkpoints() == ["checkpoint-5"] and finite_weights(world.run_folder / "checkpoint-5")
    assert not (world.run_folder / "model.safetensors").exists()
