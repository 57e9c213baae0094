"""Schedules, averages, atomic files and the log."""
import fcntl
import json
import math
import os
import random
import re
import shutil
from types import SimpleNamespace

import pytest

from plumbing.common import (Ema, Log, Progress, atomic_write, code_hash, due, duration, read_json, read_log, sync,
                             write_json)


def test_due_counts_from_step_one_and_zero_means_at_the_end():
    assert [s for s in range(7) if due(s, 3, s == 6)] == [3, 6]
    assert [s for s in range(7) if due(s, 0, s == 6)] == [6]


def test_the_average_of_a_constant_is_the_constant_from_the_first_value():
    ema = Ema(0.9)
    assert [ema.update(5.0) for _ in range(3)] == pytest.approx([5, 5, 5])


def test_a_file_that_was_not_finished_leaves_the_old_one(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(RuntimeError):
        with atomic_write(str(path), "w") as f:
            f.write("new")
            raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x"]


def test_a_full_disk_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="disk is full"):
        with atomic_write(str(tmp_path / "x")):
            raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_a_resumed_log_has_every_step_once(tmp_path):
    log = Log(str(tmp_path), 0)
    for step in range(5):
        log.write(step, loss=float(step))
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 5, "lo')                     # cut short by a crash
    log = Log(str(tmp_path), 3)
    log.write(3, loss=float("nan"))
    rows = read_log(str(tmp_path))
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and rows[-1]["loss"] is None


