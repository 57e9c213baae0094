"""The calculator: right on what it knows, None and quick on everything else, in any thread."""
import random
import re
import threading
import time
from fractions import Fraction

import pytest

from plumbing.calculator import MAX_ABS, MAX_CHARS, calculate

RIGHT = {
    "48/2": "24", "48+24": "72", "12/60": "0.2", "0.2*50": "10", "16-3-4": "9", "(1+2)*3": "9",
    "-3+1": "-2", "+5": "5", "7//2": "3", "7%4": "3", "-7//2": "-4", "1/3": "0.333333333",
    "0.1+0.2": "0.3", "2*.5": "1", "5.": "5", " 1 + 1 ": "2", "1,000+1": "1001",
    "1,234,567.5": "1234567.5", "007+1": "8", "0": "0", "00.50": "0.5", "100*1,000": "100000",
    "20000000001/2": "10000000000.5", "7000000000-0.5": "6999999999.5", "-1/10000000000": "-0.0000000001",
    "20000000000/3": "6666666667", "10/3": "3.333333333", "100/3*3": "100", "1/1024": "0.0009765625", "0*-5": "0",
    "2/3000000000": "0.000000000666666667", "123456789012345.678-0.001": "123456789012345.677",
    "((((2))))": "2", "10.0": "10", "1e3": None, "999999999*999999": "999998999000001",
    "'strawberry'.count('r')": "3", '"strawberry".count("r")': "3", "'banana'.count('an')": "2",
    "'a,b'.count(',')": "1", "'it'.count('x')": "0", "'1,000'.count('1000')": "0",
    "'a'.count('a')+1": "2", "'don\"t'.count('\"')": "1", "''.count('a')": "0",
    "'''a'''.count('a')": "1", "'née'.count('é')": "1",
}
NOTHING = [
    "", " ", "x", "2**10", "9**9**9", "1e999", "1_000", "0x10", "1j", "True", "1 2", "1+", "(", ")",
    "()", "1,00", "1,0000", "12,34", "1,000,", "(1,2)", "[1]", "1<2", "1 if 1 else 2", "1;2",
    "1\n+1", "1\t+1", "not 1", "~1", "1@2", "1/0", "1%0", "5//0.0", "5%", "'a'", "'a'*3", "'a'+'b'",
    "'a' 'b'", "'a'.count", "'a'.count()", "'a'.count('a','b')", "'a'.upper()", "'%s'%5",
    "'a'.count(1)", "'a'.count('a').count('a')", "f'a'.count('a')", "b'a'.count(b'a')",
    "'\\x61'.count('a')", "'a\n'.count('a')", "('a').count('b').real",
    "__import__('os').system('ls')", "().__class__", "lambda: 1", "open('/etc/passwd')", "print(1)",
    "9" * 300, "1" + "0" * 20, "9999999999*9999999999", "1+" * 200 + "1", "(" * 21 + "1" + ")" * 21,
    "-" * 200 + "1", "\x00", "１+１", "٣+1", "1+\ud800", None, 5, b"1+1",
]


@pytest.mark.parametrize("expression", RIGHT)
def test_right(expression):
    assert calculate(expression) == RIGHT[expression]


@pytest.mark.parametrize("expression", NOTHING, ids=range(len(NOTHING)))
def test_everything_else_is_nothing(expression):
    assert calculate(expression) is None


def test_long_chains_are_fine():
    chain = "+".join(["1"] * (MAX_CHARS // 2))
    assert calculate(chain) == str(MAX_CHARS // 2)


def random_expression(rng, depth):
    """(text, exact value, whether all numbers on the way are of a size that is allowed), made together."""
    if depth == 0 or rng.random() < 0.2:
        places = rng.choice((0, 0, 1, 2, 4))
        whole, part = rng.randrange(10 ** rng.randrange(1, 13)), rng.randrange(10 ** places)
        text = f"{whole}.{part:0{places}d}" if places else str(whole)
        return text, Fraction(text), True
    (left, a, fits_a), (right, b, fits_b) = random_expression(rng, depth - 1), random_expression(rng, depth - 1)
    sign = rng.choice("+-*/" if b else "+-*")
    value = a + b if sign == "+" else a - b if sign == "-" else a * b if sign == "*" else a / b
    fits = fits_a and fits_b and (value == 0 or Fraction(1, MAX_ABS) <= abs(value) <= MAX_ABS)
    return (f"({left}{sign}{right})", value, fits) if rng.random() < 0.9 else (f"-({left}{sign}{right})", -value, fits)


def is_written_well(value, text):
    """Exact where 20 significant digits do, else to nine of them, and as people write a number."""
    places = next((n for n in range(60) if (value * 10 ** n).denominator == 1), None)
    digits = len(str(abs(value * 10 ** places)).rstrip("0")) if places is not None else 99
    error = abs(Fraction(text) - value)
    right = error == 0 if digits <= 20 else error <= abs(value) * Fraction(5, 10 ** (10 if abs(value) >= 1 else 9))
    return right and text != "-0" and re.fullmatch(r"-?(0|[1-9]\d*)(\.\d*[1-9])?", text) is not None


def test_large_numbers_are_exact():
    rng = random.Random(0)
    for _ in range(4000):
        text, value, fits = random_expression(rng, 3)
        result = calculate(text)
        assert is_written_well(value, result) if fits else result is None, (text, result)


def test_any_input_is_quick_and_safe(recwarn):
    """Under 10 ms of processor time each; thread_time, so that a busy machine does not fail it."""
    rng = random.Random(0)
    alphabet = [*"190.,'\"()+-*/% a\\\n_é", ".count("]
    worst = ["(" * 128 + ")" * 128, "-" * 255 + "1", "1" * 256, "'" * 256, "1//" * 85 + "1",
             "." * 256, ".count(" * 36, "a" * 10**6, "9*" * 127 + "9", "1," * 128, "111," * 64,
             "(-" * 100 + "1" + ")" * 56, "'" + "a" * 200 + "'.count('" + "a" * 20 + "')"]
    worst += ["".join(rng.choices(alphabet, k=rng.randrange(1, 80))) for _ in range(3000)]
    for expression in worst:
        start = time.thread_time()
        result = calculate(expression)
        assert time.thread_time() - start < 0.010, expression[:80]
        assert result is None or len(result) < 25
    assert not recwarn.list, "Python's parser must not print warnings about a model's words"


def test_works_in_threads():
    results = []

    def work():
        results.append(calculate("'strawberry'.count('r')*2"))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["6"] * 8
