"""
The inside of the sandbox: gives up all that a program could do harm with, then runs the program.

in    standard input: a marshalled dict of source, layers, timeout, memory, disk and nonce_fd; an empty working folder
out   standard output: "ready", a newline, then "passed <nonce>" or why not; or the layer that is refused here, and why
run   by sandbox.py, as the only thing in a fresh interpreter; nothing else imports it

A layer is a function below, in the order in which they must come. What one of them should let through by mistake,
another one stops: that is why there are several.
"""
import sys

if __name__ == "__main__":
    sys.path.pop(0)          # our own folder: a program's `import data` is not our data.py

import ctypes
import marshal
import math
import os
import resource
import signal
import struct
import types

# The standard library, and the shared libraries that its compiled modules load.
READABLE = sorted({*sys.path, sys.base_prefix + "/lib", "/lib", "/lib64", "/usr/lib", "/usr/lib64",
                   "/usr/share/zoneinfo"})
NOBODY = 65534
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def call(name, *arguments):
    """A function of the C library; OSError when it refuses."""
    arguments = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    result = getattr(libc, name)(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


PDEATHSIG = 1                # prctl: a signal for this process when its parent is gone, however that came about


def prctl(option, value):
    call("prctl", option, value, 0, 0, 0)


# Namespaces: own views of the machine. Each call of the kernel that names a process, a network card or a file then
# means something inside of them, also a call that nobody here thought of.
CLONE_NEW = {"mount": 0x20000, "host name": 0x4000000, "shared memory": 0x8000000,
             "user": 0x10000000, "process": 0x20000000, "network": 0x40000000}
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
MOUNT_SETATTR, AT_RECURSIVE = 442, 0x8000                       # a system call, the same on every machine
READ_ONLY = struct.pack("<QQQQ", 1, 0, 0, 0)                    # struct mount_attr


def namespaces(request):
    """No network, no other processes, no files but the standard library's."""
    uid, gid = os.getuid(), os.getgid()
    call("unshare", sum(CLONE_NEW.values()))
    # we are a user without rights outside; inside, until no_new_privs, we may mount
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as f:
            f.write(text)
    empty_root(request["disk"])
    child = os.fork()                                # only a child is inside the process namespace
    if child:                                        # we stay behind: end with the child, and end it when told to
        signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
        prctl(PDEATHSIG, signal.SIGKILL)
        os.waitpid(child, 0)                         # no zombie is left, whoever is process 1
        os._exit(0)


def empty_root(num_bytes):
    """A root folder with READABLE and /dev/null, read only, and an empty /own in memory; no /proc, /home or /tmp."""
    root = b"/sys"                                   # it surely exists, and no library is in it
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    call("mount", b"tmpfs", root, b"tmpfs", MS_NOSUID | MS_NODEV, b"size=1m")
    for path in map(os.fsencode, READABLE):          # sorted: a folder before what is inside it
        if os.path.isdir(path) and not os.path.exists(root + path):
            os.makedirs(root + path)
            call("mount", path, root + path, None, MS_BIND | MS_REC, None)
    os.mkdir(root + b"/own")
    os.mkdir(root + b"/dev")
    open(root + b"/dev/null", "x").close()           # something that the mount can cover
    call("mount", b"/dev/null", root + b"/dev/null", None, MS_BIND, None)
    call("syscall", MOUNT_SETATTR, -1, root, AT_RECURSIVE, READ_ONLY, len(READ_ONLY))
    call("mount", b"tmpfs", root + b"/own", b"tmpfs", MS_NOSUID | MS_NODEV, b"size=%d,nr_inodes=4096" % num_bytes)
    os.chroot(root)
    os.chdir("/own")                                 # tempfile takes it, where there is no /tmp


# Limits and privileges
def rlimits(request):
    """An end to memory, processor time, open files and their size."""
    for kind, limit in ((resource.RLIMIT_AS, request["memory"]),
                        (resource.RLIMIT_CPU, math.ceil(request["timeout"]) + 1), (resource.RLIMIT_NOFILE, 64),
                        (resource.RLIMIT_FSIZE, request["disk"]), (resource.RLIMIT_CORE, 0)):
        _, most = resource.getrlimit(kind)           # RLIM_INFINITY is -1
        limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
        resource.setrlimit(kind, (limit, limit))


def no_new_privs(request):
    """Root's powers are dropped, and there is no way to new ones."""
    header = struct.pack("<Ii", 0x20080522, 0)       # _LINUX_CAPABILITY_VERSION_3, this process
    call("capset", header, bytes(24))                # effective, permitted, inheritable: none
    prctl(4, 0)                                      # PR_SET_DUMPABLE: a crash is not reported
    prctl(38, 1)                                     # PR_SET_NO_NEW_PRIVS
    prctl(PDEATHSIG, signal.SIGKILL)                 # last: new privileges would undo it


# Landlock: files by path, for a process of any user. It works in containers, where namespaces are refused.
# source: kernel documentation, userspace-api/landlock
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446        # the same on every machine
WRITE_FILE, READ_FILE, READ_DIR = 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG, TRUNCATE = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 14
READ = READ_FILE | READ_DIR
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}           # version: how many there are; from 5 on 16


