"""What a time was taken on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """The processor and the threads that torch uses of it."""
    model = platform.processor() or platform.machine()
    for line in CPUINFO.read_text(encoding="utf-8").splitlines() if CPUINFO.exists() else ():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return f"{model}, {torch.get_num_threads()} threads"


def gpu_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def describe(device: torch.device) -> str:
    """A device for people: "cpu: NAME, 2 threads"; of a GPU also the processor that starts its kernels."""
    return f"cuda: {gpu_name()} with {cpu_name()}" if device.type == "cuda" else f"cpu: {cpu_name()}"
