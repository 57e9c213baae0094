"""Between messages and tokens: whole turns are left out, parts come back as they went in, stop strings stop."""
import pytest
import torch

from chat import StopStrings, TextStream, prompt_of, reply_parts
from engine import Batch, Reply
from test_engine import TOKENIZER, ids_of, tiny_model


def chat(*texts):
    roles = ["user", "assistant"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts)]


def test_a_short_chat_is_given_whole():
    messages = [{"role": "system", "content": "Be brief."}, *chat("a", "b", "c")]
    ids, dropped = prompt_of(TOKENIZER, messages, 100, 10)
    assert TOKENIZER.decode(ids) == ("<|bos|><|user_start|>Be brief.\n\na<|user_end|><|assistant_start|>b<|assistant_end|>"
                                     "<|user_start|>c<|user_end|><|assistant_start|>") and dropped == 0


@pytest.mark.parametrize("context", range(30, 130))
def test_as_many_of_the_newest_turns_as_leave_room(context):
    """Law: what is left fits, one turn more would not; the system message stays."""
    system, turns = {"role": "system", "content": "Sy"}, chat(*(c * (3 + i % 4) for i, c in enumerate("abcdefghi")))
    ids, dropped = prompt_of(TOKENIZER, [system, *turns], context, 12)

    def whole(k):
        return TOKENIZER.render_for_completion({"messages": [system, *turns[2 * k:]]})

    room = context - min(12, context // 4)
    assert ids == whole(dropped) and (len(ids) <= room or dropped == 4)
    assert dropped == 0 or len(whole(dropped - 1)) > room


def test_a_question_that_does_not_fit_is_refused_and_one_that_just_does_is_not():
    def length(n):
        return len(prompt_of(TOKENIZER, chat("x" * n), 50, 10)[0])

    assert length(45) == 49                                     # one token is left for the answer
    for n in (46, 47, 1000):
        with pytest.raises(ValueError, match=rf"that is {n + 4} tokens long .* holds 50"):
            length(n)


@pytest.mark.parametrize("messages", [[], chat("a", "b"), [{"role": "system", "content": "a"}], chat("a")[:0] + [{}],
                                      [*chat("a"), *chat("b")]])
def test_messages_that_are_not_in_order(messages):
    with pytest.raises(ValueError, match="conversation: "):
        prompt_of(TOKENIZER, messages, 100, 10)


def test_a_reply_with_a_call_is_parts_that_render_to_the_same_tokens():
    parts = [{"type": "text", "text": "so "}, {"type": "python", "text": "6*7"}, {"type": "python_output", "text": "42"},
             {"type": "text", "text": " é."}]
    ids, _ = TOKENIZER.render_conversation({"messages": [*chat("q"), {"role": "assistant", "content": parts}]})
    reply = ids[ids.index(TOKENIZER.special("<|assistant_start|>")) + 1:-1]
    assert reply_parts(TOKENIZER, reply) == parts
    assert reply_parts(TOKENIZER, ids_of("plain")) == "plain" and reply_parts(TOKENIZER, []) == ""


def test_kinds_without_brackets():
    stream = TextStream(TOKENIZER, brackets=False)
    special = TOKENIZER.special
    tokens = [*b"a", special("<|python_start|>"), *b"1+1", special("<|python_end|>"), special("<|output_start|>"), *b"2",
              special("<|output_end|>"), *b"b"]
    pieces = [(stream.feed(token), stream.kind) for token in tokens]
    assert [(text, kind) for text, kind in pieces if text] == [
        ("a", "text"), ("1", "python"), ("+", "python"), ("1", "python"), ("2", "python_output"), ("b", "text")]


@pytest.mark.parametrize("text, stops, shown", [
    ("one two three", ["two"], "one "), ("one two", ["three"], "one two"), ("aab", ["ab", "aab"], ""), ("abc", [], "abc"),
    ("a\n\nUser: b", ["\n\nUser:", "\n\n\n"], "a"), ("xxy", ["xy"], "x"), ("ab", ["abc"], "ab"), ("ab", [""], "ab")])
def test_stop_strings(text, stops, shown):
    """However the text is cut into pieces, the same is shown, and nothing of a stop string."""
    for size in range(1, len(text) + 1):
        stop, out = StopStrings(stops), ""
        for i in range(0, len(text), size):
            out += stop.feed(text[i:i + size])
            assert text.startswith(out)
        assert out + stop.flush() == shown and stop.found == (shown != text)


def test_what_is_noted_of_a_token_is_what_the_model_gave_it():
    model = tiny_model()
    prompt = [TOKENIZER.bos, *ids_of("abc")]
    reply, other = (Reply(TOKENIZER, prompt, 6, temperature=2.0, seed=3, likeliest=n) for n in (5, 0))
    batch = Batch(model, 2, 40)
    batch.add(other)
    batch.add(reply)
    text = list(prompt)
    while reply.left:
        settled = {who: token for who, token, _ in batch.step()}
        logprob, best = reply.noted
        expected = torch.log_softmax(model(torch.tensor([text]))[0, -1].float(), dim=-1)
        assert logprob == pytest.approx(expected[settled[reply]].item(), abs=1e-4)
        assert [token for token, _ in best] == expected.topk(5).indices.tolist()
        text.append(settled[reply])
    assert other.noted is None
