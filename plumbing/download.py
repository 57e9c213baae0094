"""
One file from the network: resumed, verified, and under its final name only when it is whole.

in    an address, a path, and a function that looks at what has arrived
out   the file, and its checksum in <path>.sha256 (sha256sum -c reads it);
      <path>.part while it is on its way, and in <path>.part.etag which version of the file that is

HF_ENDPOINT stands in for https://huggingface.co, NANOCHAT_MIRROR for every other host.
"""
import contextlib
import fcntl
import os
import re
import threading
import time
from concurrent import futures

import pyarrow as pa
import pyarrow.parquet as pq
import requests
import urllib3

from plumbing.common import HF_ENDPOINT, MIRROR, atomic_write, fingerprint

HUB = "https://huggingface.co"
CONNECT, WINDOW = 10, 60         # seconds to connect; seconds in which an answer begins, or LEAST bytes of it come
LEAST = 1 << 18                  # bytes that count as progress: 4 KB/s, a shard in 6 hours
PAUSES = (1, 2, 4, 8, 16, 32)    # seconds before each further try since the last progress: about a minute in all
LARGEST = 20e9                   # bytes; no file of ours comes near it, and a body that says no length may have no end
LONGEST_PAUSE = 300              # seconds; a server that asks for more is tried again then
# What may pass by itself: no connection, silence, a body cut short.
TRANSPORT_ERRORS = (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError)


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
            keep_checksum(f.name, path)
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
        except OSError:
            pass                           # a file system without locks
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
            if not os.path.exists(part) or os.path.getsize(part) == 0:       # it has its final name, or nothing came
                for name in (part, f"{part}.etag"):
                    with contextlib.suppress(FileNotFoundError):
                        os.remove(name)


def fetch_patiently(url, f, problem_with):
    """Fill f until it is whole and right; what may pass by itself gets more tries, counted since the last progress."""
    name, spoiled, furthest, tries = os.path.basename(f.name).removesuffix(".part"), 0, f.tell(), 0
    while True:
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
            cut = isinstance(error, urllib3.exceptions.ProtocolError)
            reason, asked = "the connection was cut" if cut else type(error).__name__, 0
        except Again as error:
            reason, asked = error.args
        here = f"{f.tell():,} bytes are here" if f.tell() else "nothing is here yet"
        tries += 1
        if f.tell() >= furthest + LEAST:
            furthest, tries = f.tell(), 0
        if tries > len(PAUSES):
            raise SystemExit(f"{name}: not fetched from {url}, {tries} tries without progress ({reason}); is the "
                             f"network up? {here}, the same command goes on")
        pause = max(PAUSES[max(tries - 1, 0)], asked)
        print(f"{name}: {reason}; {here}, next try in {pause} s", flush=True)
        for left in range(pause, 0, -20):  # touched, so that a waiting trainer sees we are alive
            os.utime(f.name)
            time.sleep(min(left, 20))


def fetch(url, f):
    """
    One request: append to f what is missing of url.

    returns the file's sha256 as the hub states it (64 hex), or ""
    raises Again or TRANSPORT_ERRORS: worth another try; SystemExit: not
    """
    start, version = f.tell(), version_of(f.name)
    headers = {"Accept-Encoding": "identity"}     # not packed, so that the lengths mean the file
    if start:
        headers["Range"] = f"bytes={start}-"
        if version:
            headers["If-Range"] = version         # where the file is another one by now, all of it comes
    with answer_to(url, headers) as response:
        status, said = response.status_code, response.headers
        if status in (408, 429) or status >= 500:
            asked = said.get("Retry-After", "")
            asked = int(asked[:9]) if re.fullmatch("[0-9]+", asked) else 0
            more = f", asks to wait {asked} s, which is too long" if asked > LONGEST_PAUSE else ""
            raise Again(f"status {status}{more}", min(asked, LONGEST_PAUSE))
        if status not in (200, 206, 416):
            raise SystemExit(f"{url}: status {status} {response.reason}; check the address, HF_ENDPOINT and "
                             "NANOCHAT_MIRROR")
        if "text/html" in said.get("Content-Type", ""):
            raise SystemExit(f"{url}: a web page came instead of the file (a login page or a proxy?)")
        if (packed := said.get("Content-Encoding") or "identity") != "identity":
            raise SystemExit(f"{url}: the server packs the file ({packed}) though it is asked not to; check "
                             "HF_ENDPOINT, NANOCHAT_MIRROR, or what is in between")
        etag = said.get("ETag", "")
        now = etag if etag and not etag.startswith("W/") else said.get("Last-Modified", "")
        span = re.fullmatch(rf"bytes {start}-[0-9]+/([0-9]+)", said.get("Content-Range", ""))
        resumed = status == 206 and span and (not version or now in ("", version))
        if not resumed:                           # the server sends the whole file: start over
            if start:
                print(f"{os.path.basename(f.name)}: {start:,} bytes thrown away, the server does not go on from there",
                      flush=True)
            f.truncate(f.seek(0))
            with open(f"{f.name}.etag", "w", encoding="latin-1") as g:
                g.write(now)
        if status == 416 or (status == 206 and not resumed):
            raise Again("what was here does not fit the file there", 0)
        receive(response, f)
        length = span[1] if resumed else said.get("Content-Length", "")
        if re.fullmatch("[0-9]{1,18}", length) and f.tell() != int(length):
            raise Again(f"cut after {f.tell()} of {length} bytes", 0)
    return stated_sha256([answer.headers for answer in (*response.history, response)])


