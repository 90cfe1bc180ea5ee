"""Whether a draft is worth repairing, from a few requests and before any training."""
