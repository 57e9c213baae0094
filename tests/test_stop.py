"""
A run that is told to stop, loses its reader or meets another: what is trained is saved, and what goes on is the same run.
"""
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT
from plumbing.common import fingerprint

RUN = ["--dtype=float32", "--device=cpu", "--num_iterations=60", "--eval_every=25", "--eval_tokens=1024", "--final_eval_tokens=1024",
       "--save_every=40"]
STAGES = dict(
    base=["base_train.py", *RUN, "--depth=1", "--head_dim=32", "--max_seq_len=64", "--total_batch_size=512",
          "--sample_every=40", "--core_metric_every=0"],
    mid=["mid_train.py", *RUN, "--embedded=1", "--assistant_name=Ada", "--spelling_rows=200", "--spelling_bee_rows=20",
         "--identity_rows=50"],
    sft=["chat_sft.py", *RUN[:4], RUN[-1], "--embedded=1", "--target_examples_per_step=8", "--spelling_rows=100",
         "--spelling_bee_rows=20", "--eval_metrics_max_problems=1", "--eval_metrics_every=40", "--eval_examples=8"])
FOLDER = dict(base="base_checkpoints/d1", mid="mid_checkpoints/d1", sft="chatsft_checkpoints/d1")
SIGNALS = dict(INT=130, TERM=143, HUP=129)


