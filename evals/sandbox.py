"""
Runs a program that a model wrote, where its mistakes can do no harm.

in    Python source that ends without an exception when it is right
out   a Verdict: passed or not, why not, and how long it took

Every program gets a fresh interpreter: a fork of the trainer would inherit its files, secrets and gigabytes of memory.
The interpreter has none of the shell's variables, no open files, a process group and a clock of its own, and locks
itself in before it looks at the program (jail.py). What it prints goes to /dev/null. It may write files into its
working folder, a few MB that are gone when it ends. The layers, all of them Linux:

namespaces    own network (none), processes (none), and files: the standard library, read only
rlimits       memory, processor time, open files, size of a file
no_new_privs  root's powers dropped, and no way to others
landlock      files again, by the kernel's rules for paths; works in containers too
seccomp       system calls: no processes, signals, sockets, links, changing of rights

layers() tries which of them this kernel grants, and what it grants once must work every time. Without seccomp, or with
neither namespaces nor landlock, nothing is run unless the caller says `unsafe`.

What it is for: the mistakes of a model, such as an endless loop, all of the memory or a deleted folder. An exit, a
print or a crash never passes, for a verdict needs a nonce that is read after the program's end. What it is not: a
place for strangers' code. Program and judge share an interpreter, so a program that sets out to forge its verdict can:
it answers as equal to everything, or reads the nonce from its pipe, which it finds in the judge's frames. The list of
forbidden calls is finite, the kernel has holes, and time can be measured. For strangers take a virtual machine.
"""
import contextlib
import functools
import marshal
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

JAIL = os.path.join(os.path.dirname(os.path.abspath(__file__)), "jail.py")
LAYERS = ("namespaces", "rlimits", "no_new_privs", "landlock", "seccomp")      # in jail's order
START_SECONDS = 30           # for the interpreter itself: usually 0.05, more on a busy machine
DISK = 16 << 20              # bytes of all files that a program may write
WATCH_SECONDS = 0.05         # between two looks at how much it is, where no file system of its own is the limit
MAX_VERDICT = 1000           # bytes; ours is below, a program that found the pipe may write more


class Verdict(NamedTuple):
    passed: bool
    reason: str              # one line, "" when passed
    seconds: float           # of the program, without starting the interpreter


def run_program(source, timeout=5.0, memory=1 << 30, unsafe=False):
    """
    Whether the program comes to its end without an exception.

    timeout: seconds on the clock; memory: bytes of address space, the interpreter's 30 MB included
    unsafe: run it with what layers there are, be they none
    raises RuntimeError, one line, when the kernel grants too little, or less than a moment ago
    """
    if not unsafe and problem_with_layers():
        raise RuntimeError(problem_with_layers())
    return run_in_jail(source, timeout, memory, layers())


@functools.lru_cache(maxsize=1)
def layers():
    """The names of the layers that work here, tried one by one in children thrown away."""
    active = ()
    for name in LAYERS:
        try:
            if run_in_jail("pass", 5.0, 1 << 30, (*active, name)).passed:
                active += (name,)
        except RuntimeError:                         # refused; a half-made layer is never used
            pass
    return active


def problem_with_layers():
    """Why the layers are too few to run a model's programs, as a sentence for the reader; "" where they are enough."""
    if {"no_new_privs", "seccomp"} <= set(layers()) and {"namespaces", "landlock"} & set(layers()):
        return ""
    return ("no sandbox for programs here: it takes Linux with seccomp and either user namespaces or "
            f"Landlock, and this machine grants {', '.join(layers()) or 'none of its layers'}; "
            "skipped (--unsafe_exec=1 runs them all the same)")


def run_in_jail(source, timeout, memory, active):
    """run_program with exactly these layers; RuntimeError when one of them cannot be had."""
    nonce = secrets.token_hex(16).encode()
    nonce_fd, w = os.pipe()                          # read by the judge, after the program
    os.write(w, nonce)
    os.close(w)
    request = dict(source=source, layers=active, timeout=timeout, memory=memory, disk=DISK, nonce_fd=nonce_fd)
    folder = tempfile.mkdtemp(prefix="nanochat_program_")
    try:
        # -S -s: no site-packages, -B: no .pyc files. Not -I, so that the hash seed is heard: the order of a set must
        # not decide whether an answer is right.
        process = subprocess.Popen(
            [sys.executable, "-S", "-s", "-B", JAIL], cwd=folder, env={"PYTHONHASHSEED": "0"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True, pass_fds=[nonce_fd])
        try:
            # BrokenPipeError: it died at once, and has said why or not
            with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
                pipe.write(marshal.dumps(request))   # json would cost 5 ms to import
            said, seconds = listen(process.stdout.fileno(), timeout, folder)
        finally:
            stop(process)
    finally:
        os.close(nonce_fd)
        remove(folder)
    ready, _, verdict = said.partition(b"\n")
    if ready != b"ready":
        raise RuntimeError(f"sandbox: {one_line(said) or 'the interpreter did not start'}")
    if verdict == b"passed " + nonce:
        return Verdict(True, "", seconds)
    reason = one_line(verdict)
    if verdict.startswith(b"passed"):
        reason = "it wrote a verdict of its own"
    elif not verdict:
        reason = (f"not done after {timeout:g} s" if seconds >= timeout else
                  "it left before its end (an exit, a crash, out of memory or of disk)")
    return Verdict(False, reason, seconds)


def listen(fd, timeout, folder):
    """What comes out of the jail until it ends, its time is up or its folder full -> (bytes, seconds)."""
    said, start, deadline = b"", 0.0, time.monotonic() + START_SECONDS
    poll = select.poll()                             # unlike select.select not limited to 1024 fds
    poll.register(fd, select.POLLIN)
    while len(said) <= MAX_VERDICT and time.monotonic() < deadline and num_bytes(folder) <= DISK:
        left = max(0, min(WATCH_SECONDS, deadline - time.monotonic()))
        if not poll.poll(left * 1000):
            continue
        piece = os.read(fd, 4096)
        if not piece:
            break
        if not said:                                 # "ready": the program's own clock starts
            start = time.monotonic()
            deadline = start + timeout
        said += piece
    return said, time.monotonic() - start


def num_bytes(folder):
    """How much is in a folder in which a program is at work; each entry counts as 4 KB and its content."""
    total, folders = 0, [folder]
    while folders:
        with contextlib.suppress(OSError), os.scandir(folders.pop()) as entries:     # gone meanwhile
            for entry in entries:
                total += 4096 + entry.stat(follow_symlinks=False).st_size
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
    return total


def remove(folder):
    """Remove a folder, however deep: what an inner one holds is moved up first, so that no path gets too long."""
    while entries := list(os.scandir(folder)):
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.remove(entry.path)
                continue
            os.chmod(entry.path, 0o700)              # a program may have made it without any right
            for inner in list(os.scandir(entry.path)):
                if inner.is_dir(follow_symlinks=False):
                    os.chmod(inner.path, 0o700)
                os.rename(inner.path, os.path.join(folder, secrets.token_hex(8)))
            os.rmdir(entry.path)
    os.rmdir(folder)


def stop(process):
    """No process is left, whatever it was doing."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(0.05)                           # most end by themselves
    if process.returncode is None:
        process.terminate()                          # jail.namespaces ends the program and waits
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
    # by force, and what an unsafe run has left behind; PermissionError: macOS, for only zombies
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def one_line(text):
    """Bytes from the inside as a short text without control characters: a model wrote them."""
    words = " ".join(text.decode("utf-8", "replace").split())
    return "".join(c if c.isprintable() else "?" for c in words)[:200]
