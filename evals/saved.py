"""The results of an evaluation in a JSON file: kept as long as they are of the same model."""
from plumbing.common import RANK, read_json, write_json


def read_results(path, **same):
    """What an evaluation has left; {} if damaged or if a value of `same` differs (checkpoint=sha256 of the weights)."""
    found = read_json(path)
    return found if all(found.get(key) == value for key, value in same.items()) else {}


def write_results(path, results):
    """The whole file anew, on the first rank; after every part, for what comes after may fail."""
    if RANK == 0:
        write_json(path, results)
