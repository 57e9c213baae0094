"""
A training run while it goes on, and after: read from its log.jsonl as that grows.

reads   <stage>_checkpoints/<model_tag>/{log.jsonl,meta_NNNNNN.json}, and whether the trainer's lock is held
"""
import contextlib
import os
import re
import zlib

from checkpoint import FOLDERS, read_meta
from plumbing.common import Ema, base_path, log_row, names_in
from plumbing.stop import is_at_work

MOST_ROWS = 5000               # in an answer; who wants more asks again
TAIL = 1 << 15                 # bytes: about a hundred rows


def runs():
    """What is trained or was trained: a list of dicts, the one that has logged last first."""
    found = []
    for stage, parent in FOLDERS.items():
        for tag in names_in(base_path(parent)):
            folder, path = base_path(parent, tag), base_path(parent, tag, "log.jsonl")
            with contextlib.suppress(OSError):                 # no folder of a run, or just moved away
                found.append(dict(id=f"{stage}/{tag}", stage=stage, tag=tag, running=is_at_work(folder),
                                  # steps done: a row with ms is that of a step, from 0 on
                                  step=max((row["step"] + ("ms" in row) for row in last_rows(path)), default=0),
                                  num_iterations=total_steps(folder), updated=os.path.getmtime(path)))
    return sorted(found, key=lambda run: -run["updated"])


def rows_after(folder, cursor):
    """
    The rows that the log in a run's folder has got since a cursor was handed out, "" = all, with a new cursor: a dict.

    A cursor says how many bytes have been read, and a checksum of the last of them: a run that is resumed writes its log
    anew, without the steps after its checkpoint, and what was read before no longer holds.
    raises  FileNotFoundError where there is no log
    """
    path, rows, restarted = os.path.join(folder, "log.jsonl"), [], False
    with open(path, "rb") as f:
        said = re.match(r"\d{1,18}(?=-)", cursor)
        offset = int(said[0]) if said else 0
        if cursor and cursor != cursor_at(f, offset):
            offset, restarted = 0, True
        f.seek(offset)
        for line in f:
            if not line.endswith(b"\n") or len(rows) == MOST_ROWS:       # half a row is still being written
                break
            offset += len(line)
            row = log_row(line)
            rows += [row] if row else []
        cursor = cursor_at(f, offset)
    running, total = is_at_work(folder), total_steps(folder)
    step_seconds, left = Ema(0.9), None                        # as the trainer reckons its eta
    for row in last_rows(path) if running and total else ():
        if isinstance(row.get("ms"), (int, float)):
            left = step_seconds.update(row["ms"] / 1000) * (total - row["step"] - 1)
    return dict(rows=rows, cursor=cursor, restarted=restarted, running=running, num_iterations=total, seconds_left=left)


def cursor_at(f, offset):
    """The cursor of a reader who has had so many bytes of a file."""
    f.seek(max(0, offset - 200))
    return f"{offset}-{zlib.crc32(f.read(min(offset, 200))):08x}"


def last_rows(path):
    """The last rows of a log."""
    with open(path, "rb") as f:
        f.seek(max(0, os.path.getsize(path) - TAIL))
        return [row for row in map(log_row, f.read().split(b"\n")) if row]


def total_steps(folder):
    """How many steps the run has: its log begins with that; None if it is not known."""
    with open(os.path.join(folder, "log.jsonl"), "rb") as f:
        said = (log_row(f.readline()) or {}).get("num_iterations")
    return said if isinstance(said, int) else read_meta(folder).get("num_iterations")
