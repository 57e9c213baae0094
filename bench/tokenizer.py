"""
Time our tokenizer against the published rustbpe, Hugging Face tokenizers and tiktoken.

Every figure comes from a process of its own, and the programs take turns, so that a busy machine is busy for all of
them. CPU seconds are of all threads together, from the first document to the trained vocabulary; memory is what the
process has at most above one that only reads the text.

reads   one parquet file with a column `text`
writes  nothing that stays
run     pip install --target=peers rustbpe==0.1.0 tokenizers
        python -m bench.tokenizer --text=shard_00000.parquet --peers=peers       in the project folder
"""
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from plumbing.configurator import configure
from tokenizer import SPLIT_PATTERN

text = ""                      # the parquet file
peers = ""                     # folder with the other trainers, never the environment; "" = only ours
vocab_size = 65536             # tokens to learn, 256 bytes included
max_chars = 0                  # characters of the text to use; 0 = all
rounds = 3                     # runs of each program; the table shows medians
num_threads = 0                # ours: counting threads; 0 = all cores
encode_chars = 20_000_000      # characters to encode, from the end of the text
measure = ""                   # set by this script itself: the one program to run in this process
folder = ""                    # set by this script itself: where the vocabularies are handed over
config = configure(globals(), show=False)

TRAINERS = {                   # measure: what the table calls it
    "reading": "reading only",
    "ours": "ours, iterator",
    "parquet": "ours, parquet",
    "published": "rustbpe (published)",
    "huggingface": "tokenizers (HF)",
}
ENCODERS = {"encode": "ours, batch_encode", "tiktoken": "tiktoken"}


def documents():
    """The texts of the file, up to max_chars characters."""
    import pyarrow.parquet as pq
    num_chars = 0
    # in pieces: by default the compressed file would be in memory as a whole
    for batch in pq.ParquetFile(text, pre_buffer=False, buffer_size=1 << 18).iter_batches(1024, columns=["text"]):
        for document in batch.column(0).drop_null().to_pylist():
            document = document[:max_chars - num_chars] if max_chars else document
            num_chars += len(document)
            yield document
            if max_chars and num_chars == max_chars:
                return


