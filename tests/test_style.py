"""
The contracts of the house: what a reader may rely on in every file. Lengths are only printed.
"""
import ast
import functools
import glob
import os
import re

import pytest

from conftest import ROOT

SCRIPTS = ["base_eval", "base_train", "chat_eval", "chat_cli", "chat_rl", "chat_sft", "chat_web", "mid_train", "plan", "prepare",
           "report", "tok_eval", "tok_train"]
FOLDERS = ["bench", "evals", "plumbing", "tasks"]
# every file of ours by the name it is imported with, a folder's __init__.py by the folder's
PATHS = {os.path.relpath(path, ROOT)[:-3].replace(os.sep, ".").removesuffix(".__init__"): path
         for folder in ("", *FOLDERS) for path in glob.glob(os.path.join(ROOT, folder, "*.py"))}
FILES = sorted(name for name in PATHS if not name.startswith("test_"))
PURE_TORCH = ["model", "muon"]


def source(name):
    with open(PATHS[name], encoding="utf-8") as f:
        return f.read()


@functools.cache
def imports(name):
    """The modules of ours that a file imports when it is imported itself."""
    found = set()
    for node in ast.parse(source(name)).body:
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{a.name}" for a in node.names} & set(FILES)     # from plumbing import machine
            found |= inner or {node.module}
    return found & set(FILES) - {name}


def knobs(name):
    """(knob, its line) of a script: lowercase globals above configure()."""
    text = source(name)
    head = text[:text.index("configure(globals()")]
    return [(knob, line) for knob, line in re.findall(r"^([a-z]\w*) = (.*)$", head, re.MULTILINE) if knob != "config"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_knob_is_read(name):
    text = source(name)
    rest = text[text.index("configure(globals()"):] + text[:text.index("configure(globals()")]
    for knob, _ in knobs(name):
        uses = re.findall(rf"\b{knob}\b", re.sub(rf"^{knob} = .*$", "", rest, flags=re.MULTILINE))
        assert uses, f"{name}.py: nothing reads the knob {knob}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_knob_has_its_meaning_on_its_line(name):
    plain = {"target_param_data_ratio", "vocab_size", "total_batch_size"}
    for knob, line in knobs(name):
        if not (name == "plan" and knob in plain):
            assert "#" in line, f"{name}.py: the knob {knob} has no comment"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_knob_is_never_assigned_again(name):
    tree = ast.parse(source(name))
    names = [knob for knob, _ in knobs(name)]
    assigned = [t.id for node in tree.body for n in ast.walk(node) if isinstance(n, (ast.Assign, ast.AugAssign))
                for t in (n.targets if isinstance(n, ast.Assign) else [n.target]) if isinstance(t, ast.Name)]
    again = {knob for knob in names if assigned.count(knob) > 1}
    assert not again, f"{name}.py assigns a knob again: {again}"


def test_scripts_are_never_imported():
    for name in FILES:
        assert not imports(name) & set(SCRIPTS), f"{name}.py imports a script"


def test_model_and_muon_stand_alone():
    for name in PURE_TORCH:
        assert not imports(name)


def test_modules_import_no_circle():
    def reach(name, seen):
        assert name not in seen, f"a circle of imports: {' -> '.join([*seen, name])}"
        for other in imports(name):
            reach(other, [*seen, name])
    for name in FILES:
        reach(name, [])


def test_what_a_folder_may_import():
    below = dict(plumbing=(), tasks=("plumbing",), evals=("plumbing", "tasks"))      # of the folders; the textbook as well
    for name in FILES:
        folder = name.partition(".")[0]
        outside = {other for other in imports(name) if other.partition(".")[0] != folder}
        if folder == "plumbing":
            assert not outside, f"{name} imports {outside}"
        elif folder in below:
            wrong = {other for other in outside if other.partition(".")[0] in set(FOLDERS) - set(below[folder])}
            assert not wrong, f"{name} imports {wrong}"


def test_the_environment_is_read_in_one_place_and_argv_in_one():
    for name in FILES:
        text = source(name)
        if name not in ("plumbing.common", "bench.tokenizer"):
            assert "os.environ" not in text and "getenv" not in text, f"{name}.py reads the environment"
        if name not in ("plumbing.configurator", "bench.tokenizer"):
            assert "sys.argv" not in text, f"{name}.py reads argv"


def test_every_file_says_what_it_does():
    for name in FILES:
        assert ast.get_docstring(ast.parse(source(name))), f"{name}.py has no docstring"


def test_the_tiny_rows_values_are_those_of_its_config_files():
    with open(os.path.join(ROOT, "run_realistic.sh"), encoding="utf-8") as f:
        row = f.read().partition("tiny)")[2].partition(";;")[0]
    named = re.findall(r"\$\(of (\w+) (\w+)\)", row)
    assert len(named) == 8
    for stage, name in named:                    # as the driver's sed reads it: one plain number on a line
        with open(os.path.join(ROOT, "config", f"tiny_{stage}.py"), encoding="utf-8") as f:
            assert len(re.findall(rf"^{name} = \d+\b", f.read(), re.MULTILINE)) == 1


def test_what_the_driver_starts_in_the_background_is_the_program_itself():
    with open(os.path.join(ROOT, "pipeline.sh"), encoding="utf-8") as f:        # of a function $! would be a shell around it
        started = re.findall(r"^\s*(\w+) .*[^&]&(?:\s+#.*)?$", f.read(), re.MULTILINE)
    assert started == ["python"]


def test_lengths_are_printed():
    for name in FILES:
        lines = source(name).splitlines()
        long = [i for i, line in enumerate(lines, 1) if len(line) > 120]
        if len(lines) > 400 or long:
            print(f"{name}.py: {len(lines)} lines, wider than 120 columns: {long}")
