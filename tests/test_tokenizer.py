"""Laws of the tokenizer: nothing is lost, bytes add up, only the assistant's words are scored."""
import json
import os
import pickle
import random
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken

from tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer, train_tokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BYTES = [bytes([i]) for i in range(256)]
MERGED = [b"he", b"ll", b"hell", b" w", b" wo", b"in", b"ing", "é".encode()]
TEXTS = ["", "hello world", "  two\n\n\nlines\t \r\n", "naïve café", "한국어 텍스트", "👩‍🚀🇩🇪",
         "a1234567890b", "\x00\x1f\x7f", "it's I'll WE'RE 's", "\u00a0\u0085\u2028\u3000x",
         "<|bos|> <|user_end|>", "ſ'ſ"]


@pytest.fixture
def tokenizer():
    return Tokenizer(BYTES + MERGED)


@pytest.mark.parametrize("text", TEXTS)
def test_nothing_is_lost(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert max(ids, default=0) < tokenizer.special("<|bos|>"), "text never becomes a special token"


def test_random_text_is_not_lost(tokenizer):
    rng = random.Random(0)

    def character():
        low, high = rng.choice([(32, 127), (0, 0xD800), (0xE000, 0x110000)])    # no surrogates
        return chr(rng.randrange(low, high))

    texts = ["".join(character() for _ in range(rng.randrange(60))) for _ in range(300)]
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts


def test_token_bytes_are_those_of_the_raw_token(tokenizer):
    counts = tokenizer.token_bytes()
    assert counts.dtype == np.int32 and counts.shape == (tokenizer.vocab_size,)
    assert (counts[:256] == 1).all(), "also for bytes that are half a character"
    assert (counts[-len(SPECIAL_TOKENS):] == 0).all()


def test_encode_takes_every_string(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"      # half a surrogate pair
    for text in [" " * 1_200_000 + "x", "x" + "\t " * 600_000, "\n" * 30_000, "word " * 9_000]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_are_those_of_tiktoken(tokenizer):
    ranks = {token: rank for rank, token in enumerate(tokenizer.ranks)}
    oracle = tiktoken.Encoding("oracle", pat_str=tokenizer.pattern, mergeable_ranks=ranks, special_tokens={})
    odd = ["a\ud800b", "\udc00", "\ud83d\ude00 hello", "\0\0 hell\0", "a" + " " * 20_000 + "b", "hell" * 5_000]
    for text in TEXTS + odd:
        assert tokenizer.encode(text) == oracle.encode_ordinary(text), ascii(text[:50])


def test_a_tokenizer_travels_to_another_process(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.fingerprint == tokenizer.fingerprint and again.encode("hello") == tokenizer.encode("hello")


def test_decode_streams_bytes_and_names_specials(tokenizer):
    ids = [tokenizer.bos, *"é".encode()]
    assert tokenizer.decode_bytes(ids[:2]) == b"<|bos|>\xc3"
    assert tokenizer.decode(ids[:2]) == "<|bos|>\ufffd"
    with pytest.raises(AssertionError):
        tokenizer.decode([tokenizer.vocab_size])


CONVERSATION = {"messages": [
    {"role": "system", "content": "Be"},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "2+1?"},
    {"role": "assistant", "content": [
        {"type": "text", "text": "="},
        {"type": "python", "text": "2+1"},
        {"type": "python_output", "text": "3"},
        {"type": "text", "text": "3."}]},
]}


def test_golden_render_of_a_conversation():
    """Written out by hand: a byte is its own id, the specials follow from 256 on."""
    ids, mask = Tokenizer(BYTES).render_conversation(CONVERSATION)
    #      bos  user  B   e   \n  \n  H   i    /user asst  Y   o    /asst
    want = [256, 257, 66, 101, 10, 10, 72, 105, 258, 259, 89, 111, 260,
            #  user 2  +   1   ?   /user asst  =
            257, 50, 43, 49, 63, 258, 259, 61,
            #  python 2  +   1  /python  output 3 /output  3   .   /asst
            261, 50, 43, 49, 262, 263, 51, 264, 51, 46, 260]
    scored = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1,
              0, 0, 0, 0, 0, 0, 0, 1,
              1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1]
    assert ids == want
    assert mask == scored


def test_render_for_completion_ends_where_the_assistant_begins(tokenizer):
    ids, _ = tokenizer.render_conversation(CONVERSATION)
    prompt = tokenizer.render_for_completion(CONVERSATION)
    assert prompt == ids[:len(prompt)]
    assert prompt[-1] == tokenizer.special("<|assistant_start|>")
    assert prompt.count(prompt[-1]) == 2, "the first turn's and the one to come"
    open_end = {"messages": CONVERSATION["messages"][:-1]}
    assert tokenizer.render_for_completion(open_end) == prompt
    assert CONVERSATION["messages"][1]["content"] == "Hi", "left as it was"


@pytest.mark.parametrize("messages, word", [
    ([], "no messages"),
    ([{"role": "assistant", "content": "x"}], "from the user"),
    ([{"role": "system", "content": "x"}], "follow the system"),
    ([{"role": "user", "content": "x"}, {"role": "user", "content": "y"}], "from the assistant"),
    ([{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}], "'tool'"),
    ([{"content": "x"}], "None"),
    ([{"role": "user", "content": None}], "NoneType"),
    ([{"role": "user", "content": [{"type": "python", "text": "1"}]}], "type from"),
    ([{"role": "user", "content": "x"},
      {"role": "assistant", "content": [{"type": "image", "text": ""}]}], "type from"),
])
def test_wrong_conversations_are_named_in_one_line(tokenizer, messages, word):
    with pytest.raises(ValueError) as error:
        tokenizer.render_conversation({"messages": messages})
    assert word in str(error.value) and "\n" not in str(error.value)


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path, {"max_chars": 5})
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint and again.ranks == tokenizer.ranks
    assert json.loads((tmp_path / "meta.json").read_text())["max_chars"] == 5
    assert (np.load(tmp_path / "token_bytes.npy") == tokenizer.token_bytes()).all()
    assert sorted(os.listdir(tmp_path)) == ["meta.json", "token_bytes.npy", "vocab.tiktoken"]


