"""The strict grader against labels typed by hand, beside plain math-verify and TRL's accuracy reward."""

import dataclasses
import json
import re
import time
from pathlib import Path
from random import Random
from typing import Any, cast

import pytest
from bench.rewards import judge_math_verify, judge_trl, read_suite

from sapo_trl.rewards import GraderOptions, check_golds
from sapo_trl.rewards.grading.extraction import final_answer
from sapo_trl.rewards.grading.grader import grade, read
from sapo_trl.rewards.verifier.pool import configure_verifier

SUITE = Path(__file__).parents[1] / "verdicts"
CASES = read_suite()
POLICY = [json.loads(line) for line in (SUITE / "policy.jsonl").read_text().splitlines()]


def test_suite_is_large_and_two_sided():
    assert len(CASES) >= 1200
    assert len({case["family"] for case in CASES}) >= 40
    assert 0.35 < sum(case["verdict"] == "right" for case in CASES) / len(CASES) < 0.65
    assert len({(case["gold"], case["completion"]) for case in CASES}) == len(CASES)
    assert all(case["source"] and case["verdict"] in ("right", "wrong") for case in CASES + POLICY)


def test_agreement_with_the_labels():
    grades = configure_verifier().verify([c["completion"] for c in CASES], [c["gold"] for c in CASES])
    missed = [c for c, g in zip(CASES, grades, strict=True) if (g.verdict == "right") != (c["verdict"] == "right")]
    assert {grade.verdict for grade in grades} <= {"right", "wrong", "no_answer"}
    assert len(missed) <= 0.01 * len(CASES), missed
    assert [case for case in missed if case["verdict"] == "wrong"] == []  # no false accept at all


def test_every_reference_is_right_against_itself():
    report = check_golds(sorted({case["gold"] for case in CASES}))
    assert report.unusable_rows == [], report.reasons


def test_damaged_answers_end_in_a_verdict():
    """Tokens of completions left out, doubled, swapped or copied: nothing raises and next to nothing is slow."""
    random = Random(7)
    texts, chosen = [], random.sample(CASES, 400)
    for case in chosen:
        tokens = re.findall(r"\\[a-zA-Z]+|\w+|\s+|.", case["completion"], re.DOTALL)
        for _ in range(3):
            at, other = random.randrange(len(tokens)), random.randrange(len(tokens))
            tokens[at], tokens[other] = tokens[other], tokens[at]
            tokens[at : at + 1] = random.choice([[], tokens[at : at + 1] * 2, tokens[other : other + 5]]) or ["{"]
        texts.append("".join(tokens))
    verdicts = [grade.verdict for grade in configure_verifier().verify(texts, [case["gold"] for case in chosen])]
    assert set(verdicts) <= {"right", "wrong", "no_answer", "timeout"}
    assert verdicts.count("timeout") <= 2 and verdicts.count("no_answer") < 300


def test_other_verifiers_agree_less():
    cases = CASES[::20]
    for judge in (judge_math_verify, judge_trl):
        agreement = sum(right == (case["verdict"] == "right") for case, right in zip(cases, judge(cases), strict=True))
        assert agreement < 0.9 * len(cases)


@pytest.mark.parametrize("case", POLICY, ids=lambda case: f"{case['family']}-{case['gold']}")
def test_policies(case):
    assert (grade(case["completion"], case["gold"], GraderOptions(**case["options"])).verdict == "right") == (
        case["verdict"] == "right"
    )


def test_every_policy_has_cases_on_both_sides():
    for field in dataclasses.fields(GraderOptions):
        verdicts = {case["verdict"] for case in POLICY if field.name in case["options"]}
        assert verdicts == {"right", "wrong"}, field.name


def test_no_hedge_is_paid():
    hedges = [c for c in CASES if c["family"] == "hedging" and c["verdict"] == "wrong"]
    assert len(hedges) >= 40
    assert [c for c in hedges if grade(c["completion"], c["gold"]).verdict == "right"] == []


def test_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="percent='half' is no policy.*value, same_number"):
        GraderOptions(percent=cast(Any, "half"))


