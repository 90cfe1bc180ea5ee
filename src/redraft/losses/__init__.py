"""Losses, each named for what it computes."""
