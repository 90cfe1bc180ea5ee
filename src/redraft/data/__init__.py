"""Prompts in, the target's answers, and the choice among them."""
