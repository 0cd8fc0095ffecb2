"""What is measured on a GPU, on a bare machine with torch, triton and transformers.

checks.py     every kernel against its oracle
kernels.py    kernels against eager and compiled torch, and as shares of the copy bandwidth
decoding.py   AR, draft and verify latencies at Llama-2-7B's shape, and speculation
heads.py      a head's text and its chains
together.py   several prompts decoded together
training.py   a training step at 16K
"""
