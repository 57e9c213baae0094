"""The contract of the configurator, and the range of every knob of every script."""
import ast
import glob
import os
import subprocess
import sys

import pytest

from conftest import ROOT, run_script
from data import VAL_SHARD
from plumbing.configurator import CHOICES, RANGES, configure, problem_with_value
from plumbing.machine import DTYPES
from tokenizer import MAX_VOCAB_SIZE, SPECIAL_TOKENS


def run(tmp_path, *argv, **files):
    """configure() over a fixed set of knobs; files: name -> content of config files in tmp_path."""
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    scope = dict(depth=12, learning_rate=0.1, run="", fast=False, num_shards=8, prompt="", LIMIT=3, _x=1, function=len,
                 __file__=__file__)
    argv = [str(tmp_path / arg) if arg.endswith(".py") else arg for arg in argv]
    return configure(scope, argv), scope


def test_files_and_flags_apply_left_to_right_and_the_last_wins(tmp_path):
    config, scope = run(tmp_path, "--depth=3", "a.py", "--run=x=y", a="depth = 2 * depth\nimport math\n")
    assert config["depth"] == scope["depth"] == 6 and config["run"] == "x=y"
    assert set(config) == {"depth", "learning_rate", "run", "fast", "num_shards", "prompt"}


def test_only_what_is_overridden_is_printed_with_where_it_comes_from(tmp_path, capsys):
    run(tmp_path, "a.py", "--fast=True", a="depth = 5\n")
    out = capsys.readouterr().out
    assert "a.py" in next(line for line in out.splitlines() if "depth = 5" in line)
    assert "command line" in next(line for line in out.splitlines() if "fast = True" in line)
    assert out.count("\n") == 2 and "learning_rate" not in out


def test_types(tmp_path):
    assert run(tmp_path, "--learning_rate=1")[0]["learning_rate"] == 1.0
    assert run(tmp_path, "--fast=1")[0]["fast"] is True
    assert run(tmp_path, "--run=123")[0]["run"] == "123"
    assert run(tmp_path, "-n", "3")[0]["num_shards"] == 3 and run(tmp_path, "-n=4")[0]["num_shards"] == 4
    assert run(tmp_path, "-p", "Why?")[0]["prompt"] == "Why?"


@pytest.mark.parametrize("argv, words", [
    (["--lerning_rate=1"], "learning_rate"),
    (["--learning-rate=1"], "learning_rate"),
    (["--depth=ten"], "int"), (["--depth=1.5"], "int"), (["--fast=yes"], "bool"), (["--fast=2"], "bool"),
    (["--depth"], "--depth=VALUE"), (["depth=4"], "write --depth=4"), (["missing.py"], "neither"),
    (["--hlp"], "--hlp: there is no knob of that name (--help lists"), (["-q", "hi"], "-q: there is no knob"), (["--"], "--help"),
    (["--LIMIT=4"], "LIMIT"), (["--__name__=x"], "no knob"), (["-n"], "value is missing"),
])
def test_a_mistake_is_one_line_that_says_what_to_write(tmp_path, argv, words):
    with pytest.raises(SystemExit) as error:
        run(tmp_path, *argv)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_answered_with_those_there_are(tmp_path):
    with pytest.raises(SystemExit, match="has small.py"):
        run(tmp_path, "missing.py", small="depth = 1\n")


@pytest.mark.parametrize("text, words", [
    ("lerning_rate = 1\n", "learning_rate"), ("depth = 'ten'\n", "int"), ("depth = \n", "SyntaxError"),
    ("depth = 1 / 0\n", "line 1: ZeroDivisionError"), ("x = [1]\n", "no knob"),
])
def test_a_mistake_in_a_file_names_the_file(tmp_path, text, words):
    with pytest.raises(SystemExit) as error:
        run(tmp_path, "bad.py", bad=text)
    assert words in str(error.value) and "bad.py" in str(error.value)


@pytest.mark.parametrize("script", ["base_train.py", "mid_train.py", "chat_sft.py", "chat_rl.py", "tok_train.py", "prepare.py",
                                    "chat_cli.py", "chat_web.py", "report.py", "plan.py",
                                    "tok_eval.py", "base_eval.py", "chat_eval.py"])
def test_help_shows_the_docstring_and_every_knob_with_its_comment(script, capsys):
    with pytest.raises(SystemExit) as end:
        run_script(script, "--help")
    out = capsys.readouterr().out
    assert end.value.code == 0 and "run     python" in out and " = " in out


