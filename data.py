"""
Text and conversations in, batches of tokens out: what is read is tokenized once, and any batch is found by its row.

reads   base_data/*.parquet, which prepare.py fetches; conversations from tasks/
writes  beside each shard shard_NNNNN.<tokenizer's fingerprint>.bin, its size and sha256 in a .bin.json; the same for
        conversations in the stage's folder
gives   TokenStream: batch_at(row, ...) -> x, y
"""
import bisect
import contextlib
import glob
import hashlib
import os
import re
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from plumbing.background import start_background
from plumbing.common import (RANK, TASK_CODE, WORLD_SIZE, atomic_write, base_path, code_hash, fingerprint, names_in,
                             read_json, write_json)
from plumbing.download import problem_with_parquet

VAL_SHARD = 1822       # the last one of the set, never trained on
GROUP = 1024           # documents in a row group, the unit in which shards are read
PATIENCE = 120         # seconds in which nothing arrives before a missing shard is an error
FILE_CONVERSATIONS = 8192  # conversations in one token file

# ---------------------------------------------------------------------------------------------
# 1. Shards: parquet files with one column of text.


def shard_path(i):
    return base_path("base_data", f"shard_{i:05d}.parquet")


def is_embedded(path):
    """Whether write_shard made this file; the name does not tell it from a downloaded shard. A damaged one: False."""
    return not problem_with_parquet(path) and b"nanochat" in (pq.read_schema(path).metadata or {})


def is_to_be_replaced(path):
    """Whether the file under a shard's name is damaged or the embedded corpus, which prepare.py -n replaces."""
    return os.path.exists(path) and (problem_with_parquet(path) != "" or is_embedded(path))


def write_shard(path, texts):
    """Texts as a parquet shard in the downloaded ones' layout, marked as ours."""
    table = pa.table({"text": pa.array(texts, pa.string())})
    table = table.replace_schema_metadata({"nanochat": "embedded"})
    with atomic_write(path) as f:
        pq.write_table(table, f, row_group_size=GROUP, compression="zstd")


def train_shards(num_shards):
    """
    The names of the training shards in base_data/, in order; the checkpoint's meta keeps the list.

    num_shards: shards 0 .. num_shards-1 of web text, on disk already or still to come; waits for prepare.py to replace
        what only has their names. 0 = all on disk now, the embedded corpus too
    """
    if num_shards > VAL_SHARD:
        raise SystemExit(f"num_shards={num_shards}: the set has {VAL_SHARD} training shards")
    if num_shards > 0:
        for path in map(shard_path, (VAL_SHARD, *range(num_shards))):
            if is_to_be_replaced(path):
                wait_for_shard(path, replaced=True)
        return [os.path.basename(shard_path(i)) for i in range(num_shards)]
    folder = base_path("base_data")
    names = [name for name in sorted(names_in(folder)) if re.fullmatch(r"shard_\d{5}\.parquet", name)
             and name != os.path.basename(shard_path(VAL_SHARD))]
    if not names:
        raise SystemExit(f"{folder}: no training shards here; run: python prepare.py -n 8 "
                         "(or, without a network: python prepare.py --embedded=1)")
    return names


def read_batches(path):
    """Lists of up to 1024 texts, without ever holding the whole file."""
    remedy = ("move it away; own text needs a column 'text' of strings, a downloaded shard comes again with "
              "python prepare.py")
    try:
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 18)  # by default it reads all at first
        names = file.schema_arrow.names
        if "text" not in names:
            raise SystemExit(f"{path}: no column 'text' (but {', '.join(names)}); {remedy}")
        for group, batch in enumerate(file.iter_batches(GROUP, columns=["text"])):
            texts = batch.column(0).to_pylist()
            if not all(isinstance(text, str) for text in texts):
                raise SystemExit(f"{path}: column 'text' has other things than strings in rows "
                                 f"{group * GROUP} to {group * GROUP + len(texts) - 1}; {remedy}")
            yield texts
    except FileNotFoundError:
        raise SystemExit(f"{path}: not here; python prepare.py fetches shards") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise SystemExit(f"{path}: damaged ({reason}); {remedy}") from None


def read_texts(path):
    """The texts of a shard, one after the other."""
    for texts in read_batches(path):
        yield from texts


# ---------------------------------------------------------------------------------------------
# 2. Token files: each shard is tokenized once, by a process that runs ahead of the trainer.


def token_path(shard, tokenizer):
    """The token file of a shard: the name holds the vocabulary's fingerprint, so no two mix."""
    return f"{shard.removesuffix('.parquet')}.{tokenizer.fingerprint}.bin"


def mask_path(path):
    """Beside a token file of conversations: which of its tokens are scored. That of a shard has none: all are."""
    return f"{path.removesuffix('.bin')}.mask"


