"""Files and text: what users bring, and what is written."""

import errno
import gzip
import os

import pytest
import torch

import support.files
from conftest import make_model, make_tokenizer
from generator import Memory
from support.files import InputError, read_rows
from support.text import document_marks, user_turn


def test_files_as_other_programs_write_them(tmp_path):
    """A byte order mark and line ends are no part of a text; a csv with more fields than columns is refused."""
    for path, write in ((tmp_path / "text.txt", open), (tmp_path / "text.txt.gz", gzip.open)):
        with write(path, "wb") as file:
            file.write("\ufeffOne.\r\nTwo.\n".encode())
        ((_, row),) = read_rows(str(path))
        assert row == {"text": "One.\nTwo.\n"}
    path = tmp_path / "qa.csv"
    path.write_text('text,question,answers\n"A goat, brown.",Who?,goat\nA goat, brown.,Who?,goat\n')
    with pytest.raises(InputError, match="row 3 has more fields than columns"):
        list(read_rows(str(path)))


@pytest.mark.parametrize("special, before, after",
                         [(["<|endoftext|>", "<|im_end|>"], [], "<|endoftext|>"),        # SmolLM2, Qwen
                          (["<|end_of_text|>", "<|eot_id|>"], ["<s>"], "<|end_of_text|>"),      # Llama 3
                          (["<eos>", "<end_of_turn>"], ["<s>"], "<eos>"),                       # Gemma
                          ([], ["<s>"], "</s>")])
def test_a_document_ends_as_in_pretraining(special, before, after):
    """Not with the token that ends a turn, which instruction-tuned bases call their eos."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    if len(special) == 2:
        tokenizer.eos_token = special[1]
    got = document_marks(tokenizer)
    assert got == (tokenizer.convert_tokens_to_ids(before), [tokenizer.convert_tokens_to_ids(after)])


@pytest.mark.parametrize("date", ["{{ strftime_now('%d %B %Y') }}", "{{ date_string }}"])
def test_a_prompt_is_the_same_on_every_day(date):
    """Llama 3.2's template writes the date of the day unless it is told one."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = date + "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    text = tokenizer.decode(user_turn(tokenizer, "Who?"))
    assert text == "26 Jul 2024Who?"


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    """One sentence, the file that was there before stays, and no half of a new one."""
    memory = make_model().contextualize(torch.arange(9)[None])
    path = tmp_path / "m.safetensors"
    memory.save(path)
    before = path.read_bytes()
    (tmp_path / "x").touch()
    assert path.stat().st_mode == (tmp_path / "x").stat().st_mode       # safetensors would leave it to its owner alone

    def full(tensors, part, metadata=None):
        with open(part, "wb") as file:
            file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(support.files, "save_file", full)
    with pytest.raises(InputError, match="m.safetensors cannot be written: .*No space left"):
        memory.save(path)
    assert sorted(os.listdir(tmp_path)) == ["m.safetensors", "x"] and path.read_bytes() == before
    assert torch.equal(Memory.load(path).tokens, memory.tokens)
