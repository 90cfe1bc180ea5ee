"""Foreign layouts stop here: checkpoints read, checked, written, and what each engine makes of them."""
