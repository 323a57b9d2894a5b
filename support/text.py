"""Text to tokens: what is put before a tokenizer.

Text from outside may hold the control tokens of the base's chat template, <|im_end|> for one. Here they are plain text,
spelled out, so that nobody's words can end their turn, open another one or end a document. Only the template and
document_marks write control tokens.
"""

import functools
import re

BREAK = "\ufdd0"          # never a character of a text (Unicode noncharacter)
MARK = "\ufdd1"           # another: on either side of the last reply in a chat template
# the date of every prompt, the one that Llama 3.2's template falls back to: today's would change prompts overnight
DATE = "26 Jul 2024"
FIXED_DATE = "{%- macro strftime_now(format) -%}" + DATE + "{%- endmacro -%}"


@functools.lru_cache(maxsize=8)
def control_tokens(tokenizer, chat_template):
    """Pattern of the first character of the special tokens and of the added ones that the chat template writes."""
    patterns = []
    for token in tokenizer.added_tokens_decoder.values():
        if (token.special or token.content in chat_template) and token.content.strip():
            patterns.append(f"{re.escape(token.content[0])}(?={re.escape(token.content[1:])})")
    return re.compile("|".join(patterns) or "(?!)")


def break_up(tokenizer, text):
    """text with a BREAK after the first character of every control token, so that no piece between two BREAKs holds
    one; half surrogate pairs, which no tokenizer takes, are replaced."""
    control = control_tokens(tokenizer, str(tokenizer.chat_template))
    text = text.encode("utf-8", "replace").decode().replace(BREAK, "").replace(MARK, "")
    return control.sub(rf"\g<0>{BREAK}", text)


def token_ids(tokenizer, texts):
    """Token ids of texts, each tokenised piece by piece between its BREAKs: a list of lists."""
    pieces = []
    owners = []
    for i, text in enumerate(texts):
        for piece in text.split(BREAK):
            if piece:
                pieces.append(piece)
                owners.append(i)
    ids = [[] for _ in texts]
    if pieces:
        encoded = tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
        for i, piece_ids in zip(owners, encoded):
            ids[i].extend(piece_ids)
    return ids


def tokenize(tokenizer, texts):
    """Token ids of texts (a list) as plain text, without BOS: a list of lists."""
    return token_ids(tokenizer, [break_up(tokenizer, text) for text in texts])


def apply_template(tokenizer, messages, **options):
    """Text of messages in the base's chat template, for token_ids. Control tokens in their content are plain text. A
    reply that comes last stands between two MARKs."""
    broken = []
    for message in messages:
        broken.append({**message, "content": break_up(tokenizer, message["content"])})
    if messages[-1]["role"] == "assistant":
        broken[-1]["content"] = MARK + broken[-1]["content"] + MARK
    # enable_thinking: Qwen3's reply is then the answer, at once
    return tokenizer.apply_chat_template(broken, chat_template=FIXED_DATE + tokenizer.get_chat_template(),
                                         tokenize=False, enable_thinking=False, date_string=DATE, **options)


def document_marks(tokenizer):
    """(ids before a document, ids after it): BOS and EOS as in the released code. EOS is that of the pretrained base:
    an instruction-tuned one may have a chat token for it. Where a tokenizer has <|endoftext|> (SmolLM2, Qwen), its bos
    is a chat token too, so that one ends a document and nothing begins it."""
    known = tokenizer.added_tokens_encoder
    if "<|endoftext|>" in known:
        return [], [known["<|endoftext|>"]]
    after = tokenizer.eos_token_id
    for name in ("<|end_of_text|>", "<eos>"):           # Llama 3, Gemma
        after = known.get(name, after)
    if tokenizer.bos_token_id is None:
        return [], [after]
    return [tokenizer.bos_token_id], [after]


def context_ids(tokenizer, text):
    """A context as pretraining saw text: raw, no chat template. (The released code trains on templated contexts and
    tests on raw ones.)"""
    before, _ = document_marks(tokenizer)
    return before + tokenize(tokenizer, [text])[0]


def user_turn(tokenizer, text):
    """One user turn and the opening of the reply in the base's chat template; without one, the bare text."""
    if tokenizer.chat_template is None:
        return context_ids(tokenizer, text)
    prompt = apply_template(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)
    return token_ids(tokenizer, [prompt])[0]
