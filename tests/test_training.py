"""
Laws of the three training stages, tried on the scripts as a user runs them.

A text of made-up sentences, a vocabulary of little more than the bytes and a model of one layer: each run takes
a few seconds, most of it the start of Python.
"""
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from checkpoint import require_finite, steps_in, whole_checkpoint
from conftest import DAMAGES, ROOT, damage, run_script
from model import GPTConfig
from plumbing import common
from plumbing.budget import checkpoint_bytes
from plumbing.common import fingerprint, read_json, read_log

SHAPE = ["--depth=1", "--head_dim=32", "--max_seq_len=128", "--total_batch_size=1024"]
RUN = ["--dtype=float32", "--device=cpu", "--eval_every=10"]
STAGES = dict(
    base=["base_train.py", *SHAPE, *RUN, "--num_iterations=20", "--sample_every=0", "--core_metric_every=0"],
    mid=["mid_train.py", *RUN, "--num_iterations=20", "--embedded=1", "--assistant_name=Ada", "--spelling_rows=200",
         "--spelling_bee_rows=20", "--identity_rows=50"],
    sft=["chat_sft.py", *RUN, "--num_iterations=20", "--embedded=1", "--target_examples_per_step=8",
         "--device_batch_size=4", "--spelling_rows=100", "--spelling_bee_rows=20", "--eval_metrics_max_problems=1",
         "--eval_metrics_every=20", "--eval_examples=8"])
FOLDER = dict(base="base_checkpoints/d1", mid="mid_checkpoints/d1", sft="chatsft_checkpoints/d1")


