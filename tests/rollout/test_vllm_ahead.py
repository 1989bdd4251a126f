"""One rollout ahead with an engine in a thread: the order of things, without vLLM; with it: `test_vllm_engine.py`.

The engine of these tests samples from a copy of the weights that it was sent, under TRL's own handling of vLLM, and
refuses to be touched while it generates.
"""

import copy
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import sample
from test_ahead import SAMPLER, Recorded, assert_claims_hold, logged, make
from transformers import AutoModelForCausalLM, TrainerCallback
from trl.generation import vllm_generation

VLLM = SAMPLER | {"use_vllm": True, "vllm_mode": "colocate", "top_k": 0}


class Params(SimpleNamespace):
    """vLLM's parameters of a request."""

    seed = None

    def clone(self):
        return copy.copy(self)


class Engine:
    """vLLM's `LLM` as far as TRL and the package use it. Off the main thread it waits until the next optimizer step is
    done, so a trainer that waited for it before an update would never get there."""

    fails, loses_weights = False, False

    def __init__(self, model, **arguments):
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.arguments, self.busy, self.step_done = arguments, threading.Lock(), threading.Event()
        self.seeds, self.on_main, self.calls = [], [], []
        sampler = SimpleNamespace(topk_topp_sampler=SimpleNamespace(forward=None, forward_native=torch.softmax))
        self.runner = SimpleNamespace(get_model=lambda: self.model, sampler=sampler)
        worker = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=self.runner))
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32), model_executor=worker)

    @contextmanager
    def alone(self, what):
        assert self.busy.acquire(blocking=False), f"{what} while the engine generates"
        self.calls.append(what)
        try:
            yield
        finally:
            self.busy.release()

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights" and threading.current_thread() is threading.main_thread()
        with self.alone("sync"):
            state = dict(kwargs["weights_iterator"])
            if not self.loses_weights:
                self.model.load_state_dict(state)

    def reset_prefix_cache(self):
        with self.alone("reset"):
            pass

    def generate(self, prompts, sampling_params, use_tqdm):
        with self.alone("generate"):
            is_main = threading.current_thread() is threading.main_thread()
            each = sampling_params if isinstance(sampling_params, list) else [sampling_params] * len(prompts)
            if not is_main and any(params.max_tokens > 8 for params in each) and len(self.on_main) > 0:
                assert self.step_done.wait(30), "no optimizer step was made while the engine generated"
            self.on_main.append(is_main)
            self.seeds += [params.seed for params in each if not is_main]
            if self.fails and len(self.seeds) > 16:
                raise ValueError("out of cache")
            return [self.one(prompt["prompt_token_ids"], params) for prompt, params in zip(prompts, each, strict=True)]

    def one(self, prompt, params):
        ids, logps = sample(self.model, prompt, params.seed, params.temperature, params.max_tokens)
        logprobs = [{token: SimpleNamespace(logprob=x, rank=1)} for token, x in zip(ids, logps, strict=True)]
        output = SimpleNamespace(token_ids=tuple(ids), logprobs=logprobs, routed_experts=None)
        return SimpleNamespace(prompt_token_ids=prompt, outputs=[output])


