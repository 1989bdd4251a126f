"""Prompts forwarded once per pack: the same log-probs, gradients, routes and router loss as one row after the other."""

import itertools
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, PartialState
from conftest import (
    length_reward,
    one_update,
    padded_rollout,
    prompts,
    relative_error,
    sapo_config,
    sapo_trainer,
    tiny_model,
)
from transformers import (
    AttentionInterface,
    DeepseekV3Config,
    GPTNeoXConfig,
    MixtralConfig,
    Qwen3Config,
    modeling_flash_attention_utils,
)
from transformers.integrations import moe

from sapo_trl import SAPOTrainer
from sapo_trl.model import head_shape
from sapo_trl.rollout.rows import LOGPS_KEYS, Row, rows_from_padded, set_prompt_keys, tokens_forwarded
from sapo_trl.update.attention import TORCH_VARLEN, plan_segments, torch_varlen_trial
from sapo_trl.update.packing import attention_pair_cost, pack_inputs, plan_packs

CPU = torch.device("cpu")


def with_shared_prompts(model, **fields) -> dict:
    """`padded_rollout` with two prompts of 7 tokens, for rows 0, 2, 3, 5 and for the others."""
    batch = padded_rollout(model, **fields)
    g = torch.Generator().manual_seed(5)
    prompts = torch.randint(3, model.config.vocab_size, (2, 7), generator=g)
    batch["prompt_ids"] = prompts[torch.tensor([0, 1, 0, 0, 1, 0, 1, 1])]
    batch["prompt_mask"] = torch.ones_like(batch["prompt_ids"])
    return batch


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("budget", [10_000, 40, 25, 1])
def test_sharing_changes_no_number(tmp_path, tokenizer, moe, budget):
    extra = {"router_aux_loss_coef": 0.05, "routing_replay": "r2"} if moe else {}
    model = tiny_model(tokenizer, moe)
    batch = with_shared_prompts(model, tool_mask=True)
    results = {}
    for share in (True, False):
        trainer = sapo_trainer(
            tmp_path, tokenizer, model, share_prompts=share, max_tokens_per_pack=budget, beta=0.05, **extra
        )
        results[share] = one_update(trainer, batch)
    (loss, shared, metrics), (plain_loss, plain, plain_metrics) = results[True], results[False]
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    assert relative_error(shared, plain) < 2e-6
    assert (metrics["update/shared_tokens"] > 0) == (budget > 1) and plain_metrics["update/shared_tokens"] == 0
    assert (
        metrics["update/forwarded_tokens"] + metrics["update/shared_tokens"] == plain_metrics["update/forwarded_tokens"]
    )
    for key in metrics.keys() - {"update/packs", "update/forwarded_tokens", "update/shared_tokens"}:
        assert metrics[key] == pytest.approx(plain_metrics[key], rel=1e-4, abs=1e-6), key


def test_a_row_that_shares_a_prompt_sees_no_other_completion(tokenizer):
    """Changing one completion leaves the others of its prompt bit-equal; changing the prompt moves all of them."""
    model = tiny_model(tokenizer)
    rows = rows_from_padded(with_shared_prompts(model))
    set_prompt_keys(rows)
    assert {row.prompt_key for row in rows} == {0, 1}

    def logps(trainer_rows):
        with torch.no_grad(), forward.packed(model):
            out = forward(model, forward.build_inputs(trainer_rows)).logps
        return out.split([row.num_trained for row in trainer_rows])

    forward = sapo_forward(model)
    before = logps(rows)
    rows[2].input_ids = torch.cat([rows[2].input_ids[:7], rows[2].input_ids[7:].flip(0)])
    for i, (a, b) in enumerate(zip(before, logps(rows), strict=True)):
        assert torch.equal(a, b) == (i != 2)
    for i in (0, 2, 3, 5):
        rows[i].input_ids = torch.cat([rows[i].input_ids[:7].flip(0), rows[i].input_ids[7:]])
    for i, (a, b) in enumerate(zip(before, logps(rows), strict=True)):
        assert torch.equal(a, b) == (i in (1, 4, 6, 7))


def sapo_forward(model):
    from accelerate import Accelerator

    from sapo_trl.update.packing import PackedForward

    return PackedForward(model, None, Accelerator(cpu=True), 0, 1.0, False, max_tokens=10_000, share_prompts=True)


