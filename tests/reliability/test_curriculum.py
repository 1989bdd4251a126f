"""Solved prompts leave for good, and a run without enough of the others ends and says so."""

import pytest
from conftest import sapo_config
from dynamic_world import NUM, number_of, run

from sapo_trl.rollout.prompts import PromptSource
from sapo_trl.trl_seams import RepeatSampler


def even_are_solved(prompts, completion_ids, **kwargs):
    """All completions of even prompts are right, and half of those of odd ones."""
    rows = zip(prompts, completion_ids, strict=True)
    return [1.0 if number_of(p) % 2 == 0 else float(len(ids) > 2) for p, ids in rows]


def rollouts_of(trainer):
    return [[number for number, _, _ in rollout[::4]] for rollout in trainer.seen]


def test_solved_prompts_leave_and_the_others_go_on_in_their_order(tmp_path):
    fields = {"dynamic_sampling": False, "drop_solved_above": 0.9, "max_steps": 24}
    trainer = run(tmp_path, fields, reward_func=even_are_solved)
    order = RepeatSampler(range(NUM), mini_repeat_count=1, batch_size=8, seed=5)
    theirs = [*order]
    later = [i for i in order if i % 2 == 1]
    rollouts = rollouts_of(trainer)
    taken = [i for rollout in rollouts for i in rollout]
    assert taken[:36] == [*theirs, *later] and {*taken[36:]} == {*later}  # each once a pass, and once in a rollout:
    assert all(len({*rollout}) == 8 for rollout in rollouts)
    left = [entry["data/prompts_left"] for entry in trainer.state.log_history if "loss" in entry]
    seen = [{*theirs[: 8 * k]} for k in (1, 2, 3, 3, 3, 3)]
    assert left == [NUM - sum(i % 2 == 0 for i in taken) for taken in seen] and left[-1] == 12


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_run_without_unsolved_prompts_ends_with_a_checkpoint_and_says_so(tmp_path, capsys, dynamic):
    """With 14 prompts, half of them solved, 7 are left after the second rollout, fewer than the 8 of one."""
    fields = {"dynamic_sampling": dynamic, "drop_solved_above": 0.9, "save_strategy": "steps", "save_steps": 100}
    trainer = run(tmp_path, fields | {"max_steps": 40}, num_prompts=14, reward_func=even_are_solved)
    end = trainer.state.global_step
    assert end % 4 == 0 and end < 40 and trainer.plan.steps_per_rollout == 4
    sentence = "7 of 14 prompts are left unsolved (drop_solved_above=0.9), fewer than the 8 of a rollout"
    assert f"step {end}: {sentence}; training ends" in capsys.readouterr().out
    checkpoint = tmp_path / f"checkpoint-{end}"
    assert (checkpoint / "manifest.json").exists()
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert f"{checkpoint} is at step {end}, {sentence}: nothing is left to do" in capsys.readouterr().out
    assert trainer.state.global_step == end


def test_a_dataset_that_is_nearly_solved_gives_what_it_has():
    source = PromptSource(["a"] * 6 + ["b"] * 20, {"a": 0.5, "b": 0.5}, seed=0)
    assert source.counts(8) == {"a": 4, "b": 4}
    source.give_back(source.take({"a": 3, "b": 0}))
    source.drop([0, 1, 2])
    assert source.counts(8) == {"a": 3, "b": 5} and {*source.take({"a": 3, "b": 0})} == {3, 4, 5}
    source.drop(range(3, 19))
    assert source.counts(8) == {} and source.counts(7) == {"a": 0, "b": 7}


@pytest.mark.parametrize("value", [0.0, 1.5, -1])
def test_a_rate_that_is_none_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match="drop_solved_above=.* must be within"):
        sapo_config(tmp_path, drop_solved_above=value)
