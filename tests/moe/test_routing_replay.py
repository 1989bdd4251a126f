"""Routing replay: which experts run, with which scores and gradients, and whose record it is.

The oracle of what runs is a hook on the experts' own inputs, behind the code under test.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import gradients, relative_error, tiny_model
from peft import LoraConfig, get_peft_model
from routing_world import (
    LAYERS,
    Executed,
    bare_model,
    build_inputs,
    changed_share,
    drifted,
    eight_rows,
    forward,
    moe_model,
    record_rows,
)
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from sapo_trl.model import find_routers
from sapo_trl.moe.routing_replay import (
    Routing,
    attach,
    is_unrecorded,
    pack_routes,
    prepare_routing,
    recording,
    replaying,
    routed,
    split_routes,
)
from sapo_trl.rollout.rows import Row
from sapo_trl.update.attention import packed_attention
from sapo_trl.update.head import add_token_head


@pytest.fixture(scope="module")
def rows(tokenizer):
    return eight_rows(tokenizer)


# ---- what runs -----------------------------------------------------------------------------------------------------


def backward(model, rows, layout="segments"):
    """log-probs and gradients of a loss that weighs every token differently."""
    model.zero_grad()
    with packed_attention(model, layout):
        outputs = forward(model, rows, layout)
        (outputs.logps * torch.linspace(-1, 2, len(outputs.logps))).sum().backward()
    return outputs.logps.detach(), gradients(model)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("layout", ["segments", "padded"])
def test_an_unchanged_selection_changes_no_bit(tokenizer, rows, layout, normalised):
    model = moe_model(tokenizer, normalised)
    bare = bare_model(tokenizer, normalised)
    add_token_head(bare, 1.0)
    logps, grads = backward(bare, rows, layout)
    routes = pack_routes(record_rows(model, rows, layout), build_inputs(rows, layout).collapse)
    inert = backward(model, rows, layout)
    with replaying(model, routes):
        replayed = backward(model, rows, layout)
    for other_logps, other_grads in (inert, replayed):
        assert torch.equal(other_logps, logps)
        assert other_grads.keys() == grads.keys()
        assert all(torch.equal(other_grads[name], grads[name]) for name in grads)


def test_after_an_update_the_recorded_experts_run_with_present_scores(tokenizer, rows):
    model = moe_model(tokenizer)
    with torch.no_grad(), Executed(model) as old, recording(model) as record:
        forward(model, rows)
    assert torch.equal(record.routes(), old.routes().to(torch.uint8)) and record.routes().dtype == torch.uint8
    after = drifted(model)
    with torch.no_grad(), Executed(after) as free:
        forward(after, rows)
    with torch.no_grad(), Executed(after) as ran, replaying(after, record.routes()), recording(after) as would:
        logits = forward(after, rows, output_router_logits=True).router_logits
    shares = [changed_share(record.routes()[:, i : i + 1], free.routes()[:, i : i + 1]) for i in range(LAYERS)]
    print(f"own selections that differ, per layer: {shares}")
    assert min(shares) > 0.1 and sum(shares) < LAYERS
    assert torch.equal(ran.routes(), old.routes())  # every token, every layer, in the recorded order
    # What the routers would have selected is recorded all the same; in layer 0 nothing upstream has changed yet
    assert torch.equal(would.routes()[:, 0], free.routes()[:, 0].to(torch.uint8))
    for layer in range(LAYERS):
        probs = logits[layer].double().softmax(-1)
        chosen = torch.stack([probs[t, ran.indices[layer][t]] for t in range(len(probs))])
        torch.testing.assert_close(ran.scores[layer].double(), chosen / chosen.sum(1, keepdim=True), atol=1e-6, rtol=0)
        assert not torch.allclose(ran.scores[layer], old.scores[layer], atol=1e-3)


def test_the_routers_gradient_matches_finite_differences(tokenizer, rows):
    """Central differences of fourth order with the selection held fixed, off-policy, per layer. The router's softmax
    is float32 in every model, so the differences are good to about 1e-4."""
    model = moe_model(tokenizer)
    routes = pack_routes(record_rows(model, rows), None)
    after = drifted(bare_model(tokenizer)).double()
    attach(after)
    after.set_experts_implementation("eager")  # grouped_mm has no float64
    inputs = build_inputs(rows).model_inputs
    weights = torch.randn(len(routes), after.config.vocab_size, dtype=torch.float64) / len(routes)

    def loss():
        with packed_attention(after, "segments"), replaying(after, routes):
            return (after(**inputs, use_cache=False).logits[0].log_softmax(-1) * weights).sum()

    with recording(after) as free:
        loss().backward()
    assert changed_share(routes, free.routes()) > 0.1
    for router in [each.module for each in find_routers(after)]:
        gradient = router.weight.grad.clone()
        direction = gradient / gradient.norm() + 0.5 * torch.randn_like(gradient) / gradient.numel() ** 0.5
        assert gradient.norm() > 1e-3
        values, start, h = {}, router.weight.data.clone(), 0.02
        with torch.no_grad():
            for step in (-2, -1, 1, 2):
                router.weight.copy_(start + step * h * direction)
                values[step] = loss().item()
            router.weight.copy_(start)
        slope = (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * h)
        print(f"finite difference {slope}, gradient {(gradient * direction).sum().item()}")
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_in_the_second_forward_too(tokenizer, rows, reentrant):
    model = moe_model(tokenizer)
    routes = pack_routes(record_rows(model, rows), None)
    after = drifted(model).train()
    with replaying(after, routes):
        logps, grads = backward(after, rows)
    after.gradient_checkpointing_enable({"use_reentrant": reentrant})
    after.enable_input_require_grads()
    with Executed(after) as ran, replaying(after, routes), recording(after) as record:
        other_logps, other = backward(after, rows)
    assert len(ran.indices) == 2 * LAYERS  # really forwarded twice
    first, second = ran.indices[:LAYERS], ran.indices[LAYERS:]  # the second comes from the last layer to the first
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(second), strict=True))
    assert torch.equal(logps, other_logps)
    assert relative_error(other, grads) < 1e-6
    assert record.routes().shape == routes.shape
    free, _ = backward(after, rows)
    assert not torch.allclose(free, logps, atol=1e-3)


# ---- layouts and order ---------------------------------------------------------------------------------------------


def test_routes_follow_their_rows_through_every_layout_and_order(tokenizer, rows):
    """Recorded in one pack; replayed padded, row by row, and shuffled into two packs."""
    model = moe_model(tokenizer)
    routes = record_rows(model, rows)
    assert [len(r) for r in routes] == [len(row) for row in rows]
    for other in (record_rows(model, rows, "padded"), [record_rows(model, [row])[0] for row in rows]):
        assert all(torch.equal(a, b) for a, b in zip(routes, other, strict=True))
    after = drifted(model)

    def routes_of(picked, layout):
        return pack_routes([routes[i] for i in picked], build_inputs([rows[i] for i in picked], layout).collapse)

    def logps(picked, layout):
        with torch.no_grad(), replaying(after, routes_of(picked, layout)):
            out = forward(after, [rows[i] for i in picked], layout).logps
        return dict(zip(picked, out.split([rows[i].num_trained for i in picked]), strict=True))

    whole = logps(range(8), "segments")
    others = [
        logps([5, 0, 7, 2, 6, 1, 3, 4], "padded"),
        {i: logps([i], "segments")[i] for i in range(8)},
        logps([1, 3, 4, 6], "segments") | logps([0, 2, 5, 7], "segments"),
    ]
    for other in others:
        for i in range(8):
            torch.testing.assert_close(other[i], whole[i], atol=2e-5, rtol=0)
    with torch.no_grad(), replaying(after, pack_routes(routes[::-1], None)):  # a queue by call order
        wrong = forward(after, rows).logps
    assert (wrong - torch.cat([whole[i] for i in range(8)])).abs().max() > 1e-2


def test_padding_is_unrecorded_and_shared_prompts_are_there_once():
    a, b = torch.tensor([[[3, 0]], [[1, 2]], [[0, 255]]]).byte(), torch.tensor([[[255, 1]], [[4, 5]]]).byte()
    rows = [Row(torch.arange(len(x)), 1, torch.ones(len(x) - 1, dtype=torch.bool), 1.0) for x in (a, b)]
    padded = build_inputs(rows, "padded")
    routes = pack_routes([a, b], padded.collapse)
    assert routes.tolist() == [[[3, 0]], [[1, 2]], [[0, 255]], [[255, 1]], [[4, 5]], [[0, 0]]]
    assert is_unrecorded(routes)[:, 0].tolist() == [False] * 5 + [True]
    assert [r.tolist() for r in split_routes(routes, [3, 2], padded.expand)] == [a.tolist(), b.tolist()]
    assert [r.tolist() for r in split_routes(pack_routes([a, b], None), [3, 2], None)] == [a.tolist(), b.tolist()]
    b[0] = a[0]
    for row in rows:
        row.prompt_key = 7
    shared = build_inputs(rows)
    routes = pack_routes([a, b], shared.collapse)
    assert routes.tolist() == [[[3, 0]], [[1, 2]], [[0, 255]], [[4, 5]]]
    assert [r.tolist() for r in split_routes(routes, [3, 2], shared.expand)] == [a.tolist(), b.tolist()]


def test_unrecorded_positions_are_chosen_by_the_router(tokenizer, rows):
    model = moe_model(tokenizer)
    routes = pack_routes(record_rows(model, rows), None)
    routes[::3] = 0
    after = drifted(model)
    with torch.no_grad(), Executed(after) as ran, replaying(after, routes), recording(after) as free:
        forward(after, rows)
    expected = torch.where(is_unrecorded(routes)[..., None], free.routes(), routes)
    assert torch.equal(ran.routes().to(torch.uint8), expected)
    assert is_unrecorded(routes).sum() == LAYERS * len(routes[::3])
    assert not torch.equal(free.routes()[::3], pack_routes(record_rows(model, rows), None)[::3])


@pytest.mark.parametrize(("experts", "dtype"), [(256, torch.uint8), (300, torch.int16)])
def test_every_expert_index_survives_the_record(experts, dtype):
    selection = torch.stack([torch.arange(experts), torch.arange(experts).roll(-1)], dim=1)
    router = Qwen3MoeTopKRouter(
        SimpleNamespace(num_experts_per_tok=2, num_experts=experts, norm_topk_prob=True, hidden_size=experts)
    )
    with torch.no_grad():  # position t chooses t, then t + 1
        router.weight.copy_(torch.eye(experts) * 2 + torch.eye(experts).roll(-1, dims=1))
    model = nn.Sequential(router)
    attach(model)
    with recording(model) as record:
        _, scores, free = model(torch.eye(experts))
    assert record.routes().dtype == dtype
    assert torch.equal(free, selection) and torch.equal(record.routes()[:, 0].long(), selection)
    with replaying(model, record.routes()):
        _, again, chosen = model(torch.eye(experts))
    assert torch.equal(again, scores) and torch.equal(chosen, selection) and chosen.dtype == torch.int64


# ---- whose record it is --------------------------------------------------------------------------------------------


def test_a_model_and_its_copy_do_not_meet(tokenizer, rows):
    policy = moe_model(tokenizer)
    routes = pack_routes(record_rows(policy, rows), None)
    other = drifted(policy)
    with torch.no_grad():
        alone = forward(other, rows).logps
        with replaying(policy, routes), recording(policy) as record:
            beside = forward(other, rows).logps
            assert not record.layers
            forward(policy, rows)
        with replaying(other, routes), Executed(policy) as ran:
            forward(policy, rows)
    assert torch.equal(alone, beside)
    assert torch.equal(record.routes(), routes) and torch.equal(ran.routes().to(torch.uint8), routes)


def test_contexts_end_with_an_exception_and_nest(tokenizer, rows):
    model = moe_model(tokenizer)
    routes = pack_routes(record_rows(model, rows), None)
    after = drifted(model)
    with torch.no_grad():
        free = forward(after, rows).logps
        with pytest.raises(RuntimeError, match="stop"), replaying(after, routes), recording(after):
            raise RuntimeError("stop")
        assert torch.equal(forward(after, rows).logps, free)
        with replaying(after, routes):
            replayed = forward(after, rows).logps
            with replaying(after, None):  # an empty pack, or the reference model
                assert torch.equal(forward(after, rows).logps, free)
            assert torch.equal(forward(after, rows).logps, replayed)
    assert not torch.equal(replayed, free)


PEFT = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "router": {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
    "saved-router": {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
}


@pytest.mark.parametrize("kind", PEFT)
def test_adapters(tokenizer, rows, kind):
    """LoRA beside, on and instead of the router: the record fits, is replayed, and the router's part has a gradient."""
    base = tiny_model(tokenizer, moe=True)
    add_token_head(base, 1.0)
    model = get_peft_model(base, LoraConfig(r=2, **PEFT[kind]))
    attach(model)
    attach(model)
    assert {router.layer for router in find_routers(model)} == {0, 1}

    def logps():
        inputs = build_inputs(rows)
        with packed_attention(base, "segments"):
            return model(**inputs.model_inputs, predict=inputs.predict, targets=inputs.targets).logps

    with torch.no_grad(), recording(model) as record:
        logps()
    routes = record.routes()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    with Executed(base) as ran, replaying(model, routes):
        logps().sum().backward()
    assert torch.equal(ran.routes().to(torch.uint8), routes)
    with torch.no_grad(), Executed(base) as free:
        logps()
    assert not torch.equal(free.routes(), ran.routes())
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    routers = [name for name in trained if "gate" in name]
    assert len(routers) == {"attention": 0, "router": 4, "saved-router": 2}[kind]
    assert all(trained[name].abs().sum() > 0 for name in routers)


