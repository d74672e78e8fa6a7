"""Kernels for decoding on a GPU, each beside a plain twin that says what it computes and runs anywhere."""
