"""Suggestions: near words are proposed, far ones are not."""

import pytest

from sapo_trl.errors import did_you_mean, imported, nearest

KNOWN = ["beta", "seed", "learning_rate"]


@pytest.mark.parametrize(
    "word, found",
    [
        ("sed", "seed"),
        ("learning_rat", "learning_rate"),
        ("betta", "beta"),
        ("LEARN", "learning_rate"),
        ("qqq", None),
        ("", None),
    ],
)
def test_only_a_near_word_is_proposed(word, found):
    assert nearest(word, iter(KNOWN)) == found
    assert did_you_mean(word, KNOWN) == ("" if found is None else f" Did you mean '{found}'?")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def f(:", "SyntaxError in {path}, line 1: invalid syntax."),
        ("x = 1\nundefined", "NameError in {path}, line 2: name 'undefined' is not defined."),
        ("import sys\nsys.exit(3)", "SystemExit in {path}, line 2: 3."),
        ("x = 1\nint('abc')", "ValueError in {path}, line 2: invalid literal for int() with base 10: 'abc'."),
        ("import json\njson.loads('{{')", "JSONDecodeError in {path}, line 2: "),
        ("from math import no_such_name", "ImportError in {path}, line 1: cannot import name 'no_such_name'"),
        ("import no_such_package", "No module named 'no_such_package'. Check the path and PYTHONPATH."),
    ],
)
def test_a_module_that_fails_is_one_sentence(tmp_path, monkeypatch, text, said):
    path = tmp_path / f"broken_{abs(hash(text))}.py"
    path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError) as error:
        imported(path.stem, "tools: 'x'")
    assert str(error.value).startswith(f"tools: 'x' cannot be loaded: {said.format(path=path)}")
