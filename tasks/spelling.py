"""
Rows that teach letters: spelling a word, and counting a letter in it with the calculator.

in    a row number and a split; the words come from task_data/words/ or the embedded corpus
out   simple_spelling, spelling_bee: tasks whose row i is a function of i, so nothing is stored

A model sees tokens, not letters: it cannot know that "straw" begins with an s unless it is told.
"""
import functools
import os
import random

from plumbing.common import base_path
from tasks import pydocs
from tasks.task import in_test, made, shuffled


def word_list():
    """(name, path) of the downloaded list of words, 370,105 of them; path "": the embedded corpus has to give them."""
    path = base_path("task_data", "words", "words_alpha.txt")
    return ("words_alpha", path) if os.path.exists(path) else ("embedded", "")


@functools.lru_cache(None)
def words(split):
    """The words of a split in a fixed random order, lowercase ASCII letters."""
    _, path = word_list()
    if path:
        if problem := problem_with_words(path):
            raise SystemExit(f"{path}: {problem}; delete it and run: python prepare.py --tasks=1")
        with open(path, encoding="ascii") as f:
            found = f.read().split()                 # its lines end with CR LF
    else:
        found = pydocs.words()
    found = sorted(word for word in set(found) if in_test(word) == (split == "test"))
    return [found[i] for i in shuffled(len(found))]


def problem_with_words(path):
    """What is wrong with a word list, "" for nothing."""
    with open(path, "rb") as f:
        lines = f.read().splitlines()
    good = len(lines) >= 1000 and all(line.isalpha() and line.islower() for line in lines)
    return "" if good else "it is not a list of one lowercase word per line"


def simple_spelling(size, split, pseudo=0.0, pieces=()):
    """
    Spell the word 'apple' -> a-p-p-l-e.

    size: 0 = each word of the split once
    pseudo: share of invented words in training, two or three of pieces (lowercase strings such as
        tokenizer.letter_tokens()) in a row, never a word of the test, which has real words only. Where
        there are few words, they teach how each token is spelled wherever it stands.
    """
    assert not pseudo or pieces, "invented words need pieces"
    return made(f"spelling {word_list()[0]}", spelling_row, size or len(words(split)),
                split=split, pseudo=pseudo, pieces=tuple(pieces))


def spelling_bee(size, split, varied=True):
    """
    How many 'r' are in 'strawberry'? -> counted by hand, checked with Python, then "#### 3".

    size: 0 = as many as the split has words
    varied: many wordings and quotes; False = the plain one, for a model too small for more
    """
    return made(f"counting {word_list()[0]}", counting_row, size or len(words(split)), split=split, varied=varied)


def tests(embedded, who):
    """The tests by name; see tasks.all_tests."""
    spelling = {"spells a word": simple_spelling(200, "test")}
    if embedded:
        return spelling | {"counts a letter": spelling_bee(100, "test", varied=False)}
    return spelling | {"SpellingBee": spelling_bee(256, "test")}


def spelling_row(i, split, pseudo, pieces):
    """
    Conversation i of simple_spelling.

    One wording alone: a tiny model that saw one spelled 43 of 50 unseen words, one that saw eight
    in its short training spelled 2.
    """
    rng = random.Random(f"spelling {split} {i}")         # a str seed: the same on every machine
    word = words(split)[i % len(words(split))]
    if split == "train" and rng.random() < pseudo:
        word = ""
        while not word or len(word) > 12 or in_test(word):         # at most 12 letters, as in the corpus's words
            word = "".join(rng.choices(pieces, k=rng.choice((2, 2, 3))))
    answer = "-".join(word)
    return {"messages": [{"role": "user", "content": f"Spell the word '{word}'"},
                         {"role": "assistant", "content": answer}],
            "grading": "exact", "answer": answer, "word": word}


COUNT_QUESTIONS = [          # the first is the plain one
    "How many {letter} are in {word}?", "How many {letter} are there in {word}?",
    "How often does {letter} appear in {word}?", "How many times does {letter} occur in the word {word}?",
    "Count the letter {letter} in {word}.", "Count every {letter} in the word {word}",
    "In {word}, how many {letter} do you see?", "What is the number of {letter} in {word}?",
    "{word}: how many {letter}?", "Please count how often {letter} is in {word}.", "how many {letter} in {word}",
    "Tell me how many {letter} {word} has.", "If you spell {word}, how many {letter} do you write?",
]
QUOTES = ["'", "'", '"', "", "`"]
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def counting_row(i, split, varied):
    """Conversation i of spelling_bee."""
    rng = random.Random(f"counting {split} {i}")
    word = rng.choice(words(split))
    # one question in ten is about a letter that may well not be there
    letter = rng.choice(word) if rng.random() < 0.9 else rng.choice(ALPHABET)
    template = rng.choice(COUNT_QUESTIONS) if varied else COUNT_QUESTIONS[0]
    quote = rng.choice(QUOTES) if varied else "'"
    question = template.format(letter=f"{quote}{letter}{quote}", word=f"{quote}{word}{quote}")
    count = word.count(letter)
    # each letter with the count so far: the model only ever adds one
    lines = "".join(f"{c} {word[:k + 1].count(letter)}\n" for k, c in enumerate(word))
    times = "time" if count == 1 else "times"
    parts = [
        {"type": "text", "text": f"{'-'.join(word)}\n\n{lines}\nBy hand: {count}. With Python: "},
        {"type": "python", "text": f"'{word}'.count('{letter}')"},
        {"type": "python_output", "text": str(count)},
        {"type": "text", "text": f"\n\nThe letter '{letter}' is in '{word}' {count} {times}.\n#### {count}"},
    ]
    return {"messages": [{"role": "user", "content": question},
                         {"role": "assistant", "content": parts}],
            "grading": "number", "answer": str(count), "word": word}