@pytest.fixture
def engine(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # TRL sets them for good
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    for name, value in {"LLM": Engine, "SamplingParams": Params}.items():
        monkeypatch.setitem(vars(vllm_generation), name, value)
    monkeypatch.setattr(Engine, "fails", False)
    monkeypatch.setattr(Engine, "loses_weights", False)


class Ahead(Recorded):
    """Lets the engine generate while an update runs, and no sooner."""

    def train(self, *args, **kwargs):
        gate, done = TrainerCallback(), self.vllm_generation.llm.step_done
        gate.on_step_end = lambda args, state, control, **_: done.set()
        gate.on_step_begin = lambda args, state, control, **_: done.clear()
        self.add_callback(gate)
        return super().train(*args, **kwargs)


def made(tmp_path, tokenizer, **fields):
    return make(tmp_path, tokenizer, cls=Ahead, **(VLLM | fields))


def test_the_thread_holds_the_weights_that_a_rollout_claims(tmp_path, tokenizer, engine, capsys):
    """Evaluations in between take the engine with the weights of their moment and move no rollout."""
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8}
    runs = []
    for i, fields in enumerate((evaluated, evaluated, {})):
        runs.append(made(tmp_path / str(i), tokenizer, engine_check_every=1, **fields))
        runs[-1].train()
    first, second, plain = runs
    assert_claims_hold(first, 1e-5)
    assert "vLLM; one rollout ahead, in a thread" in capsys.readouterr().out
    assert logged(first, "sampling/weights_age") == [0, 1, 2, 3, 2]
    assert len(logged(first, "sampling/engine_check")) == 2 and max(logged(first, "sampling/engine_check")) < 0.1
    for a, b in zip(first.rollouts, second.rollouts, strict=True):
        assert all(torch.equal(x.input_ids, y.input_ids) for x, y in zip(a[1], b[1], strict=True))
    assert all(torch.equal(first.weights[5][name], x) for name, x in second.weights[5].items())
    for a, b in zip(first.rollouts[1][1], plain.rollouts[1][1], strict=True):
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.sampler_logps, b.sampler_logps)
    llm, plain_llm = first.vllm_generation.llm, plain.vllm_generation.llm
    assert llm.on_main.count(True) == 3 * 2 and not any(plain_llm.on_main)  # two batches of each of three evaluations
    assert len(set(plain_llm.seeds)) == len(plain_llm.seeds) == 3 * 16 + 4  # three rollouts, one check
    assert plain_llm.calls.count("sync") == 2 and llm.runner.sampler.topk_topp_sampler.forward is torch.softmax


def test_a_killed_run_goes_on_with_the_rollout_that_the_thread_had_begun(tmp_path, tokenizer, engine, capsys):
    whole = made(tmp_path / "whole", tokenizer, save_strategy="steps", save_steps=3)
    whole.train()
    resumed = made(tmp_path / "resumed", tokenizer)
    resumed.train(str(tmp_path / "whole/checkpoint-3"))
    assert all(torch.equal(whole.weights[5][name], x) for name, x in resumed.weights[5].items())
    assert "exact" not in capsys.readouterr().out
    (step, rows), (_, theirs) = resumed.rollouts[0], whole.rollouts[2]
    assert step == 2 and all(torch.equal(a.sampler_logps, b.sampler_logps) for a, b in zip(rows, theirs, strict=True))
    assert resumed.vllm_generation.llm.seeds == []  # nobody used what it would have generated further


def test_an_engine_that_keeps_its_first_weights_is_found(tmp_path, tokenizer, engine, monkeypatch):
    """No rollout after the first shows it, being of older weights anyway."""
    monkeypatch.setattr(Engine, "loses_weights", True)
    trainer = made(tmp_path, tokenizer, engine_check_every=1)
    trainer.train()
    first, second = logged(trainer, "sampling/engine_check")
    assert first < 0.1 < 10 < second


def test_what_goes_wrong_in_the_thread_is_said_and_the_engine_is_idle_afterwards(
    tmp_path, tokenizer, engine, monkeypatch
):
    monkeypatch.setattr(Engine, "fails", True)
    trainer = made(tmp_path / "a", tokenizer)
    with pytest.raises(RuntimeError, match="vLLM failed while it generated the rollout ahead: ValueError: out of cach"):
        trainer.train()
    monkeypatch.setattr(Engine, "fails", False)
    trainer, strike = made(tmp_path / "b", tokenizer), TrainerCallback()
    llm = trainer.vllm_generation.llm
    strike.on_step_end = lambda args, state, control, **_: llm.step_done.set() or 1 / 0
    trainer.add_callback(strike)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert not llm.busy.locked() and llm.calls.count("generate") == 2 and "generate" not in vars(llm)
