"""The target answers the prompts, in this process or behind endpoints."""
