"""The most common failure of a first run: rewards never differ, or no completion ends, so that nothing is learned and
nothing says so."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from sapo_trl.rollout.rollout import Rollout
from sapo_trl.text import visible

PATIENCE = 2  # rollouts in a row
MOST_CHARACTERS = 400


class EqualRewards:
    """Warns once after `PATIENCE` rollouts in a row in which no prompt's completions got different rewards, or no
    completion had a token to train on."""

    def __init__(self):
        self.in_a_row = 0

    def note(self, equal_frac: float, trained_tokens: float, rollout: Rollout, names: Sequence[str]) -> None:
        """One rollout; shows a completion of it with what it got.

        Args:
            equal_frac: share of prompts whose completions all got one reward.
            trained_tokens: of the rollout; 0 where every completion is masked.
            names: of the reward functions.
        """
        self.in_a_row = self.in_a_row + 1 if equal_frac == 1.0 or trained_tokens == 0 else 0
        if self.in_a_row != PATIENCE or rollout.rewards is None:
            return
        values = ", ".join(f"{name} = {x:g}" for name, x in zip(names, rollout.rewards[0].tolist(), strict=True))
        first = rollout.texts[1][0]
        text = visible(str(first if isinstance(first, str) else first[-1].get("content")))[:MOST_CHARACTERS]
        if trained_tokens == 0:
            warnings.warn(
                f"{PATIENCE} rollouts in a row in which no completion had a token to train on: every gradient is 0. "
                f"The first completion is {text!r}. Either all were cut (mask_truncated_completions leaves those out: "
                "set a larger max_completion_length, or false), or the mask of a rollout_func is 0 everywhere.",
                stacklevel=2,
            )
            return
        warnings.warn(
            f"{PATIENCE} rollouts in a row in which no prompt's completions got different rewards: every gradient is "
            f"0. The first completion got {values}: {text!r}. Check the reward on it, the answer column, the prompt's "
            "instructions and max_completion_length, or start from a model that solves some of the prompts.",
            stacklevel=2,
        )
