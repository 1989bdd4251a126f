"""Reference answers: the usual forms are usable, and what is not is found by row."""

import pytest

from sapo_trl.rewards import GraderOptions, accuracy_reward, check_golds
from sapo_trl.rewards.grading.golds import normalise_gold

USUAL = [
    "5", "-7", "0", "3.14", ".5", "1,234", "1{,}234", "12\\,345", "3e5", "3 \\times 10^8", "1.2\\cdot 10^{-4}",
    r"\frac{1}{2}", r"\dfrac{3}{4}", r"-\frac{2}{3}", r"\frac12", "1/2", r"2\frac{1}{2}", "3 1/2", r"0.\overline{3}",
    r"2\sqrt{3}", r"\sqrt{2}", r"\sqrt[3]{5}", r"\frac{1+\sqrt{5}}{2}", r"3+2\sqrt{2}", r"\frac{\sqrt{3}}{3}",
    r"\pi", r"2\pi", r"\frac{\pi}{4}", r"4\pi r^2", "e^2", r"\ln 2", r"\log_2 3", "2^{10}", "x^2", "10!",
    r"\binom{10}{3}",
    "2i", "3+4i", r"e^{i\pi/3}", "(1, 2)", "[0, 1)", r"(-\infty, 3]", r"(-\infty,1)\cup(2,\infty)", r"\{1, 2, 3\}",
    "1, 2", "x=1, y=2", r"\pm 3", r"1 \pm \sqrt{2}", "(1,2,3)", r"\left(\frac{1}{2}, -3\right)", "x > 2",
    r"1 < x \leq 2", r"x \in [0, 1]", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
    r"\begin{bmatrix} 1 \\ 0 \end{bmatrix}",
    "3:30", "10:30 am",
    "2:3", "1:2:3", "50\\%", "25%", r"90^\circ", "\\$5.50", "5 cm", r"5\text{ cm}", r"12\text{ m}^2",
    "60 mph", "Tuesday", r"\text{even}", r"\text{no solution}", "yes", "B", "(C)", r"\textbf{(D)}", "x = 5",
    "y = 2x + 1", "x^2 + y^2 = 1", "2x+1", r"\frac{x+1}{x-1}", r"\sin^2 x", "f(x) = x^2", "101_2", r"\emptyset",
    r"\mathbb{R}", "$7$", r"\boxed{8}", "#### 42", "3 \\text{ and } 4", "n(n+1)/2", "|x|", r"\infty", r"2^{-3}",
    r"\frac{a}{b}", "xyz", r"\frac{2^n-1}{3}", "12 hours", r"\cos\theta", r"a_n = 2n+1",
]  # fmt: skip


def test_usual_golds_are_right_against_their_own_box(capsys):
    report = check_golds(USUAL)
    with capsys.disabled():
        print(f"\n{report.summary()}")
    assert len(USUAL) >= 70 and len(set(USUAL)) == len(USUAL)
    assert report.unusable_rows == [], report.reasons
    assert accuracy_reward([rf"\boxed{{{gold}}}" for gold in report.answers], report.answers) == [1.0] * len(USUAL)


def test_a_normalised_gold_is_stable_and_means_the_same():
    report = check_golds(USUAL)
    assert check_golds(report.answers).answers == report.answers
    plain = [gold for gold in USUAL if "boxed" not in gold and "####" not in gold]
    assert accuracy_reward([rf"\boxed{{{gold}}}" for gold in plain], plain) == [1.0] * len(plain)
    rows = [USUAL.index(gold) for gold in plain]
    assert accuracy_reward([rf"\boxed{{{gold}}}" for gold in plain], [report.answers[r] for r in rows]) == [1.0] * len(
        rows
    )


def test_raw_formulas_are_wrapped_for_every_reader():
    """2√3 without dollars is read as 2 by plain math-verify; what the check returns is not."""
    from math_verify import parse
    from sympy import sqrt

    assert parse(r"2\sqrt{3}")[0] == 2
    assert parse(str(normalise_gold(r"2\sqrt{3}")))[0] == 2 * sqrt(3)


