"""Every test sees the project's modules and a base folder of its own."""
import os
import runpy
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
# before any module of ours reads it
os.environ["NANOCHAT_BASE_DIR"] = tempfile.mkdtemp(prefix="nanochat_test_")


def run_script(name, *flags):
    """Run a script of ours in this process, as `python name flags` would -> its globals."""
    argv, sys.argv = sys.argv, [name, *flags]
    try:
        return runpy.run_path(os.path.join(ROOT, name), run_name="__main__")
    finally:
        sys.argv = argv


def reference_answer(conversation):
    """The last message as the text that a perfect model would give, calculator included."""
    content = conversation["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
