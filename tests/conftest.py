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


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also the tests that take long")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: takes long, runs with --full only")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason="takes long: --full"))


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


def reference_answer(conversation):
    """The last message as the text that a perfect model would give, calculator included."""
    content = conversation["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
