"""The machine: what a time was taken on, how much memory it has, and what a process holds of it."""

from __future__ import annotations

import os
import platform
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # stage prepare asks for its peak of memory, and does without torch
    import torch

CPUINFO = Path("/proc/cpuinfo")
STATUS = Path("/proc/self/status")
# glibc serves tensors below its largest mmap threshold from a heap that is never compacted, and keeps what is
# freed. Measured on training steps of Llamas of 64 to 512 channels: 1.5 to 2.1 times what is alive.
HEAP_LIMIT, HEAP_FACTOR = 32 * 2**20, 1.8


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


def machine_memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def device_memory(kind: str) -> int | None:
    """Bytes of the GPU ("cuda"), or of the machine ("cpu"); None for a GPU that is not here."""
    if kind == "cpu":
        return machine_memory()
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def resident_bytes() -> int:
    """What this process holds of the machine's memory now, in bytes; on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Device:
    """Where a process runs: "cpu" or "cuda", and what it takes there before it does anything."""

    kind: str
    base_bytes: int

    def held(self, alive: float, largest: float) -> int:
        """What the allocator holds for tensors that come and go; the largest of them has `largest` bytes."""
        loose = self.kind == "cpu" and largest < HEAP_LIMIT
        return int(alive * (HEAP_FACTOR if loose else 1.0))
