"""Prompts forwarded once per pack: the same log-probs, gradients, routes and router loss as one row after the other."""

import itertools

import pytest
import torch
import torch.nn.functional as F
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
from transformers import AttentionInterface

from sapo_trl import SAPOTrainer
from sapo_trl.attention import plan_segments
from sapo_trl.packing import pack_inputs, pack_tokens_forwarded, plan_packs
from sapo_trl.rollout import Row, rows_from_padded, set_prompt_keys

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
            out = forward(model, forward.lay_out(trainer_rows)).logps
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

    from sapo_trl.packing import PackedForward

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
    assert [(grid.rows, grid.length) for grid in segments.grids] == [(((0, 1), (0, 2)), 4), (((3,),), 2)]


def test_packs_count_a_shared_prompt_once():
    row = lambda n, key: Row(torch.arange(n), 6, torch.ones(n - 6, dtype=torch.bool), 1.0, key)  # noqa: E731
    rows = [row(10, 0), row(9, 1), row(8, 0), row(8, 1)]
    packs = plan_packs(rows, max_tokens=12)
    assert [[len(r) for r in pack] for pack in packs] == [[10, 8], [9, 8]]
    assert [pack_tokens_forwarded(pack) for pack in packs] == [12, 11]
    assert len(plan_packs(rows, max_tokens=11)) == 3


def test_sharing_is_off_below_a_saving_that_pays(tmp_path, tokenizer):
    """Two rows of one prompt token among long completions save 1 token of 64; none would be shared."""
    forward = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer))._forward
    long = [Row(torch.arange(32), 1, torch.ones(31, dtype=torch.bool), 1.0) for _ in range(2)]
    forward.plan_mini_batches([long], [long], 62.0)
    assert [row.prompt_key for row in long] == [None, None]
    short = [Row(torch.arange(32), 20, torch.ones(12, dtype=torch.bool), 1.0) for _ in range(2)]
    (mini_batch,) = forward.plan_mini_batches([short], [short], 24.0)
    assert pack_tokens_forwarded(mini_batch.packs[0]) == 44


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
    assert sorted(map(pack_tokens_forwarded, packs)) == [13, 17, 19]


def reference_varlen(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **kwargs):
    """What flash attention computes from `cu_seq_lens`: causal attention row by row."""
    bounds = cu_seq_lens_q.tolist()
    outputs = [
        F.scaled_dot_product_attention(
            *(x[:, :, a:b] for x in (query, key, value)), is_causal=True, scale=scaling, enable_gqa=True
        )
        for a, b in itertools.pairwise(bounds)
    ]
    assert kwargs["max_length_q"] == max(b - a for a, b in itertools.pairwise(bounds))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


@pytest.mark.parametrize("share", [True, False])
def test_flash_layout_with_explicit_row_bounds(tmp_path, tokenizer, share):
    """The layout of a GPU, with a kernel that any machine runs."""
    AttentionInterface.register("flash_reference", reference_varlen)
    model = tiny_model(tokenizer)
    batch = with_shared_prompts(model, tool_mask=True)
    _, expected, _ = one_update(sapo_trainer(tmp_path, tokenizer, model, share_prompts=False), batch)
    trainer = sapo_trainer(tmp_path, tokenizer, model, share_prompts=share, max_tokens_per_pack=60)
    trainer._forward.layout, trainer._forward.kernel = "flash", "flash_reference"
    _, actual, metrics = one_update(trainer, batch)
    assert relative_error(actual, expected) < 2e-6
    assert (metrics["update/shared_tokens"] > 0) == share


def test_an_updates_packs_never_wait_for_the_device(tmp_path, tokenizer):
    """No value is read back between the first pack's forward pass and the last one's backward pass."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Waits(TorchDispatchMode):
        seen: list

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::bincount"):
                self.seen.append(func.name())
            return func(*args, **(kwargs or {}))

    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), max_tokens_per_pack=24, beta=0.05)
    batch = with_shared_prompts(trainer.model, tool_mask=True)
    trainer.model.train()
    tokens = float(batch["num_items_in_batch"])
    rows = rows_from_padded(batch)
    mini_batch = trainer._forward.plan_mini_batches([rows], trainer._live([rows]), tokens)[0]
    laid_out = {id(pack): trainer._forward.lay_out(pack) for pack in mini_batch.packs}
    trainer._forward.lay_out = lambda pack: laid_out[id(pack)]  # its own reads are on the host
    assert len(mini_batch.packs) > 2
    waits = Waits()
    waits.seen = []
    with trainer._forward.packed(trainer.model), waits:
        trainer._update._run_packs(trainer.model, mini_batch, backward=True)
    assert not waits.seen
    with waits:
        torch.ones(3).sum().item()
    assert waits.seen  # the mode does see what it looks for


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
