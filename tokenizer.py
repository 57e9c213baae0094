"""
Text to token numbers and back, and conversations to tokens with a mask of what is learned.

in    the folder that tok_train.py writes: vocab.tiktoken, token_bytes.npy, meta.json
out   Tokenizer: encode, decode, bytes per token, render_conversation

Byte-level BPE: the first 256 tokens are the bytes, every later one glues two earlier tokens together. Our Rust crate
learns the merges and applies them. Plain data files, no pickle: a tokenizer from a stranger cannot run code.
"""
import base64
import hashlib
import os
import re

import numpy as np

from plumbing.common import atomic_write, base_path, read_json, write_json

# They stand at the end of the vocabulary in this order. Text can never contain them: "<|bos|>" typed by a user is
# encoded as seven ordinary characters.
SPECIAL_TOKENS = [
    "<|bos|>",                                      # before every document and conversation
    "<|user_start|>", "<|user_end|>",
    "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>",           # the assistant asks the calculator
    "<|output_start|>", "<|output_end|>",           # the calculator answers
]

# GPT-4's pattern, with runs of at most two digits instead of three: a small vocabulary has no
# tokens to spend on a thousand numbers. Merges never cross the pieces that it cuts.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)"                        # English endings: 's 'll 've
    r"|[^\r\n\p{L}\p{N}]?+\p{L}+"                   # a word, with the one character before it
    r"|\p{N}{1,2}"                                  # one or two digits
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*"                  # punctuation
    r"|\s*[\r\n]|\s+(?!\S)|\s+"                     # white space
)

MAX_VOCAB_SIZE = 2**16                              # token files store uint16
BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError)      # what read_tokenizer raises


