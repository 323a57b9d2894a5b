"""What a machine needs to be told or asked, for train.py and tests/benchmark.py."""

import ctypes
import sys

import torch


def peak_memory(device):
    """Peak memory of this process in GB; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return None
    import resource                                     # which Windows has not
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def keep_freed_memory():
    """glibc gives large freed blocks back to the system, and a CPU step then spends a fifth of its time on getting them
    again, page by page."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None) if sys.platform == "linux" else lambda *_: None
    mallopt(-4, 0), mallopt(-1, -1)                     # M_MMAP_MAX: never by mmap; M_TRIM_THRESHOLD: never trim


def choose_attention(base, chunk):
    """For training on chunks of that many tokens: in bf16 on a CPU, the fused kernel's backward pass is far slower than
    plain attention on short ones."""
    if base.device.type == "cpu" and base.dtype == torch.bfloat16 and chunk <= 256:
        base.set_attn_implementation("eager")


def balanced_rows(costs, processes):
    """The rows of a batch for each process, so that all take about as long: [(rows of process p,) long tensors]. The
    costliest first, each to the process that has least so far; rows of one cost are dealt out in turn. Neighbours
    share a micro-batch: of like cost, they need little padding."""
    rows, loads = [[] for _ in range(processes)], [0] * processes
    for row in sorted(range(len(costs)), key=lambda row: -costs[row]):
        least = loads.index(min(loads))
        rows[least].append(row)
        loads[least] += costs[row]
    return [torch.tensor(mine) for mine in rows]