def train_huggingface():
    """Train Hugging Face tokenizers; returns a function that gives the tokens as bytes, not part of the time."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated", False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=0, initial_alphabet=alphabet,
                                  show_progress=False)
    tokenizer.train_from_iterator(documents(), trainer)
    # it writes the 256 bytes as 256 printable characters, in this order
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    return lambda: [bytes(byte_of[character] for character in tokenizer.id_to_token(i))
                    for i in range(tokenizer.get_vocab_size())]


def measure_training(name):
    """CPU seconds, wall seconds and peak memory of one trainer; leaves its tokens in the folder."""
    import pyarrow.parquet  # noqa: F401  imports are not what is measured
    cpu, wall = time.process_time(), time.perf_counter()
    if name == "reading":
        for _ in documents():
            pass
        get_tokens = list
    elif name == "huggingface":
        get_tokens = train_huggingface()
    else:
        import rustbpe
        ours = getattr(rustbpe, "__crate__", "") == "nanochat-rustbpe"
        assert ours == (name != "published"), f"{rustbpe.__file__} is not the rustbpe to measure as {name}"
        tokenizer = rustbpe.Tokenizer()
        options = dict(num_threads=num_threads) if ours else {}
        if name == "parquet":
            tokenizer.train_from_parquet(text, vocab_size, max_chars, pattern=SPLIT_PATTERN, **options)
        else:
            tokenizer.train_from_iterator(documents(), vocab_size, pattern=SPLIT_PATTERN, **options)
        get_tokens = lambda: [bytes(token) for token, _ in tokenizer.get_mergeable_ranks()]              # noqa: E731
    result = dict(cpu=time.process_time() - cpu, wall=time.perf_counter() - wall)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result["peak"] = peak / (1e6 if sys.platform == "darwin" else 1e3)   # bytes there, kilobytes elsewhere
    with open(os.path.join(folder, name), "w") as f:
        json.dump([token.hex() for token in get_tokens()], f)
    return result


def measure_encoding(name):
    """MB per CPU second of one thread: the first pass over the text, and the best of three more."""
    with open(os.path.join(folder, "parquet")) as f:
        ranks = [(bytes.fromhex(token), i) for i, token in enumerate(json.load(f))]
    chosen, num_chars = [], 0
    for document in reversed(list(documents())):
        chosen.append(document)
        num_chars += len(document)
        if num_chars >= encode_chars:
            break
    num_mb = sum(len(document.encode()) for document in chosen) / 1e6
    if name == "tiktoken":
        import tiktoken
        encoding = tiktoken.Encoding("bench", pat_str=SPLIT_PATTERN, mergeable_ranks=dict(ranks), special_tokens={})
        encode = lambda: [i for document in chosen for i in encoding.encode_ordinary(document)]          # noqa: E731
    else:
        import rustbpe
        tokenizer = rustbpe.Tokenizer.from_ranks(ranks, SPLIT_PATTERN)
        encode = lambda: tokenizer.batch_encode(chosen, num_threads=1)[0]                                # noqa: E731
    seconds = []
    for _ in range(4):
        start = time.process_time()
        ids = encode()
        seconds.append(time.process_time() - start)
    digest = hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()
    return dict(first=num_mb / seconds[0], best=num_mb / min(seconds[1:]), digest=digest)


def run_alone(name):
    """What `measure` of this name prints, in a process of its own."""
    # pyarrow imports numpy, whose OpenBLAS starts threads that then wait for work by spinning.
    # measured: 0.07 CPU s after the import, of a process that sleeps; 2 cores of a Xeon, 2026-11
    environment = dict(os.environ, OPENBLAS_NUM_THREADS="1")
    if name in ("published", "huggingface"):
        environment["PYTHONPATH"] = peers
    flags = [f"--{knob}={value}" for knob, value in config.items() if knob not in ("measure", "folder")]
    command = [sys.executable, "-m", "bench.tokenizer", *flags, f"--measure={name}", f"--folder={folder}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


if not os.path.isfile(text):
    raise SystemExit(f"--text={text}: name a parquet file with a column `text`")
if measure:
    print(json.dumps(measure_training(measure) if measure in TRAINERS else measure_encoding(measure)))
    raise SystemExit

names = [name for name in TRAINERS if peers or name not in ("published", "huggingface")]
runs, tokens = {name: [] for name in [*names, *ENCODERS]}, {}
with tempfile.TemporaryDirectory() as folder:
    for round_number in range(rounds):
        for name in names:
            run = run_alone(name)
            runs[name].append(run)
            print(f"round {round_number + 1}: {TRAINERS[name]}: {run['cpu']:.2f} CPU s, {run['wall']:.2f} s")
    for _ in range(rounds):
        for name in ENCODERS:
            runs[name].append(run_alone(name))
    for name in names:
        with open(os.path.join(folder, name)) as f:
            tokens[name] = json.load(f)
middle = {name: {key: statistics.median_high(run[key] for run in runs[name]) for key in runs[name][0]} for name in runs}

print(f"\n{'training':<22}{'CPU s':>8}{'wall s':>8}{'MB':>7}{'CPU / iterator':>16}{'CPU / parquet':>15}  tokens")
for name in names:
    run = middle[name]
    memory = run["peak"] - middle["reading"]["peak"]
    ratios, remark = ["", ""], ""
    if name not in ("reading", "ours", "parquet"):
        ratios = [f"{run['cpu'] / middle[ours]['cpu']:.1f}x" for ours in ("ours", "parquet")]
    if name not in ("reading", "ours"):
        same, size = len(set(tokens["ours"]) & set(tokens[name])), len(tokens["ours"])
        remark = f"{same:,} of {size:,} tokens" + (" (order of ties differs)" if same > 0.99 * size else "")
        remark = "identical" if tokens[name] == tokens["ours"] else remark
    print(f"{TRAINERS[name]:<22}{run['cpu']:>8.2f}{run['wall']:>8.2f}{memory:>7.0f}{ratios[0]:>16}{ratios[1]:>15}"
          f"  {remark}")

print(f"\n{'encoding, 1 thread':<22}{'MB / CPU s':>12}{'first pass':>12}  ids")
remark = "identical" if len({run["digest"] for name in ENCODERS for run in runs[name]}) == 1 else "DIFFERENT"
for name in ENCODERS:
    print(f"{ENCODERS[name]:<22}{middle[name]['best']:>12.1f}{middle[name]['first']:>12.1f}  {remark}")
