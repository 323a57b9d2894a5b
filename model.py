"""The adapted language model: a frozen transformers decoder whose target layers read W + W_Delta (§2.1, §2.2).

    base, tokenizer = load_base()                              # SmolLM2-135M; or a hub id, directory, .gguf file
    model = AdaptedLM.from_pretrained(base, "assets/smollm2-135m")    # AdaptedLM(base, GeneratorConfig()): untrained
    memory = model.contextualize(chunk)                        # Sigma(1) -> S_1: one forward pass over a chunk (B, L)
    memory = model.contextualize(next_chunk, memory=memory)    # S_2, read under the adapter of S_1
    model.generate(question, memory=memory, max_new_tokens=20)        # answers with no context in the prompt

Each decoder block's forward is wrapped, and each target linear carries a forward hook. While a pass is under way, the
wrapper asks a small function for the (lora_A, lora_B) of its block, given the block's input H; the hook adds
x lora_A^T lora_B^T to the linear's output. With no pass under way the base is the base, its norms fused (fuse_norms).
"""

import contextlib
import os
import sys
import threading
import warnings
from functools import partial
from itertools import accumulate

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from generator import AdapterGenerator, Memory, rms_norm
from support.bases import DEFAULT_BASE, default_dtype, find_device, locate_base, model_at, tokenizer_at
from support.files import InputError
from support.formats import checkpoint_base, locate_checkpoint, read_generator, write_generator, write_peft

TARGETS = {"q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
           "o_proj": "self_attn.o_proj", "gate_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj",
           "down_proj": "mlp.down_proj"}
LOSS_ROWS = 512           # tokens whose logits stand in memory at once: 512 x 49,152 fp32 is 100 MB


