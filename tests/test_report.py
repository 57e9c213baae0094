"""
The report card: true numbers from whatever a run has left, and a picture that can be read.

The run is made of files written here: no model is trained, and the script runs in this process.
"""
import hashlib
import json
import os
import runpy
import shutil
import statistics
import subprocess
import sys

import pytest

from conftest import ROOT
from evals import curves
from plumbing import common

STAGES = dict(base="base_checkpoints", mid="mid_checkpoints", sft="chatsft_checkpoints")


def sha(stage, step=40):
    return hashlib.sha256(f"{stage} {step}".encode()).hexdigest()


def write_json(path, content):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        json.dump(content, f)


def meta(stage, step=40, **more):
    previous = dict(mid="base", sft="mid").get(stage)
    machine = dict(name="NVIDIA A100", device="cuda", dtype="bfloat16", threads=8, world_size=2, torch="2.12.0")
    content = dict(step=step, stage=stage, num_iterations=40, progress=dict(seconds=3600.0, tokens=80_000, loss=[1, 1]),
                   config=dict(matrix_lr=0.02, grad_clip=0.5, unheard_of="a|b"), flops_per_token=6_000_000, rows=8,
                   device_batch_size=4, machine=machine, peak_memory=12_300_000_000,
                   model_config=dict(sequence_len=256, vocab_size=4096, n_layer=2, n_head=4, n_kv_head=4, n_embd=128),
                   files={f"model_{step:06d}.pt": [1, sha(stage, step)]})
    content |= dict(params=dict(total=1_000_000), shards=["shard_00000.parquet"]) if stage == "base" else \
        dict(conversations=640, source=dict(stage=previous, step=40, sha256=sha(previous)))
    return content | ({"val_loss": 1.25} if stage == "sft" else {"val_bpb": 1.5}) | more


def log(stage):
    for step in range(40):
        yield dict(step=step, loss=8.0 - step / 10, tokens_per_second=1000.0 + step, mfu=0.5, seconds=90.0 * (step + 1))
        if step % 10 == 0:
            yield dict(step=step, **({"val_loss": 2.0} if stage == "sft" else {"val_bpb": 2.0 - step / 100}))
    if stage == "sft":
        yield dict(step=40, test="says its name", right=18, total=18)
        yield dict(step=40, test="spells a word", right=1, total=50)


