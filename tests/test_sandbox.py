"""
What the sandbox lets through and what not: the programs of sandbox_probes.py and their verdicts.

They run here, and again where less is granted: as another user, without namespaces, without Landlock.
"""
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from sandbox_probes import BENIGN, ESCAPES, PROBES, program

from conftest import ROOT
from evals import jail, sandbox

PROBLEM = sandbox.problem_with_layers()
needs_layers = pytest.mark.skipif(bool(PROBLEM), reason=PROBLEM)


@pytest.fixture(scope="module")
def folder():
    """A folder that everybody may read and write, with a file in it; nothing may have happened to them."""
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o777)
        with open(os.path.join(path, "secret"), "w") as f:
            f.write("secret")
        os.chmod(f.name, 0o666)
        before = os.stat(f.name)
        temporary = set(os.listdir(tempfile.gettempdir()))
        yield path
        after = os.stat(f.name)
        assert os.listdir(path) == ["secret"] and before.st_mode == after.st_mode and after.st_size == 6
        new = set(os.listdir(tempfile.gettempdir())) - temporary
        assert not [name for name in new if name in ("new", "bomb")]


@pytest.fixture(scope="module")
def verdicts(folder):
    """name: (verdict, seconds in all) of every probe that this kernel can hold, four at a time."""
    os.environ["A_SECRET"] = "secret"

    def run(name):
        source, passes = PROBES[name]
        start = time.monotonic()
        verdict = sandbox.run_program(program(source, folder), timeout=5 if passes else 1, unsafe=True)
        return name, (verdict, time.monotonic() - start)

    names = [name for name in PROBES if not PROBLEM or not name.startswith("escape")]
    with ThreadPoolExecutor(4) as pool:              # not in the main thread: a trainer may do so
        yield dict(pool.map(run, names))
    del os.environ["A_SECRET"]


@pytest.mark.parametrize("name", PROBES)
def test_probe(name, verdicts):
    if name not in verdicts:
        pytest.skip(PROBLEM)
    (verdict, seconds), (_, passes) = verdicts[name], PROBES[name]
    assert verdict.passed is passes, verdict.reason
    assert bool(verdict.reason) is not passes and "\n" not in verdict.reason
    timeout = 5 if passes else 1
    assert verdict.seconds < timeout + 1 and seconds < timeout + 10, "from outside: a busy machine starts slowly"


# ---------------------------------------------------------------------------------------------
# The same table where the kernel grants less

ENVIRONMENT = """
import json, os, sys, time
from concurrent.futures import ThreadPoolExecutor
job = json.load(sys.stdin)
sys.path.insert(0, job["root"])
if job["user"]:
    os.setgroups([]); os.setgid(job["user"]); os.setuid(job["user"])
from evals import jail
if job["refused"]:
    ANY_BIT = 0x45                                       # of the filter's operations the one that jail.py needs not
    code = [jail.op(jail.LOAD, 0)]
    for number, argument, bits, answer in job["refused"]:
        code += [jail.op(jail.EQUAL, number, 0, 4 if bits else 1)]
        if bits:
            code += [jail.op(jail.LOAD, 16 + 8 * argument), jail.op(ANY_BIT, bits, 0, 1), jail.op(jail.RETURN, answer),
                     jail.op(jail.RETURN, jail.ALLOW)]
        else:
            code += [jail.op(jail.RETURN, answer)]
    jail.prctl(38, 1)
    jail.install_filter(b"".join([*code, jail.op(jail.RETURN, jail.ALLOW)]))
from evals import sandbox
result = dict(layers=sandbox.layers(), problem=sandbox.problem_with_layers(), verdicts={})
def run(item):
    name, (source, passes) = item
    source = source.replace("PARENT", str(os.getpid()))
    return name, sandbox.run_program(source, timeout=5 if passes else 1)
if not result["problem"]:
    with ThreadPoolExecutor(4) as pool:                  # several at a time, not in the main thread
        result["verdicts"] = dict(pool.map(run, job["probes"].items()))
    sandbox.run_program("pass")
    start = time.monotonic()
    for _ in range(10):
        sandbox.run_program("pass")
    result["ms"] = (time.monotonic() - start) * 100
time.sleep(0.2)
processes = [pid for pid in os.listdir("/proc") if pid.isdigit()]
def words(pid):
    try:
        with open(f"/proc/{pid}/cmdline") as f:
            return f.read()
    except OSError:
        return ""
result["left"] = [pid for pid in processes if sandbox.JAIL in words(pid)]
print(json.dumps(result))
"""
X86, EPERM, ENOSYS = platform.machine() == "x86_64", jail.REFUSE, jail.NO_SUCH_CALL
CLONE = 56 if X86 else 220
# What a container refuses: new namespaces and mounts, whichever call asks for them.
CONTAINER = [(272 if X86 else 97, 0, 0, EPERM), (308 if X86 else 268, 0, 0, EPERM), (165 if X86 else 40, 0, 0, EPERM),
             (435, 0, 0, ENOSYS), (CLONE, 0, sum(jail.CLONE_NEW.values()), EPERM)]