class Tokenizer:
    """The mergeable tokens in rank order (their number is their rank), then the specials."""

    def __init__(self, ranks, pattern=SPLIT_PATTERN):
        single = {bytes([i]) for i in range(256)}
        assert set(ranks[:256]) == single, "the first 256 tokens must be the bytes"
        assert len(set(ranks)) == len(ranks), "two tokens have the same bytes"
        self.ranks, self.pattern = list(ranks), pattern
        self.specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.vocab_size = len(ranks) + len(SPECIAL_TOKENS)
        # names the vocabulary, so that caches made with another are never mixed up; the lengths go in with the bytes,
        # so that no two lists of tokens read the same
        digest = hashlib.sha256()
        for piece in [pattern.encode(), *ranks, *(name.encode() for name in SPECIAL_TOKENS)]:
            digest.update(len(piece).to_bytes(4, "little") + piece)
        self.fingerprint = digest.hexdigest()[:16]
        self.bos = self.special("<|bos|>")
        # the bytes of every id, for decoding; a special decodes to its name
        self.pieces = self.ranks + [name.encode() for name in SPECIAL_TOKENS]
        self.core = import_rustbpe().Tokenizer.from_ranks([(token, i) for i, token in enumerate(ranks)], pattern)

    def __reduce__(self):
        return Tokenizer, (self.ranks, self.pattern)   # for a process of its own: the crate's part is made there

    def special(self, name):
        """The id of a special token, such as "<|bos|>"."""
        return self.specials[name]

    def encode(self, text):
        """The ids of ordinary text; works for every str: a lone surrogate becomes U+FFFD."""
        try:
            return self.core.encode(text)
        except ValueError:                          # half a surrogate pair has no UTF-8 form
            return self.core.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    def decode_bytes(self, ids):
        """The raw bytes of the ids; they may end inside a character."""
        assert all(0 <= i < self.vocab_size for i in ids), "an id lies outside the vocabulary"
        return b"".join([self.pieces[i] for i in ids])

    def decode(self, ids):
        """The text of the ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self):
        """
        Bytes of text behind each token: (vocab_size,) int32, 0 for the specials.

        Counted on the raw bytes: decode would make the three of U+FFFD of a byte that is half a character,
        and bits per byte would come out too low.
        """
        return np.array([len(token) for token in self.ranks] + [0] * len(SPECIAL_TOKENS), dtype=np.int32)

    def letter_tokens(self):
        """The tokens that are two or more lowercase ASCII letters: pieces for spelling rows."""
        return [token.decode() for token in self.ranks if re.fullmatch(rb"[a-z]{2,}", token)]

    def render_conversation(self, conversation):
        """
        A conversation as tokens, and which of them the assistant has to learn.

        returns (ids, mask), two lists of int of the same length; mask[i] = 1 where the assistant is to produce
            token i: its text, its calculator calls with start and end, and <|assistant_end|>
        raises ValueError, one line, when roles or parts are not as they must be
        """
        ids, mask = [self.bos], [0]
        for message in merge_system(conversation):
            role = message["role"]
            learned = int(role == "assistant")
            ids.append(self.special(f"<|{role}_start|>"))
            mask.append(0)                          # the program writes it, also at generation
            for part, text in parts_of(message):
                tokens = self.encode(text)
                if part == "python":
                    tokens = [self.special("<|python_start|>"), *tokens, self.special("<|python_end|>")]
                elif part == "python_output":
                    tokens = [self.special("<|output_start|>"), *tokens, self.special("<|output_end|>")]
                ids += tokens
                # a result is forced in at generation, so it is never learned
                mask += [0 if part == "python_output" else learned] * len(tokens)
            ids.append(self.special(f"<|{role}_end|>"))
            mask.append(learned)                    # the assistant learns to stop
        return ids, mask

    def render_for_completion(self, conversation):
        """The ids up to and including <|assistant_start|>; a reply that already stands at the end is left out."""
        messages = conversation["messages"]
        if messages and messages[-1].get("role") == "assistant":
            messages = messages[:-1]
        if not messages or messages[-1].get("role") != "user":
            raise ValueError("conversation: there is no user message to reply to")
        ids, _ = self.render_conversation({"messages": messages})
        return ids + [self.special("<|assistant_start|>")]

    def save(self, folder, info):
        """
        Write vocab.tiktoken, token_bytes.npy and, last, meta.json with info beside our own keys.

        info: dict of plain values, kept for the reader and for deciding what is finished
        """
        meta_path = os.path.join(folder, "meta.json")
        if os.path.exists(meta_path):               # from here on the old one is no longer whole
            os.remove(meta_path)
        with atomic_write(os.path.join(folder, "vocab.tiktoken")) as f:
            for rank, token in enumerate(self.ranks):
                f.write(base64.b64encode(token) + b" %d\n" % rank)
        with atomic_write(os.path.join(folder, "token_bytes.npy")) as f:
            np.save(f, self.token_bytes(), allow_pickle=False)
        meta = dict(info, vocab_size=self.vocab_size, fingerprint=self.fingerprint,
                    pattern=self.pattern, special_tokens=SPECIAL_TOKENS)
        write_json(meta_path, meta)


def load_tokenizer(folder=""):
    """The tokenizer in a folder, "" = this base folder's; SystemExit with one line when it is missing or broken."""
    folder = folder or base_path("tokenizer")
    if not os.path.exists(os.path.join(folder, "meta.json")):
        raise SystemExit(f"{folder}: no tokenizer here; run: python tok_train.py")
    try:
        return read_tokenizer(folder)
    except BROKEN as error:
        raise SystemExit(f"{folder}: the tokenizer is broken ({error!r}); "
                         "move the folder away and run: python tok_train.py") from None


def read_tokenizer(folder):
    """The tokenizer that save has written in a folder; one of BROKEN where its files are not those."""
    meta = read_json(os.path.join(folder, "meta.json"), damages := [])
    assert not damages, "meta.json is damaged"
    with open(os.path.join(folder, "vocab.tiktoken"), "rb") as f:
        lines = [line.split() for line in f]
    assert [int(rank) for _, rank in lines] == list(range(len(lines))), "ranks are not 0, 1, 2, ..."
    tokenizer = Tokenizer([base64.b64decode(token, validate=True) for token, _ in lines], meta["pattern"])
    assert tokenizer.fingerprint == meta["fingerprint"], "its files do not belong together"
    return tokenizer


