"""The tiny task is right and reversible: every step is recomputed here from the prompt alone."""

import json
import re
from fractions import Fraction

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sapo_trl.tiny import (
    KINDS,
    MAX_ANSWER_TOKENS,
    build_model,
    build_tokenizer,
    cold_start,
    latex,
    make_problems,
    style_mixture,
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


# ---------------------------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize(
    "text",
    [
        "7 *3 +8 mod 20?",
        "7*3=1 1+8=9 \\boxed{-\\frac{3}{4}}",
        "\\frac\\boxed\\fraction user assistants systemic",
        "  two  spaces\n\ttab\r\n",
        "naïve 漢字 π≈3.14159 🙂 \x00 \u00a0",
        "<|im_start|>user\nx<|im_end|>\n<|endoftext|>",
        "",
    ],
)
def test_every_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_words_and_specials_are_single_tokens(tokenizer):
    assert len(tokenizer("\\boxed{\\frac{3}{4}}<|im_end|>").input_ids) == 11  # \boxed { \frac { 3 } { 4 } } <|im_end|>
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.decode(tokenizer("4<|im_end|>").input_ids, skip_special_tokens=True) == "4"


def test_chat_format_is_qwens(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == prompt
    with_reply = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert with_reply == prompt + "<|im_start|>assistant\n"


def test_a_saved_tokenizer_comes_back_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\n1/2 é \\boxed{7}<|im_end|>"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.padding_side == "left"


# ------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(("moe", "name"), [(False, "Qwen3ForCausalLM"), (True, "Qwen3MoeForCausalLM")])
def test_model_is_small_seeded_and_of_the_right_class(tokenizer, moe, name):
    before = torch.random.get_rng_state()
    model, same, other = (build_model(tokenizer, moe=moe, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert type(model).__name__ == name
    assert model.num_parameters() < 3_000_000
    weights = [dict(m.named_parameters())["model.layers.0.self_attn.q_proj.weight"] for m in (model, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.pad_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")


# ----------------------------------------------------------------------------------------------------------- problems


def test_latex_of_fractions():
    assert [latex(Fraction(*pair)) for pair in [(6, 8), (-6, 8), (8, 4), (0, 3), (-9, 3)]] == [
        "\\frac{3}{4}",
        "-\\frac{3}{4}",
        "2",
        "0",
        "-3",
    ]


def solve(prompt):
    """The answer and the right-hand side of every step, from the prompt's text: independent of the generators."""
    if match := re.fullmatch(r"(\d+)\((\d+)\((\d+)x([+-]\d+)\)([+-]\d+)\)=(\d+), x\?", prompt):
        outer, middle, inner, shift, offset, total = map(int, match.groups())
        x = ((Fraction(total, outer) - offset) / middle - shift) / inner
        assert outer * (middle * (inner * x + shift) + offset) == total
        bracket = inner * x + shift
        return x, [middle * bracket + offset, middle * bracket, bracket, inner * x, inner * x]
    start, *operations = prompt.split(" mod ")[0].rstrip("?").split()
    modulus = int(prompt.rstrip("?").split(" mod ")[1]) if " mod " in prompt else None
    value, values = Fraction(start), []
    for operation in operations:
        number = int(operation[1:])
        value = {"+": value + number, "*": value * number, ":": value / number, "^": value**number}[operation[0]]
        value = value % modulus if modulus else value
        values.append(value)
    return value, values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_step_and_answer_is_right(kind, split):
    problems = make_problems(200, seed=3, kinds=[kind], split=split)
    for problem in problems:
        answer, values = solve(problem.prompt)
        *steps, boxed = problem.steps.split(" ")
        assert [Fraction(step.split("=")[1]) for step in steps] == values, problem
        assert boxed == problem.direct == f"\\boxed{{{problem.answer}}}"
        whole, numerator, denominator = re.fullmatch(r"(-?\d+)|(?:\\frac\{(\d+)\}\{(\d+)\})", problem.answer).groups()
        assert Fraction(whole or f"{numerator}/{denominator}") == answer, problem


@pytest.mark.parametrize("kind", ["modular", "fraction"])
def test_steps_chain_from_the_start_through_the_prompts_operations(kind):
    for problem in make_problems(100, seed=4, kinds=[kind]):
        start, *operations = problem.prompt.split(" mod ")[0].rstrip("?").split()
        value = start
        for step, operation in zip(problem.steps.split(" ")[:-1], operations, strict=True):
            left, value_after = step.split("=")
            assert left == value + operation
            value = value_after


def test_an_equation_is_unwrapped_one_inverse_operation_at_a_time():
    inverse = {":": Fraction.__truediv__, "+": Fraction.__add__, "-": Fraction.__sub__}
    for problem in make_problems(100, seed=4, kinds=["equation"]):
        before = problem.prompt.split("=")[1].removesuffix(", x?")
        for step in problem.steps.split(" ")[:-2]:
            left, operation, amount, after = re.fullmatch(r"(\d+)([:+-])(\d+)=(\d+)", step).groups()
            assert left == before
            assert inverse[operation](Fraction(left), Fraction(amount)) == int(after)
            before = after
        assert problem.steps.split(" ")[-2] == f"{problem.prompt.split('(')[2].split('x')[0]}x={before}"


def test_answers_are_many_and_fractions_are_among_them():
    problems = make_problems(600, seed=0)
    assert {problem.kind for problem in problems} == set(KINDS)
    for kind, least in {"modular": 20, "fraction": 40, "equation": 40}.items():
        assert len({problem.answer for problem in problems if problem.kind == kind}) >= least
    assert sum("frac" in problem.answer for problem in problems) > 200
    assert any(problem.answer.isdigit() and len(problem.answer) == 2 for problem in problems)


def test_step_by_step_answers_fit_the_length_that_is_sampled(tokenizer):
    for problem in make_problems(1500, seed=2):
        assert len(tokenizer(problem.direct).input_ids) < len(tokenizer(problem.steps).input_ids) < MAX_ANSWER_TOKENS


def test_splits_are_disjoint_for_every_pair_of_seeds():
    train = {problem.prompt for seed in range(4) for problem in make_problems(2000, seed)}
    test = {problem.prompt for seed in range(4) for problem in make_problems(300, seed, split="test")}
    assert not train & test


def test_problems_are_different_and_follow_from_the_seed():
    problems = make_problems(500, seed=7)
    assert len({problem.prompt for problem in problems}) == 500
    assert problems == make_problems(500, seed=7)
    assert problems != make_problems(500, seed=8)
    assert [problem.kind for problem in problems[:6]] == [*KINDS, *KINDS]


def test_asking_for_more_problems_than_there_are_says_so():
    with pytest.raises(ValueError, match="too few"):
        make_problems(50_000, seed=0, kinds=["equation"])


# --------------------------------------------------------------------------------------------------------- cold start


def test_styles_are_in_equal_parts_within_every_update():
    problems = make_problems(32, seed=0)
    rows = style_mixture(problems)
    texts = [row[0]["content"] for row in rows["completion"]]
    assert texts[:16] == [problem.direct for problem in problems[:16]]
    assert texts[16:32] == [problem.steps for problem in problems[:16]]
    assert texts[32:48] == [problem.direct for problem in problems[16:]]
    assert rows["prompt"][16] == [{"role": "user", "content": problems[0].prompt}]


def test_a_mixture_of_experts_is_saved_able_to_generate(tmp_path):
    cold_start(tmp_path, moe=True, steps=1, num_train=4, num_test=4, num_check=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, min_new_tokens=2).shape == (1, 5)


def test_cold_start_writes_what_training_and_evaluation_read(tmp_path, capsys):
    for name in ("a", "b"):
        cold_start(tmp_path / name, steps=3, seed=1, num_train=20, num_test=10, num_check=4)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cold start")]
    assert lines[0] == "cold start: making 48 problems and their tokens" and lines[1].startswith("cold start: step 1/3")
    assert "3 steps in" in lines[2] and "left" in lines[1] and "loss" in lines[1]
    rows = {
        split: [json.loads(line) for line in (tmp_path / "a" / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "test")
    }
    assert [len(rows["train"]), len(rows["test"])] == [20, 10]
    assert all(set(row) == {"prompt", "answer", "kind"} for row in rows["train"] + rows["test"])
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("a", "b"))
    fresh = build_model(build_tokenizer(), seed=1)
    same, trained = [], []
    for (_, one), (_, two), (_, new) in zip(
        first.named_parameters(), second.named_parameters(), fresh.named_parameters(), strict=True
    ):
        same.append(torch.equal(one, two))
        trained.append(not torch.equal(one, new))
    assert all(same), "the same seed gave other weights"
    assert all(trained), "some weights got no gradient"
    prompt = rows["test"][0]["prompt"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a" / "model")
    assert tokenizer.decode(tokenizer(prompt).input_ids) == prompt
