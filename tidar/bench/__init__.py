"""Measuring steps and decoding on a GPU, against what the hardware allows."""
