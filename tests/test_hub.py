"""
The drivers on real data: a folder laid out like the hub, served on this machine.

NANOCHAT_TEST_HUB names it; it has a serve.py that takes a port. Without it these tests are skipped.
"""
import os
import socket
import subprocess
import sys
import time

import pytest

from conftest import ROOT

HUB = os.environ.get("NANOCHAT_TEST_HUB", "")
pytestmark = pytest.mark.skipif(not HUB, reason="NANOCHAT_TEST_HUB names no folder with real data")
TINY = dict(CONFIG="demo", DEPTH="1", MAX_SEQ_LEN="256", TOTAL_BATCH_SIZE="2048", BASE_ITERATIONS="6", MID_ITERATIONS="4",
            SFT_ITERATIONS="2", DATA_SHARDS="2", MAX_CHARS="3000000", VOCAB_SIZE="2048", SAVE_EVERY="3")


@pytest.fixture(scope="module")
def server():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen([sys.executable, os.path.join(HUB, "serve.py"), str(port)], stdout=subprocess.DEVNULL)
    for _ in range(100):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    process.kill()


def drive(base_dir, url, **values):
    env = dict(os.environ, NANOCHAT_BASE_DIR=str(base_dir), HF_ENDPOINT=url, NANOCHAT_MIRROR=url, **TINY | values)
    return subprocess.run(["bash", "run_realistic.sh"], cwd=ROOT, env=env, capture_output=True, text=True)


def test_all_stages_on_real_data_then_again_in_seconds(server, tmp_path):
    first = drive(tmp_path, server)
    assert first.returncode == 0, first.stdout + first.stderr
    for words in ("plan: d1", "CORE", "ChatCORE", "HumanEval", "spells a word", "in all"):
        assert words in first.stdout
    models = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("model_*.pt")}
    assert {p.parent.parent.name for p in models} == {"base_checkpoints", "mid_checkpoints", "chatsft_checkpoints"}
    again = drive(tmp_path, "http://127.0.0.1:9")        # nobody listens there: what is here is not asked for again
    assert again.returncode == 0, again.stdout + again.stderr
    for script in ("tok_train", "base_train", "mid_train", "chat_sft"):
        assert f"{script}: finished already" in again.stdout
    assert models == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("model_*.pt")}
    assert not list(tmp_path.rglob("*.part*")) and not list(tmp_path.rglob("*.tmp"))


def test_a_shard_that_does_not_exist_ends_the_run_in_words(server, tmp_path):
    done = drive(tmp_path, server, DATA_SHARDS="9", BASE_ITERATIONS="2")
    assert done.returncode != 0 and "404" in done.stdout + done.stderr and "Traceback" not in done.stdout + done.stderr
