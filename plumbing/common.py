"""
Small things every stage shares: where files live, the environment, atomic files, logs, the progress line.

No torch here, so that the scripts which only move text start at once.
"""
import ast
import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import io
import json
import math
import os
import re
import shutil
import statistics
import threading
import tokenize
from collections import deque
from dataclasses import dataclass

# The environment is read here and nowhere else.
BASE_DIR = os.path.expanduser(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat")
HF_ENDPOINT = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
MIRROR = (os.environ.get("NANOCHAT_MIRROR") or "").rstrip("/")   # fetches <url>/<host>/<path>
RANK = int(os.environ.get("RANK", 0))                            # torchrun sets these three
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
if os.path.exists(BASE_DIR) and not os.path.isdir(BASE_DIR):
    raise SystemExit(f"NANOCHAT_BASE_DIR={BASE_DIR}: is a file; it must be a folder, which is made where there is none")
WANDB_IS_SET_UP = "WANDB_API_KEY" in os.environ or "WANDB_MODE" in os.environ

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# the code that makes conversations, and with it what mid-training and fine-tuning learn
TASK_CODE = ("tokenizer.py", "data.py", *sorted(f"tasks/{name}" for name in os.listdir(os.path.join(ROOT, "tasks"))
                                                if re.fullmatch(r"\w+\.py", name)))


@functools.cache
def code_hash(name):
    """16 hex digits for the code in a file of ours, as it is when first asked for; without comments and docstrings."""
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        text = f.read()
    lines = text.splitlines()
    for kind, _, (row, column), _, _ in tokenize.generate_tokens(io.StringIO(text).readline):
        if kind == tokenize.COMMENT:
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            first, last = node.body[0].lineno, node.body[0].end_lineno
            lines[first - 1:last] = [""] * (last - first + 1)
    # the text and not the syntax tree, which one version of Python writes otherwise than the next
    return hashlib.sha256("\n".join(line.rstrip() for line in lines if line.strip()).encode()).hexdigest()[:16]


def base_path(*parts):
    """A path below the folder that holds every artifact (NANOCHAT_BASE_DIR)."""
    return os.path.join(BASE_DIR, *parts)


def names_in(folder):
    """The names in a folder; none where there is no such folder."""
    return os.listdir(folder) if os.path.isdir(folder) else []


def print0(*args):
    """print, on the first rank only."""
    if RANK == 0:
        print(*args, flush=True)


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """
    A file that appears under its name only when it is complete.

    Written to a temporary name beside it, flushed to the disk, then renamed, which the file system does in one move.
    On any error the temporary file goes and an older file stays; a full disk is a SystemExit, as is any other error of
    the disk. What a writer of this path has left that was killed goes too: who still writes holds a lock.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        for left in glob.glob(f"{glob.escape(path)}.*.tmp"):
            with contextlib.suppress(OSError), open(left, "rb") as f:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.remove(left)
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as f:
            with contextlib.suppress(OSError):                   # a file system without locks
                fcntl.flock(f, fcntl.LOCK_EX)
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync(os.path.dirname(path) or ".")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SystemExit(f"{path}: the disk is full; free some space and run again") from None
        raise SystemExit(f"{path}: can't be written ({error}); run again where it can be") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def sync(path):
    """Wait until a file, or a folder's list of names, is on the disk; where a file system can't say, don't."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path, content):
    """A dict as a small JSON file, which carries a checksum of its own content."""
    with atomic_write(path, "w") as f:
        json.dump({**content, "checksum": checksum(content)}, f, indent=1)


def checksum(content):
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_json(path, remarks=None):
    """
    The dict in a small JSON file; {} where there is none, and where it is damaged, which one line says.

    Those of older versions carry no checksum and count as they are.
    remarks  a list that takes the line, for the report; None prints it, for what is made again at once
    """
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
        if isinstance(content, dict) and content.pop("checksum", None) in (None, checksum(content)):
            return content
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        pass
    if remarks is None:
        print0(f"{path}: damaged, so it is made again")
    else:
        remarks.append(f"`{os.path.relpath(path, base_path())}` is damaged and was left out.")
    return {}


def fingerprint(path):
    """[size in bytes, sha256] of a file; 0.1 s for a shard of text."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return [os.path.getsize(path), digest.hexdigest()]


def due(step, every, last):
    """Whether something that happens every so many steps happens now; 0 = only at the end."""
    return last or (every > 0 and step > 0 and step % every == 0)


@dataclass
class Ema:
    """Exponential moving average that is exact from the first value on: it divides by the weight it has seen so far."""
    beta: float
    total: float = 0.0
    weight: float = 0.0

    def update(self, x):
        self.total = self.beta * self.total + (1 - self.beta) * x
        self.weight = self.beta * self.weight + (1 - self.beta)
        return self.total / self.weight


class Log:
    """
    log.jsonl: one JSON object per line, the source of the report and of every curve.

    A resumed run drops what was logged from its first step on, so no step stands twice.
    With a run name the numbers also go to wandb, where that is installed.
    """

    def __init__(self, folder, start_step, run="", config=None):
        self.folder, self.file, self.wandb, self.unwritten, self.is_full = folder, None, None, b"", False
        if RANK != 0:
            return
        path = os.path.join(folder, "log.jsonl")
        kept = [row for row in read_log(folder) if row["step"] < start_step]
        with atomic_write(path, "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in kept)
        self.file = open(path, "ab", buffering=0)
        if not run:
            return
        try:
            import wandb
        except ImportError:
            print0(f"run={run}: wandb is not installed, so the run is logged to log.jsonl alone")
        else:                                # without a key it would ask for one; api_key: after `wandb login`
            mode = None if WANDB_IS_SET_UP or wandb.api.api_key else "offline"
            self.wandb = wandb.init(project="nanochat", name=run, config=config, mode=mode)

    def write(self, step, **row):
        """Append one row; a number that is not finite is written as null. On a full disk rows wait for the next one."""
        if self.file is None:
            return
        row = {"step": step} | {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.unwritten += (json.dumps(row) + "\n").encode()
        try:
            self.unwritten = self.unwritten[self.file.write(self.unwritten):]    # a disk that fills up takes a part
        except OSError as error:
            if not self.is_full:
                print0(f"{self.file.name}: can't be written ({error.strerror}); the training goes on, and what it logs is "
                       "kept until there is room")
            self.is_full = True
        if self.wandb:
            self.wandb.log(row)


def log_row(line):
    """The row that a line of log.jsonl holds, a dict with a step; None where it holds none. What is no number is None in it."""
    with contextlib.suppress(ValueError, RecursionError):
        row = json.loads(line, parse_constant=lambda name: None)
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return row


def read_log(folder, remarks=None):
    """
    The rows of a stage's log.jsonl, [] where there is none; damaged ones are left out, and one line says how many.

    remarks  a list that takes the line; None prints it. Of a last row that a crash cut short nothing is said.
    """
    rows, damaged, path = [], 0, os.path.join(folder, "log.jsonl")
    try:
        with open(path, "rb") as f:
            for line in f:
                row = log_row(line)
                rows += [row] if row else []
                damaged += not row and line.endswith(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:                                     # says nothing about what is in it
        raise SystemExit(f"{path}: can't be read ({error.strerror}); run again when it can be") from None
    if damaged:
        line = f"{os.path.relpath(path, base_path())}: {damaged} damaged row{'s' if damaged > 1 else ''} left out"
        if remarks is None:
            print0(line)
        else:
            remarks.append(f"{line}.")
    return rows


def standard_error(right, total):
    """Of the share right / total; one more of each kind is assumed, or 18 of 18 would be a certainty."""
    share = (right + 1) / (total + 2)
    return math.sqrt(share * (1 - share) / total)


class Progress:
    """
    The line per step on the console and in the log: loss, speed, MFU, how long it still takes.

    quantity          what is learned from, instead of the loss: "reward"
    state             what an earlier part of the run saved (its meta's "progress"); None at step 0
    checkpoint_bytes  what the next checkpoint takes of the disk
    Only training counts as seconds, evaluation and saving do not.
    """

    def __init__(self, log, start_step, total_steps, flops_per_token, peak_flops, state=None, checkpoint_bytes=0,
                 quantity="loss"):
        self.log, self.start_step, self.total_steps = log, start_step, total_steps
        self.checkpoint_bytes, self.recent, self.said, self.quantity = checkpoint_bytes, deque(maxlen=50), set(), quantity
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        state = state or dict(seconds=0.0, tokens=0, loss=[])
        self.seconds, self.tokens = state["seconds"], state["tokens"]
        self.loss, self.step_seconds = Ema(0.9, *state["loss"]), Ema(0.9)
        self.since_line = 0.0                                        # training seconds since the last line
        if start_step == 0:
            log.write(0, num_iterations=total_steps)                 # for who reads the log while it grows

    def state(self):
        return dict(seconds=self.seconds, tokens=self.tokens, loss=[self.loss.total, self.loss.weight])

    def update(self, step, loss, grad_norm, rates, num_tokens, step_seconds, **more):
        """
        Log optimizer step `step`, which took step_seconds for num_tokens tokens on all ranks.

        rates  learning rates by name, as muon.set_schedule has set them; more: other numbers for the log
        """
        self.seconds += step_seconds
        self.tokens += num_tokens
        speed = num_tokens / step_seconds
        mfu = speed * self.flops_per_token / (self.peak_flops * WORLD_SIZE) if self.peak_flops else None
        self.log.write(step, **{self.quantity: loss}, **more, **rates, grad_norm=grad_norm, ms=1000 * step_seconds,
                       tokens_per_second=speed, mfu=mfu, seconds=self.seconds)
        smooth, left = self.loss.update(loss), self.total_steps - step - 1
        eta = self.step_seconds.update(step_seconds) * left
        self.since_line += step_seconds
        if step == self.start_step:
            print0("lr below: of the matrices / the token table / the output head")
        if step < self.start_step + 5 or self.since_line > 1 or left == 0:   # of fast steps one a second
            self.since_line = 0.0
            rates_text = " / ".join(f"{rate:.2g}" for rate in rates.values())
            print0(f"step {step:5d}/{self.total_steps} | {self.quantity} {smooth:.4f} | lr {rates_text} | "
                   f"{1000 * step_seconds:.0f} ms | {speed:,.0f} tok/s | " +
                   (f"mfu {100 * mfu:.1f} % | " if mfu else "") + f"eta {duration(eta)}")
        self.watch(step, loss, step_seconds)

    def watch(self, step, loss, step_seconds):
        """Say, each once, what a person at the screen would notice: a full disk, a loss that jumps, a slow step."""
        remarks, folder = {}, self.log.folder
        saving = any(thread.name == "checkpoint" for thread in threading.enumerate())     # then the oldest will go
        if not saving and os.path.isdir(folder) and (free := shutil.disk_usage(folder).free) < self.checkpoint_bytes:
            remarks["disk"] = (f"{free / 1e6:,.0f} MB are free in {folder}, the next checkpoint needs about "
                               f"{self.checkpoint_bytes / 1e6:,.0f} MB: make room, or it can't be saved")
        if len(self.recent) >= 20:
            losses, seconds = zip(*self.recent)
            mean, median, spread = statistics.fmean(losses), statistics.median(seconds), max(losses) - min(losses)
            if self.quantity == "loss" and loss > max(losses) + max(0.5, spread):
                remarks["loss"] = (f"loss {loss:.2f}, far above the mean {mean:.2f} of the steps before: odd text; or, if "
                                   "it does not fall again, learning rates that are too high")
            if step_seconds > max(1.0, 10 * median):             # below a second it is the machine's mood
                remarks["speed"] = (f"{duration(step_seconds)}, the median is {1000 * median:,.0f} ms: does another "
                                    "program use this machine, or is its memory full?")
        for kind in remarks.keys() - self.said:
            print0(f"step {step:5d}: {remarks[kind]}")
        self.said |= remarks.keys()
        self.recent.append((loss, step_seconds))


def duration(seconds):
    """75 -> '1m15s', for people."""
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds % 60:02d}s" if minutes else f"{seconds}s"
