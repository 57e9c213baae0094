"""
What only a GPU can answer, measured in order of worth: bash bench/gpu_day.sh runs this and says what may be set.

Every measurement is a line in results.jsonl, also one that failed. Without a GPU the sizes are those of toys: that
everything runs is then all that is seen.

reads   <out>/results.jsonl of earlier starts; in NANOCHAT_BASE_DIR base_data/, tokenizer/, task_data/, or embedded text
writes  <out>/results.jsonl, table.md, log.txt; checkpoints below NANOCHAT_BASE_DIR
"""
import contextlib
import datetime
import fcntl
import functools
import glob
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from plumbing.common import ROOT, atomic_write, base_path, duration, read_log
from plumbing.configurator import configure

out = ""                       # folder of the results
minutes = 0.0                  # begin nothing that would end later, and end what does; 0 = all the time it takes
part = ""                      # names or numbers of parts, with commas between; "" = all
commit = ""                    # of this code, for the results
gpu = False                    # 1 = this machine has one: a torch that can't use it is an error
limit = 480                    # seconds after which a single measurement is ended
config = configure(globals(), show=False)

PARTS = {                      # number, name: what it answers
    "stages": "does every stage run, compiled and in bf16: a short run from text to chat",
    "fit": "the micro-batch that is found by trying, against the formula",
    "bench": "a training step beside the original's way",
    "memory": "memory of a training step, in values kept per token and layer",
    "decode": "generation",
    "resume": "a run that was killed (-9) and resumed, against one that was not",
    "curve": "the loss of a run compiled and eager, and with other first weights",
    "cards": "the micro-batch on smaller cards, played on this one",
}
TOKENIZER = {"stages", "resume", "curve"}          # parts that need one, and with it rustbpe
# in order of worth: part, measurement, seconds it may take (a guess for an H200, until results.jsonl of one is seen)
GPU_DAY = """
    stages text 30, stages base_train 150, stages mid_train 110, stages chat_sft 70, stages base_eval 50,
    stages chat_eval 70, stages chat_rl 70, stages chat_cli 20, stages report 10,
    fit d12 90, bench d12 150, fit d20 150, bench d20 300, memory d12 60, cards d12-in-12GB 130,
    resume d6 150, curve d12 200, decode d12 30, cards d20-in-24GB 240,
    fit d16 120, bench d16 240, cards d20-in-40GB 180, fit d14 100, bench d14 200, fit d18 140, bench d18 270,
    memory d20 90, cards d14-in-40GB 120, cards d12-in-16GB 90, cards d16-in-24GB 150, memory d14 70,
    cards d16-in-16GB 150, cards d18-in-24GB 180, cards d18-in-40GB 180, decode d20 40"""
TOY_DAY = """
    stages text 15, stages base_train 15, stages mid_train 30, stages chat_sft 30, stages base_eval 15,
    stages chat_eval 20, stages chat_rl 20, stages chat_cli 10, stages report 10,
    fit d1 15, bench d1 30, memory d1 10, decode d1 10, resume d1 40, curve d1 40, cards d1-in-12GB 10"""
# what the parts that train run with
BASE = "--depth=12 --max_seq_len=1024 --total_batch_size=524288 --num_iterations=40"
BASE_TOY = "--depth=1 --head_dim=32 --max_seq_len=256 --total_batch_size=2048 --num_iterations=5 --dtype=float32"
TOY = "--head_dim=32 --max_seq_len=64 --total_batch_size=512 --dtype=float32"
BENCH = {"d12": "--max_seq_len=1024 --rows=128 --device_batch_size=64"}          # of other depths:
BENCH_2048 = "--max_seq_len=2048 --rows=64 --device_batch_size=16"
BENCH_TOY = "--max_seq_len=32 --vocab_size=256 --rows=4 --steps=1 --turns=1"
# of the stages: where those that train leave their models, and which one each needs
FOLDERS = dict(base_train="base_checkpoints", mid_train="mid_checkpoints", chat_sft="chatsft_checkpoints",
               chat_rl="chatrl_checkpoints")
NEEDS = dict(mid_train="base_train", base_eval="base_train", chat_sft="mid_train", chat_eval="chat_sft",
             chat_rl="chat_sft", chat_cli="chat_sft", report="chat_sft")


class Failed(Exception):
    """A measurement that gave no result, with the reason in one line."""


