"""Figures with their numbers, and the HTML report of runs."""
