"""
The Rust tokenizer keeps to the definition of BPE, to the split pattern, and to tiktoken's ids.

The oracles are slow and obvious: a trainer that recounts everything at every step, the `regex`
module for splitting, tiktoken for encoding. Counts beyond 32 bits are tested inside the crate
(`cargo test` in rustbpe/), because a Python test cannot afford that much text.
"""

import hashlib
import itertools
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import regex
import tiktoken

rustbpe = pytest.importorskip("rustbpe", reason="the crate is not built: pip install ./rustbpe")
if getattr(rustbpe, "__crate__", "") != "nanochat-rustbpe":
    pytest.skip("the module rustbpe is not this project's: pip install ./rustbpe", allow_module_level=True)

PATTERN = rustbpe.Tokenizer().get_pattern()
BYTES = [bytes([i]) for i in range(256)]

# Characters on which splitters disagree when they are wrong: contractions with a long s or a Kelvin
# sign, combining marks, digits of other scripts, every kind of space, letters beside 'a' and 'Z'.
ALPHABET = [*"aZqsStTlLvVeErRdDmM'''123 \t\n\r.,-_{`@[", "  ", "\r\n", "\x00", "\x7f", "\u017f", "\u212a", "é",
            "я", "日", "본", "ا", "\u0301", "\u20e3", "\U00010400", "\u0663", "Ⅷ", "½", "\u00a0", "\u0085", "\u2028",
            "\u3000", "\u200b", "\ufeff", "…", "🙂", "👩‍👩‍👧", "don't", "ſ't", "x" * 7, "y" * 8, "Z" * 57, "w" * 58]


def random_text(rng, longest=40):
    return "".join(rng.choices(ALPHABET, k=rng.randint(0, longest)))


def trained(documents, vocab_size, **options):
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(documents), vocab_size, **options)
    return tokenizer


def as_tiktoken(tokenizer):
    ranks = dict(tokenizer.get_mergeable_ranks())
    return tiktoken.Encoding("ours", pat_str=tokenizer.get_pattern(), mergeable_ranks=ranks, special_tokens={})


def naive_tokens(documents, num_merges, pattern):
    """The definition of BPE: count all pairs, merge the most frequent one, start again."""
    words = Counter(chunk for text in documents for chunk in regex.findall(pattern, text))
    words = [([*word.encode()], count) for word, count in words.items()]
    tokens = [*BYTES]
    while len(tokens) < 256 + num_merges:
        counts = Counter()
        for ids, count in words:
            for pair in zip(ids, ids[1:]):
                counts[pair] += count
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))  # ties: smallest left id, then right
        for ids, _ in words:
            i = 0
            while i < len(ids) - 1:
                if (ids[i], ids[i + 1]) == best:
                    ids[i:i + 2] = [len(tokens)]
                i += 1
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


@pytest.fixture(scope="module")
def english():
    """A tokenizer of 1,000 tokens and the text it comes from."""
    rng = random.Random(1)
    words = "the of and to in a is that it was for on as with his be at by this had not are but from or have".split()
    words += ["tokenizer's", "1999", "12,345", "naïve", "“quoted”", "日本語", "\n\n", "  indented"]
    documents = [" ".join(rng.choices(words, k=60)) + random_text(rng) for _ in range(500)]
    return trained(documents, 1000), documents


def test_module_is_ours_and_a_new_tokenizer_knows_the_bytes():
    tokenizer = rustbpe.Tokenizer()
    assert rustbpe.__version__ and tokenizer.vocab_size == 256
    assert tokenizer.get_mergeable_ranks() == [(byte, i) for i, byte in enumerate(BYTES)]
    assert tokenizer.encode("é!") == [0xC3, 0xA9, 0x21]


