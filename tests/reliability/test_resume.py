"""A run that is killed after any optimizer step ends as if it had never been: every number equal, bit for bit."""

import pytest
from reliability_world import CASES, kills

CORE = [name for name, case in CASES.items() if case.core]


@pytest.mark.parametrize("name", CORE)
def test_a_killed_run_ends_as_the_uninterrupted_one(tmp_path, name):
    found = kills(name, CASES[name].core, tmp_path)
    assert found == {k: [] for k in CASES[name].core}


@pytest.mark.matrix
@pytest.mark.parametrize("name", CASES)
def test_killed_after_any_step(tmp_path, name):
    found = kills(name, CASES[name].every, tmp_path)
    assert len(found) > 1 and not any(found.values()), found
