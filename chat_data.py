"""
Conversations as training data: token files for mid-training, padded rows for fine-tuning.

in    a mixture of tasks (tasks.py) and the tokenizer
out   paths of token files that data.TokenStream reads, made by a background process; or (x, y)

Mid-training reads its conversations as one long stream, like text: conversations one after the
other, cut into rows wherever a row ends, nothing padded and nothing thrown away.
"""
import glob
import hashlib
import os
import shutil

from plumbing.common import RANK, TASK_CODE, code_hash
from data import is_fresh, pad_batch, write_token_file

FILE_CONVERSATIONS = 8192      # conversations in one token file


def conversation_files(folder, conversations, tokenizer, split):
    """
    The token files that a mixture will have, in `folder`; those of another mixture there go.

    The name holds a hash of the tokenizer, of the mixture and of the code that makes the
    conversations, so that an edited template is never answered with yesterday's tokens.
    """
    made_by = [code_hash(name) for name in TASK_CODE]
    key = hashlib.sha256(f"{tokenizer.fingerprint} {conversations!r} {len(conversations)} {made_by}".encode()).hexdigest()[:16]
    for old in glob.glob(os.path.join(folder, f"{split}_*")):
        if RANK == 0 and not os.path.basename(old).startswith(f"{split}_{key}"):
            os.remove(old)
    count = -(-len(conversations) // FILE_CONVERSATIONS)
    return [os.path.join(folder, f"{split}_{key}.{k:05d}.bin") for k in range(count)]


def make_conversation_files(jobs, tokenizer):
    """Write the token files of each (paths, conversations) in jobs; runs in the background."""
    for paths, conversations in jobs:
        for k, path in enumerate(paths):
            first = k * FILE_CONVERSATIONS
            rows = range(first, min(first + FILE_CONVERSATIONS, len(conversations)))
            if not is_fresh(path):
                write_token_file(path, (render(conversations, i, tokenizer) for i in rows))


def render(conversations, i, tokenizer):
    """(ids, mask) of conversation i; a broken one ends the run and says which it is."""
    try:
        return tokenizer.render_conversation(conversations[i])
    except ValueError as error:
        raise SystemExit(f"conversation {i} of {conversations!r}: {error}") from None


def epoch_tokens(stream, conversations):
    """
    Tokens in one pass over the mixture, reckoned from its first file alone.

    The mixture is shuffled, so the first file is a fair sample (within about a percent), and the
    run need not wait until the last one is made to know its length.
    """
    while not stream.ends:
        stream.open_next()
    return round(stream.ends[0] * len(conversations) / min(FILE_CONVERSATIONS, len(conversations)))


def padded_batch(conversations, indices, tokenizer, T):
    """Conversations as (x, y), one per row, at most T tokens each; see data.pad_batch."""
    return pad_batch([render(conversations, i % len(conversations), tokenizer) for i in indices], T)


def remove_files(folder):
    """Remove the token files of a finished stage; what is in them can be made again."""
    if RANK == 0:
        shutil.rmtree(folder, ignore_errors=True)
