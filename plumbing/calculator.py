"""
The tool a chat model may call: arithmetic, and counting letters in a word.

in    the text between <|python_start|> and <|python_end|>, written by the model
out   the result as a short text, or None for everything that is not plain arithmetic

A model's words are never run. A regular expression first lets only numbers, operators,
parentheses, strings and .count( through; then the syntax tree is walked, and a node that is not
on the list ends it. All sizes are bounded, so there is nothing to time out: no eval, no signals,
safe in any thread.
"""
import ast
import math
import operator
import re

MAX_CHARS = 256              # the longest calculation in GSM8K's answers has 29
MAX_DEPTH = 20               # nested parentheses and signs
MAX_ABS = 1e15               # of every number on the way; below it a float still counts whole ones

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
    """
    The value of an expression as a text ("24", "0.2"), or None when it is anything but plain
    arithmetic or 'word'.count('x'). Never raises.
    """
    source = read(expression)
    if source is None:
        return None
    try:
        return write(value_of(ast.parse(source, mode="eval").body, MAX_DEPTH))
    except (ValueError, ArithmeticError, SyntaxError, RecursionError, MemoryError):
        return None          # half an expression, a division by zero, too large, too deep


def read(expression):
    """The expression as Python source, 1,000 and 007 as 1000 and 7; None = not allowed."""
    if not isinstance(expression, str) or len(expression) > MAX_CHARS:
        return None
    source, at, open_now = [], 0, 0
    expression = expression.strip()
    while at < len(expression):
        piece = PIECE.match(expression, at)
        if not piece:
            return None
        text = piece.group()
        if piece.lastgroup == "number":
            text = text.replace(",", "").lstrip("0") or "0"
            text = "0" + text if text.startswith(".") else text
        open_now += text.endswith("(") - (text == ")")
        if open_now > MAX_DEPTH:                     # counted here, before Python's parser sees it
            return None
        source.append(text)
        at = piece.end()
    return "".join(source)


def value_of(node, depth):
    """The number a node of the syntax tree stands for; ValueError for a node not on the list."""
    if depth == 0:
        raise ValueError("nested too deep")
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value
    elif isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        # a chain 1+2+3+... leans to the left and is as deep as it is long; only the right side
        # and parentheses cost depth there, MAX_CHARS bounds the rest
        value = BINARY[type(node.op)](value_of(node.left, depth), value_of(node.right, depth - 1))
    elif isinstance(node, ast.UnaryOp) and type(node.op) in UNARY:
        value = UNARY[type(node.op)](value_of(node.operand, depth - 1))
    elif is_count(node):
        value = node.func.value.value.count(node.args[0].value)
    else:
        raise ValueError("not arithmetic")
    if not abs(value) <= MAX_ABS:                    # written so that nan fails as well
        raise ValueError("too large")
    return value


def is_count(node):
    """Whether the node is 'text'.count('text') and nothing more."""
    def is_text(node):
        return isinstance(node, ast.Constant) and isinstance(node.value, str)

    return (isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords
            and isinstance(node.func, ast.Attribute) and node.func.attr == "count"
            and is_text(node.func.value) and is_text(node.args[0]))


def write(value):
    """A number as people write it: 10.0 -> "10", 0.1 + 0.2 -> "0.3", never an exponent."""
    if math.isclose(value, round(value), rel_tol=1e-12, abs_tol=1e-12):
        return str(round(value))
    digits = max(0, 10 - len(str(int(abs(value)))))  # ten digits in all: past them is float noise
    return f"{value:.{digits}f}".rstrip("0").rstrip(".")
