"""What a run may be told: every wrong value ends in one sentence, before a model loads."""

import dataclasses

import pytest
from conftest import PLAIN, length_reward, prompts, sapo_config

from sapo_trl import SAPOConfig, SAPOTrainer
from sapo_trl.algorithms import ALGORITHMS
from sapo_trl.baselines import Clip
from sapo_trl.batch_plan import batch_plan
from sapo_trl.bounds import NEEDS
from sapo_trl.config import planned_for


def test_the_algorithm_sets_what_trl_calls_it(tmp_path):
    config = sapo_config(tmp_path).for_trl()
    assert (config.algorithm, config.loss_type, config.importance_sampling_level) == ("sapo", "sapo", "token")
    assert config.steps_per_generation == config.num_mini_batches == 4
    gspo = sapo_config(tmp_path, algorithm="gspo", gradient_accumulation_steps=2).for_trl()
    assert (gspo.loss_type, gspo.importance_sampling_level, gspo.steps_per_generation) == ("grpo", "sequence", 8)
    assert (gspo.epsilon, gspo.epsilon_high, gspo.generation_batch_size) == (3e-4, 4e-4, 64)


def test_the_upper_clip_follows_the_lower_one_as_in_trl(tmp_path):
    assert sapo_config(tmp_path, algorithm="grpo").build_objective() == Clip(0.2, 0.27)
    assert sapo_config(tmp_path, algorithm="grpo", epsilon=0.1).build_objective() == Clip(0.1, 0.1)
    assert sapo_config(tmp_path, algorithm="grpo", epsilon=0.1, epsilon_high=0.3).build_objective() == Clip(0.1, 0.3)
    assert sapo_config(tmp_path, algorithm="grpo", epsilon_high=0.3).build_objective() == Clip(0.2, 0.3)


def test_fields_stay_as_given_and_another_algorithm_can_replace_the_first(tmp_path):
    config = sapo_config(tmp_path)
    assert (config.loss_type, config.epsilon, config.steps_per_generation, config.routing_replay) == (None,) * 4
    gspo = dataclasses.replace(config, algorithm="gspo", seed=3)
    assert gspo.build_objective() == Clip(3e-4, 4e-4) and (gspo.level, gspo.seed) == ("sequence", 3)
    assert dataclasses.replace(gspo, algorithm="sapo", seed=config.seed).to_dict() == config.to_dict()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_config_survives_a_copy(tmp_path, name):
    config = sapo_config(tmp_path, algorithm=name)
    assert dataclasses.replace(config, seed=7).to_dict() == config.to_dict() | {"seed": 7}


