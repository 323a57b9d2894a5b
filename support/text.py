"""Text to tokens: what data.py, evaluate.py and support/ put before a tokenizer.

Text from outside may hold the control tokens of the base's chat template, <|im_end|> for one. Here they are plain text,
spelled out, so that nobody's words can end their turn, open another one or end a document. Only the template and
document_marks write control tokens.
"""

import functools
import re

import torch

from support.files import without_surrogates

BREAK = "\ufdd0"          # never a character of a text (Unicode noncharacter)


@functools.lru_cache(maxsize=4)
def control_tokens(tokenizer, chat_template):
    """Patterns of (every control token, those a tokenizer does not list as special): special tokens, and added ones
    that the chat template writes. The second is None where there are none."""
    added = [t for t in tokenizer.added_tokens_decoder.values() if t.content.strip()]
    added.sort(key=lambda t: -len(t.content))
    others = [re.escape(t.content) for t in added if not t.special and t.content in str(chat_template)]
    special = [re.escape(t.content) for t in added if t.special]
    return re.compile("|".join(special + others) or "(?!)"), re.compile("|".join(others)) if others else None


def break_up(pattern, text):
    """text with a BREAK inside every match and behind it, so that no piece between two BREAKs holds one."""
    return pattern.sub(lambda match: match[0][0] + BREAK + break_up(pattern, match[0][1:]) + BREAK, text)


def tokenize(tokenizer, texts):
    """Token ids of texts (a list) as plain text, without BOS: a list of lists."""
    texts = [without_surrogates(text) for text in texts]
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    encoded = tokenizer(texts, **options)["input_ids"] if texts else []
    others = control_tokens(tokenizer, str(tokenizer.chat_template))[1]
    for i, text in enumerate(texts if others else []):
        if others.search(text):                              # split_special_tokens leaves these whole
            pieces = [p for p in break_up(others, text.replace(BREAK, "")).split(BREAK) if p]
            encoded[i] = [t for ids in tokenizer(pieces, **options)["input_ids"] for t in ids]
    return encoded


def apply_template(tokenizer, messages, **options):
    """Token ids of messages in the base's chat template. Control tokens in their content are plain text."""
    control = control_tokens(tokenizer, str(tokenizer.chat_template))[0]
    messages = [{**m, "content": break_up(control, without_surrogates(m["content"]).replace(BREAK, ""))}
                for m in messages]
    pieces = [p for p in tokenizer.apply_chat_template(messages, tokenize=False, **options).split(BREAK) if p]
    return [t for ids in tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"] for t in ids]


def document_marks(tokenizer):
    """(ids before a document, ids after it): BOS and EOS as in the paper. Where a tokenizer has <|endoftext|> (SmolLM2,
    Qwen), its bos and eos are chat tokens, so that one ends a document and nothing begins it."""
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")                   # the unknown token's, where it is not one
    if end is not None and tokenizer.convert_ids_to_tokens(end) == "<|endoftext|>":
        return [], [end]
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [t for t in [begin] if t is not None], [t for t in [end] if t is not None]


def context_ids(tokenizer, text):
    """A context as pretraining saw text: raw, no chat template. (The released code trains on templated contexts and
    tests on raw ones.)"""
    return document_marks(tokenizer)[0] + tokenize(tokenizer, [text])[0]


def user_turn(tokenizer, text):
    """One user turn and the opening of the reply in the base's chat template; without one, the bare text."""
    if tokenizer.chat_template is None:
        return context_ids(tokenizer, text)
    return apply_template(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)


def left_pad(prompts, pad):
    """Prompts (lists of ids) as generate wants them: ids (B, L) left-padded, attention mask (B, L)."""
    L = max(map(len, prompts))
    ids = torch.tensor([[pad] * (L - len(p)) + list(p) for p in prompts])
    return ids, torch.tensor([[0] * (L - len(p)) + [1] * len(p) for p in prompts])
