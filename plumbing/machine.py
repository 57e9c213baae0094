"""
The machine a stage runs on: device, number format, threads, ranks. Decided once, printed, kept.

No other file asks for a device by name, so a stage reads the same on a GPU and on a laptop.
"""
import atexit
import contextlib
import itertools
import os
import platform
import re
import signal
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from plumbing import stop
from plumbing.budget import CPU_BYTES, flops_per_token, peak_flops, usable_bytes
from plumbing.common import LOCAL_RANK, RANK, WORLD_SIZE, print0, read_json, write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PATIENCE = timedelta(minutes=10)  # a rank waits so long for the others, of which one may be saving to a slow disk
TIMED_FLOPS = 1e11             # of a pass that is timed: about a second on two CPU cores


@dataclass
class Machine:
    device: torch.device
    dtype: torch.dtype         # what the matrices are multiplied in
    dtype_name: str
    name: str                  # of the device, for people
    peak_flops: float          # 0.0 = unknown, then no MFU
    free_bytes: float          # at the start, for weights, gradients, optimizer and activations

    @property
    def threads(self):
        """CPU threads torch may use."""
        return torch.get_num_threads()

    def synchronize(self):
        """Wait for the device, so that a clock read now is honest."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def peak_memory(self):
        """Most bytes held so far: of GPU memory, or of this process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        import resource  # kilobytes, on macOS bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def describe(self):
        """What goes into a checkpoint's meta: a resumed run takes the same number format and threads."""
        return dict(name=self.name, device=self.device.type, dtype=self.dtype_name, threads=self.threads, cores=cores(),
                    world_size=WORLD_SIZE, torch=torch.__version__, python=platform.python_version())


def start(device="", dtype="", meta=None):
    """
    Pick the device ("" = cuda, then mps, then cpu) and the number format, join the other ranks.

    dtype  "" means as the model of `meta`, a checkpoint's, was trained where that was on such a device; else
           bfloat16 on NVIDIA GPUs from the A100 on and float32 elsewhere, and choose_numerics may time it on a CPU
    """
    sys.excepthook = in_one_line
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, asked = device or best, dtype
    if kind == "cuda" and best != "cuda" or kind == "mps" and not torch.backends.mps.is_available():
        raise SystemExit(f"device={kind}: torch finds no such GPU here; leave the knob empty to run without one")
    chosen, name, free_bytes = torch.device(kind), kind, CPU_BYTES
    if kind == "cuda":
        if LOCAL_RANK >= torch.cuda.device_count():
            raise SystemExit(f"{WORLD_SIZE} processes, but torch finds {torch.cuda.device_count()} GPUs here; lower NPROC")
        chosen = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")              # TF32 for what stays in float32
        name, free_bytes = torch.cuda.get_device_name(chosen), usable_bytes(torch.cuda.mem_get_info()[0])
        # by capability: torch's own is_bf16_supported() also says yes to slow emulation
        units = torch.cuda.get_device_capability(chosen) >= (8, 0)
        if dtype == "bfloat16" and not units:
            print0(f"{name} only imitates bfloat16, slowly: without --dtype it computes in float32")
        dtype = dtype or ("bfloat16" if units else "float32")
    dtype = dtype or "float32"
    if WORLD_SIZE > 1 and not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=PATIENCE)
        except dist.DistError as error:
            raise SystemExit(f"{WORLD_SIZE} processes were to meet, not all came within {PATIENCE}: start the same command on "
                             f"every machine, each with its NODE_RANK ({str(error).splitlines()[0]:.100})") from None
    machine = Machine(chosen, DTYPES[dtype], dtype, name, peak_flops(name), free_bytes)
    use_numerics(machine, asked, meta and meta.get("machine"))
    return machine


