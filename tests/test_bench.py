"""Tests of tools/bench.py: what it compares must be equal but for speed, memory and bits."""

import math
from dataclasses import replace

import pytest
import torch

import data
from test_convert import MICRO
from tools import bench, checkpoint, convert


def test_every_row_computes_the_same_loss():
    """A faster row that trains on something else would be no comparison."""
    cfg = bench.BenchConfig(dim=64, n_layers=2, rows=2, seq_len=128, steps=1, device="cpu")
    examples = bench.load_examples(cfg)[:64]
    losses, filled = [], []
    for row in bench.LADDER[:2] + bench.LADDER[3:6]:
        figures = bench.measure(replace(row, dtype="float32"), cfg, examples)
        losses.append(figures["loss"])
        filled.append(figures["filled"])
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-5)
    assert max(filled) < 1, "padding is not trained on, and not counted"


def test_a_row_in_its_own_process():
    cfg = bench.BenchConfig(dim=64, n_layers=1, rows=1, seq_len=64, steps=1, device="cpu")
    figures = bench.step(cfg)
    assert figures["memory"] > 0 and figures["estimated"] > 0 and figures["tokens"] > 0


def test_the_peer_ignores_padding():
    """A batch of padded conversations costs transformers time, but has the loss of each alone."""
    cfg = bench.BenchConfig(dim=64, n_layers=1, device="cpu")
    torch.manual_seed(0)
    peer, examples = bench.Peer(cfg.shape), bench.load_examples(cfg)[:3]
    with torch.no_grad():
        together = peer.nll(*bench.padded_batch(examples))
        alone = [peer.nll(*bench.padded_batch([example])) for example in examples]
    assert len({len(example.tokens) for example in examples}) > 1
    assert float(together[0]) == pytest.approx(float(sum(nll for nll, _ in alone)), rel=1e-5)
    assert together[1] == sum(n for _, n in alone)


def test_quality_and_speed_of_fewer_bits(tmp_path):
    """fp32 is compared with itself, and its perplexity is the loss of model.py."""
    held = tmp_path / "held.txt"
    held.write_text("I am a small language model. There is a red square on the left.\n" * 9)
    figures = bench.quality(bench.QualityConfig(str(MICRO), str(held)))
    net, path, _ = checkpoint.load(MICRO)
    rows = convert.rows_of(held, "plain", data.Tokenizer(path), 512)
    with torch.no_grad():
        tokens, labels, _ = rows.batch(0, len(rows))
        total, count = net.nll(tokens, labels)
    perplexity = math.exp(total / count)
    assert math.isclose(figures["fp32"]["perplexity"], perplexity, rel_tol=1e-4)
    assert figures["fp32"]["kl"] == 0 and figures["fp32"]["same_top"] == 1
    assert 0 < figures["q8"]["kl"] < figures["q4"]["kl"]
    assert figures["q8"]["bytes"] > figures["q4"]["bytes"]
    speeds = bench.speed(bench.SpeedConfig(str(MICRO)))
    assert {"ours, fp32", "ours, bf16", "ours, q8", "ours, q4"} <= set(speeds)
