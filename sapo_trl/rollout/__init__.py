"""The rollout: completions as rows without padding, and their generation on a CPU."""