def run(base_dir, *argv, check=True, launcher=()):
    """Run a script with its own base folder; the output is shown when it fails."""
    env = dict(os.environ, NANOCHAT_BASE_DIR=str(base_dir), OMP_WAIT_POLICY="PASSIVE")
    done = subprocess.run([*(launcher or [sys.executable]), *argv], cwd=ROOT, env=env, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def weights(folder, step):
    return torch.load(os.path.join(folder, f"model_{step:06d}.pt"), weights_only=True)


def flip(path, place=0.5):
    """Turn one bit of a file over."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


def losses(folder):
    return {row["step"]: row["loss"] for row in read_log(str(folder)) if "loss" in row}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base folder in which all three stages have run 20 steps, with a checkpoint at step 10."""
    base_dir = tmp_path_factory.mktemp("trained")
    code = """
import random
from data import shard_path, VAL_SHARD, write_shard
from tokenizer import Tokenizer
from plumbing.common import base_path
rng = random.Random(0)
words = "the a cat dog sees hears and or red green house tree walks runs to from".split()
text = lambda: " ".join(rng.choices(words, k=rng.randint(5, 60))).capitalize() + "."
write_shard(shard_path(0), [text() for _ in range(60)])
write_shard(shard_path(1), [text() for _ in range(60)])
write_shard(shard_path(VAL_SHARD), [text() for _ in range(30)])
Tokenizer([bytes([i]) for i in range(256)] + [b"th", b"he", b"re", b"at", b"in"]).save(base_path("tokenizer"), {})
"""
    run(base_dir, "-c", code)
    for argv in STAGES.values():
        run(base_dir, *argv, "--save_every=10")
    return base_dir


@pytest.fixture
def copy(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"


def test_base_learns(trained):
    loss = losses(trained / FOLDER["base"])
    assert loss[0] == pytest.approx(torch.tensor(270.0).log().item(), rel=1e-4) and loss[19] < 0.8 * loss[0]


@pytest.mark.parametrize("stage", STAGES)
def test_ten_steps_and_ten_resumed_are_twenty_bit_for_bit(trained, copy, stage):
    folder = copy / FOLDER[stage]
    for name in os.listdir(folder):                     # as if it had been killed after step 10 was saved
        if "000020" in name:
            os.remove(folder / name)
    run(copy, *STAGES[stage], "--save_every=10", "--resume=1")
    old, new = weights(trained / FOLDER[stage], 20), weights(folder, 20)
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert losses(folder) == losses(trained / FOLDER[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_the_micro_batch_does_not_change_the_step(trained, copy, stage):
    shutil.rmtree(copy / FOLDER[stage])
    argv = [arg for arg in STAGES[stage] if "device_batch" not in arg and "num_iter" not in arg]
    run(copy, *argv, "--num_iterations=4", "--device_batch_size=1", "--warmdown_ratio=0.0")
    eight = losses(copy / FOLDER[stage])
    shutil.rmtree(copy / FOLDER[stage])
    run(copy, *argv, "--num_iterations=4", "--device_batch_size=8", "--warmdown_ratio=0.0")
    assert losses(copy / FOLDER[stage]) == pytest.approx(eight, rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_are_one_process(trained, copy, stage):
    shutil.rmtree(copy / FOLDER[stage])
    argv = [arg for arg in STAGES[stage] if "num_iter" not in arg] + ["--num_iterations=4", "--warmdown_ratio=0.0"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run(copy, *argv, "--save_every=2", launcher=torchrun)
    two = losses(copy / FOLDER[stage])
    assert steps_in(copy / FOLDER[stage]) == [2, 4]
    assert whole_checkpoint(copy / FOLDER[stage], 2)["world_size"] == 2, "saved beside the training"
    shutil.rmtree(copy / FOLDER[stage])
    run(copy, *argv)
    assert losses(copy / FOLDER[stage]) == pytest.approx(two, rel=1e-5)


def test_two_machines_of_two_ranks_are_one_process(trained, copy, port):
    shutil.rmtree(copy / FOLDER["base"])
    argv = [arg for arg in STAGES["base"] if "num_iter" not in arg] + ["--num_iterations=4", "--warmdown_ratio=0.0"]
    machines = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={rank}",
                                  "--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={port}", *argv], cwd=ROOT,
                                 env=dict(os.environ, NANOCHAT_BASE_DIR=str(copy), OMP_NUM_THREADS="1"),
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in (1, 0)]
    said = [machine.communicate()[0] for machine in machines]
    assert not any(machine.returncode for machine in machines), "".join(said)
    one = losses(trained / FOLDER["base"])                       # its rates begin to fall later
    assert losses(copy / FOLDER["base"]) == pytest.approx({step: one[step] for step in range(4)}, rel=1e-5)
    with open(copy / FOLDER["base"] / "meta_000004.json") as f:
        meta = json.load(f)
    assert meta["world_size"] == 4 and len([name for name in meta["files"] if name.startswith("optim")]) == 4


def test_a_run_continues_on_another_number_of_ranks(trained, copy):
    folder = copy / FOLDER["base"]
    for name in os.listdir(folder):
        if "000020" in name:
            os.remove(folder / name)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = run(copy, *STAGES["base"], "--resume=1", launcher=torchrun)
    assert "continues on 2" in done.stdout
    assert losses(folder) == pytest.approx(losses(trained / FOLDER["base"]), rel=1e-4)


def test_a_finished_stage_returns_and_changes_nothing(trained):
    for stage, argv in STAGES.items():
        before = sorted((name, os.path.getmtime(trained / FOLDER[stage] / name)) for name in os.listdir(trained / FOLDER[stage]))
        done = run(trained, *argv, "--resume=1")
        assert "finished already" in done.stdout
        assert before == sorted((name, os.path.getmtime(trained / FOLDER[stage] / name)) for name in os.listdir(trained / FOLDER[stage]))


def test_a_checkpoint_is_as_large_as_planned(trained):
    for folder in FOLDER.values():
        meta = json.loads((trained / folder / "meta_000020.json").read_text())
        size = sum(num_bytes for num_bytes, _ in meta["files"].values())
        assert 0 < size - checkpoint_bytes(GPTConfig(**meta["model_config"])) < 20_000      # the names beside the numbers


@pytest.mark.parametrize("argv, words", [
    (["base_train.py", *SHAPE, "--num_iterations=20", "--core_metric_every=0"], "--resume=1"),
    ([*STAGES["base"], "--resume=1", "--matrix_lr=0.5"], "matrix_lr"),
])
def test_a_mistake_is_one_line(trained, argv, words):
    done = run(trained, *argv, check=False)
    assert done.returncode == 1 and words in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("argv, words", [
    (["mid_train.py", "--source_tag=d7"], "d7: no checkpoint"),
    (["chat_sft.py", "--model_tag=a/b"], "a plain name"),
    (["chat_cli.py", "-i", "rl", "-p", "hi"], "run chat_rl.py first"),
    (["chat_sft.py", "--source=best"], "source=best: must be one of base, mid, sft, rl"),
    (["chat_cli.py", "-i", "best", "-p", "hi"], "source=best"),
])
def test_a_model_that_is_not_there_is_one_line(trained, monkeypatch, argv, words):
    monkeypatch.setattr(common, "BASE_DIR", str(trained))
    with pytest.raises(SystemExit) as end:
        run_script(*argv)
    assert words in str(end.value) and "\n" not in str(end.value)


def test_a_checkpoint_is_never_taken_for_what_it_is_not(copy):
    """Damaged, made with another tokenizer, or trained from another base model: each is one line."""
    mid = copy / FOLDER["mid"]
    path = mid / "model_000020.pt"
    flip(path)
    done = run(copy, "chat_cli.py", "-i", "mid", "-p", "hi", "--step=20", check=False)
    assert done.returncode == 1 and "damaged" in done.stderr and "Traceback" not in done.stderr
    meta = json.loads((mid / "meta_000020.json").read_text())
    meta["source"]["sha256"] = "0" * 64                 # as if the base model had been trained again
    meta["files"]["model_000020.pt"] = fingerprint(path)
    del meta["checksum"]
    (mid / "meta_000020.json").write_text(json.dumps(meta))
    done = run(copy, *STAGES["mid"], "--resume=1", check=False)
    assert done.returncode == 1 and "another base checkpoint" in done.stderr
    run(copy, "-c", "from tokenizer import *; from plumbing.common import base_path; "
        "Tokenizer([bytes([i]) for i in range(256)] + [b'ab']).save(base_path('tokenizer'), {})")
    done = run(copy, "chat_cli.py", "-i", "base", "-p", "hi", check=False)
    assert done.returncode == 1 and "another tokenizer" in done.stderr


def require_same_end(trained, copy, stage):
    """The copy has come to the weights and losses of the run that nothing disturbed, bit for bit."""
    old, new = weights(trained / FOLDER[stage], 20), weights(copy / FOLDER[stage], 20)
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert losses(copy / FOLDER[stage]) == losses(trained / FOLDER[stage])


def damaged_and_resumed(trained, copy, stage, name, kind):
    damage(copy / FOLDER[stage] / name, DAMAGES[kind])
    done = run(copy, *STAGES[stage], "--save_every=10", "--resume=1")
    assert "taken instead: step 10)" in done.stderr or (kind, name[:4]) == ("gone", "meta"), done.stderr
    require_same_end(trained, copy, stage)


def test_a_damaged_checkpoint_token_file_and_log_are_made_again(trained, copy):
    log = copy / FOLDER["base"] / "log.jsonl"
    log.write_bytes(log.read_bytes() + b"\xff\xfe\n[]\n")
    for path in (copy / "base_data").glob("*.bin"):
        flip(path, 0.1)
    damaged_and_resumed(trained, copy, "base", "model_000020.pt", "flip")
    aside = [f"{name}.damaged" for name in ("meta_000020.json", "model_000020.pt", "optim_000020_rank0.pt")]
    assert sorted(path.name for path in (copy / FOLDER["base"]).glob("*.damaged")) == aside


@pytest.mark.full
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["meta_000020.json", "model_000020.pt"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_each_damage_of_a_checkpoint_in_every_stage(trained, copy, stage, name, kind):
    damaged_and_resumed(trained, copy, stage, name, kind)


@pytest.mark.full
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", DAMAGES)
def test_each_damage_of_the_optimizers_state_in_every_stage(trained, copy, stage, kind):
    (copy / FOLDER[stage] / "meta_000020.json").unlink()         # as if killed after step 10
    damage(copy / FOLDER[stage] / "optim_000010_rank0.pt", DAMAGES[kind])
    done = run(copy, *STAGES[stage], "--save_every=10", "--resume=1", check=False)
    assert done.returncode == 1 and "the same command trains from the beginning" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    run(copy, *STAGES[stage], "--save_every=10", "--resume=1")
    require_same_end(trained, copy, stage)


@pytest.mark.parametrize("stage", ["base", *(pytest.param(stage, marks=pytest.mark.full) for stage in ("mid", "sft"))])
def test_a_run_that_an_older_version_began_goes_on(trained, copy, stage):
    folder = copy / FOLDER[stage]
    (folder / "meta_000020.json").unlink()
    meta = json.loads((folder / "meta_000010.json").read_text())
    for key in ("checksum", "tokens"):
        meta.pop(key, None)
    (folder / "meta_000010.json").write_text(json.dumps(meta, indent=1))
    for path in (copy / "base_data").glob("*.bin.json"):
        path.unlink()
    done = run(copy, *STAGES[stage], "--save_every=10", "--resume=1")
    assert "made again" not in done.stdout + done.stderr
    require_same_end(trained, copy, stage)


@pytest.mark.parametrize("more", [["--num_iterations=1", "--embedding_lr=1e999"]])
def test_a_model_that_is_not_finite_is_never_saved_nor_finished(copy, more):
    shutil.rmtree(copy / FOLDER["base"])
    argv = [arg for arg in STAGES["base"] if "num_iter" not in arg] + more
    for _ in range(2):
        done = run(copy, *argv, "--resume=1", check=False)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "infinit" in done.stderr or "finite" in done.stderr
    assert not list((copy / FOLDER["base"]).glob("m*"))


KILLED = """
import os, runpy, sys
number, sys.argv, count = int(sys.argv[1]), sys.argv[2:], 0
def counted(real):
    def call(*args, **more):
        global count
        count += 1
        if count == number:
            os.kill(os.getpid(), 9)
        return real(*args, **more)
    return call
for name in ("replace", "fsync", "remove", "unlink"):
    setattr(os, name, counted(getattr(os, name)))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.full
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_every_rename_flush_and_removal_of_a_run(trained, tmp_path, stage):
    for number in range(1, 200, 1 if stage == "base" else 3):
        copy = tmp_path / str(number)
        shutil.copytree(trained, copy)
        shutil.rmtree(copy / FOLDER[stage])
        killed = run(copy, "-c", KILLED, str(number), *STAGES[stage], "--save_every=10", "--resume=1", check=False)
        if killed.returncode == 0:
            break
        assert killed.returncode == -9, killed.stderr
        done = run(copy, *STAGES[stage], "--save_every=10", "--resume=1")
        assert "damaged" not in done.stdout + done.stderr and not list(copy.glob("*/*/*.tmp"))
        require_same_end(trained, copy, stage)
        shutil.rmtree(copy)
    assert number > 25


@pytest.mark.full
@pytest.mark.parametrize("kind", sorted({*DAMAGES} - {"gone"}))
def test_each_damage_of_a_small_file_is_one_line_and_made_again(copy, kind):
    base, sft = copy / FOLDER["base"], copy / FOLDER["sft"]
    fresh = [arg for arg in STAGES["base"] if "dtype" not in arg and "num_iter" not in arg] + ["--num_iterations=1", "--model_tag=x"]
    cases = [(base / "eval.json", ["base_eval.py", "-a", "bpb", "--eval_tokens=1000", "--resume=1"]),
             (sft / "chat_eval.json", ["chat_eval.py", "--embedded=1", "-a", "says its name", "-x", "2", "--max_tokens=4", "--resume=1"]),
             (copy / "tokenizer/eval.json", ["tok_eval.py", "--references=", "--num_chars=1000", "--resume=1"]),
             (copy / "base_checkpoints/x/numerics.json", fresh)]
    for path, argv in cases:
        run(copy, *argv)
        good = read_json(str(path))
        damage(path, DAMAGES[kind])
        run(copy, "report.py", "--model_tag=d1", "--copy_to=")
        if path.name == "numerics.json":
            for name in os.listdir(path.parent):
                if name[:4] in ("meta", "log."):
                    os.remove(path.parent / name)
        done = run(copy, *argv)
        assert kind == "object" or f"{path}: damaged, so it is made again" in done.stdout, done.stdout
        assert good and good.keys() == read_json(str(path)).keys()
    damage(copy / "tokenizer/meta.json", DAMAGES[kind])
    before = (copy / "tokenizer/vocab.tiktoken").read_bytes()
    done = run(copy, "chat_cli.py", "-p", "hi", check=False)
    assert done.returncode == 1 and "tokenizer is broken" in done.stderr and len(done.stderr.splitlines()) == 1
    done = run(copy, "tok_train.py", "--vocab_size=300")
    assert "damaged, so the tokenizer is trained again" in done.stdout
    [aside] = copy.glob("tokenizer.damaged-*")
    assert (aside / "vocab.tiktoken").read_bytes() == before


def test_changed_knobs_and_what_they_make_stale_are_named_at_once(copy):
    done = run(copy, *STAGES["mid"], "--assistant_name=Bob", "--identity_rows=60", "--resume=1", check=False)
    mid, sft = copy / FOLDER["mid"], copy / FOLDER["sft"]
    for words in ("assistant_name='Ada', identity_rows=50", "assistant_name='Bob', identity_rows=60", "--model_tag=NEW"):
        assert words in done.stderr
    command = f"mv {mid} {mid}.old && mv {sft} {sft}.old"
    assert done.returncode == 1 and command in done.stderr and len(done.stderr.splitlines()) == 1
    os.rename(mid, f"{mid}.old")                        # half of it: the chat still finds its model, and says so
    done = run(copy, "chat_cli.py", "-p", "hi", "--max_tokens=2")
    assert f"it came from a mid model of step 20 in {mid}, where none is now" in done.stderr
    shutil.copytree(f"{mid}.old", mid)
    done = run(copy, *STAGES["sft"], "--identity_rows=3", "--resume=1", check=False)
    assert "trained with identity_rows=1000" in done.stderr, "the parent is there again"
    done = run(copy, "chat_cli.py", "-i", "mid")
    assert "d1, step 20" in done.stderr and "came from" not in done.stderr, "d1.old beside it is in nobody's way"


def test_a_second_variant_stands_beside_the_first(copy):
    fewer = [arg for arg in STAGES["sft"] if "num_iter" not in arg] + ["--num_iterations=2", "--model_tag=try"]
    run(copy, *fewer)
    meta = json.loads((copy / "chatsft_checkpoints/try/meta_000002.json").read_text())
    assert meta["tag"] == "try" and meta["source"]["tag"] == "d1" and (copy / FOLDER["sft"]).exists()
    assert "try, step 2" in run(copy, "chat_cli.py", "--model_tag=try").stderr
    run(copy, "report.py", "--model_tag=try", "--copy_to=")
    assert "Pretraining" in (copy / "report/try.md").read_text(), "the report follows a model to what it came from"


def test_edited_code_is_said_wherever_old_weights_meet_it(trained, tmp_path):
    shutil.copytree(ROOT, tmp_path / "code", ignore=shutil.ignore_patterns(".*", "rustbpe", "report*"))
    model = tmp_path / "code/model.py"
    old = model.read_text()

    def said(text, *argv):
        model.write_text(text)
        done = subprocess.run([sys.executable, *argv], cwd=tmp_path / "code", capture_output=True, text=True,
                              env=dict(os.environ, NANOCHAT_BASE_DIR=str(trained)))
        assert done.returncode == 0, done.stderr
        return "model.py changed since" in done.stdout + done.stderr

    new = old.replace("relu_squared(self.c_fc(x))", "F.gelu(self.c_fc(x))")
    comment = old.replace("class MLP", "# a remark\nclass MLP").replace('"""Two layers', '"""Both layers')
    assert old != new and old != comment
    assert said(new, *STAGES["base"], "--resume=1") and not said(comment, *STAGES["base"], "--resume=1")
    assert said(new, "chat_cli.py", "-p", "hi", "--max_tokens=2")
    assert not said(comment, "chat_cli.py", "-p", "hi", "--max_tokens=2")


def test_a_tokenizer_that_is_gone_is_not_to_be_made_again(copy):
    os.rename(copy / "tokenizer", copy / "elsewhere")
    done = run(copy, "chat_cli.py", "-p", "hi", check=False)
    assert done.returncode == 1 and "copy the tokenizer/ folder that belongs to" in done.stderr


def test_a_divergence_stops_before_the_weights_are_touched(copy):
    shutil.rmtree(copy / FOLDER["base"])
    done = run(copy, *STAGES["base"], "--matrix_lr=1e38", "--save_every=1", check=False)
    assert done.returncode == 1 and "diverged" in done.stderr and "Traceback" not in done.stderr
    steps = steps_in(copy / FOLDER["base"])
    assert re.search(rf"^step {steps[-1]}, rows {8 * steps[-1]} to {8 * steps[-1] + 7} of the data: loss nan", done.stderr)
    assert f"the checkpoint of step {steps[-1]} is from before: go on from it with --resume=1" in done.stderr
    saved = sorted(name for name in os.listdir(copy / FOLDER["base"]) if name.startswith("model"))
    assert all(torch.isfinite(w).all() for name in saved for w in torch.load(copy / FOLDER["base"] / name).values())


def test_a_divergence_before_the_first_checkpoint_does_not_speak_of_one(tmp_path):
    require_finite(tmp_path, 3, 8, 2.0, 0.5)
    for loss, norm in ((float("nan"), 1.0), (1.0, float("inf"))):
        with pytest.raises(SystemExit, match="step 3, rows 24 to 31 of the data.*no checkpoint is there yet: begin anew"):
            require_finite(tmp_path, 3, 8, loss, norm)


def test_the_launcher_hands_every_flag_on(tmp_path, port):
    with open(os.path.join(ROOT, "pipeline.sh"), encoding="utf-8") as f:
        launch = f.read().partition("# every command is shown")[2].partition("# the same question")[0]
    script = tmp_path / "script.py"
    script.write_text("import sys; print(sys.argv[1:], flush=True)")
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    for processes, machines in ((1, 1), (2, 1), (1, 2)):
        started = [subprocess.Popen(["bash", "-c", f"#{launch}launch {script} --run= --resume=1; run echo once"], text=True,
                                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                    env=dict(os.environ, NPROC=str(processes), NNODES=str(machines), NODE_RANK=str(rank),
                                             MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), PATH=path))
                   for rank in range(machines)]
        said = "".join(one.communicate()[0] for one in started)
        assert said.count("['--run=', '--resume=1']") == processes * machines and said.count("\nonce") == 1, said


@pytest.mark.parametrize("command, variables, words", [
    (["bash", "run_realistic.sh"], dict(CONFIG="huge"), "CONFIG=huge: must be"),
    (["bash", "run_single_a100.sh"], dict(CONFIG="huge"), "CONFIG=huge: must be"),
    (["bash", "run_realistic.sh"], dict(BASE_ITERATION="5"), "did you mean BASE_ITERATIONS?"),
    (["bash", "run_realistic.sh"], dict(Config="demo"), "did you mean CONFIG?"),
    (["bash", "run_realistic.sh"], dict(DEPHT="3"), "did you mean DEPTH?"),
    (["bash", "run_realistic.sh"], dict(BASE_TAG="none", PLAN="0"), "there is no base model of that name"),
    (["bash", "run_realistic.sh"], dict(NNODES="2", NODE_RANK="2", MASTER_ADDR="here"), "must be below that"),
    (["bash", "run_realistic.sh"], dict(NANOCHAT_BASE_DIR=__file__), "is a file"),
    (["bash", "run_realistic.sh", "--depth=4"], {}, "settings go in front"),
    (["bash", "pipeline.sh"], {}, "run: bash run_realistic.sh"),
    ([sys.executable, "-S", "base_train.py"], {}, "source .venv/bin/activate"),
])
def test_a_mistake_on_the_command_line_is_one_line(command, variables, words):
    env = {name: value for name, value in os.environ.items() if name != "CONFIG"} | dict(PLAN="1") | variables
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_the_drivers_say_their_settings_and_run_however_they_are_called():
    env = {name: value for name, value in os.environ.items() if name != "HOME"} | dict(PLAN="1", CONFIG="demo", DEPTH="4")
    for command in (["sh", "run_realistic.sh"], ["./run_realistic.sh"]):
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and "settings: CONFIG=demo DEPTH=4" in done.stdout and "plan: d4" in done.stdout, done.stderr


@pytest.mark.parametrize("given, folder", [("~/a b/ü", "/home/x/a b/ü"), ("/a b/~/c", "/a b/~/c"), ("", "/home/x/.cache/nanochat"),
                                           ("a b/c", "/tmp/a b/c")])
def test_the_drivers_take_a_folder_as_the_stages_do(given, folder):
    with open(os.path.join(ROOT, "pipeline.sh"), encoding="utf-8") as f:
        part = f.read().partition("# its own tokenizer")[2].partition("# what plan.py needs")[0]
    env = dict(os.environ, HOME="/home/x", OLDPWD="/tmp", CONFIG="demo", NANOCHAT_BASE_DIR=given, BASE_TAG="d2", MODEL_TAG="d2")
    code = f'#{part}\nexec {sys.executable} -c "from plumbing.common import BASE_DIR; import os; print(BASE_DIR, os.environ[\'NANOCHAT_BASE_DIR\'])"'
    assert subprocess.check_output(["bash", "-euc", code], cwd=ROOT, env=env, text=True) == f"{folder} {folder}\n"


def test_a_base_run_never_goes_on_with_another_tokenizer(copy):
    for name in os.listdir(copy / FOLDER["base"]):
        if "000020" in name:
            os.remove(copy / FOLDER["base"] / name)
    run(copy, "-c", "from tokenizer import *; from plumbing.common import base_path; "
        "Tokenizer([bytes([i]) for i in range(256)] + [b'ab', b'cd', b'ef', b'gh', b'ij']).save(base_path('tokenizer'), {})")
    done = run(copy, *STAGES["base"], "--resume=1", check=False)
    assert done.returncode == 1 and "another tokenizer" in done.stderr and "Traceback" not in done.stderr


def test_a_stage_does_not_start_from_an_unfinished_one(copy):
    os.remove(copy / FOLDER["base"] / "meta_000020.json")
    shutil.rmtree(copy / FOLDER["mid"])
    done = run(copy, *STAGES["mid"], check=False)
    assert done.returncode == 1 and "step 10 of 20" in done.stderr


def test_a_full_disk_while_saving_is_one_line_and_leaves_the_checkpoint_before(tmp_path):
    code = """
import resource, torch
from checkpoint import save_tensors
save_tensors(FOLDER + "/model.pt", torch.ones(10))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))      # like a disk that fills up
save_tensors(FOLDER + "/model.pt", torch.ones(1_000_000))
""".replace("FOLDER", repr(str(tmp_path)))
    done = run(tmp_path, "-c", code, check=False)
    assert done.returncode == 1 and "File too large" in done.stderr and "enforce fail" not in done.stderr.splitlines()[-1]
    assert os.listdir(tmp_path) == ["model.pt"] and torch.equal(torch.load(tmp_path / "model.pt"), torch.ones(10))
