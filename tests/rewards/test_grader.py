"""The strict grader against labels typed by hand, beside plain math-verify and TRL's accuracy reward."""

import contextlib
import json
import logging
from collections import defaultdict
from pathlib import Path

import pytest

from sapo_trl.rewards import GraderOptions
from sapo_trl.rewards.grading.extraction import final_answer
from sapo_trl.rewards.grading.grader import grade
from sapo_trl.rewards.verifier.pool import get_verifier

CASES = [json.loads(line) for line in (Path(__file__).parents[1] / "verdicts" / "cases.jsonl").read_text().splitlines()]


def agreement(judged: list[bool]) -> tuple[float, dict[str, str]]:
    """Share of the labels met, and per family."""
    hits = defaultdict(list)
    for case, right in zip(CASES, judged, strict=True):
        hits[case["family"]].append(right == case["right"])
    total = sum(map(sum, hits.values())) / len(CASES)
    return total, {family: f"{sum(rows)}/{len(rows)}" for family, rows in hits.items()}


def judge_ours() -> list[bool]:
    grades = get_verifier().verify([c["completion"] for c in CASES], [c["gold"] for c in CASES])
    assert not [case for case, g in zip(CASES, grades, strict=True) if g.verdict in ("timeout", "error")]
    return [grade.verdict == "right" for grade in grades]


def judge_math_verify() -> list[bool]:
    from math_verify import parse, verify

    return [
        bool(verify(parse(f"${case['gold']}$", parsing_timeout=None), parse(case["completion"], parsing_timeout=None)))
        for case in CASES
    ]


def judge_trl() -> list[bool]:
    from trl.rewards import accuracy_reward

    judged = []
    for case in CASES:
        with contextlib.suppress(Exception):  # TRL lets some of them escape; that is no answer
            judged.append(accuracy_reward([[{"content": case["completion"]}]], [f"${case['gold']}$"])[0] == 1.0)
            continue
        judged.append(False)
    return judged


def test_suite_is_large_and_two_sided():
    assert len(CASES) >= 250
    assert len({case["family"] for case in CASES}) >= 10
    assert 0.35 < sum(case["right"] for case in CASES) / len(CASES) < 0.65
    assert len({(case["gold"], case["completion"]) for case in CASES}) == len(CASES)


def test_agreement_with_the_labels(capsys):
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    ours, per_family = agreement(judge_ours())
    plain, plain_families = agreement(judge_math_verify())
    trl, trl_families = agreement(judge_trl())
    with capsys.disabled():
        print(f"\nagreement on {len(CASES)} cases: sapo_trl {ours:.1%}, math-verify {plain:.1%}, TRL {trl:.1%}")
        for family in per_family:
            print(f"  {family}: {per_family[family]}, {plain_families[family]}, {trl_families[family]}")
    assert ours >= 0.97
    assert ours > plain and ours > trl


def test_no_hedge_is_paid():
    hedges = [c for c in CASES if c["family"] == "hedging" and not c["right"]]
    assert len(hedges) >= 40
    paid = [c for c in hedges if grade(c["completion"], c["gold"]).verdict == "right"]
    assert paid == []


@pytest.mark.parametrize(
    ("gold", "answer", "options"),
    [
        ("50", r"50\%", {"percent": "same_number"}),
        (r"90^\circ", r"\frac{\pi}{2}", {"degrees": "radians"}),
        ("(1, 2)", r"\{2, 1\}", {"tuple_as_set": True}),
        ("0.333", r"\frac{1}{3}", {"decimals": "rounded"}),
        (r"\pi", "3.142", {"decimals": "rounded"}),
        ("101_2", "101", {"bare_base": True}),
    ],
)
def test_policy_that_accepts_more(gold, answer, options):
    completion = rf"\boxed{{{answer}}}"
    assert grade(completion, gold).verdict == "wrong"
    assert grade(completion, gold, GraderOptions(**options)).verdict == "right"


@pytest.mark.parametrize(
    ("gold", "completion", "options"),
    [
        (r"90^\circ", r"\boxed{90}", {"degrees": "strict"}),
        (r"5\text{ cm}", r"\boxed{5}", {"units": "strict"}),
        ("(1, 2)", r"\boxed{1, 2}", {"bare_list_as_tuple": False}),
        ("B", r"\boxed{b}", {"choice_ignore_case": False}),
        ("5", "The answer is 5.", {"require_box": True}),
    ],
)
def test_policy_that_accepts_less(gold, completion, options):
    assert grade(completion, gold).verdict == "right"
    assert grade(completion, gold, GraderOptions(**options)).verdict != "right"


def test_rounding_policy_rounds_and_no_more():
    rounded = GraderOptions(decimals="rounded")
    assert grade(r"\boxed{3.143}", r"\pi", rounded).verdict == "wrong"
    assert grade(r"\boxed{0.3}", r"\frac{1}{3}", rounded).verdict == "wrong"  # one digit is no rounding of a third


def test_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="percent='half' is no policy.*value, same_number"):
        GraderOptions(percent="half")


@pytest.mark.parametrize("gold", ["", "   ", None, True, {}, ["1", "2"], r"\frac{1}{2", "x" * 2000, "see " * 12])
def test_unusable_golds_have_their_own_verdict(gold):
    assert grade(r"\boxed{1}", gold).verdict == "gold_unusable"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no answer at all", "no answer"),
        (r"\boxed{5", "unclosed"),
        (r"\boxed{4} and then \boxed{5", "unclosed"),
        (r"It is not \boxed{5}.", "negated"),
        (r"\boxed{5}. Wait, that cannot be.", "withdrawn"),
        (r"Either 4 or $\boxed{5}$", "hedged"),
    ],
)
def test_why_there_is_no_answer(text, reason):
    answer = final_answer(text)
    assert (answer.parts, answer.why_none) == ((), reason)


def test_too_long_an_answer_is_not_looked_at():
    result = grade(rf"\boxed{{{'9' * 5000}}}", "9" * 900)
    assert (result.verdict, result.capped, result.extracted) == ("wrong", True, "")


def test_extraction_is_linear():
    """Ten times the text takes about ten times as long; a quadratic scan would take a hundred times."""
    import time

    for unit in (
        r"\boxed{",
        r"\boxed{1}",
        r"\[",
        "\\",
        "{",
        "answer is $",
        "no,",
        "not ",
        "$",
        r"\boxed ",
        "either 4 or ",
    ):
        times = []
        for size in (20_000, 200_000):
            text = unit * (size // len(unit))
            start = time.process_time()
            final_answer(text)
            times.append(time.process_time() - start)
        assert times[1] < 40 * max(times[0], 0.005), (unit, times)
