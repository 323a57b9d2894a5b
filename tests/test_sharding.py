"""Bases shared out over process groups: what is trained is what one process, or a group with whole bases, trains."""

import json
import re
import signal

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import ROOT, make_base, make_model, make_tokenizer
from extras import finetune
from model import load_base
from processes import finish, start, start_group
from support import bases
from support.files import InputError
from test_data import write_rows
from test_train import qa_file  # noqa: F401   a fixture
from test_train import assert_same_gradient, assert_same_weights, command, read_log


def read(path):
    return [text.read_text() for text in path.glob("printed*")]


def test_pretraining(tmp_path, base_directory, text_file):
    """On three processes, which validate on 7, 7 and 6 items: bit for bit the run with whole bases, from the aligned
    start, with blocks recomputed, killed in its middle and resumed."""
    def group(name, *more, life=0):
        line = command(base_directory, text_file, tmp_path / name, "--steps", "6", "--save-every", "2", "--batch", "6",
                       "--eval-sequences", "20", "--eval-every", "3", "--checkpointing", "2", "--micro-batch",
                       "3", *more)
        return start_group(line, tmp_path / "printed", [ROOT] * 3, life=life)

    assert finish(*group("whole")) == [0] * 3, read(tmp_path)
    first, *others = group("sharded", "--shard", life=9)        # after a checkpoint and other steps
    assert finish(first) == [-signal.SIGKILL], read(tmp_path)
    for process in others:                              # as torchrun does
        process.kill()
    assert finish(*group("sharded", "--shard", "--resume")) == [0] * 3, read(tmp_path)
    assert re.search("from step [24];", (tmp_path / "printed-0").read_text())
    whole, sharded = read_log(tmp_path / "whole"), read_log(tmp_path / "sharded")
    assert [(row["loss"], row["grad_norm"]) for row in whole] == [(row["loss"], row["grad_norm"]) for row in sharded]
    assert_same_weights(tmp_path / "whole", tmp_path / "sharded", 6)
    validated = [(tmp_path / name / "validation.jsonl").read_text() for name in ("whole", "sharded")]
    assert validated[0] == validated[1] and len(validated[0].splitlines()) == 3


def test_instruction_tuning(tmp_path, base_directory, qa_file, text_file):  # noqa: F811
    """On two processes: the gradients and the losses of one, with contexts of one to three chunks and texts."""
    base, _ = load_base(base_directory, torch.float32, "cpu")
    make_model(base=base, d_r=16).save_pretrained(tmp_path / "pretrained")
    line = ["train.py", "--stage", "instruct", "--checkpoint", str(tmp_path / "pretrained"), "--base", base_directory,
            "--data", qa_file, "--documents", text_file, "--device", "cpu", "--dtype", "float32", "--chunk", "64",
            "--chunks", "3", "--batch", "8", "--micro-batch", "3", "--lr", "1e-3", "--warmup", "1", "--eval-sequences",
            "3", "--steps", "3", "--save-every", "1"]
    ended = finish(start([*line, "--out", str(tmp_path / "one")], tmp_path / "printed", kept=9))
    line += ["--shard", "--out", str(tmp_path / "two")]
    ended += finish(*start_group(line, tmp_path / "printed", [ROOT] * 2, kept=9))
    assert ended == [0] * 3, read(tmp_path)
    assert_same_gradient(tmp_path / "one", tmp_path / "two")
    losses = [[row["loss"] for row in read_log(tmp_path / name)] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    validated = [(tmp_path / name / "validation.jsonl").read_text() for name in ("one", "two")]
    for one, two in zip(*(map(json.loads, lines.splitlines()) for lines in validated)):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-4)


def test_finetuning(tmp_path, qa_file):  # noqa: F811
    """CPT and SFT, with lm_head the embedding: three processes, with batches of 5 rows, write the weights of one."""
    make_base(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    rows = [json.loads(line) for line in open(qa_file)]
    documents = write_rows(tmp_path / "docs.jsonl", [{"text": row["context"]} for row in rows[:5]])
    line = ["train.py", "--stage", "finetune", "--base", str(tmp_path / "base"), "--data", qa_file, "--documents",
            documents, "--validation", qa_file, "--device", "cpu", "--batch", "5", "--epochs", "2", "--checkpointing",
            "2"]
    ended = finish(start([*line, "--out", str(tmp_path / "one")], tmp_path / "printed"))
    ended += finish(*start_group([*line, "--out", str(tmp_path / "three")], tmp_path / "printed", [ROOT] * 3))
    assert ended == [0] * 4, read(tmp_path)
    before, one, three = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "one", "three"))
    assert one.keys() == three.keys() == before.keys()
    for name, weight in one.items():
        torch.testing.assert_close(three[name], weight, atol=1e-5, rtol=0)
        assert (three[name] - weight).abs().mean() < 1e-2 * (weight - before[name]).abs().mean()
    histories = [json.load(open(tmp_path / name / "finetune.json"))["validation_nats"] for name in ("one", "three")]
    assert histories[1] == pytest.approx(histories[0], rel=1e-5) and histories[0][-1] < histories[0][0]
    configs = [json.load(open(tmp_path / name / "config.json")) for name in ("one", "three")]
    assert configs[0] == configs[1] and not (tmp_path / "three.part").exists()


def test_one_sentence(base_directory, text_file, tmp_path, monkeypatch):
    """What does not fit on one device, and what has but one process."""
    with pytest.raises(InputError, match="auto is not to be had here .a base must fit on one device"):
        load_base(base_directory, device="auto")
    with pytest.raises(InputError, match="here is one: start several with torchrun"):
        train.arguments(command(base_directory, text_file, tmp_path, "--shard")[1:])
    monkeypatch.setenv("WORLD_SIZE", "2")
    args = train.arguments(command(base_directory, text_file, tmp_path, "--shard", "--norm", "svd-exact")[1:])
    with pytest.raises(InputError, match="svd-exact may fail on one process alone"):
        train.adapted_model(args, load_base(base_directory, torch.float32, "cpu")[0])

    def from_pretrained(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bases.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(InputError, match="does not fit on cpu, .* train.py --shard"):
        load_base(base_directory, torch.float32, "cpu")


def test_shares(monkeypatch):
    """The parts of all processes hold each example once and are equally many, whatever divides what."""
    random = torch.Generator().manual_seed(0)
    monkeypatch.setattr(finetune, "PASS_TOKENS", 40)
    base = make_base()
    for count, world in ((1, 3), (7, 3), (20, 3), (11, 4)):
        rows = [torch.randint(0, 256, (int(n),), generator=random).tolist() for n in
                torch.randint(2, 20, (count,), generator=random)]
        examples = [(ids, [-100] + ids[1:]) for ids in rows]
        with torch.no_grad():
            want = sum(finetune.losses(base, examples, 0, 1))
            shares = [list(finetune.losses(base, examples, rank, world)) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        torch.testing.assert_close(sum(sum(share) for share in shares), want)
    monkeypatch.setattr(train, "PASS_TOKENS", 300)
    mask = torch.arange(60) < torch.randint(2, 60, (15, 4, 1), generator=random)                    # (B, N, L)
    shares = [train.micro_batches(mask, None, rank, 3) for rank in range(3)]
    assert len({len(share) for share in shares}) == 1
    assert torch.equal(torch.cat(sum(shares, [])).sort().values, torch.arange(15))
    for rows in sum(shares, []):
        assert len(rows) == 1 or len(rows) * 4 * mask[rows].sum(-1).max() <= 300
