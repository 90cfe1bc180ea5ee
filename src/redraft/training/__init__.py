"""Training of the private part: losses, the loop, checkpoints."""
