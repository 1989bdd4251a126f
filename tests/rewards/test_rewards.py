"""The rewards: values computed by hand, names and options, pickling, and the cost of importing them."""

import pickle
import subprocess
import sys
from typing import Any

import pytest

from sapo_trl.rewards import REWARDS, VERDICTS, AccuracyReward, GraderOptions, accuracy_reward, load_reward
from sapo_trl.rewards.accuracy import verdict_metrics
from sapo_trl.rewards.grading.policy import Grade
from sapo_trl.rewards.grading.texts import completion_text, opens_thought

NAMES = [
    "accuracy", "boxed_format", "think_format", "tag_count", "soft_overlong", "cosine_length", "length", "repetition",
    "language_consistency", "logic_puzzle", "multiple_choice", "reasoning_gym",
]  # fmt: skip
OPTIONS = {"soft_overlong": {"max_completion_len": 100, "soft_punish_cache": 20}, "cosine_length": {"max_len": 100}}


def batch() -> dict:
    """Four completions of two prompts, of 10, 30, 20 and 95 tokens: right, wrong, right, gold unusable."""
    return {
        "prompts": ["1+1?", "1+1?", "2+2?", "2+2?"],
        "completions": [r"<think>a</think>\boxed{2}", r"\boxed{3}", "a</think>The answer is 4.", r"\boxed{4}"],
        "completion_ids": [list(range(10)), [7] * 30, list(range(20)), list(range(95))],
        "answer": ["2", "2", "4", ""],
        "trainer_state": None,
    }


def test_names():
    assert list(REWARDS) == NAMES


