"""Small toy suites built from nothing, and the demo and benches that run on them."""
