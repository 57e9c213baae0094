"""
A function in a process of its own that runs beside the trainer and never outlives it.

in    a function of a module (not of a script) and its arguments, which must be picklable
out   still_coming(): is it running, has it finished, or why has it failed

multiprocessing would run the trainer's script a second time to find its functions; this process
imports only the function's module, so neither torch nor the GPU is touched.
"""
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time

from plumbing import stop
from plumbing.common import RANK

# What the other process runs first: it learns where our modules are, then makes the call.
CHILD = """import pickle, sys
parent, sys.path[:], call = pickle.load(sys.stdin.buffer)
from plumbing import background
background.run(parent, call)"""


def start_background(function, *args):
    """
    Run function(*args) at low priority; on rank 0 alone, the other ranks only wait for its files.

    returns still_coming(): True while it runs, False once it has finished; raises SystemExit with
        its one line when it has failed. still_coming.process: the Popen, None on other ranks.
    """
    assert function.__module__ != "__main__", "start_background: put the function into a module"
    process = None
    if RANK == 0:
        errors = tempfile.TemporaryFile()         # a pipe would fill up with nobody reading it
        process = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stderr=errors)
        with process.stdin:
            call = pickle.dumps((function, args))
            pickle.dump((os.getpid(), sys.path, call), process.stdin)

    def still_coming():
        if process is None or process.poll() is None:
            return True
        if process.returncode == 0:
            return False
        errors.seek(0)
        text = errors.read().decode(errors="replace").strip()
        if "Traceback" in text:                   # a mistake in the code: show where
            print(text, file=sys.stderr, flush=True)
        reason = text.splitlines()[-1] if text else f"it ended with code {process.returncode}"
        raise SystemExit(f"{function.__name__} has stopped in the background: {reason}")

    still_coming.process = process
    return still_coming


def run(parent, call):
    """The other process: step back, watch the parent, make the call."""
    os.nice(19)                                   # the trainer comes first
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the trainer's, which may need us to finish its step
    # an exception, so that temporary files go
    signal.signal(signal.SIGTERM, lambda *_: os.getppid() == parent or sys.exit(1))
    stop.watch_output()

    def watch():
        while os.getppid() == parent:             # changes even when the parent was killed
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    function, args = pickle.loads(call)
    function(*args)
