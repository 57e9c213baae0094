"""
The tool a chat model may call: arithmetic, and counting letters in a word.

in    the text between <|python_start|> and <|python_end|>, written by the model
out   the result as a short text, or None for everything that is not plain arithmetic

A model's words are never run. A regular expression first lets only numbers, operators, parentheses, strings and .count(
through; then the syntax tree is walked, and a node that is not on the list ends it. All sizes are bounded, so there is
nothing to time out: no eval, no signals, safe in any thread. It counts in fractions, without an error: 100/3*3 is 100.
"""
import ast
import operator
import re
from decimal import Context, Decimal, Inexact
from fractions import Fraction

MAX_CHARS = 256              # the longest calculation in GSM8K's answers has 29
MAX_DEPTH = 20               # nested parentheses and signs
MAX_ABS = 10**15             # of every number on the way; nor may it be closer to 0 than 1 / MAX_ABS
EXACT = Context(prec=20, traps=[Inexact])    # significant digits of a result that is written as it is

# What a calculation may consist of. A comma is read only inside a number (1,000) and a string.
PIECE = re.compile(r"""
      (?P<number> \d{1,3}(?:,\d{3})+(?:\.\d*)?(?![\d,]) | \d+(?:\.\d*)? | \.\d+ )
    | (?P<string> '[^'\\\r\n]*' | "[^"\\\r\n]*" )
    | (?P<other>  \.count\( | // | [-+*/%()] | [ ]+ )
    """, re.VERBOSE | re.ASCII)

BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
          ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod}
UNARY = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculate(expression):
    """The value of plain arithmetic and 'word'.count('x') as a text ("24", "0.2"); None for all else. Never raises."""
    try:
        source = python_source(expression)
        return format_number(value_of(ast.parse(source, mode="eval").body, MAX_DEPTH, source.encode()))
    except (ValueError, ArithmeticError, SyntaxError, RecursionError, MemoryError):
        return None          # not allowed, half an expression, a division by zero, too large or small, too deep


def python_source(expression):
    """The expression as Python source, 1,000 and 007 as 1000 and 7; ValueError for anything not allowed in one."""
    if not isinstance(expression, str) or len(expression) > MAX_CHARS:
        raise ValueError("no text, or too long")
    source, at, depth = [], 0, 0
    expression = expression.strip()
    while at < len(expression):
        piece = PIECE.match(expression, at)
        if not piece:
            raise ValueError("not arithmetic")
        text = piece.group()
        if piece.lastgroup == "number":
            text = text.replace(",", "").lstrip("0") or "0"
            text = "0" + text if text.startswith(".") else text
        depth += text.endswith("(") - (text == ")")
        if depth > MAX_DEPTH:                        # counted here, before Python's parser sees it
            raise ValueError("nested too deep")
        source.append(text)
        at = piece.end()
    return "".join(source)


def value_of(node, depth, source):
    """
    The Fraction a node of the syntax tree stands for; ValueError for a node not on the list.

    source: bytes, what was parsed; Python would make a rounded float of a literal like 0.1
    """
    if depth == 0:
        raise ValueError("nested too deep")
    match node:
        case ast.Constant(value=int() | float()):
            value = Fraction(source[node.col_offset:node.end_col_offset].decode())
        case ast.BinOp() if type(node.op) in BINARY:
            # a chain 1+2+3+... leans to the left and is as deep as it is long; only the right side
            # and parentheses cost depth there, MAX_CHARS bounds the rest
            value = BINARY[type(node.op)](value_of(node.left, depth, source), value_of(node.right, depth - 1, source))
        case ast.UnaryOp() if type(node.op) in UNARY:
            value = UNARY[type(node.op)](value_of(node.operand, depth - 1, source))
        case ast.Call(ast.Attribute(ast.Constant(str(text)), "count"), [ast.Constant(str(part))], []):
            value = text.count(part)
        case _:
            raise ValueError("not arithmetic")
    if value and not 1 <= abs(value) * MAX_ABS <= MAX_ABS**2:
        raise ValueError("too large or too small")
    return Fraction(value)                           # // and count give an int, and int / int would be a float


def format_number(value):
    """
    A Fraction as people write it: 10 -> "10", 3/10 -> "0.3", never with an exponent.

    Exact where 20 significant digits are enough. What has more, or no end, is rounded to ten digits or to a whole
    number, whichever is more; the 0 before a point counts as a digit: 1/3 -> "0.333333333".
    """
    top, bottom = Decimal(value.numerator), Decimal(value.denominator)
    try:
        number = EXACT.divide(top, bottom)
    except Inexact:
        digits = max(10, len(str(abs(int(value))))) if abs(value) >= 1 else 9
        number = Context(prec=digits).divide(top, bottom)
    return f"{number.normalize():f}"
