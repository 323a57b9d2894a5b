"""Text to tokens: what data.py, evaluate.py and support/ put before a tokenizer.

Text from outside may hold the control tokens of the base's chat template, <|im_end|> for one. Here they are plain text,
spelled out, so that nobody's words can end their turn, open another one or end a document. Only the template and
document_marks write control tokens.
"""

import functools
import re

from support.files import without_surrogates

BREAK = "\ufdd0"          # never a character of a text (Unicode noncharacter)


@functools.lru_cache(maxsize=8)
def control_tokens(tokenizer, chat_template, special):
    """Pattern of the added tokens that the chat template writes; special: and of all special tokens."""
    added = [t.content for t in tokenizer.added_tokens_decoder.values()
             if t.content.strip() and (special if t.special else t.content in chat_template)]
    return re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or "(?!)")


def break_up(tokenizer, text, special=True):
    """text with a BREAK inside every control token and behind it, so that no piece between two BREAKs holds one."""
    control = control_tokens(tokenizer, str(tokenizer.chat_template), special)
    return control.sub(lambda match: match[0][0] + BREAK + break_up(tokenizer, match[0][1:], special) + BREAK,
                       without_surrogates(text).replace(BREAK, ""))


def token_ids(tokenizer, texts, **options):
    """Token ids of texts, each tokenised piece by piece between its BREAKs: a list of lists."""
    pieces = [[piece for piece in text.split(BREAK) if piece] for text in texts]
    flat = [piece for some in pieces for piece in some]
    ids = iter(tokenizer(flat, add_special_tokens=False, verbose=False, **options)["input_ids"] if flat else [])
    return [[t for _ in some for t in next(ids)] for some in pieces]


def tokenize(tokenizer, texts):
    """Token ids of texts (a list) as plain text, without BOS: a list of lists."""
    texts = [break_up(tokenizer, text, special=False) for text in texts]       # special ones: by the option below
    return token_ids(tokenizer, texts, split_special_tokens=True)


def apply_template(tokenizer, messages, **options):
    """Token ids of messages in the base's chat template. Control tokens in their content are plain text."""
    messages = [{**m, "content": break_up(tokenizer, m["content"])} for m in messages]
    options = {"tokenize": False, "enable_thinking": False, **options}         # Qwen3: the reply is the answer, at once
    return token_ids(tokenizer, [tokenizer.apply_chat_template(messages, **options)])[0]


def document_marks(tokenizer):
    """(ids before a document, ids after it): BOS and EOS as in the paper. Where a tokenizer has <|endoftext|> (SmolLM2,
    Qwen), its bos and eos are chat tokens, so that one ends a document and nothing begins it."""
    end = tokenizer.added_tokens_encoder.get("<|endoftext|>")
    if end is not None:
        return [], [end]
    return tuple([] if t is None else [t] for t in (tokenizer.bos_token_id, tokenizer.eos_token_id))


def context_ids(tokenizer, text):
    """A context as pretraining saw text: raw, no chat template. (The released code trains on templated contexts and
    tests on raw ones.)"""
    return document_marks(tokenizer)[0] + tokenize(tokenizer, [text])[0]


def user_turn(tokenizer, text):
    """One user turn and the opening of the reply in the base's chat template; without one, the bare text."""
    if tokenizer.chat_template is None:
        return context_ids(tokenizer, text)
    return apply_template(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)


def whole_words(words):
    """Pattern that finds these words as whole words, whatever the case; no words are found nowhere."""
    return re.compile(rf"(?<!\w){re.escape(words) or '(?!)'}(?!\w)", re.IGNORECASE)
