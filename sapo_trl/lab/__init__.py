"""A laboratory for objectives: a policy so small that eight seeds of a training run take seconds on one core."""
