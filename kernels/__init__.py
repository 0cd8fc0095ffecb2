"""Triton kernels beside their torch oracles (`reference.py`); `dispatch.py` chooses between them."""