REFUSED = {
    "algorithm": ({"algorithm": "sappo"}, r"algorithm='sappo' is unknown.*Did you mean 'sapo'"),
    "grpo-r2": (
        {"algorithm": "grpo-r2", "routing_replay": "r3"},
        r"is defined with routing_replay='r2', not 'r3'",
    ),
    "replay": ({"routing_replay": "r4"}, r"routing_replay='r4' is unknown; known: none, r2, r3"),
    "r3 with a server": (
        {"routing_replay": "r3", "use_vllm": True, "vllm_mode": "server"},
        r"does not fetch those of a server. Nearest: routing_replay='r2'",
    ),
    "r3 in parts": (
        {"routing_replay": "r3", "use_vllm": True, "vllm_tensor_parallel_size": 2},
        r"not tried with vllm_tensor_parallel_size=2. Set vllm_tensor_parallel_size: 1",
    ),
    "engine's format": (
        {"use_vllm": True, "vllm_dtype": "fp32"},
        r"vllm_dtype='fp32' is unknown; known: auto, float32",
    ),
    "format of nothing": ({"vllm_dtype": "float32"}, r"vllm_dtype=float32 .* with use_vllm: false. Set use_vllm: true"),
    "server's format": (
        {"use_vllm": True, "vllm_mode": "server", "vllm_dtype": "float32"},
        r"vllm_dtype=float32 has no effect with vllm_mode: server. Set vllm_mode: colocate, or remove vllm_dtype",
    ),
    "server's interface": (
        {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://me:hidden@host:8000/v1"},
        r"vllm_server_base_url='http://me:\*\*\*@host:8000/v1' must be like http://127.0.0.1:8000, without /v1",
    ),
    "server without http": (
        {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "host:8000"},
        r"vllm_server_base_url='host:8000' must be like",
    ),
    "gate": ({"gate": "sigmiod"}, r"gate='sigmiod' is unknown.*Did you mean 'sigmoid'"),
    "tau zero": ({"sapo_temperature_pos": 0.0}, r"sapo_temperature_pos=0.0 must be a finite number > 0"),
    "tau negative": ({"sapo_temperature_neg": -1.0}, r"sapo_temperature_neg=-1.0 must be"),
    "tau NaN": ({"sapo_temperature_neg": float("nan")}, r"sapo_temperature_neg=nan must be"),
    "beta": ({"beta": -1.0}, r"beta=-1.0 must be a finite number >= 0"),
    "top_p": ({"top_p": 0.9}, r"top_p=0.9 biases the ratio.*top_p: 1.0"),
    "top_p 7": ({"top_p": 7.0}, r"top_p=7.0 biases the ratio"),
    "top_k": ({"top_k": 20}, r"top_k=20 biases the ratio"),
    "min_p": ({"min_p": 0.1}, r"min_p=0.1 biases the ratio"),
    "hidden top_k": ({"generation_kwargs": {"top_k": 20}}, r"top_k=20 biases"),
    "hidden top_k as text": ({"generation_kwargs": '{"top_k": 20}'}, r"top_k=20 biases"),
    "penalty": ({"repetition_penalty": 1.1}, r"repetition_penalty=1.1 biases"),
    "loss_type": ({"loss_type": "dapo"}, r"loss_type='dapo' contradicts algorithm='sapo'"),
    "level": ({"importance_sampling_level": "sequence"}, r"importance_sampling_level='sequence' contradicts"),
    "unused clip": ({"epsilon": 0.3}, r"epsilon=0.3 has no effect with algorithm='sapo'.*grpo"),
    "unused delta": ({"delta": 2.0}, r"delta=2.0 has no effect"),
    "unused gate": ({"algorithm": "grpo", "gate": "erf"}, r"gate=erf has no effect with algorithm='grpo'.*sapo"),
    "unused tau": ({"algorithm": "gspo", "sapo_temperature_pos": 2.0}, r"sapo_temperature_pos=2.0 has no effect"),
    "unused k": ({"vespo_k_pos": 5.0}, r"vespo_k_pos=5.0 has no effect.*belongs to vespo"),
    "padding": ({"pad_to_multiple_of": 8}, r"pad_to_multiple_of has no effect"),
    "cache": ({"torch_empty_cache_steps": 4}, r"torch_empty_cache_steps has no effect"),
    "compiled": ({"torch_compile_backend": "eager"}, r"torch_compile_backend has no effect"),
    "smaller batches": ({"auto_find_batch_size": True}, r"auto_find_batch_size has no effect: max_tokens_per_pack"),
    "outputs": ({"eval_accumulation_steps": 1}, r"eval_accumulation_steps has no effect"),
    "no evaluation": (
        {"do_eval": True},
        r"do_eval=True has no effect with eval_strategy: no. Set eval_strategy: steps",
    ),
    "no metric to compare": (
        {"greater_is_better": False},
        r"greater_is_better=False has no effect with eval_strategy: no",
    ),
    "no training": (
        {"do_train": False},
        r"do_train has no effect: scripts/train.py and train\(\) train; scripts/evaluate",
    ),
    "torn groups": ({"accelerator_config": {"split_batches": True}}, r"accelerator_config.split_batches would tear"),
    "modules": ({"optim_target_modules": ["q_proj"]}, r"optim_target_modules has no effect with optim='adamw"),
    "log level": ({"log_level": "warn"}, r"log_level='warn' is unknown.*Did you mean 'warning'"),
    "liger": ({"liger_kernel_config": {"rope": True}}, r"liger_kernel_config=.* with use_liger_kernel: false"),
    "scheduler": ({"lr_scheduler_kwargs": {"num_cycles": 2}}, r"lr_scheduler_type='linear' with .*'num_cycles'"),
    "scheduler's need": ({"lr_scheduler_type": "cosine_with_min_lr"}, r"cosine_with_min_lr' with .*min_lr"),
    "options of no optimizer": ({"optim_args": "betas=1"}, r"holds betas=1, which optim='adamw_torch_fused' does not"),
    "no option": ({"optim_args": "momentum"}, r"'momentum' is not of the form name=value"),
    "an option's value": ({"optim": "sgd", "optim_args": "momentum=big"}, r"optim='sgd' with .*could not convert"),
    "adam's option": ({"optim": "sgd", "adam_beta2": 0.9}, r"adam_beta2=0.9 has no effect with optim='sgd'"),
    "not installed": ({"optim": "ademamix"}, r"optim='ademamix' with .*pip install -U bitsandbytes"),
    "rate against the reward": (
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
        r"would take a smaller reward for a better one. Set lr_scheduler_kwargs: \{mode: max\}",
    ),
    "filtered loss": ({"logging_nan_inf_filter": True}, r"logging_nan_inf_filter has no effect: the loss that is"),
    "lomo": ({"optim": "lomo"}, r"optim='lomo' steps inside backward"),
    "steps": ({"steps_per_generation": 3}, r"steps_per_generation=3 contradicts 4 num_mini_batches x 1 .* = 4"),
    "rollout size": ({"generation_batch_size": 64}, r"generation_batch_size=64 contradicts the 32 completions"),
    "quantile": ({"top_entropy_quantile": 1.5}, r"top_entropy_quantile=1.5 must be within"),
    "case of the name": ({"algorithm": "SAPO"}, r"Did you mean 'sapo'"),
    "a list": ({"beta": [0.1]}, r"beta=\[0.1\] is of type list; it must be float"),
    "a mapping": ({"seed": {"a": 1}}, r"seed=.* is of type dict; it must be int"),
    "a boolean": ({"learning_rate": True}, r"learning_rate=True is of type bool; it must be float"),
    "half a step": ({"num_iterations": 2.5}, r"num_iterations=2.5 is of type float; it must be int"),
    "text": ({"learning_rate": "fast"}, r"learning_rate='fast' is of type str; it must be float"),
    "infinite": ({"weight_decay": float("inf")}, r"weight_decay=inf must be a finite number >= 0"),
    "NaN in a list": ({"reward_weights": [float("nan")]}, r"reward_weights=\[nan\] must be finite"),
    "huge": ({"learning_rate": 1e30}, r"learning_rate=1e\+30 must be within \[0, 10\]"),
    "negative norm": ({"max_grad_norm": -1}, r"max_grad_norm=-1 must be a finite number >= 0"),
    "no saves": ({"save_steps": 0}, r"save_steps=0 must be a finite number > 0"),
    "no epochs": ({"num_train_epochs": 0}, r"num_train_epochs=0 must be a finite number > 0"),
    "null clipping": (
        {"max_grad_norm": None},
        r"max_grad_norm is null, which it can't be. Remove it for its default, 1.0",
    ),
    "null saving": ({"save_strategy": None}, r"save_strategy is null.* for its default, steps"),
    "null length": ({"max_completion_length": None}, r"max_completion_length is null, which it can't be"),
    "null group": ({"num_generations": None}, r"num_generations is null, which it can't be"),
    "scale": ({"scale_rewards": "groups"}, r"scale_rewards='groups' is unknown.*Did you mean 'group'"),
    "wide clip": ({"algorithm": "grpo", "epsilon": 5.0}, r"epsilon=5.0 must be a number between 0 and 1"),
    "delta": ({"algorithm": "grpo", "delta": -1.0}, r"delta=-1.0 must be finite and above 1 \+ epsilon_high = 1.27"),
    "k": ({"algorithm": "vespo", "vespo_k_pos": float("nan")}, r"vespo_k_pos=nan must be"),
    "layer-wise": ({"optim": "galore_adamw_layerwise"}, r"steps inside backward"),
    "kwargs": ({"objective_kwargs": {"alpha": 1}}, r"'alpha' in objective_kwargs is no option of SoftGate"),
    "mini-batches": ({"num_mini_batches": 0}, r"num_mini_batches=0 must be at least 1"),
}


@pytest.mark.parametrize("folder", ["", "  "])
def test_an_empty_output_folder_is_refused(folder):
    with pytest.raises(ValueError, match="output_dir is empty. Name a folder"):
        sapo_config(folder)


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    fields, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        sapo_config(tmp_path, **fields)


@pytest.mark.parametrize(
    "per_device, accumulation, processes, mini_batches, generations, fix",
    [(3, 1, 1, 4, 8, 4), (5, 1, 2, 2, 16, 8), (1, 3, 1, 1, 8, 8), (5, 2, 8, 1, 48, 6)],
)
def test_batches_that_do_not_divide(tmp_path, per_device, accumulation, processes, mini_batches, generations, fix):
    """The message names a size, and that size passes."""
    fields = {
        "gradient_accumulation_steps": accumulation,
        "num_mini_batches": mini_batches,
        "num_generations": generations,
    }
    message = rf"num_generations={generations} does not divide.*Set per_device_train_batch_size={fix} for"
    with planned_for(processes):
        with pytest.raises(ValueError, match=message):
            sapo_config(tmp_path, per_device_train_batch_size=per_device, **fields)
        plan = batch_plan(sapo_config(tmp_path, per_device_train_batch_size=fix, **fields))
    assert plan.completions_per_rollout == fix * accumulation * processes * mini_batches
    assert plan.prompts_per_rollout * generations == plan.completions_per_rollout


def test_plan_by_hand(tmp_path):
    with planned_for(8):
        plan = batch_plan(sapo_config(tmp_path, gradient_accumulation_steps=2, num_generations=16, num_iterations=2))
    assert (plan.completions_per_rollout, plan.prompts_per_rollout) == (512, 32)  # 8 x 2 x 8 x 4; / 16
    assert (plan.effective_batch, plan.rows_per_process, plan.steps_per_rollout) == (128, 16, 8)
    assert plan.gate_can_act and "acts on 7 of 8 steps" in str(plan)


def test_an_inert_gate_is_loud(tmp_path, tokenizer, capsys):
    from conftest import sapo_trainer, tiny_model

    with pytest.raises(ValueError, match="require_off_policy is set, but the gate is INERT"):
        batch_plan(sapo_config(tmp_path, num_mini_batches=1, require_off_policy=True))
    sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), num_mini_batches=1)
    assert "!!!!!" in (out := capsys.readouterr().out) and "INERT" in out
    sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), num_mini_batches=1, num_iterations=2)
    assert "INERT" not in capsys.readouterr().out


