"""Heads over the hidden states of a target: their form, how they begin, how they are loaded."""