# ---- rows in packs -------------------------------------------------------------------------------------------------


def test_rows_without_routes_get_them_and_rows_with_routes_replay_them(tokenizer, rows):
    """r2 in small: the old-policy pass over two packs, then the update over other packs."""
    model = moe_model(tokenizer)
    rows = [copy.copy(row) for row in rows]
    for row in rows:
        row.routes = None
    for pack in (rows[:5], rows[5:]):
        with torch.no_grad(), routed(model, pack, build_inputs(pack)):
            forward(model, pack)
    expected = record_rows(model, rows)
    assert all(torch.equal(row.routes, routes) for row, routes in zip(rows, expected, strict=True))
    assert len({row.routes.untyped_storage().data_ptr() for row in rows}) == 8  # no row keeps a pack alive
    after = drifted(model)
    pack = rows[1::2]
    with Executed(after) as ran, routed(after, pack, build_inputs(pack)) as free:
        forward(after, pack).logps.sum().backward()
    assert torch.equal(ran.routes().byte(), torch.cat(expected[1::2]))
    assert all(torch.equal(row.routes, routes) for row, routes in zip(rows, expected, strict=True))  # kept
    assert 0 < changed_share(torch.cat(expected[1::2]), free.routes()) < 1
    with torch.no_grad(), routed(after, [], build_inputs(pack[:1])):  # an empty pack's stand-in
        forward(after, pack[:1])


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_models_that_cannot_be_replayed_are_refused(tokenizer):
    with pytest.raises(ValueError, match="Qwen3ForCausalLM is dense"):
        attach(tiny_model(tokenizer))
    with pytest.raises(ValueError, match=r"call attach\(model\) first"), recording(tiny_model(tokenizer, moe=True)):
        pass


