"""Versions of drafters in MLflow's registry, and the gate before them."""