def test_refused_before_a_model_loads(tmp_path):
    """`model` is a string that no loader could load: each message comes first."""
    config = sapo_config(tmp_path)
    cases = [
        ((str(tmp_path / "nowhere"), config, prompts()), ValueError, r"nowhere does not exist"),
        (("org/model", config, prompts(7)), ValueError, r"7 prompts and one rollout takes 8"),
        (("org/model", config, prompts().rename_column("prompt", "promt")), ValueError, r"no column 'prompt'"),
        (
            ("org/model", config, prompts().rename_column("answer", "image")),
            ValueError,
            r"column 'image' holds .*, not",
        ),
        (("org/model", object(), prompts()), TypeError, r"args is a object; SAPOTrainer needs a SAPOConfig"),
    ]
    for (model, args, dataset), kind, message in cases:
        with pytest.raises(kind, match=message):
            SAPOTrainer(model, length_reward, args, dataset)


def test_a_missing_model_folder_names_its_neighbour(tmp_path):
    from sapo_trl.data.preflight import check_model_path

    (tmp_path / "checkpoint-20").mkdir()
    with pytest.raises(ValueError, match=r"Nearest: .*checkpoint-20"):
        check_model_path(str(tmp_path / "checkpoint-200"))
    with pytest.raises(ValueError, match=r"no config.json"):
        check_model_path(str(tmp_path / "checkpoint-20"))
    check_model_path("Qwen/Qwen3-8B")