NO_LANDLOCK = [(444, 0, 0, ENOSYS)]
NO_MOUNT = [(165 if X86 else 40, 0, 0, EPERM)]       # namespaces can be had but are of no use, as on Ubuntu 24.04
NO_FILTER = [(157 if X86 else 167, 0, 16, EPERM)]    # of prctl's options, 16 to 31: seccomp's is 22


def copy_sandbox(folder):
    """evals/ in another folder, with nothing in it but the sandbox."""
    os.mkdir(os.path.join(folder, "evals"))
    for name in ("__init__.py", "sandbox.py", "jail.py"):
        shutil.copy(os.path.join(ROOT, "evals", name), os.path.join(folder, "evals"))


def in_environment(folder, refused=(), nobody=False, probes=None):
    """The table in a process of its own that is refused some calls, maybe as another user."""
    with tempfile.TemporaryDirectory() as root:      # a copy, which the other user can read
        os.chmod(root, 0o755)
        copy_sandbox(root)
        python = readable_python() if nobody else sys.executable
        if nobody and not python:
            pytest.skip("no Python here that another user may run")
        probes = {name: (program(PROBES[name][0], folder, "PARENT"), PROBES[name][1])
                  for name in (PROBES if probes is None else probes)}
        job = dict(root=root, user=jail.NOBODY if nobody else 0, refused=list(refused), probes=probes)
        done = subprocess.run([python, "-c", ENVIRONMENT], input=json.dumps(job), capture_output=True, text=True, cwd="/",
                              env={"A_SECRET": "secret"})
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert not result["left"] and os.listdir(os.path.join(root, "evals")).count("jail.py") == 1
        return result


