"""The contract of the configurator."""
import subprocess
import sys

import pytest

from conftest import ROOT
from plumbing.configurator import configure


def run(tmp_path, *argv, **files):
    """configure() over a fixed set of knobs; files: name -> content of config files in tmp_path."""
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    scope = dict(depth=12, learning_rate=0.1, run="", fast=False, num_shards=8, prompt="", LIMIT=3, _x=1, function=len)
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
    (["--depth"], "--depth=VALUE"), (["depth=4"], "write --depth=4"), (["--"], "VALUE"), (["missing.py"], "neither"),
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


@pytest.mark.parametrize("script", ["base_train.py", "mid_train.py", "chat_sft.py", "tok_train.py", "prepare.py",
                                    "chat_cli.py", "report.py", "plan.py",
                                    "tok_eval.py", "base_eval.py", "chat_eval.py"])
def test_help_shows_the_docstring_and_every_knob_with_its_comment(script):
    out = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "run     python" in out and " = " in out