# Typed by hand. cosine: 0.5 + 0.5·(1+cos(π·|y|/100))/2 if right, -0.5 - 0.5·(1+cos(π·|y|/100))/2 if wrong.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("accuracy", [1.0, 0.0, 1.0, None]),
        ("boxed_format", [1.0, 1.0, 0.0, 1.0]),
        ("think_format", [1.0, 0.0, 1.0, 0.0]),
        ("tag_count", [0.5, 0.0, 0.25, 0.0]),
        ("soft_overlong", [0.0, 0.0, 0.0, -0.75]),
        ("cosine_length", [0.987764, -0.896946, 0.952254, None]),
        ("length", [0.5, -0.5, 0.5, None]),
        ("repetition", [0.0, -10 / 11, 0.0, 0.0]),
        ("language_consistency", [1.0, 1.0, 1.0, 1.0]),
        ("logic_puzzle", [None, None, None, None]),
        ("multiple_choice", [None, None, None, None]),
    ],
)
def test_values(name, expected):
    reward = load_reward(name, **OPTIONS.get(name, {}))
    assert reward(**batch()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_pickled_reward_is_the_same_reward(name):
    reward: Any = load_reward(name, **OPTIONS.get(name, {}))
    copy = pickle.loads(pickle.dumps(reward))
    assert copy == reward
    assert copy.__name__ == reward.__name__ and copy.__name__.endswith("_reward")


def test_chat_completions_are_read():
    chat = [[{"role": "assistant", "content": r"\boxed{2}"}], [{"role": "assistant", "content": None}]]
    tools = [
        {"role": "assistant", "content": ""},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "2"},
    ]
    assert accuracy_reward(chat, ["2", "2"]) == [1.0, 0.0]
    assert completion_text(tools) == "2"
    assert completion_text([{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]) == "a"


def test_verdicts_are_logged():
    columns, metrics = {}, {}
    completions = [r"\boxed{1}", r"\boxed{2}", "none", r"\boxed{1}"]
    rewards = accuracy_reward(
        completions, ["1", "1", "1", None], log_extra=columns.__setitem__, log_metric=metrics.__setitem__
    )
    assert rewards == [1.0, 0.0, 0.0, None]
    assert columns["verdict"] == ["right", "wrong", "no_answer", "gold_unusable"]
    assert columns["extracted_answer"] == ["1", "2", "", ""]
    assert {name: metrics[f"verdict/{name}_frac"] for name in VERDICTS} == {
        "right": 0.25, "wrong": 0.25, "no_answer": 0.25, "gold_unusable": 0.25, "timeout": 0.0, "error": 0.0,
    }  # fmt: skip
    assert metrics["verdict/capped_frac"] == 0.0 and metrics["verdict/time_s"] > 0


def test_logged_answers_can_be_written_anywhere():
    columns = {}
    accuracy_reward(["\\boxed{5\ud800}"], ["1"], log_extra=columns.__setitem__)
    columns["extracted_answer"][0].encode()


def test_metrics_count_cut_answers():
    assert verdict_metrics([Grade("wrong", capped=True), Grade("error")])["verdict/capped_frac"] == 0.5


def test_a_batch_of_failures_stops_training():
    slow = r"\sum_{k=1}^{2000}\sum_{j=1}^{2000}\sqrt{k+j}"  # four million roots
    endless = [rf"\boxed{{{slow}+{row}}}" for row in range(1, 11)]
    good = [r"\boxed{1}"] * 6
    reward = AccuracyReward(deadline_s=0.2)
    with pytest.raises(RuntimeError, match=r"could not grade 10 of 16 answers \(10 timeouts, 0 errors") as caught:
        reward(endless + good, [slow] * 10 + ["1"] * 6)
    assert "sum" not in str(caught.value)  # no text of a completion in an error
    assert reward(endless[:8] + good + good[:2], [slow] * 8 + ["1"] * 8) == [0.0] * 8 + [1.0] * 8
    assert reward(endless, [slow] * 10) == [0.0] * 10  # too small a batch to judge


@pytest.mark.parametrize(
    "completion",
    [
        None, 5, [], [{}], [None], [{"role": "user", "content": "x"}], [{"content": 5}], {"content": "5"}, "\x00",
        [{"content": [{"type": "image"}]}], [{"content": ["5"]}], "\ud800",
    ],
)  # fmt: skip
@pytest.mark.parametrize("gold", ["1", None, [], {}, 1.5, float("nan"), ["1", 2], b"1", "\ud800", object()])
def test_no_shape_of_a_row_raises(completion, gold):
    assert accuracy_reward([completion], [gold])[0] in (0.0, None)


def test_wrong_number_of_answers_is_named():
    with pytest.raises(ValueError, match="2 completions but 1 answers"):
        accuracy_reward(["a", "b"], ["1"])


def test_prefilled_thoughts_from_the_prompt():
    assert opens_thought([{"role": "user", "content": "hi"}]) is False
    prompts = ["<|im_start|>assistant\n<think>\n"] * 2
    completions = [r"\boxed{5}", r"\boxed{4}</think>\boxed{5}"]
    assert accuracy_reward(completions, ["5", "5"], prompts=prompts) == [0.0, 1.0]
    assert accuracy_reward(completions, ["5", "5"]) == [1.0, 1.0]
    assert AccuracyReward(prefilled=True)(completions, ["5", "5"]) == [0.0, 1.0]
    assert REWARDS["boxed_format"](completions, prompts=prompts) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("prefilled", "expected"),
    [(None, [1.0, 1.0, 0.0, 0.0, 0.0]), (True, [0.0, 1.0, 0.0, 0.0, 0.0]), (False, [1.0, 0.0, 0.0, 0.0, 0.0])],
)
def test_think_format_where_the_template_opens_the_thought(prefilled, expected):
    completions = ["<think>a</think>b", "a</think>b", "a b", "a</think>b</think>c", "a</think> \n"]
    assert load_reward("think_format", prefilled=prefilled)(completions) == expected


def test_think_format_reads_the_prompt():
    assert REWARDS["think_format"](["a</think>b", "<think>a</think>b"], prompts=["x<think>\n"] * 2) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("Two words $\\text{和}$", "en", 1.0),
        ("我们 得 到 two", "zh", 4 / 5),
        ("Also gilt: größer", "de", 1.0),
        ("это ответ", "ru", 1.0),
        ("это ответ", "en", 0.0),
        ("$x^2$", "en", 1.0),
    ],
)
def test_language_consistency(text, language, expected):
    assert REWARDS["language_consistency"]([text], language=[language]) == pytest.approx([expected])


def test_logic_puzzle():
    gold = "Zoey is a knight and Ed is a knave"
    texts = [
        "<answer>(1) Zoey is a knight (2) Ed is a knave</answer>",
        "<think>Zoey is a knave</think><answer>Ed is a knave, Zoey is a knight.</answer>",
        "<answer>Zoey is a knave. Ed is a knave.</answer>",
        "<answer>Zoey is a knight.</answer>",
        "<answer>Zoey is a knight. Zoey is a knave. Ed is a knave.</answer>",
        "<answer>Zoey is a knight. Ed is not a knave. Ed is a knave</answer>",
        "no idea",
    ]
    reward = load_reward("logic_puzzle(right=2.0, wrong=-1.5, unreadable=-2.0)")
    assert reward(texts, [gold] * 7) == [2.0, 2.0, -1.5, -1.5, -2.0, -2.0, -2.0]


