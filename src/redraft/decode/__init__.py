"""The lossless game: draft, verify in one target pass, accept, correct."""
