"""What a rollout's record holds, what it takes, and when two selections count as different."""

import pytest
import torch
from routing_world import (
    LAYERS,
    TOP_K,
    changed_share,
    eight_rows,
    moe_model,
    record_rows,
    shape_of,
)

from sapo_trl.moe.records import RouteRecord
from sapo_trl.moe.routing_replay import (
    changed_selections,
    is_unrecorded,
    pack_routes,
    recording,
    recording_generation,
    replay_bytes,
)


def generate(model, prompts, **extra):
    """(record, completions) of a left-padded batch; a token that is sampled often ends a sequence."""
    width = max(len(p) for p in prompts)
    ids = torch.stack([torch.cat([torch.zeros(width - len(p), dtype=torch.long), p]) for p in prompts])
    mask = (torch.arange(width) >= width - torch.tensor([len(p) for p in prompts])[:, None]).long()
    torch.manual_seed(5)
    eos = list(range(3, 60))
    with recording_generation(model) as record:
        out = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, max_new_tokens=12,
            eos_token_id=eos, pad_token_id=0, **extra,
        )  # fmt: skip
    completions = []
    for row in out[:, width:]:
        ends = torch.isin(row, torch.tensor(eos)).nonzero().flatten().tolist()
        completions.append(row[: ends[0] + 1] if ends else row)
    return record, completions


PROMPT_LENGTHS = [3, 3, 7, 7, 1, 1, 5, 5]  # two generations of each prompt


@pytest.mark.parametrize("extra", [{}, {"prefill_chunk_size": 3}], ids=["prefill", "chunked"])
def test_the_record_of_a_rollout_is_the_record_of_a_forward(tokenizer, extra):
    model = moe_model(tokenizer).eval()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(60, 200, (n,), generator=generator) for n in PROMPT_LENGTHS[::2] for _ in range(2)]
    prompts[1::2] = prompts[::2]
    record, completions = generate(model, prompts, **extra)
    lengths = [len(c) for c in completions]
    assert min(lengths) < max(lengths) and len(set(lengths)) > 3  # some ended early, some went on
    routes = record.rows(PROMPT_LENGTHS, lengths)
    for prompt, completion, recorded in zip(prompts, completions, routes, strict=True):
        with torch.no_grad(), recording(model) as alone:
            model(input_ids=torch.cat([prompt, completion])[None])
        assert recorded.shape == (len(prompt) + len(completion), LAYERS, TOP_K) and recorded.dtype == torch.uint8
        assert torch.equal(recorded[:-1], alone.routes()[:-1])
        assert is_unrecorded(recorded[-1]).all() and not is_unrecorded(recorded[:-1]).any()
    assert len({tuple(r[:n].flatten().tolist()) for r, n in zip(routes[::2], PROMPT_LENGTHS[::2], strict=True)}) == 4


def test_prompts_padded_wider_than_the_longest(tokenizer):
    model = moe_model(tokenizer).eval()
    prompt = torch.tensor([70, 71, 72, 73])
    ids = torch.cat([torch.zeros(4, dtype=torch.long), prompt])[None]
    with recording_generation(model) as record:
        out = model.generate(
            input_ids=ids, attention_mask=(ids > 0).long(), do_sample=False, max_new_tokens=3, min_new_tokens=3
        )
    with torch.no_grad(), recording(model) as alone:
        model(input_ids=torch.cat([prompt, out[0, 8:]])[None])
    assert torch.equal(record.rows([4], [3], prompt_width=8)[0][:-1], alone.routes()[:-1])
    with pytest.raises(ValueError, match="3 forward passes over 10 positions .* 1 prompts padded to 4"):
        record.rows([4], [3])


def test_other_ways_of_generating_are_refused(tokenizer):
    model = moe_model(tokenizer).eval()
    prompts = [torch.tensor([70, 71, 72])] * 2
    record, completions = generate(model, prompts, use_cache=False)
    with pytest.raises(ValueError, match="generate with its cache"):
        record.rows([3, 3], [len(c) for c in completions])
    record, completions = generate(model, prompts)
    with pytest.raises(ValueError, match="not one generation of 3 prompts"):
        record.rows([3, 3, 3], [2, 2, 2])
    with pytest.raises(ValueError, match="up to position 42"):
        record.rows([3, 3], [40, 2])


def test_a_record_keeps_the_first_pass():
    """With checkpointing the loss saw the first forward; the second may round differently in bfloat16."""
    record = RouteRecord(1, torch.uint8)
    for selection in ([[1, 2]], [[2, 3]]):
        record.put(0, torch.tensor(selection), torch.zeros(1, 4))
    assert record.routes().tolist() == [[[1, 2]]]


def test_memory_is_what_a_record_takes(tokenizer):
    rows = eight_rows(tokenizer)
    model = moe_model(tokenizer)
    routes = pack_routes(record_rows(model, rows), None)
    assert replay_bytes(len(routes), *shape_of(model.config)) == routes.nbytes == sum(len(r) for r in rows) * 4
    assert replay_bytes(10, 48, 8, 128) == 3840 and replay_bytes(10, 48, 10, 512) == 9600


def test_changed_selections_compare_sets_where_there_is_a_record():
    recorded = torch.tensor([[[1, 2], [3, 4]], [[5, 6], [0, 0]], [[7, 0], [1, 2]]]).byte()
    now = torch.tensor([[[2, 1], [3, 5]], [[5, 6], [1, 2]], [[7, 1], [2, 1]]])
    changed, counted = changed_selections(recorded, now)
    assert changed.tolist() == [[False, True], [False, False], [True, False]]
    assert counted.tolist() == [[True, True], [True, False], [True, True]]
    assert changed_share(recorded, now) == pytest.approx(2 / 5)
    with pytest.raises(ValueError, match=r"\(3, 2, 2\) cannot be compared with \(2, 2, 2\)"):
        changed_selections(recorded, now[:2])


def test_router_entropy_of_the_first_pass():
    record = RouteRecord(1, torch.uint8)
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0]])
    for scale in (1.0, 0.0):  # checkpointing forwards again; the first pass counts
        record.put(0, torch.tensor([[0, 1], [0, 1]]), scale * logits)
    assert record.router_entropies().tolist() == [[pytest.approx(1.3862944)], [pytest.approx(0, abs=1e-6)]]
