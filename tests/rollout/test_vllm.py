"""What the trainer tells vLLM and takes from it, without vLLM; with it: `test_vllm_engine.py`."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import sapo_config, tiny_model
from trl.generation import vllm_generation

from sapo_trl.rollout.vllm import engine_arguments, engine_dtype, engine_routes, recording_engine
from sapo_trl.trl_seams import engine_made_with


def told(tmp_path, device="cuda", mixed="no", dtype=torch.float32, **fields):
    accelerator = SimpleNamespace(mixed_precision=mixed, device=torch.device(device))
    return engine_arguments(sapo_config(tmp_path, use_vllm=True, **fields), accelerator, SimpleNamespace(dtype=dtype))


def test_the_engine_computes_in_what_the_trainer_computes_in(tmp_path):
    assert told(tmp_path) == {"dtype": "float32"}
    assert told(tmp_path, mixed="bf16") == told(tmp_path, dtype=torch.bfloat16) == {"dtype": "bfloat16"}
    assert told(tmp_path, vllm_dtype="float16") == {"dtype": "float16"}
    assert told(tmp_path, device="cpu") == {"dtype": "float32", "enforce_eager": True}
    r3 = told(tmp_path, routing_replay="r3")
    assert r3 == {"dtype": "float32", "enable_return_routed_experts": True, "enable_prefix_caching": False}
    assert engine_dtype(None) == torch.bfloat16
    server = {"vllm_client": SimpleNamespace(dtype="float16"), "accelerator": SimpleNamespace(is_main_process=True)}
    assert engine_dtype(SimpleNamespace(mode="server", **server)) == torch.float16


def test_arguments_reach_the_engine_that_trl_makes(monkeypatch):
    monkeypatch.setitem(vars(vllm_generation), "LLM", dict)
    with engine_made_with(lambda: {"dtype": "float32"}):
        assert vllm_generation.LLM(model="m", seed=3) == {"model": "m", "seed": 3, "dtype": "float32"}
    assert vllm_generation.LLM is dict
    usual, client = vllm_generation.VLLMClient, SimpleNamespace()
    with engine_made_with(dict, client):
        assert vllm_generation.VLLMClient(base_url="http://host:1") is client
    assert vllm_generation.VLLMClient is usual


def output(routes):
    return SimpleNamespace(routed_experts=routes)


def test_routes_by_hand(tokenizer):
    """Two prompts with completions of 3 and 2 tokens altogether; layers 0 and 1 of the model have experts."""
    model = tiny_model(tokenizer, moe=True)
    first = np.array([[[1, 2], [3, 4]], [[5, 6], [7, 0]]], dtype=np.uint8)  # (2 forwarded tokens, 2 layers, 2)
    routes = engine_routes([output(first), output(first[:1])], [3, 2], model)
    assert [x.shape for x in routes] == [(3, 2, 2), (2, 2, 2)] and routes[0].dtype == torch.uint8
    assert routes[0].tolist() == [*first.tolist(), [[0, 0], [0, 0]]] and routes[1][:1].tolist() == first[:1].tolist()
    wide = engine_routes([output(first.astype(np.uint16))], [3], model)
    assert wide[0].dtype == torch.int16 and wide[0].tolist() == routes[0].tolist()
    nowhere = np.zeros_like(first)  # what an engine hands out that has recorded nothing
    for wrong, found in ((None, 0), (first[:1], 2), (nowhere, 0)):
        with pytest.raises(RuntimeError, match=rf"experts of {found} selections, and 3 tokens.* have 4 in 2 layers"):
            engine_routes([output(wrong)], [3], model)


def test_what_the_engine_returns_is_kept_and_the_engine_left_as_it_was():
    class LLM:
        def generate(self, prompts):
            return [SimpleNamespace(outputs=[f"{prompt}!"]) for prompt in prompts]

    llm = LLM()
    with recording_engine(SimpleNamespace(llm=llm)) as outputs:
        assert len(llm.generate(["a", "b"])) == 2
    assert outputs == ["a!", "b!"] and "generate" not in vars(llm)
