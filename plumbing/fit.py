"""
The micro-batch that fits, found by trying: real steps with random tokens before the training begins.

A formula (budget.row_bytes) knows what is kept for the way back, but not what the compiler, the
allocator and other programs take: its figure is where trying begins. What was found is kept in
fit.json for this GPU, model and torch, so that the next start tries it once and goes on.
"""
import gc
import time

import torch
import torch.distributed as dist

from plumbing.budget import MICRO_TOKENS, even_batch, largest_depth, micro_batch
from plumbing.common import RANK, WORLD_SIZE, base_path, print0, read_json, write_json
from plumbing.machine import is_out_of_memory, over_ranks, smallest_over_ranks, sum_over_ranks

FASTER = 1.02          # a larger micro-batch has to gain 2 %, or it only costs memory
RESERVE = 0.05         # share of the memory that stays free while trying: fragments come later


def fit_micro_batch(machine, model, optimizers, rows, asked, meta):
    """
    B, the rows of a micro-batch, the same on all ranks. It changes the speed and the memory, never the training.

    asked    rows wanted; 0 = as in `meta`, the meta of the run that is continued, or the most that are of use
    returns  (B, forward): forward(idx, targets) -> loss is the model, whose gradients are added up over all ranks.
             A model that can't be compiled here is no longer so; gradient checkpointing is on where one row
             does not fit without
    raises   SystemExit where nothing fits
    """
    print0(f"{machine.name}, {machine.dtype_name}, {machine.threads} CPU threads")
    share, T, config = -(-rows // WORLD_SIZE), model.config.sequence_len, model.config
    asked = asked or (meta["device_batch_size"] if meta and meta["world_size"] == WORLD_SIZE else 0)

    def guess():
        return micro_batch(rows, WORLD_SIZE, asked, machine.free_bytes, config, machine.dtype.itemsize,
                           model.gradient_checkpointing)

    fitting, step = guess(), meta.get("step", 0) if meta else 0      # refuses more ranks than rows
    low, high = smallest_over_ranks([step, -step], machine.device)
    if low != -high:
        raise SystemExit(f"the ranks find checkpoints of steps {low} to {-high}: do all of them see the same folder? Run again")
    if machine.device.type != "cuda":
        return fitting, over_ranks(model)
    path, key = base_path("fit.json"), f"{machine.name}, {machine.free_bytes / 1e9:.0f} GB free, {machine.dtype_name}, " \
        f"torch {torch.__version__}, {config}, {share} rows, checkpointing {model.gradient_checkpointing}, " \
        f"compiled {model.compiled_parts is not None}"
    known = read_json(path)
    before, saving = known.get(key, (0, False))
    [plain] = smallest_over_ranks([int(not saving)], machine.device)       # only the first rank may find its own key
    model.gradient_checkpointing |= not plain
    settled, last = asked or before, 0                           # tried all the same: it may not fit any more

    def tried(B):
        nonlocal last
        last = B
        try:
            return attempt(machine, model, optimizers, B, share % B)
        except Exception as error:                               # no compiler, no Python.h, a bug in torch: of all kinds
            if not model.compiled_parts or isinstance(error, dist.DistError):
                raise
            reason = (str(error).strip() or repr(error)).splitlines()[0]
        model.compiled_parts = None
        print0(f"torch.compile fails here, goes on without, more slowly: {reason:.200}")
        return attempt(machine, model, optimizers, B, share % B)

    first, most = smallest_over_ranks([settled or fitting, 0 if settled else MICRO_TOKENS // T], machine.device)
    B, speed = largest_that_runs(share, first, most, tried)
    if not B and not model.gradient_checkpointing:
        print0("not one row fits: gradient checkpointing goes on, which is slower")
        model.gradient_checkpointing = True
        [first] = smallest_over_ranks([guess()], machine.device)
        B, speed = largest_that_runs(share, first, 0, tried)
    if not B:
        raise SystemExit(f"{machine.name}: not even one row of {T:,} tokens fits into its memory; take a shorter MAX_SEQ_LEN or "
                         f"--max_seq_len, or DEPTH={largest_depth(machine.free_bytes, config, machine.dtype.itemsize)} or less")
    if B != last:
        tried(B)                                                 # compiled anew: the larger one has taken its place
    if settled and B < even_batch(share, settled):
        print0(f"{settled} rows at a time do not fit here, {B} do: the same training but for rounding")
    print0(f"micro-batch: {B} rows, {speed:,.0f} tokens/s, {machine.peak_memory() / 1e9:.1f} GB")
    if RANK == 0 and not asked:
        write_json(path, {**known, key: [B, model.gradient_checkpointing]})
    torch.cuda.reset_peak_memory_stats()
    return B, over_ranks(model)


def largest_that_runs(share, first, most, attempt):
    """
    (B, its tokens/s), or (0, 0.0) where not one row fits.

    share    rows that a rank has in a step
    first    rows to begin with
    most     rows up to which larger ones are tried after one that fits, while they are faster; 0 = none
    attempt  B -> tokens/s, 0.0 where the memory does not suffice
    """
    B, speed = even_batch(share, first), attempt(even_batch(share, first))
    if not speed:
        while not speed and B > 1:
            B = even_batch(share, max(1, B * 3 // 4))
            speed = attempt(B)
        return (B, speed) if speed else (0, 0.0)
    while (more := even_batch(share, min(max(most, B), 2 * B))) > B and (faster := attempt(more)) > FASTER * speed:
        B, speed = more, faster
    return B, speed


def attempt(machine, model, optimizers, B, rest):
    """
    Tokens per second, of all ranks, in micro-batches of B rows; 0.0 where the memory of one rank does not suffice.

    Some passes, the optimizers' step between them at a rate of 0, and an evaluation: all that a
    step holds at a time, and all that is compiled for it; `rest` rows are left over for the last micro-batch of a
    step. Leaves weights, optimizers and random numbers as they were.
    """
    T = model.config.sequence_len
    idx = torch.arange(B * T, device=machine.device).view(B, T) * 7919 % model.config.vocab_size
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    failed, seconds, exchanging = 0, 1.0, False
    if machine.device.type == "cuda":
        torch._dynamo.reset()                                    # else it gives up compiling after eight sizes
        free, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction((1 - RESERVE) * (torch.cuda.memory_reserved() + free) / total)
        torch.cuda.reset_peak_memory_stats()
    buckets = []                                                 # in which the gradients of several ranks are added up
    try:
        for turn in range(4):
            machine.synchronize()
            clock = time.perf_counter()
            try:
                buckets = buckets or [torch.empty_like(p) for p in model.parameters() if WORLD_SIZE > 1]
                model(idx, idx).backward()                       # added to what the turn before left, as in a step
                if turn == 0:                                    # what else is compiled: here all ranks wait for each other
                    model.score(idx, idx)
                    if rest:
                        model(idx[:rest], idx[:rest]).backward()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                failed = 1
            machine.synchronize()
            seconds = time.perf_counter() - clock
            [failures] = sum_over_ranks([failed], machine.device)
            if failures:                                         # on one rank: no one may wait for it in the exchange below
                return 0.0
            if turn == 1:
                exchanging = WORLD_SIZE > 1
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = 0.0
                    optimizer.step()
                exchanging = False
        model.score(idx, idx)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        failed = 1
        if exchanging:                                           # the others wait in Muon's step: they end with this rank
            raise SystemExit(f"rank {RANK}: no memory for the optimizers' step, at {B} rows; the same command goes on with half "
                             "of DEVICE_BATCH_SIZE or --device_batch_size") from None
    finally:
        model.zero_grad(set_to_none=True)
        for optimizer, before in zip(optimizers, rates):
            optimizer.state.clear()
            for group, rate in zip(optimizer.param_groups, before):
                group["lr"] = rate
        if machine.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
            gc.collect()                                         # an error may hold what was tried
            torch.cuda.empty_cache()                             # the next size needs other blocks
    failures, seconds = sum_over_ranks([failed, seconds], machine.device)
    return 0.0 if failures else B * T * WORLD_SIZE / (seconds / WORLD_SIZE)
