"""
HumanEval: complete a Python function; an answer is right when the function passes its tests, which sandbox.py runs.

reads   task_data/humaneval/, which python prepare.py --tasks=1 fetches: 164 problems, never trained on
"""
import re

from evals import sandbox
from tasks.downloaded import PARQUET, from_parquet
from tasks.task import must_be

# The first block of code, with or without its language; an answer cut short has no closing fence.
BLOCK = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:^[ \t]*```|\Z)",
                   re.DOTALL | re.MULTILINE | re.IGNORECASE)


def humaneval(split="test", size=0):
    """Functions to complete from their first line and docstring (164 test, no train)."""
    must_be("split", split, ("test",))
    columns = ["prompt", "canonical_solution", "test", "entry_point"]
    return from_parquet("humaneval", [PARQUET % split], columns, humaneval_row, size)


def humaneval_row(row):
    """
    The conversation of a problem, and what its check needs.

    The user's message is the prompt alone, as in the original nanochat, with whose scores ours are compared.
    """
    # an answer need not repeat what stands above: imports, sometimes another function that the tests call as well
    given, _, _ = row["prompt"].partition(f"def {row['entry_point']}(")
    solution = f"{row['prompt']}{row['canonical_solution']}".strip()
    return {"messages": [{"role": "user", "content": row["prompt"]},
                         {"role": "assistant", "content": f"```python\n{solution}\n```"}],
            "grading": "program", "given": given, "test": row["test"], "entry_point": row["entry_point"]}


def extract_code(answer):
    """The code in an answer: its first ``` block; without one the whole text. A line may end as on Windows."""
    answer = answer.replace("\r\n", "\n")
    block = BLOCK.search(answer)
    return block[1] if block else answer


def check(conversation, answer, timeout=5.0, unsafe=False):
    """Run an answer with the tests of its problem -> sandbox.Verdict; the rest is as in sandbox.run_program."""
    program = "\n".join([conversation["given"], extract_code(answer), conversation["test"],
                         f"check({conversation['entry_point']})\n"])
    return sandbox.run_program(program, timeout, unsafe=unsafe)
