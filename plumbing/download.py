"""
One file from the network: resumed, verified, and under its final name only when it is whole.

in    an address, a path, and a function that looks at what has arrived
out   the file; <path>.part while it is on its way

HF_ENDPOINT stands in for https://huggingface.co, NANOCHAT_MIRROR for every other host.
"""
import contextlib
import fcntl
import os
import re
import time

import pyarrow as pa
import pyarrow.parquet as pq
import requests

from plumbing.common import HF_ENDPOINT, MIRROR, fingerprint

HUB = "https://huggingface.co"
TIMEOUT = (10, 60)               # seconds to connect, seconds without a byte
PAUSES = (1, 2, 4, 8, 16, 32)    # seconds before each further try: about a minute in all
# What may pass by itself: no connection, silence, a body cut short.
TRANSPORT_ERRORS = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


class Again(Exception):
    """Worth another try: (what happened, seconds the server asks to wait or 0)."""


def download(url, path, problem_with=None):
    """
    Fetch url to path; a good file that is already there costs milliseconds.

    url: the real address; HF_ENDPOINT and NANOCHAT_MIRROR are applied here
    problem_with: path -> what is wrong with the file, "" for nothing (default: *.parquet must open)
    returns the number of bytes fetched, 0 when nothing had to be
    raises SystemExit with one line; what has arrived stays in <path>.part and is resumed
    """
    problem_with = problem_with or (problem_with_parquet if path.endswith(".parquet") else lambda _: "")
    if os.path.exists(path):
        if not (problem := problem_with(path)):
            return 0
        print(f"{path}: {problem}; fetching it again", flush=True)
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with locked(f"{path}.part") as f:
            if os.path.exists(path) and not problem_with(path):      # another process was faster
                return 0
            before = f.tell()
            fetch_patiently(mirrored(url), f, problem_with)
            os.fsync(f.fileno())
            os.replace(f.name, path)
            return max(os.path.getsize(path) - before, 1)
    except requests.RequestException as error:              # such as an address that is none
        raise SystemExit(f"{mirrored(url)}: {type(error).__name__}: {error}") from None
    except OSError as error:                                # no space, no permission
        raise SystemExit(f"{path}: {error.strerror or error}; free some disk space or set another "
                         "NANOCHAT_BASE_DIR, then run the same command again") from None


def mirrored(url):
    """Where url is fetched from: the hub's endpoint, or below the mirror by host and path."""
    if url.startswith(f"{HUB}/"):
        return HF_ENDPOINT + url[len(HUB):]
    if not MIRROR or url.startswith((f"{MIRROR}/", f"{HF_ENDPOINT}/")):
        return url
    return f"{MIRROR}/{url.split('://', 1)[1]}"


@contextlib.contextmanager
def locked(part):
    """The file `part`, open for appending, while no other process or thread has it."""
    while True:
        f = open(part, "ab")
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{part}: another process is fetching it; waiting for that one", flush=True)
            fcntl.flock(f, fcntl.LOCK_EX)  # the kernel takes the lock back when a process dies
        # The one we waited for may have renamed its file: then ours is the finished one, and
        # writing to it would spoil it. Open again until the name and the lock belong together.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(f.fileno()), os.stat(part)):
                break
        f.close()
    with f:
        f.seek(0, os.SEEK_END)
        try:
            yield f
        finally:
            if os.path.exists(part) and os.path.getsize(part) == 0:
                os.remove(part)            # nothing came


def fetch_patiently(url, f, problem_with):
    """Fill f until it is whole and right; what may pass by itself gets more tries."""
    name, spoiled = os.path.basename(f.name)[:-len(".part")], 0
    for pause in (*PAUSES, None):
        try:
            sha256 = fetch(url, f)
            if not (problem := problem_with_bytes(f.name, sha256) or problem_with(f.name)):
                return
            f.truncate(f.seek(0))          # no part of it can be trusted
            spoiled += 1
            if spoiled == 2:
                raise SystemExit(f"{name}: {problem}, twice over; {url} serves another file than expected, check "
                                 "HF_ENDPOINT and NANOCHAT_MIRROR")
            raise Again(problem, 0)
        except TRANSPORT_ERRORS as error:
            reason, asked = type(error).__name__, 0
        except Again as error:
            reason, asked = error.args
        if pause is None:
            raise SystemExit(f"{name}: not fetched from {url} after {len(PAUSES) + 1} tries "
                             f"({reason}); is the network up? The same command goes on from here")
        pause = max(pause, asked)
        print(f"{name}: {reason}; next try in {pause} s", flush=True)
        for left in range(pause, 0, -20):  # touched, so that a waiting trainer sees we are alive
            os.utime(f.name)
            time.sleep(min(left, 20))


def fetch(url, f):
    """
    One request: append to f what is missing of url.

    returns the file's sha256 as the hub states it (64 hex), or ""
    raises Again or TRANSPORT_ERRORS: worth another try; SystemExit: not
    """
    start = f.tell()
    headers = {"Accept-Encoding": "identity"}     # not packed, so that the lengths mean the file
    if start:
        headers["Range"] = f"bytes={start}-"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        status, said = response.status_code, response.headers
        if status in (408, 429) or status >= 500:
            asked = said.get("Retry-After", "")
            raise Again(f"status {status}", int(asked) if asked.isdigit() else 0)
        if status not in (200, 206, 416):
            raise SystemExit(f"{url}: status {status} {response.reason}; check the address, HF_ENDPOINT and "
                             "NANOCHAT_MIRROR")
        if "text/html" in said.get("Content-Type", ""):
            raise SystemExit(f"{url}: a web page came instead of the file (a login page or a proxy?)")
        resumed = said.get("Content-Range", "").startswith(f"bytes {start}-")
        if not (start and status == 206 and resumed):
            start = 0                             # the server sends the whole file: start over
            f.truncate(f.seek(0))
        if status == 416 or (status == 206 and not resumed):
            raise Again("what was here does not fit the file there", 0)
        for chunk in response.iter_content(1 << 18):
            f.write(chunk)
        f.flush()
        length = said.get("Content-Length", "")
        if length.isdigit() and f.tell() != start + int(length):
            raise Again(f"cut after {f.tell()} of {start + int(length)} bytes", 0)
        # the hub says it on its redirect to the storage, a mirror on the answer itself
        etags = [answer.headers.get("X-Linked-Etag", "").strip('"') for answer in (*response.history, response)]
    return next((etag for etag in etags if re.fullmatch("[0-9a-f]{64}", etag)), "")


def problem_with_bytes(path, sha256):
    """What is wrong with the bytes, whatever their format; "" for nothing."""
    with open(path, "rb") as f:
        head = f.read(512)
    if not head:
        return "nothing came"
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page"
    return "its sha256 is not the hub's" if sha256 and fingerprint(path)[1] != sha256 else ""


def problem_with_parquet(path):
    """What is wrong with a parquet file as far as its two ends tell, "" for nothing."""
    with contextlib.suppress(pa.ArrowException, OSError), open(path, "rb") as f:
        pq.read_metadata(path)                    # the index, at the end of the file
        if f.read(4) == b"PAR1":                  # a resumed part of another file does not begin so
            return ""
    return "no whole parquet file"
