"""One draft for many adapters of one base: what it is worth to each, and one adapted for all of them."""
