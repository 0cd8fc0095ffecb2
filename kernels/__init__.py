"""Triton kernels beside their torch oracles (`reference.py`).

The pipeline runs the oracles. The kernels are tested against them, but no dispatch leads to them yet: they
have not been timed on a GPU.
"""
