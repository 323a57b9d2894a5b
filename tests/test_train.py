"""The training loop as a command: resuming after a kill, several processes, accumulation, instruction tuning, the
fine-tuned baselines, refusals."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from safetensors.torch import load_file

import train
from conftest import ROOT, make_base, make_model
from data import InstructionData, PretrainingData, doubled
from extras import finetune
from model import load_base
from processes import finish, start, start_group
from support.files import InputError, save_tensors
from test_data import CHATML, instruction_flags, write_rows


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("data.CACHE", str(tmp_path / "cache"))


def command(base, text, out, *flags):
    return ["train.py", "--base", base, "--data", text, "--out", str(out), "--device", "cpu", "--dtype", "float32",
            "--chunk", "16", "--chunks", "2", "--batch", "4", "--d-r", "16", "--rank", "8", "--lr", "1e-2",
            "--warmup", "2", "--eval-sequences", "3", "--eval-every", "1000", *flags]


def main(base, text, out, *flags):
    train.train(train.arguments(command(base, text, out, *flags)[1:]))


def weights(out, step):
    return load_file(out / f"step-{step:06d}" / "generator.safetensors")


def read_log(out):
    return [json.loads(line) for line in open(out / "log.jsonl")]


def assert_same_gradient(out, other):
    """The reduced gradients of the first step, which its first moment is a tenth of. Weights would not do: Adam's steps
    have the size of the learning rate however small a gradient, and so amplify rounding."""
    ours, theirs = (load_file(path / "step-000001" / "optimizer.safetensors") for path in (out, other))
    moments = [name for name in ours if name.startswith("exp_avg/")]
    assert moments and any(ours[name].any() for name in moments)
    for name in moments:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-3, atol=1e-4 * ours[name].abs().max().item())


def assert_same_weights(out, other, step):
    for name, tensor in weights(out, step).items():
        assert torch.equal(tensor, weights(other, step)[name]), name


def test_a_signal_leaves_a_checkpoint(tmp_path, base_directory, text_file):
    """It ends the run after the step under way, with exit code 0, a checkpoint of that step and a word on what is
    next."""
    log = tmp_path / "run" / "log.jsonl"
    for number, kind in enumerate((signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1), 1):
        run = start(command(base_directory, text_file, tmp_path / "run", "--steps", "100000", "--resume"),
                    tmp_path / "printed")
        while run.is_alive() and not (log.exists() and log.read_text().count("\n") >= 3 * number):
            time.sleep(0.01)
        os.kill(run.pid, kind)
        assert finish(run) == [0]
        step = sum(1 for _ in open(log))
        last = (tmp_path / "printed").read_text().splitlines()[-1]
        assert f"stopped at step {step} of 100000" in last and f"--checkpoint {tmp_path}/run/step-{step:06d}" in last
        assert weights(tmp_path / "run", step)


def test_killed_twenty_times(tmp_path, base_directory, text_file):
    """SIGKILL twenty times, between any two of a run's optimiser steps, renames and removals: each restart resumes from
    a whole checkpoint, and the end is bit-identical to an unbroken run, which learns. A user's copy stays."""
    (tmp_path / "broken" / "step-000009-mine").mkdir(parents=True)
    whole, broken = (command(base_directory, text_file, tmp_path / name, "--steps", "80", "--save-every", "2",
                             "--batch", "2") for name in ("whole", "broken"))
    draw = random.Random(0)
    ended = finish(start(whole, tmp_path / "whole.txt"))
    for life in (*(draw.randint(1, 16) for _ in range(20)), 0):
        ended += finish(start(broken + ["--resume"], tmp_path / "broken.txt", life=life))
    printed = (tmp_path / "broken.txt").read_text()
    assert ended == [0] + [-signal.SIGKILL] * 20 + [0] and re.search(r"from step \d*[02468];", printed), printed
    assert_same_weights(tmp_path / "whole", tmp_path / "broken", 80)
    unbroken, resumed = read_log(tmp_path / "whole"), read_log(tmp_path / "broken")
    assert [(r["step"], r["loss"]) for r in unbroken] == [(r["step"], r["loss"]) for r in resumed]
    assert unbroken[-1]["loss"] < unbroken[0]["loss"] - 0.1
    assert {p.name for p in (tmp_path / "broken").glob("step-*")} == {"step-000009-mine", "step-000078", "step-000080"}
    validated = [(tmp_path / name / "validation.jsonl").read_text() for name in ("whole", "broken")]
    assert validated[0] == validated[1] and len(validated[0].splitlines()) == 2


