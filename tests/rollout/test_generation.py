"""The shrinking batch samples what transformers samples: the same tokens for the same seed, with less work."""

import pytest
import torch
from accelerate import Accelerator
from conftest import SHAPE, prompts, sapo_config, sapo_trainer, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOTrainer

from sapo_trl.evaluation.sampling import sample_completions
from sapo_trl.rollout.generation import DROP_FRAC, _draw, plain_generation_reason, plain_model_reason, unfinished_only

PAD, EOS = 0, [*range(100, 112)]  # an end in 12 of 264 tokens: most rows stop before 24
PROMPTS = [[5, 6, 7]] * 3 + [[9] * 6] * 3 + [[PAD, 5, 6, 7]] * 2 + [[5, 6, 7]]


def left_padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def generate(model, rows, seed=0, **options):
    """(sequences, the next random number, rows of every forward pass)."""
    ids, mask = left_padded(rows)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 24} | options
    config = GenerationConfig(pad_token_id=PAD, eos_token_id=EOS, **options)
    widths = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: widths.append(len(args[0])))
    torch.manual_seed(seed)
    sequences = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    hook.remove()
    return sequences, torch.rand(()), widths


GREEDY, COOL = {"do_sample": False, "top_k": None}, {"temperature": 0.6}
FILTERED = {"temperature": 1.3, "top_k": 40, "top_p": 0.9}


@pytest.mark.parametrize(
    ("moe", "options"),
    [(False, GREEDY), (False, {}), (False, COOL), (False, FILTERED), (True, COOL)],
    ids=["greedy", "temperature 1", "temperature 0.6", "top_k and top_p", "moe"],
)
def test_same_tokens_as_transformers(tokenizer, moe, options):
    model = tiny_model(tokenizer, moe)
    for seed in range(3):
        expected, random, plain = generate(model, PROMPTS, seed, **options)
        with unfinished_only(model):
            sequences, own_random, widths = generate(model, PROMPTS, seed, **options)
        assert torch.equal(sequences, expected)
        assert own_random == random  # the stream goes on where it would have
        assert widths[0] == 4  # equal neighbours once; a prompt that begins with the padding token is another one
        ended = torch.isin(expected[:, 6:], torch.tensor(EOS)).cumsum(1)[:, :-1] > 0  # before each later pass
        assert plain == [9] * (1 + ended.shape[1])
        for width, running in zip(widths[1:], (~ended).sum(0).tolist(), strict=True):
            assert running <= width < running / (1 - DROP_FRAC)  # rows that ended are gone, or too few to be worth it


def test_rows_end_at_every_length_and_at_the_limit(tokenizer):
    """The comparison above is about something: rows end early, late and not at all."""
    sequences, *_ = generate(tiny_model(tokenizer), PROMPTS * 4)
    ended = torch.isin(sequences, torch.tensor(EOS))
    assert len(set(ended.int().argmax(1)[ended.any(1)].tolist())) > 5
    assert 0 < ended.any(1).sum() < len(sequences)


def test_rows_with_limits_of_their_own_keep_their_tokens_and_leave_the_batch(tokenizer):
    model, limits = tiny_model(tokenizer), [3, 24, 7, 1, 24, 3, 7, 1, 24]
    expected, *_, plain = generate(model, PROMPTS)
    with unfinished_only(model, limits):
        sequences, _, widths = generate(model, PROMPTS)
    for row, whole, limit in zip(sequences, expected, limits, strict=True):
        assert torch.equal(row[6 : 6 + limit], whole[6 : 6 + limit])
    assert sum(widths) < 0.6 * sum(plain) and min(widths) < 4


def test_prompts_without_padding_and_a_single_row(tokenizer):
    model = tiny_model(tokenizer)
    for rows in ([[5, 6], [7, 8], [7, 8]], [[5, 6, 7]]):
        expected, *_ = generate(model, rows)
        with unfinished_only(model):
            assert torch.equal(generate(model, rows)[0], expected)


