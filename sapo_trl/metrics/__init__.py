"""Tensors to named numbers, reduced once per optimizer step."""