def test_broken_tokenizers_end_in_one_line(tokenizer, tmp_path):
    with pytest.raises(SystemExit, match="tok_train"):
        load_tokenizer(tmp_path)
    tokenizer.save(tmp_path, {})
    whole = (tmp_path / "vocab.tiktoken").read_bytes()
    for broken in [whole[:-30], whole[:-1000], b"", b"\xff\xfe", whole.replace(b" 7\n", b" 8\n")]:
        (tmp_path / "vocab.tiktoken").write_bytes(broken)
        with pytest.raises(SystemExit) as error:
            load_tokenizer(tmp_path)
        assert "broken" in str(error.value) and "\n" not in str(error.value)


def test_fingerprint_knows_order_and_pattern(tokenizer):
    swapped = BYTES + [MERGED[1], MERGED[0], *MERGED[2:]]
    prints = {tokenizer.fingerprint, Tokenizer(swapped).fingerprint, Tokenizer(BYTES).fingerprint,
              Tokenizer(BYTES + MERGED, pattern=r"\s+|\S+").fingerprint}
    assert len(prints) == 4 and all(len(p) == 16 for p in prints)


def parquet(path, *texts):
    part = path.with_suffix(".part")
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), part)
    part.rename(path)
    return path


def test_training_is_deterministic_and_reads_no_more_than_it_is_asked_to(tmp_path):
    texts = ["the cat sat on the mat, the cats sat on mats", "12345 numbers and naïve words"]
    path = parquet(tmp_path / "a.parquet", *texts * 3)
    (first, *used), (second, *_) = (train_tokenizer(iter([path]), 300) for _ in range(2))
    assert first.fingerprint == second.fingerprint and first.vocab_size == 300
    assert used == [6, 3 * len("".join(texts))]
    # the second file is not there, and is not asked for
    _, *used = train_tokenizer((path, tmp_path / "none.parquet"), 270, max_chars=25, doc_cap=10)
    assert used == [3, 25]


@pytest.mark.parametrize("texts, vocab_size, words", [
    (["abc"], 5000, ["vocab_size=5000", "only 267 tokens", "--vocab_size=267"]),
    ([], 300, ["only 265"]), (["abc"], 100, ["265"]), (["abc"], 70000, ["65536"]),
])
def test_impossible_vocabularies_end_in_one_line(texts, vocab_size, words, tmp_path):
    with pytest.raises(SystemExit) as error:
        train_tokenizer([parquet(tmp_path / "a.parquet", *texts)], vocab_size)
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message and "4991" not in message