def test_lora(tokenizer):
    model = get_peft_model(tiny_model(tokenizer), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    expected, *_ = generate(model, PROMPTS)
    with unfinished_only(model):
        sequences, _, widths = generate(model, PROMPTS)
    assert torch.equal(sequences, expected)
    assert widths[0] == 4


@pytest.mark.parametrize("logps", [None, []], ids=["the noise of transformers", "one number a token"])
def test_two_tokens_are_drawn_from_the_softmax_at_the_temperature(logps):
    """Chi-square of 20,000 pairs over five tokens, one of them the end, against float64."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, vocab_size=5, initializer_range=0.15))
    temperature, end, num = 0.7, 4, 20_000
    config = GenerationConfig(
        do_sample=True, top_k=0, temperature=temperature, max_new_tokens=2, pad_token_id=PAD, eos_token_id=end
    )
    with unfinished_only(model, logps=logps):
        pairs = model.generate(input_ids=torch.tensor([[1, 2]] * num), generation_config=config)[:, 2:]
    model.double()
    with torch.no_grad():
        one = (model(torch.tensor([[1, 2]])).logits[0, -1] / temperature).softmax(-1)
        two = (model(torch.tensor([[1, 2, t] for t in range(4)])).logits[:, -1] / temperature).softmax(-1)
    expected = torch.cat([(one[:4, None] * two).flatten(), one[4:]]) * num  # (21,): pairs, and the end at once
    cells = torch.where(pairs[:, 0] == end, 20, 5 * pairs[:, 0] + pairs[:, 1])
    observed = torch.bincount(cells, minlength=21)
    assert expected.min() > 5
    assert ((observed - expected) ** 2 / expected).sum() < 45.31  # the 0.999 quantile at 20 degrees of freedom
    wrong = num / 21
    assert ((observed - wrong) ** 2 / wrong).sum() > 45.31


@pytest.mark.parametrize("logps", [None, []], ids=["the noise of transformers", "one number a token"])
def test_a_nan_is_an_error_and_the_model_gets_its_own_generate_back(tokenizer, logps):
    model = tiny_model(tokenizer)
    with torch.no_grad():
        model.lm_head.weight[7, 0] = torch.nan
    with pytest.raises(RuntimeError, match="9 of 9 rows have a NaN"), unfinished_only(model, logps=logps):
        generate(model, PROMPTS)
    assert "generate" not in vars(model)


def test_one_number_a_token_never_draws_what_is_impossible_and_reaches_the_whole_vocabulary():
    torch.manual_seed(0)
    scores = torch.full((2000, 5000), -torch.inf)
    scores[:, [0, 7, 4999]] = torch.tensor([0.2, 0.3, 0.5]).log()
    possible = torch.bincount(_draw(scores), minlength=5000)[[0, 7, 4999]]
    assert possible.sum() == 2000
    assert (possible / 2000 - torch.tensor([0.2, 0.3, 0.5])).abs().max() < 0.04
    flat = _draw(torch.full((2000, 5000), 1 / 5000).log())
    assert 0.45 < (flat < 2500).float().mean() < 0.55
    assert flat.min() < 20 and flat.max() > 4980


def test_prompts_of_a_group_are_tokenized_once(tmp_path, tokenizer, monkeypatch):
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer))
    texts, seen = [row["prompt"] for row in prompts(3)], []
    grouped = [text for text in texts for _ in range(4)] + texts[:1]
    whole = GRPOTrainer._tokenize_prompts(trainer, grouped)
    usual = GRPOTrainer._tokenize_prompts
    monkeypatch.setattr(GRPOTrainer, "_tokenize_prompts", lambda self, x: seen.append(x) or usual(self, x))
    assert trainer._tokenize_prompts(grouped) == whole
    assert seen == [[*texts, texts[0]]]


def test_a_rollout_of_the_trainer_is_trls(tmp_path, tokenizer, capsys):
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), temperature=0.8)
    trainer.eos_token_ids = trainer.generation_config.eos_token_id = EOS
    ids = [tokenizer(row["prompt"])["input_ids"] for row in prompts(4) for _ in range(4)]
    torch.manual_seed(0)
    own, _ = trainer._generate_single_turn(ids, None, {}, 4)
    torch.manual_seed(0)
    assert own == GRPOTrainer._generate_single_turn(trainer, ids, None, {}, 4)[0]
    assert len({len(row) for row in own}) > 3
    assert "generation               finished rows leave the batch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "records_routes", "reason"),
    [
        ({}, False, None),
        ({}, True, "routing_replay=r3"),
        ({"generation_kwargs": {"prefill_chunk_size": 2}}, False, "generation_kwargs"),
        ({"cache_implementation": "static"}, False, "cache_implementation"),
        ({"use_transformers_continuous_batching": True}, False, "continuous batching"),
    ],
)
def test_what_is_left_to_transformers(tmp_path, tokenizer, fields, records_routes, reason):
    args = sapo_config(tmp_path, **fields)
    found = plain_generation_reason(tiny_model(tokenizer), args, Accelerator(cpu=True), records_routes=records_routes)
    assert (reason is None and found is None) or reason in found


def test_models_that_are_left_to_transformers(tmp_path, tokenizer):
    args, accelerator = sapo_config(tmp_path), Accelerator(cpu=True)
    noisy = get_peft_model(tiny_model(tokenizer), LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1))
    assert "dropout" in plain_generation_reason(noisy, args, accelerator, records_routes=False)
    sliding = tiny_model(tokenizer)
    sliding.config.layer_types = ["sliding_attention", "full_attention"]
    assert "sliding_attention" in plain_generation_reason(sliding, args, accelerator, records_routes=False)


class WithoutPositions(Qwen3ForCausalLM):
    """A forward that finds positions out by itself."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=None, logits_to_keep=0):
        return super().forward(
            input_ids, attention_mask, past_key_values=past_key_values, use_cache=use_cache,
            logits_to_keep=logits_to_keep,
        )  # fmt: skip


class WithoutMaskAndCache(Qwen3ForCausalLM):
    """A forward over whole sequences of equal length."""

    def forward(self, input_ids=None, position_ids=None, logits_to_keep=0):
        return super().forward(input_ids, position_ids=position_ids, use_cache=False, logits_to_keep=logits_to_keep)


def asks_for(**fields):
    """Sets the model's own generation_config, which acts wherever a caller leaves a field out."""

    def change(model):
        for name, value in fields.items():
            setattr(model.generation_config, name, value)

    return change


def forgets_its_cache(model):
    model.config.use_cache = model.generation_config.use_cache = False


def with_forward_of(cls):
    def change(model):
        model.__class__ = cls

    return change


LEFT_TO_TRANSFORMERS = {
    "no cache in the model's config": (forgets_its_cache, "use_cache: false"),
    "no cache in its generation_config": (asks_for(use_cache=False), "use_cache: false"),
    "no position_ids": (with_forward_of(WithoutPositions), "WithoutPositions takes no position_ids"),
    "no mask, no cache": (with_forward_of(WithoutMaskAndCache), "takes no attention_mask and no past_key_values"),
}


@pytest.mark.parametrize("name", LEFT_TO_TRANSFORMERS)
def test_what_generate_prepares_or_a_forward_takes_is_found_out_before_the_run(tmp_path, tokenizer, name):
    change, reason = LEFT_TO_TRANSFORMERS[name]
    model = tiny_model(tokenizer)
    args, accelerator, forwarded = sapo_config(tmp_path), Accelerator(cpu=True), []
    model.get_input_embeddings().register_forward_pre_hook(lambda *_: forwarded.append(1))
    random = torch.get_rng_state()
    assert plain_generation_reason(model, args, accelerator, records_routes=False) is None
    change(model)
    assert reason in plain_generation_reason(model, args, accelerator, records_routes=False)
    assert reason in plain_model_reason(model)
    assert not forwarded and torch.equal(torch.get_rng_state(), random)  # nothing is computed or drawn for it


@pytest.mark.parametrize("where", ["model_init_kwargs", "generation_config"])
def test_a_model_without_a_cache_trains(tmp_path, tokenizer, capsys, where):
    """As TRL's own and other recipes load one for checkpointing; transformers' loop generates."""
    model = tiny_model(tokenizer)
    model.generation_config.use_cache = where != "generation_config"
    model.save_pretrained(tmp_path / "model")
    fields = {"model_init_kwargs": {"use_cache": False}} if where == "model_init_kwargs" else {}
    trainer = sapo_trainer(tmp_path, tokenizer, str(tmp_path / "model"), max_steps=2, logging_steps=1, **fields)
    assert "generation               use_cache: false" in capsys.readouterr().out
    trainer.train()
    losses = [record["ratio/mean"] for record in trainer.state.log_history if "ratio/mean" in record]
    assert len(losses) == 2 and losses[0] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("own", [{"stop_strings": ["1"]}, {"num_beams": 3}, {"repetition_penalty": 2.0}], ids=str)
def test_a_models_own_generation_config_changes_no_evaluation(tokenizer, own):
    problems = [row["prompt"] for row in prompts(3)]
    model = tiny_model(tokenizer)
    expected = sample_completions(model, tokenizer, problems, max_new_tokens=6, temperature=0)
    asks_for(**own)(model)
    assert plain_model_reason(model) is None
    assert sample_completions(model, tokenizer, problems, max_new_tokens=6, temperature=0) == expected


def test_an_evaluation_without_a_cache_samples_the_same(tokenizer):
    """Greedy answers of the same model with and without a cache."""
    problems = [row["prompt"] for row in prompts(3)]
    model = tiny_model(tokenizer)
    expected = sample_completions(model, tokenizer, problems, max_new_tokens=6, temperature=0)
    forgets_its_cache(model)
    assert sample_completions(model, tokenizer, problems, max_new_tokens=6, temperature=0) == expected
