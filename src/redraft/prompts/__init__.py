"""Prompts: rows of any usual shape, rendered through the target's own chat template."""
