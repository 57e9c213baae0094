"""The plan: what it knows of the drivers' tables, of memory and of cards, and that it times real steps."""
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from conftest import ROOT, run_script
from plumbing.budget import CARD_GB, PEAK_FLOPS, card_bytes, model_shape, peak_bytes, rows_per_step
from test_budget import CONFIGURATIONS


@pytest.fixture(scope="module")
def plan():
    """What plan.py has defined after planning d12 for a card that is not here."""
    return run_script("plan.py", "--gpu=A100", "--measure=0")


def test_the_drivers_are_asked_for_their_tables(plan):
    found = plan["configurations"]()
    assert set(found) == set(CONFIGURATIONS) - {"d20"} | {"tiny"}
    for name, (depth, T, rows) in CONFIGURATIONS.items():
        if name in found:
            flags = dict(flag[2:].split("=") for flag in found[name])
            batch = rows_per_step(int(flags["total_batch_size"]), T)
            assert (int(flags["depth"]), int(flags["max_seq_len"]), batch) == (depth, T, rows)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_configuration_is_planned_for_the_card_it_is_meant_for(plan, name):
    depth, T, rows = CONFIGURATIONS[name]
    k = SimpleNamespace(**plan["config"] | dict(depth=depth, max_seq_len=T, total_batch_size=rows * T))
    B, need = plan["memory_of"](k, 40e9)
    assert B * T >= 16384 and need < 38e9
    times = plan["seconds"](k, plan["predicted"]("A100")[0])
    assert list(times) == ["base", "mid", "sft", "report"] and all(rest > 0 for _, rest in times.values())
    times = plan["seconds"](SimpleNamespace(**vars(k) | dict(rl=True)), plan["predicted"]("A100")[0])
    assert list(times) == ["base", "mid", "sft", "rl", "report"] and 0 < times["rl"][0] < times["rl"][1] < 2 * 3600


@pytest.mark.parametrize("depth, T, B, predicted", [(12, 1024, 64, 16.62e9), (18, 2048, 16, 21.84e9)])
def test_the_memory_is_what_is_predicted_from_generated_code(depth, T, B, predicted):
    config = SimpleNamespace(sequence_len=T, vocab_size=65536, **model_shape(depth))
    assert peak_bytes(config, B, 2) == pytest.approx(predicted, rel=0.05)


def test_every_card_has_its_memory():
    assert list(CARD_GB) == list(PEAK_FLOPS)
    assert card_bytes("NVIDIA A100-SXM4-80GB") == 80e9 and card_bytes("A100") == 40e9
    assert card_bytes("Some New Card") == 0


def test_a_card_that_nobody_knows_is_one_line():
    done = subprocess.run([sys.executable, "plan.py", "--gpu=V99"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "A100, " in done.stderr


def test_without_torch_it_says_what_it_does_not_know():
    done = subprocess.run([sys.executable, "-S", "plan.py", "--tiny=1", "--depth=2"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0 and "plan: d2" in done.stdout and "not measured: " in done.stdout, done.stderr


def test_what_a_newcomer_sees_first_has_no_holes(monkeypatch, capsys):
    """Before set-up the driver plans without timing: there are no columns of times, and nothing is a question mark."""
    monkeypatch.setenv("PATH", "")                   # no GPU is found
    run_script("plan.py", "--tiny=1", "--depth=2", "--measure=0")
    said = capsys.readouterr().out
    assert "?" not in said and "training" not in said.replace("pretraining", "").replace("mid-training", "")
    assert [line.split()[0] for line in said.splitlines()[-3:]] == ["pretraining", "mid-training", "fine-tuning"]
    assert all(line == line.rstrip() for line in said.splitlines())


def test_real_steps_are_timed_and_nothing_is_written(plan, monkeypatch):
    from bench import steps
    from plumbing.common import base_path
    monkeypatch.setattr(steps, "SECONDS", 0)
    monkeypatch.setattr(steps, "time_numerics", lambda *_: dict(device="cpu", dtype="float32", threads=1))
    monkeypatch.setattr(steps.subprocess, "run", lambda *_, **__: None)      # the start of a program takes seconds
    before = os.listdir(base_path()) if os.path.isdir(base_path()) else []
    shape = dict(sequence_len=64, vocab_size=300, **model_shape(1))
    speed, B, memory = steps.measure(shape, (8, 0), (4, 0), plan["DATA"]["tiny"], False)
    assert B == 8 and memory > 1e7
    assert all(speed[name] > 0 for name in ("base", "mid", "sft", "score", "answer", "start"))
    assert before == (os.listdir(base_path()) if os.path.isdir(base_path()) else [])


def test_what_fits_into_a_night_is_said(capsys):
    run_script("plan.py", "--gpu=H100", "--num_processes=16")
    said = capsys.readouterr().out
    assert "PREDICTED for 16 x H100" in said and "CONFIG=maximum" in said and "CONFIG=tiny" not in said   # 8 rows a step
    assert said.splitlines()[-1].startswith("  in 24 h: ")
