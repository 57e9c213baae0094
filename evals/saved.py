"""The results of an evaluation in a JSON file: kept as long as they are of the same model."""
import contextlib
import json
import os

from plumbing.common import RANK, atomic_write, base_path, print0


def read_json(path, remarks):
    """The object in a JSON file, {} where there is none; a damaged one adds a remark to the list."""
    content = None
    with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as f:
        content = json.load(f)
    if os.path.exists(path) and not isinstance(content, dict):
        remarks.append(f"`{os.path.relpath(path, base_path())}` is damaged and was left out.")
    return content if isinstance(content, dict) else {}


def read_results(path, **same):
    """What an evaluation has left; {} if damaged or if a value of `same` differs (checkpoint=sha256 of the weights)."""
    damages = []
    found = read_json(path, damages)
    if damages:
        print0(f"{path}: damaged, so it is made again")
    return found if all(found.get(key) == value for key, value in same.items()) else {}


def write_results(path, results):
    """The whole file anew, on the first rank; after every part, for what comes after may fail."""
    if RANK == 0:
        with atomic_write(path, "w") as f:
            json.dump(results, f, indent=1)
