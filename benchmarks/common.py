"""What the benchmarks say in the same way: machine, peak memory, spread."""

from __future__ import annotations

import platform
import resource
import statistics
from collections.abc import Sequence

import torch
import transformers


def machine() -> str:
    """The machine, threads and versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return (f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
            f"{transformers.__version__}")


def peak_memory() -> str:
    """Most memory that this process had so far: resident set, and on a GPU what torch allocated."""
    text = f"peak resident set {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"
    if torch.cuda.is_available():
        text += f", peak on the GPU {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    return text


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} - {max(values):.{digits}f})"
