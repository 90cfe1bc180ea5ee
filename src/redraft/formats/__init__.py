"""Foreign file layouts stop here: checkpoints and chat rows, in and out."""