def knobs_of(path):
    """The knobs of a script with their defaults, from the lines above its configure(); none for a module."""
    knobs = {}
    for node in ast.parse(open(path, encoding="utf-8").read()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.islower():
            if isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "configure":
                return knobs
            knobs[node.targets[0].id] = ast.literal_eval(node.value)
    return {}


SCRIPTS = {os.path.relpath(path, ROOT): knobs for path in sorted(glob.glob(f"{ROOT}/*.py") + glob.glob(f"{ROOT}/bench/*.py"))
           if (knobs := knobs_of(path))}
NONSENSE = ["nan", "inf", "-inf", "1e999", "-1e999", "", " ", "ten", "None", "[1]", "{[]: 1}", "1+1j", "-" * 9999 + "1",
            "(" * 9999, "9" * 400, "9" * 9999, "a\nb", "\udcff", "1e400", "0x", "__import__('os')"]


def refused(script, *argv):
    """The line that answers these arguments."""
    with pytest.raises(SystemExit) as error:
        configure(SCRIPTS[script] | dict(__file__=os.path.join(ROOT, script)), argv, show=False)
    line = str(error.value)
    assert "\n" not in line and len(line) < 400, line
    return line


def test_every_script_is_found():
    assert len(SCRIPTS) >= 13 and "depth" in SCRIPTS["base_train.py"] and "vocab_size" in SCRIPTS["bench/tokenizer.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_has_a_range_and_its_default_lies_in_it(script):
    name = os.path.basename(script)
    numbers = {knob for knob, value in SCRIPTS[script].items() if type(value) in (int, float)}
    assert not [knob for knob in numbers if knob not in RANGES and f"{name} {knob}" not in RANGES], "add them to RANGES"
    configure(SCRIPTS[script] | dict(__file__=os.path.join(ROOT, script)), [], show=False)


def test_every_range_has_a_knob():
    known = {entry for script, knobs in SCRIPTS.items() for knob in knobs for entry in (knob, f"{os.path.basename(script)} {knob}")}
    assert set(RANGES) | set(CHOICES) <= known


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_value_out_of_range_is_one_line_and_the_ends_of_the_range_are_not(script):
    name = os.path.basename(script)
    for knob, default in SCRIPTS[script].items():
        low, high = RANGES.get(f"{name} {knob}") or RANGES.get(knob, (0, 1))
        numeric = type(default) in (int, float)
        if numeric:
            for value in (low - 1, -1, -10**18, high * 10 + 1):
                assert refused(script, f"--{knob}={value}").startswith(f"{name}: {knob}="), knob
            for value in (low, high):
                assert not problem_with_value(name, knob, value)
        for text in NONSENSE if numeric or type(default) is bool else ["nonsense"] if knob in CHOICES else []:
            assert knob in refused(script, f"--{knob}={text}")


def test_a_value_from_a_file_names_the_file_and_what_0_means(tmp_path):
    (tmp_path / "bad.py").write_text("save_every = 10 ** 5000\n")
    line = refused("base_train.py", str(tmp_path / "bad.py"))
    assert "bad.py: save_every=" in line and "0 = only at the end" in line
    (tmp_path / "bad.py").write_text("matrix_lr = float('nan')\n")
    assert "matrix_lr=nan: must be finite, 0 to" in refused("base_train.py", str(tmp_path / "bad.py"))
    (tmp_path / "bad.py").write_text("matrix_lr = 10 ** 400\n")
    assert "matrix_lr must be float" in refused("base_train.py", str(tmp_path / "bad.py"))


def test_rising_and_falling_learning_rates_are_shares_of_one_run():
    assert "together at most 1" in refused("chat_sft.py", "--warmup_ratio=0.1")
    configure(SCRIPTS["chat_sft.py"] | dict(__file__=f"{ROOT}/chat_sft.py"), ["--warmup_ratio=0.7", "--warmdown_ratio=0.3"])


def test_the_ranges_say_what_the_modules_know():
    assert RANGES["num_shards"][1] == VAL_SHARD and RANGES["vocab_size"][1] == MAX_VOCAB_SIZE
    assert RANGES["tok_train.py vocab_size"][0] == 256 + len(SPECIAL_TOKENS) and set(CHOICES["dtype"]) == {"", *DTYPES}


@pytest.mark.parametrize("path", glob.glob(f"{ROOT}/config/*.py"))
def test_the_config_files_are_in_range(path):
    script = dict(base="base_train.py", mid="mid_train.py", sft="chat_sft.py", rl="chat_rl.py")[path[:-3].rpartition("_")[2]]
    configure(SCRIPTS[script] | dict(__file__=os.path.join(ROOT, script)), [path], show=False)


@pytest.mark.parametrize("script", [script if script == "base_train.py" else pytest.param(script, marks=pytest.mark.full)
                                    for script in SCRIPTS])
def test_a_script_that_is_asked_for_the_impossible_says_so_and_writes_nothing(script, tmp_path):
    number = next((knob for knob, value in SCRIPTS[script].items() if type(value) in (int, float)))
    argv = [script] if os.sep not in script else ["-m", script[:-3].replace(os.sep, ".")]
    done = subprocess.run([sys.executable, *argv, f"--{number}=-1"], cwd=ROOT, capture_output=True, text=True,
                          env=dict(os.environ, NANOCHAT_BASE_DIR=str(tmp_path)))
    assert done.returncode == 1 and not done.stdout and len(done.stderr.splitlines()) == 1 and not os.listdir(tmp_path)
    assert done.stderr.startswith(f"{os.path.basename(script)}: {number}=-1"), done.stderr