def test_merges_equal_the_definition():
    for seed in range(1500):
        rng = random.Random(seed)
        letters = "abcdé"[:rng.randint(1, 5)] + " "
        documents = ["".join(rng.choices(letters, k=rng.randint(0, 30))) for _ in range(rng.randint(1, 8))]
        pattern = rng.choice([PATTERN, r"\S+", r"[\s\S]+"])
        tokens = naive_tokens(documents, rng.choice([1, 5, 1000]), pattern)
        if not any(documents) or not any(regex.findall(pattern, text) for text in documents):
            continue
        options = dict(pattern=pattern, num_threads=rng.randint(1, 4), buffer_size=rng.randint(1, 5))
        ours = trained(documents, len(tokens), **options).get_mergeable_ranks()
        assert [token for token, _ in ours] == tokens, (seed, documents, options)


def test_merges_do_not_depend_on_threads_batches_or_order(english):
    tokenizer, documents = english
    expected = tokenizer.get_mergeable_ranks()
    for num_threads, buffer_size in [(1, 8192), (2, 1), (3, 7), (16, 100), (0, 10**12)]:
        shuffled = random.Random(num_threads).sample(documents, len(documents))
        again = trained(shuffled, 1000, num_threads=num_threads, buffer_size=buffer_size)
        assert again.get_mergeable_ranks() == expected


@pytest.mark.parametrize("digits", ["{1,2}", "{1,3}", "{1,4}"])
def test_chunks_equal_those_of_a_regex_engine(digits):
    # A chunk that is a token is encoded as that token. So with all chunks as tokens, ids show chunks.
    pattern = PATTERN.replace("{1,2}", digits)  # {1,4} is not built in and goes through a regex crate
    rng = random.Random(2)
    texts = [random_text(rng) for _ in range(8000)]
    chunks = [[chunk.encode() for chunk in regex.findall(pattern, text)] for text in texts]
    tokens = BYTES + sorted({chunk for chunk in itertools.chain(*chunks) if len(chunk) > 1})
    tokenizer = rustbpe.Tokenizer.from_ranks([(token, i) for i, token in enumerate(tokens)], pattern)
    for text, expected in zip(texts, chunks):
        assert [tokens[i] for i in tokenizer.encode(text)] == expected, repr(text)


def test_every_character_has_the_class_that_tiktoken_gives_it():
    # With every pair of bytes as a token, a chunk border in another place changes the ids.
    tokens = BYTES + [bytes(pair) for pair in itertools.product(range(256), repeat=2)]
    tokenizer = rustbpe.Tokenizer.from_ranks([(token, i) for i, token in enumerate(tokens)])
    reference = as_tiktoken(tokenizer)
    characters = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    for i in range(0, len(characters), 4096):
        text = "".join(f"a{c}a1{c}1 {c}.{c}{c}\n" for c in characters[i:i + 4096])
        assert tokenizer.encode(text) == reference.encode_ordinary(text), f"from U+{ord(characters[i]):04X}"


def test_ids_equal_tiktokens(english):
    tokenizer, documents = english
    reference = as_tiktoken(tokenizer)
    rng = random.Random(3)
    texts = documents + [random_text(rng) for _ in range(20000)] + ["a" * 3000, "the" * 1000, " " * 999, ""]
    ids, offsets = tokenizer.batch_encode(texts)
    for i, text in enumerate(texts):
        expected = reference.encode_ordinary(text)
        assert ids[offsets[i]:offsets[i + 1]].tolist() == expected, repr(text)
        if i % 100 == 0:
            assert tokenizer.encode(text) == expected


def test_a_batch_is_its_texts_one_by_one(english):
    tokenizer, documents = english
    expected = [tokenizer.encode(text) for text in documents]
    for num_threads in [0, 1, 3]:
        ids, offsets = tokenizer.batch_encode(documents * 3, num_threads=num_threads)
        assert (ids.dtype, offsets.dtype) == (np.uint16, np.int64)
        assert [ids[a:b].tolist() for a, b in zip(offsets, offsets[1:])] == expected * 3
    ids, offsets = tokenizer.batch_encode(iter(documents), prepend=999)
    assert [ids[a:b].tolist() for a, b in zip(offsets, offsets[1:])] == [[999, *one] for one in expected]
    ids, offsets = tokenizer.batch_encode([])
    assert ids.tolist() == [] and offsets.tolist() == [0]
    ids, _ = tokenizer.batch_encode(["the"], prepend=65536)  # does not fit into 16 bits
    assert ids.dtype == np.uint32 and ids[0] == 65536


