"""Memory that is held, and the most that was since a moment."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
FORGET_PEAK = "5"  # what clear_refs takes for it, see proc(5)


def forget_peak(device: torch.device) -> None:
    """Begin anew. Where a system cannot, the peak is that of the process so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        CLEAR.write_text(FORGET_PEAK)


def read_peak_mb(device: torch.device) -> float:
    """MB (2^20 bytes): on CUDA what torch had allocated, else what the process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if STATUS.exists() and "VmHWM" in STATUS.read_text():  # not every system of that name has it
        return _read_status_mb("VmHWM")
    unit = 2**20 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def read_held_mb() -> float:
    """MB that the process holds now. Raises: OSError where the system does not say."""
    return _read_status_mb("VmRSS")


def _read_status_mb(name: str) -> float:
    lines = [line for line in STATUS.read_text().splitlines() if line.startswith(name)]
    return int(lines[0].split()[1]) / 1024
