"""Adapters: the small set of tensors trained for one target, and how each is attached, fitted and merged."""
