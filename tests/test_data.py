"""Laws of downloading, token files and batches. Servers run in threads on 127.0.0.1."""
import contextlib
import gzip
import hashlib
import http.server
import io
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data
from conftest import ROOT, run_script
from data import TokenStream, pad_batch, write_token_file
from evals import core
from plumbing import background, common
from plumbing import download as download_module
from plumbing.background import start_background
from plumbing.download import HUB, download
from tasks import downloaded, pydocs
from tokenizer import Tokenizer

BYTES = Tokenizer([bytes([i]) for i in range(256)])
OTHER = Tokenizer([bytes([i]) for i in range(256)] + [b"th"])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A base folder per test, no waiting between tries."""
    monkeypatch.setattr(common, "BASE_DIR", str(tmp_path))
    monkeypatch.setattr(download_module, "PAUSES", (0, 0, 0))
    os.makedirs(tmp_path / "base_data")
    return tmp_path


def parquet_bytes(texts=("one", "two"), **schema):
    buffer = io.BytesIO()
    pq.write_table(pa.table(schema or {"text": list(texts)}), buffer)
    return buffer.getvalue()


def put_shard(i, texts=("one", "two")):
    path = data.shard_path(i)
    with open(path, "wb") as f:
        f.write(parquet_bytes(texts))
    return path


@contextlib.contextmanager
def serve(answer):
    """A server that lets answer(handler, n) handle request n; yields (address, requests)."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers.get("Range")))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                answer(self, len(seen))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


def send(handler, body, status=200, length=True, cut=None, **headers):
    """One answer; cut: bytes after which the connection ends."""
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    if length:
        handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[:cut])


def send_range(handler, body):
    """The rest of body that was asked for, as servers that know Range do."""
    start = int((handler.headers.get("Range") or "bytes=0-")[len("bytes="):-1])
    if start == 0:
        send(handler, body)
    else:
        where = f"bytes {start}-{len(body) - 1}/{len(body)}"
        send(handler, body[start:], 206, Content_Range=where)


# 1.6 MB that do not compress
BIG = parquet_bytes([np.random.default_rng(i).bytes(2000).hex() for i in range(800)])


def content(path):
    with open(path, "rb") as f:
        return f.read()


# ------------------------------------------------------------------------------- download