def is_fresh(path):
    """Whether a token file is there and not older than the shard it was made from, if any."""
    shard = f"{path.removesuffix('.bin').rpartition('.')[0]}.parquet"
    with contextlib.suppress(FileNotFoundError):
        made = os.path.getmtime(path)
        return not os.path.exists(shard) or os.path.getmtime(shard) <= made
    return False


def is_whole(path):
    """Whether a token file and its mask are fresh and what was written; reads all of it, 2 GB in a second or two."""
    sums = read_json(f"{path}.json", []) if is_fresh(path) else {}
    with contextlib.suppress(OSError):
        return bool(sums) and all(fingerprint(os.path.join(os.path.dirname(path), name)) == sums[name] for name in sums)
    return False


def version(path):
    """What changes when a token file and its sums are written; None while one is missing."""
    with contextlib.suppress(FileNotFoundError):
        return [(s.st_mtime_ns, s.st_ino) for s in (os.stat(path), os.stat(f"{path}.json"))]


def write_sums(path, *parts):
    """Write size and sha256 of a token file's parts, which are open still but complete: their names come after this."""
    for f in parts:
        f.flush()
    write_json(f"{path}.json", {os.path.basename(f.name.rsplit(".", 2)[0]): fingerprint(f.name) for f in parts})


def is_made(path, tokenizer):
    """
    is_whole; a file that isn't is named, for it is made again.

    A shard's token file of an older version has no sums: it gets them as it is, if all its ids can be right.
    """
    if is_fresh(path) and not os.path.exists(f"{path}.json") and not os.path.exists(mask_path(path)):
        size = os.path.getsize(path)
        if size and size % 2 == 0 and np.memmap(path, np.uint16, "r").max() < tokenizer.vocab_size:
            write_json(f"{path}.json", {os.path.basename(path): fingerprint(path)})
    whole = is_whole(path)
    if not whole and os.path.exists(path):
        print(f"{os.path.basename(path)}: damaged or older than its text, so it is made again", flush=True)
    return whole


def tokenize_shard(path, tokenizer):
    """Make the token file of a shard: <|bos|>, then the text, per document."""
    out = token_path(path, tokenizer)
    with atomic_write(out) as f:
        for texts in read_batches(path):
            ids, _ = tokenizer.core.batch_encode(texts, prepend=tokenizer.bos)
            assert ids.dtype == np.uint16, f"{path}: a token does not fit uint16"
            f.write(ids)                          # <|bos|> and the ids of text after text, in a row
        write_sums(out, f)
    newer = os.path.getmtime(path)
    if newer > os.path.getmtime(out):             # the clock was set back, or another machine's is ahead
        os.utime(out, (newer, newer))
    return out


def write_token_file(path, documents):
    """
    Write documents as one run of uint16, and beside it their masks as one of uint8.

    documents: iterator of (ids, mask); mask is 1 for each token that is scored as a target
    """
    # the inner file is finished first: where the tokens are, their mask is too
    with atomic_write(path) as f, atomic_write(mask_path(path)) as g:
        for ids, mask in documents:
            tokens = np.array(ids, dtype=np.int64)
            assert ((tokens >= 0) & (tokens < 2**16)).all(), f"{path}: a token does not fit into uint16"
            assert len(mask) == len(ids), f"{path}: {len(mask)} marks for {len(ids)} tokens"
            f.write(tokens.astype(np.uint16))
            g.write(np.array(mask, dtype=np.uint8))
        write_sums(path, f, g)


def make_token_files(shards, tokenizer):
    """Token files for the shards in order, waiting for those whose download is still running."""
    for path in shards:
        if is_made(token_path(path, tokenizer), tokenizer):
            continue
        wait_for_shard(path)
        start = time.time()
        num_tokens = os.path.getsize(tokenize_shard(path, tokenizer)) // 2
        seconds = time.time() - start
        print(f"{os.path.basename(path)}: {num_tokens:,} tokens in {seconds:.1f} s", flush=True)


def text_streams(shards, tokenizer, counts=()):
    """
    (training, validation) TokenStreams of shards by name; a process beside the trainer makes the token files.

    counts: tokens of the first training shards when the run began, from its checkpoint
    """
    train, val = [base_path("base_data", name) for name in shards], shard_path(VAL_SHARD)
    making = start_background(make_token_files, [val, *train], tokenizer)
    return (TokenStream([token_path(path, tokenizer) for path in train], making, counts),
            TokenStream([token_path(val, tokenizer)], making))