def readable_python():
    """A Python that another user may run; root's own may lie in root's home."""
    for path in (sys.executable, shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin")):
        try:
            subprocess.run([path, "-c", ""], user=jail.NOBODY, cwd="/", env={}, check=True, stderr=subprocess.DEVNULL)
            return path
        except (OSError, TypeError, subprocess.CalledProcessError):
            pass


def surprises(result):
    return {name: verdict for name, verdict in result["verdicts"].items() if verdict[0] is not PROBES[name][1]}


@needs_layers
@pytest.mark.parametrize("name, refused, nobody, without", [
    ("nobody", [], True, set()),
    ("container", CONTAINER, False, {"namespaces"}), ("container, nobody", CONTAINER, True, {"namespaces"}),
    ("no mounts", NO_MOUNT, False, {"namespaces"}), ("no Landlock", NO_LANDLOCK, False, {"landlock"})])
def test_the_table_where_less_is_granted(folder, name, refused, nobody, without):
    if nobody and os.geteuid():
        pytest.skip("only root can become another user")
    expected = set(sandbox.layers()) - without
    if not expected & {"namespaces", "landlock"}:
        pytest.skip("this kernel has only the layer that is taken away here")
    # what only takes long or cheats does so everywhere; no mounts is the container again
    probes = {"container, nobody": PROBES, "no mounts": ["benign: nothing"]}.get(
        name, [name for name in PROBES if name.startswith(("benign", "escape"))])
    result = in_environment(folder, refused, nobody, probes)
    assert set(result["layers"]) == expected and not surprises(result)
    print(f"{name}: {len(result['verdicts'])} probes, {result['ms']:.0f} ms a call, {', '.join(result['layers'])}")


@needs_layers
@pytest.mark.parametrize("refused", [CONTAINER + NO_LANDLOCK, NO_FILTER])
def test_too_little_is_refused_in_one_sentence(folder, refused):
    result = in_environment(folder, refused, probes=[])
    assert "--unsafe_exec=1" in result["problem"] and "\n" not in result["problem"]


# ---------------------------------------------------------------------------------------------
# The outside


def test_without_a_kernel_of_ours_nothing_runs_unless_told(monkeypatch):
    monkeypatch.setattr(sandbox, "layers", lambda: ())
    with pytest.raises(RuntimeError, match="none of its layers.*--unsafe_exec=1"):
        sandbox.run_program("pass")
    assert sandbox.run_program("pass", unsafe=True).passed
    assert not sandbox.run_program("assert False", unsafe=True).passed
    assert not sandbox.run_program("while True: pass", timeout=0.5, unsafe=True).passed


@pytest.fixture
def copy(tmp_path):
    """The sandbox in a folder of its own, so that its processes are known by their command line."""
    if not os.path.exists("/proc/self/cmdline"):
        pytest.skip("no /proc to look for processes in")
    copy_sandbox(tmp_path)
    return str(tmp_path)


def running(folder):
    """How many processes run the copy of jail.py in folder."""
    found = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline") as f:
            found += os.path.join(folder, "evals", "jail.py") in f.read()
    return found


def soon(happens):
    """Whether it happens within three seconds."""
    for _ in range(60):
        if happens():
            return True
        time.sleep(0.05)
    return False


def test_an_unsafe_run_leaves_no_process_either(copy, monkeypatch):
    monkeypatch.setattr(sandbox, "JAIL", os.path.join(copy, "evals", "jail.py"))
    source = "import os, time\nif os.fork() == 0: time.sleep(60)"
    assert sandbox.run_in_jail(source, 0.5, 1 << 30, ()).passed
    assert soon(lambda: not running(copy))


@needs_layers
def test_the_program_dies_with_the_trainer(copy):
    source = f"import sys; sys.path.insert(0, {copy!r}); from evals import sandbox; sandbox.run_program('while True: pass', 60)"
    trainer = subprocess.Popen([sys.executable, "-c", source], env=dict(os.environ, TMPDIR=copy))
    assert soon(lambda: running(copy))
    time.sleep(1)                                        # the layers were tried one by one before
    assert running(copy)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    assert soon(lambda: not running(copy))


def test_a_layer_that_cannot_be_had_is_an_error_and_no_verdict():
    with pytest.raises(RuntimeError, match="did not start"):
        sandbox.run_in_jail("pass", 5, 1 << 30, ("a layer that does not exist",))


def test_the_layers_are_those_of_the_jail():
    assert tuple(jail.LAYERS) == sandbox.LAYERS
    enough = {"no_new_privs", "seccomp"} <= set(sandbox.layers()) and {"namespaces", "landlock"} & set(sandbox.layers())
    assert (PROBLEM == "") is bool(enough)


def test_reasons_say_what_happened():
    def reason(source, **options):
        return sandbox.run_program(source, unsafe=True, **options).reason

    assert reason("assert 1 == 2, 'not equal'") == "AssertionError: not equal"
    assert reason("while True: pass", timeout=0.3) == "not done after 0.3 s"
    assert "left before its end" in reason("import os; os._exit(0)")
    assert reason("import sys; sys.exit(0)") == "SystemExit: 0"
    assert "MemoryError" in reason("bytearray(1 << 40)")
    assert reason("raise ValueError('\\x1b[31m a\\n b')") == "ValueError: ?[31m a b", "nothing repaints a terminal"


def test_sets_come_in_the_same_order_every_time():
    source = "raise ValueError(hash('a'), *{'a', 'b', 'c', 'd'})"
    assert len({sandbox.run_program(source, unsafe=True).reason for _ in range(4)}) == 1


def test_benign_programs_pass_beside_torch():
    torch = pytest.importorskip("torch")
    block = torch.ones(50_000_000)                    # 200 MB, and all that torch maps
    for name in ("standard library", "threads", "100 MB", "300,000 sorted"):
        verdict = sandbox.run_program(program(BENIGN[name], ""), unsafe=True)
        assert verdict.passed, verdict.reason
    del block


@needs_layers
def test_a_file_is_not_cut_without_landlock_either(tmp_path):
    """Its first versions have no right for that: the filter of system calls alone has to refuse it."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for name in ("cuts a file", "cuts a file that it only reads", "cuts a file that it neither reads nor writes"):
        source = program(ESCAPES[name], str(tmp_path))
        assert not sandbox.run_in_jail(source, 5, 1 << 30, ("no_new_privs", "seccomp")).passed, name
        assert secret.read_text() == "secret", name


@pytest.mark.parametrize("without", [(), ("namespaces",), ("landlock",), sandbox.LAYERS])
def test_a_program_leaves_no_file(tmp_path, monkeypatch, without):
    """Not what it wrote, not a folder without rights, and not folders too deep for a path."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    layers = tuple(name for name in sandbox.layers() if name not in without)
    for source in (BENIGN["a file in its own folder is left"],
                   "import os\nfor _ in range(3000):\n    os.mkdir('a folder', 0o700)\n    os.chdir('a folder')",
                   "open('half', 'w').write('x')\nimport os\nos._exit(0)"):
        sandbox.run_in_jail(program(source, ""), 5, 1 << 30, layers)
    assert os.listdir(tmp_path) == []


def test_no_open_file_is_left():
    before = len(os.listdir("/dev/fd"))
    for _ in range(5):
        sandbox.run_program("pass", unsafe=True)
        sandbox.run_program("import os; os._exit(0)", unsafe=True)
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize("machine, header", [("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
                                             ("aarch64", "/usr/include/asm-generic/unistd.h")])
def test_numbers_of_system_calls_are_the_kernels(machine, header):
    """Newer calls than the header has are left out."""
    if not os.path.exists(header):
        pytest.skip(f"no {header} to compare with")
    with open(header) as f:
        numbers = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", f.read())}
    column = list(jail.MACHINES).index(machine)
    calls = dict(jail.FORBIDDEN, clone3=(jail.CLONE3, jail.CLONE3))
    names = ("clone", "open", "openat", "prlimit64", "socketpair")
    calls.update(zip(names, (condition[0] for condition in jail.CONDITIONS)))
    assert len([n for n in calls if calls[n][column] and n in numbers]) > 60
    for name, both in calls.items():
        if name in numbers or both[column] is None:
            assert numbers.get(name) == both[column], name
        else:
            assert both[column] > max(numbers[n] for n in ("openat2", "process_madvise")), name
