"""Drafts: networks only. They propose; they never decide what is accepted."""