def test_two_machines_without_a_shared_disk(tmp_path, base_directory, text_file):
    """Only the first has the checkpoints: the second resumes from them all the same, and both end where one would."""
    disks = [tmp_path / "machine-0", tmp_path / "machine-1"]
    line = command(base_directory, text_file, "run", "--steps", "6", "--save-every", "3")
    for disk in disks:
        disk.mkdir()
    assert finish(*start_group(line, tmp_path / "printed", disks, machines=True)) == [0, 0]
    (disks[0] / "run" / "step-000006").rename(tmp_path / "step-000006")
    assert finish(*start_group(line + ["--resume"], tmp_path / "printed", disks, machines=True)) == [0, 0]
    assert "from step 3;" in (tmp_path / "printed-0").read_text()
    assert_same_weights(tmp_path, disks[0] / "run", 6)


def test_two_machines_with_different_text(tmp_path, base_directory, text_file):
    disks = [tmp_path / "machine-0", tmp_path / "machine-1"]
    lines = open(text_file).readlines()
    for disk, text in zip(disks, (lines, [lines[1], lines[0], *lines[2:]])):
        disk.mkdir()
        (disk / "text.jsonl").write_text("".join(text))
    line = command(base_directory, "text.jsonl", "run", "--steps", "6")
    assert finish(*start_group(line, tmp_path / "printed", disks, machines=True)) == [2, 2]
    assert "the processes have read different text" in (tmp_path / "printed-0").read_text()
    assert os.listdir(disks[0] / "run") == [".lock"]


@pytest.mark.parametrize("name, size", [("optimizer.safetensors", 500), ("generator.safetensors", 500),
                                        ("trainer.json", 5), ("trainer.json", None)])
def test_a_damaged_checkpoint_is_named(tmp_path, base_directory, text_file, name, size):
    """Deleted, the one before goes on; lines of a log that a machine going down leaves are no hindrance."""
    main(base_directory, text_file, tmp_path / "run", "--steps", "4", "--save-every", "2")
    newest = tmp_path / "run" / "step-000004"
    if size is None:
        (newest / name).unlink()
    else:
        os.truncate(newest / name, size)
    with pytest.raises(InputError, match="step-000004, is damaged: delete it to go on from the one before"):
        main(base_directory, text_file, tmp_path / "run", "--steps", "4", "--save-every", "2", "--resume")
    shutil.rmtree(newest)
    for log in ("log.jsonl", "validation.jsonl"):
        with open(tmp_path / "run" / log, "ab") as file:
            file.write(b"\n[3]\n\0\0\0\n\xff\n{\"step\"")
    main(base_directory, text_file, tmp_path / "run", "--steps", "4", "--save-every", "2", "--resume")
    assert [row["step"] for row in read_log(tmp_path / "run")] == [1, 2, 3, 4] and weights(tmp_path / "run", 4)


def test_a_full_disk(tmp_path, base_directory, text_file, monkeypatch):
    """Seen before a training begins, as another process in --out is; met in the middle, it leaves the checkpoints
    before and nothing half-written."""
    os.makedirs(tmp_path / "run")
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(InputError, match="--out: another process trains in"):
        main(base_directory, text_file, tmp_path / "run", "--steps", "4")
    with monkeypatch.context() as patch:
        patch.setattr(train.shutil, "disk_usage", lambda path: Namespace(free=1e5))
        with pytest.raises(InputError, match="--out: the run needs 0.0 GB for its checkpoints"):
            main(base_directory, text_file, tmp_path / "run", "--steps", "4")
    saves = []

    def full(tensors, path):
        saves.append(path)
        if len(saves) == 2:
            raise InputError(f"{path} cannot be written: No space left on device")
        save_tensors(tensors, path)

    monkeypatch.setattr(train, "save_tensors", full)
    with pytest.raises(InputError, match="checkpoint of step 2 cannot be written, those before it are good.*No space"):
        main(base_directory, text_file, tmp_path / "run", "--steps", "4", "--save-every", "1")
    left = set(os.listdir(tmp_path / "run"))
    assert left == {".lock", "log.jsonl", "step-000001", "validation.jsonl"}
    modes = {path.stat().st_mode for path in (tmp_path / "run" / "step-000001").iterdir()}
    assert modes == {(tmp_path / "run" / "log.jsonl").stat().st_mode}


