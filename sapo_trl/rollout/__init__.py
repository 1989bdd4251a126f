"""The rollout: completions as rows without padding, and how they are generated on a CPU."""
