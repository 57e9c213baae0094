"""HumanEval: what is taken from an answer, and that right ones pass and wrong ones do not."""
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import reference_answer
from evals import humaneval, sandbox
from tasks import downloaded

HUB = os.environ.get("NANOCHAT_TEST_HUB", "")
needs_hub = pytest.mark.skipif(not HUB, reason="NANOCHAT_TEST_HUB names no mirror of the hub")
PROBLEM = sandbox.problem_with_layers()
needs_sandbox = pytest.mark.skipif(bool(PROBLEM), reason=PROBLEM)
ROW = {"prompt": 'from typing import List\nimport math\n\n\ndef half(x):\n    return x / 2\n\n\n'
                 'def halves(xs: List[int]) -> List[float]:\n    """ The half of each.\n    >>> halves([2])\n'
                 '    [1.0]\n    """\n',
       "canonical_solution": "    return [half(x) for x in xs]\n",
       "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate([2, 5]) == [1.0, 2.5]\n"
               "    assert half(math.inf)\n",
       "entry_point": "halves"}
RIGHT = "def halves(xs: List[int]):\n    return [math.ldexp(x, -1) for x in xs]"
CONVERSATION = humaneval.humaneval_row(ROW)


def test_a_row_is_a_question_and_an_answer():
    question, answer = (message["content"] for message in CONVERSATION["messages"])
    assert question == ROW["prompt"], "published weights know it so"
    assert answer.count("```") == 2 and "return [half(x) for x in xs]\n```" in answer
    assert CONVERSATION["given"].startswith("from typing") and "def half(x)" in CONVERSATION["given"]
    assert "def halves" not in CONVERSATION["given"]


@pytest.mark.parametrize("answer, code", [
    ("```python\nx = 1\n```", "x = 1\n"),
    ("Sure, here it is:\n```python\nx = 1\n```\nIt works:\n```python\nx = 2\n```", "x = 1\n"),
    ("```\nx = 1\n```", "x = 1\n"), ("```Python \nx = 1\n```", "x = 1\n"), ("```py\nx = 1\n```", "x = 1\n"),
    ("```python3\nx = 1\n```", "x = 1\n"), ("``` python\nx = 1\n```", "x = 1\n"),
    ("``` Python3 \nx = 1\n```", "x = 1\n"),
    ("Here:\r\n```python\r\nx = 1\r\ny = 2\r\n```\r\nDone.", "x = 1\ny = 2\n"),
    ("```python\nx = 1", "x = 1"), ("1. Do it\n   ```python\nx = 1\n   ```", "x = 1\n"),
    ("```python\nx = '```'\n```", "x = '```'\n"), ("x = 1", "x = 1"), ("", "")])
def test_code_is_taken_out_of_an_answer(answer, code):
    assert humaneval.extract_code(answer) == code


@needs_sandbox
@pytest.mark.parametrize("answer, passes", [
    (CONVERSATION["messages"][1]["content"], True), (RIGHT, True), (f"Here:\n```python\n{RIGHT}\n```\nDone.", True),
    (f"```python\n{RIGHT}\n\nif __name__ == '__main__':\n    print(halves(input()))\n```", True),
    (f"```python\n{RIGHT}", True), (f"```python\n{RIGHT.replace('-1', '1')}\n```", False), ("", False), ("I cannot.", False),
    ("```python\ndef halves(xs):\n    import sys; sys.exit(0)\n```", False),
    ("```python\ndef halves(xs):\n    while True: pass\n```", False), ("def other(xs):\n    return []", False),
    ("def check(f):\n    pass", False)])
def test_answers_are_run(answer, passes):
    verdict = humaneval.check(CONVERSATION, answer, timeout=2)
    assert verdict.passed is passes, verdict.reason


def test_nothing_is_run_without_a_sandbox(monkeypatch):
    monkeypatch.setattr(sandbox, "layers", lambda: ("rlimits",))
    with pytest.raises(RuntimeError, match="--unsafe_exec=1"):
        humaneval.check(CONVERSATION, RIGHT)
    assert humaneval.check(CONVERSATION, RIGHT, unsafe=True).passed


def test_the_task_has_the_shape_of_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(downloaded, "base_path", lambda *parts: os.path.join(tmp_path, *parts))
    with pytest.raises(SystemExit, match="not here"):
        len(humaneval.humaneval())
    folder = tmp_path / "task_data" / "humaneval"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([ROW, ROW]), folder / downloaded.SOURCES["humaneval"][1][0])
    task = humaneval.humaneval()
    assert len(task) == 2 and task[1] == CONVERSATION and len(humaneval.humaneval(size=1)) == 1
    assert list(pickle.loads(pickle.dumps(task))) == list(task)
    with pytest.raises(AssertionError, match="split must be one of test"):
        humaneval.humaneval("train")


@needs_hub
@needs_sandbox
def test_reference_solutions_pass_and_empty_functions_do_not(tmp_path, monkeypatch):
    url, files = downloaded.SOURCES["humaneval"]
    source = os.path.join(HUB, url.split("://")[1], files[0])
    monkeypatch.setattr(downloaded, "base_path", lambda *_: source)
    rows = list(humaneval.humaneval())
    start = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        verdicts = list(pool.map(lambda row: humaneval.check(row, reference_answer(row)), rows))
    seconds = time.monotonic() - start
    failed = {row["entry_point"]: verdict.reason for row, verdict in zip(rows, verdicts) if not verdict.passed}
    assert len(rows) == 121 and not failed
    print(f"{len(rows)} solutions in {seconds:.1f} s")
    empty = [f"def {row['entry_point']}(*_):\n    pass" for row in rows]
    with ThreadPoolExecutor(2) as pool:
        assert not any(verdict.passed for verdict in pool.map(humaneval.check, rows, empty))