def test_validation_holds_no_nan(tmp_path, capsys):
    """Of one item there is no standard error, of none with a target no gap."""
    nan = float("nan")
    for rows in ([[1.0, nan, 2.0]], [[nan, nan, nan]]):
        train.report(Namespace(out=str(tmp_path), stage="instruct"), 3, torch.tensor(rows))
    lines = [json.loads(line) for line in open(tmp_path / "validation.jsonl")]
    assert lines == [{"step": 3, "answer": 1.0, "answer_shuffled": 2.0, "gap": 1.0}, {"step": 3}]


def test_help_shows_every_default(monkeypatch, capsys):
    """On two screens, and those of the recipes as fill_recipe has them."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        train.arguments(["--help"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 100
    options = {}
    for part in re.split(r"\n  (?=--)", text)[1:]:
        options[part.split()[0]] = " ".join(part.split())
    assert [name for name, words in options.items() if "default" not in words.lower()] == ["--out"]
    for stage in ("pretrain", "instruct"):
        for kind, width in (("llama", 64), ("llama", 4096), ("mistral", 4096)):
            line = ["--stage", stage, "--data", "x", "--out", "y", *["--checkpoint", "z"] * (stage == "instruct")]
            args = train.arguments(line)
            config = Namespace(model_type=kind, get_text_config=lambda: Namespace(hidden_size=width))
            train.fill_recipe(args, Namespace(config=config, device=torch.device("cpu")))
            for name in ("chunk", "chunks", "batch", "micro_batch", "warmup", "d_r", "rank", "scale", "lr", "steps",
                         "init", "norm", "damping", "objective", "eval_sequences", "seed", "targets"):
                value = getattr(args, name)
                value = value[0] if isinstance(value, list) else value
                assert value is None or str(value) in options[train.flag(name)], (name, value)


def test_processes_and_micro_batches_agree(tmp_path, base_directory, text_file):
    """torchrun with two gloo processes, one, and one without accumulation: the same gradients in the first step and
    losses in 5 steps up to rounding."""
    def line(name, *more):
        return command(base_directory, text_file, tmp_path / name, "--steps", "5", "--save-every", "1", "--init",
                       "random", *more)

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *line("two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GENERATIVE_ADAPTER_CACHE": str(tmp_path / "cache-two")}
    two = subprocess.Popen(torchrun, cwd=ROOT, env=environment)
    ended = finish(start(line("one"), tmp_path / "one.txt", kept=9))
    ended += finish(start(line("whole", "--micro-batch", "4", "--checkpointing"), tmp_path / "whole.txt", kept=9))
    assert [two.wait(), *ended] == [0] * 3, [path.read_text() for path in tmp_path.glob("*.txt*")]
    weight = [tensor.abs().max() for name, tensor in weights(tmp_path / "one", 5).items() if name.endswith("A1")]
    one = read_log(tmp_path / "one")
    assert max(weight) > 1e-2 and len(one) == 5
    assert_same_gradient(tmp_path / "one", tmp_path / "whole")
    for other in ("two", "whole"):
        log = read_log(tmp_path / other)
        assert [row["loss"] for row in log] == pytest.approx([row["loss"] for row in one], rel=1e-3)
        assert log[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-4)


def test_loss_is_eq_5():
    """Two token means over the whole batch, segment 0 left out; the ablations drop one of them."""
    C, L = 3, 8
    tokens = torch.randint(0, 256, (2, C * L), generator=torch.Generator().manual_seed(0))
    segments, mask, visible, labels = doubled(tokens, C)
    mask = mask.masked_fill(torch.arange(L) >= torch.tensor([[8, 3, 5, 8, 1, 6], [2, 8, 7, 4, 8, 8]])[..., None], 0)
    labels = labels.masked_fill(mask == 0, -100)
    nll, count = make_model().segment_losses(segments, mask, visible, labels)
    reconstruction = nll[:, C:].sum() / count[:, C:].sum()
    completion = nll[:, 1:C].sum() / count[:, 1:C].sum()
    for objective, want in (("both", reconstruction + completion), ("reconstruction", reconstruction),
                            ("completion", completion)):
        torch.testing.assert_close((nll * train.loss_weights(labels, C, objective)).sum(), want)


def test_learning_rate():
    args = train.arguments(["--data", "x", "--out", "y", "--steps", "110", "--warmup", "10", "--lr", "2"])
    rates = [train.learning_rate(args, step) for step in range(110)]
    assert rates[0] == pytest.approx(0.2) and rates[60] == pytest.approx(1)
    assert max(rates) == rates[9] == rates[10] == 2 and 0 < rates[-1] <= 0.02


def test_completion_alone_trains_nothing_of_the_second_half(text_file, tokenizer):
    """The second half, which the pass leaves out, is padding."""
    flags = Namespace(data=[text_file], validation=None, chunk=16, chunks=3, batch=4, seed=0, eval_sequences=3,
                      objective="completion")
    batch = next(PretrainingData(flags, tokenizer).batches(0))
    assert not batch.mask[:, 3:].any() and batch.mask[:, :3].all()
    weights = train.loss_weights(batch.labels, 3, "completion")
    assert (weights[:, 1:3] > 0).all() and weights[:, 3:].sum() == 0


def test_a_bad_gradient_is_skipped_and_ten_in_a_row_stop_the_run(tmp_path, base_directory, text_file, monkeypatch):
    """NaN, or what a factorisation raises that meets it."""
    original, calls = train.AdaptedLM.segment_losses, []

    def poisoned(self, *args):
        nll, count = original(self, *args)
        calls.append(torch.is_grad_enabled())
        if sum(calls) in bad and calls[-1] and sum(calls) % 2:
            raise torch.linalg.LinAlgError("NaN")
        return nll * (float("nan") if sum(calls) in bad else 1), count

    monkeypatch.setattr(train.AdaptedLM, "segment_losses", poisoned)
    bad = {2, 3}
    main(base_directory, text_file, tmp_path / "one", "--steps", "4", "--micro-batch", "4")
    assert [row["skipped"] for row in read_log(tmp_path / "one")] == [False, True, True, False]
    assert all(t.isfinite().all() for t in weights(tmp_path / "one", 4).values())
    bad = range(1, 99)
    with pytest.raises(InputError, match="10 steps in a row"):
        main(base_directory, text_file, tmp_path / "all", "--steps", "30", "--micro-batch", "4")


@pytest.mark.filterwarnings("error")
def test_a_run_is_not_overwritten(tmp_path, base_directory, text_file, monkeypatch):
    main(base_directory, text_file, tmp_path / "run", "--steps", "2")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    for flags, words in ((("--steps", "2"), "already holds checkpoints"),
                         (("--steps", "3", "--resume"), "was trained with --steps 2, not 3")):
        with pytest.raises(InputError, match=words):
            main(base_directory, text_file, tmp_path / "run", *flags)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    assert finish(start(command("no-base", "missing.jsonl", tmp_path / "x"), tmp_path / "printed")) == [2]
    assert (tmp_path / "printed").read_text() == "error: missing.jsonl: no such file\n"           # before the base


INSTRUCT = "--stage instruct --chunks 2 --checkpoint GENERATOR --data QA"


@pytest.mark.parametrize("flags, words", [
    ("--out FILE", "cannot be a directory"), ("--chunks 400", "the training text has"),
    ("--validation SHORT", "validation needs at least 2"), ("--targets z_proj", "z_proj"), ("--rank 17", "rank"),
    ("--lr nan", "--lr must be positive"), ("--chunks 1 --objective completion", "--objective completion needs"),
    ("--epochs 3", "--epochs does not belong to --stage pretrain"), (f"{INSTRUCT} --norm svd-exact", "has no gradient"),
    (f"{INSTRUCT} --d-r 17", "--d-r is decided by --checkpoint"), (f"{INSTRUCT} --chunk 4", "of at most 2 x 4 tokens"),
    (f"{INSTRUCT} TASK", "quarel is one of MetaICL's test tasks"), ("--cpt-lr 1", "--cpt-lr does not belong to"),
    ("--stage finetune --data SHORT", "too few contexts with questions")])
def test_refusals(tmp_path, base_directory, text_file, qa_file, monkeypatch, flags, words):
    """One sentence each, and nothing is written."""
    (tmp_path / "file").write_text("")
    (tmp_path / "short.txt").write_text("a line of text")
    make_model(base=load_base(base_directory, torch.float32, "cpu")[0]).save_pretrained(tmp_path / "generator")
    write_rows(tmp_path / "task.jsonl", [{"task": "quarel", "input": "a", "output": "b"}])
    names = {"FILE": "file", "SHORT": "short.txt", "QA": qa_file, "GENERATOR": "generator", "TASK": "task.jsonl"}
    for name, path in names.items():
        flags = re.sub(rf"\b{name}\b", str(tmp_path / path), flags)
    line = command(base_directory, text_file, tmp_path / "x")
    if "--stage" in flags:               # these have a shape and steps of their own
        line = ["train.py", "--base", base_directory, "--out", str(tmp_path / "x"), "--device", "cpu"]
    before = {path for path in tmp_path.rglob("*") if "cache" not in str(path)}
    with pytest.raises(InputError, match=re.escape(words)) as refusal:
        monkeypatch.setattr("sys.argv", line + flags.split())
        train.main()
    assert len(str(refusal.value).splitlines()) == 1
    assert {path for path in tmp_path.rglob("*") if "cache" not in str(path)} == before


@pytest.fixture(scope="module")
def qa_file(tmp_path_factory):
    """Twelve documents with two questions each, and a task."""
    names = "Ana Bo Cy Di Ed Flo Gus Hal Ida Jo Kim Lea".split()
    places = "Rome Oslo Bern Lima Cork Nice Bath Graz Linz Ghent Turin Vaasa".split()
    rows = [{"context": f"{name} lives in {place} and has {n} goats. " + "The hill is green. " * (n % 4),
             "qas": [{"question": f"Where does {name} live?", "answers": [place, f"in {place}"]},
                     {"question": f"How many goats has {name}?", "answers": [str(n)]}]}
            for n, (name, place) in enumerate(zip(names, places))]
    rows += [{"task": "upper", "input": word, "output": word.upper(), "options": []}
             for word in "red green blue black white grey pink".split()]
    return write_rows(tmp_path_factory.mktemp("qa") / "qa.jsonl", rows)


def test_instruction_loss_against_streaming(qa_file, text_file, tokenizer):
    """Of eight rows, contexts of 1 to 6 chunks, two of the last four repeat a text, two continue one. The loss of the
    padded pass is plain cross-entropy after streaming each context by itself; answers and texts have a mean each."""
    tokenizer.chat_template = CHATML
    flags = instruction_flags([qa_file], chunk=24, chunks=6, batch=8, eval_sequences=3, documents=[text_file])
    instructions = InstructionData(flags, tokenizer)
    batches, model = instructions.batches(0), make_model()
    for step in range(3):
        segments, mask, visible, labels = next(batches)
        nll, count = model.segment_losses(segments, mask, visible, labels)
        sums = {True: [], False: []}
        for row in range(8):
            *chunks, ids = [ids[real.bool()].tolist() for ids, real in zip(segments[row], mask[row])]
            context = sum(chunks, [])
            assert (context == ids) == (row in (4, 6))
            assert row < 4 or labels[row, -1, :len(ids)].tolist() == ids
            size = -(-len(context) // -(-len(context) // 24))
            memory = None
            for at in range(0, len(context), size):
                memory = model.contextualize(torch.tensor([context[at:at + size]]), memory=memory)
            targets = labels[row, -1, 1:len(ids)]
            want = F.cross_entropy(model(torch.tensor([ids]), memory=memory)[0, :-1], targets, reduction="sum")
            torch.testing.assert_close(nll[row].sum(), want, rtol=1e-4, atol=1e-4)
            assert count[row, :-1].sum() == 0 and count[row, -1] == (targets != -100).sum()
            sums[row >= 4].append((want, count[row, -1]))
        loss = (nll * train.loss_weights(labels, len(visible) - 1, "reconstruction")).sum()
        want = sum(sum(loss for loss, _ in part) / sum(n for _, n in part) for part in sums.values())
        torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(next(instructions.batches(2)).segments, segments)        # the step alone decides


def test_passes_by_tokens(qa_file, text_file, tokenizer, monkeypatch):
    """Rows of like length in passes of at most PASS_TOKENS padded tokens, each row in one; losses and gradients are
    those of a row a pass."""
    tokenizer.chat_template = CHATML
    monkeypatch.setattr(train, "PASS_TOKENS", 300)
    flags = instruction_flags([qa_file], chunk=24, chunks=6, batch=16, documents=[text_file])
    segments, mask, visible, labels = next(InstructionData(flags, tokenizer).batches(0))
    weights = train.loss_weights(labels, len(visible) - 1, "reconstruction")
    rows = torch.arange(16)
    results = []
    for size in (1, None):
        model, loss = make_model(), 0
        passes = train.micro_batches(mask, size, 0, 1)
        for part in passes:
            nll, _ = model.segment_losses(segments[part], mask[part], visible, labels[part])
            (nll * weights[part]).sum().backward()
            loss += (nll * weights[part]).sum().item()
        results.append((loss, [p.grad for p in model.generator.parameters()]))
    assert torch.equal(torch.cat(passes).sort().values, rows) and 3 < len(passes) < 12
    for part in passes:
        lengths = mask[part].sum(-1)
        assert len(part) == 1 or len(part) * (lengths.amax(0) > 0).sum() * lengths.amax() <= 1.5 * 300
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    for one, other in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4 * one.abs().max().item())
    assert [len(part) for part in train.micro_batches(mask, 6, 0, 1)] == [6, 6, 4]


def test_instruct_stage(tmp_path, base_directory, qa_file, text_file):
    """From a pretrained generator; it learns, with texts beside the questions two processes agree with one, and a
    resumed run with an unbroken one."""
    base, _ = load_base(base_directory, torch.float32, "cpu")
    make_model(base=base, d_r=16).save_pretrained(tmp_path / "pretrained")

    def go(name, *more, processes=1):
        line = ["train.py", "--stage", "instruct", "--checkpoint", str(tmp_path / "pretrained"), "--base",
                base_directory, "--data", qa_file, "--out", str(tmp_path / name), "--device", "cpu", "--dtype",
                "float32", "--chunk", "64", "--chunks", "3", "--batch", "4", "--lr", "1e-2", "--warmup", "2",
                "--eval-sequences", "4", "--steps", "8", "--save-every", "1", *more]
        started = start_group(line, tmp_path / "printed", [ROOT] * processes, kept=9)
        assert finish(*started) == [0] * processes, [path.read_text() for path in tmp_path.glob("printed*")]
        return read_log(tmp_path / name)

    log = go("one")
    assert log[-1]["loss"] < log[0]["loss"] - 0.1 and log[0]["completion"] == 0
    shutil.copytree(tmp_path / "one" / "step-000004", tmp_path / "resumed" / "step-000004")
    go("resumed", "--resume")
    assert_same_weights(tmp_path / "one", tmp_path / "resumed", 8)
    texts = ("--documents", text_file, "--damping", "0.02", "--micro-batch", "2")
    log, two = go("texts", *texts), go("texts-two", *texts, processes=2)
    assert [row["tokens"] for row in two] == [row["tokens"] for row in log]
    assert_same_gradient(tmp_path / "texts", tmp_path / "texts-two")


def test_fit_base_is_adamw_on_the_token_mean(monkeypatch):
    """One step in several passes equals one plain AdamW step on the whole batch; early stopping leaves the best
    weights."""
    random = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 256, (n,), generator=random).tolist() for n in (5, 9, 14, 7)]
    examples = [(row, [-100] * (len(row) // 2) + row[len(row) // 2:]) for row in rows]
    base, plain = make_base(), make_base()

    def fit(validation, lr, batch_size, epochs, patience=3):
        return finetune.fit_base(base, examples, validation, lr, batch_size, epochs, patience, seed=0)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "PASS_TOKENS", 16)
        assert fit([], 1e-3, batch_size=4, epochs=1) == []
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.01)
    logits = [plain(torch.tensor([ids])).logits[0, :-1] for ids, _ in examples]
    F.cross_entropy(torch.cat(logits), torch.cat([torch.tensor(labels[1:]) for _, labels in examples])).backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    optimizer.step()
    for (name, p), q in zip(base.named_parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, atol=2e-5, rtol=1e-4, msg=name)
        assert not p.requires_grad
    other = [(ids[::-1], labels) for ids, labels in examples]
    history = fit(other, 1e-2, batch_size=2, epochs=30)
    assert len(history) == history.index(min(history)) + 1 + 3
    again = fit(other, 1e-9, batch_size=4, epochs=1)
    assert again[0] == pytest.approx(min(history), rel=1e-4)


@pytest.mark.parametrize("kind, cpt, metaicl", [("llama", 3e-5, 1e-5), ("mistral", 1e-5, 5e-6)])
def test_learning_rates_and_patience_are_the_papers(tmp_path, base_directory, qa_file, tokenizer, monkeypatch, kind,
                                                    cpt, metaicl):
    """Appendix C: continual pretraining, supervised fine-tuning, MetaICL."""
    fits = []

    def fit(base, train, validation, lr, batch_size, epochs, patience, *_, **__):
        fits.append((lr, batch_size, epochs) + (patience,) * bool(validation))
        return []

    monkeypatch.setattr(finetune, "fit_base", fit)
    monkeypatch.setattr(finetune, "load_base", lambda *_: (make_base(kind), tokenizer))
    finetune.finetune(train.arguments(["--stage", "finetune", "--base", base_directory, "--data", qa_file,
                                       "--documents", qa_file, "--out", str(tmp_path / "sft")]))
    rows = [{"question": "q", "golds": ["a"]}]
    finetune.fit_task(make_base(kind), tokenizer, rows, rows, 0)
    assert fits == [(cpt, 16, 8), (1e-5, 64, 10, 1), (metaicl, 16, 40, 3)]


def test_finetune_stage(tmp_path, base_directory, qa_file):
    """CPT and SFT write a transformers directory that loads as a base and has learnt the documents and the answers."""
    rows = [json.loads(line) for line in open(qa_file)]
    documents = write_rows(tmp_path / "docs.jsonl", [{"text": row["context"]} for row in rows[:12]])
    flags = ["--stage", "finetune", "--base", base_directory, "--data", qa_file, "--documents", documents,
             "--validation", qa_file, "--device", "cpu", "--lr", "3e-3", "--cpt-lr", "3e-3", "--batch", "8", "--epochs",
             "4"]
    finetune.finetune(train.arguments([*flags, "--out", str(tmp_path / "sft"), "--checkpointing"]))
    before, tokenizer = load_base(base_directory, torch.float32, "cpu")
    after, _ = load_base(str(tmp_path / "sft"), torch.float32, "cpu")
    ids = torch.tensor([tokenizer(rows[3]["context"])["input_ids"]])
    with torch.no_grad():
        old, new = (F.cross_entropy(base(ids).logits[0, :-1], ids[0, 1:]) for base in (before, after))
    history = json.load(open(tmp_path / "sft" / "finetune.json"))["validation_nats"]
    assert new < old - 0.5 and min(history) < history[0] - 0.5