def test_decode_inverts_encode(english):
    tokenizer, documents = english
    for text in documents + ["", "🙂"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()
    assert tokenizer.decode([0xC3]) == "\ufffd" and tokenizer.decode_bytes([0xC3]) == b"\xc3"


def test_a_tokenizer_comes_back_from_its_ranks(english):
    tokenizer, documents = english
    ranks = tokenizer.get_mergeable_ranks()
    again = rustbpe.Tokenizer.from_ranks(random.Random(4).sample(ranks, len(ranks)), tokenizer.get_pattern())
    assert again.get_mergeable_ranks() == ranks and again.vocab_size == 1000
    assert all(again.encode(text) == tokenizer.encode(text) for text in documents)


def test_parquet_equals_iterator_with_the_same_limits(english, tmp_path):
    _, documents = english
    column = [text if i % 50 else None for i, text in enumerate(documents)]
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path, part, kind in zip(paths, (column[:200], column[200:]), (pa.string(), pa.large_string())):
        table = pa.table({"id": range(len(part)), "text": pa.array(part, kind)})
        pq.write_table(table, path, row_group_size=64)

    def capped(max_chars, doc_cap):
        num_chars = 0
        for text in filter(None, column):
            text = text[:min(doc_cap or len(text), (max_chars or 10**9) - num_chars)]
            num_chars += len(text)
            yield text
            if num_chars == max_chars:
                return

    for max_chars, doc_cap in [(0, 0), (20000, 0), (0, 50), (10000, 77)]:
        tokenizer = rustbpe.Tokenizer()
        tokenizer.train_from_parquet(paths, 330, max_chars=max_chars, doc_cap=doc_cap)
        assert tokenizer.get_mergeable_ranks() == trained(capped(max_chars, doc_cap), 330).get_mergeable_ranks()
    pq.write_table(pa.table({"body": pa.array(column).dictionary_encode()}), paths[0])
    tokenizer.train_from_parquet(str(paths[0]), 400, column="body")
    assert tokenizer.get_mergeable_ranks() == trained(filter(None, column), 400).get_mergeable_ranks()


def test_too_small_a_text_says_how_many_tokens_it_can_give():
    for documents, most in ([], 256), (["ab", "ab"], 257):
        with pytest.raises(ValueError) as error:
            trained(documents, 300)
        assert error.value.most_tokens == most


def test_parquet_asks_for_a_file_when_it_needs_it(tmp_path):
    pq.write_table(pa.table({"text": ["abc", None, "abd"]}), tmp_path / "a.parquet")
    asked = []

    def paths():
        for name in ("a.parquet", "none.parquet"):
            asked.append(name)
            yield tmp_path / name

    assert rustbpe.Tokenizer().train_from_parquet(paths(), 257, max_chars=5) == (2, 5)
    assert asked == ["a.parquet"]


# What the process may start: nothing, or one thread beside its own. Root has no limits, so it becomes someone else.
FEW_THREADS = '''
import os, resource, sys, numpy, rustbpe
if os.geteuid() == 0:
    os.setuid(60123)
resource.setrlimit(resource.RLIMIT_NPROC, (int(sys.argv[1]),) * 2)
texts = [f"the cat number {i} sat on the mat " * 100 for i in range(300)]
tokenizer = rustbpe.Tokenizer()
tokenizer.train_from_iterator(texts, 300, num_threads=4)
ids, _ = tokenizer.batch_encode(texts, num_threads=4)
assert tokenizer.decode(tokenizer.encode("the cat " * 300_000)) == "the cat " * 300_000
print(tokenizer.decode(ids.tolist()) == "".join(texts), tokenizer.vocab_size)
'''


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_NPROC counts threads on Linux")
@pytest.mark.parametrize("most", [1, 2])
def test_a_refused_thread_is_done_without(most):
    done = subprocess.run([sys.executable, "-c", FEW_THREADS, str(most)], capture_output=True, text=True)
    assert done.stdout == "True 300\n", done.stderr


def test_progress_is_reported_in_lines():
    lines = []
    trained(["some text to count " * 100] * 10, 260, progress=lines.append)
    assert any("10 documents" in line and "MB/s" in line for line in lines)
    assert lines[-1] == "merging: 4 of 4 merges"


def broken_iterator():
    yield "fine"
    raise KeyError("from the iterator")


def failing_callback(line):
    raise OSError("from the callback")


@pytest.mark.parametrize("call, error, words", [
    (lambda t: t.train_from_iterator(["ab"], 255), ValueError, "at least 256"),
    (lambda t: t.train_from_iterator(["ab"], -1), ValueError, "at least 256"),
    (lambda t: t.train_from_iterator(["ab"], "many"), TypeError, "vocab_size"),
    (lambda t: t.train_from_iterator(["ab"], 258), ValueError, "only 257 tokens"),
    (lambda t: t.train_from_iterator(["ab"], 10**15), ValueError, "only 257 tokens"),
    (lambda t: t.train_from_iterator(["ab", 3], 257), TypeError, "document 1 of the iterator is int, not str"),
    (lambda t: t.train_from_iterator(["ab", b"ab"], 257), TypeError, "bytes, not str"),
    (lambda t: t.train_from_iterator(["ab", None], 257), TypeError, "NoneType, not str"),
    (lambda t: t.train_from_iterator("abab", 257), TypeError, "list"),
    (lambda t: t.train_from_iterator(5, 257), TypeError, "iterable"),
    (lambda t: t.train_from_iterator(["ab", "\ud800"], 257), ValueError, "document 1 .* surrogates"),
    (lambda t: t.train_from_iterator(broken_iterator(), 257), KeyError, "from the iterator"),
    (lambda t: t.train_from_iterator(["ab"], 257, progress=failing_callback), OSError, "from the callback"),
    (lambda t: t.train_from_iterator(["ab"], 257, pattern="(unclosed"), ValueError, "pattern"),
    (lambda t: t.train_from_iterator(["ab"], 257, buffer_size=0), ValueError, "buffer_size"),
    (lambda t: t.train_from_iterator(["ab"], 257, num_threads=-1), ValueError, "num_threads"),
    (lambda t: t.train_from_iterator([], 257), ValueError, "0 documents"),
    (lambda t: t.train_from_iterator([""], 257), ValueError, "without any text"),
    (lambda t: t.train_from_iterator(["ab"], 257, pattern="z+"), ValueError, "without any text"),
    (lambda t: t.train_from_parquet([], 257), ValueError, "0 documents"),
    (lambda t: t.train_from_parquet("absent.parquet", 257), FileNotFoundError, "absent.parquet"),
    (lambda t: t.train_from_parquet(["x.parquet"], 257, max_chars=-1), ValueError, "max_chars"),
    (lambda t: t.encode(5), TypeError, "int, not str"),
    (lambda t: t.encode("\udcff"), ValueError, "surrogates"),
    (lambda t: t.batch_encode(["a", 5]), TypeError, "text 1 is int, not str"),
    (lambda t: t.batch_encode("abc"), TypeError, "list"),
    (lambda t: t.batch_encode(["a"], num_threads=-2), ValueError, "num_threads"),
    (lambda t: t.decode([259]), ValueError, "unknown token id 259"),
    (lambda t: t.decode([-1]), ValueError, "unknown token id -1"),
    (lambda t: t.from_ranks([(b"a", 0)]), ValueError, "single byte"),
    (lambda t: t.from_ranks([(b"a", 0), (b"b", 0)]), ValueError, "rank 0 occurs twice"),
    (lambda t: t.from_ranks([(b"a", 7)]), ValueError, "rank 7"),
    (lambda t: t.from_ranks([(b, i) for i, b in enumerate(BYTES)] + [(b"", 256)]), ValueError, "no bytes"),
])
def test_bad_input_is_an_exception_and_changes_nothing(call, error, words):
    tokenizer = trained(["abc abc"], 259)
    before = tokenizer.get_mergeable_ranks()
    with pytest.raises(error, match=words) as caught:
        call(tokenizer)
    assert "\n" not in str(caught.value)
    assert tokenizer.get_mergeable_ranks() == before and tokenizer.get_pattern() == PATTERN


def test_bad_parquet_files_say_which_and_why(tmp_path):
    good, numbers, torn = (str(tmp_path / name) for name in ("good.parquet", "numbers.parquet", "torn.parquet"))
    pq.write_table(pa.table({"body": ["some text"]}), good)
    pq.write_table(pa.table({"text": [1, 2]}), numbers)
    with open(good, "rb") as whole, open(torn, "wb") as part:
        part.write(whole.read()[:-20])
    tokenizer = rustbpe.Tokenizer()
    for path, words in [(good, "no column 'text'; it has body"), (numbers, "int64, not string"), (torn, "torn.parquet")]:
        with pytest.raises(ValueError, match=words) as caught:
            tokenizer.train_from_parquet([path], 257)
        assert path in str(caught.value)
    # a text column whose bytes are not UTF-8; pyarrow does not look
    not_utf8 = pa.array([b"ok", b"\xff\xfe"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": not_utf8}), good)
    with pytest.raises(ValueError, match="column 'text' is damaged.*utf-8"):
        tokenizer.train_from_parquet(good, 257)
    assert tokenizer.vocab_size == 256


def interrupted_after(seconds, job):
    """Seconds from Ctrl-C until `job` has ended with KeyboardInterrupt."""
    pressed = []

    def press():
        pressed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(seconds, press)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            job()
    finally:
        timer.cancel()
        timer.join()
    return time.monotonic() - pressed[0]


def test_ctrl_c_ends_training_within_a_second():
    tokenizer = rustbpe.Tokenizer()
    endless = itertools.repeat("counting without end " * 500)  # no Python code runs between two documents
    assert interrupted_after(0.3, lambda: tokenizer.train_from_iterator(endless, 300)) < 1
    # one word of two million random letters: all the time goes into merges
    word = "".join(random.Random(5).choices("abcdefghijklmnopqrstuvwxyz", k=2_000_000))
    assert interrupted_after(0.5, lambda: tokenizer.train_from_iterator([word], 10**6)) < 1
    assert tokenizer.vocab_size == 256


def test_ctrl_c_ends_encoding_within_a_second():
    tokenizer = trained(["ab ab"], 257)
    run, prose = "ab" * 50_000_000, "".join(random.Random(6).choices("abc ", k=1_000_000)) * 100
    for text in run, prose:
        assert interrupted_after(0.1, lambda: tokenizer.encode(text)) < 1
    assert interrupted_after(0.1, lambda: tokenizer.batch_encode([prose, prose])) < 1
    assert tokenizer.encode("ab ab") == [256, 32, 256]


def test_other_threads_run_and_use_the_tokenizer_during_training(english):
    tokenizer, documents = english
    expected = tokenizer.get_mergeable_ranks()
    results = []
    threads = [threading.Thread(target=lambda: results.append(trained(documents, 1000).get_mergeable_ranks()))
               for _ in range(3)]
    for thread in threads:
        thread.start()
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in documents)
    for thread in threads:
        thread.join()
    assert results == [expected] * 3


# sha256 over [u32 length][bytes] of all tokens from 256 on, as two other trainers found them as well
C100_TOKENS = {4096: "97e2673247a5698f", 32768: "5f50b400b78d906a", 65536: "b7425d1e0b25f51e"}


@pytest.mark.parametrize("vocab_size", C100_TOKENS)
def test_reference_vocabularies(vocab_size):
    path = os.environ.get("NANOCHAT_TEST_TEXT", "")
    if not path:
        pytest.skip("NANOCHAT_TEST_TEXT does not name the reference text c100.parquet")
    if pq.ParquetFile(path).metadata.num_rows != 23097:
        pytest.skip(f"NANOCHAT_TEST_TEXT={path} is another text than c100.parquet")
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_parquet(path, vocab_size)
    tokens = [token for token, _ in tokenizer.get_mergeable_ranks()[256:]]
    digest = hashlib.sha256(b"".join(struct.pack("<I", len(token)) + token for token in tokens))
    assert digest.hexdigest()[:16] == C100_TOKENS[vocab_size]
