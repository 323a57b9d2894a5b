"""What a machine is told and asked, for train.py and tests/benchmark.py."""

import ctypes
import sys

import torch


def prepare_cpu(base, chunk):
    """For training a base on a CPU, on chunks of that many tokens; on other devices nothing."""
    if base.device.type != "cpu":
        return
    # in bf16 the backward pass of the fused attention is far slower than plain attention on short chunks
    if base.dtype == torch.bfloat16 and chunk <= 256:
        base.set_attn_implementation("eager")
    # glibc gives large freed blocks back to the system: a step then spends a fifth of its time on getting them again
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-4, 0)                # M_MMAP_MAX: never by mmap
        ctypes.CDLL(None).mallopt(-1, -1)               # M_TRIM_THRESHOLD: never trim


def peak_memory(device):
    """Peak memory of this process in GB; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return None
    import resource                                     # which Windows has not
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return peak / 1e9                               # in bytes there, elsewhere in KB
    return 1024 * peak / 1e9
