"""Suggestions: near words are proposed, far ones are not."""

import pytest

from sapo_trl.errors import did_you_mean, nearest

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
