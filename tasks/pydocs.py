"""
The embedded corpus: the documentation that ships inside the reader's own Python.

reads   pydoc's topics and the source files of the standard library, parsed with ast, never run
gives   documents(), which prepare.py writes as shards; docstrings(), questions about them; words(), to spell

About 2.5 MB of real English about one subject, there on every machine without a network.
"""
import ast
import builtins
import functools
import hashlib
import inspect
import operator
import os
import re
import sysconfig
import warnings
from collections import Counter

from tasks.task import Task, in_test, must_be, shuffled

SKIP = {"test", "tests", "idle_test", "turtledemo", "encodings"}     # folders of tests, demos, character tables
# Written in C, so there is no source to read; these are in every running Python anyway.
# The best-known come first: of two methods with the same docstring the first one is kept.
BUILTIN_TYPES = ("str", "list", "dict", "int", "float", "tuple", "set", "bytes", "bool", "range",
                 "complex", "frozenset", "slice", "bytearray", "memoryview", "object", "type")
VAL_FRACTION = 0.05      # of the documents
# "S.find(sub) -> int", with which the docstrings of some C functions begin
CALL = re.compile(r"[\w.]+\([^\n]*\)(?: *-> *[^\n]*)?(?:\n|$)\s*")


@functools.lru_cache(None)
def entries():
    """
    Everything documented: a list of (kind, name, title, docstring), the builtins first.

    kind: "builtin", "topic", "module", "class" or "function"
    A second entry with the same docstring is left out, or a third of the methods would say the same.
    """
    found, seen = [], set()
    for kind, name, title, doc in [*builtin_entries(), *topic_entries(), *library_entries()]:
        doc = (doc or "").strip()
        if doc and doc not in seen:
            seen.add(doc)
            found.append((kind, name, title, doc))
    return found


def builtin_entries():
    """len, print, ... and str, list, dict, ... with their public methods."""
    # the module: not what the interactive mode or a test runner has put there
    names = sorted(name for name, thing in vars(builtins).items() if not name.startswith("_")
                   and name not in BUILTIN_TYPES and getattr(thing, "__module__", None) == "builtins")
    for name in BUILTIN_TYPES:
        methods = vars(getattr(builtins, name))
        names += [name, *sorted(f"{name}.{method}" for method in methods if not method.startswith("_"))]
    for name in names:
        thing = operator.attrgetter(name)(builtins)
        try:
            title = name + str(inspect.signature(thing))
        except (TypeError, ValueError):              # C code that does not state its arguments
            title = name
        yield "builtin", name, title, inspect.cleandoc(getattr(thing, "__doc__", None) or "")


def topic_entries():
    """
    The language reference behind help("assert"); some systems do not install it.

    "compound" contains the topics "if", "for" and so on once more. Left in, they would put the
    same pages on both sides of the split, so what repeats a longer topic is left out.
    """
    path = os.path.join(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py")
    topics, seen = {}, set()
    for node in parse(path).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = [" ".join(part.split()) for part in topics[name].split("\n\n")]
        repeated = sum(len(part) for part in paragraphs if part in seen)
        if repeated < 0.5 * sum(len(part) for part in paragraphs):
            yield "topic", name, "", topics[name]
        seen.update(part for part in paragraphs if len(part) > 40)


def library_entries():
    """Modules, classes and functions of the standard library, file by file."""
    root = sysconfig.get_path("stdlib")
    for folder, folders, names in os.walk(root):
        # what is installed lies in site-packages or dist-packages: a module's folder has no "-" in its name
        folders[:] = sorted(name for name in folders if name not in SKIP and "-" not in name)
        for name in sorted(names):
            if name.endswith(".py") and name != "topics.py":
                path = os.path.join(folder, name)
                tree = parse(path)
                module = os.path.relpath(path, root).removesuffix(".py").replace(os.sep, ".").removesuffix(".__init__")
                yield "module", module, f"module {module}", ast.get_docstring(tree)
                yield from definitions(tree, module)


def parse(path):
    """The syntax tree of a source file; an empty one where there is none to get."""
    try:
        with open(path, "rb") as f, warnings.catch_warnings():
            warnings.simplefilter("ignore")          # old escapes in other people's strings
            return ast.parse(f.read())
    except (OSError, SyntaxError, ValueError):       # some files are wrong on purpose
        return ast.Module([], [])


def definitions(node, prefix):
    """The entries of classes and functions below a node, but not of those inside functions."""
    for child in getattr(node, "body", []):
        if isinstance(child, ast.ClassDef):
            name = f"{prefix}.{child.name}"
            yield "class", name, f"class {name}", ast.get_docstring(child)
            yield from definitions(child, name)
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            name, doc = f"{prefix}.{child.name}", ast.get_docstring(child)
            title = f"{name}({ast.unparse(child.args)})" if doc else ""
            yield "function", name, title, doc
        elif isinstance(child, (ast.If, ast.Try)):   # definitions for one system or another
            yield from definitions(child, prefix)


def digest(text):
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def documents():
    """The corpus: a list of str, each a title line and a docstring; ordered by hash: mixed, and the same every time."""
    texts = [f"{title}\n\n{doc}" if title else doc for _, _, title, doc in entries()]
    return sorted(set(texts), key=digest)


def is_validation(document):
    """The split: by the document's hash alone, so near-duplicates may stand on both sides."""
    return int(digest(document)[-8:], 16) < VAL_FRACTION * 2**32


def first_sentence(doc):
    """The first sentence of a docstring on one line, "" if there is none worth learning."""
    doc = CALL.sub("", doc, count=1) if CALL.match(doc) else doc
    paragraph = " ".join(doc.split("\n\n")[0].split())
    end = re.search(r"\.(?= |$)(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)", paragraph)
    sentence = paragraph[:end.end()] if end else ""
    good = re.fullmatch(r"[A-Z][a-z]+ [ -~]{15,130}", sentence)
    return sentence if good and ">>>" not in sentence and " ." not in sentence else ""


def words():
    """Lowercase English-looking words of 3 to 12 letters that occur at least 3 times, sorted."""
    counts = Counter(word for document in documents() for word in re.findall(r"\b[a-z]{3,12}\b", document))
    return sorted(word for word, count in counts.items() if count >= 3)


def docstrings(split, size=0):
    """What does str.split do? -> the first sentence of its documentation in this Python."""
    must_be("split", split, ("train", "test"))
    return Task(f"docstrings {split}", functools.partial(load_docstrings, split), size=size)


def load_docstrings(split):
    """The questions of a split: about the builtins and the public functions of the library, each name once."""
    sentences = {}
    for kind, name, _, doc in entries():
        public = not any(part.startswith("_") for part in name.split("."))
        error = "." not in name and name[0].isupper()        # ValueError does nothing
        if kind in ("builtin", "function") and public and not error and in_test(name) == (split == "test"):
            if sentence := first_sentence(doc):
                sentences.setdefault(name, sentence)
    rows = sorted(sentences.items())
    return [{"messages": [{"role": "user", "content": f"What does {rows[i][0]} do?"},
                          {"role": "assistant", "content": rows[i][1]}]} for i in shuffled(len(rows))]
