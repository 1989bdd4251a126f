"""What a run would do otherwise than its author believes: honoured, or refused in one sentence."""

import copy
import sys

import pytest
import torch
from conftest import PLAIN, SHAPE, length_reward, prompts, sapo_config, sapo_trainer, tiny_model
from datasets import Dataset
from peft import LoraConfig
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from sapo_trl import SAPOTrainer
from sapo_trl.evaluation.training import EvaluationRecord
from sapo_trl.setup_checks import BYPASSED, READ_ONCE, choose_best_metric


def logged(trainer, name: str) -> list[float]:
    return [record[name] for record in trainer.state.log_history if name in record]


# ---- methods and attributes that the update does not read ------------------------------------------------------------


@pytest.mark.parametrize("method", BYPASSED)
def test_a_method_that_would_never_run_is_refused_before_the_model_loads(tmp_path, method):
    subclass = type("Mine", (SAPOTrainer,), {method: lambda self, *args, **kwargs: 1 / 0})
    said = rf"Mine\.{method} would never be called in training.*Override {BYPASSED[method]}"
    with pytest.raises(TypeError, match=said):
        subclass("no/such/model-is-loaded", length_reward, sapo_config(tmp_path), prompts())


@pytest.mark.parametrize("name", ["compute_loss", "compute_loss_func"])
def test_a_method_put_onto_the_trainer_is_refused(tmp_path, tokenizer, name):
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), max_steps=1)
    setattr(trainer, name, lambda *args, **kwargs: 1 / 0)
    with pytest.raises(TypeError, match=rf"trainer.{name} = ... would never be called.*override token_objective"):
        trainer.train()


def methods_called_in_training(trainer) -> set[str]:
    """Names of the methods of the trainer's classes that `train` calls, static ones included."""
    classes, called = {cls.__name__ for cls in type(trainer).__mro__}, set()

    def note(frame, event, arg):
        *_, owner, name = ["", *frame.f_code.co_qualname.split(".")]
        if event == "call" and owner in classes:
            called.add(name)

    sys.setprofile(note)
    try:
        trainer.train()
    finally:
        sys.setprofile(None)
    return called


@pytest.mark.parametrize("field", ["beta", "top_entropy_quantile", "off_policy_mask_threshold"])
def test_a_method_that_trl_calls_in_training_is_called_here_or_refused(tmp_path, tokenizer, field):
    """Whoever overrides one of TRL's methods gets it called, or is told."""
    fields = {field: 0.5, "max_steps": 4, "bf16": True, "per_device_train_batch_size": 8, "num_generations": 4}
    config = GRPOConfig(str(tmp_path / "trl"), loss_type="grpo", max_completion_length=4, **(PLAIN | fields))
    theirs = GRPOTrainer(tiny_model(tokenizer), length_reward, config, prompts(), processing_class=tokenizer)
    ours = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), algorithm="grpo", max_completion_length=4, **fields)
    missing = methods_called_in_training(theirs) - methods_called_in_training(ours)
    assert "_compute_loss" in missing  # the comparison sees something
    assert missing <= BYPASSED.keys()


def test_a_model_from_memory_needs_a_tokenizer_and_no_reference(tmp_path, tokenizer):
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, vocab_size=len(tokenizer)))
    with pytest.raises(ValueError, match="made in memory. Pass its tokenizer as processing_class"):
        SAPOTrainer(model, length_reward, sapo_config(tmp_path), prompts())
    with pytest.raises(ValueError, match="beta=0.1 needs a reference.*Save it and load it from there"):
        SAPOTrainer(model, length_reward, sapo_config(tmp_path, beta=0.1), prompts(), processing_class=tokenizer)


def test_a_tokenizer_is_one_and_has_an_end(tmp_path, tokenizer):
    arguments = "no-such/model", length_reward, sapo_config(tmp_path), prompts()
    with pytest.raises(TypeError, match="processing_class='some/folder' is a name: pass AutoTokenizer"):
        SAPOTrainer(*arguments, processing_class="some/folder")
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ValueError, match="no end token, by which a completion ends. Set tokenizer.eos_token"):
        SAPOTrainer(*arguments, processing_class=endless)


