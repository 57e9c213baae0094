"""Imported first by the scripts: one line instead of a traceback where the packages are missing, or at a signal."""
import importlib.util
import sys

from plumbing import stop

stop.listen()
missing = [name for name in ("torch", "tiktoken", "pyarrow", "requests", "numpy") if not importlib.util.find_spec(name)]
if missing:
    raise SystemExit(f"{', '.join(missing)}: not installed for {sys.executable}; first: source .venv/bin/activate "
                     "(bash setup.sh makes .venv)")
