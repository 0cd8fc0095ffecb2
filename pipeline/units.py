"""Sizes as text."""

from __future__ import annotations


def gigabytes(num_bytes: float) -> str:
    """In units of 10^9 bytes, as limits of memory are given."""
    return f"{num_bytes / 1e9:.4g} GB"


def decimal_size(num_bytes: float) -> str:
    """In MB of 10^6 bytes, or in GB, as disks are sold."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.2f} MB"


def binary_size(num_bytes: int | None) -> str:
    """In the largest binary unit below it; "" where it is not known."""
    if num_bytes is None:
        return ""
    for exponent, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if num_bytes >= 1024**exponent:
            return f"{num_bytes / 1024**exponent:.1f} {unit}"
    return f"{num_bytes} B"
