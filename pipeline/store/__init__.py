"""Artifacts on disk: files, folders with a manifest, and the typed rows in them."""