def test_defaults_are_the_papers():
    config = SAPOConfig(output_dir="unused", **PLAIN)
    assert (config.sapo_temperature_pos, config.sapo_temperature_neg, config.num_mini_batches) == (1.0, 1.05, 4)
    assert config.vllm_importance_sampling_mode == "token_truncate"


def test_presets_of_the_correction_for_the_rollout_engine(tmp_path):
    def resolved(**fields):
        values = vars(sapo_config(tmp_path, use_vllm=True, **fields).for_trl())
        return tuple(values[f"vllm_importance_sampling_{name}"] for name in ("mode", "clip_min", "clip_max"))

    mode, low, high = (f"vllm_importance_sampling_{name}" for name in ("mode", "clip_min", "clip_max"))
    assert resolved() == ("token_truncate", None, 3.0)
    assert resolved(**{mode: "icepop"}) == ("token_mask", 0.5, 2.0)
    assert resolved(**{mode: "icepop", low: 0.2, high: 5.0}) == ("token_mask", 0.2, 5.0)
    assert resolved(**{mode: "geometric_mask"}) == ("geometric_mask", 0.99, 1.01)
    assert resolved(**{mode: "geometric_mask", low: 0.999}) == ("geometric_mask", 0.999, 1.01)
    with pytest.raises(ValueError, match="needs vllm_importance_sampling_mode token_truncate, token_mask, icepop"):
        sapo_config(tmp_path, use_vllm=True, algorithm="vespo", **{mode: "geometric_mask"})
    with pytest.raises(ValueError, match=r"correct ratios within \[1.2, 1.01\]: nothing is left"):
        sapo_config(tmp_path, use_vllm=True, **{mode: "geometric_mask", low: 1.2})