class AdaptedLM(nn.Module):
    """A frozen causal LM, Llama-shaped (llama, mistral, qwen2, qwen3, gemma3), plus its adapter generator, fp32 on the
    base's device; S is fp32 whatever the base's dtype. With .checkpointing = n the first n blocks are recomputed in the
    backward pass."""

    def __init__(self, base_model, config):
        super().__init__()
        self.base, self.config, self.checkpointing = base_model.requires_grad_(False).eval(), config, 0
        prefix, blocks = find_blocks(base_model)
        first, last = config.blocks or (0, len(blocks) - 1)
        if last >= len(blocks):
            raise InputError(f"blocks {first} to {last} do not exist: this base has blocks 0 to {len(blocks) - 1}")
        shapes = {f"{prefix}.{l}.{TARGETS.get(target)}": target_shape(blocks[l], target)         # {name: (d_in, d_out)}
                  for l in range(first, last + 1) for target in config.targets}
        self.block_targets = [[n for n in shapes if n.startswith(f"{prefix}.{l}.")] for l in range(len(blocks))]
        d_h = base_model.config.get_text_config().hidden_size
        self.generator = AdapterGenerator(config, d_h, shapes, device=base_model.device)
        self.blocks, self._lock = list(blocks), threading.RLock()
        self._adapters = None       # while a pass is under way: a function (l, H) -> {module name: (lora_A, lora_B)}
        self._active = {}           # while a block is computed: what that function gave for it
        fuse_norms(base_model)
        for l, block in enumerate(blocks):
            block.forward = partial(self._block, l, block.forward)
        for name in shapes:
            base_model.get_submodule(name).register_forward_hook(partial(self._add_adapter, name))

    # ---- the two places where the base is touched

    def _block(self, l, block_forward, H, *args, **kwargs):
        """Block l of the base. Its input H, the residual stream, is what the block's generators read."""
        if self._adapters is None:
            return block_forward(H, *args, **kwargs)
        pairs = self._adapters(l, H) if self.block_targets[l] else {}

        def run(H):
            with self._lock:                                            # recomputation may meet another thread's pass
                self._active = pairs
                try:
                    return block_forward(H, *args, **kwargs)
                finally:
                    self._active = {}

        return self._recomputed(run, l, H)

    def _recomputed(self, function, l, H):
        """function(H) of block l. The first blocks recompute it: the backward pass reaches them last, when the others'
        activations are freed. Not transformers' own checkpointing, which is off in eval mode."""
        recompute = l < self.checkpointing and torch.is_grad_enabled()
        return checkpoint(function, H, use_reentrant=False, preserve_rng_state=False) if recompute else function(H)

    def _add_adapter(self, name, linear, inputs, output):
        """W x + W_Delta x, with W_Delta = lora_B lora_A (eq. 9)."""
        if name not in self._active:
            return output
        x, (lora_A, lora_B) = inputs[0], self._active[name]
        if lora_A.shape[0] not in (1, x.shape[0]):                  # beams and returned sequences are copies of a row
            lora_A, lora_B = (m.repeat_interleave(x.shape[0] // m.shape[0], 0) for m in (lora_A, lora_B))
        return output + x @ lora_A.mT @ lora_B.mT                       # (B, L, d_in) -> (B, L, r) -> (B, L, d_out)

    @contextlib.contextmanager
    def _adapting(self, adapters):
        with self._lock:                                    # one pass at a time: threads share the hooks
            self._adapters = adapters
            try:
                yield
            finally:
                self._adapters = None

    # ---- training: all segments in one pass (appendix B)

    def _hidden(self, segments, mask, visible):
        """Final hidden states (B, N, L, d_h) of segments (B, N, L): segment j adapted by the first visible[j] segments.

        Block l needs only block l-1's output of every segment, so all go through the base side by side and the chunks
        meet only in S: a cumulative sum over chunks gives S_1 .. S_C at once, equal to streaming them. Segments without
        an adapter train nothing: a pass without gradient takes them first and keeps their h of every block."""
        (B, N, L), visible = segments.shape, [int(v) for v in visible]
        if len(visible) != N or not all(0 <= v <= N for v in visible):
            raise ValueError(f"visible needs one number from 0 to {N} for each of the {N} segments, got {visible}")
        C, kept = max(visible), {}          # segments C and later never enter S; {l: {chunk: h}} of the first pass
        bare, adapted = [j for j in range(N) if not visible[j]], [j for j in range(N) if visible[j]]

        def rows(among, H):
            """{j: h of chunk j (B, L, d_h)} for the chunks (j < C) among these segments, which come first."""
            chunks = [j for j in among if j < C]
            h = rms_norm(H.view(B, len(among), -1, H.shape[-1])[:, :len(chunks)])           # (B, chunks, L', d_h)
            return dict(zip(chunks, F.pad(h, (0, 0, 0, L - h.shape[2])).unbind(1)))

        def keep(l, H):
            kept[l] = rows(bare, H)
            return {}

        def states(l, H):
            h = kept.get(l, {}) | rows(adapted, H)
            h, real = torch.stack([h[j] for j in range(C)], 1), None if mask is None else mask[:, :C]   # (B, C, L, d_h)
            updates = [self.generator[name].update(h, real) for name in self.block_targets[l]]
            # S_1 .. S_C (eq. 3), (B, C, d_r, d_r), by a running sum: the kernel of cumsum is ten times slower on a CPU
            return updates if C == 1 else [torch.stack([*accumulate(S.unbind(1))], 1) for S in updates]

        def adapters(l, H):
            pairs, wanted = {}, [visible[j] - 1 for j in adapted]           # the row that segment j takes of S_1 .. S_C
            for name, S in zip(self.block_targets[l], self._recomputed(partial(states, l), l, H)):
                # the pairs are computed once, not recomputed: they are small, and norm is slow
                pair = [m.to(H.dtype) for m in self.generator[name].adapter(S, tokens=C * L)]   # eq. 9, (B, C, ..)
                if wanted != [*range(C)]:           # unbind and stack, for the backward pass of an index is slow
                    pair = [torch.stack([each[row] for row in wanted], 1) for each in (m.unbind(1) for m in pair)]
                pairs[name] = tuple(m.flatten(0, 1) for m in pair)
            return pairs                            # (B len(adapted), r, d_in), (B len(adapted), d_out, r)

        def run(among):
            ids = segments[:, among]                                                        # (B, len(among), L)
            if mask is not None and mask[:, among].any():
                ids = ids[:, :, :int(mask[:, among].any(0).any(0).nonzero().max()) + 1]     # (B, len(among), L')
            # no attention mask: right padding under causal attention could reach only S, where update masks it
            hidden = self.base.get_decoder()(input_ids=ids.flatten(0, 1), use_cache=False).last_hidden_state
            hidden = F.pad(hidden, (0, 0, 0, L - hidden.shape[1]))                          # (B len(among), L, d_h)
            return zip(among, hidden.view(B, len(among), L, -1).unbind(1))

        hidden = {}
        if bare:
            with torch.no_grad(), self._adapting(keep if adapted else None):
                hidden.update(run(bare))
        if adapted:
            with self._adapting(adapters):
                hidden.update(run(adapted))
        return torch.stack([hidden[j] for j in range(N)], 1)                                # (B, N, L, d_h)

    def forward_segments(self, segments, mask, visible):
        """Logits (B, N, L, V) of segments (B, N, L) in one pass: segment j, whose positions begin at 0, is adapted by
        the first visible[j] segments (visible: N numbers). mask (B, N, L): 1 for real tokens, None for all real."""
        return self.base.get_output_embeddings()(self._hidden(segments, mask, visible))

    def segment_losses(self, segments, mask, visible, labels=None):
        """Cross-entropy of the same pass, in pieces: (nats summed (B, N) fp32, target tokens (B, N) long). labels
        (B, N, L): -100 is no target, None takes every real token. The first token of a segment is never a target."""
        if labels is None:
            labels = segments if mask is None else segments.masked_fill(~mask.bool(), -100)
        targets, scored = labels[:, :, 1:], labels[:, :, 1:] != -100                        # (B, N, L-1)
        at = scored.flatten().nonzero().squeeze(1)                                          # (T,)
        # one contiguous 2-D block: a linear over a strided slice copies the whole lm_head once per row of the batch
        hidden = self._hidden(segments, mask, visible)[:, :, :-1].flatten(0, 2)[at]         # (T, d_h)
        nats = HeadLoss.apply(hidden, targets.flatten()[at], self.base.get_output_embeddings())         # (T,)
        nats = torch.zeros(scored.numel(), device=nats.device).index_put((at,), nats).view(scored.shape)
        return nats.sum(-1), scored.sum(-1)

    # ---- inference: streaming

    @torch.no_grad()
    def contextualize(self, input_ids, mask=None, memory=None):
        """Read one chunk (B, L) under the adapter of memory and return the memory that has read it too:
        S_t = S_{t-1} + A2 H^T H B1. mask (B, L), right-padded; memory may have the chunk's batch or a batch of 1."""
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise InputError("the context is empty: contextualize needs at least 1 token in a (B, L) tensor")
        if mask is not None and (mask[:, 1:].bool() & ~mask[:, :-1].bool()).any():
            raise ValueError("contexts are padded on the right: mask must not turn from 0 to 1")
        fixed, states = self._pairs(memory, len(input_ids)), {}

        def adapters(l, H):
            h = rms_norm(H)
            for name in self.block_targets[l]:
                S = self.generator[name].update(h, mask)
                states[name] = S if memory is None else S + memory.states[name].to(H.device)            # eq. 3
            return fixed

        with self._adapting(adapters):
            self.base.get_decoder()(input_ids=input_ids, use_cache=False)
        tokens = torch.full((len(input_ids),), input_ids.shape[1]) if mask is None else mask.bool().sum(-1).cpu()
        return Memory(states, tokens + (0 if memory is None else memory.tokens), self.generator.fingerprint())

    def read(self, ids, memory=None):
        """Memory of a context of any length, ids a list of at least one: streamed in ceil(n / chunk) chunks of equal
        length, under memory, what was read before."""
        if len(ids) == 0:
            raise InputError("the context is empty: it needs at least 1 token")
        chunks = -(-len(ids) // self.config.chunk)
        L = -(-len(ids) // chunks)
        for start in range(0, len(ids), L):
            chunk = torch.tensor([ids[start:start + L]], device=self.base.device)              # (1, L)
            memory = self.contextualize(chunk, memory=memory)
        return memory

    def forward(self, input_ids, mask=None, memory=None):
        """Logits (B, L, V) of the adapted LM; without a memory, of the base. A memory of batch 1 serves every row."""
        fixed = self._pairs(memory, len(input_ids))
        with self._adapting(lambda l, H: fixed):
            return self.base(input_ids=input_ids, attention_mask=mask, use_cache=False).logits

    @torch.no_grad()
    def generate(self, input_ids, memory=None, **generation):
        """Token ids from the base's own transformers generate. Prompts are left-padded, with attention_mask=."""
        fixed = self._pairs(memory, len(input_ids))
        with self._adapting(lambda l, H: fixed):
            return self.base.generate(input_ids, **generation)

    def lora(self, memory):
        """The adapter of a memory: {module name: (lora_A (B, r, d_in), lora_B (B, d_out, r))} fp32, W_Delta = lora_B
        lora_A, s in lora_B. A memory that another generator wrote is refused."""
        if memory.fingerprint not in (None, self.generator.fingerprint()):
            raise InputError("the memory was written by another generator (its fingerprint differs): read the context "
                             "again with this one")
        shapes = {name: (self.config.d_r,) * 2 for name in self.generator.index}
        if {name: tuple(S.shape[1:]) for name, S in memory.states.items()} != shapes:
            raise InputError("the memory does not fit this generator: its target modules or d_r differ")
        return {name: self.generator[name].adapter(S.to(self.base.device)) for name, S in memory.states.items()}

    def _pairs(self, memory, batch):
        """lora(memory), or memory if it is that (computed once a context), in the base's dtype; {} without a memory."""
        if memory is None:
            return {}
        pairs = memory if isinstance(memory, dict) else self.lora(memory)
        rows = len(next(iter(pairs.values()))[0])
        if rows not in (1, batch):
            raise ValueError(f"a memory of batch {rows} cannot adapt a batch of {batch} rows")
        return {name: tuple(m.to(self.base.dtype) for m in pair) for name, pair in pairs.items()}

    # ---- files

    def save_pretrained(self, directory):
        """Write generator.safetensors and generator_config.json: the generator alone, never the base."""
        write_generator(directory, self.base.name_or_path, self.config, self.generator.tensors())

    @classmethod
    def from_pretrained(cls, base_model, directory):
        """A generator that save_pretrained wrote, or one in the authors' format (peft_type FASTLORA), on base_model;
        directory may be a hub id. Shapes and target modules must fit the base; a base of another name is a warning."""
        directory = locate_checkpoint(directory)
        config, tensors = read_generator(directory)
        base_name, name = checkpoint_base(directory), base_model.name_or_path
        if base_name != name:
            warnings.warn(f"checkpoint {directory} was trained for {base_name}, the base is {name}")
        model = cls(base_model, config)
        model.generator.load_tensors(tensors, directory)
        return model

    def export_peft(self, memory, directory):
        """Write the adapter of one context (batch of 1) as a PEFT LoRA directory, which peft, vLLM and others load."""
        if len(memory.tokens) != 1:
            raise ValueError(f"export_peft writes the adapter of one context, this memory holds {len(memory.tokens)}")
        pairs = {name: (lora_A[0], lora_B[0]) for name, (lora_A, lora_B) in self.lora(memory).items()}
        write_peft(directory, self.base.name_or_path, self.config, pairs, memory.tokens.item())


class HeadLoss(torch.autograd.Function):
    """Next-token nats (T,) of hidden states (T, d_h) under a frozen lm_head, LOSS_ROWS tokens at a time. The gradient
    by the hidden states, (softmax - one-hot) W_head, is formed in the forward pass, in the buffer of the logits: logits
    (T, V) never stand in memory at once nor are computed twice."""

    @staticmethod
    def forward(ctx, hidden, targets, lm_head):
        nats, grads = [], []
        for h, target in zip(hidden.split(LOSS_ROWS), targets.split(LOSS_ROWS)):
            logp = lm_head(h).float()                                                       # (rows, V)
            logp -= logp.logsumexp(-1, keepdim=True)
            at = (torch.arange(len(h), device=h.device), target)
            nats.append(-logp[at])
            if hidden.requires_grad:
                p = logp.exp_()
                p[at] -= 1
                grads.append(p.to(h.dtype) @ lm_head.weight)                                # (rows, d_h)
        ctx.grad = torch.cat(grads) if grads else None                                      # (T, d_h)
        return torch.cat(nats) if nats else hidden.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad_nats):
        return None if ctx.grad is None else ctx.grad * grad_nats[:, None].to(ctx.grad.dtype), None, None


def find_blocks(base_model):
    """(name, ModuleList) of the decoder blocks; a base that this project cannot adapt is refused."""
    names, kind = {module: name for name, module in base_model.named_modules()}, type(base_model).__name__
    c = base_model.config.get_text_config()
    scaled = any(getattr(c, key, None) not in (None, 1) for key in ("logit_scale", "logits_scaling"))
    if scaled or getattr(c, "final_logit_softcapping", None):
        raise InputError(f"{kind} scales or caps its logits after lm_head, which is not done here: choose another base")
    for module in base_model.get_decoder().modules():                   # a vision tower beside it has such blocks too
        parts = module[0] if isinstance(module, nn.ModuleList) and len(module) else None
        if hasattr(parts, "self_attn") and hasattr(parts, "mlp"):
            return names[module], module
    raise InputError(f"{kind} is not a decoder this project knows: its blocks need self_attn and mlp, as in llama, "
                     "mistral, qwen2, qwen3 or gemma3")


def target_shape(block, target):
    """(d_in, d_out) of the linear layer of that name in a block."""
    if target not in TARGETS:
        raise InputError(f"target module {target!r} is unknown: choose from {', '.join(TARGETS)}")
    try:
        linear = block.get_submodule(TARGETS[target])
        return linear.in_features, linear.out_features
    except AttributeError:
        raise InputError(f"{type(block).__name__} has no linear layer {TARGETS[target]}: choose other targets or "
                         "another base") from None


def fuse_norms(base_model):
    """Let the base's RMSNorms be torch's, one kernel on CUDA. Theirs are eight, and keep an fp32 copy of H for the
    backward pass; same in fp32, in bf16 rounded once where they round twice. Gemma's own is another formula."""
    for norm in base_model.modules():
        if type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon"):
            norm.forward = lambda H, n=norm: F.rms_norm(H, n.weight.shape, n.weight, n.variance_epsilon)


def load_base(name=DEFAULT_BASE, dtype=None, device=None):
    """(model, tokenizer) of a frozen base. name: "smollm2-135m-instruct", a .gguf file, a local directory or a hub id.
    device: default CUDA where there is one; dtype: default bf16 where the device computes in it, else fp32."""
    device = find_device(device)
    if device.type == "cpu" and dtype == torch.bfloat16 != default_dtype(device):
        print("this CPU only emulates bfloat16, many times slower than float32: use --dtype float32", file=sys.stderr)
    path, options = locate_base(name)
    tokenizer = tokenizer_at(name, path, **options)
    model = model_at(name, path, device, dtype or default_dtype(device), **options)
    if name == DEFAULT_BASE:                                           # a .gguf file, not where it was converted to
        model.name_or_path = name
    elif os.path.isfile(name):
        model.name_or_path = os.path.abspath(name)
    if isinstance(model.config.eos_token_id, int):                     # a GGUF tokenizer's differs between versions
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).requires_grad_(False).eval(), tokenizer