def landlock(request):
    """READABLE can be read and our own folder used; all else, running included, is refused."""
    version = call("syscall", CREATE_RULESET, None, 0, 1)
    every_right = (1 << FILE_RIGHTS.get(version, 16)) - 1
    # versions 4 and 6 add TCP, and signals and abstract sockets of processes outside
    rules = struct.pack("<QQQ", every_right, 0b11, 0b11)
    rules = rules[:8 if version < 4 else 16 if version < 6 else 24]
    ruleset = call("syscall", CREATE_RULESET, rules, len(rules), 0)
    allowed = dict.fromkeys(READABLE, READ) | {
        "/dev/null": READ_FILE | WRITE_FILE | TRUNCATE,
        ".": READ | WRITE_FILE | TRUNCATE | MAKE_REG | MAKE_DIR | REMOVE_FILE | REMOVE_DIR}
    for path, rights in allowed.items():
        if os.path.isdir(path) or path == "/dev/null":           # sys.path names a zip file, too
            place = os.open(path, os.O_PATH)
            rule = struct.pack("<Qi", rights & every_right, place)
            call("syscall", ADD_RULE, ruleset, 1, rule, 0)
            os.close(place)
    call("syscall", RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


# Seccomp: a filter in the kernel that sees the number and arguments of every system call
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}       # AUDIT_ARCH_*
# Refused outright: name: (number on x86_64, on aarch64; None = has no such call). What needs a capability (mount,
# reboot, modules ...) is not here: we have none left.
FORBIDDEN = {
    # a new process or program (threads: see CONDITIONS)
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    # signals to others, and leaving the group that is killed in the end
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434), "setsid": (112, 157),
    "setpgid": (109, 154), "prctl": (157, 167),
    # reading and changing other processes of the same user
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "kcmp": (312, 272), "setpriority": (141, 140),
    "sched_setparam": (142, 118), "sched_setscheduler": (144, 119), "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274), "ioprio_set": (251, 30), "migrate_pages": (256, 238), "move_pages": (279, 239),
    # the network
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    # memory that outlives the process or is not counted
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180), "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    # changing files in ways for which Landlock has no right, or had none at first; links
    "creat": (85, None), "openat2": (437, 437), "open_by_handle_at": (304, 265), "truncate": (76, 45),
    "mknod": (133, None), "mknodat": (259, 33), "link": (86, None), "linkat": (265, 37), "symlink": (88, None),
    "symlinkat": (266, 36), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None),
    "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5),
    "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "removexattrat": (466, 466),
    # parts of the kernel where most of its holes were found
    "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427)}
CLONE3 = 435                                         # its flags lie in memory, out of our sight

# One instruction is four numbers; these are the operations. source: linux/bpf_common.h
LOAD, AND, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
ALLOW, KILL, REFUSE, NO_SUCH_CALL = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
ALL = 0xFFFFFFFF
ACCESS, CUT = os.O_WRONLY | os.O_RDWR, os.O_TRUNC
CLONE_THREAD = 0x10000
CONDITIONS = [       # numbers as above, which argument, its bits that count, values, answer if it is one of them, else
    ((56, 220), 0, CLONE_THREAD, [CLONE_THREAD], ALLOW, REFUSE),    # clone: threads, not processes
    # to cut a file without opening it for writing: the first two versions of Landlock let it pass
    ((2, None), 1, ACCESS | CUT, [CUT, CUT | ACCESS], REFUSE, ALLOW),          # open
    ((257, 56), 2, ACCESS | CUT, [CUT, CUT | ACCESS], REFUSE, ALLOW),          # openat
    ((302, 261), 0, ALL, [0], ALLOW, REFUSE),                       # prlimit64: only its own limits
    ((53, 199), 1, 0b1110, [0], ALLOW, REFUSE),                     # socketpair: streams, for asyncio
    # who gets a signal when something can be read: F_SETOWN, F_SETOWN_EX; FIOSETOWN, SIOCSPGRP
    ((72, 25), 1, ALL, [8, 15], REFUSE, ALLOW),                     # fcntl
    ((16, 29), 1, ALL, [0x8901, 0x8902], REFUSE, ALLOW)]            # ioctl


