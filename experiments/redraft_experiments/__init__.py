"""Small model families built from nothing, and the demo and benches that run on them."""