def own_memory():
    """Bytes of the computer's memory, in which every model is made before it goes to a device."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory():
    """Bytes of the computer's memory that this process could still take; 0 where the system (no Linux) does not say."""
    free = 0
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as f:
        free = 1024 * int(re.search(r"MemAvailable: *(\d+)", f.read())[1])
    with contextlib.suppress(OSError, ValueError):               # a container's own limit: a number, or the word max
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as f, open("/sys/fs/cgroup/memory.stat", encoding="ascii") as g:
            free = min(free, int(f.read()) - int(re.search(r"^anon (\d+)", g.read())[1]))
    return free


def cores():
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def choose_numerics(machine, dtype, saved, folder, make_model, rows):
    """
    Settle what the matrices are multiplied in and, on a CPU, with how many threads.

    A number format asked for counts; then what an earlier part of this run used (saved, from its
    meta); then, on a CPU, a timing. bf16 is twice as fast as float32 on one CPU and half as fast
    on the next, and next to another busy program two threads can be slower than one: no flag
    tells. The choice is written to `folder` before the first step, so that a run killed before
    its first checkpoint is the same run when it starts again.

    returns the seconds that a token of training takes, 0.0 where nothing was timed
    """
    if not dtype and not saved and machine.device.type == "cpu":
        path = os.path.join(folder, "numerics.json")
        if RANK == 0 and not read_json(path):
            print0("timing a training step, to choose the number format and the threads ...")
            timed = time_numerics(make_model(), rows)
            print0(f"ms for {timed['tokens']:,} tokens: {timed['milliseconds']}")
            write_json(path, timed)
        barrier()
        saved = read_json(path)
    use_numerics(machine, dtype, saved)
    return saved.get("seconds_per_token", 0.0) if saved else 0.0


def use_numerics(machine, dtype, saved):
    """Compute as in training (saved, from a meta), unless dtype is asked for; with as many threads on as many cores."""
    if not saved or saved.get("device") != machine.device.type:
        return
    emulated = machine.device.type == "cuda" and saved["dtype"] == "bfloat16" and machine.dtype_name == "float32"
    if not dtype and not emulated:                               # a GPU before the A100 would be slow in bfloat16
        machine.dtype_name, machine.dtype = saved["dtype"], DTYPES[saved["dtype"]]
    if machine.device.type == "cpu" and saved.get("cores", cores()) == cores():
        torch.set_num_threads(saved["threads"])


