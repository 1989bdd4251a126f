"""One rollout ahead: which weights generate what, and what happens to the process that does it."""

import os
import signal
import time

import pytest
import torch
from conftest import length_reward, plain_logps, prompts, sapo_config, tiny_model
from peft import LoraConfig, VeraConfig, get_peft_model
from transformers import GenerationConfig, TrainerCallback

from sapo_trl import SAPOTrainer
from sapo_trl.batch_plan import batch_plan
from sapo_trl.rollout.ahead import WorkerEngine
from sapo_trl.rollout.worker import Job

SAMPLER = {"rollouts_ahead": 1, "old_logprobs": "sampler", "vllm_importance_sampling_correction": False}
CORRECTED = {"rollouts_ahead": 1}  # TRL's default for the correction
FIELDS = {
    "num_mini_batches": 2, "max_steps": 5, "logging_steps": 1, "learning_rate": 1e-2, "temperature": 0.8,
    "lr_scheduler_type": "constant", "router_aux_loss_coef": 0.0, "on_collapse": "none",
}  # fmt: skip
LORA = {"q": {"target_modules": ["q_proj", "v_proj"]}, "experts": {"target_parameters": ["experts.down_proj"]}}


class Recorded(SAPOTrainer):
    """Keeps the rows of every generation, and the weights of every optimizer step."""

    def train(self, *args, **kwargs):
        self.rollouts, self.asked, self.weights = [], [], {0: self.copied()}
        keeper = TrainerCallback()
        keeper.on_step_end = lambda args, state, control, **_: self.weights.update({state.global_step: self.copied()})
        self.add_callback(keeper)
        return super().train(*args, **kwargs)

    def copied(self):
        return {name: x.detach().clone() for name, x in self.model.state_dict().items()}

    def _generated_rows(self, rollout, generation_batch):
        rows, num_tokens = super()._generated_rows(rollout, generation_batch)
        if self.model.training:
            self.rollouts.append((rollout.weights_step, rows))
            self.asked.append((self.state.global_step, rollout.refills, [row["prompt"] for row in generation_batch]))
        return rows, num_tokens

    def gap(self, step, rows) -> float:
        """Largest |log p under the weights of a step - log p that came with the row|."""
        self.model.load_state_dict(self.weights[step])
        self.model.eval()
        found = 0.0
        for row in rows:
            prompt, completion = row.input_ids[: row.num_prompt], row.input_ids[row.num_prompt :]
            batch = {"prompt_ids": prompt[None], "prompt_mask": torch.ones(1, len(prompt))}
            batch |= {"completion_ids": completion[None], "completion_mask": torch.ones(1, len(completion))}
            logps = plain_logps(self.model, batch, self.temperature)[0]
            found = max(found, (logps - row.sampler_logps).abs().max().item())
        return found


def make(
    tmp_path, tokenizer, moe=False, lora=None, num_prompts=8, cls=Recorded, reward=length_reward, **fields
) -> SAPOTrainer:
    extra = {"peft_config": LoraConfig(r=4, lora_alpha=64, **LORA[lora])} if lora else {}
    config = sapo_config(tmp_path, **(FIELDS | fields))
    model, data = tiny_model(tokenizer, moe), prompts(num_prompts)  # two rollouts are an epoch
    if "datasets" in fields:
        data = data.add_column("task", ["abac"[i % 4] for i in range(num_prompts)])
    return cls(model, reward, config, data, prompts(4), processing_class=tokenizer, **extra)


def logged(trainer, name):
    return [record[name] for record in trainer.state.log_history if name in record]


def assert_claims_hold(trainer, tolerance):
    """Every rollout holds the log-probs of the weights that it claims, and of no later ones."""
    assert [step for step, _ in trainer.rollouts] == [0, 0, 2]
    for step, rows in trainer.rollouts:
        assert len(rows) == 16 and trainer.gap(step, rows) < tolerance < 0.05 < trainer.gap(step + 2, rows)


