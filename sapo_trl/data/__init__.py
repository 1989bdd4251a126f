"""Datasets: presets, Hub ids and local files to rows with `prompt` and `answer`."""