def test_broadcast_buffers_would_hang_a_retry(tmp_path):
    assert sapo_config(tmp_path).for_trl().ddp_broadcast_buffers is False
    with pytest.raises(ValueError, match="ddp_broadcast_buffers: true would hang"):
        sapo_config(tmp_path, ddp_broadcast_buffers=True)


# A value that is not the default, where flipping it is not enough
GIVEN = {
    **dict.fromkeys(("ref_model_mixup_alpha", "entropy_coef_min", "entropy_target"), 0.4),
    **dict.fromkeys(("vllm_gpu_memory_utilization", "vllm_importance_sampling_clip_min"), 0.5),
    **dict.fromkeys(("entropy_coef_max", "entropy_coef_delta"), 0.5),
    **dict.fromkeys(("ref_model_sync_steps", "vllm_tensor_parallel_size", "dataloader_prefetch_factor"), 3),
    **dict.fromkeys(("vllm_max_model_length", "vllm_group_port", "vllm_server_port", "vllm_server_timeout"), 4000),
    **dict.fromkeys(("vllm_importance_sampling_cap", "vllm_importance_sampling_clip_max"), 5.0),
    **dict.fromkeys(("eval_steps", "eval_delay", "save_steps", "save_total_limit", "logging_steps", "warmup_steps"), 7),
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "liger_kernel_config": {"rope": True}, "transformers_continuous_batching_config": {"a": 1},
    "dynamic_sampling_max_rounds": 3, "cache_implementation": "static", "vllm_mode": "server",
    "vllm_structured_outputs_regex": ".*", "vllm_dtype": "float32", "vllm_model_impl": "transformers",
    "vllm_server_base_url": "http://host:8000", "vllm_server_host": "host",
    "vllm_importance_sampling_mode": "token_mask", "metric_for_best_model": "eval_reward",
    "log_completions_hub_repo": "me/them", "num_completions_to_print": 0, "hub_strategy": "end", "project": "mine",
    "trackio_bucket_id": "me/a", "trackio_space_id": "me/b", "trackio_static_space_id": "me/c",
    "dataloader_multiprocessing_context": "spawn", "lr_scheduler_kwargs": {},
}  # fmt: skip
# What else is needed beside the fix
BESIDE = {
    "ref_model_mixup_alpha": {"beta": 0.1}, "ref_model_sync_steps": {"beta": 0.1},
    "load_best_model_at_end": {"save_strategy": "steps", "save_steps": 20},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine"},
}  # fmt: skip
OFF = {
    "beta": 0.0, "eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no", "dataloader_num_workers": 0,
    "vllm_server_base_url": "http://other:1", "lr_scheduler_type": "constant", "report_to": "none",
    **dict.fromkeys(("activation_checkpointing", "gradient_checkpointing"), "false"),
}  # fmt: skip