@pytest.fixture
def tok_train(tmp_path):
    """tok_train.py as a user would run it, and the folder where it looks for shards."""
    folder = tmp_path / "base_data"
    folder.mkdir()

    def run(*flags):
        return subprocess.Popen([sys.executable, os.path.join(ROOT, "tok_train.py"), *flags],
                                env=dict(os.environ, NANOCHAT_BASE_DIR=str(tmp_path)), text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return run, folder


def test_tok_train_takes_zero_for_no_limit_and_no_negative_number(tok_train, tmp_path):
    run, folder = tok_train
    parquet(folder / "shard_00000.parquet", "the cat sat on the mat " * 1000, "and the dog " * 10)
    parquet(folder / "shard_01822.parquet", "the cat")
    for flag in ("--max_chars=-5", "--doc_cap=-1", "--num_shards=-2"):
        out, err = run("--vocab_size=270", flag).communicate()
        assert err.startswith(f"tok_train.py: {flag[2:]}: must be 0 to ") and "0 = all" in err and err.count("\n") == 1, (out, err)
    out, err = run("--vocab_size=270", "--max_chars=0", "--doc_cap=0").communicate()
    assert not err and "learned 270 tokens" in out and "counting: 2 documents" in out and "merging: 5 of 5" in out
    meta = json.loads((tmp_path / "tokenizer" / "meta.json").read_text())
    assert meta["seen"] == {"chars": 23 * 1000 + 120, "documents": 2, "shards": 1}


def test_tok_train_names_a_damaged_shard(tok_train):
    run, folder = tok_train
    (folder / "shard_00000.parquet").write_bytes(b"PAR1 torn")
    parquet(folder / "shard_01822.parquet", "the cat")
    _, err = run("--vocab_size=270").communicate()
    assert "shard_00000.parquet" in err and "move it away" in err and err.count("\n") == 1 and "delete" not in err


def test_tok_train_waits_trains_and_knows_when_it_is_done(tok_train, tmp_path):
    """While the last shard is still on its way."""
    run, folder = tok_train

    def shard(i, *texts):
        parquet(folder / f"shard_{i:05d}.parquet", *texts)

    shard(0, "the cat sat on the mat " * 20, "x" * 50)
    shard(1822, "the cat")
    flags = ["--vocab_size=270", "--num_shards=2", "--doc_cap=400"]
    running = run(*flags)
    while "waiting for shard_00001.parquet" not in running.stdout.readline():
        assert running.poll() is None, running.stderr.read()
    shard(1, "the cats sat on the mats")
    out, err = running.communicate(timeout=60)
    assert running.returncode == 0 and "2 shards" in out, (out, err)
    meta = json.loads((tmp_path / "tokenizer" / "meta.json").read_text())
    assert meta["seen"] == {"chars": 400 + 50 + 24, "documents": 3, "shards": 2}
    out, err = run(*flags).communicate()
    assert "finished already" in out and not err
    out, err = run(*flags[1:], "--vocab_size=280").communicate()
    assert "vocab_size=270" in err and "NANOCHAT_BASE_DIR" in err and err.count("\n") == 1
    vocab_path = tmp_path / "tokenizer" / "vocab.tiktoken"
    whole = vocab_path.read_bytes()
    vocab_path.write_bytes(whole[:-1 - len(whole.splitlines()[-1])])          # its last token is gone
    out, err = run(*flags).communicate()
    assert "tokenizer: damaged, so the tokenizer is trained again; the old one is now" in out and not err
    assert vocab_path.read_bytes() == whole and len(list(tmp_path.glob("tokenizer.damaged-*/vocab.tiktoken"))) == 1


@pytest.mark.parametrize("files, word", [
    ({"rustbpe/Cargo.toml": ""}, "source folder"),
    ({"rustbpe/__init__.py": ""}, "another package"),
    ({"rustbpe.py": "raise ImportError('no symbol')"}, "not installed"),
])
def test_a_wrong_rustbpe_is_told_apart(tmp_path, files, word):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    # -ES leaves out what is installed; numpy, which tokenizer.py needs, is stood in for
    code = ("import sys, types\n"
            "sys.modules['numpy'] = types.ModuleType('numpy')\n"
            f"sys.path[:0] = [{str(tmp_path)!r}]; sys.path.append({ROOT!r})\n"
            "import tokenizer; tokenizer.import_rustbpe()")
    done = subprocess.run([sys.executable, "-ES", "-c", code], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode != 0 and word in done.stderr and "setup.sh" in done.stderr
    assert done.stderr.strip().count("\n") == 0