CHANGES = {"beta": 0.1, "temperature": 0.7, "epsilon_low": 0.3, "num_iterations": 2, "entropy_coef": 0.01}


@pytest.mark.parametrize("name", CHANGES)
def test_a_value_changed_after_construction_is_refused(tmp_path, tokenizer, name):
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), max_steps=1)
    setattr(trainer, name, CHANGES[name])
    with pytest.raises(ValueError, match=f"trainer.{name} was changed from .* Set it in the SAPOConfig"):
        trainer.train()


def test_every_value_that_is_read_once_exists(tmp_path, tokenizer):
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer))
    assert {f"trainer.{name}" for name in READ_ONCE} < set(trainer._built_with)


LATE = {"loss_type": "dr_grpo", "temperature": -1.0, "epsilon": 0.3, "importance_sampling_level": "sequence"}


@pytest.mark.parametrize("name", LATE)
def test_a_field_set_after_the_configuration_was_made_is_checked_before_the_model_loads(tmp_path, name):
    config = sapo_config(tmp_path)
    setattr(config, name, LATE[name])
    with pytest.raises(ValueError, match=name):
        SAPOTrainer("no/such/model-is-loaded", length_reward, config, prompts())


def test_an_optimizer_of_another_model_is_refused(tmp_path, tokenizer):
    model, other = tiny_model(tokenizer), tiny_model(tokenizer)
    arguments = model, length_reward, sapo_config(tmp_path), prompts(), None, tokenizer
    with pytest.raises(ValueError, match="holds none of the model's trainable parameters"):
        SAPOTrainer(*arguments, optimizers=(torch.optim.SGD(other.parameters()), None))
    SAPOTrainer(*arguments, optimizers=(torch.optim.SGD(model.parameters()), None))


def test_what_is_passed_by_its_place_is_seen_by_the_checks(tmp_path, tokenizer):
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, vocab_size=len(tokenizer)))
    trainer = SAPOTrainer(model, length_reward, sapo_config(tmp_path), prompts(), None, tokenizer)
    assert trainer.processing_class is tokenizer


def test_the_configuration_of_another_trainer_may_be_used_again(tmp_path, tokenizer):
    first = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer))
    second = SAPOTrainer(tiny_model(tokenizer), length_reward, first.args, prompts(), processing_class=tokenizer)
    assert second.args.learning_rate == first.args.learning_rate


@pytest.mark.parametrize("model", [None, 3, torch.nn.Linear, torch.nn.Linear(1, 1)])
def test_what_is_no_model_is_refused(tmp_path, model):
    with pytest.raises(TypeError, match="give a name, a folder or a model"):
        SAPOTrainer(model, length_reward, sapo_config(tmp_path), prompts())


def test_a_folder_may_be_a_path(tmp_path):
    with pytest.raises(ValueError, match="no folder|does not exist"):
        SAPOTrainer(tmp_path / "none", length_reward, sapo_config(tmp_path), prompts())


def test_a_model_left_in_evaluation_keeps_its_metrics(tmp_path, tokenizer):
    class Samples(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.eval()

    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), max_steps=2, logging_steps=1)
    trainer.add_callback(Samples())
    trainer.train()
    assert len(logged(trainer, "effective_update_ratio")) == len(logged(trainer, "loss")) == 2


def test_a_stream_that_is_too_short_trains_nothing_and_says_so(tmp_path, tokenizer):
    config = sapo_config(tmp_path, max_steps=2)
    stream = prompts(3).to_iterable_dataset()
    trainer = SAPOTrainer(tiny_model(tokenizer), length_reward, config, stream, processing_class=tokenizer)
    with pytest.raises(ValueError, match="nothing was trained: the stream ended before the"):
        trainer.train()


