"""A rollout ahead from a server, which one process asks for all: the others must not wait for it in an update."""

import json

import pytest
from processes import call


def run(folder, processes: int) -> dict:
    output = folder / f"{processes}.json"
    for done in call("ahead_world", "main", str(output), processes=processes):
        assert done.status == 0, done.said[-3000:]
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {processes: run(folder, processes) for processes in (1, 2)}


@pytest.mark.parametrize("processes", [1, 2])
def test_every_process_gets_its_part_of_the_weights_that_a_rollout_claims(runs, processes):
    """Evaluations, and a save after every step, come between."""
    found = runs[processes]
    assert [rollout["step"] for rollout in found["rollouts"]] == [0, 0, 2]
    for rollout in found["rollouts"]:
        assert len(rollout["gaps"]["0"]) == processes and max(rollout["gaps"]["0"]) < 1e-5
        assert len(rollout["completions"]) == 24
    assert all(min(rollout["gaps"]["2"]) > 0.05 for rollout in found["rollouts"][1:])
    assert found["ages"] == [0, 1, 2, 3, 2] and len(found["checks"]) == 2 and max(found["checks"]) < 0.1
    assert found["seeded"] == 3 + 1  # rollouts, and the check of the second sync


def test_two_processes_get_what_one_gets(runs):
    one, two = (runs[processes]["rollouts"] for processes in (1, 2))
    for a, b in zip(one[:2], two[:2], strict=True):  # of equal weights
        assert a["completions"] == b["completions"] and len({str(x) for x in a["completions"]}) > 20
