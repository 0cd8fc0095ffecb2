"""The machine: what a time was taken on, and the memory that this process has held."""

from __future__ import annotations

import platform
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # stage prepare asks for its peak of memory, and does without torch
    import torch

CPUINFO = Path("/proc/cpuinfo")
STATUS = Path("/proc/self/status")


def cpu_name() -> str:
    """The processor and the threads that torch uses of it."""
    import torch

    model = platform.processor() or platform.machine()
    for line in CPUINFO.read_text(encoding="utf-8").splitlines() if CPUINFO.exists() else ():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return f"{model}, {torch.get_num_threads()} threads"


def gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def describe(device: torch.device) -> str:
    """A device for people: "cpu: NAME, 2 threads"; of a GPU also the processor that starts its kernels."""
    return f"cuda: {gpu_name()} with {cpu_name()}" if device.type == "cuda" else f"cpu: {cpu_name()}"


def peak_bytes() -> int:
    """The largest resident size of this process since it began, in bytes.

    On Linux `ru_maxrss` begins at what the parent held when it started this process, so it is asked
    elsewhere only, where it is in bytes on macOS and in KiB on others.
    """
    if STATUS.exists():
        lines = STATUS.read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated: of the GPU, or of the machine."""
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo does not tell the available memory")
