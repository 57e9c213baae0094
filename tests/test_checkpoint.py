"""
Checkpoints under injected faults: killed at any moment of a save, damaged in any file, not finite.

A model of a few thousand numbers is saved in this process, or in a copy of it (fork) that is killed.
"""
import builtins
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch

import checkpoint
from checkpoint import find_checkpoint, path_of, read_meta, save_checkpoint, steps_in, whole_checkpoint
from conftest import DAMAGES, ROOT, damage
from model import GPT, GPTConfig
from muon import build_optimizers
from plumbing import common

CONFIG = GPTConfig(sequence_len=8, vocab_size=32, n_layer=1, n_head=1, n_kv_head=1, n_embd=8)
CALLS = ("replace", "fsync", "remove")                       # of os, in a save


def state(step):
    """The (model, optimizers) of a step: the same each time."""
    torch.manual_seed(step)
    model = GPT(CONFIG, torch.float32)
    optimizers = build_optimizers(model, 0.02, 0.2, 0.004)
    model(torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long)).backward()
    for optimizer in optimizers:
        optimizer.step()
    return model, optimizers


def save(folder, step, wait=True):
    meta = dict(stage="base", num_iterations=40, config={}, tokenizer="", val_bpb=1.5)
    model, optimizers = state(step)
    save_checkpoint(str(folder), step, model, optimizers, meta, wait)
    with torch.no_grad():                                    # the training goes on
        for value in (*model.parameters(), *optimizers[0].state_dict()["state"][0].values()):
            value.zero_()
    if not wait:
        checkpoint.writing.join()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A stage's folder with the checkpoints of steps 10 and 20."""
    monkeypatch.setattr(common, "BASE_DIR", str(tmp_path))
    folder = tmp_path / "base_checkpoints/d1"
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text('{"step": 0}\n')
    save(folder, 10)
    save(folder, 20)
    return folder


def require_saved(folder, meta):
    """The weights and the optimizer's state are those of the meta's step, bit for bit."""
    model, optimizers = state(meta["step"])
    for name, value in checkpoint.read_tensors(str(folder), meta, "model").items():
        assert torch.equal(value, model.state_dict()[name])
    saved = checkpoint.read_tensors(str(folder), meta, "optim")
    for old, new in zip(saved, optimizers):
        assert str(old) == str(new.state_dict())


def killed_at(folder, number, after, wait):
    """Save step 30 in a copy of this process that is killed at call `number` of CALLS -> whether there were so many."""
    child = os.fork()
    if not child:
        torch.set_num_threads(1)                             # the others were not copied
        count, real = 0, {name: getattr(os, name) for name in CALLS}

        def call(name, *args):
            nonlocal count
            count += 1
            if count == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                real[name](*args)
            finally:
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        for name in CALLS:
            setattr(os, name, lambda *args, name=name: call(name, *args))
        builtins.print = lambda *args, **more: None
        save(folder, 30, wait)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("after, wait", [(False, True), (True, True), (False, False)])
def test_killed_at_every_rename_flush_and_removal_of_a_save(folder, tmp_path, after, wait):
    number, found = 1, []
    while True:
        place = tmp_path / f"{number}/d1"
        shutil.copytree(folder, place)
        if not killed_at(place, number, after, wait):
            break
        meta = whole_checkpoint(str(place), to_train=True)
        require_saved(place, meta)
        found.append(meta["step"])
        save(place, 40)
        assert len(steps_in(str(place))) == 2
        wanted = ["log.jsonl", *(os.path.basename(path_of("", kind, step)) for kind in ("meta", "model", "optim")
                                 for step in steps_in(str(place)))]
        assert sorted(os.listdir(place)) == sorted(wanted), "nothing is left over, no damage was seen"
        number += 1
    assert found == sorted(found) and set(found) == {20, 30} and number > 15, "until the meta is there the old one counts"


def test_a_save_beside_the_training_writes_the_same_bytes(folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(folder, tmp_path / "beside/d1")
    shutil.copytree(folder, tmp_path / "short/d1")
    save(folder, 30)
    save(tmp_path / "beside/d1", 30, wait=False)
    monkeypatch.setattr(checkpoint, "free_memory", lambda: 0)                # then it waits as well
    monkeypatch.setattr(checkpoint, "writing", None)
    model, optimizers = state(30)
    save_checkpoint(str(tmp_path / "short/d1"), 30, model, optimizers,
                    dict(stage="base", num_iterations=40, config={}, tokenizer="", val_bpb=1.5), wait=False)
    assert checkpoint.writing is None and capsys.readouterr().out.count("saved ") == 3
    for other in ("beside", "short"):
        for name in os.listdir(folder):
            assert (folder / name).read_bytes() == (tmp_path / other / "d1" / name).read_bytes(), name


FULL = """
import resource, signal, sys, time
import test_checkpoint
folder = sys.argv[1]
test_checkpoint.save(folder, 10)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))                      # like a disk that fills up
test_checkpoint.save_checkpoint(folder, 20, *test_checkpoint.state(20), dict(stage="base"), wait=False)
time.sleep(60)
"""


def test_a_save_beside_the_training_that_fails_ends_the_run_in_one_line(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path / "d1")], capture_output=True, text=True, timeout=50,
                          env=dict(os.environ, PYTHONPATH=os.pathsep.join([ROOT, os.path.dirname(__file__)])))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "File too large" in done.stderr, done.stderr
    assert steps_in(str(tmp_path / "d1")) == [10] and not [name for name in os.listdir(tmp_path / "d1") if "20" in name]


