"""
Override the knobs at the top of a script, with config files and with flags.

    depth = 12                     # a knob: any lowercase int, float, bool or str
    config = configure(globals())  # every knob above this line can be overridden

    python base_train.py config/tiny_base.py --depth=4 --run=first

A config file is plain Python that assigns knobs. Files and flags apply from left to right, the last one wins. A
misspelt knob or a wrong type ends the run before it starts, in one line: a typo must not cost a night of training.
"""
import ast
import contextlib
import difflib
import os
import sys
import traceback
from types import ModuleType

from plumbing.common import print0

SHORT = {                    # short forms people type, each followed by its value: -n 8
    "-p": "prompt",          # what to ask
    "-i": "source",          # which stage's model: base, mid, sft
    "-a": "tasks",           # which tasks to evaluate
    "-x": "max_problems",    # how many problems of a task
    "-n": "num_shards",      # how many shards of text
}


def configure(scope, argv=None, show=True):
    """
    Apply argv (default: the command line) to the knobs in scope; print what it changed, and where that came from.

    returns {name: value} of every knob as the run sees it; it is saved with the checkpoint
    raises SystemExit with one line when a name, a type or a file is wrong
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
    for name, value in knobs.items():
        assert type(value) in (int, float, bool, str), f"knob {name} = {value!r}: must be an int, float, bool or str"
    if "--help" in args or "-h" in args:             # the docstring, and the knobs with their comments
        with open(scope["__file__"], encoding="utf-8") as f:
            lines = [line.rstrip() for line in f if line.split(" = ")[0] in knobs]
        print("\n".join([(scope.get("__doc__") or "").strip(), "", *lines]))
        raise SystemExit(0)
    came_from = {}                                   # knob -> the file or flag that set it last
    for arg in args:
        read = read_flag if arg.startswith("-") else read_file
        for name, value in read(arg, knobs):
            knobs[name] = checked(name, value, knobs, arg)
            came_from[name] = arg if read is read_file else "command line"
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
        raise SystemExit(f"{arg}: write --{near[0] if near else name}=VALUE (--help lists the knobs)")
    if not isinstance(knobs.get(name), str):
        with contextlib.suppress(ValueError, SyntaxError):       # checked() rejects what is no value and says why
            return [(name, ast.literal_eval(text))]
    return [(name, text)]


def read_file(path, knobs):
    """Run a config file with the current knobs in view; return what it assigned."""
    if not (path.endswith(".py") and os.path.isfile(path)):
        name, equals, _ = path.partition("=")
        if equals and name.replace("-", "_") in knobs:
            raise SystemExit(f"{path}: write --{path}")
        folder = os.path.dirname(path) or "config"
        files = sorted(f for f in os.listdir(folder) if f.endswith(".py")) if os.path.isdir(folder) else []
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


def checked(name, value, knobs, arg):
    """value, if it may replace knobs[name]; an int may stand for a float, 0 and 1 for a bool."""
    if name not in knobs:
        near = difflib.get_close_matches(name.replace("-", "_"), knobs, n=1)
        raise SystemExit(f"{arg}: there is no knob {name!r}; " + (f"did you mean {near[0]}?" if near else "see --help"))
    wanted = type(knobs[name])
    if type(value) is int and (wanted is float or wanted is bool and value in (0, 1)):
        return wanted(value)
    if type(value) is not wanted:
        raise SystemExit(f"{arg}: {name} must be {wanted.__name__}, like {knobs[name]!r}, not {value!r}")
    return value