def test_what_a_run_does_with_the_selection(tokenizer):
    """Mode, what follows from it, and the text of the announcement."""
    dense, moe = tiny_model(tokenizer), tiny_model(tokenizer, moe=True)
    routing = prepare_routing(dense, "none", follows_generation=True)
    assert routing.mode == "none" and str(routing).startswith("not recorded: Qwen3ForCausalLM is dense")
    assert not routing.is_recorded and not routing.replays and not routing.follows_generation
    shape = (LAYERS, 8)
    assert prepare_routing(moe, "none", True) == Routing("record", shape=shape)
    assert str(Routing("record")) == "recorded, not replayed" and str(Routing("r3")) == "r3"
    for mode, follows_generation in (("r2", False), ("r3", True)):
        assert prepare_routing(moe, mode, follows_generation) == Routing(mode, shape=shape)
    assert [Routing(mode).is_recorded for mode in ("record", "r2", "r3")] == [True] * 3
    assert [Routing(mode).replays for mode in ("record", "r2", "r3")] == [False, True, True]
    assert [Routing(mode).follows_generation for mode in ("record", "r2", "r3")] == [False, False, True]
    with pytest.raises(ValueError, match="can't follow a conversation with tools"):
        prepare_routing(moe, "r3", follows_generation=False)
    with pytest.raises(ValueError, match="is dense"):
        prepare_routing(dense, "r2", follows_generation=True)


def test_records_of_another_model_or_pack_are_refused(tokenizer, rows):
    model = moe_model(tokenizer)
    routes = pack_routes(record_rows(model, rows), None)
    total = len(routes)
    with pytest.raises(ValueError, match=r"shape \(\d+, 1, 2\).*2 MoE layers, 2 experts per token"):
        replaying(model, routes[:, :1]).__enter__()
    with pytest.raises(ValueError, match="another model's"):
        replaying(model, routes.flatten(1)).__enter__()
    with pytest.raises(RuntimeError, match="not indices of 8 experts"):
        replaying(model, routes + 1).__enter__()
    with pytest.raises(ValueError, match="not indices"):
        replaying(model, routes.float()).__enter__()
    for wrong in (routes[:-1], torch.cat([routes, routes[:1]])):
        with replaying(model, wrong), pytest.raises(ValueError, match=f"{len(wrong)} positions .* has {total}"):
            forward(model, rows)
    with recording(model) as record, torch.no_grad():
        forward(model, rows)
        with pytest.raises(ValueError, match=f"has {total} positions, and another pass brought {len(rows[0])}"):
            forward(model, rows[:1])
    with recording(model) as record, pytest.raises(ValueError, match="0 of 2 MoE layers"):
        record.routes()
