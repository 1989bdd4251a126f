"""From a completion and a reference answer to a verdict."""
