"""Imported first by the scripts: one line instead of a traceback where the packages are missing, or at a signal."""
import importlib.util
import sys

from plumbing import stop


def require(*names):
    """Go on where packages are installed; else SystemExit, one line."""
    missing = [name for name in names if not importlib.util.find_spec(name)]
    if missing:
        raise SystemExit(f"{', '.join(missing)}: not installed for {sys.executable}; first: source .venv/bin/activate "
                         "(bash setup.sh makes .venv)")


stop.listen()
require("torch", "tiktoken", "pyarrow", "requests", "numpy")