def call(argv, ends, kill_when=None):
    """
    Run python with these arguments, its output going to log.txt -> the output.

    ends       time.monotonic() at which it is killed, with all that it has started
    kill_when  a function: as soon as it says True, the process gets signal 9 and that is no failure
    raises     Failed
    """
    begin, killed, name = log.tell(), False, argv[1] if argv[0].startswith("-") else argv[0]
    print(f"\n$ python {' '.join(argv)}", file=log, flush=True)
    # a group of its own; it keeps the lock, so that what outlives us is not overlooked at the next start
    process = subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log,
                               stderr=subprocess.STDOUT, preexec_fn=os.setpgrp, pass_fds=[lock.fileno()])
    os.pwrite(lock.fileno(), f"{process.pid:<10}".encode(), 0)
    try:
        while process.poll() is None and time.monotonic() < ends:
            time.sleep(0.02)
            if kill_when and not killed and kill_when():
                process.kill()
                killed = True
        late = process.poll() is None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    log.seek(0, os.SEEK_END)
    with open(log.name, encoding="utf-8", errors="replace") as f:
        f.seek(begin)
        text = f.read()
    if late:
        raise Failed(f"{name}: ended, it took longer than it may")
    if kill_when and not killed:
        raise Failed(f"{name}: was over before it could be killed")
    if process.returncode and not killed:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        named = [line for line in lines if "Error: " in line]
        reason = f"killed by signal {-process.returncode}" if process.returncode < 0 else [*lines, *named][-1]
        raise Failed(f"{name}: {reason}"[:400])
    return text


def last_json(text):
    """The figures that a measurement printed last; warnings of torch may stand behind them, and begin with [ too."""
    for line in reversed(text.splitlines()):
        with contextlib.suppress(ValueError):
            if line.startswith(("{", "[")):
                return json.loads(line)
    raise Failed("it printed no figures")


# ---------------------------------------------------------------------------------------------
# the parts: (item, ends) -> figures, one dict or a list of them


def stages(item, ends):
    """One stage with its real script, from first weights, few steps: how long, how fast, how much memory."""
    clock = time.monotonic()
    made = make_text(ends)
    if item == "text":
        return dict(seconds=time.monotonic() - clock, made=made)
    if item in NEEDS and not glob.glob(base_path(FOLDERS[NEEDS[item]], "day", "meta_*.json")):
        stages(NEEDS[item], ends)                                # its result came from another machine, or is no more
        clock = time.monotonic()
    steps, few, base = (3, 1, BASE_TOY) if toy else (20, 20, BASE)
    tasks = f"--embedded={int(not os.path.isdir(base_path('task_data')))}"
    rows = "--spelling_rows=200 --spelling_bee_rows=50 --identity_rows=100" if toy else "--spelling_rows=30000"
    argv = dict(
        base_train=f"{base} --core_metric_every=0",
        mid_train=f"--source_tag=day {tasks} {rows} --num_iterations={steps} --assistant_name=nanochat",
        chat_sft=f"--source_tag=day {tasks} --num_iterations={steps} --eval_examples=20 "
                 f"--eval_metrics_max_problems={few}",
        chat_rl=f"--source_tag=day --task=spelling_bee --num_iterations={steps} --eval_examples={few} --eval_every=0 "
                + "--examples_per_step=2 --num_samples=2 --max_new_tokens=8" * toy,
        base_eval="--tasks=bpb,samples",
        chat_eval=f"{tasks} --max_problems={few} --max_tokens={4 * few}",
        chat_cli="--prompt=Hello --max_tokens=16",
        report="--copy_to=",
    )[item]
    argv = [f"{item}.py", *argv.split()]
    if item in FOLDERS:
        return trained(*train(FOLDERS[item], "day", argv, ends))
    call([*argv, "--model_tag=day"], ends)
    return dict(seconds=time.monotonic() - clock)


def make_text(ends):
    """Text and a tokenizer, where they are missing -> what was made."""
    made = []
    if not glob.glob(base_path("base_data", "shard_*.parquet")):
        made.append("embedded text")
        call(["prepare.py", "--embedded=1"], ends)
    if not os.path.exists(base_path("tokenizer", "meta.json")):
        # the embedded text, 2.5 MB, gives some 30,000 tokens at most
        small = sum(map(os.path.getsize, glob.glob(base_path("base_data", "*.parquet")))) < 20e6
        size = 1024 if toy else 16384 if small else 65536
        made.append(f"{size:,} tokens")
        call(["tok_train.py", f"--vocab_size={size}", "--max_chars=100000000"], ends)
    return ", ".join(made)