def test_another_evaluation_set_is_checked_as_the_first_one_was(tmp_path, tokenizer):
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer))
    with pytest.raises(ValueError, match="the evaluation set has no column 'prompt'; it has text"):
        trainer.evaluate(Dataset.from_dict({"text": ["x"]}))
    with pytest.raises(ValueError, match="the evaluation set 'b' is empty"):
        trainer.evaluate({"a": prompts(2), "b": prompts(2).select([])})


FIELD_CHANGES = {"sapo_temperature_pos": 5.0, "beta": 0.1, "temperature": 0.5, "num_mini_batches": 2}


def test_a_field_changed_after_construction_is_refused(tmp_path, tokenizer):
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), max_steps=1)
    for name, value in FIELD_CHANGES.items():
        before = vars(trainer.args)[name]
        setattr(trainer.args, name, value)
        with pytest.raises(ValueError, match=f"trainer.args.{name} was changed from {before} to {value} after"):
            trainer.train()
        setattr(trainer.args, name, before)
    trainer.args.max_steps = trainer.args.logging_steps = 2  # what is read later may change
    trainer.train()
    assert trainer.state.global_step == 2


# ---- what would otherwise fail after the first rollout, or never say that nothing happens ---------------------------


def never(completions, **kwargs):
    raise AssertionError("no completion is scored")