def changed(content, **values):
    """A meta with other values that is not checked by its sum; of another file nothing is left."""
    return json.dumps({**json.loads(content), "checksum": None, **values} if content[:1] == b"{" else 0).encode()


@pytest.mark.parametrize("kind", {**DAMAGES, "longer": lambda b: b + b"x", "deep": lambda b: b"[" * 100_000, "null": lambda b: b"null",
                                  "step": lambda b: changed(b, step=10), "nan": lambda b: changed(b, val_bpb=float("nan"))}.items(),
                         ids=lambda kind: kind[0])
@pytest.mark.parametrize("name", ["meta_000020.json", "model_000020.pt", "optim_000020_rank0.pt"])
def test_a_damaged_checkpoint_is_passed_over(folder, capsys, name, kind):
    damage(folder / name, kind[1])
    needed = name[:5] != "optim"
    before = sorted(os.listdir(folder))
    if needed and (kind[0], name[:4]) != ("gone", "meta"):
        with pytest.raises(SystemExit, match=f"{name}: missing or damaged.*take another step"):
            find_checkpoint("base", "d1", 20)
    found = find_checkpoint("base", "d1")[1]["step"]
    assert found == (10 if needed else 20) and before == sorted(os.listdir(folder)), "who only reads moves nothing"
    capsys.readouterr()
    meta = whole_checkpoint(str(folder), to_train=True)
    require_saved(folder, meta)
    if (kind[0], name[:4]) != ("gone", "meta"):
        assert meta["step"] == 10 and capsys.readouterr().err.count("\n") == 1
        assert steps_in(str(folder)) == [10] and len([n for n in os.listdir(folder) if n.endswith(".damaged")]) == len(before) - 4
    save(folder, 20)
    require_saved(folder, whole_checkpoint(str(folder), to_train=True))


def test_when_none_is_whole_the_next_command_begins_anew(folder):
    for name in ("model_000010.pt", "meta_000020.json"):
        damage(folder / name, DAMAGES["empty"])
    with pytest.raises(SystemExit, match="meta_000020.json, .*model_000010.pt: .*no other checkpoint"):
        find_checkpoint("base")
    with pytest.raises(SystemExit, match="the same command trains from the beginning"):
        whole_checkpoint(str(folder), to_train=True)
    assert whole_checkpoint(str(folder), to_train=True) == {} and read_meta(str(folder)) == {}


def test_a_checkpoint_of_an_older_version_is_whole(folder):
    path = folder / "meta_000020.json"
    meta = json.loads(path.read_text())
    del meta["checksum"]
    path.write_text(json.dumps(meta, indent=1))
    require_saved(folder, whole_checkpoint(str(folder), to_train=True))
    assert steps_in(str(folder)) == [10, 20]


@pytest.mark.parametrize("what", ["val_bpb", "val_loss", "lm_head.weight"])
def test_what_is_not_finite_is_not_saved(folder, tmp_path, what):
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    model, optimizers = state(30)
    meta = dict(stage="base", num_iterations=30, config={}, tokenizer="", val_bpb=None)
    if what in model.state_dict():
        model.state_dict()[what][3, 5] = float("inf")
    else:
        meta[what] = float("nan")
    for place, words in ((folder, "step 20 stays the newest"), (tmp_path / "new", "none was saved before")):
        with pytest.raises(SystemExit, match=f"step 30 is not saved, {what} is not finite.*{words}"):
            save_checkpoint(str(place), 30, model, optimizers, meta)
    assert before == {name: (folder / name).read_bytes() for name in os.listdir(folder)} and not (tmp_path / "new").exists()


def test_a_divergence_while_the_newest_is_written_names_it(folder, monkeypatch):
    whole = threading.Event()
    write = checkpoint.write_json
    monkeypatch.setattr(checkpoint, "write_json", lambda *args: (whole.wait(10), write(*args)))
    meta = dict(stage="base", num_iterations=40, config={}, tokenizer="")
    save_checkpoint(str(folder), 30, *state(30), meta, wait=False)
    assert steps_in(str(folder)) == [10, 20]
    threading.Timer(0.3, whole.set).start()
    with pytest.raises(SystemExit, match="step 30 is from before"):
        checkpoint.require_finite(str(folder), 30, 8, float("nan"), 1.0)
    save_checkpoint(str(folder), 31, *state(31), meta, wait=False)
    with pytest.raises(SystemExit, match="step 31 stays the newest"):
        save_checkpoint(str(folder), 32, *state(32), dict(meta, val_bpb=float("nan")))