def time_numerics(model, rows):
    """
    The fastest of float32 and bfloat16, one thread and all, for a forward and backward pass of a
    step's rows, or of as much of a row as a large model does in about a second.
    """
    most = max(64, int(TIMED_FLOPS / flops_per_token(model.config)))
    T = min(model.config.sequence_len, most)
    idx = torch.arange(max(1, min(rows // WORLD_SIZE, 8, most // T)) * T).view(-1, T) % model.config.vocab_size
    counts = {1, cores()} if WORLD_SIZE == 1 else {max(1, cores() // WORLD_SIZE)}
    seconds, begin = {}, time.perf_counter()
    for turn in range(4):                                        # in turns: the machine's mood changes
        if turn and time.perf_counter() - begin > 3:
            break
        for name, threads in itertools.product(DTYPES, sorted(counts)):
            model.compute_dtype = DTYPES[name]
            torch.set_num_threads(threads)
            for _ in range(2):                                   # the first one may only warm up
                clock = time.perf_counter()
                model(idx, idx).backward()
                seconds.setdefault((name, threads), []).append(time.perf_counter() - clock)
    # float32 unless another is a tenth faster: it needs no trust
    dtype, threads = min(seconds, key=lambda key: min(seconds[key]) * (1.0 if key[0] == "float32" else 1.1))
    return dict(device="cpu", dtype=dtype, threads=threads, cores=cores(), tokens=idx.numel(),
                seconds_per_token=statistics.median(seconds[dtype, threads]) / idx.numel() / WORLD_SIZE,
                milliseconds={f"{name} x{n}": round(1000 * min(t)) for (name, n), t in seconds.items()})


def barrier():
    if WORLD_SIZE > 1:
        dist.barrier()


def sum_over_ranks(numbers, device):
    """A list of numbers, each summed over all ranks, as floats."""
    if WORLD_SIZE == 1:
        return [float(x) for x in numbers]
    tensor = torch.tensor(numbers, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def smallest_over_ranks(numbers, device):
    """A list of whole numbers, of each the smallest that a rank has."""
    if WORLD_SIZE > 1:
        tensor = torch.tensor(numbers, device=device)
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        numbers = tensor.tolist()
    return numbers


def to_device(array, device):
    """numpy (B, T) int64 -> tensor on the device, copied while the GPU works."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def over_ranks(model):
    """
    The model as it is trained on all ranks: torch adds up their gradients in buckets, while the rest is computed.

    Which backward pass of a step does that is said by last_pass.
    """
    if WORLD_SIZE == 1:
        return model
    torch._dynamo.config.optimize_ddp = False                    # blocks compiled one by one are small enough for a bucket
    forward = DistributedDataParallel(model, gradient_as_bucket_view=True)
    forward.broadcast_buffers = False                            # the rotary table is the same everywhere

    def add_up(_, bucket):                                       # torch's own way is the mean
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])

    forward.register_comm_hook(None, add_up)
    return forward


def last_pass(forward, is_last):
    """Say whether the next backward pass is the step's last: it exchanges the gradients of several ranks."""
    if WORLD_SIZE > 1:
        forward.require_backward_grad_sync = is_last


def clip(model, loss, grad_clip):
    """
    The gradient scaled down where its norm is above grad_clip (0 = never).

    loss     this rank's part of the step's loss, a tensor
    returns  (loss of the whole step, norm of the gradient before clipping, whether a rank was told to stop)
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or float("inf")).item()
    loss, asked = sum_over_ranks([loss.item(), stop.asked], model.device)    # waits for the GPU
    return loss, norm, asked > 0


def is_out_of_memory(error):
    """Whether the memory of the device ran out, or the computer's: torch has a class of its own for some cases alone."""
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(said in str(error) for said in words)


def in_halves(function, items):
    """function(items), a list with a result for each of a list; where GPU memory runs out, in two halves, and so on."""
    try:
        return function(items)
    except torch.OutOfMemoryError:
        if len(items) == 1:
            raise
    half = len(items) // 2
    return [*in_halves(function, items[:half]), *in_halves(function, items[half:])]


def in_one_line(kind, error, trace):
    """sys.excepthook: no GPU memory and a rank that is gone are one line, anywhere; all else is shown as ever."""
    if issubclass(kind, torch.OutOfMemoryError):
        print("out of GPU memory; does another program use this GPU (nvidia-smi)? If not, the same command goes on with "
              "half of DEVICE_BATCH_SIZE or --device_batch_size (the training stays the same), or with "
              "GRADIENT_CHECKPOINTING=1", file=sys.stderr)
    elif WORLD_SIZE > 1 and (issubclass(kind, dist.DistError)
                             or re.search("gloo|NCCL|peer|[Cc]onnection|[Tt]imed out|pair closure", str(error))):
        print(f"rank {RANK}: another rank has ended, or did nothing for {PATIENCE}; the same command goes on from the "
              f"last checkpoint ({str(error).splitlines()[0]:.100})", file=sys.stderr)
        sys.stdout.flush()
        atexit.register(os._exit, 1)               # once a checkpoint is written; torch would abort where it waits for the others
    elif not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


def finish():
    """Leave the other ranks, together: one that goes first can take the connection from under another."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def leave(step, resume):
    """The end of a run that was told to stop, after its checkpoint: one line, and the code that a shell expects."""
    print0(f"stopped at step {step}, saved; the same command{'' if resume else ' with --resume=1'} goes on" if step else
           "stopped before the first step; the same command begins anew")
    finish()
    raise SystemExit(128 + (stop.asked or signal.SIGTERM))       # another rank was told
