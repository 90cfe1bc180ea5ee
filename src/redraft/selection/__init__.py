"""The choice of answers to train on."""
