"""Triton kernels beside their torch oracles.

reference.py         the oracles: the truth of tests, and the CPU path
dispatch.py          the one way to the kernels: triton or torch, by config and device
chunk_select.py      score the chunks of a prefix, pick the best, compact the kept KV
chunk_attention.py   how much of the last tokens' attention each chunk of a prefix has
verify_attention.py  a few queries against a long cache, split over the keys
accept.py            greedy and sampled acceptance of a batch of rounds
distill_loss.py      hidden states to losses and their gradients, without logits of all positions
distill_tiles.py     its tiles, and its torch backend
distill_triton.py    its Triton backend
"""
