"""
Override the knobs at the top of a script, with config files and with flags.

    depth = 12                     # a knob: any lowercase int, float, bool or str
    config = configure(globals())  # every knob above this line can be overridden

    python base_train.py config/tiny_base.py --depth=4 --run=first

A config file is plain Python that assigns knobs. Files and flags apply from left to right, the last one wins. A
misspelt knob, a wrong type or a value out of its range ends the run before it starts, in one line: a typo must not
cost a night of training.
"""
import ast
import contextlib
import difflib
import math
import os
import reprlib
import sys
import traceback
from types import ModuleType

from plumbing.common import names_in, print0

SHORT = {                    # short forms people type, each followed by its value: -n 8
    "-p": "prompt",          # what to ask
    "-i": "source",          # which stage's model: base, mid, sft, rl
    "-a": "tasks",           # which tasks to evaluate
    "-x": "max_problems",    # how many problems of a task
    "-n": "num_shards",      # how many shards of text
}

# The numbers a knob may be, from ... to, both included; "script.py knob" where a script differs from the others. What 0
# means stands on the knob's line. The largest are far above what anybody needs and below what ends in a traceback.
COUNT, SOME, SHARE = (0, 10**9), (1, 10**9), (0, 1)
RANGES = {
    # model and batch; shorter rows than 64 tokens have no room for the prompts of the samples
    "depth": (1, 100), "head_dim": (0, 1024), "max_seq_len": (64, 10**6), "vocab_size": (0, 65536),
    "total_batch_size": (0, 10**8), "device_batch_size": (0, 10**6), "target_examples_per_step": (1, 10**5),
    "examples_per_step": (1, 10**5), "num_samples": (2, 10**4), "eval_samples": (1, 10**4), "max_new_tokens": SOME,
    "batch_size": (1, 10**4), "sft_batch_size": (0, 10**4), "num_processes": (1, 10**4), "rows": (0, 10**5),
    # length, data and mixture
    "num_iterations": COUNT, "mid_iterations": COUNT, "sft_iterations": COUNT, "rl_iterations": COUNT,
    "target_param_data_ratio": (0, 10**6),
    "num_shards": (0, 1822), "identity_rows": (1, 10**7), "spelling_rows": (1, 10**7), "spelling_bee_rows": (1, 10**7),
    # optimizer; with higher rates a step can be too large for float32
    "matrix_lr": (0, 1e38), "embedding_lr": (0, 1e37), "unembedding_lr": (0, 1e37), "init_lr_frac": SHARE,
    "grad_clip": (0, 1e30), "warmup_ratio": SHARE, "warmdown_ratio": SHARE, "final_lr_frac": SHARE,
    # evaluation and checkpoints
    "eval_every": COUNT, "eval_tokens": (0, 10**12), "final_eval_tokens": (0, 10**12), "eval_examples": SOME,
    "eval_metrics_every": COUNT, "eval_metrics_max_problems": COUNT, "sample_every": COUNT, "core_metric_every": COUNT,
    "core_metric_max_per_task": COUNT, "core_max_per_task": COUNT, "max_problems": COUNT, "core_items": COUNT,
    "eval_problems": COUNT, "save_every": COUNT,
    "resume": (0, 1), "step": COUNT, "seed": (0, 2**32 - 1),
    # text, tokenizer, chat, report and benchmarks
    "max_chars": (0, 10**12), "doc_cap": (0, 10**12), "num_chars": (0, 10**12), "encode_chars": (1, 10**12),
    "num_threads": (1, 256), "threads": (0, 1024), "fetch_seconds": (1, 10**6), "temperature": (0, 10**6),
    "top_k": COUNT, "max_tokens": SOME, "gpu_hour_price": (0, 10**6), "rounds": (1, 1000), "turns": (1, 1000),
    "steps": COUNT, "minutes": (0, 10**5), "limit": (1, 10**5), "new_tokens": (1, 10**4), "gigabytes": (0, 10**4),
    "port": (1, 65535), "slots": (1, 1000),
    "base_train.py total_batch_size": (1, 10**8), "chat_rl.py temperature": (0.01, 10**6),
    "plan.py total_batch_size": (1, 10**8), "plan.py vocab_size": (265, 65536),      # 256 bytes and the 9 specials
    "tok_train.py vocab_size": (265, 65536), "tokenizer.py vocab_size": (256, 65536),
    "tokenizer.py num_threads": (0, 256), "train.py depth": (0, 100), "train.py max_seq_len": (0, 10**6),
}
CHOICES = {"device": ("cuda", "mps", "cpu", ""), "dtype": ("float32", "bfloat16", ""), "task": ("gsm8k", "spelling_bee")}


