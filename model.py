"""The adapted language model: a frozen transformers decoder whose target layers read W + W_Delta (§2.1, §2.2).

    base, tokenizer = load_base()                                   # SmolLM2-135M; or a hub id, directory, .gguf file
    model = AdaptedLM.from_pretrained(base, "assets/smollm2-135m")  # AdaptedLM(base, GeneratorConfig()): untrained
    memory = model.contextualize(chunk)                             # Sigma(1) -> S_1: one forward pass over a chunk
    memory = model.contextualize(next_chunk, memory=memory)         # S_2, read under the adapter of S_1
    model.generate(question, memory=memory, max_new_tokens=20)      # answers with no context in the prompt

Each decoder block's forward is wrapped, and each target linear carries a forward hook. While a pass is under way, the
wrapper asks a small function for the lora_A and lora_B of its block, given the block's input H; the hook adds
x lora_A^T lora_B^T to the linear's output. With no pass under way the base is the base.

What stands here and in generator.py is the plain form. The program computes norm, adapter, hidden_states,
segment_losses and, in training, block_forward by their fast twins in support/fast.py; with model.plain = True by these.
"""

import threading
import warnings
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from generator import AdapterGenerator, GeneratorConfig, Memory, rms_norm, split_into_chunks
from support import fast
from support.bases import DEFAULT_BASE, load_base  # noqa: F401   part of this module's interface
from support.files import InputError
from support.formats import read_generator, write_generator, write_peft

TARGETS = {"q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
           "o_proj": "self_attn.o_proj", "gate_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj",
           "down_proj": "mlp.down_proj"}


