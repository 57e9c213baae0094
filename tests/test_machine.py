"""
Laws of the machine's choices: what is timed on a CPU, and how large it may be.
"""
import sys

import pytest
import torch

from model import GPT, GPTConfig
from plumbing import machine

CONFIG = GPTConfig(sequence_len=64, vocab_size=270, n_layer=1, n_head=2, n_kv_head=2, n_embd=64)


@pytest.fixture(autouse=True)
def same_threads_after():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("flops, tokens", [(1e11, 8 * 64), (2.5e7, 64)])
def test_a_step_is_timed_in_every_way_and_a_large_model_on_few_tokens(monkeypatch, flops, tokens):
    monkeypatch.setattr(machine, "TIMED_FLOPS", flops)
    timed = machine.time_numerics(GPT(CONFIG), 16)
    assert timed["tokens"] == tokens
    assert {key.split()[0] for key in timed["milliseconds"]} == {"float32", "bfloat16"}
    assert timed["dtype"] in machine.DTYPES and timed["threads"] >= 1 and timed["seconds_per_token"] > 0


def test_the_timing_is_announced_and_kept(tmp_path, capsys):
    cpu = machine.start("cpu")
    first = machine.choose_numerics(cpu, "", None, tmp_path, lambda: GPT(CONFIG), 8)
    assert "timing" in capsys.readouterr().out and first > 0
    assert machine.choose_numerics(cpu, "", None, tmp_path, lambda: GPT(CONFIG), 8) == first
    assert "timing" not in capsys.readouterr().out
    assert machine.choose_numerics(cpu, "float32", None, tmp_path / "other", lambda: GPT(CONFIG), 8) == 0.0


def test_a_model_is_used_in_the_number_format_it_was_trained_in():
    trained = dict(machine=dict(device="cpu", dtype="bfloat16", threads=1, cores=machine.cores()))
    assert machine.start("cpu", meta=trained).dtype is torch.bfloat16 and torch.get_num_threads() == 1
    assert machine.start("cpu", "float32", trained).dtype is torch.float32, "what is asked for counts"
    trained["machine"]["device"] = "cuda"
    assert machine.start("cpu", meta=trained).dtype is torch.float32, "another device, another format"


def test_what_does_not_fit_is_done_in_halves():
    sizes = []

    def doubled(items):
        sizes.append(len(items))
        if len(items) > 3:
            raise torch.OutOfMemoryError("full")
        return [2 * i for i in items]

    assert machine.in_halves(doubled, list(range(10))) == [2 * i for i in range(10)] and max(sizes[-2:]) <= 3
    with pytest.raises(torch.OutOfMemoryError):
        machine.in_halves(lambda items: doubled([0] * 4), [1])


def test_running_out_of_gpu_memory_is_one_line_and_anything_else_is_shown(capsys):
    machine.start("cpu")
    sys.excepthook(torch.OutOfMemoryError, torch.OutOfMemoryError("CUDA"), None)
    assert "half of DEVICE_BATCH_SIZE" in (said := capsys.readouterr().err) and said.count("\n") == 1
    sys.excepthook(KeyError, KeyError("x"), None)
    assert "KeyError" in capsys.readouterr().err
