"""
Train the tokenizer: find the byte strings that stand most often in the text.

reads   base_data/*.parquet (through data.py); waits for shards that are still being downloaded
writes  tokenizer/vocab.tiktoken, token_bytes.npy and, when all is done, meta.json
run     python tok_train.py --num_shards=8
        python tok_train.py --vocab_size=4096 --num_shards=1
"""
from plumbing import packages  # noqa: F401, I001: first, so that it can say what is missing
import os
import time

from plumbing.common import base_path, duration, read_json
from plumbing.configurator import configure
from tokenizer import BROKEN, read_tokenizer, train_tokenizer

vocab_size = 65536             # tokens, the 9 specials included; at most 65,536
max_chars = 2_000_000_000      # characters of text to learn from, or all there are if fewer; 0 = all
doc_cap = 10_000               # characters taken of one document: no long one weighs too much; 0 = all
num_shards = 0                 # learn from shards 0 ... n-1, those to come too; 0 = all here now
config = configure(globals())

# Finished already? Decided before anything slow is imported.
folder = base_path("tokenizer")
meta_path = os.path.join(folder, "meta.json")
KEPT = ("vocab_size", "max_chars", "doc_cap")      # a tokenizer with other values is another one
if os.path.exists(meta_path):
    meta = read_json(meta_path, [])                # {} where it is damaged
    if meta and (other := [name for name in KEPT if meta.get(name) != config[name]]):
        said = ", ".join(f"{name}={meta.get(name)} (asked for: {config[name]})" for name in other)
        raise SystemExit(f"{folder}: the tokenizer here has {said}; set NANOCHAT_BASE_DIR to another folder, or remove "
                         "this one and the checkpoints made with it")
    try:
        read_tokenizer(folder)
    except BROKEN:
        aside = f"{folder}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"
        os.rename(folder, aside)
        print(f"{folder}: damaged, so the tokenizer is trained again; the old one is now {aside}")
    else:
        print(f"tok_train: finished already, {vocab_size:,} tokens in {folder}")
        raise SystemExit(0)

from data import VAL_SHARD, read_texts, shard_path, train_shards, wait_for_shard  # noqa: E402

paths = [base_path("base_data", name) for name in train_shards(num_shards)]
wait_for_shard(shard_path(VAL_SHARD))              # needed below; better to miss it now
start, unread = time.time(), iter(paths)           # one shard is waited for after the other, as far as they are needed
tokenizer, documents, chars = train_tokenizer(map(wait_for_shard, unread), vocab_size, max_chars, doc_cap,
                                              progress=lambda line: print(line, flush=True))
seconds, num_read = time.time() - start, len(paths) - len(list(unread))
print(f"learned {tokenizer.vocab_size:,} tokens in {duration(seconds)} from {chars:,} characters, "
      f"{documents:,} documents, {num_read} shards")

# how much text a token stands for, on the first 10 MB of the validation shard
num_bytes = num_tokens = 0
for text in read_texts(shard_path(VAL_SHARD)):
    num_bytes += len(text.encode("utf-8", "replace"))
    num_tokens += len(tokenizer.encode(text))
    if num_bytes >= 10_000_000:
        break
compression = num_bytes / max(1, num_tokens)
print(f"validation text: {compression:.3f} bytes per token")

# a look at what was found: early merges are short and common, late ones are whole words
num_ranks = len(tokenizer.ranks)
for first in (256, (256 + num_ranks) // 2, max(256, num_ranks - 12)):
    some = range(first, min(first + 12, num_ranks))
    print(f"tokens from {first}: " + " ".join(repr(tokenizer.decode([i])) for i in some))

tokenizer.save(folder, dict(max_chars=max_chars, doc_cap=doc_cap, seconds=seconds, val_bytes_per_token=compression,
                            seen=dict(chars=chars, documents=documents, shards=num_read)))
print(f"fingerprint {tokenizer.fingerprint}, saved in {folder}")