class AdaptedLM(nn.Module):
    """A frozen causal LM, Llama-shaped (llama, mistral, qwen2, qwen3, gemma3), plus its adapter generator, fp32 on the
    base's device; S is fp32 whatever the base's dtype. With .checkpointing = n the first n blocks are recomputed in the
    backward pass; .plain = True takes the plain forms."""

    def __init__(self, base_model, config):
        super().__init__()
        self.base = base_model.requires_grad_(False).eval()
        self.config = config
        self.checkpointing = 0
        self.plain = False
        prefix, blocks = find_blocks(base_model)
        self.blocks = list(blocks)
        self.block_targets = []                         # of each block, the names of its target modules
        shapes = {}                                     # {name: (d_in, d_out)}
        for l, block in enumerate(blocks):
            names = []
            for target in config.targets:
                path = TARGETS.get(target, target)
                name = f"{prefix}.{l}.{path}"
                try:
                    linear = block.get_submodule(path)
                    shapes[name] = (linear.in_features, linear.out_features)
                except AttributeError:
                    raise InputError(f"{type(block).__name__} has no target module {target!r}: choose from "
                                     f"{', '.join(TARGETS)}, or another base") from None
                names.append(name)
            self.block_targets.append(names)
        text_config = base_model.config.get_text_config()
        self.window = text_config.max_position_embeddings                       # tokens that the base reads at once
        self.generator = AdapterGenerator(config, text_config.hidden_size, shapes, device=base_model.device)
        self.adapt_block = None                         # during a pass: a function (l, H) -> {name: (lora_A, lora_B)}
        self.lora_of_block = {}                         # while a block is computed: what that function gave for it
        self.lock = threading.RLock()
        for l, block in enumerate(blocks):
            block.forward = partial(self.block_forward, l, block.forward)
        for name in shapes:
            base_model.get_submodule(name).register_forward_hook(partial(self.add_adapter, name))

    # ---- the two places where the base is touched

    def block_forward(self, l, forward, H, *args, **kwargs):
        """Block l of the base. Its input H (B, L, d_h), the residual stream, is what the block's generators read."""
        if self.adapt_block is None:
            return forward(H, *args, **kwargs)
        lora = self.adapt_block(l, H)
        if torch.is_grad_enabled() and not self.plain:  # training: blocks recomputed, norms in one kernel
            return fast.block_forward(self, l, lora, forward, H, *args, **kwargs)
        self.lora_of_block = lora
        try:
            return forward(H, *args, **kwargs)
        finally:
            self.lora_of_block = {}

    def add_adapter(self, name, linear, inputs, output):
        """W x + W_Delta x, with W_Delta = lora_B lora_A (eq. 9)."""
        if name not in self.lora_of_block:
            return output
        x = inputs[0]
        lora_A, lora_B = self.lora_of_block[name]
        if 1 < len(lora_A) < len(x):                    # beams and returned sequences are copies of a row
            lora_A = lora_A.repeat_interleave(len(x) // len(lora_A), 0)
            lora_B = lora_B.repeat_interleave(len(x) // len(lora_B), 0)
        return output + x @ lora_A.mT @ lora_B.mT       # (B, L, d_in) -> (B, L, r) -> (B, L, d_out)

    def run(self, adapt_block, function, *args, **kwargs):
        """function(*args, **kwargs), a pass of the base. adapt_block: a function (l, H) -> {module name: (lora_A,
        lora_B)}, called before block l with its input."""
        with self.lock:                                 # one pass at a time: threads share the hooks
            self.adapt_block = adapt_block
            try:
                return function(*args, **kwargs)
            finally:
                self.adapt_block = None

    # ---- training: all segments in one pass (appendix B)

    def hidden_states(self, segments, mask, visible):
        """Final hidden states (B, N, L, d_h) of segments (B, N, L): segment j under the adapter of the first visible[j]
        segments (appendix B).

        Block l needs only block l-1's output of every segment, so all go through the base side by side and the chunks
        meet only in S: a cumulative sum over chunks gives S_1 .. S_C at once. With visible[j] = j for the chunks this
        equals streaming them. No attention mask: padding is on the right and attention causal, so no real token sees
        it, and update keeps it out of S."""
        B, N, L = segments.shape
        visible = [int(v) for v in visible]
        if not self.plain:
            return fast.hidden_states(self, segments, mask, visible)
        C = max(visible)                                                        # segments from C on never enter S
        chunk_mask = None if mask is None else mask[:, :C]

        def adapt_block(l, H):                                                  # H (B N, L, d_h), the input of block l
            h = rms_norm(H).view(B, N, L, -1)[:, :C]                            # (B, C, L, d_h)
            lora = {}
            for name in self.block_targets[l]:
                layer = self.generator.by_name[name]
                S = layer.update(h, chunk_mask).cumsum(1)                       # eq. 3: S_1 .. S_C  (B, C, d_r, d_r)
                S = F.pad(S, (0, 0, 0, 0, 1, 0))                                # S_0 = 0: the base  (B, C+1, d_r, d_r)
                lora_A, lora_B = layer.adapter(S)                               # eq. 6-9
                lora_A = lora_A[:, visible].flatten(0, 1)                       # (B N, r, d_in)
                lora_B = lora_B[:, visible].flatten(0, 1)                       # (B N, d_out, r)
                lora[name] = (lora_A.to(H.dtype), lora_B.to(H.dtype))
            return lora

        ids = segments.flatten(0, 1)                                            # (B N, L)
        out = self.run(adapt_block, self.base.get_decoder(), input_ids=ids, use_cache=False)
        return out.last_hidden_state.view(B, N, L, -1)

    def forward_segments(self, segments, mask, visible):
        """Logits (B, N, L, V) of segments (B, N, L) in one pass: segment j, whose positions begin at 0, is adapted by
        the first visible[j] segments (visible: N numbers). mask (B, N, L): 1 for real tokens, None for all real."""
        return self.base.get_output_embeddings()(self.hidden_states(segments, mask, visible))

    def segment_losses(self, segments, mask, visible, labels):
        """Next-token cross-entropy of the same pass: (nats summed (B, N) fp32, target tokens (B, N) long). labels
        (B, N, L): -100 is no target. The first token of a segment is never a target: nothing stands before it (the
        paper's P(x_1, .., x_m) counts it)."""
        hidden = self.hidden_states(segments, mask, visible)                    # (B, N, L, d_h)
        lm_head = self.base.get_output_embeddings()
        if not self.plain:
            return fast.losses(lm_head, hidden, labels)
        logits = lm_head(hidden[:, :, :-1]).float()                             # (B, N, L-1, V)
        targets = labels[:, :, 1:]                                              # (B, N, L-1)
        nats = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=-100, reduction="none")
        return nats.view(targets.shape).sum(-1), (targets != -100).sum(-1)      # (B, N), (B, N)

    # ---- inference: streaming

    @torch.no_grad()
    def contextualize(self, input_ids, mask=None, memory=None):
        """Read one chunk (B, L) under the adapter of memory and return the memory that has read it too:
        S_t = S_{t-1} + A2 H^T H B1 (eq. 3). mask (B, L), right-padded; memory may have the chunk's batch or a batch of
        1."""
        lora = self.lora_for(memory, input_ids)
        if input_ids.shape[1] > self.window:
            raise InputError(f"a chunk of {input_ids.shape[1]} tokens is longer than the base's window of "
                             f"{self.window}: read the context with model.read(ids), chunk by chunk")
        tokens = torch.full((len(input_ids),), input_ids.shape[1])              # (B,)
        if mask is not None:
            if (mask[:, 1:].bool() & ~mask[:, :-1].bool()).any():
                raise ValueError("contexts are padded on the right: mask must not turn from 0 to 1")
            tokens = mask.bool().sum(-1).cpu()                                  # (B,)
        states = {}

        def adapt_block(l, H):
            h = rms_norm(H)                                                     # (B, L, d_h)
            for name in self.block_targets[l]:
                S = self.generator.by_name[name].update(h, mask)                           # (B, d_r, d_r)
                if memory is not None:
                    S = memory.states[name].to(H.device) + S                    # eq. 3
                states[name] = S
            return lora

        self.run(adapt_block, self.base.get_decoder(), input_ids=input_ids, use_cache=False)
        if memory is not None:
            tokens = memory.tokens + tokens
        return Memory(states, tokens, self.generator.fingerprint())

    def read(self, ids, memory=None):
        """Memory of a context of any length, ids a list of at least one, read under memory: streamed in the fewest
        chunks of at most config.chunk tokens, of one length but for the last, which may be shorter (the paper: 1,024
        each)."""
        if isinstance(ids, str):
            raise InputError("read takes token ids, no text: model.read(context_ids(tokenizer, text))")
        chunks = split_into_chunks(list(ids), min(self.config.chunk, self.window))
        for chunk in tqdm(chunks, desc="read", delay=2, leave=False, disable=None):        # a bar on a terminal alone
            chunk = torch.tensor([chunk], device=self.base.device)              # (1, L)
            memory = self.contextualize(chunk, memory=memory)
        return memory

    def forward(self, input_ids, mask=None, memory=None):
        """Logits (B, L, V) of the adapted LM; without a memory, of the base. A memory of batch 1 serves every row."""
        lora = self.lora_for(memory, input_ids)
        out = self.run(lambda l, H: lora, self.base, input_ids=input_ids, attention_mask=mask, use_cache=False)
        return out.logits

    @torch.no_grad()
    def generate(self, input_ids, memory=None, **generation):
        """Token ids from the base's own transformers generate. Prompts are left-padded, with attention_mask=."""
        lora = self.lora_for(memory, input_ids)
        return self.run(lambda l, H: lora, self.base.generate, input_ids, **generation)

    def lora(self, memory):
        """The adapter of a memory: {module name: (lora_A (B, r, d_in), lora_B (B, d_out, r))} fp32, W_Delta = lora_B
        lora_A (eq. 9), s in lora_B. InputError for a memory that another generator wrote."""
        if memory.fingerprint not in (None, self.generator.fingerprint()):
            raise InputError("the memory was written by another generator (its fingerprint differs): read the context "
                             "again with this one")
        shapes = {name: S.shape[1:] for name, S in memory.states.items()}
        if shapes != dict.fromkeys(self.generator.by_name, (self.config.d_r, self.config.d_r)):
            raise InputError("the memory does not fit this generator: its target modules or its d_r differ")
        lora = {}
        for name, layer in self.generator.by_name.items():
            S = memory.states[name].to(self.base.device)
            lora[name] = layer.adapter(S) if self.plain else fast.adapter(layer, S)
        return lora

    def lora_for(self, memory, input_ids):
        """lora(memory) in the base's dtype, for a pass over input_ids (B, L); {} without a memory."""
        if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2 or input_ids.numel() == 0:
            raise InputError("the model takes token ids, a (B, L) tensor that is not empty, and no text: "
                             "tokenizer(text, return_tensors=\"pt\")[\"input_ids\"]")
        if memory is None:
            return {}
        if len(memory.tokens) not in (1, len(input_ids)):
            raise InputError(f"a memory of {len(memory.tokens)} contexts side by side cannot adapt a batch of "
                             f"{len(input_ids)} rows")
        lora = {}
        for name, (lora_A, lora_B) in self.lora(memory).items():
            lora[name] = (lora_A.to(self.base.dtype), lora_B.to(self.base.dtype))
        return lora

    # ---- files

    def save_pretrained(self, directory):
        """Write generator.safetensors and generator_config.json: the generator alone, never the base."""
        write_generator(directory, self.base.name_or_path, self.config, self.generator.tensors())

    @classmethod
    def from_pretrained(cls, base_model, directory):
        """A generator that save_pretrained wrote, or one in the authors' format (peft_type FASTLORA), on base_model;
        directory may be a hub id. Shapes and target modules must fit the base; a base of another name is a warning."""
        values, tensors, base_name = read_generator(directory)
        if base_name != base_model.name_or_path:
            warnings.warn(f"checkpoint {directory} was trained for {base_name}, the base is {base_model.name_or_path}")
        model = cls(base_model, GeneratorConfig.from_dict(values))
        model.generator.load_tensors(tensors, directory)
        return model

    def export_peft(self, memory, directory):
        """Write the adapter of one context (a batch of 1, else RuntimeError) as a PEFT LoRA directory, which peft, vLLM
        and others load."""
        write_peft(directory, self.base.name_or_path, self.config, self.lora(memory), memory.tokens.item())


def find_blocks(base_model):
    """(name, ModuleList) of the decoder blocks; a base that this project cannot adapt is refused."""
    kind = type(base_model).__name__
    config = base_model.config.get_text_config()
    for key in ("logit_scale", "logits_scaling", "final_logit_softcapping"):
        if getattr(config, key, None) not in (None, 1):
            raise InputError(f"{kind} scales or caps its logits after lm_head, which is not done here: choose another "
                             "base")
    blocks = getattr(base_model.get_decoder(), "layers", None)
    if blocks and hasattr(blocks[0], "self_attn") and hasattr(blocks[0], "mlp"):
        for name, module in base_model.named_modules():
            if module is blocks:
                return name, blocks
    raise InputError(f"{kind} is not a decoder this project knows: its blocks need self_attn and mlp, as in llama, "
                     "mistral, qwen2, qwen3 or gemma3")

