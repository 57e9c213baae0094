"""Fitting the micro-batch: what a try leaves behind, and what is made of its outcome on a GPU that is only played."""
from types import SimpleNamespace

import pytest
import torch

from model import GPT, GPTConfig
from muon import build_optimizers
from plumbing import fit, machine
from plumbing.budget import row_bytes, state_bytes

REAL_ATTEMPT = fit.attempt
CONFIG = GPTConfig(sequence_len=64, vocab_size=270, n_layer=1, n_head=2, n_kv_head=2, n_embd=64)


def test_a_try_leaves_everything_as_it_was():
    cpu, model = machine.start("cpu"), GPT(CONFIG)
    torch.nn.init.normal_(model.lm_head.weight)                  # so that gradients reach everything
    optimizers = build_optimizers(model, 0.02, 0.2, 0.004)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    rates, random = [g["lr"] for o in optimizers for g in o.param_groups], torch.get_rng_state()
    assert fit.attempt(cpu, model, optimizers, 2, 1) > 0
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in model.named_parameters())
    assert rates == [g["lr"] for o in optimizers for g in o.param_groups]
    assert not any(o.state for o in optimizers) and torch.equal(random, torch.get_rng_state())


def full(*_):
    raise torch.OutOfMemoryError("full")


@pytest.mark.parametrize("where", ["forward", "evaluation", "optimizer"])
def test_memory_that_runs_out_anywhere_is_a_try_that_failed(where, monkeypatch):
    cpu, model = machine.start("cpu"), GPT(CONFIG)
    optimizers = build_optimizers(model, 0.02, 0.2, 0.004)
    if where == "evaluation":
        once = iter([None])                                      # the first time it only compiles
        monkeypatch.setattr(model, "score", lambda *_: next(once, full) and full())
    if where == "optimizer":
        monkeypatch.setattr(optimizers[1], "step", full)
    if where == "forward":
        monkeypatch.setattr(model, "forward", full)
    assert fit.attempt(cpu, model, optimizers, 2, 1) == 0.0
    assert all(p.grad is None for p in model.parameters()) and not any(o.state for o in optimizers)


def test_a_rank_without_memory_for_the_exchange_ends(monkeypatch):
    cpu, model = machine.start("cpu"), GPT(CONFIG)
    optimizers = build_optimizers(model, 0.02, 0.2, 0.004)
    monkeypatch.setattr(optimizers[1], "step", full)
    monkeypatch.setattr(fit, "WORLD_SIZE", 2)                    # the other one would wait for it, in another exchange
    with pytest.raises(SystemExit, match="rank 0: no memory for the optimizers' step, at 2 rows"):
        fit.attempt(cpu, model, optimizers, 2, 1)
    assert all(p.grad is None for p in model.parameters()) and not any(o.state for o in optimizers)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine that says it is a GPU; `limit` is its memory, and a try fails beyond it."""
    monkeypatch.setattr(fit, "base_path", lambda name: str(tmp_path / name))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(fit, "over_ranks", lambda model: model)
    played = SimpleNamespace(threads=2, device=torch.device("cuda"), name="NVIDIA Toy", dtype=torch.bfloat16, dtype_name="bfloat16",
                             free_bytes=1e9, peak_memory=lambda: 5e8, limit=1e9, tries=[])

    def attempt(machine, model, optimizers, B, rest):
        played.tries.append(B)
        need = state_bytes(model.config) + B * row_bytes(model.config, 2, model.gradient_checkpointing)
        if model.compiled_parts:
            raise RuntimeError("Python.h: no such file\nand a page of it")
        return 1000 * B / (B + 1) if need <= played.limit else 0.0

    monkeypatch.setattr(fit, "attempt", attempt)
    return played


def fitted(gpu, rows=48, asked=0, meta=None, compiled_parts=None):
    model = GPT(CONFIG)
    model.compiled_parts = compiled_parts
    return *fit.fit_micro_batch(gpu, model, [], rows, asked, meta), model


def test_a_size_is_found_once_and_tried_again_at_the_next_start(gpu, capsys):
    assert fitted(gpu)[0] == 48 and gpu.tries == [48]
    gpu.limit = state_bytes(CONFIG) + 20 * row_bytes(CONFIG, 2, False)
    gpu.tries.clear()
    assert fitted(gpu)[0] == 16 and gpu.tries[0] == 48           # known, but another program has the memory now
    assert "48 rows at a time do not fit here, 16 do" in capsys.readouterr().out
    gpu.tries.clear()
    assert fitted(gpu)[0] == 16 and gpu.tries == [16]
    with open(fit.base_path("fit.json"), "w") as f:
        f.write("{torn")
    assert fitted(gpu)[0] == 16 and "micro-batch: 16 rows" in capsys.readouterr().out


def test_what_is_asked_for_or_was_used_before_is_taken_where_it_fits(gpu):
    assert fitted(gpu, asked=5)[0] == 4                          # 12 equal ones instead of ten, the last of three
    assert fitted(gpu, meta=dict(device_batch_size=12, world_size=1))[0] == 12
    assert fitted(gpu, meta=dict(device_batch_size=12, world_size=4))[0] == 48
    gpu.limit = state_bytes(CONFIG) + 3 * row_bytes(CONFIG, 2, False)
    assert fitted(gpu, meta=dict(device_batch_size=12, world_size=1))[0] == 3


def test_checkpointing_comes_last_and_then_one_line(gpu, capsys):
    gpu.limit = state_bytes(CONFIG) + 2 * row_bytes(CONFIG, 2, False)
    assert not fitted(gpu)[2].gradient_checkpointing
    gpu.limit = state_bytes(CONFIG)
    with pytest.raises(SystemExit, match="not even one row of 64 tokens fits .*DEPTH=1 or less"):
        fitted(gpu)
    assert "gradient checkpointing goes on" in capsys.readouterr().out


def test_checkpointing_that_one_rank_knows_of_goes_on_for_all(gpu, monkeypatch):
    assert not fitted(gpu)[2].gradient_checkpointing
    monkeypatch.setattr(fit, "smallest_over_ranks", lambda numbers, device: [0] if numbers == [1] else numbers)
    assert fitted(gpu)[2].gradient_checkpointing


def test_what_is_known_of_an_eager_model_says_nothing_of_a_compiled_one(gpu):
    gpu.limit = state_bytes(CONFIG) + 20 * row_bytes(CONFIG, 2, False)
    assert fitted(gpu)[0] == 16
    gpu.limit = 1e9
    assert fitted(gpu)[0] == 16 and fitted(gpu, compiled_parts=SimpleNamespace())[0] == 48


def test_what_does_not_compile_is_one_line_and_goes_on(gpu, capsys):
    B, forward, model = fitted(gpu, compiled_parts=SimpleNamespace())
    assert B == 48 and forward is model and model.compiled_parts is None
    assert "torch.compile fails here" in (out := capsys.readouterr().out) and out.count("\n") == 3


def test_a_model_that_does_not_compile_is_tried_and_trained_without(gpu, monkeypatch):
    def broken(*args):
        raise RuntimeError("no compiler here")

    cpu, model = machine.start("cpu"), GPT(CONFIG)
    model.compiled_parts = SimpleNamespace(embed=broken)
    with pytest.raises(RuntimeError, match="no compiler"):
        REAL_ATTEMPT(cpu, model, [], 2, 0)
    model.compiled_parts = None
    assert REAL_ATTEMPT(cpu, model, [], 2, 0) > 0
