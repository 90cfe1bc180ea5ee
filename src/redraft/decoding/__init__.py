"""Lossless decoding: the draft proposes, the target verifies in one pass."""
