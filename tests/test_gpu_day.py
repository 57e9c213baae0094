"""The GPU day on a CPU: it runs, goes on after a kill, and a part that fails is a line and not the end."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from conftest import ROOT, run_script


def command(folder, **settings):
    environment = dict(os.environ, NANOCHAT_BASE_DIR=str(folder), PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="",
                       HF_ENDPOINT="http://127.0.0.1:9", NANOCHAT_MIRROR="http://127.0.0.1:9", **settings)
    return dict(args=["bash", "bench/gpu_day.sh"], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT)


def day(folder, **settings):
    return subprocess.run(**command(folder, **settings))


def lines(folder):
    path = folder / "gpu_day/results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_it_goes_on_after_a_kill_and_a_failure_and_measures_nothing_twice(tmp_path):
    first = subprocess.Popen(**command(tmp_path, PART="memory,decode"))
    lock = tmp_path / "gpu_day_work/lock"                         # names the process that measures
    while not lines(tmp_path) or not os.path.exists(f"/proc/{lock.read_text().strip()}"):
        assert first.poll() is None
        time.sleep(0.02)
    first.kill()
    again = day(tmp_path, PART="decode")                          # what was being measured is still at work
    assert again.returncode == 1 and "at work; wait, or: kill -9 -- -" in again.stdout and again.stdout.count("\n") == 1
    os.killpg(int(re.search(r"-- -(\d+)", again.stdout)[1]), signal.SIGKILL)
    first.wait()

    path = tmp_path / "gpu_day/results.jsonl"
    good = json.loads(path.read_text())
    wrong = [dict(date=5), dict(figures=5), dict(part=[]), dict(device={}), dict(figures={"a_bytes": {}}), dict(item="\ud800")]
    wrong = [*(json.dumps(good | one) for one in wrong), "[" * 100_000, "5", '{"part": "fit", "it']     # cut short
    path.write_text(path.read_text() + "\n".join(wrong))
    done = day(tmp_path, PART="memory,4")
    assert done.returncode == 0, done.stdout
    assert re.findall(r"line (\d+) is damaged", done.stdout) == [str(number) for number in range(2, 11)]
    assert done.stdout.index("\ndecode d1 ...") < done.stdout.index("\nmemory d1 ..."), "what was killed comes last"
    assert [(line["part"], line["item"], "figures" in line) for line in lines(tmp_path)] == \
        [("memory", "d1", False), ("decode", "d1", True), ("memory", "d1", True)]
    for line in lines(tmp_path):
        assert line["toy"] and line["device"].startswith("CPU") and line["torch"] == torch.__version__
        assert line["date"] > "2026" and "commit" in line
    table = (tmp_path / "gpu_day/table.md").read_text()
    assert "toy sizes on a CPU" in table and "### 4. decode" in table and "failed" not in table and table in done.stdout

    done = day(tmp_path, PART="memory,decode,fit,cards", MINUTES="0.1")
    assert "2 of 4 measurements" in done.stdout
    assert "not begun, 25s by guess: fit d1 (15s), cards d1-in-12GB (10s)" in done.stdout


def test_a_part_that_fails_or_takes_too_long_is_a_line(tmp_path):
    (tmp_path / "data/base_data").mkdir(parents=True)
    for shard in ("00000", "01822"):
        (tmp_path / f"data/base_data/shard_{shard}.parquet").write_text("no parquet")
    done = day(tmp_path, PART="curve", DATA=str(tmp_path / "data"))
    assert done.returncode == 0 and "; 1 failed" in done.stdout
    assert re.fullmatch(r"tok_train.py: .*shard_\d+.parquet.* not a parquet file.*", lines(tmp_path)[0]["error"])
    options = command(tmp_path, PART="decode")
    options["args"].append("--limit=1")                           # second; torch alone takes longer
    assert "d1: **failed**: bench.measure: ended, it took longer than it may" in subprocess.run(**options).stdout


@pytest.mark.parametrize("settings, words", [
    (dict(OUT="{}/file/out"), "file/out: Not a directory; set OUT"), (dict(PART="fitt"), "part=fitt: must be some of"),
    (dict(DATA="{}"), "no base_data/shard_*.parquet in it"), (dict(MINUTES="nine"), "minutes must be float")])
def test_bad_settings_end_in_one_line(tmp_path, settings, words):
    (tmp_path / "file").touch()
    done = day(tmp_path, **{name: value.format(tmp_path) for name, value in settings.items()})
    assert done.returncode == 1 and words in done.stdout and done.stdout.count("\n") == 1


def test_a_card_that_is_played_has_its_memory(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (139e9, 140e9))          # CUDA itself has taken 1 GB
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", asked.append)
    script = run_script("bench/measure.py", "--what=device", "--device=cpu")
    script["play_card"](24e9)
    assert script["machine"].free_bytes == pytest.approx(0.9 * 23e9 - 4e9)
    torch.cuda.set_per_process_memory_fraction(0.5)
    assert asked == pytest.approx([23 / 140, 12 / 140])
    with pytest.raises(SystemExit, match="this card has 140"):
        script["play_card"](150e9)


@pytest.mark.full
def test_the_whole_day(tmp_path):
    done = day(tmp_path)
    assert done.returncode == 0 and "failed" not in done.stdout.lower(), done.stdout
    found = {(line["part"], line["item"]): line["figures"] for line in lines(tmp_path)}
    assert len(found) == 16 and len({part for part, _ in found}) == 8
    assert found["resume", "d1"]["same_weights"] and found["resume", "d1"]["steps_with_other_loss"] == 0
    assert [row["largest_difference"] > 0 for row in found["curve", "d1"]] == [False, False, True]