def on(need) -> object:
    return {"beta": 0.1, "dataloader_num_workers": 1, "report_to": "trackio"}.get(need.other) or need.values[0]


def off(need) -> object:
    other_mode = {"server": "colocate", "colocate": "server"}.get(on(need))
    return OFF[need.other] if need.other in OFF else other_mode or not on(need)


@pytest.mark.parametrize("name", NEEDS)
def test_a_field_that_another_one_switches_off_is_refused_and_acts_with_the_fix(tmp_path, name):
    default = {f.name: f.default for f in dataclasses.fields(SAPOConfig)}[name]
    value = {name: GIVEN.get(name, not default)}
    assert value[name] != default
    enough = {"use_liger_kernel": False} | BESIDE.get(name, {}) | {need.other: on(need) for need in NEEDS[name]}
    for need in NEEDS[name]:
        with pytest.raises(ValueError, match=rf"has no effect with {need.other}: .*Set {need.other}: "):
            sapo_config(tmp_path, **(enough | {need.other: off(need)} | value))
    config = sapo_config(tmp_path, **(enough | value))
    assert dataclasses.replace(config, seed=7).to_dict() == config.to_dict() | {"seed": 7}


def test_an_evaluation_can_be_switched_off_in_a_copy(tmp_path):
    config = sapo_config(tmp_path, eval_strategy="steps")
    assert (config.for_trl().do_eval, config.for_trl().eval_steps) == (True, 10)  # as often as it logs
    without = dataclasses.replace(config, eval_strategy="no").for_trl()
    assert (without.do_eval, without.eval_steps) == (False, None)


@pytest.mark.parametrize(
    "fields, metric, larger",
    [
        ({}, None, False),
        ({"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 20}, "reward", True),
        ({"save_strategy": "best"}, "reward", True),
        ({"save_strategy": "best", "metric_for_best_model": "eval_reward"}, "eval_reward", True),
        ({"metric_for_best_model": "eval_a/b"}, "eval_a/b", True),
        ({"metric_for_best_model": "eval_completions/mean_length", "greater_is_better": False}, None, False),
        (
            {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 20, "greater_is_better": False},
            "reward",
            False,
        ),
        ({"lr_scheduler_type": "greedy", "lr_scheduler_kwargs": {"mode": "max"}}, "reward", True),
    ],
)
def test_what_counts_as_the_best(tmp_path, fields, metric, larger):
    config = sapo_config(tmp_path, eval_strategy="steps", **fields).for_trl()
    assert config.metric_for_best_model == (metric or fields.get("metric_for_best_model"))
    assert config.greater_is_better is larger


@pytest.mark.parametrize(
    "optim, options", [("sgd", "momentum=0.9,nesterov=true"), ("rmsprop", "alpha=0.99"), ("sgd", None)]
)
def test_options_that_an_optimizer_reads_are_accepted(tmp_path, optim, options):
    assert sapo_config(tmp_path, optim=optim, optim_args=options).optim_args == options