@pytest.mark.parametrize(
    "gold",
    [
        "", "   ", None, True, {}, r"\frac{1}{2", "x" * 2000, "see " * 12, "asdf(*&)", "x = = 5", r"\frac{1}{}", "nan",
        "None", float("nan"), float("inf"), [], [None], "[]", "?", "(1, 2", "3 +", r"\sqrt{}", "1 2 3)", "()", [{}],
    ],
)  # fmt: skip
def test_unusable_references_have_their_own_verdict(gold):
    assert grade(r"\boxed{1}", gold).verdict == "gold_unusable"


@pytest.mark.parametrize("gold", [["0.5", "1/2"], ("1/2",), '["0.5", "3/2"]', "['1/2']", [0.5, "x"]])
def test_a_list_of_references_says_one_of(gold):
    assert grade(r"\boxed{\frac{2}{4}}", gold).verdict == "right"
    assert grade(r"\boxed{7}", gold).verdict == "wrong"


def test_a_name_is_of_the_same_numbers_on_both_sides():
    for gold, answer, verdict in (
        (r"f(x)=kx \text{ for } k\in\mathbb{R}", r"f(x)=kx, k\in\mathbb{Z}", "wrong"),
        (r"x=2k\pi,\ k\in\mathbb{Z}", r"x=2k\pi \text{ for } k\in\mathbb{R}", "wrong"),
        (r"x=2k\pi,\ k\in\mathbb{Z}", r"x=2n\pi \text{ for } n\in\mathbb{Z}", "right"),
        (r"f(x)=kx \text{ for } k\in\mathbb{R}", "f(x)=kx", "right"),
    ):
        assert grade(rf"\boxed{{{answer}}}", gold).verdict == verdict, answer


@pytest.mark.parametrize(
    "text",
    [
        "no answer at all", r"\boxed{5", r"\boxed{4} and then \boxed{5", r"It is not \boxed{5}.", "The answer is",
        "It is not true that we get $\\boxed{5}$.", r"\boxed{5}. Wait, that cannot be.", r"Either 4 or $\boxed{5}$",
        "<answer>5</answer> Wait, that is wrong.",
    ],
)  # fmt: skip
def test_there_is_no_answer(text):
    assert final_answer(text) == ()


def test_too_long_an_answer_is_not_looked_at():
    result = grade(rf"\boxed{{{'9' * 5000}}}", "9" * 900)
    assert (result.verdict, result.capped, result.extracted) == ("wrong", True, "")


@pytest.mark.parametrize(
    "text",
    [
        "n\\equiv 3\\pmod 7", "(" * 500, "-" * 1400, "1+" * 600 + "1", r"\frac{1}{" * 100 + "x" + "}" * 100, "{" * 900,
        "x^" * 300 + "x", "|" * 900, "a_" * 500, r"\begin{cases}", r"\sqrt[" * 90, r"\{" * 90 + r"\}" * 90,
        "f(" * 200 + ")" * 200,
    ],
)  # fmt: skip
def test_no_text_raises(text):
    """Whatever stands there, reading and comparing end in a verdict."""
    read(text), read(text, False)
    for gold in ("5", text, r"x \equiv 2 \pmod 5", r"\begin{pmatrix}1\\2\end{pmatrix}"):
        assert grade(rf"\boxed{{{text}}}", gold).verdict in ("right", "wrong", "no_answer", "gold_unusable")


def test_extraction_is_linear():
    """Ten times the text takes about ten times as long; a quadratic scan would take a hundred times."""
    for unit in (
        r"\boxed{", r"\boxed{1}", r"\[", "\\", "{", "answer is $", "no,", "not ", "$", r"\boxed ", "either 4 or ",
        "<answer>", "</answer>", "<answer>1</answer>", r"\boxed 1", "or 5 ", "Alternatively, ",
    ):  # fmt: skip
        times = []
        for size in (20_000, 200_000):
            text = unit * (size // len(unit))
            tries = []
            for _ in range(3):  # the collector of garbage may fall into one of them
                start = time.process_time()
                final_answer(text)
                tries.append(time.process_time() - start)
            times.append(min(tries))
        assert times[1] < 40 * max(times[0], 0.005), (unit, times)