def test_layout_of_a_shared_prompt():
    """Prompt 1 2 with completions 3 4 and 5, prompt 7 with 8: by hand."""
    row = lambda ids, n, key: Row(torch.tensor(ids), n, torch.ones(len(ids) - n, dtype=torch.bool), 1.0, key)  # noqa: E731
    rows = [row([1, 2, 3, 4], 2, 0), row([1, 2, 5], 2, 0), row([7, 8], 1, 1)]
    inputs = pack_inputs(rows, "segments", 0, CPU)
    assert inputs.model_inputs["input_ids"].tolist() == [[1, 2, 3, 4, 5, 7, 8]]
    assert inputs.model_inputs["position_ids"].tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert inputs.predict.tolist() == [1, 2, 1, 5] and inputs.targets.tolist() == [3, 4, 5, 8]
    assert inputs.rows.tolist() == [0, 0, 1, 2]
    assert inputs.expand.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6]
    assert inputs.expand[inputs.collapse].tolist() == list(range(7))
    segments = plan_segments(rows)
    assert segments.sizes == (2, 2, 1, 2)
    assert segments.rows == ((0, 1), (0, 2), (3,))
    assert segments.parts == ([2, 2, 1, 2], [(2, 5, 0, 2)])  # both completions in one call against their prompt


def test_packs_count_a_shared_prompt_once():
    row = lambda n, key: Row(torch.arange(n), 6, torch.ones(n - 6, dtype=torch.bool), 1.0, key)  # noqa: E731
    rows = [row(10, 0), row(9, 1), row(8, 0), row(8, 1)]
    packs = plan_packs(rows, max_tokens=12)
    assert [[len(r) for r in pack] for pack in packs] == [[10, 8], [9, 8]]
    assert [tokens_forwarded(pack) for pack in packs] == [12, 11]
    assert len(plan_packs(rows, max_tokens=11)) == 3


def test_sharing_is_off_below_a_saving_that_pays(tmp_path, tokenizer):
    """Two rows of one prompt token among long completions save 1 token of 64; none would be shared."""
    forward = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer))._forward
    long = [Row(torch.arange(32), 1, torch.ones(31, dtype=torch.bool), 1.0) for _ in range(2)]
    forward.plan_mini_batches([long], [long], 62.0)
    assert [row.prompt_key for row in long] == [None, None]
    short = [Row(torch.arange(32), 20, torch.ones(12, dtype=torch.bool), 1.0) for _ in range(2)]
    (mini_batch,) = forward.plan_mini_batches([short], [short], 24.0)
    assert tokens_forwarded(mini_batch.packs[0]) == 44


def test_a_prompt_lies_in_few_packs():
    """Prompts of 4 tokens; filling packs by length alone takes 57 tokens, each prompt in all three packs."""
    lengths = {1: (6, 5, 4, 3), 2: (6, 5, 4)}
    rows = [
        Row(torch.arange(4 + n), 4, torch.ones(n, dtype=torch.bool), 1.0, prompt_key=key)
        for key, completions in lengths.items()
        for n in completions
    ]
    packs = plan_packs(rows, 20)
    planned = [[(row.prompt_key, len(row) - 4) for row in pack] for pack in packs]
    assert sorted(planned) == [[(1, 3), (2, 6)], [(1, 6), (1, 5), (1, 4)], [(2, 5), (2, 4)]]
    assert sorted(map(tokens_forwarded, packs)) == [13, 17, 19]


def rows_of(bounds: torch.Tensor, *tensors: torch.Tensor):
    """Tensors (T, H, D) as rows of (1, H, t, D)."""
    for start, end in itertools.pairwise(bounds.tolist()):
        yield tuple(x[start:end].transpose(0, 1)[None] for x in tensors)


def flash_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    """What flash-attn's `flash_attn_varlen_func` computes, by its documentation."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32 and dropout_p == 0.0
    assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
    return torch.cat([
        F.scaled_dot_product_attention(*row, is_causal=causal, scale=softmax_scale, enable_gqa=True)[0].transpose(0, 1)
        for row in rows_of(cu_seqlens_q, q, k, v)
    ])  # fmt: skip


def torch_varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """What `torch.nn.attention.varlen.varlen_attn` computes, by its documentation."""
    assert enable_gqa
    causal = window_size == (-1, 0)
    return flash_varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, softmax_scale=scale, causal=causal)


@pytest.fixture
def flash_package(monkeypatch):
    """A `flash_attn` for transformers to load, by its name only: the path of a GPU down to the kernel."""
    package = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash_varlen
    package.flash_attn_func = package.flash_attn_with_kvcache = flash_varlen
    padding = types.ModuleType("flash_attn.bert_padding")
    padding.pad_input = padding.unpad_input = None
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(modeling_flash_attention_utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kernel", ["flash_attention_2", TORCH_VARLEN])
def test_flash_layout_with_explicit_row_bounds(
    tmp_path, tokenizer, flash_package, monkeypatch, share, kernel, checkpointing
):
    """The layout of a GPU through transformers' own code, with kernels that any machine runs."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torch_varlen)
    model = tiny_model(tokenizer)
    batch = with_shared_prompts(model, tool_mask=True)
    _, expected, _ = one_update(sapo_trainer(tmp_path, tokenizer, model, share_prompts=False), batch)
    trainer = sapo_trainer(
        tmp_path, tokenizer, model, share_prompts=share, max_tokens_per_pack=60, gradient_checkpointing=checkpointing
    )
    trainer._forward.layout, trainer._forward.kernel = "flash", kernel
    _, actual, metrics = one_update(trainer, batch)
    assert relative_error(actual, expected) < 2e-6
    assert (metrics["update/shared_tokens"] > 0) == share


class SpoiledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.nan


def test_torchs_kernel_is_tried_before_it_is_used(tokenizer, monkeypatch):
    config, cpu = tiny_model(tokenizer).config, torch.device("cpu")
    assert "_flash_attention_forward" in torch_varlen_trial(config, cpu, torch.bfloat16)  # torch has none for a CPU
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torch_varlen)
    assert torch_varlen_trial(config, cpu, torch.bfloat16) is None

    def forgets_causality(*args, window_size, enable_gqa, **kwargs):
        return torch_varlen(*args, enable_gqa=enable_gqa, **kwargs)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", forgets_causality)
    assert "off sdpa's" in torch_varlen_trial(config, cpu, torch.bfloat16)

    def spoils_gradients(*args, enable_gqa, **kwargs):
        return SpoiledGradient.apply(torch_varlen(*args, enable_gqa=enable_gqa, **kwargs))

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", spoils_gradients)
    assert "nan off sdpa's" in torch_varlen_trial(config, cpu, torch.bfloat16)
    assert torch_varlen_trial(DeepseekV3Config(), cpu, torch.bfloat16) == (
        "keys and values have heads of different widths"
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MixtralConfig(hidden_size=64, num_attention_heads=8, num_key_value_heads=2), (8, 2, 8)),  # head_dim: null
        (GPTNeoXConfig(hidden_size=64, num_attention_heads=4), (4, 4, 16)),  # names neither
        (Qwen3Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32), (4, 2, 32)),
    ],
)
def test_widths_of_attention(config, expected):
    assert head_shape(config) == expected
    assert 0 < attention_pair_cost(config) < 1


def rowless_attention(module, query, key, value, attention_mask, **kwargs):
    """The shapes of a flash kernel."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2), None


READS_NOTHING = {
    "sapo": {},
    "flash": {},
    "gspo": {"algorithm": "gspo", "dump_ratios_every": 1},
    "r2": {"algorithm": "grpo-r2"},
    "experts' loss": {"router_aux_loss_coef": 0.05},
}


@pytest.mark.parametrize("name", READS_NOTHING)
def test_an_updates_packs_never_wait_for_the_device(tmp_path, tokenizer, monkeypatch, name):
    """On a device without storage every read-back, and every tensor left on the host, is an error."""
    AttentionInterface.register("flash_reference", rowless_attention)
    model = tiny_model(tokenizer, moe=name in ("r2", "experts' loss"))
    trainer = sapo_trainer(tmp_path, tokenizer, model, max_tokens_per_pack=24, beta=0.05, **READS_NOTHING[name])
    if name == "flash":
        trainer._forward.layout, trainer._forward.kernel = "flash", "flash_reference"
    batch = with_shared_prompts(trainer.model, tool_mask=True)
    trainer.model.train()
    rows, tokens = rows_from_padded(batch), float(batch["num_items_in_batch"])
    mini_batch = trainer._forward.plan_mini_batches([rows], trainer._plan.active([rows]), tokens)[0]
    assert len(mini_batch.packs) > 2

    meta, autocasts = torch.device("meta"), torch.is_autocast_enabled
    for state in (AcceleratorState, PartialState):
        monkeypatch.setitem(state._shared_state, "device", meta)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": device != "meta" and autocasts(device))
    # has kernels for bf16 only there
    monkeypatch.setattr(moe, "_grouped_mm", lambda inputs, weight, offs, **kwargs: inputs @ weight[0])
    trainer.model.to(meta)
    for row in rows:
        for logps in LOGPS_KEYS:
            setattr(row, logps, getattr(row, logps).to(meta))
    with trainer._forward.packed(trainer.model):
        loss = trainer._update.run(trainer.model, mini_batch, backward=True).loss
    assert loss.is_meta and all(p.grad.is_meta for p in trainer.model.parameters())
    with pytest.raises(RuntimeError):
        loss.item()  # what the test is about


def test_lora_through_shared_prompts(tmp_path, tokenizer):
    """Adapters get the same gradient, and only they get one."""
    from peft import LoraConfig

    results = {}
    for share in (True, False):
        config = sapo_config(tmp_path, share_prompts=share, max_tokens_per_pack=40)
        torch.manual_seed(0)
        trainer = SAPOTrainer(
            tiny_model(tokenizer), length_reward, config, prompts(), processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
        )  # fmt: skip
        results[share] = one_update(trainer, with_shared_prompts(tiny_model(tokenizer), tool_mask=True))
    assert relative_error(results[True][1], results[False][1]) < 2e-6
    assert all("lora_" in name for name in results[True][1])
    assert results[True][2]["update/shared_tokens"] > 0
