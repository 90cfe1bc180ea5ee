"""Training adapters on the target's answers."""
