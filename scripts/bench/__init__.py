"""The benchmark behind `scripts/benchmark.py`; not part of the package."""