@pytest.mark.parametrize("damage", [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe\x00", b"[" * 100_000, b'{"a": 1, "checksum": "0"}', None])
def test_a_damaged_small_file_is_one_line_and_empty(tmp_path, capsys, damage):
    path = tmp_path / "x.json"
    path.write_bytes(damage) if damage is not None else path.mkdir()
    assert read_json(str(path)) == {}
    assert capsys.readouterr().out == f"{path}: damaged, so it is made again\n"
    assert read_json(str(path), remarks := []) == {} and len(remarks) == 1 and not capsys.readouterr().out
    assert read_json(str(tmp_path / "none.json")) == {} and not capsys.readouterr().out


def test_a_small_file_knows_each_bit_of_its_content(tmp_path):
    path, content = tmp_path / "x.json", dict(step=20, val_bpb=1.25, name="tä", nothing=None, list=[1, 2.5], bad=float("inf"))
    write_json(str(path), content)
    good = path.read_bytes()
    assert read_json(str(path)) == content
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        path.write_bytes(bad)
        found = read_json(str(path), [])             # a bit of white space or of the word checksum changes no number
        assert found in ({}, content) or {key: found.get(key) for key in content} == content
    path.write_text(json.dumps(content))             # of a version without checksums
    assert read_json(str(path)) == content


def test_a_log_with_damaged_rows_is_read_without_them(tmp_path, capsys):
    rows = [b'{"step": 0, "loss": 1.0}', b'{"step": 1, "test": "A\xffB"}', b"[]", b"3", b"null", b'{"loss": 1}', b"\0" * 50,
            b'{"step": "2"}', b"[" * 100_000, b'{"step": 3, "loss": 2.0}', b'{"step": 4, "lo']
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(rows))
    assert [row["step"] for row in read_log(str(tmp_path))] == [0, 3]
    assert "log.jsonl: 8 damaged rows left out\n" in capsys.readouterr().out
    log = Log(str(tmp_path), 4)
    log.write(4, loss=3.0)
    rows = read_log(str(tmp_path), remarks := [])
    assert [row["step"] for row in rows] == [0, 3, 4] and not remarks


def test_a_full_disk_costs_no_row_of_the_log(tmp_path, capsys):
    log = Log(str(tmp_path), 0)
    log.write(0, loss=0.0)
    file = log.file
    with open("/dev/full", "ab", buffering=0) as log.file:
        log.write(1, loss=1.0)
        log.write(2, loss=2.0)
    assert capsys.readouterr().out.count("can't be written (No space left on device)") == 1
    log.file = file
    log.write(3, loss=3.0)
    assert [row["step"] for row in read_log(str(tmp_path))] == [0, 1, 2, 3]


def test_what_a_killed_writer_left_goes_and_what_another_writes_stays(tmp_path):
    for pid in (1, 2):
        (tmp_path / f"x.{pid}.tmp").write_text("half")
    with open(tmp_path / "x.2.tmp") as f, atomic_write(str(tmp_path / "x")):
        fcntl.flock(f, fcntl.LOCK_EX)                    # too late: it counts when the next one begins
        assert len(os.listdir(tmp_path)) == 1            # our own
    (tmp_path / "x.2.tmp").write_text("half")
    with open(tmp_path / "x.2.tmp") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with atomic_write(str(tmp_path / "x")):
            pass
    assert sorted(os.listdir(tmp_path)) == ["x", "x.2.tmp"]
    sync(str(tmp_path / "not there"))


def test_a_log_that_can_not_be_read_is_one_line_and_not_an_empty_one(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(SystemExit, match="log.jsonl: can't be read .Is a directory."):
        Log(str(tmp_path), 0)


def test_no_error_of_the_disk_is_a_traceback(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="file/x: can't be written"):
        with atomic_write(str(tmp_path / "file/x")):
            pass


RATES = dict(matrix_lr=0.02, embedding_lr=0.2, unembedding_lr=0.004)


def test_progress_continues_where_it_was(tmp_path, capsys):
    log = Log(str(tmp_path), 0)
    first = Progress(log, 0, 4, 10.0, 100.0)
    first.update(0, 2.0, 1.0, RATES, 50, 10.0)
    second = Progress(log, 1, 4, 10.0, 100.0, json.loads(json.dumps(first.state())))
    second.update(1, 2.0, 1.0, RATES, 50, 10.0)
    assert second.seconds == 20 and second.tokens == 100
    rows = read_log(str(tmp_path))
    assert rows[1]["mfu"] == pytest.approx(0.5) and rows[1]["tokens_per_second"] == pytest.approx(5)
    out = capsys.readouterr().out
    assert "mfu 50.0 %" in out and "lr 0.02 / 0.2 / 0.004" in out and rows[1]["embedding_lr"] == 0.2


def test_a_long_run_watches_itself_and_says_each_thing_once(tmp_path, capsys, monkeypatch):
    progress = Progress(Log(str(tmp_path), 0), 0, 1000, 10.0, 0.0, checkpoint_bytes=5_000_000)
    rng = random.Random(0)
    for step in range(300):                            # a run as it should be: falling, noisy, on a machine with moods
        loss = 3 + 8 * math.exp(-step / 50) + rng.gauss(0, 0.15)
        progress.update(step, loss, 1.0, RATES, 50, rng.uniform(0.1, 0.9))
    assert not re.search(r"^step +\d+:", capsys.readouterr().out, re.MULTILINE)
    for step in range(300, 302):
        progress.update(step, 5.0, 1.0, RATES, 50, 0.5)
        progress.update(step, 3.0, 1.0, RATES, 50, 50.0)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4_000_000))
    said = re.findall(r"^step +(\d+): (.*)", capsys.readouterr().out, re.MULTILINE)
    assert [step for step, _ in said] == ["300", "300", "301"]
    for (_, line), words in zip(said, ("loss 5.00, far above the mean 3.0", "50s, the median is", "4 MB are free in")):
        assert line.startswith(words), line


def test_durations_are_for_people():
    assert [duration(s) for s in (4.4, 75, 3700)] == ["4s", "1m15s", "1h01m"]


def test_a_code_hash_sees_code_and_nothing_else(tmp_path):
    def hash_of(text):
        path = tmp_path / f"{len(os.listdir(tmp_path))}.py"      # a new one: a file that was asked about keeps its hash
        path.write_text(text)
        return code_hash(str(path))

    old = hash_of('"""Doc."""\ndef f(x):\n    """Says what."""\n    return x + 1\n')
    assert old == hash_of('"""Other."""\n\n# a remark\ndef f(x):\n    """Says more."""\n    return x + 1  # one\n')
    assert old != hash_of('"""Doc."""\ndef f(x):\n    """Says what."""\n    pass\nreturn x + 1\n'.replace("return", "g ="))
    assert old != hash_of('"""Doc."""\ndef f(x):\n    """Says what."""\n    return x + 2\n')
