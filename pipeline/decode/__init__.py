"""Speculative and autoregressive decoding, and its exact replay."""
