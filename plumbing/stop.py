"""
How a run ends before its end: it is told to stop, its output goes away, or another run is at work in its folder.

in    SIGINT (Ctrl-C), SIGTERM (kill, or the notice of a rented machine), SIGHUP (a closed terminal)
out   outside the loop of a stage the script ends where it is; inside, the step is finished and saved first
"""
import atexit
import contextlib
import errno
import fcntl
import io
import os
import re
import signal
import socket
import sys
import threading
import time

from plumbing.common import RANK, WORLD_SIZE

AGAIN = 1.0          # seconds; a terminal tells the driver and the stage, which hears of it twice
asked = 0            # the signal that has told this process to stop; 0 = none
asked_at = 0.0
in_loop = False      # whether a signal only asks: the loop of the stage looks after each step
finishing = "this step"  # what that is
lost = False         # whether something printed, other than remarks, met a full disk
cutting = False      # whether an evaluation is under way that a signal cuts short


class Stopped(SystemExit):
    """Raised by a signal outside the loop, wherever the script stands; its code is what a shell expects."""


def listen():
    """From now on a signal ends this script in one line, and a closed pipe (`| head`) in none."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:           # by nohup, or for what a shell runs in the background
            signal.signal(number, told)
    watch_output(lambda: told(signal.SIGPIPE, None))


def watch_output(gone=lambda: None):
    """
    What is printed to a closed pipe or terminal is dropped; gone is called when that is noticed.

    What is printed to a full disk is dropped too, as long as it is full: a run is worth more than its words.
    """
    class Output(io.FileIO):
        def write(self, data):
            global lost
            try:
                return super().write(data)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    if not lost and self.fileno() == 1:
                        lost = True
                        with contextlib.suppress(OSError):
                            os.write(2, f"(output: {error.strerror}; what is printed is lost until there is room)\n".encode())
                elif error.errno in (errno.EPIPE, errno.EIO):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
                    gone()
                else:
                    raise
                return len(data)

    for name, fd in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream and stream is getattr(sys, f"__{name}__"):     # else a test has put another in its place
            errors = stream.errors.replace("strict", "backslashreplace")     # no letter that a terminal lacks ends a run
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(Output(fd, "w", closefd=False)), stream.encoding,
                                                errors, line_buffering=True))
            atexit.register(getattr(sys, name).flush)


def told(number, _):
    """A signal: the first one asks or ends the script, another one leaves at once."""
    global asked, asked_at
    pipe = number == signal.SIGPIPE
    if asked and (pipe or time.monotonic() - asked_at < AGAIN):
        return
    if asked:
        os._exit(128 + number)
    asked, asked_at = number, time.monotonic()
    if RANK == 0 and not pipe:                                   # not by print, which may be what was interrupted
        line = f"stopping after {finishing}; once more to leave at once" if in_loop or cutting else "stopped"
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())
    if not in_loop and threading.current_thread() is threading.main_thread():      # another one has met a closed pipe
        if not cutting:
            at_the_latest = threading.Timer(3, os._exit, [128 + number])     # a library may swallow the exception
            at_the_latest.daemon = True
            at_the_latest.start()
        raise Stopped(128 + number)


def finish_steps(what="this step"):
    """The loop begins: from now on a signal waits for the end of the step, or of what else is to be finished."""
    global in_loop, finishing
    in_loop, finishing = True, what


@contextlib.contextmanager
def cut_short():
    """Around an evaluation that takes minutes: a signal ends it, and the loop leaves as soon as what it has is saved."""
    global in_loop, cutting
    in_loop, cutting = WORLD_SIZE > 1, True                      # several ranks can't leave it each at another moment
    try:
        yield
    except Stopped:
        pass
    finally:
        in_loop, cutting = True, False


def is_near():
    """Whether a signal has come already, as far as a process that is alone can tell: then nothing long is begun."""
    return asked and WORLD_SIZE == 1


@contextlib.contextmanager
def ctrl_c_is_mine(mine=True):
    """For a script with a use of its own for Ctrl-C: the first one inside is a KeyboardInterrupt, the next ends the script."""
    def first(*_):
        signal.signal(signal.SIGINT, told)
        raise KeyboardInterrupt

    if mine and signal.getsignal(signal.SIGINT) is told:
        signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is first:
            signal.signal(signal.SIGINT, told)


def only_one(path, file=None, pid=None):
    """
    Lock `path` until this process ends, however it ends: the lock is the system's, the file only says whose it is.

    file  path, opened already: the lock belongs to all who have it open, like the driver with this pid
    raises  SystemExit, naming the process that has the lock; where the file system has no locks, that is only said
    """
    if RANK != 0:
        return None
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = file or open(path, "a+", encoding="utf-8")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.seek(0)
        file.truncate()
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {pid or os.getpid()} on {socket.gethostname()}, since {since},")
        file.flush()
    except BlockingIOError:
        file.seek(0)
        raise SystemExit(f"{path.removesuffix('.lock').rstrip('/')}: {file.read() or 'another process'} is at work "
                         "here; wait until it ends, or stop it") from None
    except OSError as error:
        print(f"{path}: there is no lock to be had ({error.strerror}): start no second run here", file=sys.stderr)
    return file                                                  # to be kept: closed, it is free


def is_at_work(folder):
    """Whether a process has the lock of a folder (only_one); nothing of it is noticed there."""
    try:
        with open(f"{folder}.lock", encoding="utf-8") as file:
            owner = re.match(r"process (\d+) on (.*), since", file.read())
            if owner and owner[2] == socket.gethostname():       # a try at the lock could keep out who begins just now
                os.kill(int(owner[1]), 0)
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):                   # held; or of a process of another user
        return True
    except OSError:                                              # no lock was ever taken, or its process is gone
        return False
    return False
