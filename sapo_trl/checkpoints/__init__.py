"""Checkpoints: written whole or not at all, checked before they are read, and exact when a run goes on from one."""