def test_the_worker_process_holds_the_weights_that_a_rollout_claims(tmp_path, tokenizer, capsys):
    trainer = make(tmp_path, tokenizer, **SAMPLER)
    trainer.train()
    assert_claims_hold(trainer, 1e-5)
    assert trainer._ahead._engine.process.poll() == -signal.SIGKILL  # ended with the training
    out = capsys.readouterr().out
    assert "gate                     acts on 2 of 2 steps of a rollout, weights up to 3 updates old" in out
    assert "finished rows leave the batch; one rollout ahead, in a worker process" in out
    assert logged(trainer, "sampling/weights_age") == [0, 1, 2, 3, 2]
    moved = logged(trainer, "log_ratio/abs_mean")
    assert moved[0] < 1e-5 and min(moved[1:]) > 0.01  # the gate acts on every mini-batch but the run's first
    assert [k for k in range(4) if logged(trainer, f"mini_batch_{k}/ratio/max")] == [0, 1, 2, 3]
    (check,) = logged(trainer, "sampling/engine_check")  # of the first rollout; all others are older than the policy
    assert check < 0.1


@pytest.mark.parametrize(
    "fields",
    [{"moe": True}, {"lora": "q"}, {"moe": True, "lora": "experts"}],
    ids=["moe", "lora", "lora on experts"],
)
def test_other_models(tmp_path, tokenizer, forked_worker, fields):
    trainer = make(tmp_path, tokenizer, **SAMPLER, **fields)
    trainer.train()
    assert_claims_hold(trainer, 2e-5)


def test_bf16(tmp_path, tokenizer, forked_worker):
    """The worker computes in bfloat16 where the trainer does: nearer to it than to float32."""
    trainer = make(tmp_path, tokenizer, bf16=True, **SAMPLER)
    trainer.train()
    assert logged(trainer, "sampling/engine_check")[0] < 1
    for step, rows in trainer.rollouts:
        with torch.autocast("cpu", torch.bfloat16):
            assert trainer.gap(step, rows) < 0.1 < trainer.gap(step + 2, rows)
    assert trainer.gap(*trainer.rollouts[0]) > 1e-3


def test_the_correction_sees_the_age_where_the_ratio_does_not(tmp_path, tokenizer, forked_worker, capsys):
    trainer = make(tmp_path, tokenizer, **CORRECTED)
    trainer.train()
    assert_claims_hold(trainer, 1e-5)
    out = capsys.readouterr().out
    assert "acts on 1 of 2 steps of a rollout (the first is on-policy, r = 1), weights up to 3 updates old" in out
    moved, off = logged(trainer, "log_ratio/abs_mean"), logged(trainer, "sampling/log_ratio_abs_mean")
    assert [k for k in range(5) if moved[k] == 0] == [0, 2, 4]  # the ratio is 1 where a rollout begins to be trained on
    assert max(off[:2]) < 1e-5 and min(off[2:]) > 0.01
    assert off[2] < trainer.gap(2, trainer.rollouts[1][1])  # the weights of step 2 against those of step 0
    assert any(abs(x - 1) > 1e-3 for x in logged(trainer, "sampling/importance_sampling_ratio/mean")[2:])


def test_equal_seeds_give_equal_numbers_and_an_evaluation_moves_no_rollout(tmp_path, tokenizer, forked_worker):
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8}
    runs = []
    for i, fields in enumerate((evaluated, evaluated, {})):
        runs.append(make(tmp_path / str(i), tokenizer, **SAMPLER, **fields))
        runs[-1].train()
    first, second, plain = runs
    assert all(torch.equal(first.weights[5][name], x) for name, x in second.weights[5].items())
    assert logged(first, "loss") == logged(second, "loss")
    assert logged(first, "eval_reward") == logged(second, "eval_reward") and len(logged(first, "eval_reward")) == 5
    # rollout 1 was under way while the evaluations of steps 1 and 2 drew their samples
    for a, b in zip(first.rollouts[1][1], plain.rollouts[1][1], strict=True):
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.sampler_logps, b.sampler_logps)
    assert any(not torch.equal(first.weights[4][name], x) for name, x in plain.weights[4].items())
    texts = {tuple(row.input_ids.tolist()) for _, rows in first.rollouts for row in rows}
    assert len(texts) > 40  # of 48: every rollout has random numbers of its own, also for the prompts of epoch 2