REFUSED = {
    "a column that is missing": (
        {"reward_funcs": lambda completions, gold, **_: []},
        r"Reward function '<lambda>' is missing a required argument: 'gold'. It gets .* answer by name",
    ),
    "an argument not taken": (
        {"reward_funcs": [length_reward, lambda prompts, completions: []]},
        "gets an unexpected keyword argument 'completion_ids'",
    ),
    "a missing column of the evaluation": (
        {"reward_funcs": lambda answer, **_: [], "eval_dataset": Dataset.from_list([{"prompt": "1"}])},
        "is missing a required argument: 'answer'",
    ),
    "a reward's name": ({"reward_funcs": "accuracy"}, r"Pass the function: sapo_trl.rewards.REWARDS\['accuracy'\]"),
    "a reward model that is not there": ({"reward_funcs": "./no_model"}, "the model ./no_model does not exist"),
    "an evaluation without prompts": (
        {"eval_dataset": Dataset.from_list([{"Prompt": "1"}])},
        "the evaluation set has no column 'prompt'; it has Prompt. Did you mean 'Prompt'",
    ),
    "one of several": (
        {"eval_dataset": {"a": prompts(), "b": Dataset.from_list([{"prompt": ""}])}},
        "in the evaluation set 'b' the prompt of row 0 is empty",
    ),
    "an empty evaluation": ({"eval_dataset": prompts().select([])}, "the evaluation set is empty"),
    "prompts that are numbers": (
        {"train_dataset": Dataset.from_list([{"prompt": i + 1} for i in range(64)])},
        "in the training set the prompt of row 0 is 1: give a text, or messages with role and content",
    ),
    "messages without roles": (
        {"train_dataset": Dataset.from_list([{"prompt": [{"content": "1"}]} for _ in range(64)])},
        r"prompt of row 0 is \[{'content': '1'}\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_be_known_is_refused_before_the_model_loads(tmp_path, case):
    given, message = REFUSED[case]
    arguments = {"reward_funcs": never, "args": sapo_config(tmp_path), "train_dataset": prompts()} | given
    with pytest.raises(ValueError, match=message):
        SAPOTrainer("no_model_is_loaded/at-all", **arguments)


def test_a_reward_that_is_no_function_and_a_model_without_a_head(tmp_path, tokenizer):
    config, model = sapo_config(tmp_path), tiny_model(tokenizer)
    with pytest.raises(TypeError, match="reward_funcs holds 3, which is neither a function nor a reward model"):
        SAPOTrainer(model, 3, config, prompts(), processing_class=tokenizer)
    with pytest.raises(ValueError, match="Qwen3Model has no language-model head. Load it with AutoModelForCausalLM"):
        SAPOTrainer(model.model, never, config, prompts(), processing_class=tokenizer)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model has requires_grad"):
        SAPOTrainer(model, never, config, prompts(), processing_class=tokenizer)


def test_the_longest_prompt_is_compared_with_the_models_positions(tmp_path, tokenizer):
    model = tiny_model(tokenizer)
    model.config.max_position_embeddings = 60
    rows = Dataset.from_list([{"prompt": "1" * (2 + i % 50)} for i in range(64)])  # one token per character
    message = "the longest prompt has 51 tokens, and with max_completion_length=12 that is more than the 60 positions"
    with pytest.raises(ValueError, match=f"{message}.*set max_completion_length: 9"):
        SAPOTrainer(model, never, sapo_config(tmp_path), rows, processing_class=tokenizer)
    config = sapo_config(tmp_path, max_completion_length=9)
    assert SAPOTrainer(model, never, config, rows, processing_class=tokenizer).model is model
    asked = {"a": rows, "b": Dataset.from_list([{"prompt": "1" * 58}])}
    with pytest.raises(ValueError, match="the longest prompt of b has 58 tokens, and with max_completion_length=9"):
        SAPOTrainer(model, never, config, rows, asked, processing_class=tokenizer)


SURROUNDINGS = [
    ({"eval_strategy": "steps"}, "eval_strategy='steps', eval_on_start=False, and there is no evaluation set"),
    ({"eval_on_start": True}, "eval_strategy='no', eval_on_start=True, and there is no evaluation set"),
    ({"max_tool_calling_iterations": 2}, "max_tool_calling_iterations has no effect without tools"),
    ({}, "one process sees 2 GPUs, .*CUDA_VISIBLE_DEVICES=0"),
]


@pytest.mark.parametrize("fields, message", SURROUNDINGS)
def test_what_a_field_needs_beside_it_is_asked_before_the_model_loads(tmp_path, monkeypatch, fields, message):
    config = sapo_config(tmp_path, **fields)
    monkeypatch.setattr(type(config), "n_gpu", 1 if fields else 2)
    with pytest.raises(ValueError, match=message):
        SAPOTrainer(str(tmp_path), never, config, prompts())


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, tokenizer):
    """A smaller one is usual: embeddings are padded."""
    larger, model = copy.deepcopy(tokenizer), tiny_model(tokenizer)
    rows = len(tokenizer)
    larger.add_tokens(["<tool>", "</tool>"])
    message = f"the tokenizer has {rows + 2} tokens and the model's embedding {rows} rows"
    with pytest.raises(ValueError, match=f"{message}.*resize_token_embeddings\\({rows + 2}\\)"):
        SAPOTrainer(model, never, sapo_config(tmp_path), prompts(), processing_class=larger)
    model.resize_token_embeddings(rows + 8)
    trainer = SAPOTrainer(model, never, sapo_config(tmp_path), prompts(), processing_class=larger)
    assert trainer.processing_class is larger


def test_rollouts_without_a_token_to_train_on_are_told(tmp_path, tokenizer):
    def masked(rows, trainer):
        ids = [[5 + i % 3, 6] for i in range(len(rows))]
        return {
            "prompt_ids": [[4]] * len(rows),
            "completion_ids": ids,
            "logprobs": None,
            "env_mask": [[0, 0]] * len(rows),
        }

    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), rollout_func=masked, max_steps=8)
    trainer.reward_funcs = [lambda completions, **_: [float(i % 3) for i in range(len(completions))]]  # not equal
    with pytest.warns(UserWarning, match="2 rollouts in a row in which no completion had a token to train on"):
        trainer.train()