def op(code, value, jump_if=0, jump_else=0):
    return struct.pack("<HBBI", code, jump_if, jump_else, value)


def filter_code(machine):
    """The program that the kernel runs before every system call, as bytes."""
    column = list(MACHINES).index(machine)
    code = [op(LOAD, 4), op(EQUAL, MACHINES[machine], 1), op(RETURN, KILL), op(LOAD, 0)]
    if machine == "x86_64":                          # the same calls under other numbers (x32)
        code += [op(AT_LEAST, 0x40000000, 0, 1), op(RETURN, KILL)]
    for numbers in FORBIDDEN.values():               # a jump over one instruction: not this call
        if numbers[column] is not None:
            code += [op(EQUAL, numbers[column], 0, 1), op(RETURN, REFUSE)]
    code += [op(EQUAL, CLONE3, 0, 1), op(RETURN, NO_SUCH_CALL)]     # the C library takes clone
    for numbers, argument, bits, values, answer, other in CONDITIONS:
        if numbers[column] is not None:
            n = len(values)
            code += [op(EQUAL, numbers[column], 0, n + 4), op(LOAD, 16 + 8 * argument), op(AND, bits)]
            code += [op(EQUAL, value, n - i) for i, value in enumerate(values)]    # to the last of these lines
            code += [op(RETURN, other), op(RETURN, answer)]
    return b"".join([*code, op(RETURN, ALLOW)])


def install_filter(code):
    """Filters add up and cannot be taken back."""
    code = ctypes.create_string_buffer(code, len(code))
    call("prctl", 22, 2, struct.pack("<HxxxxxxQ", len(code) // 8, ctypes.addressof(code)), 0, 0)


def seccomp(request):
    """No processes, signals, sockets or changes of rights; threads and files go on."""
    machine = os.uname().machine
    if machine not in MACHINES or sys.maxsize < 2**32:
        raise OSError(f"no table of system calls for {machine}")
    install_filter(filter_code(machine))


# The program. Of the layers namespaces come first, while we still may make them; the filter comes last, because the
# calls that make the other layers are among those it refuses.
LAYERS = {f.__name__: f for f in (namespaces, rlimits, no_new_privs, landlock, seccomp)}


def judge(source, nonce_fd, verdict_fd, read=os.read, write=os.write, leave=os._exit):
    """
    Run the program to its end, and only then read the nonce that a verdict needs.

    A program that leaves by itself (sys.exit(0), os._exit(0), a crash) has not said the nonce.
    The functions are bound here, where the program cannot exchange them as it can os.write.
    """
    module = types.ModuleType("program")             # its __name__ is not "__main__": what stands under
    # `if __name__ == "__main__":` is not asked for. But who looks for the main module, as doctest does, finds it.
    sys.modules["program"] = sys.modules["__main__"] = module
    try:
        exec(compile(source, "program", "exec"), module.__dict__)
        verdict = b"passed " + read(nonce_fd, 64)
    except BaseException as error:                   # SystemExit too
        verdict = f"{type(error).__name__}: {error}"[:200].encode("utf-8", "replace")
    write(verdict_fd, verdict)
    leave(0)                                         # whatever threads and exit handlers are left


def main():
    request = marshal.loads(sys.stdin.buffer.read())
    verdict_fd, null = os.dup(1), os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):                             # no input, and output goes nowhere
        os.dup2(null, fd)
    os.close(null)
    for name in request["layers"]:
        try:
            LAYERS[name](request)
        except (OSError, ValueError, AttributeError) as error:     # AttributeError: not Linux
            os.write(verdict_fd, f"{name}: {error}".encode())
            return
    os.write(verdict_fd, b"ready\n")
    judge(request["source"], request["nonce_fd"], verdict_fd)


if __name__ == "__main__":
    main()