def configure(scope, argv=None, show=True):
    """
    Apply argv (default: the command line) to the knobs in scope; print what it changed, and where that came from.

    returns {name: value} of every knob as the run sees it; it is saved with the checkpoint
    raises SystemExit with one line when a name, a type, a value or a file is wrong
    """
    args, rest = [], iter(sys.argv[1:] if argv is None else argv)
    for arg in rest:                                 # -n 8 or -n=8 becomes --num_shards=8
        short, equals, value = arg.partition("=")
        if short in SHORT:
            value = value if equals else next(rest, None)
            if value is None:
                raise SystemExit(f"{arg}: a value is missing, write {arg} VALUE")
            arg = f"--{SHORT[short]}={value}"
        args.append(arg)
    knobs = {name: value for name, value in scope.items() if is_knob(name, value)}
    with open(scope["__file__"], encoding="utf-8") as f:                         # knob -> its line
        lines = {name: line.rstrip() for line in f if (name := line.split(" = ")[0]) in knobs}
    if "--help" in args or "-h" in args:             # the docstring, and the knobs with their comments
        print("\n".join([(scope.get("__doc__") or "").strip(), "", *lines.values()]))
        raise SystemExit(0)
    came_from = {}                                   # knob -> the file or flag that set it last
    for arg in args:
        read = read_flag if arg.startswith("-") else read_file
        for name, value in read(arg, knobs):
            knobs[name] = checked(name, value, knobs, arg if read is read_file else f"--{name}")
            came_from[name] = arg if read is read_file else "command line"
    script = os.path.basename(scope["__file__"])
    for name, value in knobs.items():                # a default, too: it may have been edited
        if problem := problem_with_value(script, name, value):
            origin = f"{file}: " if (file := came_from.get(name, "")).endswith(".py") else ""
            meaning, as_typed = lines.get(name, "").partition("#")[2].strip(), shown(value).strip("'")
            raise SystemExit(f"{script}: {origin}{name}={as_typed}: {problem}" + (meaning and f" ({meaning})"))
    up, down = (knobs.get(name, 0) for name in ("warmup_ratio", "warmdown_ratio"))
    if up + down > 1 + 1e-9:                         # not a hair above: 0.7 + 0.3 is right
        raise SystemExit(f"{script}: warmup_ratio={up}, warmdown_ratio={down}: shares of one run, together at most 1; "
                         f"with this warm-up --warmdown_ratio={1 - up:g} fits")
    for name, origin in came_from.items() if show else ():
        print0(f"  {name} = {knobs[name]!r}   ({origin})")
    scope.update(knobs)
    return knobs


def is_knob(name, value):
    """Lowercase data is a knob; UPPERCASE is a constant, _x is private, the rest is code."""
    code = callable(value) or isinstance(value, ModuleType)
    return name == name.lower() and not name.startswith("_") and not code


def read_flag(arg, knobs):
    """'--depth=4' -> [('depth', 4)]; a str knob takes the text as it stands."""
    name, equals, text = arg.lstrip("-").partition("=")
    if not arg.startswith("--") or not equals:
        near = difflib.get_close_matches(name.replace("-", "_"), knobs, n=1)
        remedy = f"write --{near[0]}=VALUE" if near else "there is no knob of that name"
        raise SystemExit(f"{arg}: {remedy} (--help lists the knobs)")
    if not isinstance(knobs.get(name), str):
        # what is no value, checked() rejects and says why
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return [(name, ast.literal_eval(text))]
    return [(name, text)]


def read_file(path, knobs):
    """Run a config file with the current knobs in view; return what it assigned."""
    if not (path.endswith(".py") and os.path.isfile(path)):
        name, equals, _ = path.partition("=")
        if equals and name.replace("-", "_") in knobs:
            raise SystemExit(f"{path}: write --{path}")
        folder = os.path.dirname(path) or "config"
        files = sorted(name for name in names_in(folder) if name.endswith(".py"))
        raise SystemExit(f"{path}: neither --knob=value nor the path of a config file"
                         + (f"; {folder}/ has {', '.join(files)}" if files else ""))
    names = dict(knobs)
    try:
        with open(path, encoding="utf-8") as f:
            exec(compile(f.read(), path, "exec"), names)
    except Exception as error:
        entries = traceback.walk_tb(error.__traceback__)
        line = next((f" line {number}" for frame, number in entries if frame.f_code.co_filename == path), "")
        raise SystemExit(f"{path}{line}: {type(error).__name__}: {error}")
    return [(name, value) for name, value in names.items()
            if is_knob(name, value) and (name not in knobs or value is not knobs[name])]


def checked(name, value, knobs, origin):
    """value, if it may replace knobs[name]; an int may stand for a float, 0 and 1 for a bool."""
    if name not in knobs:
        near = difflib.get_close_matches(name.replace("-", "_"), knobs, n=1)
        raise SystemExit(f"{origin}: there is no knob {name!r}; " +
                         (f"did you mean {near[0]}?" if near else "see --help"))
    wanted = type(knobs[name])
    if type(value) is int and (wanted is float and abs(value) < 2**63 or wanted is bool and value in (0, 1)):
        return wanted(value)
    if type(value) is not wanted:
        raise SystemExit(f"{origin}: {name} must be {wanted.__name__}, like {shown(knobs[name])}, not {shown(value)}")
    return value


def problem_with_value(script, name, value):
    """What keeps a script's knob from having this value, "" for nothing; a number in no table has only to be finite."""
    if isinstance(value, str):
        choices = CHOICES.get(name, [value])
        return "" if value in choices else "must be " + " or ".join(choice or '""' for choice in choices)
    low, high = RANGES.get(f"{script} {name}") or RANGES.get(name, (-1e308, 1e308))
    finite = "finite, " if isinstance(value, float) and not math.isfinite(value) else ""
    return "" if low <= value <= high else f"must be {finite}{low:,} to {high:,}"


def shown(value):
    """A value for a message: its repr, cut where it is long."""
    try:
        return reprlib.repr(value)
    except ValueError:                               # Python writes no int of thousands of digits
        return "a number with thousands of digits"