def wait_for_shard(path, replaced=False):
    """
    Return path when it is there; SystemExit when nothing arrives in its folder any more.

    replaced: not the file that is_to_be_replaced, but the one that comes after it
    """
    name, folder = os.path.basename(path), os.path.dirname(path)
    state, remedy = "not here", "fetch it with python prepare.py -n N, then resume"
    if path == shard_path(VAL_SHARD):
        state = "not here (it is the held-out text: own text needs one under this name, too)"
    if replaced:
        state, remedy = "the embedded corpus or a damaged file", f"{remedy}, or take what is here: --num_shards=0"
    alive, seen, said = time.monotonic(), {}, False
    while not os.path.exists(path) or (replaced and is_to_be_replaced(path)):
        before, seen = seen, {}                                      # by change: their clock may be another machine's
        for other in names_in(folder):
            if other.endswith((".part", ".parquet")):
                with contextlib.suppress(FileNotFoundError):         # renamed in this moment
                    seen[other] = os.path.getmtime(os.path.join(folder, other))
        if seen != before:
            alive = time.monotonic()
        if time.monotonic() - alive > PATIENCE:
            raise SystemExit(f"{path}: {state}, and nothing has arrived for {PATIENCE} s; {remedy}")
        if not said:
            print(f"waiting for {name} to be downloaded" + (f" ({state})" if replaced else ""), flush=True)
            said = True
        time.sleep(0.5)
    return path


# ---------------------------------------------------------------------------------------------
# 3. Conversations as token files: one after the other like text, cut wherever a row ends, nothing padded or lost.


