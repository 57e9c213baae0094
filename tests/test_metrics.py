"""Evaluations of answers: what is asked, what counts, what does not fit."""
import math

import pytest
import torch

from data import TokenStream, write_token_file
from engine import Engine
from evals.metrics import choose, constant_share, crop, evaluate_bpb, evaluate_loss, evaluate_task, ticket_of
from model import GPT, GPTConfig
from tasks import is_right, spelling_bee
from tokenizer import Tokenizer

TOKENIZER = Tokenizer([bytes([i]) for i in range(256)])
CPU = torch.device("cpu")


def model(sequence_len=64):
    torch.manual_seed(0)
    return GPT(GPTConfig(sequence_len=sequence_len, vocab_size=TOKENIZER.vocab_size, n_layer=1, n_head=2, n_kv_head=2, n_embd=32))


def question(text, letters=None, answer="A"):
    row = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}], "answer": answer}
    return row | (dict(grading="letter", letters=letters) if letters else dict(grading="exact"))


def test_the_letter_with_the_highest_logit_is_the_answer():
    net = model()
    with torch.no_grad():                                # the output no longer depends on the input ...
        net.transformer.wte.weight.fill_(1.0)
        net.lm_head.weight.zero_()
        net.lm_head.weight[ord("C")] = 1.0               # ... and C is the likeliest letter
    task = [question(f"Which? {n}", list("ABCD"), right) for n, right in enumerate("CABCC")]
    assert evaluate_task(Engine(net, TOKENIZER), task, is_right, batch_size=2) == (3, 5)
    assert evaluate_task(Engine(net, TOKENIZER), task, is_right, max_problems=2) == (1, 2)


def test_a_model_that_sees_no_difference_scores_what_guessing_does():
    net = model()                                        # the head of a new model is zero: all letters are equal
    task = [question(f"Which? {n}", list("ABCD"), "A") for n in range(400)]
    right, _ = evaluate_task(Engine(net, TOKENIZER), task, is_right, batch_size=100)
    assert 70 < right < 130, "not all of them to the first letter, whose turn it happens to be"
    assert right == sum(choose([0.0] * 4, ticket_of([f"Which? {n}"])) == 0 for n in range(400))


def test_what_one_answer_to_all_would_get():
    assert constant_share([question("", list("ABCD"), right) for right in "CABCC"]) == 0.6
    assert constant_share([{"grading": "program"}] * 3) == 0
    bee = spelling_bee(256, "test")
    assert 0.5 < constant_share(bee) < 0.8, "two thirds of the letters asked for are in the word once"
    assert constant_share(bee) == sum(is_right(row, "#### 1") for row in bee) / 256
    assert not any(is_right(row, "1") for row in bee)


def test_a_question_longer_than_the_context_is_cropped_from_the_left():
    engine = Engine(model(), TOKENIZER)
    long = "x" * 500
    assert evaluate_task(engine, [question(long), question("short")], is_right, max_tokens=512)[1] == 2
    assert evaluate_task(engine, [question(long, list("AB")), question("short", list("AB"))], is_right)[1] == 2
    assert crop([9, 1, 2, 3, 4], 3) == [9, 3, 4] and crop([9, 1], 3) == [9, 1]


def test_a_model_that_knows_nothing_needs_the_log_of_the_vocabulary(tmp_path):
    path = str(tmp_path / "x.bin")
    ids = [TOKENIZER.bos, *b"some words here"] * 20
    write_token_file(path, iter([(ids, [1] * len(ids))]))
    stream = TokenStream([path])
    token_bytes = torch.from_numpy(TOKENIZER.token_bytes()).long()
    for B in (1, 3):                                     # the batch does not change the sum
        bpb = evaluate_bpb(model(), stream, token_bytes, 6, B, 32, CPU)
        assert bpb == pytest.approx(math.log2(TOKENIZER.vocab_size), rel=1e-5)
    seen, net = [], model()
    net.score = lambda x, y: seen.append(len(x)) or GPT.score(net, x, y)
    evaluate_bpb(net, stream, token_bytes, 0, 4, 32, CPU)
    assert sum(seen) == (stream.num_tokens - 1) // 32, "0 = all there is"
    x, y = stream.batch_at(0, 2, 32)
    assert evaluate_loss(model(), [(x, y)], CPU) == pytest.approx(math.log(TOKENIZER.vocab_size), rel=1e-5)


def test_a_choice_that_is_not_one_token_ends_in_words():
    with pytest.raises(SystemExit, match="'AB' is 2 tokens"):
        evaluate_task(Engine(model(), TOKENIZER), [question("Which?", ["AB", "C"], "C")], is_right)