def chat_eval(stage, step=40):
    def task(right, total, **more):
        return dict(right=right, total=total, accuracy=right / total, stderr=0.01, **more)
    return dict(step=step, checkpoint=sha(stage, step), seconds=60.0, chatcore=0.11, chatcore5=0.05,
                sandbox=["rlimits"], tasks={"ARC-Easy": task(300, 1000), "MMLU": task(252, 1000),
                                            "HumanEval": {"skipped": "no sandbox here"},
                                            "spells a word": task(150, 200, constant=0.005),
                                            "SpellingBee": task(170, 256, constant=0.648),
                                            "counts a letter": task(95, 100, constant=0.6),
                                            "ARC-Challenge": task(400, 1000, constant=0.27)})


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run of three stages in tmp_path, which is the base folder."""
    monkeypatch.setattr(common, "BASE_DIR", str(tmp_path))
    for stage, folder in STAGES.items():
        write_json(tmp_path / folder / "d2/meta_000040.json", meta(stage))
        with open(tmp_path / folder / "d2/log.jsonl", "w", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n" for row in log(stage))
    write_json(tmp_path / "tokenizer/meta.json", dict(vocab_size=4096, fingerprint="abc", seconds=7200.0,
                                                      val_bytes_per_token=3.6, seen=dict(chars=1000, documents=10)))
    return tmp_path


def report(monkeypatch, *flags):
    """Run report.py in this process -> its globals."""
    monkeypatch.setattr(sys, "argv", ["report.py", *(flags or ["--copy_to="])])
    return runpy.run_path(os.path.join(ROOT, "report.py"))


def page_of(base_dir, monkeypatch, *flags):
    report(monkeypatch, *flags)
    return (base_dir / "report/d2.md").read_text(encoding="utf-8")


def test_a_finished_run(run, monkeypatch):
    write_json(run / "base_checkpoints/d2/eval.json", dict(
        step=40, checkpoint=sha("base"), settings=dict(core=dict(max_per_task=100)), seconds=dict(bpb=1.0, core=59.0),
        val_bpb=1.4, train_bpb=1.3, core=0.05, gpt2_core=dict(small=0.1139),
        samples=[["Gold is", " a\x1b[31m|\n```metal"]],
        tasks=dict(copa=dict(accuracy=0.6, centered=0.2, n=100))))
    write_json(run / "chatsft_checkpoints/d2/chat_eval.json", chat_eval("sft"))
    page = page_of(run, monkeypatch)
    for line in ("# Report card of d2", "| steps | 40 of 40 |", "2 x NVIDIA A100, bfloat16, torch 2.12.0",
                 "| tokens trained on | 80,000, 0.1 per parameter, 4.8e+11 FLOP |", "| MFU, median | 50.0 % |",
                 "| memory, peak | 12.3 GB, micro-batches of 4 rows |",
                 "640 conversations, 8 rows per step, 0.50 epochs",
                 "<summary>All knobs</summary>\n\n`matrix_lr=0.02` `grad_clip=0.5` `unheard_of='a|b'`\n\n</details>", "| validation, bits per byte | 1.4000 | 1.5000 |  |",
                 "| CORE | 0.0500 (0.2219) |  |  |", "| ARC-Easy |  | - (0.3561) | 0.3000 (0.3876) |",
                 "| GSM8K |  | - (0.0250) | - (0.0455) |",
                 "| ChatCORE, five tasks |  | - (0.0730) | 0.0500 (0.0884) |",
                 "| says its name | yes | 18 of 18 | 100.0 % ± 5.1 |",
                 "| spells a word | mostly | 150 of 200 | 75.0 % ± 3.1 |  |",
                 "| SpellingBee | no better than guessing | 170 of 256 | 66.4 % ± 3.0 | 65 % |",
                 "| counts a letter | mostly | 95 of 100 | 95.0 % ± 2.4 | 60 % |",
                 "| ARC-Challenge | rarely | 400 of 1,000 | 40.0 % ± 1.5 | 27 % |",
                 "| MMLU | no better than guessing | 252 of 1,000 | 25.2 % ± 1.4 | 25 % |",
                 "HumanEval: skipped, no sandbox here.", "Gold is |  a[31m|\\n'''metal",
                 "(on at most 100 items of a task); GPT-2: small 0.1139.", "| copa | 0.6000 | 0.2000 | 100 |",
                 # 2 h of tokenizer, then 3 h of training and two minutes of evaluation on two GPUs
                 "| in all | 5h02m (8.07 GPU-hours) |"):
        assert line in page, line
    assert "## Reinforcement" not in page and "Not run yet" not in page


def test_the_same_files_make_the_same_report_and_both_pages_show_the_picture(run, monkeypatch):
    pytest.importorskip("matplotlib")
    report(monkeypatch, f"--copy_to={run}/project/report.md", "--gpu_hour_price=2")
    first = {path: path.read_bytes() for path in run.rglob("*") if path.suffix in (".md", ".png")}
    assert len(first) == 4
    for page in (run / "report/d2.md", run / "project/report.md"):
        text = page.read_text(encoding="utf-8")
        link = text.split("![")[1].split("](")[1].split(")")[0]
        data = (page.parent / link).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(data[16:20], "big") == 1600
        assert "8.00 GPU-hours, at 2 an hour: 16.00" in text
    report(monkeypatch, f"--copy_to={run}/project/report.md", "--gpu_hour_price=2")
    assert first == {path: path.read_bytes() for path in first}
    shutil.copytree(run / "base_checkpoints/d2", run / "base_checkpoints/d3")
    report(monkeypatch, f"--copy_to={run}/project/report.md", "--model_tag=d3")
    assert first == {path: path.read_bytes() for path in first} and (run / "project/report_d3.md").exists()


def test_half_a_run(run, monkeypatch):
    shutil.rmtree(run / "chatsft_checkpoints")
    shutil.rmtree(run / "tokenizer")
    os.remove(run / "mid_checkpoints/d2/meta_000040.json")               # no checkpoint yet
    write_json(run / "base_checkpoints/d2/meta_000030.json", meta("base", 30))
    (run / "base_checkpoints/d2/meta_000040.json").write_text('{"step": 4')   # cut short
    path = run / "mid_checkpoints/d2/log.jsonl"
    path.write_bytes(path.read_bytes()[:-20])                            # in the middle of a line
    page = page_of(run, monkeypatch)
    assert "| steps | 40 of 40, not finished; checkpoint of step 30 |" in page
    assert "| steps | 39, not finished; no checkpoint yet |" in page           # what the cut left of the log
    assert "Not run yet: `python chat_sft.py`" in page and "Not trained yet: `python tok_train.py`" in page
    assert "meta_000040.json` is damaged" in page


@pytest.mark.parametrize("content", ["", "\n", '{"step": 0, "loss": null}\n', '{"step": 0, "loss": 3.0}\n', '{"st'])
def test_logs_with_next_to_nothing_in_them(run, monkeypatch, content):
    for folder in STAGES.values():
        (run / folder / "d2/log.jsonl").write_text(content)
    assert "| steps | 40 of 40 |" in page_of(run, monkeypatch)
    for folder in STAGES.values():
        os.remove(run / folder / "d2/log.jsonl")
    assert "| steps | 40 of 40 |" in page_of(run, monkeypatch)


def test_a_log_alone_and_a_model_from_elsewhere(run, monkeypatch):
    for folder in list(STAGES.values())[1:]:
        shutil.rmtree(run / folder)
    os.remove(run / "base_checkpoints/d2/meta_000040.json")
    assert "| validation, bits per byte | 1.7000 |" in page_of(run, monkeypatch)
    os.remove(run / "base_checkpoints/d2/log.jsonl")
    write_json(run / "base_checkpoints/d2/meta_000040.json", dict(step=40, model_config=meta("base")["model_config"]))
    assert "2 layers" in page_of(run, monkeypatch)


def test_numbers_of_another_checkpoint_are_not_shown(run, monkeypatch):
    write_json(run / "chatsft_checkpoints/d2/chat_eval.json", chat_eval("sft", 30))
    (run / "base_checkpoints/d2/eval.json").write_text("[1, 2]")
    write_json(run / "tokenizer/eval.json", dict(fingerprint="other"))
    write_json(run / "mid_checkpoints/d2/meta_000040.json", meta("mid", source=dict(stage="base", step=20, sha256="0")))
    page = page_of(run, monkeypatch)
    assert "0.3000" not in page and "| spells a word | rarely | 1 of 50 |" in page
    for remark in ("`chat_eval.json` is of another checkpoint (step 30)", "python chat_eval.py -i sft",
                   "eval.json` is damaged", "`tokenizer/eval.json` is of another tokenizer",
                   "Mid-training started from another base checkpoint (step 20) than the one there now"):
        assert remark in page, remark


def test_the_tokenizer_beside_the_references(run, monkeypatch):
    write_json(run / "tokenizer/eval.json", dict(
        fingerprint="abc", vocab_sizes={"ours": 4096, "GPT-2": 50257}, missing={"GPT-4": "no network"},
        texts={"news": dict(bytes=1000, tokens={"ours": 250, "GPT-2": 200})}))
    page = page_of(run, monkeypatch)
    assert "| text | ours (4,096) | GPT-2 (50,257) | GPT-2 / ours |" in page
    assert "| news | 4.000 | 5.000 | 0.80 |" in page
    assert "Without GPT-4" in page


def test_without_matplotlib_one_line_says_how_to_get_the_picture(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = page_of(run, monkeypatch)
    line = "No picture: matplotlib is not installed (pip install matplotlib)."
    assert f"## Curves\n\n{line}\n\n## " in page and "![" not in page
    assert "without a picture: matplotlib is not installed" in capsys.readouterr().out


def test_which_model(run, monkeypatch):
    with pytest.raises(SystemExit, match="nothing trained as 'd9' here; there is: d2"):
        report(monkeypatch, "--model_tag=d9")
    shutil.copytree(run / "base_checkpoints/d2", run / "base_checkpoints/d3")
    with pytest.raises(SystemExit, match="several models; choose one with --model_tag= from d2, d3"):
        report(monkeypatch, "--copy_to=")
    assert "d3" in str(report(monkeypatch, "--copy_to=", "--model_tag=d3")["page_path"])
    write_json(run / "base_checkpoints/d3/meta_000040.json", meta("base", tag="d2"))
    assert report(monkeypatch, "--copy_to=")["tag"] == "d2", "a copy is in nobody's way"
    write_json(run / "mid_checkpoints/d3/meta_000040.json", meta("mid", tag="d3"))
    with pytest.raises(SystemExit, match="several models"):      # a copy from which another model was trained
        report(monkeypatch, "--copy_to=")
    for folder in STAGES.values():
        shutil.rmtree(run / folder)
    with pytest.raises(SystemExit, match="nothing was trained here yet"):
        report(monkeypatch, "--copy_to=")


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_the_commit_and_whether_it_is_what_ran(run, monkeypatch, tmp_path):
    state = report(monkeypatch)["git_state"]
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.setitem(state.__globals__, "HERE", str(place))
    git = ["git", "-C", str(place), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert state() == ""
    subprocess.run([*git, "init", "-q"], check=True)
    (place / "a.py").write_text("1")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "a"], check=True)
    assert state().endswith(", clean")
    (place / "a.py").write_text("2")
    assert state().endswith(", with changes (dirty)")
    inside = place / "unpacked"
    inside.mkdir()
    monkeypatch.setitem(state.__globals__, "HERE", str(inside))          # the repository is someone else's
    assert state() == ""


def test_every_axis_has_its_unit_and_rows_share_their_scale(tmp_path, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure")
    shown = []
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda self, *args, **more: shown.append(self))
    logs = [(title, list(log(stage))) for stage, title in (("base", "A"), ("mid", "B"), ("sft", "C"))]
    assert curves.draw([*logs, ("D", [])], str(tmp_path / "x.png")) == ""
    panels = shown[0].axes
    assert len(panels) == 9 and [panel.get_title() for panel in panels[:3]] == ["A", "B", "C"]
    assert [panel.get_ylabel() for panel in panels[::3]] == [curves.LOSS, curves.BPB, curves.SPEED]
    for name, unit in ((curves.LOSS, "nats per token"), (curves.BPB, "bits per byte"), (curves.SPEED, "tokens/s")):
        assert unit in name
    assert all(panel.get_xlabel() == "optimizer step" for panel in panels[6:])
    for row in range(3):
        assert len({panel.get_ylim() for panel in panels[3 * row:3 * row + 3]}) == 1
    assert "no step" in curves.draw([("A", [])], str(tmp_path / "y.png")) and not (tmp_path / "y.png").exists()


def test_a_negative_loss_is_drawn_too(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [dict(step=step, loss=1.0 - step) for step in range(30)]
    assert curves.draw([("A", rows)], str(tmp_path / "x.png")) == "" and (tmp_path / "x.png").exists()


def test_a_reward_has_a_panel_of_its_own(tmp_path, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure")
    shown = []
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda self, *args, **more: shown.append(self))
    rewarded = [dict(step=step, reward=step / 30, tokens_per_second=100.0) for step in range(30)] + [{"step": 30, "pass@1": 0.5}]
    assert curves.draw([("A", list(log("base"))), ("RL", rewarded)], str(tmp_path / "x.png")) == ""
    panels = shown[0].axes
    assert [panel.get_ylabel() for panel in panels[::2]] == [curves.LOSS, curves.REWARD, curves.BPB, curves.SPEED]
    remarks = [panel.texts[0].get_text() for panel in panels]
    assert remarks[1] == remarks[2] == "not measured\nin this stage" and "validation 0.50" in remarks[3]
    assert curves.draw([("RL", rewarded)], str(tmp_path / "y.png")) == ""


def test_the_smoothed_line_does_not_lag():
    line = [100.0 - x for x in range(1000)]
    assert curves.smooth(line) == pytest.approx(line)                    # an average of the past would lie above
    noisy = [x + (-1) ** i for i, x in enumerate(line)]
    assert statistics.fmean(abs(a - b) for a, b in zip(curves.smooth(noisy), line)) < 0.2
    assert curves.smooth([5.0]) == [5.0] and curves.smooth([]) == []


def test_medians_leave_out_pauses_and_thinning_keeps_a_bound():
    steps, values = list(range(600)), [100.0] * 600
    values[::50] = [1.0] * 12                                            # a checkpoint is written
    assert set(curves.medians(steps, values)[1]) == {100.0}
    assert len(curves.thin(list(range(70_000)))) <= curves.MOST_POINTS
    assert curves.thin([]) == [] and curves.thin([1]) == [1]
    assert curves.medians(range(7), range(7), 3) == ([1, 3, 5], [0.5, 2.5, 5]), "runs of 2, 2 and 3"
    assert curves.medians([], []) == ([], [])