def test_a_cut_download_is_resumed_where_it_stopped(folder):
    def answer(handler, n):
        send(handler, BIG, cut=len(BIG) // 2) if n == 1 else send_range(handler, BIG)
    with serve(answer) as (url, seen):
        assert download(f"{url}/a.parquet", str(folder / "a.parquet")) > 0
    assert content(folder / "a.parquet") == BIG
    assert seen[1][1] == f"bytes={len(BIG) // 2}-"                # nothing of what had come is lost
    assert sorted(os.listdir(folder)) == ["a.parquet", "a.parquet.sha256", "base_data"]


def test_a_cut_without_content_length_is_seen_by_the_footer(folder):
    def answer(handler, n):
        send(handler, BIG, length=n > 1, cut=len(BIG) // 2 if n == 1 else None)
    with serve(answer) as (url, seen):
        download(f"{url}/a.parquet", str(folder / "a.parquet"))
    assert content(folder / "a.parquet") == BIG and len(seen) == 2


def test_a_server_that_ignores_range_makes_it_start_over(folder):
    with serve(lambda h, n: send(h, BIG, cut=len(BIG) // 2 if n == 1 else None)) as (url, seen):
        download(f"{url}/a.parquet", str(folder / "a.parquet"))
    assert content(folder / "a.parquet") == BIG and seen[1][1]


@pytest.mark.parametrize("part", [b"x" * 100, b"x" * (len(BIG) + 5)], ids=["other", "longer"])
def test_a_part_that_does_not_fit_is_thrown_away(folder, part):
    (folder / "a.parquet.part").write_bytes(part)

    def answer(handler, n):
        asked = handler.headers.get("Range") or "bytes=0-"
        send(handler, b"", 416) if int(asked[6:-1]) > len(BIG) else send_range(handler, BIG)
    with serve(answer) as (url, _):
        download(f"{url}/a.parquet", str(folder / "a.parquet"))
    assert content(folder / "a.parquet") == BIG


def test_a_web_page_is_not_a_file(folder):
    page = b"<!DOCTYPE html><html>please log in</html>"
    for headers in ({"Content_Type": "text/html; charset=utf-8"}, {}):
        with serve(lambda h, n: send(h, page, **headers)) as (url, _):
            with pytest.raises(SystemExit, match="web page"):
                download(f"{url}/words.txt", str(folder / "words.txt"))
    assert not os.path.exists(folder / "words.txt")


def test_404_fails_at_once_and_says_where(folder):
    with serve(lambda h, n: h.send_error(404)) as (url, seen):
        with pytest.raises(SystemExit, match="a.parquet: status 404"):
            download(f"{url}/a.parquet", str(folder / "a.parquet"))
    assert len(seen) == 1 and os.listdir(folder) == ["base_data"]


def test_a_busy_server_is_asked_again_after_the_time_it_names(folder, monkeypatch):
    slept = []
    monkeypatch.setattr(download_module.time, "sleep", slept.append)

    def answer(handler, n):
        send(handler, b"", (429, 503)[n - 1], Retry_After="25") if n < 3 else send(handler, BIG)
    with serve(answer) as (url, _):
        download(f"{url}/a.parquet", str(folder / "a.parquet"))
    assert content(folder / "a.parquet") == BIG
    assert sum(seconds for seconds in slept if seconds >= 5) == 50


def test_an_unreachable_hub_ends_with_one_line(folder):
    with socket.socket() as s:                    # a port on which nobody listens
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with pytest.raises(SystemExit) as error:
        download(f"http://127.0.0.1:{port}/a.parquet", str(folder / "a.parquet"))
    assert "is the network up?" in str(error.value) and "\n" not in str(error.value)


def test_a_flipped_byte_is_caught_by_the_hubs_sha256(folder):
    etag = f'"{hashlib.sha256(BIG).hexdigest()}"'
    spoiled = BIG[:1000] + bytes([BIG[1000] ^ 1]) + BIG[1001:]
    with serve(lambda h, n: send(h, spoiled if n == 1 else BIG, X_Linked_Etag=etag)) as (url, seen):
        download(f"{url}/a.parquet", str(folder / "a.parquet"))
    assert content(folder / "a.parquet") == BIG and len(seen) == 2
    with serve(lambda h, n: send(h, spoiled, X_Linked_Etag=etag)) as (url, seen):
        with pytest.raises(SystemExit, match="sha256"):
            download(f"{url}/b.parquet", str(folder / "b.parquet"))
    assert not os.path.exists(folder / "b.parquet")


def test_a_good_file_costs_no_request_and_a_damaged_one_is_replaced(folder):
    path = folder / "a.parquet"
    with serve(lambda h, n: send(h, BIG)) as (url, seen):
        path.write_bytes(BIG[:len(BIG) // 2])
        assert download(f"{url}/a.parquet", str(path)) > 0
        assert download(f"{url}/a.parquet", str(path)) == 0
    assert content(path) == BIG and len(seen) == 1


def test_a_full_disk_ends_with_one_line(folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(download_module, "fetch", full)
    with pytest.raises(SystemExit, match="No space left on device; free some disk space"):
        download("http://127.0.0.1:9/a.parquet", str(folder / "a.parquet"))


def test_a_killed_download_leaves_only_a_part_and_is_resumed(folder):
    path, half = str(folder / "a.parquet"), len(BIG) * 3 // 4

    def answer(handler, n):
        if n > 1:
            return send_range(handler, BIG)
        send(handler, BIG, cut=half)
        handler.wfile.flush()
        time.sleep(2)                             # the line is silent, nobody hangs up
    with serve(answer) as (url, seen):
        code = f"from plumbing.download import download; download({url + '/a.parquet'!r}, {path!r})"
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
        while not os.path.exists(f"{path}.part") or os.path.getsize(f"{path}.part") < len(BIG) // 4:
            time.sleep(0.02)
        process.kill()
        process.wait()
        assert not os.path.exists(path)
        download(f"{url}/a.parquet", path)
    assert content(path) == BIG and seen[1][1]


def test_two_at_once_fetch_a_file_once(folder):
    def slow(handler, n):
        time.sleep(0.2)
        send(handler, BIG)
    with serve(slow) as (url, seen):
        args = (f"{url}/a.parquet", str(folder / "a.parquet"))
        threads = [threading.Thread(target=download, args=args) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert content(folder / "a.parquet") == BIG and len(seen) == 1
    assert not os.path.exists(folder / "a.parquet.part")


def test_the_hub_and_every_other_host_can_be_replaced(monkeypatch):
    monkeypatch.setattr(download_module, "HF_ENDPOINT", "http://hub")
    monkeypatch.setattr(download_module, "MIRROR", "http://mirror/x")
    assert download_module.mirrored("https://huggingface.co/datasets/a") == "http://hub/datasets/a"
    assert download_module.mirrored("https://a.b/c/d.zip") == "http://mirror/x/a.b/c/d.zip"
    assert download_module.mirrored("http://mirror/x/a.b/c") == "http://mirror/x/a.b/c"


# ----------------------------------------------------------------------- a server at its worst


@pytest.mark.parametrize("asked, waited", [("999999999", 300), ("9" * 5000, 300), ("7", 7), ("\xb2", 0), ("-5", 0), ("soon", 0)],
                         ids=["years", "5000 digits", "7", "superscript 2", "-5", "soon"])
def test_a_time_to_wait_is_believed_up_to_five_minutes(folder, monkeypatch, capsys, asked, waited):
    slept = []
    monkeypatch.setattr(download_module.time, "sleep", slept.append)
    with serve(lambda h, n: send(h, b"", 503, Retry_After=asked) if n == 1 else send(h, BIG)) as (url, _):
        download(f"{url}/a.parquet", str(folder / "a.parquet"))
    assert sum(seconds for seconds in slept if seconds >= 5) == waited
    said = capsys.readouterr().out
    assert ("asks to wait 999999999 s, which is too long" in said) == (waited == 300) and f"next try in {waited} s" in said


def drip(handler, what):
    """Byte after byte, 20 a second, until the other side has had enough."""
    for k in range(600):
        handler.wfile.write(what[k % len(what):][:1])
        time.sleep(0.05)


def drip_status(handler):
    drip(handler, b"HTTP/1.0 200 " + b"O" * 999)


def drip_redirect(handler):
    handler.wfile.write(b"HTTP/1.0 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 9999\r\n\r\n")
    drip(handler, b"x")


def drip_body(handler):
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BIG))
    drip(handler, BIG[:600])


def silence(handler):
    time.sleep(2)


@pytest.mark.parametrize("slow", [drip_status, drip_redirect, drip_body, silence])
def test_a_connection_that_hardly_gives_anything_ends(folder, monkeypatch, slow):
    monkeypatch.setattr(download_module, "CONNECT", 0.2)
    monkeypatch.setattr(download_module, "WINDOW", 0.5)
    path = str(folder / "a.parquet")
    with serve(lambda h, n: slow(h) if n == 1 else send_range(h, BIG)) as (url, seen):
        download(f"{url}/a.parquet", path)                            # is tried again
        assert content(path) == BIG and len(seen) >= 2
    os.remove(path)
    monkeypatch.setattr(download_module, "PAUSES", (0,))
    with serve(lambda h, n: slow(h)) as (url, seen):
        with pytest.raises(SystemExit, match="2 tries without progress") as error:
            download(f"{url}/a.parquet", path)
    assert "\n" not in str(error.value) and len(seen) == 2


def test_tries_are_counted_since_the_last_progress_and_nothing_is_lost(folder, monkeypatch, capsys):
    path = str(folder / "a.parquet")

    def crumbs(handler, n):                       # as many bytes as the test says, then it hangs up
        begin = int((handler.headers.get("Range") or "bytes=0-")[6:-1])
        send(handler, BIG[begin:], 206 if begin else 200, cut=crumb,
             Content_Range=f"bytes {begin}-{len(BIG) - 1}/{len(BIG)}")
    crumb = 100
    with serve(crumbs) as (url, seen):
        with pytest.raises(SystemExit, match="4 tries without progress .*400 bytes are here, the same command goes on"):
            download(f"{url}/a.parquet", path)
        assert content(f"{path}.part") == BIG[:400]
        crumb = 150_000                           # two of them are progress
        download(f"{url}/a.parquet", path)
    assert content(path) == BIG and len(seen) > 4 + 10 and seen[4][1] == "bytes=400-"
    assert "400 bytes are here" in capsys.readouterr().out


def test_a_server_that_always_cuts_at_the_same_place_does_not_keep_us(folder):
    with serve(lambda h, n: send(h, BIG, cut=len(BIG) // 2)) as (url, seen):      # and ignores Range
        with pytest.raises(SystemExit, match="4 tries without progress"):
            download(f"{url}/a.parquet", str(folder / "a.parquet"))
    assert len(seen) == 5                         # the first one was progress


def test_a_shorter_range_than_was_asked_for_is_no_end(folder):
    def pieces(handler, n):
        begin = int((handler.headers.get("Range") or "bytes=0-")[6:-1])
        end = min(begin + 500_000, len(BIG))
        send(handler, BIG[begin:end], 206, Content_Range=f"bytes {begin}-{end - 1}/{len(BIG)}")
    with serve(pieces) as (url, seen):
        download(f"{url}/a.parquet", str(folder / "a.parquet"))
    assert content(folder / "a.parquet") == BIG and len(seen) == -(-len(BIG) // 500_000)


OLD, NEW = b"old words\n" * 60_000, b"new words\n" * 60_000       # nothing but their version tells a splice


@pytest.mark.parametrize("knows_if_range", [True, False])
@pytest.mark.parametrize("name, old, new", [("ETag", '"1"', '"2"'), ("Last-Modified", "Sat, 01 Nov 2025 00:00:00 GMT",
                                                                     "Sun, 02 Nov 2025 00:00:00 GMT")])
@pytest.mark.parametrize("changed", [True, False])
def test_a_file_that_changed_after_a_cut_begins_anew(folder, capsys, knows_if_range, name, old, new, changed):
    path, up, asked = str(folder / "words.txt"), False, []

    def answer(handler, n):
        if n > 1 and not up:
            return handler.send_error(503)
        body, version = (NEW, new) if changed and up else (OLD, old)
        headers = {name.replace("-", "_"): version} | ({"ETag": 'W/"weak"'} if name == "Last-Modified" else {})
        asked.append(handler.headers.get("If-Range"))
        begin = int((handler.headers.get("Range") or "bytes=0-")[6:-1])
        if begin and (asked[-1] == version or not knows_if_range):
            return send(handler, body[begin:], 206, Content_Range=f"bytes {begin}-{len(body) - 1}/{len(body)}", **headers)
        send(handler, body, cut=250_000 if n == 1 else None, **headers)
    with serve(answer) as (url, seen):
        with pytest.raises(SystemExit, match="250,000 bytes are here"):
            download(f"{url}/words.txt", path)
        up = True                                 # the next day
        download(f"{url}/words.txt", path)
    assert content(path) == (NEW if changed else OLD) and asked[1] == old
    assert ("250,000 bytes thrown away" in capsys.readouterr().out) == changed
    assert sorted(os.listdir(folder)) == ["base_data", "words.txt", "words.txt.sha256"]


def test_a_damaged_note_of_the_version_ends_nothing(folder):
    for note in (b"", b"\0\0\0\0", b'"1"\r\nX: y\r\n', bytes(range(256))):
        (folder / "a.parquet.part").write_bytes(BIG[:1000])
        (folder / "a.parquet.part.etag").write_bytes(note)
        with serve(lambda h, n: send_range(h, BIG)) as (url, _):
            download(f"{url}/a.parquet", str(folder / "a.parquet"))
        assert content(folder / "a.parquet") == BIG
        os.remove(folder / "a.parquet")


def test_an_etag_is_a_sha256_where_the_hub_says_so(folder):
    right, wrong = f'"{hashlib.sha256(BIG).hexdigest()}"', f'"{"0" * 64}"'
    for k, (headers, good) in enumerate([
            (dict(ETag=wrong), True), (dict(ETag=wrong, X_Repo_Commit="1" * 40), False), (dict(X_Linked_Etag=wrong), False),
            (dict(ETag=right, X_Repo_Commit="1" * 40), True), (dict(ETag=wrong, X_Linked_Etag=right), True),
            (dict(ETag='"abc"', X_Repo_Commit="1" * 40), True)]):
        with serve(lambda h, n: send(h, BIG, **headers)) as (url, _):
            with contextlib.nullcontext() if good else pytest.raises(SystemExit, match="its sha256 is not the hub's, twice"):
                download(f"{url}/a.parquet", str(folder / f"{k}.parquet"))
        assert os.path.exists(folder / f"{k}.parquet") == good


def test_what_comes_packed_all_the_same_is_called_so(folder):
    with serve(lambda h, n: send(h, gzip.compress(BIG), Content_Encoding="gzip")) as (url, seen):
        with pytest.raises(SystemExit, match="the server packs the file .gzip. though it is asked not to"):
            download(f"{url}/a.parquet", str(folder / "a.parquet"))
    assert len(seen) == 1 and os.listdir(folder) == ["base_data"]


def test_a_body_without_an_end_has_one(folder, monkeypatch):
    monkeypatch.setattr(download_module, "LARGEST", 3e6)

    def endless(handler, n):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:                                                   # until it hangs up
            handler.wfile.write(b"10000\r\n" + bytes(65536) + b"\r\n")
    with serve(endless) as (url, seen):
        with pytest.raises(SystemExit, match="a.parquet: over 0 GB came and no end of it"):
            download(f"{url}/a.parquet", str(folder / "a.parquet"))
    assert len(seen) == 1 and os.listdir(folder) == ["base_data"]


def test_a_disk_that_is_full_in_the_middle_is_one_line(folder):
    code = ("import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000))\n"
            "from plumbing.download import download; import sys; download(*sys.argv[1:])")
    with serve(lambda h, n: send_range(h, BIG)) as (url, _):
        args = f"{url}/a.parquet", str(folder / "a.parquet")
        done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and "free some disk space" in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert content(f"{args[1]}.part") == BIG[:700_000]
        download(*args)
    assert content(args[1]) == BIG


MISBEHAVIOUR = [
    lambda h, rng: h.send_error(rng.choice([408, 429, 500, 503])),
    lambda h, rng: h.wfile.write(rng.randbytes(rng.randrange(2000))),                    # no HTTP at all
    lambda h, rng: None,                                                                 # hangs up
    lambda h, rng: send(h, BIG, cut=rng.randrange(len(BIG)), ETag='"1"'),
    lambda h, rng: send(h, BIG, length=False, cut=rng.randrange(len(BIG))),              # an end that looks like one
    lambda h, rng: send(h, BIG, 206, cut=rng.randrange(len(BIG))),
    lambda h, rng: send(h, BIG[100:], 206, Content_Range=f"bytes 100-{len(BIG) - 1}/{len(BIG)}", ETag='"2"'),
    lambda h, rng: send(h, b"", 416, Content_Range=f"bytes */{len(BIG)}"),
    lambda h, rng: send(h, gzip.compress(BIG, 1), cut=rng.randrange(len(BIG)), Content_Encoding="gzip"),
    lambda h, rng: send(h, BIG[:1000], Content_Encoding=rng.choice(["br", "deflate", "zstd", "x, gzip"])),
    lambda h, rng: send(h, BIG, Content_Length="1" * rng.choice([1, 8, 5000]), length=False),
    lambda h, rng: send(h, b"moved", 302, Location=rng.choice(["/a.parquet", "//", "http://[", "ftp://x/y", "http://\xff/"])),
    lambda h, rng: send(h, rng.randbytes(3000), Transfer_Encoding="chunked", length=False),
    lambda h, rng: [h.send_response(200), h.wfile.write(b"X: y\r\n" * 200)],
    lambda h, rng: send(h, OLD),
]


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(2, 150))])
def test_whatever_a_server_does_the_file_is_right_or_one_line_says_why(folder, seed):
    rng, path, sha256 = random.Random(seed), str(folder / "a.parquet"), f'"{hashlib.sha256(BIG).hexdigest()}"'

    def answer(handler, n):
        if rng.random() < 0.4:
            send_range(handler, BIG) if rng.random() < 0.7 else send(handler, BIG, ETag='"1"', X_Linked_Etag=sha256)
        else:
            rng.choice(MISBEHAVIOUR)(handler, rng)
    with serve(answer) as (url, seen):
        for _ in range(40):
            try:
                download(f"{url}/a.parquet", path)
                break
            except SystemExit as error:
                assert str(error) and "\n" not in str(error)
                assert not os.path.exists(path)
    assert content(path) == BIG and len(seen) < 300


# ----------------------------------------------------------------------------------- shards


def test_the_validation_shard_comes_first_and_nothing_is_fetched_twice(folder, monkeypatch):
    with serve(lambda h, n: send(h, parquet_bytes())) as (url, seen):
        monkeypatch.setattr(download_module, "HF_ENDPOINT", url)
        run_script("prepare.py", "-n", "2", "--num_threads=1")
        run_script("prepare.py", "-n", "2", "--num_threads=1")
    assert [path[-19:-8] for path, _ in seen] == ["shard_01822", "shard_00000", "shard_00001"]
    assert data.train_shards(0) == data.train_shards(2) == ["shard_00000.parquet", "shard_00001.parquet"]


def test_the_tasks_come_alone_and_nine_shards_without_a_number(folder, monkeypatch, capsys):
    monkeypatch.setattr(downloaded, "SOURCES", {})
    bundles = []
    monkeypatch.setattr(core, "fetch_bundle", lambda: bundles.append(1))
    with serve(lambda h, n: send(h, parquet_bytes())) as (url, seen):
        monkeypatch.setattr(download_module, "HF_ENDPOINT", url)
        run_script("prepare.py", "--tasks=1")
        run_script("prepare.py", "-n", "0", "--tasks=1")
        assert not seen
        run_script("prepare.py")
        run_script("prepare.py", "-n", "9", "--tasks=1")
    assert len(seen) == 10 and "9 of 10 shards are there" in capsys.readouterr().out and len(bundles) == 3


def test_a_missing_shard_ends_the_download_with_an_error(folder, monkeypatch):
    def answer(handler, n):
        handler.send_error(404) if "00001" in handler.path else send(handler, parquet_bytes())
    with serve(answer) as (url, _):
        monkeypatch.setattr(download_module, "HF_ENDPOINT", url)
        with pytest.raises(SystemExit, match="1 of 3 shards are missing.*404"):
            run_script("prepare.py", "-n", "2", "--num_threads=1")


def test_a_shard_without_text_is_refused(folder, monkeypatch):
    with serve(lambda h, n: send(h, parquet_bytes(content=["a"]))) as (url, _):
        monkeypatch.setattr(download_module, "HF_ENDPOINT", url)
        with pytest.raises(SystemExit, match="no column 'text'"):
            run_script("prepare.py", "-n", "1", "--num_threads=1")
    assert data.train_shards(1) and not os.path.exists(data.shard_path(0))


@pytest.mark.parametrize("own, problem", [
    (parquet_bytes(content=["mine"]), "no column 'text'"), (b"text\nmine\n", "no whole parquet file")])
def test_a_users_own_text_is_never_replaced(folder, monkeypatch, own, problem):
    with open(data.shard_path(0), "wb") as f:
        f.write(own)
    with serve(lambda h, n: send(h, parquet_bytes())) as (url, seen):
        monkeypatch.setattr(download_module, "HF_ENDPOINT", url)
        for flag in ("-n=1", "--verify=1"):
            with pytest.raises(SystemExit, match=f"{problem}.*move the file away$"):
                run_script("prepare.py", flag)
        with pytest.raises(SystemExit, match="own text is here already"):
            run_script("prepare.py", "--embedded=1")
        assert not seen and content(data.shard_path(0)) == own


def test_the_embedded_corpus_is_not_taken_for_a_downloaded_shard(folder, monkeypatch):
    data.write_shard(data.shard_path(0), ["docs"])
    with serve(lambda h, n: send(h, parquet_bytes())) as (url, _):
        monkeypatch.setattr(download_module, "HF_ENDPOINT", url)
        run_script("prepare.py", "-n", "1", "--num_threads=1")
    assert list(data.read_texts(data.shard_path(0))) == ["one", "two"]


def flip(path, where=0.5):
    """One bit of a file is another one; its name, size and date stay."""
    body, stat = bytearray(content(path)), os.stat(path)
    body[int(where * len(body))] ^= 1
    with open(path, "wb") as f:
        f.write(body)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_verify_reads_what_is_here_and_fetches_what_is_broken_again(folder, monkeypatch, capsys):
    words = b"word\n" * 1000
    monkeypatch.setattr(downloaded, "SOURCES", {"some": (f"{HUB}/x/", ["a.parquet", "words_alpha.txt", "missing.parquet"])})
    with serve(lambda h, n: send(h, words if "words" in h.path else BIG)) as (url, seen):
        monkeypatch.setattr(download_module, "HF_ENDPOINT", url)
        run_script("prepare.py", "-n", "2")
        for name in ("a.parquet", "words_alpha.txt"):
            download(f"{HUB}/x/{name}", str(folder / "task_data" / "some" / name))
        os.remove(f"{data.shard_path(1)}.sha256")                     # one of which no checksum was kept
        files = [data.shard_path(i) for i in (data.VAL_SHARD, 0, 1)] + [str(folder / "task_data/some/a.parquet"),
                                                                       str(folder / "task_data/some/words_alpha.txt")]
        del seen[:]
        run_script("prepare.py", "--verify=1")
        assert not seen and "3 of 3 shards are there" in capsys.readouterr().out
        for path in files:
            flip(path)
        with open(files[2], "r+b") as f:          # one bit more or less is not seen there
            f.seek(len(BIG) // 2)
            f.write(bytes(100_000))
        run_script("prepare.py", "-n", "2")
        assert not seen                                               # nobody looked inside
        run_script("prepare.py", "--verify=1")
        said = capsys.readouterr().out
        assert said.count("its sha256 is not the one kept of it; fetching it again") == 4
        assert "shard_00001.parquet: damaged" in said and len(seen) == 5 and "missing" not in said
        assert [content(path) for path in files] == [BIG] * 4 + [words]
        flip(files[0], 0.999999)                                      # its very end
        os.remove(files[3])
        del seen[:]
        run_script("prepare.py", "--verify=1", "-n", "3")             # and what is missing, as without it
        assert len(seen) == 2 and content(files[0]) == BIG == content(data.shard_path(2))


def test_verify_keeps_own_text_and_makes_the_embedded_corpus_again(folder, monkeypatch, capsys):
    monkeypatch.setattr(download_module, "HF_ENDPOINT", "http://127.0.0.1:9")        # nobody is asked
    for i in (0, data.VAL_SHARD):
        put_shard(i, ["mine"])
    run_script("prepare.py", "--verify=1")
    assert list(data.read_texts(data.shard_path(0))) == ["mine"]
    for i in (0, data.VAL_SHARD):
        os.remove(data.shard_path(i))
    monkeypatch.setattr(pydocs, "documents", lambda: [f"This is text {i}." for i in range(300)])
    run_script("prepare.py", "--embedded=1")
    paths = data.shard_path(0), data.shard_path(data.VAL_SHARD)
    bodies = [content(path) for path in paths]
    for where in (0.5, 0.999999):                                     # in the text; in the footer
        flip(paths[0], where)
        run_script("prepare.py", "--verify=1")
        assert [content(path) for path in paths] == bodies
    with open(paths[1], "w"):                                         # emptied
        pass
    run_script("prepare.py", "--embedded=1")
    assert [content(path) for path in paths] == bodies and capsys.readouterr().out.count("making it again") == 3


@pytest.mark.parametrize("here", ["embedded", "damaged"])
def test_the_tokenizer_waits_for_what_replaces_a_shard(folder, monkeypatch, here):
    """As the driver starts them: prepare.py beside tok_train.py, which is often the faster one."""
    for i in (0, data.VAL_SHARD):
        data.write_shard(path := data.shard_path(i), ["old"])
        if here == "damaged":
            download_module.keep_checksum(path, path)
            os.truncate(path, 0)
    env = dict(os.environ, NANOCHAT_BASE_DIR=str(folder))
    command = [sys.executable, "tok_train.py", "--vocab_size=270", "--num_shards=1"]
    train = subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = iter(train.stdout.readline, "")
    waiting = "waiting for shard_01822.parquet to be downloaded (the embedded corpus or a damaged file)\n"
    assert waiting in lines                       # reads until it comes
    with serve(lambda h, n: send(h, parquet_bytes(["new " * 500, "newer"]))) as (url, _):
        env["HF_ENDPOINT"] = url
        subprocess.run([sys.executable, "prepare.py", "-n", "1"], cwd=ROOT, env=env, check=True)
    said = "".join(lines)
    assert train.wait(30) == 0 and "2,005 characters, 2 documents" in said, said


def test_nobody_replaces_the_embedded_corpus_then_that_is_said(folder, monkeypatch):
    monkeypatch.setattr(data, "PATIENCE", 0.6)
    for i in (0, data.VAL_SHARD):
        data.write_shard(data.shard_path(i), ["old"])
        os.utime(data.shard_path(i), (1e9, 1e9))
    with pytest.raises(SystemExit, match="01822.parquet: the embedded corpus or a damaged file, .* --num_shards=0$"):
        data.train_shards(1)
    assert data.train_shards(0) == ["shard_00000.parquet"]


def test_too_little_disk_is_said_before_the_download(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**8}))
    with pytest.raises(SystemExit, match="3 shards to fetch and the tokens of 3 need about 0.6 GB, 0.1 GB are free"):
        run_script("prepare.py", "-n", "2", "--num_threads=1")
    for i in (0, 1, data.VAL_SHARD):
        put_shard(i)
    with pytest.raises(SystemExit, match="0 shards to fetch and the tokens of 3 need about 0.3 GB"):
        run_script("prepare.py", "-n", "2")
    for i in (0, 1, data.VAL_SHARD):
        data.tokenize_shard(data.shard_path(i), BYTES)
    run_script("prepare.py", "-n", "2")


def test_no_shards_says_how_to_get_them(folder):
    with pytest.raises(SystemExit, match="python prepare.py -n 8"):
        data.train_shards(0)
    with pytest.raises(SystemExit, match="1822"):
        data.train_shards(1823)


def test_reading_names_what_is_wrong_with_a_shard(folder):
    path = folder / "a.parquet"
    for body, message in [
        (BIG[:len(BIG) // 2], "damaged"),
        (BIG[:500] + b"\0" * 200_000 + BIG[200_500:], "damaged"),
        (parquet_bytes(content=["a"]), "no column 'text' \\(but content\\)"),
        (parquet_bytes(text=[1, 2]), "other things than strings in rows 0 to 1"),
        (parquet_bytes(text=["a", None]), "other things than strings in rows 0 to 1"),
    ]:
        path.write_bytes(body)
        with pytest.raises(SystemExit, match=message) as error:
            list(data.read_texts(str(path)))
        assert "\n" not in str(error.value) and str(path) in str(error.value) and "delete" not in str(error.value)


# ------------------------------------------------------------------------------ token files


def test_a_token_file_is_bos_and_text_for_each_document(folder):
    out = data.tokenize_shard(put_shard(0, ["hi", "", "<|bos|>é"]), BYTES)
    bos = BYTES.bos
    expected = [bos, *b"hi", bos, bos, *"<|bos|>é".encode()]
    assert out == data.token_path(data.shard_path(0), BYTES)
    assert np.fromfile(out, np.uint16).tolist() == expected


def test_a_cache_of_another_tokenizer_is_never_used(folder):
    shard = put_shard(0, ["the"])
    first, second = data.tokenize_shard(shard, BYTES), data.tokenize_shard(shard, OTHER)
    assert first != second
    assert np.fromfile(second, np.uint16).tolist() == [OTHER.bos, 256, ord("e")]


def test_a_cache_older_than_its_shard_is_made_anew(folder):
    out = data.tokenize_shard(put_shard(0, ["a"]), BYTES)
    os.utime(out, (1e9, 1e9))
    os.utime(put_shard(0, ["b"]))
    assert not data.is_fresh(out)
    with pytest.raises(SystemExit, match="nothing makes it"):
        TokenStream([out]).batch_at(0, 1, 1)
    data.tokenize_shard(data.shard_path(0), BYTES)
    assert np.fromfile(out, np.uint16).tolist() == [BYTES.bos, ord("b")]


def flipped(content):
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


FOREIGN = np.array([BYTES.vocab_size], np.uint16).tobytes()


def test_a_shard_from_tomorrow_has_a_token_file_all_the_same(folder, capsys):
    path = put_shard(0)
    os.utime(path, (time.time() + 86400,) * 2)                   # the clock was set back since
    for _ in range(2):
        data.make_token_files([path], BYTES)
    assert data.is_whole(data.token_path(path, BYTES)) and capsys.readouterr().out.count(" tokens in ") == 1


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 4 * 2], lambda b: b"", flipped, lambda b: b + b"x", lambda b: FOREIGN + b[2:]])
def test_a_damaged_token_file_is_made_again(folder, capsys, damage):
    shard = put_shard(0, ["some text", "and more"])
    path = data.tokenize_shard(shard, BYTES)
    good = content(path)
    with open(path, "wb") as f:
        f.write(damage(good))
    with pytest.raises(SystemExit, match="damaged, and nothing makes it"):
        TokenStream([path]).batch_at(0, 1, 4)
    data.make_token_files([shard], BYTES)
    assert content(path) == good and TokenStream([path]).num_tokens == len(good) // 2
    assert capsys.readouterr().out.count("so it is made again") == 1
    if damage is flipped:
        return
    with open(path, "wb") as f:                          # and where no sums are, as in older versions
        f.write(damage(good) if damage(good) != good[:len(good) // 4 * 2] else b"")
    os.remove(f"{path}.json")
    data.make_token_files([shard], BYTES)
    assert content(path) == good and os.path.exists(f"{path}.json")


def test_a_token_file_of_an_older_version_is_kept(folder):
    shard = put_shard(0, ["some text"])
    path = data.tokenize_shard(shard, BYTES)
    os.remove(f"{path}.json")
    before = os.stat(path)
    data.make_token_files([shard], BYTES)
    assert os.stat(path).st_ino == before.st_ino and data.is_whole(path)
    for damage in (b"", b"{}", b"[]"):                   # of the sums themselves
        with open(f"{path}.json", "wb") as f:
            f.write(damage)
        data.make_token_files([shard], BYTES)
        assert data.is_whole(path)


@pytest.mark.parametrize("name", ["x.00000.bin", "x.00000.mask"])
def test_a_damaged_file_of_conversations_is_made_again(folder, name):
    path, jobs = str(folder / "x.00000.bin"), []
    rows = [{"messages": [dict(role="user", content="hi"), dict(role="assistant", content="hello")]}] * 3
    jobs.append(([path], rows))
    data.make_conversation_files(jobs, BYTES)
    good = content(folder / name)
    for damage in (good[:-2], b"", flipped(good), None):
        if damage is None:
            os.remove(folder / name)
        else:
            (folder / name).write_bytes(damage)
        data.make_conversation_files(jobs, BYTES)
        assert content(folder / name) == good and data.is_whole(path)


def test_a_shard_that_became_another_one_is_said(folder):
    path = data.tokenize_shard(put_shard(0, ["some text"]), BYTES)
    stream = TokenStream([path], counts=[10, 99])
    assert stream.batch_at(0, 1, 4) and stream.counts() == [10, 99]
    with pytest.raises(SystemExit, match="10 tokens, 11 when this run began"):
        TokenStream([path], counts=[11]).batch_at(0, 1, 4)


def test_a_token_outside_uint16_and_a_short_mask_leave_no_file(folder):
    path = str(folder / "x.bin")
    for documents in ([([70_000], [1])], [([-1], [1])], [([1, 2], [1])], [([1], [1]), ([2], [])]):
        with pytest.raises(AssertionError):
            write_token_file(path, iter(documents))
    assert sorted(os.listdir(folder)) == ["base_data"]


# ----------------------------------------------------------------------------------- batches


def token_files(folder, *lengths):
    """Files that together count 0, 1, 2, ..."""
    paths, start = [], 0
    for k, length in enumerate(lengths):
        paths.append(str(folder / f"t{k}.x.bin"))
        np.arange(start, start + length, dtype=np.uint16).tofile(paths[-1])
        common.write_json(f"{paths[-1]}.json", {os.path.basename(paths[-1]): common.fingerprint(paths[-1])})
        start += length
    return paths


def test_targets_are_the_next_tokens_and_rows_cross_files_and_wrap(folder):
    stream = TokenStream(token_files(folder, 10, 0, 3, 17))       # 30 tokens in all
    for row in (0, 1, 3, 4, 5, 13, 10**6 + 1):
        x, y = stream.batch_at(row, 3, 7)
        where = (row * 7 + np.arange(21)) % 30
        assert x.dtype == y.dtype == np.int64 and x.shape == y.shape == (3, 7)
        assert (x.ravel() == where).all() and (y.ravel() == (where + 1) % 30).all()
    assert stream.num_tokens == 30


def test_a_row_depends_on_its_number_alone(folder):
    paths = token_files(folder, 100, 50)
    stream = TokenStream(paths)
    whole = stream.batch_at(8, 4, 16)
    for b in range(4):                            # other batch sizes, another stream, any order
        x, y = TokenStream(paths).batch_at(11 - b, 1, 16)
        assert (x[0] == whole[0][3 - b]).all() and (y[0] == whole[1][3 - b]).all()


def test_ranks_share_out_the_rows_of_one_process(folder):
    stream, B, n = TokenStream(token_files(folder, 4096)), 2, 4
    step_of_one = stream.batch_at(3 * n * B, n * B, 16)[0]
    shares = [stream.batch_at((3 * n + rank) * B, B, 16)[0] for rank in range(n)]
    assert (np.concatenate(shares) == step_of_one).all()
    assert len(np.unique(np.concatenate(shares))) == n * B * 16   # disjoint


def test_only_what_the_mask_names_is_scored(folder):
    path = str(folder / "a.x.bin")
    write_token_file(path, iter([([9, 1, 2], [0, 0, 1]), ([9, 3, 4], [0, 1, 0])]))
    x, y = TokenStream([path]).batch_at(0, 2, 5)                   # the second row wraps
    assert x.tolist() == [[9, 1, 2, 9, 3], [4, 9, 1, 2, 9]]
    assert y.tolist() == [[-1, 2, -1, 3, -1], [-1, -1, 2, -1, 3]]


def test_too_few_tokens_end_with_one_line(folder):
    paths = token_files(folder, 5, 3)
    assert TokenStream(paths).batch_at(0, 1, 7)[1].tolist() == [list(range(1, 8))]
    with pytest.raises(SystemExit, match="8 tokens in all, a row of 8 needs 9"):
        TokenStream(paths).batch_at(0, 1, 8)
    with pytest.raises(SystemExit, match="no training shards"):
        TokenStream([])


def test_a_batch_waits_only_for_the_files_it_needs(folder, capsys):
    paths = token_files(folder, 64, 64)
    os.rename(paths[1], folder / "later")
    stream = TokenStream(paths, lambda: True)
    assert stream.batch_at(0, 3, 16)[0].max() == 47 and stream.ends[-1] == 64
    threading.Timer(0.3, os.rename, (folder / "later", paths[1])).start()
    assert stream.batch_at(3, 2, 16)[1].max() == 80
    assert capsys.readouterr().out.count("waiting for t1.x.bin") == 1


def test_pad_batch_fills_up_to_a_multiple_of_64_and_never_beyond_T():
    bos = 7
    rows = [([bos, 1, 2], [0, 0, 1]), ([bos] + list(range(100, 180)), [0] + [1] * 80)]
    x, y = pad_batch(rows, 256)
    assert x.shape == y.shape == (2, 128) and x.dtype == y.dtype == np.int64
    assert x[0].tolist() == [bos, 1] + [bos] * 126 and y[0].tolist() == [-1, 2] + [-1] * 126
    assert x[1, :80].tolist() == rows[1][0][:80] and y[1, :80].tolist() == rows[1][0][1:]
    x, y = pad_batch(rows, 50)                    # cut to T + 1 tokens
    assert x.shape == (2, 50) and y[1, -1] == rows[1][0][50]
    assert pad_batch([([bos], [0])], 50)[1].max() == -1


# ------------------------------------------------------------------------------- background


def test_the_background_makes_the_files_in_order_and_ends(folder):
    shards = [put_shard(i, ["x" * 40] * 3) for i in range(3)]
    still_coming = start_background(data.make_token_files, shards, BYTES)
    stream = TokenStream([data.token_path(shard, BYTES) for shard in shards], still_coming)
    assert stream.batch_at(0, 1, 16)[0][0, 0] == BYTES.bos
    assert stream.num_tokens == 3 * 3 * 41
    assert still_coming.process.wait(10) == 0 and still_coming() is False


@pytest.mark.parametrize("body, message", [
    (b"PAR1 nothing else", "damaged"), (parquet_bytes(content=["a"]), "no column 'text'")])
def test_an_error_in_the_background_reaches_the_one_who_waits(folder, body, message):
    shard = put_shard(0)
    with open(shard, "wb") as f:
        f.write(body)
    still_coming = start_background(data.make_token_files, [shard], BYTES)
    stream = TokenStream([data.token_path(shard, BYTES)], still_coming)
    with pytest.raises(SystemExit, match=message) as error:
        stream.batch_at(0, 1, 16)
    assert "\n" not in str(error.value)


def test_a_killed_background_is_noticed(folder):
    still_coming = start_background(time.sleep, 60)
    assert still_coming()
    still_coming.process.send_signal(signal.SIGKILL)
    still_coming.process.wait()
    with pytest.raises(SystemExit, match="ended with code -9"):
        TokenStream([str(folder / "never.x.bin")], still_coming).batch_at(0, 1, 16)


def test_the_background_does_not_outlive_a_killed_trainer():
    code = ("import os, time; from plumbing.background import start_background\n"
            "print(start_background(time.sleep, 60).process.pid, flush=True)\n"
            "time.sleep(0.5); os.kill(os.getpid(), 9)")
    trainer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    pid = int(trainer.stdout.readline())
    trainer.wait(20)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as f:
            if f.read().rpartition(")")[2].split()[0] == "Z":      # dead, not yet collected
                return
        time.sleep(0.1)
    os.kill(pid, 9)
    raise AssertionError("still running after 10 s")


def test_other_ranks_start_nothing_and_wait(folder, monkeypatch):
    monkeypatch.setattr(background, "RANK", 1)
    still_coming = start_background(time.sleep, 60)
    assert still_coming() and still_coming.process is None


def test_a_shard_that_nobody_downloads_is_not_waited_for_forever(folder, monkeypatch, capsys):
    monkeypatch.setattr(data, "PATIENCE", 0.8)
    part = f"{data.shard_path(3)}.part"
    os.utime(put_shard(9), (time.time() + 86400,) * 2)           # the clock of the files says nothing
    stop = threading.Event()

    def grow():                                   # some download is alive for 1.5 seconds
        while not stop.wait(0.1):
            with open(part, "ab") as f:
                f.write(b"x")
    threading.Thread(target=grow, daemon=True).start()
    threading.Timer(1.5, stop.set).start()
    start = time.time()
    with pytest.raises(SystemExit, match="nothing has arrived for 0.8 s"):
        data.wait_for_shard(data.shard_path(0))
    assert time.time() - start > 2
    assert capsys.readouterr().out.count("waiting for shard_00000.parquet") == 1
    with pytest.raises(SystemExit, match="01822.parquet: not here .*own text needs one.* 0.8 s; fetch it with"):
        data.wait_for_shard(data.shard_path(data.VAL_SHARD))


# ------------------------------------------------------------------------------ real mirror


@pytest.mark.skipif(not os.environ.get("NANOCHAT_TEST_HUB"),
                    reason="NANOCHAT_TEST_HUB names no mirror with serve.py")
def test_shards_of_a_real_mirror_arrive_unchanged(folder):
    hub = os.environ["NANOCHAT_TEST_HUB"]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, os.path.join(hub, "serve.py"), str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        server.stdout.readline()
        endpoint = f"http://127.0.0.1:{port}"
        env = dict(os.environ, HF_ENDPOINT=endpoint, NANOCHAT_BASE_DIR=str(folder))
        command = [sys.executable, "prepare.py", "-n", "2"]
        for _ in range(2):                        # the second time everything is there
            subprocess.run(command, cwd=ROOT, env=env, check=True, timeout=120)
    finally:
        server.terminate()
        server.wait()
    for i in (0, 1, data.VAL_SHARD):
        path = "datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main/shard_%05d.parquet" % i
        assert content(data.shard_path(i)) == content(os.path.join(hub, "huggingface.co", path))
    assert sum(len(text) for text in data.read_texts(data.shard_path(0))) > 10**6