def test_nothing_is_generated_that_no_step_uses(tmp_path, tokenizer, forked_worker, monkeypatch):
    started = []
    monkeypatch.setattr(WorkerEngine, "start", recorded(WorkerEngine.start, started))
    for steps in (2, 3):
        make(tmp_path / str(steps), tokenizer, max_steps=steps, **SAMPLER).train()
        assert len(started) == -(-steps // 2)
        started.clear()


# ---- prompts that the rewards choose ---------------------------------------------------------------------------------

MIXTURE = {"a": {"share": 0.5}, "b": {"share": 0.25, "max_completion_length": 3}, "c": {"share": 0.25}}


def third_is_solved(prompts, **kwargs):
    """All four completions of every third prompt are right, and two of those of the others."""
    return [1.0 if int(p.split("+")[0]) % 3 == 0 else float(i % 4 > 1) for i, p in enumerate(prompts)]


def test_refills_are_of_the_weights_of_now_and_prompts_are_those_of_a_run_without_it(
    tmp_path, tokenizer, forked_worker, monkeypatch
):
    jobs, replies, join = [], [], WorkerEngine.join
    monkeypatch.setattr(WorkerEngine, "start", recorded(WorkerEngine.start, jobs))
    monkeypatch.setattr(WorkerEngine, "join", lambda engine: replies.append(join(engine)) or replies[-1])
    chosen = {"dynamic_sampling": True, "drop_solved_above": 1.0, "datasets": MIXTURE}
    ahead, plain = (
        make(tmp_path / name, tokenizer, num_prompts=24, reward=third_is_solved, **chosen, **fields)
        for name, fields in {"ahead": SAMPLER, "plain": {}}.items()
    )
    ahead.train()
    plain.train()
    assert ahead.asked == plain.asked and ahead._prompts.state() == plain._prompts.state()
    assert logged(ahead, "data/prompts_left") == logged(plain, "data/prompts_left")
    assert ahead._prompts.num_left["a"] < 12
    assert [step for step, refills, _ in ahead.asked if not refills] == [0, 2, 4]
    assert [step for step, refills, _ in ahead.asked if refills and step]  # also after the first rollout
    for (now, refills, _), (step, rows) in zip(ahead.asked, ahead.rollouts, strict=True):
        assert step == (now if refills else max(0, now - 2))
        assert ahead.gap(step, rows) < 1e-5 < 0.02 < ahead.gap(min(step + 2, 5), rows)
    assert logged(ahead, "sampling/weights_age") == [0, 1, 2, 3, 2]  # of the oldest rows
    assert len(jobs) == len(replies) == len(ahead.asked)  # and none for steps that do not come
    assert len({job.seed for _, job in jobs}) == len(jobs)
    lengths = {
        (len(ids), limit)
        for (_, job), reply in zip(jobs, replies, strict=True)
        for ids, limit in zip(reply.ids, job.limits, strict=True)
    }
    assert all(n <= limit for n, limit in lengths) and {(3, 3), (12, 12)} <= lengths


def test_nothing_is_generated_for_a_rollout_that_lacks_unsolved_prompts(tmp_path, tokenizer, forked_worker, capsys):
    """Of 5 prompts 2 are solved in the first two rollouts, and 3 are fewer than the 4 of one."""
    trainer = make(
        tmp_path, tokenizer, num_prompts=5, reward=third_is_solved, drop_solved_above=1.0, max_steps=20, **SAMPLER
    )
    trainer.train()
    end = trainer.state.global_step
    assert f"step {end}: 3 of 5 prompts are left unsolved" in capsys.readouterr().out
    assert [step for step, _, _ in trainer.asked] == [*range(0, end, 2)] and end <= 4
    assert not trainer._ahead.has_begun and trainer._prompts.ahead == []


def test_the_watchdog_sees_the_wait_for_the_worker_in_a_save_too(tmp_path, tokenizer, forked_worker, monkeypatch):
    joined, join = [], WorkerEngine.join
    trainer = make(tmp_path, tokenizer, cls=SAPOTrainer, save_strategy="steps", save_steps=1, **SAMPLER)
    monkeypatch.setattr(WorkerEngine, "join", lambda engine: joined.append(phases(trainer)) or join(engine))
    trainer.train()
    assert joined == [["rollout"]] * 3 and phases(trainer) == []


def phases(trainer):
    return [phase.name for phase in trainer._watchdog._phases]


def recorded(function, calls):
    def call(*args):
        calls.append(args)
        return function(*args)

    return call


# ---- the process -----------------------------------------------------------------------------------------------------


class Strike(TrainerCallback):
    """Calls a function after step 1, when the second rollout is under way or waits."""

    def __init__(self, function):
        self.function = function

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.function()


def is_gone(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_worker_that_dies_is_one_clear_sentence(tmp_path, tokenizer, forked_worker):
    trainer = make(tmp_path, tokenizer, cls=SAPOTrainer, **SAMPLER)
    trainer.add_callback(Strike(lambda: trainer._ahead._engine.process.kill()))
    with pytest.raises(RuntimeError, match=r"rollout worker \(process \d+\) ended by SIGKILL .*rollouts_ahead: 0"):
        trainer.train()


def test_an_error_in_the_worker_says_what_went_wrong(tokenizer, forked_worker):
    engine = WorkerEngine(tiny_model(tokenizer), None, 1)
    engine.model.lm_head.weight.data[7].fill_(torch.nan)
    engine.start(Job([[5, 6]] * 3, [], GenerationConfig(do_sample=True, max_new_tokens=2, pad_token_id=0), 1))
    with pytest.raises(RuntimeError, match="the rollout worker failed: RuntimeError: 3 of 3 rows have a NaN"):
        engine.join()
    engine.close()


def test_an_error_in_training_ends_the_worker(tmp_path, tokenizer, forked_worker):
    trainer, pids = make(tmp_path, tokenizer, cls=SAPOTrainer, **SAMPLER), []
    trainer.add_callback(Strike(lambda: pids.append(trainer._ahead._engine.process.pid) or 1 / 0))
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert is_gone(*pids)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads /proc")
def test_the_worker_ends_with_a_trainer_that_is_killed_while_it_generates(tokenizer, forked_worker):
    reader, writer = os.pipe()
    trainer = os.fork()
    if trainer == 0:
        try:
            engine = WorkerEngine(tiny_model(tokenizer), None, 1)
            sampling = GenerationConfig(do_sample=True, max_new_tokens=10_000, pad_token_id=0)
            engine.start(Job([[5, 6]] * 64, [], sampling, 1))
            os.write(writer, str(engine.process.pid).encode())
            time.sleep(60)
        finally:
            os._exit(0)
    pid = int(os.read(reader, 20))
    time.sleep(0.5)
    assert not is_gone(pid)
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    deadline = time.monotonic() + 10
    while not is_gone(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


class OtherPrompts(SAPOTrainer):
    """Trains on prompts in another order than its sampler says."""

    def get_batch_samples(self, *args):
        batches, num = super().get_batch_samples(*args)
        return [batch[::-1] for batch in batches], num


def test_prompts_that_were_not_foreseen_end_the_run(tmp_path, tokenizer, forked_worker):
    with pytest.raises(RuntimeError, match="other prompts than the data gives now"):
        make(tmp_path, tokenizer, cls=OtherPrompts, **SAMPLER).train()


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (CORRECTED | {"vllm_importance_sampling_correction": False}, "neither the ratio nor a correction .*: sampler"),
        (CORRECTED | {"old_logprobs": "sampler"}, "Set vllm_importance_sampling_correction: false"),
        (SAMPLER | {"rollouts_ahead": 2}, r"rollouts_ahead=2 must be within \[0, 1\]"),
        (SAMPLER | {"use_vllm": True, "vllm_enable_sleep_mode": True}, "awake .*used with vllm_enable_sleep_mode=True"),
        (SAMPLER | {"use_vllm": True, "vllm_tensor_parallel_size": 2}, "on one device.* vllm_tensor_parallel_size=2"),
        (CORRECTED | {"cast_lm_head_to_fp32": True}, "can't be used with cast_lm_head_to_fp32=True"),
        (CORRECTED | {"generation_kwargs": {"prefill_chunk_size": 2}}, "can't be used with generation_kwargs"),
        (CORRECTED | {"ignore_data_skip": True}, "can't be used with ignore_data_skip"),
        (CORRECTED | {"thinking_budget": [4]}, "can't be used with thinking_budget"),
        (CORRECTED | {"routing_replay": "r3"}, "can't be used with routing_replay=r3"),
        (SAMPLER | {"routing_replay": "r2"}, "routing_replay='r2' records"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        sapo_config(tmp_path, **fields)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rollout_func": lambda prompts, trainer: {}}, "completions come from rollout_func"),
        ({"tools": [len]}, "completions come from tools"),
        ({"train_dataset": prompts(8).to_iterable_dataset()}, "the prompts of a stream"),
    ],
)
def test_other_ways_to_generate_are_refused_before_the_model_loads(tmp_path, given, message):
    given = {"train_dataset": prompts(8), "args": sapo_config(tmp_path, **(FIELDS | CORRECTED))} | given
    with pytest.raises(ValueError, match=f"rollouts_ahead=1 can't be used here: {message}.*Set rollouts_ahead: 0"):
        SAPOTrainer("a/model", length_reward, **given)


def test_a_model_of_a_script_is_refused(tmp_path, tokenizer):
    model = tiny_model(tokenizer)
    model.__class__ = type("Mine", (type(model),), {"__module__": "__main__"})
    with pytest.raises(ValueError, match="can't import Mine from a script. Move the class into a module"):
        SAPOTrainer(model, length_reward, sapo_config(tmp_path, **CORRECTED), prompts(), processing_class=tokenizer)


def test_an_adapter_that_draws_what_no_state_dict_holds(tokenizer, forked_worker):
    """VeRA's shared projections: without initialization there are none."""
    adapted = get_peft_model(tiny_model(tokenizer), VeraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    engine = WorkerEngine(adapted, None, 1)
    try:
        sampling = GenerationConfig(max_new_tokens=2, do_sample=True, pad_token_id=0, eos_token_id=1)
        engine.start(Job([[5, 6]], [], sampling, 0))
        assert engine.join().ids
    finally:
        engine.close()


def test_a_model_that_the_decoding_loop_does_not_know_is_refused(tmp_path, tokenizer):
    model = tiny_model(tokenizer)
    model.config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match="needs the trainer's own decoding loop, and here layers of kind sliding"):
        SAPOTrainer(model, length_reward, sapo_config(tmp_path, **CORRECTED), prompts(), processing_class=tokenizer)


def test_a_gate_that_acts_on_one_mini_batch_is_not_inert(tmp_path):
    assert batch_plan(sapo_config(tmp_path, num_mini_batches=1, **SAMPLER)).gate_can_act
    assert not batch_plan(sapo_config(tmp_path, num_mini_batches=1, **CORRECTED)).gate_can_act
