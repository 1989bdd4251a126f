"""The update: rows to packs, forward and backward, loss terms and memory."""