def merge_system(conversation):
    """
    The messages, with a system message put in front of the first user message.

    raises ValueError when there is none, or user and assistant do not take turns, user first
    """
    messages = conversation["messages"]
    if messages and messages[0].get("role") == "system":
        if len(messages) < 2 or messages[1].get("role") != "user":
            raise ValueError("conversation: a user message must follow the system message")
        system, first = ("".join(text for _, text in parts_of(message)) for message in messages[:2])
        messages = [dict(messages[1], content=f"{system}\n\n{first}"), *messages[2:]]
    if not messages:
        raise ValueError("conversation: it has no messages")
    for i, message in enumerate(messages):
        wanted = ("user", "assistant")[i % 2]
        if message.get("role") != wanted:
            raise ValueError(f"conversation: message {i} (system not counted) must be from the {wanted}, "
                             f"not {message.get('role')!r}")
    return messages


def parts_of(message):
    """The (type, text) pairs of a message; only the assistant may use the calculator."""
    role, content = message["role"], message.get("content")
    if isinstance(content, str):
        return [("text", content)]
    if not isinstance(content, list):
        raise ValueError(f"conversation: the content of the {role}'s message is {type(content).__name__}, "
                         "not text or parts")
    types = ("text", "python", "python_output") if role == "assistant" else ("text",)
    for part in content:
        part = part if isinstance(part, dict) else {}
        if part.get("type") not in types or not isinstance(part.get("text"), str):
            raise ValueError(f"conversation: a part of a {role} message needs a text and a type from "
                             f"{', '.join(types)}")
    return [(part["type"], part["text"]) for part in content]


def import_rustbpe():
    """
    Our Rust crate, told apart from two other things of its name.

    The folder rustbpe/ beside the scripts imports as an empty package where the crate is not installed,
    and the package index has another project of that name.
    """
    remedy = "run: bash setup.sh (or: pip install ./rustbpe)"
    try:
        import rustbpe
    except ImportError as error:
        raise SystemExit(f"rustbpe: the Rust crate is not installed ({error}); {remedy}") from None
    if getattr(rustbpe, "__file__", None) is None:
        raise SystemExit(f"rustbpe: only the source folder is there, nothing is built; {remedy}")
    if getattr(rustbpe, "__crate__", "") != "nanochat-rustbpe":
        raise SystemExit(f"rustbpe: {rustbpe.__file__} is another package of the same name; "
                         f"pip uninstall rustbpe, then {remedy}")
    return rustbpe


def train_tokenizer(paths, vocab_size, max_chars=0, doc_cap=0, progress=None):
    """
    A Tokenizer of vocab_size tokens, specials included, learned from Parquet files of text.

    paths: iterator of paths; the next one is asked for when the file before has been read
    max_chars, doc_cap: characters to use in all, and of one document; 0 = no limit
    progress: called every few seconds with a line
    returns the tokenizer, and how many documents and characters it was learned from
    raises SystemExit with one line when the text is too small or the size impossible
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if not smallest <= vocab_size <= MAX_VOCAB_SIZE:
        raise SystemExit(f"vocab_size={vocab_size}: take {smallest} (bytes and specials) "
                         f"to {MAX_VOCAB_SIZE} (token files hold 16 bits)")
    trainer = import_rustbpe().Tokenizer()
    num_ranks = vocab_size - len(SPECIAL_TOKENS)
    try:
        documents, chars = trainer.train_from_parquet(paths, num_ranks, max_chars, doc_cap, SPLIT_PATTERN,
                                                      progress=progress)
    except ValueError as error:
        if not hasattr(error, "most_tokens"):
            raise SystemExit(f"{error}; move it away; own text needs a column 'text' of strings, a downloaded shard "
                             "comes again with python prepare.py") from None
        most = error.most_tokens + len(SPECIAL_TOKENS)
        raise SystemExit(f"vocab_size={vocab_size}: this text gives only {most} tokens, the {len(SPECIAL_TOKENS)} "
                         f"special ones included; learn from more text or take --vocab_size={most}") from None
    pairs = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
    assert len(pairs) == num_ranks, "rustbpe learned another number of tokens"
    return Tokenizer([bytes(token) for token, _ in pairs]), documents, chars
