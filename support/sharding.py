"""A base larger than one device, shared out among the processes of a group by torch's FSDP2: each holds a part of every
block's weights, and a block is gathered whole just before it is computed, forward and backward. Embedding, final norm
and lm_head are whole everywhere: they are few, and the loss reads lm_head.weight by itself.

Gathering takes all processes, so each must make as many passes of the base as the others, or all wait for ever.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from support.bases import default_dtype, load_base
from support.files import bad_input


def load_sharded(name, dtype=None, device=None):
    """load_base in every process of torchrun, whose group it starts: (model, tokenizer). The files are mapped into
    memory in the dtype they have, and each block goes to the device by itself, where a part of it is kept: no process
    holds more than a block whole."""
    if device is None and torch.cuda.is_available():
        device = "cuda"
    with bad_input(f"--device {device} is not to be had here", RuntimeError, AssertionError):
        device = torch.device(device or "cpu")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
    base, tokenizer = load_base(name, "auto", "cpu")
    dist.init_process_group(timeout=timedelta(minutes=15))              # gloo for CPU tensors, nccl for CUDA's
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))

    def move(module):
        for p in module.parameters():                                   # not .to(dtype): buffers keep theirs
            if not isinstance(p, DTensor):
                p.data = p.data.to(device, dtype or default_dtype(device))
        return module.to(device)

    decoder = base.get_decoder()
    for block in getattr(decoder, "layers", []):                        # AdaptedLM refuses a base that has none
        fully_shard(move(block), mesh=mesh)
        block.set_gradient_divide_factor(1)                             # gradients are summed, not averaged
        block.set_force_sum_reduction_for_comms(True)
    fully_shard(decoder, mesh=mesh, ignored_params=set(base.parameters()))
    return move(base), tokenizer


def split_parameters(base):
    """(sharded, whole): lists of parameters. Optimisers take no mixture of the two in one group."""
    sharded, whole = [], []
    for p in base.parameters():
        if isinstance(p, DTensor):
            sharded.append(p)
        else:
            whole.append(p)
    return sharded, whole


def local(tensor):
    """The part of a tensor that this process holds: all of one that is whole."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return tensor


def clip_gradients(base, largest):
    """Sum over processes the gradients of the weights that are whole, the others are summed already; then scale all to
    a norm of at most `largest`. Returns the norm before."""
    if not dist.is_initialized():
        return clip_grad_norm_(base.parameters(), largest)
    sharded, whole = split_parameters(base)
    sharded = [local(p.grad) for p in sharded]
    whole = [p.grad for p in whole if p.grad is not None]               # a tower for images has none
    for gradient in whole:
        dist.all_reduce(gradient)
    squares = get_total_norm(sharded).square()
    dist.all_reduce(squares)
    norm = (squares + get_total_norm(whole).square()).sqrt()
    for gradient in sharded + whole:
        gradient.mul_((largest / (norm + 1e-6)).clamp(max=1))
    return norm


def gather(base):
    """{name: tensor} of all weights, whole and in the CPU's memory, on process 0; {} on the others."""
    return get_model_state_dict(base, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
