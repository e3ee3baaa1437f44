"""Triton kernels of the four ops; launched by :mod:`tq4.backends.triton`."""
