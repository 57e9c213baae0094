"""
Fetch what the run learns from: shards of web text, and with --tasks=1 conversations and questions.

reads   the hub (HF_ENDPOINT, NANOCHAT_MIRROR); with --embedded=1 the documentation inside this Python instead
writes  base_data/shard_NNNNN.parquet, task_data/
run     python prepare.py -n 8               the first 8 training shards and the validation shard
        python prepare.py --tasks=1          conversations and questions
        python prepare.py --embedded=1       no network
"""
from plumbing import packages  # noqa: F401, I001: first, so that it can say what is missing
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

import pyarrow.parquet as pq

from data import VAL_SHARD, is_embedded, shard_path, write_shard
from plumbing import stop
from plumbing.budget import SHARD_BYTES
from plumbing.common import base_path
from plumbing.configurator import configure
from plumbing.download import HUB, download, problem_with_parquet
from tasks.downloaded import fetch
from tasks.pydocs import documents, is_validation

num_shards = 0         # -n: training shards to fetch, from 00000 on (95 MB, 52M tokens each); 0 = 8; with --tasks none
num_threads = 4        # files fetched at the same time
embedded = False       # 1 = write the embedded corpus as the shards instead of downloading any
tasks = False          # 1 = fetch what the tasks need (conversations, questions, words), and shards only as -n says
config = configure(globals())

if num_shards < 0 or num_threads < 1:
    raise SystemExit(f"num_shards={num_shards}, num_threads={num_threads}: must be 0 or more, and 1 or more")
SHARD_URL = f"{HUB}/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main/shard_%05d.parquet"


def problem_with_shard(path):
    """What keeps a file from being a downloaded shard of text, "" for nothing."""
    if problem := problem_with_parquet(path):
        return problem
    schema = pq.read_schema(path)
    if "text" not in schema.names:
        return f"it has no column 'text' (but {', '.join(schema.names)})"
    return "it is the embedded corpus" if is_embedded(path) else ""


def fetch_shards(num_shards, num_threads):
    """The validation shard and training shards 0 .. num_shards-1; SystemExit if one is missing."""
    if num_shards > VAL_SHARD:
        raise SystemExit(f"num_shards={num_shards}: the set has {VAL_SHARD} training shards")
    wanted = [VAL_SHARD, *range(num_shards)]      # validation first: the first evaluation needs it
    for path in map(shard_path, wanted):          # somebody's own text is never replaced
        if os.path.exists(path) and not problem_with_parquet(path) and "text" not in pq.read_schema(path).names:
            raise SystemExit(f"{path}: {problem_with_shard(path)}; name its column of texts so, or move the file away")
    missing = [i for i in wanted if not os.path.exists(shard_path(i)) or problem_with_shard(shard_path(i))]
    folder, need = base_path("base_data"), len(missing) * SHARD_BYTES
    os.makedirs(folder, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < need:
        raise SystemExit(f"{folder}: {len(missing)} shards need about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are "
                         "free; fetch fewer (-n) or set NANOCHAT_BASE_DIR")
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
        if not is_embedded(path):
            raise SystemExit(f"{path}: a downloaded shard is here already; set NANOCHAT_BASE_DIR to another folder for "
                             "the embedded corpus")
    if len(there) == 2:
        print("the embedded corpus is there", flush=True)
        return
    texts = documents()
    write_shard(val, [text for text in texts if is_validation(text)])
    write_shard(train, [text for text in texts if not is_validation(text)])
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"embedded corpus: {len(texts)} documents, {megabytes:.2f} MB", flush=True)


try:
    if embedded:
        write_embedded()
    elif num_shards or not tasks:
        fetch_shards(num_shards or 8, num_threads)
    if tasks:
        fetch()
except stop.Stopped as stopped:
    os._exit(stopped.code)                    # a normal exit would wait for the threads