def stated_sha256(answers):
    """The file's sha256 by the hub's headers, on its redirect to the storage or with the file; "" for none."""
    for said in answers:                          # another server's ETag may be 64 hex digits of anything
        etag = said.get("X-Linked-Etag") or (said.get("ETag", "") if "X-Repo-Commit" in said else "")
        if sha256 := re.fullmatch('(?:W/)?"?([0-9a-f]{64})"?', etag):
            return sha256[1]
    return ""


def version_of(part):
    """What the server called the file when `part` was begun (its ETag or date), "" where it called it nothing."""
    with contextlib.suppress(FileNotFoundError), open(f"{part}.etag", encoding="latin-1") as f:
        text = re.fullmatch("[!-~][ -~]*", f.read())     # what may stand in a header
        return text[0] if text else ""
    return ""


def answer_to(url, headers):
    """
    The answer to a request, read as far as its headers.

    These, too, may come a byte a second, or a redirect's page without end. The time limits of requests
    are for each piece, so a thread asks, which nobody waits for longer than CONNECT + WINDOW.
    """
    answer = futures.Future()

    def ask():
        try:
            answer.set_result(requests.get(url, headers=headers, stream=True, timeout=(CONNECT, WINDOW)))
        except ValueError as error:               # a redirect to what is no address; requests lets it through as it is
            answer.set_exception(requests.exceptions.InvalidURL(error))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.result(CONNECT + WINDOW)
    except futures.TimeoutError:
        raise Again(f"no whole answer within {CONNECT + WINDOW} s", 0) from None


def receive(response, f):
    """Append the body to f as it comes, so that a cut loses nothing; Again where it hardly comes at all."""
    since, had = time.monotonic(), f.tell()
    while block := response.raw.read1(LEAST, decode_content=False):
        f.write(block)
        f.flush()
        if f.tell() > LARGEST:
            f.truncate(0)
            raise SystemExit(f"{response.url}: over {LARGEST / 1e9:.0f} GB came and no end of it; check HF_ENDPOINT, "
                             "NANOCHAT_MIRROR, or what is in between")
        if f.tell() >= had + LEAST:
            since, had = time.monotonic(), f.tell()
        elif time.monotonic() > since + WINDOW:
            raise Again(f"only {f.tell() - had} bytes in {WINDOW} s", 0)


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
        pq.read_schema(path)                      # in the index, at the end of the file
        if f.read(4) == b"PAR1":                  # a resumed part of another file does not begin so
            return ""
    return "no whole parquet file"


def keep_checksum(file, path):
    """Beside path, what sha256sum says of the file that is or becomes path; prepare.py --verify=1 reads it."""
    with atomic_write(f"{path}.sha256", "w") as f:
        f.write(f"{fingerprint(file)[1]}  {os.path.basename(path)}\n")


def problem_inside(path):
    """What is wrong inside a file, "" for nothing: by the checksum kept of it, else by reading every row."""
    with contextlib.suppress(OSError, UnicodeDecodeError), open(f"{path}.sha256", encoding="ascii") as f:
        if re.fullmatch("[0-9a-f]{64}", kept := f.read(64)):
            return "" if fingerprint(path)[1] == kept else "its sha256 is not the one kept of it"
    try:
        if path.endswith(".parquet"):
            for _ in pq.ParquetFile(path).iter_batches(1024):
                pass
    except (pa.ArrowException, OSError) as error:
        return f"damaged ({(str(error) or type(error).__name__).splitlines()[0]})"
    return ""