def test_unusable_golds_are_named_by_row():
    golds = ["5", "", r"\frac{1}{2", None, "see the figure and the text in the section that is below", "7", r"\sqrt{4}"]
    report = check_golds(golds)
    assert report.unusable_rows == [1, 2, 3, 4]
    assert report.answers == ["5", "", "", "", "", "7", r"$\sqrt{4}$"]
    assert report.corrected == 1
    assert report.summary().startswith("7 reference answers, 1 corrected, 4 unusable (57.1%): row 1 (no answer")
    assert "figure" not in report.summary()


def test_references_that_are_only_text_are_counted_apart():
    golds = ["5", "Tuesday", r"A \perp B \heartsuit", "B", r"\text{no solution}", "x+1", "asdf(*&)"]
    report = check_golds(golds)
    assert report.text_rows == [1, 2, 4]
    assert report.unusable_rows == [6]
    assert "3 compared as text (rows 1, 2, 4), 1 unusable (14.3%): row 6" in report.summary()


@pytest.mark.parametrize("gold", ["['3' '4']", r"['\frac{1}{2}']"])  # 34 and a form feed, if Python read them
def test_what_is_not_surely_a_list_is_unusable(gold):
    assert check_golds([gold, "5"]).unusable_rows == [0]


@pytest.mark.parametrize(
    "gold", ["x = = 5", r"\frac{1}{}", "nan", "None", "null", "#N/A", "#DIV/0!", float("nan"), "5+", "[]", r"\boxed{}"]
)
def test_what_is_no_answer_is_unusable(gold):
    report = check_golds([gold, "5"])
    assert (report.unusable_rows, report.text_rows, report.answers) == ([0], [], ["", "5"])


def test_lists_of_references_stay_lists_of_which_one_has_to_be_met():
    report = check_golds([["0.5", "1/2"], "['70']", '["2", "asdf("]'])
    assert report.answers == ['["0.5", "$1/2$"]', "70", "2"]
    assert check_golds(report.answers).answers == report.answers
    assert accuracy_reward([r"\boxed{0.5}", r"\boxed{70}", r"\boxed{2}"], report.answers) == [1.0] * 3


def test_a_share_of_unusable_golds_stops_the_run():
    with pytest.raises(ValueError, match=r"1 unusable \(50.0%\): row 1 .* max_unusable_frac=0.1") as caught:
        check_golds(["1", "(secret"], max_unusable_frac=0.1)
    assert "secret" not in str(caught.value)
    assert check_golds(["1", "(secret"], max_unusable_frac=0.5).unusable_frac == 0.5


def test_golds_that_hang_are_unusable_and_not_fatal():
    report = check_golds([r"5^{5^{5^{5^5}}-4}+\sqrt{x}", "2"])
    assert report.answers[1] == "2"  # the first equals its own text, at no cost


def test_wrong_numbers_of_every_kind_of_gold():
    """A gold that accepts everything would pass the check above too: each must refuse another answer."""
    others = [r"\boxed{987654321}", r"\boxed{\text{purple}}", r"\boxed{\sqrt{777}}"]
    for other in others:
        assert accuracy_reward([other] * len(USUAL), USUAL) == [0.0] * len(USUAL)


def test_a_whole_solution_as_gold_gives_its_answer():
    long = "Janet sells 16 - 3 - 4 = 9 eggs a day. " * 60
    assert normalise_gold(long + "#### 18") == "18"
    assert normalise_gold(long + r"So it is $\boxed{\frac{1}{2}}$.") == r"$\frac{1}{2}$"
    assert normalise_gold(long) is None


def test_policy_reaches_the_check():
    assert check_golds([r"50\%"], GraderOptions(percent="same_number")).unusable_rows == []
