"""Every test sees the project's modules and a base folder of its own."""
import os
import runpy
import signal
import socket
import sys
import tempfile

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
# before any module of ours reads it
os.environ["NANOCHAT_BASE_DIR"] = tempfile.mkdtemp(prefix="nanochat_test_")
# what nohup, or a shell for its background jobs, has put out of action; our programs leave such a signal alone
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also what takes long")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: takes long, runs with --full alone")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "full" in item.keywords and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="takes long; runs with --full"))


@pytest.fixture
def port():
    """A TCP port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_script(name, *flags):
    """Run a script of ours in this process, as `python name flags` would -> its globals."""
    argv, sys.argv = sys.argv, [name, *flags]
    try:
        return runpy.run_path(os.path.join(ROOT, name), run_name="__main__")
    finally:
        sys.argv = argv
        signal.signal(signal.SIGINT, signal.default_int_handler)      # Ctrl-C is pytest's again


# what may happen to a file: name -> its content after it; None = it is gone
DAMAGES = dict(half=lambda b: b[:len(b) // 2], empty=lambda b: b"", zeros=lambda b: bytes(len(b)), gone=None, object=lambda b: b"{}",
               flip=lambda b: b[:len(b) // 2] + bytes([b[len(b) // 2] ^ 1]) + b[len(b) // 2 + 1:], list=lambda b: b"[1, 2]",
               byte=lambda b: b[:len(b) // 2] + b"\xff" + b[len(b) // 2:])


def damage(path, change):
    """Put change(content) into a file; change = None removes it."""
    content = path.read_bytes()
    os.remove(path)
    if change:
        path.write_bytes(change(content))


def reference_answer(conversation):
    """The last message as the text that a perfect model would give, calculator included."""
    content = conversation["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