def test_advantages_that_a_subclass_sets_are_trained_on(tmp_path, tokenizer):
    class Ones(SAPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            output["advantages"] = torch.ones_like(output["advantages"])
            return output

    config = sapo_config(tmp_path, max_steps=4, logging_steps=1)
    equal = lambda completions, **_: [0.0] * len(completions)  # noqa: E731
    trainer = Ones(tiny_model(tokenizer), equal, config, prompts(), processing_class=tokenizer)
    trainer.train()
    assert min(logged(trainer, "grad_norm")) > 0 and logged(trainer, "update/skipped_rows_frac") == [0.0] * 4


# ---- noise that looks like movement of the policy --------------------------------------------------------------------


@pytest.mark.parametrize("off", [True, False])
def test_dropout_makes_no_ratio(tmp_path, tokenizer, capsys, off):
    fields = {} if off else {"disable_dropout": False}
    config = sapo_config(tmp_path, max_steps=4, logging_steps=1, learning_rate=0.0, **fields)
    lora = LoraConfig(lora_dropout=0.5, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = SAPOTrainer(
        tiny_model(tokenizer), length_reward, config, prompts(), processing_class=tokenizer, peft_config=lora
    )
    trainer.train()
    moved = max(logged(trainer, "log_ratio/abs_mean"))
    assert (moved < 1e-6) if off else (moved > 1e-3)
    said = capsys.readouterr().out
    assert ("switched off in" in said) if off else ("WARNING: on, so the ratio r is noise" in said)


def test_a_dropout_that_no_module_shows_is_told(tmp_path, tokenizer):
    model = tiny_model(tokenizer)
    hook = lambda module, _, out: torch.nn.functional.dropout(out, 0.1, module.training)  # noqa: E731
    model.model.layers[0].mlp.register_forward_hook(hook)
    trainer = SAPOTrainer(
        model, length_reward, sapo_config(tmp_path, max_steps=1), prompts(), processing_class=tokenizer
    )
    with pytest.warns(UserWarning, match=r"two passes of the model in training differ by 0\.\d+ a token"):
        trainer.train()


def test_the_reference_is_the_policy_in_memory(tmp_path, tokenizer):
    model = tiny_model(tokenizer)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.3)
    trainer = sapo_trainer(tmp_path, tokenizer, model, beta=0.04, max_steps=1, logging_steps=1)
    trainer.train()
    assert abs(logged(trainer, "kl")[0]) < 1e-6


# ---- state between calls ---------------------------------------------------------------------------------------------


def test_a_second_train_begins_with_a_rollout_of_its_own(tmp_path, tokenizer):
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), max_steps=2, logging_steps=1)
    trainer.train()
    trainer.state.log_history.clear()
    trainer.train()
    first = trainer.state.log_history[0]
    assert "reward" in first and first["log_ratio/abs_mean"] == 0.0


def test_a_train_that_was_interrupted_leaves_nothing_behind(tmp_path, tokenizer):
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), max_steps=4, logging_steps=1)
    run = trainer._update.run
    trainer._update.run = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    trainer._update.run = run
    trainer.train()
    assert ["reward" in record for record in trainer.state.log_history if "loss" in record] == [True] + [False] * 3


# ---- limits of the model ---------------------------------------------------------------------------------------------


def test_a_row_beyond_the_models_positions_is_refused(tmp_path, tokenizer):
    model = tiny_model(tokenizer)
    model.config.max_position_embeddings = 10
    with pytest.raises(ValueError, match=r"10|positions"):
        sapo_trainer(tmp_path, tokenizer, model, max_steps=1).train()


# ---- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [4, 8, 12])
def test_the_mean_of_an_evaluation_is_over_problems(tmp_path, tokenizer, batch):
    """Problem i is worth i, 0 to 4: 2 on average, however the problems are cut into batches."""
    worth = lambda completions, answer, **_: [float(a) - 1 for a in answer]  # noqa: E731
    config = sapo_config(tmp_path, per_device_eval_batch_size=batch)
    trainer = SAPOTrainer(tiny_model(tokenizer), worth, config, prompts(), processing_class=tokenizer)
    assert trainer.evaluate(prompts(5))["eval_reward"] == pytest.approx(2.0)