def conversation_streams(folder, train, val, tokenizer):
    """
    (training, validation) TokenStreams of two mixtures; their token files are made in `folder` by another process.

    A file's name holds a hash of the tokenizer, of the mixture and of the code that makes the
    conversations, so that an edited template is never answered with yesterday's tokens.
    """
    files, made_by = {}, [code_hash(name) for name in TASK_CODE]
    for split, mixture in (("train", train), ("val", val)):
        key = hashlib.sha256(f"{tokenizer.fingerprint} {mixture!r} {len(mixture)} {made_by}".encode()).hexdigest()[:16]
        for old in glob.glob(os.path.join(folder, f"{split}_*")):
            if RANK == 0 and not os.path.basename(old).startswith(f"{split}_{key}"):
                os.remove(old)
        count = -(-len(mixture) // FILE_CONVERSATIONS)
        files[split] = [os.path.join(folder, f"{split}_{key}.{k:05d}.bin") for k in range(count)]
    # the trainer needs the first file at once, the validation later, the others last
    jobs = [(files["train"][:1], train), (files["val"], val), (files["train"], train)]
    making = start_background(make_conversation_files, jobs, tokenizer)
    return TokenStream(files["train"], making), TokenStream(files["val"], making)


def make_conversation_files(jobs, tokenizer):
    """Write the token files of each (paths, conversations) in jobs; runs in the background."""
    for paths, conversations in jobs:
        for k, path in enumerate(paths):
            first = k * FILE_CONVERSATIONS
            rows = range(first, min(first + FILE_CONVERSATIONS, len(conversations)))
            if not is_made(path, tokenizer):
                write_token_file(path, (render(conversations, i, tokenizer) for i in rows))


def render(conversations, i, tokenizer):
    """(ids, mask) of conversation i of a task; a broken one ends the run and says which it is."""
    try:
        return tokenizer.render_conversation(conversations[i])
    except ValueError as error:
        raise SystemExit(f"{conversations.place(i)}: {error}") from None


def epoch_tokens(stream, conversations):
    """
    Tokens in one pass over the mixture, estimated from its first file alone.

    The mixture is shuffled, so the first file is a fair sample (within about a percent), and the
    run need not wait until the last one is made to know its length.
    """
    while not stream.ends:
        stream.open_next()
    return round(stream.ends[0] * len(conversations) / min(FILE_CONVERSATIONS, len(conversations)))


# ---------------------------------------------------------------------------------------------
# 4. Batches: where a row lies depends on its number alone, so resuming needs no loader state.


def mapped(path, dtype):
    """A file of numbers as an array, whose pages are read when they are used."""
    # an empty file can't be mapped
    return np.memmap(path, dtype, mode="r") if os.path.getsize(path) else np.empty(0, dtype)


class TokenStream:
    """
    The tokens of many files, one after the other, as a ring without end.

    paths: token files in order; they need not exist yet
    still_coming: what start_background returned; left out where nobody makes files
    counts: tokens that the first files must have, so that a run which goes on reads what it would have read
    """

    def __init__(self, paths, still_coming=None, counts=()):
        if not paths:
            raise SystemExit("no training shards; run: python prepare.py -n 8")
        self.paths, self.still_coming, self.known = list(paths), still_coming, list(counts)
        self.files = []        # (tokens, mask or None) of the files opened so far, memory-mapped
        self.ends = []         # ends[k]: tokens in files 0 .. k

    @property
    def num_tokens(self):
        """The length of the ring; waits for all files."""
        while len(self.files) < len(self.paths):
            self.open_next()
        return self.ends[-1]

    def counts(self):
        """Tokens of the first files, as many as are known."""
        opened = [len(tokens) for tokens, _ in self.files]
        return opened + self.known[len(opened):]

    def open_next(self):
        """Wait for the next file to be there and whole, saying so once, and map it."""
        path, said, looked_at = self.paths[len(self.files)], False, None
        while True:
            here = version(path)
            if here != looked_at and is_whole(path):    # read through once per start, and when it has changed
                break
            looked_at = here
            coming = self.still_coming is not None and self.still_coming()
            if not coming and not is_whole(path):
                raise SystemExit(f"{path}: not here or damaged, and nothing makes it; run the stage again")
            if not said:
                print(f"waiting for {os.path.basename(path)}", flush=True)
                said = True
            time.sleep(0.05)
        tokens, mask = mapped(path, np.uint16), None
        if os.path.exists(mask_path(path)):
            mask = mapped(mask_path(path), np.uint8)
            assert len(mask) == len(tokens), f"{path}: its mask has another length"
        k = len(self.files)
        if k < len(self.known) and self.known[k] != len(tokens):
            raise SystemExit(f"{path}: {len(tokens):,} tokens, {self.known[k]:,} when this run began, so its shard is "
                             "another one now; put the old one back, or train anew with --model_tag=NEW")
        self.files.append((tokens, mask))
        self.ends.append((self.ends[-1] if self.ends else 0) + len(tokens))

    def step_batch(self, step, rows, T):
        """This rank's share of the rows of an optimizer step -> x, y (about rows / ranks, T); together they are all of them."""
        begin, end = RANK * rows // WORLD_SIZE, (RANK + 1) * rows // WORLD_SIZE
        return self.batch_at(step * rows + begin, end - begin, T, (step + 1) * rows)

    def batch_at(self, row, B, T, step_end=0):
        """
        Rows row .. row+B-1: row r begins at token r * T of the ring.

        step_end: the row after the step's last, of all ranks. All wait for these files before they compute,
            so that none hangs in the exchange of gradients
        returns x, y: (B, T) int64; y[b, t] is the token after x[b, t], or -1 where it isn't scored
        """
        start, n = row * T, B * T + 1             # B rows lie side by side; y needs one token more
        need = max(start + n, step_end * T + 1)
        while len(self.files) < len(self.paths) and (not self.ends or self.ends[-1] < need):
            self.open_next()
        if self.ends[-1] < T + 1:
            raise SystemExit(f"{self.paths[0]} and on: {self.ends[-1]} tokens in all, a row of {T} "
                             f"needs {T + 1}; fetch more shards or shorten max_seq_len")
        x, y = np.empty(n, np.int64), np.empty(n, np.int64)
        done = 0
        while done < n:                           # once per file touched
            position = (start + done) % self.ends[-1]
            k = bisect.bisect_right(self.ends, position)
            tokens, mask = self.files[k]
            here = position - (self.ends[k] - len(tokens))
            piece = slice(here, here + n - done)
            part = slice(done, done + len(tokens[piece]))
            x[part] = y[part] = tokens[piece]
            if mask is not None:
                y[part][mask[piece] == 0] = -1
            done = part.stop
        return x[:-1].reshape(B, T), y[1:].reshape(B, T)


def pad_batch(rows, T):
    """
    Rows of different lengths as one batch, each cut to T + 1 tokens.

    rows: list of (ids, mask), each beginning with <|bos|>, which also fills the short rows up
    returns x, y: (B, T') int64; y is -1 where mask is 0 and in the filling. T' is the longest
        row's need, rounded up to a multiple of 64, at most T.
    """
    need = max(len(ids) - 1 for ids, _ in rows)
    width = min(-(-max(need, 1) // 64) * 64, T)
    x = np.full((len(rows), width), rows[0][0][0], np.int64)
    y = np.full((len(rows), width), -1, np.int64)
    for b, (ids, mask) in enumerate(rows):
        ids, mask = np.array(ids[:width + 1]), np.array(mask[:width + 1])
        x[b, :len(ids) - 1] = ids[:-1]
        y[b, :len(ids) - 1] = np.where(mask[1:] == 1, ids[1:], -1)
    return x, y


def rank_batches(conversations, first, count, B, tokenizer, T):
    """
    Conversations first ... first + count - 1 (counted on from the start at the end), one per row -> batches (x, y).

    Each rank gets its share, in batches of at most B; see pad_batch.
    """
    begin, end = RANK * count // WORLD_SIZE, (RANK + 1) * count // WORLD_SIZE
    for i in range(begin, end, B):
        numbers = range(first + i, first + min(i + B, end))
        yield pad_batch([render(conversations, n % len(conversations), tokenizer) for n in numbers], T)
