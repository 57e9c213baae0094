"""
Fetch what the run learns from: shards of web text, and with --tasks=1 conversations and questions, CORE's too.

reads   the hub (HF_ENDPOINT, NANOCHAT_MIRROR); with --embedded=1 the documentation inside this Python instead
writes  base_data/shard_NNNNN.parquet, task_data/, eval_bundle/
run     python prepare.py -n 8               the first 8 training shards and the validation shard
        python prepare.py --tasks=1          conversations and questions
        python prepare.py --embedded=1       no network
        python prepare.py --verify=1         reads what is here, and fetches again what is broken
"""
from plumbing import packages  # noqa: F401, I001: first, so that it can say what is missing
import glob
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

import pyarrow.parquet as pq

from data import VAL_SHARD, is_embedded, shard_path, write_shard
from plumbing import stop
from plumbing.budget import SHARD_BYTES, SHARD_TOKENS
from plumbing.common import base_path
from plumbing.configurator import configure
from plumbing.download import HUB, download, keep_checksum, problem_inside, problem_with_parquet
from tasks.downloaded import fetch
from tasks.pydocs import documents, is_validation

num_shards = 0         # -n: training shards to fetch, from 00000 on (95 MB, 52M tokens each); 0 = 8; with --tasks none
num_threads = 4        # files fetched at the same time
embedded = False       # 1 = write the embedded corpus as the shards instead of downloading any
tasks = False          # 1 = fetch what the tasks and CORE need (conversations, questions, words), and shards only as -n says
verify = False         # 1 = read every file to its end, by its checksum where one was kept; alone: those that are here
config = configure(globals())

SHARD_URL = f"{HUB}/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main/shard_%05d.parquet"


def problem_with_shard(path):
    """What keeps a file from being a downloaded shard of text, "" for nothing."""
    if problem := problem_with_parquet(path):
        return problem
    schema = pq.read_schema(path)
    if "text" not in schema.names:
        return f"it has no column 'text' (but {', '.join(schema.names)})"
    return "it is the embedded corpus" if is_embedded(path) else problem_inside(path) if verify else ""


def is_own(path):
    """Whether a file that is no shard is somebody's own and never replaced, not one that we made and that was damaged."""
    if problem_with_parquet(path):
        return not os.path.exists(f"{path}.sha256")              # is kept of all that is fetched or made
    return "text" not in pq.read_schema(path).names


def fetch_shards(wanted):
    """The shards of these numbers; SystemExit if one is missing."""
    for path in map(shard_path, wanted):
        if os.path.exists(path) and is_own(path):
            raise SystemExit(f"{path}: {problem_with_shard(path)}; own text has to be a parquet file with a column "
                             "'text': make it one, or move the file away")
    missing = [i for i in wanted if not os.path.exists(shard_path(i)) or problem_with_shard(shard_path(i))]
    untokenized = [i for i in wanted if i in missing or not glob.glob(f"{shard_path(i).removesuffix('.parquet')}.*.bin")]
    folder, need = base_path("base_data"), len(missing) * SHARD_BYTES + len(untokenized) * 2 * SHARD_TOKENS
    os.makedirs(folder, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < need:
        raise SystemExit(f"{folder}: {len(missing)} shards to fetch and the tokens of {len(untokenized)} need about "
                         f"{need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; fetch fewer (-n), set NANOCHAT_BASE_DIR")
    print(f"{len(wanted) - len(missing)} of {len(wanted)} shards are there", flush=True)
    problems, left = [], len(missing)
    pool = ThreadPoolExecutor(num_threads)        # no "with": Ctrl-C would wait for all files
    jobs = [pool.submit(fetch_shard, i) for i in missing]
    for job in as_completed(jobs):
        if not job.cancelled() and job.exception():          # what fails for one file fails for the next
            problems.append(str(job.exception()))
            for other in jobs:
                other.cancel()
        elif not job.cancelled():
            left -= 1
            print(f"{job.result()}   {left} left", flush=True)
    if problems:
        raise SystemExit(f"{left} of {len(wanted)} shards are missing: {problems[0]}")


def fetch_shard(i):
    """Fetch one shard -> the line about it."""
    start = time.time()
    megabytes = download(SHARD_URL % i, shard_path(i), problem_with_shard) / 1e6
    return f"shard_{i:05d}.parquet   {megabytes:.1f} MB   {megabytes / (time.time() - start):.1f} MB/s"


def write_embedded():
    """The documentation inside this Python in the place of the downloaded shards, unless it is there."""
    train, val = shard_path(0), shard_path(VAL_SHARD)
    there = [path for path in (train, val) if os.path.exists(path)]
    for path in there:
        if is_own(path) or not (problem_with_parquet(path) or is_embedded(path)):
            raise SystemExit(f"{path}: a downloaded shard or own text is here already; set NANOCHAT_BASE_DIR to another "
                             "folder for the embedded corpus")
    problems = [f"{path}: {problem}" for path in there
                if (problem := problem_with_parquet(path) or (verify and problem_inside(path)))]
    if len(there) == 2 and not problems:
        print("the embedded corpus is there", flush=True)
        return
    for problem in problems:
        print(f"{problem}; making it again", flush=True)
    texts = documents()
    write_shard(val, [text for text in texts if is_validation(text)])
    write_shard(train, [text for text in texts if not is_validation(text)])
    for path in (val, train):
        keep_checksum(path, path)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"embedded corpus: {len(texts)} documents, {megabytes:.2f} MB", flush=True)


try:
    here = [i for i in (VAL_SHARD, *range(VAL_SHARD)) if os.path.exists(shard_path(i))]
    if embedded or (verify and not num_shards and any(is_embedded(shard_path(i)) for i in here)):
        write_embedded()
    elif num_shards or not (tasks or verify):
        fetch_shards([VAL_SHARD, *range(num_shards or 8)])     # validation first: the first evaluation needs it
    elif verify:
        fetch_shards(here)
    if tasks or verify:
        fetch(verify, missing=tasks)
    if tasks:
        from evals.core import fetch_bundle       # here: it takes torch with it, seconds that the rest need not wait
        fetch_bundle()
except stop.Stopped as stopped:
    os._exit(stopped.code)                    # a normal exit would wait for the threads