def test_a_problem_that_fills_up_the_last_batch_counts_once():
    """Three problems of two completions on two processes: accelerate gives the first one once more."""
    right = torch.tensor([[1.0], [1.0], [0.0], [0.0], [0.0], [0.0], [1.0], [1.0]])
    record = EvaluationRecord(num_completions=6, num_generations=2)
    record.add(right[:4])
    record.add(right[4:])
    values = record.values({"entropy": [1.0, 4.0]}, ["accuracy_reward"], torch.ones(1), "accuracy_reward")
    assert values["pass_at_1"] == pytest.approx(1 / 3) and values["reward"] == pytest.approx(1 / 3)
    assert values["entropy"] == pytest.approx((4 * 1.0 + 2 * 4.0) / 6)


def test_lengths_do_not_depend_on_the_batches_of_an_evaluation():
    """Four completions ended, of 2, 2, 3 and 5 tokens; four are cut at 8: in three batches, and one of repeats."""
    record, batches = EvaluationRecord(num_completions=8, num_generations=2), [[2, 2], [8, 8, 8, 3], [5, 8]]
    logged = {f"completions/{name}": [] for name in ("clipped_ratio", "mean_length", "min_length", "max_length")}
    logged |= {f"completions/{x}_terminated_length": [] for x in ("mean", "min", "max")}
    for lengths in [*batches, [8, 8]]:  # the last is a repeat, with which accelerate fills a batch
        record.add(torch.ones(len(lengths), 1))
        ended = [x for x in lengths if x < 8] or [0]
        for name, values in (("", lengths), ("_terminated", ended)):
            for kind, of in (("mean", lambda x: sum(x) / len(x)), ("min", min), ("max", max)):
                logged[f"completions/{kind}{name}_length"].append(float(of(values)))
        logged["completions/clipped_ratio"].append(sum(x == 8 for x in lengths) / len(lengths))
    values = record.values(logged, ["own"], torch.ones(1), "")
    assert {name.removeprefix("completions/"): values[name] for name in logged} == {
        "clipped_ratio": 0.5, "mean_length": 44 / 8, "min_length": 2, "max_length": 8,
        "mean_terminated_length": 3, "min_terminated_length": 2, "max_terminated_length": 5,
    }  # fmt: skip
    none = EvaluationRecord(num_completions=2, num_generations=2)
    none.add(torch.ones(2, 1))
    cut = {"completions/clipped_ratio": [1.0], "completions/mean_terminated_length": [0.0]}
    assert none.values(cut, ["own"], torch.ones(1), "")["completions/mean_terminated_length"] == 0


def test_two_sets_and_two_functions_have_names_of_their_own(tmp_path, tokenizer):
    worth = lambda completions, **_: [1.0] * len(completions)  # noqa: E731
    other = lambda completions, **_: [2.0] * len(completions)  # noqa: E731
    sets = {"easy": prompts(2), "hard": prompts(4)}
    config = sapo_config(tmp_path, per_device_eval_batch_size=8)
    trainer = SAPOTrainer(
        tiny_model(tokenizer), [worth, other], config, prompts(), eval_dataset=sets, processing_class=tokenizer
    )
    assert len(set(trainer.reward_func_names)) == 2
    result = trainer.evaluate()
    first, second = trainer.reward_func_names
    for name in sets:
        assert result[f"eval_{name}_reward"] == 3.0
        assert result[f"eval_{name}_rewards/{first}/mean"] == 1.0
        assert result[f"eval_{name}_rewards/{second}/mean"] == 2.0
    assert "eval_reward" not in result


def test_generations_that_do_not_divide_the_batch_are_refused_with_one_that_fits(tmp_path, tokenizer):
    config = sapo_config(tmp_path, per_device_eval_batch_size=6)
    with pytest.raises(ValueError, match="Set per_device_eval_batch_size: 8"):
        SAPOTrainer(
            tiny_model(tokenizer), length_reward, config, prompts(), eval_dataset=prompts(4), processing_class=tokenizer
        )