def test_mixtures_share_a_batch_by_task():
    rows = {
        "completions": [r"\boxed{2}", r"\boxed{B}", "Ann is a knight."],
        "answer": ["2", "B", "Ann is a knight"],
        "task": ["math", "multiple_choice", "logic_puzzle"],
    }
    assert REWARDS["accuracy"](**rows) == [1.0, None, None]
    assert REWARDS["multiple_choice"](**rows) == [None, 1.0, None]
    assert REWARDS["logic_puzzle"](**rows) == [None, None, 1.0]


def test_length_reward_needs_its_group():
    with pytest.raises(ValueError, match="needs `prompts`"):
        REWARDS["length"](["a"], ["1"], [[1]])


# ---- names and options -------------------------------------------------------------------------------------------


def test_entries_with_options():
    reward: Any = load_reward("soft_overlong(max_completion_len=1024, soft_punish_cache=256)")
    assert (reward.max_completion_len, reward.soft_punish_cache) == (1024, 256)
    assert load_reward("accuracy(percent='same_number', deadline_s=3.0)") == AccuracyReward(
        grader=GraderOptions(percent="same_number"), deadline_s=3.0
    )
    assert load_reward("accuracy") is accuracy_reward


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("acuracy", "nearest name is 'accuracy'"),
        ("", "not of the form"),
        ("accuracy(", "not of the form"),
        ("soft_overlong(max_completion_len=10**3)", "not of the form"),
        ("repetition(ngram_size=__import__('os').getpid())", "not of the form"),
        ("repetition(4)", "not of the form"),
        ("repetition(ngram=4)", "nearest option is 'ngram_size'"),
        ("repetition(ngram_size=0)", "must be at least 1"),
        ("soft_overlong", r"needs max_completion_len: write soft_overlong\(max_completion_len=1024\)"),
        ("soft_overlong(max_completion_len=10, soft_punish_cache=20)", "must lie between 0 and"),
        ("cosine_length", "needs max_len"),
        ("accuracy(percent='half')", "no policy of the grader"),
        ("language_consistency(language='xx')", "not known"),
        ("no_such_package.reward", "cannot be loaded"),
        ("math.sqr", "nearest name is 'sqrt'"),
        ("math.pi", "is a float, not a function"),
    ],
)
def test_wrong_entries_are_refused_at_once(entry, message):
    with pytest.raises(ValueError, match=message):
        load_reward(entry)


def test_dotted_paths(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def short(completions, limit=3, **kwargs):\n    return [float(len(c) <= limit) for c in completions]\n"
        "class Scaled:\n    def __init__(self, by):\n        self.by = by\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_reward("my_rewards.short")(completions=["ab", "abcd"]) == [1.0, 0.0]
    limited: Any = load_reward("my_rewards.short(limit=4)")
    assert limited(completions=["ab", "abcd"]) == [1.0, 1.0] and limited.__name__ == "short"
    scaled: Any = load_reward("my_rewards.Scaled", by=2)
    assert scaled.by == 2


# ---- imports -----------------------------------------------------------------------------------------------------


def test_import_is_light():
    """Neither computer algebra nor TRL; the modules of the package itself, under half a second."""
    code = (
        "import sys, types, time\n"
        "package = types.ModuleType('sapo_trl'); package.__path__ = [sys.argv[1]]; sys.modules['sapo_trl'] = package\n"
        "start = time.perf_counter()\n"
        "import sapo_trl.rewards\n"
        "print(time.perf_counter() - start)\n"
        "names = ('sympy', 'mpmath', 'math_verify', 'torch', 'trl', 'transformers')\n"
        "print([name for name in names if name in sys.modules])\n"
    )
    import sapo_trl

    runs = [
        subprocess.run([sys.executable, "-c", code, sapo_trl.__path__[0]], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    seconds, heavy = zip(*[run.stdout.splitlines() for run in runs], strict=True)
    assert set(heavy) == {"[]"}
    assert min(map(float, seconds)) < 0.5


def test_trls_name_of_the_column():
    completions = [r"\boxed{1}", r"\boxed{2}"]
    assert accuracy_reward(completions, solution=["1", "1"]) == [1.0, 0.0]
    assert accuracy_reward(completions, ["2", "2"], solution=["1", "1"]) == [0.0, 1.0]
    with pytest.raises(ValueError, match="needs a column `answer`"):
        accuracy_reward(completions)