def begin(base_dir, *argv, rank=0, world_size=1, port=0, program=sys.executable):
    """Start a program of ours, its output in one pipe."""
    env = dict(os.environ, NANOCHAT_BASE_DIR=str(base_dir), OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1", RANK=str(rank),
               LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
               PATH=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
    return subprocess.Popen([program, *argv], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def read_up_to(process, words):
    """What it says up to the first line with these words."""
    said = ""
    for line in process.stdout:
        said += line
        if words in line:
            time.sleep(0.1)                                      # a signal in the middle of a print may double its line
            return said
    raise AssertionError(f"it never said {words!r}:\n{said}")


def end(process, seconds=60):
    """(exit code, what it has still said) of a process that ends within so many seconds."""
    said, _ = process.communicate(timeout=seconds)
    return process.returncode, said


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base folder in which all three stages have run without a disturbance."""
    base_dir = tmp_path_factory.mktemp("trained")
    code = """
import random
from data import shard_path, VAL_SHARD, write_shard
from tokenizer import Tokenizer
from plumbing.common import base_path
rng = random.Random(0)
text = lambda: " ".join(rng.choices("the a cat dog sees hears and or red green house tree runs".split(), k=rng.randint(5, 60)))
write_shard(shard_path(0), [text() for _ in range(200)])
write_shard(shard_path(VAL_SHARD), [text() for _ in range(30)])
Tokenizer([bytes([i]) for i in range(256)] + [b"th", b"he", b"re", b"at", b"in"]).save(base_path("tokenizer"), {})
"""
    for argv in (["-c", code], *STAGES.values()):
        code, said = end(begin(base_dir, *argv), 200)
        assert code == 0, said
    return base_dir


@pytest.fixture
def copy(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"


def require_same_end(trained, copy, stage):
    for name in (f"model_{60:06d}.pt", f"optim_{60:06d}_rank0.pt"):
        assert fingerprint(copy / FOLDER[stage] / name) == fingerprint(trained / FOLDER[stage] / name)


@pytest.mark.parametrize("stops", [1, pytest.param(25, marks=pytest.mark.full)])
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_stopped_at_random_moments_is_the_same_run(trained, copy, stage, stops):
    rng, last, stopped = random.Random(f"{stage} {stops}"), 60, 0
    for stop in range(stops):
        if last == 60 or (copy / FOLDER[stage] / f"meta_{60:06d}.json").exists():          # at its end: once more
            require_same_end(trained, copy, stage)
            shutil.rmtree(copy / FOLDER[stage])
            last = 0
        process = begin(copy, *STAGES[stage], "--resume=1")
        said = read_up_to(process, "| loss ") if last == 0 or rng.random() < 0.8 else ""     # else somewhere in the start
        time.sleep(rng.uniform(0, 1 / stops) if said else rng.uniform(0.3, 3))
        how = rng.choice([*SIGNALS, "PIPE"])
        if how == "PIPE":
            process.stdout.close()                               # as `| head` does
            code, said = process.wait(200), ""
        else:
            process.send_signal(getattr(signal, f"SIG{how}"))
            code, said = end(process, 200)
        told = SIGNALS.get(how, 141)
        assert code in (0, told, 128 - told) and "Traceback" not in said, said     # 0: it was at its end; or just after that
        if match := re.search(r"stopped at step (\d+), saved; the same command goes on", said):
            assert int(match[1]) > last
            last, stopped = int(match[1]), stopped + 1
    print(f"{stage}: stopped {stopped} times in the loop, last at step {last}")
    assert stopped > stops // 3 or stops == 1
    code, said = end(begin(copy, *STAGES[stage], "--resume=1"), 300)
    assert code == 0, said
    require_same_end(trained, copy, stage)


@pytest.mark.parametrize("name, code", SIGNALS.items())
def test_a_signal_before_the_loop_is_one_line(trained, copy, name, code):
    process = begin(copy, "base_eval.py", "--model_tag=d1")
    read_up_to(process, "model_tag")                             # torch is imported now
    process.send_signal(getattr(signal, f"SIG{name}"))
    ended, said = end(process)
    assert ended == code and said.splitlines()[-1] == "stopped" and "Traceback" not in said


def test_a_library_that_swallows_the_stop_only_delays_it(tmp_path):
    process = begin(tmp_path, "-c", "import time; from plumbing import stop; stop.listen()\ntry:\n  print('here', flush=True)\n"
                    "  time.sleep(60)\nexcept BaseException: time.sleep(60)")
    read_up_to(process, "here")
    process.send_signal(signal.SIGTERM)
    assert end(process, 20) == (143, "stopped\n")


def test_an_evaluation_is_cut_short_and_the_loop_goes_on_to_its_save(tmp_path):
    code = ("import time; from plumbing import stop; stop.listen(); stop.finish_steps()\nwith stop.cut_short():\n"
            "  print('evaluating', flush=True)\n  time.sleep(60)\ntime.sleep(4)\nprint('saved', stop.asked)")
    process = begin(tmp_path, "-c", code)
    read_up_to(process, "evaluating")
    process.send_signal(signal.SIGTERM)
    assert end(process, 20) == (0, "stopping after this step; once more to leave at once\nsaved 15\n")


LOOP = """
import time
from plumbing import stop
stop.listen(); stop.finish_steps()
print("loop", flush=True)
while not stop.asked or time.monotonic() - stop.asked_at < 3: time.sleep(0.1)
print("saved")
"""


@pytest.mark.parametrize("pause, saves", [(0.1, True), (1.2, False)])
def test_a_second_signal_leaves_at_once_unless_it_is_the_first_by_another_way(tmp_path, pause, saves):
    process = begin(tmp_path, "-c", LOOP)
    read_up_to(process, "loop")
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(pause)
    code, said = end(process)
    assert ("saved" in said) == saves and code == (0 if saves else 143)


def test_a_closed_pipe_ends_every_print_quietly(tmp_path):
    code = "import time; from plumbing import stop; stop.listen()\nwhile True: print('a line'); time.sleep(0.01)"
    done = subprocess.run(f"{{ {sys.executable} -c \"{code}\"; echo $? >&2; }} | head -n 3", shell=True, cwd=ROOT,
                          capture_output=True, text=True)
    assert done.stdout == "a line\n" * 3 and done.stderr == "141\n"


def test_a_letter_that_the_terminal_lacks_ends_no_run(tmp_path):
    code = "from plumbing import stop; stop.listen(); print('\\u2603', '\\udcff', flush=True)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, env=dict(os.environ, PYTHONIOENCODING="latin-1"))
    assert done.stdout == b"\\u2603 \\udcff\n" and not done.stderr


def test_the_process_beside_the_trainer_is_deaf_until_the_trainer_ends(tmp_path):
    code = ("import time; from plumbing.background import start_background\n"
            "print(start_background(time.sleep, 60).process.pid, flush=True)\ntime.sleep(60)")
    process = begin(tmp_path, "-c", code)
    child = int(process.stdout.readline())
    time.sleep(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(child, number)
    time.sleep(0.5)
    with open(f"/proc/{child}/stat") as f:
        assert f.read().split()[2] in "SR"
    process.kill()
    end(process, 5)                                              # the child held the pipe open


def test_a_second_trainer_is_refused_before_it_changes_anything(trained, copy):
    shutil.rmtree(copy / FOLDER["base"])
    argv = [*STAGES["base"], "--resume=1"]
    first = begin(copy, *argv, "--num_iterations=100000")
    read_up_to(first, "step ")
    before = set(os.listdir(copy / FOLDER["base"]))
    code, said = end(begin(copy, *argv, "--num_iterations=100000"))
    line = said.splitlines()[-1]
    assert code == 1 and f"process {first.pid} on" in line and "since 20" in line and "at work here" in line, said
    assert before <= set(os.listdir(copy / FOLDER["base"]))
    first.kill()
    first.wait()
    again = begin(copy, *argv, "--num_iterations=100000")        # the lock went with the process
    read_up_to(again, "step ")
    again.send_signal(signal.SIGTERM)
    assert end(again)[0] == 143


def test_without_locks_in_the_file_system_it_is_only_said(tmp_path):
    code = ("import fcntl; from plumbing import stop\ndef none(*_): raise OSError(38, 'Function not implemented')\n"
            "fcntl.flock = none; stop.only_one('PATH/d1.lock')".replace("PATH", str(tmp_path)))
    code, said = end(begin(tmp_path, "-c", code))
    assert code == 0 and "no lock to be had (Function not implemented)" in said


# ------------------------------------------------------------------------------- several ranks

def ranks(base_dir, port, *argv, patience=None):
    """Both ranks of base_train; patience: seconds that one waits for the other."""
    script = ["base_train.py"] if patience is None else ["-c", f"""
import runpy, sys; from datetime import timedelta; from plumbing import machine
machine.PATIENCE, sys.argv = timedelta(seconds={patience}), sys.argv[0:1] + sys.argv[1:]
runpy.run_path("base_train.py", run_name="__main__")"""]
    return [begin(base_dir, *script, *STAGES["base"][1:], *argv, rank=rank, world_size=2, port=port) for rank in (0, 1)]


def test_a_signal_to_one_rank_stops_all_at_the_same_step(copy, port):
    shutil.rmtree(copy / FOLDER["base"])
    two = ranks(copy, port, "--num_iterations=100000")
    read_up_to(two[0], "step ")
    two[1].send_signal(signal.SIGTERM)
    (code, said), (code_1, said_1) = map(end, two)
    assert (code, code_1) == (143, 143), said + said_1
    step = int(re.search(r"stopped at step (\d+), saved; the same command with --resume=1 goes on", said)[1])
    assert {f"{name}_{step:06d}{rest}" for name, rest in (("model", ".pt"), ("meta", ".json"), ("optim", "_rank0.pt"),
                                                         ("optim", "_rank1.pt"))} <= set(os.listdir(copy / FOLDER["base"]))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_gone_or_hangs_ends_the_other_in_one_line(copy, port, number):
    shutil.rmtree(copy / FOLDER["base"])
    two = ranks(copy, port, "--num_iterations=100000", patience=8)
    read_up_to(two[0], "step ")
    two[1].send_signal(number)
    code, said = end(two[0], 30)
    two[1].kill()
    end(two[1])
    assert code == 1 and said.count("another rank has ended") == 1 and "Traceback" not in said, said


@pytest.mark.full
@pytest.mark.parametrize("how", ["raise SystemExit(path + ': the disk is full')", "os.kill(os.getpid(), 9)"])
def test_a_rank_that_ends_in_a_save_beside_the_training_ends_the_other(copy, port, how):
    shutil.rmtree(copy / FOLDER["base"])
    code = f"""
import os, runpy, sys, checkpoint; from plumbing.common import RANK
real, sys.argv = checkpoint.save_tensors, ["base_train.py", *sys.argv[1:]]
def save(path, data):
    if RANK == 1 and "000080" in path: {how}
    real(path, data)
checkpoint.save_tensors = save
runpy.run_path("base_train.py", run_name="__main__")"""
    two = [begin(copy, "-c", code, *STAGES["base"][1:], "--num_iterations=100000", rank=rank, world_size=2, port=port) for rank in (0, 1)]
    (code, said), (code_1, said_1) = (end(process, 200) for process in two)
    assert (code, code_1) in ((1, 1), (1, -9)) and "Traceback" not in said + said_1
    assert said.count("another rank has ended") == 1 and "model_000040.pt" in said and "000080_rank1.pt: not there" in said
    assert (copy / FOLDER["base"] / "meta_000040.json").exists() and not (copy / FOLDER["base"] / "meta_000080.json").exists()


# ------------------------------------------------------------------------------- the driver

def part_of_the_driver(first, last):
    with open(os.path.join(ROOT, "pipeline.sh"), encoding="utf-8") as f:
        return f.read().partition(first)[2].partition(last)[0]


STAGE = """
import time
from plumbing import stop
from plumbing.common import RANK
stop.listen(); stop.finish_steps()
print("ready", RANK, flush=True)
while not stop.asked: time.sleep(0.05)
print("saved", RANK, flush=True)
raise SystemExit(128 + stop.asked)
"""


def driver(tmp_path, port, processes):
    (tmp_path / "stage.py").write_text(f"import sys; sys.path.insert(0, {ROOT!r}){STAGE}")
    signals = part_of_the_driver("# Ctrl-C, kill and a closed", "# before anything is downloaded")
    launch = part_of_the_driver("# every command is shown", "# the same question")
    values = f"NPROC={processes} NNODES=1 NODE_RANK=0 MASTER_ADDR= MASTER_PORT={port}"
    process = begin(tmp_path, "-c", f"set -euo pipefail; {values}\n#{signals}\n#{launch}launch {tmp_path}/stage.py; run echo next",
                    program="bash")
    for _ in range(processes):
        read_up_to(process, "ready")
    return process


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name, code", SIGNALS.items())
def test_the_driver_passes_a_signal_on_and_waits_for_the_stage(tmp_path, port, name, code, processes):
    process = driver(tmp_path, port, processes)
    process.send_signal(getattr(signal, f"SIG{name}"))
    ended, said = end(process, 20)
    assert ended == code and said.count("saved") == processes and "\nnext" not in said
    assert said.splitlines()[-1] == f"pipeline: ended with code {code}; the same command goes on"


def test_the_driver_ends_the_other_ranks_of_one_that_was_killed(tmp_path, port):
    process = driver(tmp_path, port, 2)

    def children(pid):
        return subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    found = [pid for launcher in children(process.pid) for pid in children(launcher)]
    os.kill(int(found[1]), signal.SIGKILL)
    ended, said = end(process, 20)
    assert ended == 137 and "ended with code 137; the same command goes on" in said and "\nnext" not in said
    assert not any(os.path.exists(f"/proc/{pid}") for pid in found)


def test_a_second_driver_is_refused_and_the_lock_goes_with_the_first(tmp_path):
    lock = part_of_the_driver("# one driver in a folder", 'if [ "$CONFIG" = tiny ]')
    code = f"set -e; export NANOCHAT_BASE_DIR={tmp_path} NODE_RANK=0\n#{lock}\necho mine; cat"
    first = subprocess.Popen(["bash", "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                             env=dict(os.environ, PATH=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]))
    assert first.stdout.readline() == "mine\n"
    ended, said = end(begin(tmp_path, "-c", code, program="bash"))
    assert ended == 1 and f"{tmp_path}: process {first.pid} on" in said and len(said.splitlines()) == 1
    first.kill()
    first.stdin.close()
    first.wait()
    time.sleep(0.2)                                              # cat has it open too, until it reads the end
    third = subprocess.run(["bash", "-c", code], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                           env=dict(os.environ, PATH=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]))
    assert third.stdout == "mine\n", third.stderr
