"""
Programs for the sandbox, each with its verdict: the table of test_sandbox.py.

An escape is written so that it comes to its end, and would pass, when it succeeds. FOLDER stands
for a folder of ours with a file named secret, PARENT for the process that asks.
"""
import os

BENIGN = {
    "nothing": "",
    "a function and its checks": "def add(a, b):\n    return a + b\nassert add(1, 2) == 3",
    "standard library": """
        import array, asyncio, bisect, cmath, collections, copy, ctypes, dataclasses, datetime, decimal, enum, fractions
        import functools, hashlib, heapq, inspect, io, itertools, json, logging, math, multiprocessing, operator, pickle
        import queue, random, re, statistics, string, struct, tempfile, textwrap, threading, typing, unittest, zlib, zoneinfo
        assert hashlib.md5(b"").hexdigest().startswith("d41d8") and str(zoneinfo.ZoneInfo("UTC")) == "UTC" """,
    "threads": """
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(lambda i: i * i, range(100))) == 328350""",
    "100 MB": "block = bytearray(b'x' * 100_000_000)\nassert block.count(b'x') == 100_000_000",
    "300,000 sorted": "import random\nassert sorted(random.sample(range(300000), 300000))[7] == 7",
    "deep recursion": """
        import sys
        sys.setrecursionlimit(20000)
        f = lambda n: 0 if n == 0 else 1 + f(n - 1)
        assert f(9000) == 9000""",
    "100 MB of output": "for _ in range(100):\n    print('x' * 1_000_000)",
    "output and errors in any script": "import sys\nprint('é \\u4f60 \\ud800'.encode('utf8', 'replace'), file=sys.stderr)",
    "what stands under the main guard is not run": "if __name__ == '__main__':\n    input()",
    "classes can be found again": """
        from __future__ import annotations
        import dataclasses, pickle, typing
        @dataclasses.dataclass
        class Point:
            x: int
        assert pickle.loads(pickle.dumps(Point(3))) == Point(3)
        assert typing.get_type_hints(Point) == {"x": int}""",
    "the library looks at frames": """
        import collections, enum, logging, traceback, typing
        Point = collections.namedtuple("Point", "x y")
        Color = enum.Enum("Color", "RED BLUE")
        class Pair(typing.NamedTuple):
            a: int
        logging.warning("careful")
        try: 1 / 0
        except ZeroDivisionError: assert "1 / 0" in traceback.format_exc() or traceback.format_exc()
        def numbers(): yield from range(3)
        assert list(numbers()) == [0, 1, 2]""",
    "it looks at frames": """
        import inspect, sys
        sys.settrace(lambda *_: None)
        try: 1 / 0
        except ZeroDivisionError as error: assert error.__traceback__.tb_frame.f_back.f_locals
        assert inspect.stack()[-1].frame.f_locals""",
    "doctest": """
        import doctest
        def double(x):
            \"\"\"
            >>> double(2)
            4
            \"\"\"
            return 2 * x
        assert doctest.testmod() == (0, 1)""",
    "cProfile": """
        import cProfile, timeit
        def double(x): return 2 * x
        cProfile.run("double(2)")
        with cProfile.Profile() as profile: double(2)
        profile.print_stats()
        assert timeit.timeit("double(2)", "from __main__ import double", number=1) > 0""",
    "asyncio in debug mode": "import asyncio\nassert asyncio.run(asyncio.sleep(0.01, 7), debug=True) == 7",
    "asyncio": "import asyncio\nassert asyncio.run(asyncio.sleep(0.01, 7)) == 7",
    "output caught by itself": """
        import contextlib, io
        with contextlib.redirect_stdout(io.StringIO()) as out:
            print("hello")
        assert out.getvalue() == "hello\\n" """,
    "nothing is written to nowhere": """
        import os, sys
        with open(os.devnull, "w") as out, open("/dev/null", "ab") as more:
            print("x" * 100_000_000, file=out)
        assert open(os.devnull).read() == "" """,
    "temporary files": """
        import os, pathlib, tempfile
        with tempfile.TemporaryFile() as f: f.write(b"x" * 1_000_000)
        with tempfile.NamedTemporaryFile("w+") as f:
            print("hello", file=f, flush=True)
            assert open(f.name).read() == "hello\\n"
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "a", "b")
            path.mkdir(parents=True)
            path.joinpath("c").write_text("hello")
            os.rename(path / "c", path / "d")
            assert [p.name for p in sorted(pathlib.Path(folder).rglob("*"))] == ["a", "b", "d"]
        assert not os.path.exists(folder)""",
    "a file in its own folder is left": """
        import os
        assert os.listdir() == []
        open("notes.txt", "w").write("hello")
        os.mkdir("folder", 0)
        assert open("notes.txt").read() == "hello" """,
    "half a second of work": "import time\nend = time.time() + 0.5\nwhile time.time() < end: sum(range(1000))",
    "a daemon thread is left": """
        import threading, time
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        threading.Thread(target=time.sleep, args=(60,)).start()""",
    "no variables of the shell": "import os\nassert set(os.environ) <= {'PYTHONHASHSEED', 'LC_CTYPE'}, os.environ",
}
WRONG = {
    "a check fails": "assert 1 + 1 == 3",
    "an exception": "[][0]",
    "no Python": "def f(:",
    "a null byte": "x = 1\0",
    "half a surrogate pair": "x = '\ud800'",
    "waits for input": "input()",
    "a package that is not the library's": "import numpy",
    "our own modules": "import tasks",
}
FORGED = {                   # claims to have passed; every one of them fails in truth
    "sys.exit(0)": "import sys\nsys.exit(0)",
    "raise SystemExit": "raise SystemExit",
    "os._exit(0)": "import os\nos._exit(0)",
    "os._exit(0) in a thread": """
        import os, threading, time
        threading.Thread(target=os._exit, args=(0,)).start()
        time.sleep(1)
        assert False""",
    "exit in an exit handler": "import atexit, os\natexit.register(os._exit, 0)\nassert False",
    "crash": "import ctypes\nctypes.string_at(0)",
    "abort": "import os\nos.abort()",
    "prints the verdict": "import os\nprint('ready\\npassed')\nos._exit(0)",
    "writes the verdict to every file": """
        import os
        for fd in range(64):
            try: os.write(fd, b"passed 00000000000000000000000000000000")
            except OSError: pass
        os._exit(0)""",
    "writes it and goes on to fail": """
        import os
        for fd in range(64):
            try: os.write(fd, b"passed ")
            except OSError: pass
        assert False""",
    "copies every file to every file": """
        import os
        os.set_blocking(0, False)
        for source in range(3, 64):
            try:
                os.set_blocking(source, False)
                text = os.read(source, 99)
            except OSError: continue
            for fd in range(64):
                try: os.write(fd, text)
                except OSError: pass
        os._exit(0)""",
    "floods every file": """
        import os
        for fd in range(1, 64):
            try: os.set_blocking(fd, False)
            except OSError: continue
            for _ in range(1000):
                try: os.write(fd, b"x" * 1000)
                except OSError: pass
        os._exit(0)""",
    "closes every file": "import os\nos.closerange(0, 64)",
    "changes the judge's frames": """
        import sys
        frame = sys._getframe()
        while frame := frame.f_back:
            for names in (frame.f_locals, frame.f_globals):
                for name in list(names):
                    if name in ("error", "verdict", "source", "result", "passed"):
                        names[name] = b"passed "
            frame.f_globals.update(BaseException=ZeroDivisionError, verdict=b"passed", passed=True)
        assert False""",
    "clears the judge's globals": "import sys\nsys._getframe().f_back.f_globals.clear()\nassert False",
    "calls the judge's functions": """
        import gc, os
        for f in gc.get_objects():
            if getattr(f, "__name__", "") == "judge":
                f("pass", 0, 1)
        os._exit(0)""",
    "exchanges what the judge calls": """
        import builtins, json, os
        os.write = os.read = lambda *_: b""
        os._exit = lambda _: None
        builtins.exec = builtins.compile = lambda *_: None
        builtins.BaseException = ZeroDivisionError
        assert False""",
    "exchanges the exception": "import builtins\nbuiltins.AssertionError = builtins.type = str\nassert False",
    "an exception that cannot be printed": """
        class Trick(BaseException):
            def __str__(self): raise SystemExit(0)
        raise Trick""",
}
BOMBS = {
    "endless loop": "while True: pass",
    "sleep": "import time\ntime.sleep(60)",
    "an integer too large to finish": "10 ** 10 ** 9",
    "a regular expression too hard to finish": "import re\nre.match('(a+)+b', 'a' * 60)",
    "endless output": "while True: print('x' * 1000)",
    "all exceptions caught": """
        while True:
            try:
                while True: pass
            except BaseException: pass""",
    "deaf to signals": """
        import signal, time
        for number in range(1, 64):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        time.sleep(60)""",
    "memory, all at once": "bytearray(1 << 40)",
    "memory, more and more": "x = []\nwhile True: x.append(bytearray(10_000_000))",
    "threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
    "a file without an end": "with open('x', 'wb') as f:\n    while True: f.write(bytes(1_000_000))",
    "files without an end": """
        import itertools
        for i in itertools.count(): open(str(i), "wb").write(bytes(1_000_000))""",
    "folders without an end": """
        import os
        while True:
            os.mkdir("x")
            os.chdir("x")""",
    "a file that only says it is large": "open('x', 'wb').truncate(1 << 30)",
    "memory limit raised": """
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))""",
    "recursion in C": """
        import sys
        sys.setrecursionlimit(10 ** 9)
        class A:
            def __getattr__(self, name): return getattr(self, name + "x")
        A().x""",
}
ESCAPES = {                  # need a layer of the kernel; FOLDER is ours, PARENT the process that asks
    "reads a file of ours": "open('FOLDER/secret').read()",
    "reads it through a file descriptor of the folder": "import os\nos.open('secret', 0, dir_fd=os.open('FOLDER', 0))",
    "reads /etc/passwd": "open('/etc/passwd').read()",
    "lists the root folder": "import os\nos.listdir('/')\nos.listdir('/home')",
    "reads the asker's variables": "assert open('/proc/PARENT/environ', 'rb').read()",
    "looks at processes": "import os\nassert any(name.isdigit() for name in os.listdir('/proc'))",
    "writes a file": "open('FOLDER/new', 'w')",
    "writes 1 GB": "f = open('/tmp/bomb', 'wb')\nfor _ in range(1000): f.write(bytes(1_000_000))",
    "writes into shared memory": "open('/dev/shm/new', 'w')",
    "makes a file beside its folder": "open('../new', 'w')",
    "appends to a file": "open('FOLDER/secret', 'a')",
    "cuts a file": "import os\nos.truncate('FOLDER/secret', 0)",
    "cuts a file that it only reads": "import os\nos.open('FOLDER/secret', os.O_RDONLY | os.O_TRUNC)",
    "cuts a file that it neither reads nor writes": "import os\nos.open('FOLDER/secret', os.O_ACCMODE | os.O_TRUNC)",
    "deletes a file": "import os\nos.remove('FOLDER/secret')",
    "renames a file": "import os\nos.rename('FOLDER/secret', 'FOLDER/new')",
    "makes a folder": "import os\nos.mkdir('FOLDER/new')",
    "makes a link": "import os\nos.symlink('/', 'FOLDER/new')",
    "changes a mode": "import os\nos.chmod('FOLDER/secret', 0)",
    "changes the standard library": "import os\nopen(os.__file__, 'r+')",
    "deletes from the standard library": "import os, json\nos.remove(json.__file__)",
    "makes it unreadable": "import os, json\nos.chmod(json.__file__, 0)",
    "network": "import socket\nsocket.socket()",
    "network, datagrams": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
    "local socket": "import socket\nsocket.socket(socket.AF_UNIX)",
    "local datagrams": "import socket\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "looks at the asker": "import os\nos.kill(PARENT, 0)",
    "signals to the asker": "import os, signal\nos.kill(PARENT, signal.SIGWINCH)",
    "signals to everybody": "import os\nos.kill(-1, 0)",
    "signals, by number of the call": """
        import ctypes, os
        number = {"x86_64": 234, "aarch64": 131}[os.uname().machine]
        assert ctypes.CDLL(None).syscall(number, PARENT, PARENT, 0) == 0""",
    "signals to the asker, when a pipe is full": """
        import fcntl, os
        fcntl.fcntl(os.pipe()[0], 8, PARENT)        # F_SETOWN""",
    "signals, by the newer call": """
        import fcntl, os, struct
        fcntl.fcntl(os.pipe()[0], 15, struct.pack("ii", 1, PARENT))     # F_SETOWN_EX""",
    "signals, by way of a socket": """
        import fcntl, socket, struct
        fcntl.ioctl(socket.socketpair()[0], 0x8901, struct.pack("i", PARENT))      # FIOSETOWN""",
    "the asker's limits": "import resource\nresource.prlimit(PARENT, resource.RLIMIT_CORE)",
    "the asker's priority": "import os\nos.setpriority(os.PRIO_PROCESS, PARENT, 19)",
    "the asker's processors": "import os\nos.sched_setaffinity(PARENT, {0})",
    "attaches to the asker": "import ctypes\nassert ctypes.CDLL(None).ptrace(0x4206, PARENT, 0, 0) == 0",
    "a file of the asker": "import os\nos.pidfd_open(PARENT)",
    "runs a program": "import subprocess\nsubprocess.run(['/bin/true'], check=True)",
    "runs a shell": "import os\nassert os.system('true') == 0",
    "becomes another program": "import os\nos.execv('/bin/true', ['true'])",
    "fork": "import os\nif os.fork(): os.wait()",
    "fork bomb": "import os\nwhile True: os.fork()",
    "multiprocessing": "import multiprocessing as m\nm.get_context('fork').Process(target=print).start()",
    "an orphan": """
        import os, time
        if os.fork() == 0:
            os.setsid()
            time.sleep(60)""",
    "leaves its group": "import os\nos.setpgid(0, 0) if os.getpid() != os.getpgid(0) else os.setsid()",
    "outlives the asker": "import ctypes\nassert ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0",
    "new namespaces": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "another user": "import os\nos.setuid(12345)",
    "out of the root folder": "import os\nos.chroot('/lib')",
    "memory that stays": "import ctypes\nassert ctypes.CDLL(None).shmget(0, 4096, 0o1600) >= 0",
    "memory as a file": "import os\nos.memfd_create('x')",
    "old-style system calls": """
        import ctypes, mmap, os
        assert os.uname().machine == "x86_64"
        # mov eax, 20 (getpid); int 0x80; ret
        code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        code.write(bytes([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3]))
        assert ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))() > 0""",
}
PROBES = {f"{group}: {name}": (source, group == "benign")
          for group, probes in (("benign", BENIGN), ("wrong", WRONG), ("forged", FORGED), ("bomb", BOMBS),
                                ("escape", ESCAPES)) for name, source in probes.items()}


def program(source, folder, parent=str(os.getpid())):
    """A probe as it is run: without the table's margin, about a folder and a process that exist."""
    lines = source.splitlines()
    margin = min([len(line) - len(line.lstrip()) for line in lines if line.strip() and line != lines[0]], default=0)
    if not lines or lines[0].strip():
        margin = 0
    return "\n".join(line[margin:] for line in lines).replace("FOLDER", folder).replace("PARENT", parent)