def test_the_best_model_is_the_one_with_the_best_reward(tmp_path):
    def chosen(names, data, **fields):
        best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps"}
        config = sapo_config(tmp_path, **(best | {"save_steps": 4} | fields)).for_trl()
        choose_best_metric(config, names, data, "accuracy_reward")
        return config.metric_for_best_model, config.greater_is_better

    assert chosen(["length"], prompts(4)) == ("eval_reward", True)
    assert chosen(["accuracy_reward"], prompts(4)) == ("eval_pass_at_1", True)
    assert chosen(["accuracy_reward"], {"easy": prompts(4), "hard": prompts(4)}) == ("eval_easy_pass_at_1", True)
    with pytest.raises(ValueError, match="metric_for_best_model"):
        chosen(["length"], prompts(4), metric_for_best_model="loss")


# ---- nothing to learn from -------------------------------------------------------------------------------------------


def test_rewards_that_never_differ_are_told_with_a_completion(tmp_path, tokenizer):
    config = sapo_config(tmp_path, max_steps=12, logging_steps=1)

    def always_wrong(completions, **_):
        return [0.0] * len(completions)

    trainer = SAPOTrainer(tiny_model(tokenizer), always_wrong, config, prompts(), processing_class=tokenizer)
    with pytest.warns(UserWarning, match="2 rollouts in a row .* The first completion got always_wrong = 0: '") as seen:
        trainer.train()
    assert sum("rollouts in a row" in str(warning.message) for warning in seen) == 1
    assert "always_wrong = 0" in (tmp_path / "warnings.jsonl").read_text()


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"modules_to_save": ["lm_hed"]}, "lora_modules_to_save: the model has no 'lm_hed'. Did you mean 'lm_head'"),
        (
            {"target_modules": ["q_proj", "v_prj"]},
            "the model has no 'v_prj'. Did you mean 'v_proj'",
        ),
        ({"target_modules": ["q_proj", "proj"]}, "lora_target_modules: the model has no 'proj'"),
        ({"target_parameters": ["experts"]}, "lora_target_parameters: the model has no 'experts'"),
    ],
)
def test_what_lora_would_leave_out_without_a_word(tmp_path, tokenizer, lora, message):
    lora = LoraConfig(**({"target_modules": ["q_proj"]} | lora))
    with pytest.raises(ValueError, match=message):
        SAPOTrainer(
            tiny_model(tokenizer), length_reward, sapo_config(tmp_path), prompts(), processing_class=tokenizer,
            peft_config=lora,
        )  # fmt: skip


def refusal(tmp_path, tokenizer, error=ValueError, reward=length_reward, dataset=None, **fields) -> str:
    """What making the trainer is refused with."""
    optimizer, model = fields.pop("optimizer", None), tiny_model(tokenizer)
    made = (None, None) if optimizer is None else (optimizer(model.parameters()), None)
    with pytest.raises(error) as refused:
        SAPOTrainer(
            model, reward, sapo_config(tmp_path, **fields), dataset or prompts(), processing_class=tokenizer,
            optimizers=made,
        )  # fmt: skip
    return str(refused.value)


def test_what_would_do_nothing_or_fail_later_is_refused(tmp_path, tokenizer):
    assert "fp16 does nothing on a CPU" in refusal(tmp_path, tokenizer, fp16=True)
    for none in (None, []):
        assert "reward_funcs is empty" in refusal(tmp_path, tokenizer, reward=none)
    assert "LBFGS asks for the loss several times" in refusal(tmp_path, tokenizer, optimizer=torch.optim.LBFGS)
    in_parts = [{"role": "user", "content": [{"type": "text", "text": "1+1="}]}]
    dataset = Dataset.from_list([{"prompt": in_parts}] * 8)
    assert "the chat template can't render the prompt of row 0" in refusal(tmp_path, tokenizer, dataset=dataset)


def test_prompts_that_fill_no_rollout_are_counted(tmp_path, tokenizer, capsys):
    config = sapo_config(tmp_path, max_steps=1)
    SAPOTrainer(tiny_model(tokenizer), length_reward, config, prompts(13), processing_class=tokenizer)
    assert "a rollout takes 8 prompts, so each pass leaves out 5 of 13" in capsys.readouterr().out
