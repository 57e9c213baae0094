"""
The whole road as a user goes it: every stage, on the CPU, in a base folder of its own.

Real text (the documentation inside this Python), the real tokenizer trainer, and few steps.
"""
import json
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
STAGES = [
    ["prepare.py", "--embedded=1"],
    ["tok_train.py", "--vocab_size=1024", "--max_chars=1000000"],
    ["tok_eval.py", "--references="],
    ["base_train.py", "config/tiny_base.py", "--num_iterations=30", "--save_every=20", "--resume=1"],
    ["mid_train.py", "config/tiny_mid.py", "--num_iterations=20", "--spelling_rows=500", "--identity_rows=200", "--resume=1"],
    ["chat_sft.py", "config/tiny_sft.py", "--num_iterations=5", "--resume=1"],
    ["base_eval.py", "-a", "bpb,samples"],
    ["chat_eval.py", "-i", "sft", "-x", "2", "--embedded=1", "--max_tokens=16"],
    ["report.py", "--copy_to="],
    ["chat_cli.py", "-p", "Who are you?", "--max_tokens=8"],
]


def run(base_dir, argv):
    env = dict(os.environ, NANOCHAT_BASE_DIR=str(base_dir), OMP_WAIT_POLICY="PASSIVE")
    env["HF_ENDPOINT"] = env["NANOCHAT_MIRROR"] = "http://127.0.0.1:9"     # nothing is fetched
    done = subprocess.run([sys.executable, *argv], cwd=HERE, env=env, capture_output=True, text=True)
    assert done.returncode == 0, " ".join(argv) + "\n" + done.stdout + done.stderr
    return done.stdout


def test_every_stage_from_text_to_chat(tmp_path):
    for argv in STAGES:
        run(tmp_path, argv)
    rows = [json.loads(line) for line in open(tmp_path / "base_checkpoints/d2/log.jsonl", encoding="utf-8")]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 30 and losses[-1] < losses[0] - 1
    for stage in ("base", "mid", "chatsft"):
        names = os.listdir(tmp_path / f"{stage}_checkpoints/d2")
        assert any(name.startswith("meta_") for name in names) and not any(name.endswith(".tmp") for name in names)
    report = (tmp_path / "report/d2.md").read_text()
    for words in ("Pretraining", "Mid-training", "Fine-tuning", "bits per byte", "says its name"):
        assert words in report

    tested = json.loads((tmp_path / "chatsft_checkpoints/d2/chat_eval.json").read_text())["tasks"]
    assert tested["says its name"]["constant"] == 1 and tested["spells a word"]["constant"] == 0.5, "of two problems"

    # the same commands again: all is skipped, nothing is written
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt")}
    for argv in (STAGES[1], *STAGES[3:6]):
        assert "finished already" in run(tmp_path, argv)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt")}