def train(folder, tag, argv, ends):
    """Run a training stage anew, or go on with --resume=1 -> (seconds, meta of its newest checkpoint, log, output)."""
    if "--resume=1" not in argv:
        shutil.rmtree(base_path(folder, tag), ignore_errors=True)
    clock = time.monotonic()
    said = call([*argv, f"--model_tag={tag}"], ends)
    with open(max(glob.glob(base_path(folder, tag, "meta_*.json"))), encoding="utf-8") as f:
        return time.monotonic() - clock, json.load(f), read_log(base_path(folder, tag)), said


def trained(seconds, meta, log_rows, said):
    """The figures of a training stage."""
    steps = [row for row in log_rows if "tokens_per_second" in row]
    later, what = steps[len(steps) // 2:], "loss" if "loss" in steps[0] else "reward"    # the first ones compile
    compiled = not toy and meta["config"].get("compile_model", False) and "torch.compile fails" not in said
    return dict(seconds=seconds, steps=len(steps), dtype=meta["machine"]["dtype"], compiled=compiled,
                micro_batch=meta["device_batch_size"],
                tokens_per_second=statistics.median(row["tokens_per_second"] for row in later),
                mfu=statistics.median(row["mfu"] for row in later) if later[0]["mfu"] else None,
                peak_bytes=meta["peak_memory"], **{f"first_{what}": steps[0][what], f"last_{what}": steps[-1][what]})


def measured(item, ends, what):
    """What bench/measure.py measures: "d20" or, on a card that is played, "d20-in-24GB"."""
    depth, _, card = item.partition("-in-")
    played = [f"--gigabytes={card[:-2]}"] if card else []
    return last_json(call(["-m", "bench.measure", f"--what={what}", f"--depth={depth[1:]}", *played], ends))


def bench(item, ends):
    """What bench.train finds, a row for each variant; ours with its ratios to the original's way."""
    flags = BENCH_TOY if toy else f"{BENCH.get(item, BENCH_2048)} --steps=4 --turns=2"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "bench.jsonl")
        call(["-m", "bench.train", "--compare=1", f"--depth={item[1:]}", *flags.split(), f"--json={path}"], ends)
        with open(path, encoding="utf-8") as f:
            found = [json.loads(line) for line in f]
    rows = {}
    for one in found:
        row = rows[one["variant"], one["mode"]] = {key: one.get(key) for key in (
            "variant", "mode", "dtype", "sequence_len", "device_batch_size", "tokens_per_second", "mfu", "peak_bytes",
            "startup_seconds", "loss", "failed")}
    for (variant, mode), row in rows.items():
        plain = rows.get(("reference", mode), {})
        if variant == "ours" and not row["failed"] and plain and not plain["failed"]:
            row.update(speed_ratio=row["tokens_per_second"] / plain["tokens_per_second"],
                       memory_ratio=row["peak_bytes"] / plain["peak_bytes"] if plain["peak_bytes"] else None)
    return list(rows.values())


def resume(item, ends):
    """A run that was killed with signal 9 and resumed, beside one that ran through; if they differ, beside a second."""
    make_text(ends)
    steps, save, size = (12, 4, TOY) if toy else (60, 20, "--max_seq_len=1024 --total_batch_size=65536")
    argv = f"base_train.py --depth={item[1:]} {size} --num_iterations={steps} --save_every={save} --sample_every=0 " \
        "--core_metric_every=0 --final_eval_tokens=8192"
    argv, folder, killed = argv.split(), "base_checkpoints", base_path("base_checkpoints", "killed")

    def run(tag, *flags):
        _, meta, rows, _ = train(folder, tag, [*argv, *flags], ends)
        return meta["files"][f"model_{steps:06d}.pt"][1], {row["step"]: row["loss"] for row in rows if "loss" in row}

    def saved():
        return sorted(glob.glob(os.path.join(killed, "meta_*.json")))

    def reached():
        return max([row["step"] for row in read_log(killed)], default=0)

    through = run("through")
    shutil.rmtree(killed, ignore_errors=True)
    call([*argv, "--model_tag=killed"], ends, kill_when=lambda: saved() and reached() > save)
    figures = dict(steps=steps, resumed_from=int(saved()[-1][-11:-5]), killed_after_step=reached())
    figures.update(differences(through, run("killed", "--resume=1")))
    if not figures["same_weights"]:
        figures.update({f"{key}_of_two_through": value for key, value in differences(through, run("again")).items()})
    for tag in ("through", "killed", "again"):
        shutil.rmtree(base_path(folder, tag), ignore_errors=True)
    return figures


