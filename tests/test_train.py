"""The training loop as a command: resuming after a kill, several processes, accumulation, refusals."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import ROOT, make_model
from data import doubled
from generator import InputError


def command(base, text, out, *flags, processes=1):
    launcher = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return launcher + ["train.py", "--base", base, "--data", text, "--out", str(out), "--device", "cpu", "--dtype", "float32", "--chunk", "16", "--chunks", "2", "--batch", "4",
                       "--d-r", "16", "--rank", "8", "--lr", "1e-2", "--warmup", "2", "--eval-sequences", "3", "--eval-every", "1000", *flags]


def run(*args, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GENERATIVE_ADAPTER_CACHE": options.pop("cache")}
    return subprocess.run(command(*args, **options), cwd=ROOT, env=environment, capture_output=True, text=True)


def weights(out, step):
    return load_file(out / f"step-{step:06d}" / "generator.safetensors")


def test_killed_and_resumed_is_bit_identical(tmp_path, base_directory, text_file):
    """SIGKILL in the middle of a run; random windows, so that the draw of the data is resumed too."""
    cache, flags = str(tmp_path / "cache"), ("--steps", "30", "--save-every", "4", "--windows")
    whole = run(base_directory, text_file, tmp_path / "whole", *flags, cache=cache)
    assert whole.returncode == 0, whole.stderr
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GENERATIVE_ADAPTER_CACHE": cache}
    killed = subprocess.Popen(command(base_directory, text_file, tmp_path / "killed", *flags), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "killed" / "log.jsonl"
    while killed.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 10):
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "step-000030").exists(), "the run ended before it could be killed"
    resumed = run(base_directory, text_file, tmp_path / "killed", *flags, "--resume", cache=cache)
    assert resumed.returncode == 0 and "from step 0;" not in resumed.stdout, resumed.stdout + resumed.stderr
    for name, tensor in weights(tmp_path / "whole", 30).items():
        assert torch.equal(tensor, weights(tmp_path / "killed", 30)[name]), name
    lines = [[json.loads(line) for line in open(tmp_path / run_ / "log.jsonl")] for run_ in ("whole", "killed")]
    assert [(r["step"], r["loss"]) for r in lines[0]] == [(r["step"], r["loss"]) for r in lines[1]]
    assert lines[0][-1]["reconstruction"] < lines[0][0]["reconstruction"] - 0.1               # and it learns


def test_processes_and_micro_batches_agree(tmp_path, base_directory, text_file):
    """torchrun with two gloo processes, one process, and one process without accumulation: the same weights after 5 steps up to rounding."""
    cache, flags = str(tmp_path / "cache"), ("--steps", "5", "--windows")
    for name, more, processes in (("one", (), 1), ("two", (), 2), ("whole", ("--micro-batch", "4", "--checkpointing"), 1)):
        done = run(base_directory, text_file, tmp_path / name, *flags, *more, processes=processes, cache=cache)
        assert done.returncode == 0, done.stderr
    one = weights(tmp_path / "one", 5)
    assert max(tensor.abs().max() for name, tensor in one.items() if name.endswith("A1")) > 1e-2
    for other in ("two", "whole"):
        for name, tensor in weights(tmp_path / other, 5).items():
            torch.testing.assert_close(tensor, one[name], atol=2e-4, rtol=1e-3)


def test_loss_is_eq_5():
    """Two token means over the whole batch, segment 0 left out; the ablations drop one of them."""
    C, L = 3, 8
    tokens = torch.randint(0, 256, (2, C * L), generator=torch.Generator().manual_seed(0))
    segments, mask, visible = doubled(tokens, C, pad=259, windows_seed=1)
    labels = segments.masked_fill(mask == 0, -100)
    nats, count = make_model().segment_losses(segments, mask, visible, labels)
    reconstruction = nats[:, C:].sum() / count[:, C:].sum()
    completion = nats[:, 1:C].sum() / count[:, 1:C].sum()
    for objective, want in (("both", reconstruction + completion), ("reconstruction", reconstruction), ("completion", completion)):
        torch.testing.assert_close((nats * train.loss_weights(labels, C, objective)).sum(), want)


def test_learning_rate():
    args = train.arguments(["--data", "x", "--out", "y", "--steps", "110", "--warmup", "10", "--lr", "2"])
    rates = [train.learning_rate(args, step) for step in range(110)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[9] == rates[10] == 2 and rates[60] == pytest.approx(1) and 0 < rates[-1] <= 0.02


def main(base, text, out, *flags):
    train.train(train.arguments(command(base, text, out, *flags)[2:]))


def test_a_bad_gradient_is_skipped_and_ten_in_a_row_stop_the_run(tmp_path, base_directory, text_file, monkeypatch):
    monkeypatch.setattr("data.CACHE", str(tmp_path / "cache"))
    original, calls = train.AdaptedLM.segment_losses, []

    def poisoned(self, *args):
        nats, count = original(self, *args)
        calls.append(torch.is_grad_enabled())
        return nats * (float("nan") if sum(calls) in bad else 1), count

    monkeypatch.setattr(train.AdaptedLM, "segment_losses", poisoned)
    bad = {2}
    main(base_directory, text_file, tmp_path / "one", "--steps", "3", "--micro-batch", "4")
    assert [json.loads(line)["skipped"] for line in open(tmp_path / "one" / "log.jsonl")] == [False, True, False]
    assert all(t.isfinite().all() for t in weights(tmp_path / "one", 3).values())
    calls.clear()
    bad = set(range(1, 99))
    with pytest.raises(InputError, match="10 steps in a row"):
        main(base_directory, text_file, tmp_path / "all", "--steps", "30", "--micro-batch", "4")


def test_refusals(tmp_path, base_directory, text_file, monkeypatch):
    """One sentence each, and nothing overwritten."""
    monkeypatch.setattr("data.CACHE", str(tmp_path / "cache"))
    main(base_directory, text_file, tmp_path / "run", "--steps", "2")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    for flags, words in ((("--steps", "2"), "already holds checkpoints"), (("--steps", "3", "--resume"), "was trained with --steps 2, not 3"),
                         (("--steps", "2", "--resume", "--lr", "1"), "--lr")):
        with pytest.raises(InputError, match=words):
            main(base_directory, text_file, tmp_path / "run", *flags)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    (tmp_path / "file").write_text("")
    short = str(tmp_path / "short.txt")
    (tmp_path / "short.txt").write_text("a line of text")
    for args, words in (((base_directory, text_file, tmp_path / "file"), "cannot be a directory"), ((base_directory, str(tmp_path / "no.jsonl"), tmp_path / "x"), "no such file"),
                        ((base_directory, text_file, tmp_path / "x", "--chunks", "200"), "the training text has"),
                        ((base_directory, text_file, tmp_path / "x", "--validation", short), "validation needs at least 2"),
                        ((base_directory, text_file, tmp_path / "x", "--targets", "z_proj"), "z_proj"), ((base_directory, text_file, tmp_path / "x", "--rank", "17"), "rank"),
                        ((base_directory, text_file, tmp_path / "x", "--chunk", "1"), "--chunk"), ((str(tmp_path), text_file, tmp_path / "x"), "config.json")):
        with pytest.raises(InputError, match=words):
            main(*args)
        assert not (tmp_path / "x").exists()


def test_exit_code(tmp_path, base_directory):
    done = run(base_directory, "missing.jsonl", tmp_path / "x", cache=str(tmp_path))
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1] == "error: missing.jsonl: no such file"