def differences(a, b):
    """Whether two runs, (sha256 of the weights, {step: loss}), are the same bit for bit."""
    apart = [abs(a[1][step] - b[1][step]) for step in a[1]]
    return dict(same_weights=a[0] == b[0], steps_with_other_loss=sum(x > 0 for x in apart),
                largest_loss_difference=max(apart))


def curve(item, ends):
    """The same steps compiled and eager; and with other first weights, which says how far apart two runs are anyway."""
    make_text(ends)
    steps, size = (6, TOY) if toy else (300, "--max_seq_len=1024 --total_batch_size=16384 --device_batch_size=16")
    argv = f"base_train.py --depth={item[1:]} {size} --num_iterations={steps} --core_metric_every=0 " \
        "--final_eval_tokens=8192"
    means, results, width = {}, [], steps // 6
    for name, flag in dict(compiled="--compile_model=1", eager="--compile_model=0", other_weights="--seed=43").items():
        found = train("base_checkpoints", "curve", [*argv.split(), flag], ends)
        losses = [row["loss"] for row in found[2] if "loss" in row]
        means[name] = [sum(losses[i:i + width]) / width for i in range(0, steps, width)]
        results.append(dict(
            run=name, compiled=trained(*found)["compiled"], steps=steps, seconds=found[0], val_bpb=found[1]["val_bpb"],
            largest_difference=max(abs(x - y) for x, y in zip(means[name], means["compiled"])),
            mean_loss_of_each_sixth=", ".join(f"{x:.4f}" for x in means[name])))
    shutil.rmtree(base_path("base_checkpoints", "curve"), ignore_errors=True)
    return results


fit, memory, decode = (functools.partial(measured, what=what) for what in ("fit", "memory", "decode"))
measures = dict(stages=stages, fit=fit, bench=bench, memory=memory, decode=decode, resume=resume, curve=curve, cards=fit)


# ---------------------------------------------------------------------------------------------
# results: lines and their table


def read_results(path):
    """The lines of earlier starts, whatever their device; one that is damaged is left out."""
    lines = []
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as f:
        for number, line in enumerate(f, 1):
            # damaged is all of which no table can be written
            with contextlib.suppress(ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
                table([one := json.loads(line)]).encode()
                lines.append(one)
                continue
            print(f"{path}: line {number} is damaged and left out")
    return lines


def shown(key, value):
    """A figure for people."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value.replace("|", "\\|").replace("\n", " ")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.endswith("_bytes"):
        return f"{value / 1e9:.2f} GB"
    if key == "mfu":
        return f"{100 * value:.1f} %"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def table(lines):
    """Markdown: a section per device, in it a table per part; of each measurement the last line counts."""
    text = ["# GPU day\n"]
    for device in dict.fromkeys(line["device"] for line in lines):
        newest = {(line["part"], line["item"]): line for line in lines if line["device"] == device}.values()
        made = {f"{line['date'][:10]}, torch {line['torch']}, commit {line['commit'] or 'unknown'}" for line in newest}
        text += [f"## {device}\n", "; ".join(sorted(made)) + "\n"]
        if any(line["toy"] for line in newest):
            text.append("No GPU: **toy sizes on a CPU**. They show that everything runs, and nothing about speed.\n")
        for number, (name, question) in enumerate(PARTS.items()):
            if of_part := [line for line in newest if line["part"] == name]:
                text += [f"### {number}. {name}: {question}\n", *part_table(name, of_part), ""]
    return "\n".join(text)


def part_table(name, lines):
    """The lines of a part as those of a table, and below it what has failed."""
    rows = [{name: line["item"], **row} for line in lines if (figures := line.get("figures"))
            for row in (figures if isinstance(figures, list) else [figures])]
    columns = list(dict.fromkeys(key for row in rows for key, value in row.items() if value is not None))
    failed = [f"- {line['item']}: **failed**: {shown('', line['error'])}" for line in lines if "error" in line]
    if not rows:
        return failed
    cells = [[key.replace("_", " ") for key in columns], ["---"] * len(columns),
             *([shown(key, row.get(key)) for key in columns] for row in rows)]
    return ["| " + " | ".join(row) + " |" for row in cells] + [""] * bool(failed) + failed


def write(lines):
    """The results and their table, both anew and as a whole: a torn line can't be."""
    with atomic_write(os.path.join(out, "results.jsonl"), "w") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)
    with atomic_write(os.path.join(out, "table.md"), "w") as f:
        f.write(table(lines))


# ---------------------------------------------------------------------------------------------
# the day

begin = time.monotonic()
names = {str(number): name for number, name in enumerate(PARTS)}
wanted = [names.get(one.strip(), one.strip()) for one in part.split(",") if one.strip()] or list(PARTS)
if wrong := [name for name in wanted if name not in PARTS]:
    raise SystemExit(f"part={wrong[0]}: must be some of " + ", ".join(f"{i} {name}" for i, name in names.items()))
if not out or minutes < 0 or limit <= 0:
    raise SystemExit(f"out={out}, minutes={minutes}, limit={limit}: must be a folder, 0 or more, and more than 0; "
                     "bash bench/gpu_day.sh sets them")
try:
    os.makedirs(out, exist_ok=True)
    os.makedirs(base_path(), exist_ok=True)
    lock_path = os.path.join(os.path.dirname(base_path()), "lock")              # one for all DATA: there is one GPU
    lock = open(os.open(lock_path, os.O_RDWR | os.O_CREAT), "r+")
    log = open(os.path.join(out, "log.txt"), "a", encoding="utf-8")
except OSError as error:
    raise SystemExit(f"{error.filename}: {error.strerror}; set OUT or NANOCHAT_BASE_DIR to folders that can be "
                     "written") from None
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    lock.seek(0)
    raise SystemExit(f"{lock_path}: another start of this, or what it left behind, is at work; wait, or: "
                     f"kill -9 -- -{lock.read().strip()}") from None
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: sys.exit("\nended by a signal; the same command goes on"))

results = read_results(os.path.join(out, "results.jsonl"))
try:
    found = last_json(call(["-m", "bench.measure", "--what=device"], begin + 120))
except Failed as problem:
    raise SystemExit(f"{sys.executable} can't measure: {problem}; PYTHON=... names another") from None
toy = not found["gpu"]
if toy and gpu:
    raise SystemExit(f"there is a GPU, but torch {found['torch']} of {sys.executable} can't use it; PYTHON=... names "
                     "another")
print(", ".join(f"{key} {value}" for key, value in found.items()) + "; toy sizes, on the CPU" * toy, flush=True)

if TOKENIZER & set(wanted):
    try:
        call(["-c", "from tokenizer import import_rustbpe; import_rustbpe()"], begin + 120)
    except Failed as problem:
        print(f"without {', '.join(name for name in wanted if name in TOKENIZER)}: {problem}", flush=True)
        wanted = [name for name in wanted if name not in TOKENIZER]

# what has a result is done; what has failed or was killed comes last, so that it keeps nothing else from its turn
last = {(line["part"], line["item"]): line for line in results if line["device"] == found["device"]}
done = [key for key, line in last.items() if "figures" in line]
items = [one.split() for one in (TOY_DAY if toy else GPU_DAY).split(",")]
items = [(name, item, int(seconds)) for name, item, seconds in items if name in wanted]
todo = sorted((item for item in items if item[:2] not in done), key=lambda item: item[:2] in last)
if len(todo) < len(items):
    print(f"{len(items) - len(todo)} of {len(items)} measurements are in {out} already", flush=True)
left, failures = [], 0
for name, item, seconds in todo:
    clock, free = time.monotonic(), begin + 60 * minutes - time.monotonic() if minutes else float("inf")
    if seconds > free:
        left.append((name, item, seconds))
        continue
    label = dict(part=name, item=item, device=found["device"], toy=toy, torch=found["torch"], commit=commit,
                 date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"))
    write([*results, dict(label, error="was begun and did not end")])    # what stands there if this is killed, too
    print(f"{name} {item} ...", end=" ", flush=True)
    try:
        outcome, said = dict(figures=measures[name](item, clock + min(limit, free))), ""
    except Exception as error:                                   # whatever it is, the next one is measured
        failures += 1
        outcome = dict(error=str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}")
        said = f", FAILED: {outcome['error']}"
    results.append(dict(label, took_seconds=time.monotonic() - clock, **outcome))
    write(results)
    print(f"{duration(time.monotonic() - clock)}{said}", flush=True)

print("\n" + table(results))
print(f"{out}: results.jsonl, table.md, log.txt; {duration(time.monotonic() - begin)}"
      + (f"; {failures} failed" if failures else ""))
if left:
    print(f"not begun, {duration(sum(seconds for _, _, seconds in left))} by guess: "
          + ", ".join(f"{name} {item} ({duration(seconds)})" for name, item, seconds in left))
