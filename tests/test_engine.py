"""Generation: the cache changes nothing, samples are independent, the tool is forced in."""
import random
from types import SimpleNamespace

import pytest
import torch

import engine as engine_module
from chat import TextStream, printable, text_of
from engine import STRIDE_CPU, Batch, Engine, GraphedStep, KVCache, Reply, draw, in_compute_dtype
from model import GPT, GPTConfig, compiled
from tokenizer import SPECIAL_TOKENS, Tokenizer

TOKENIZER = Tokenizer([bytes([i]) for i in range(256)])    # a token per byte
SPECIAL = {name.strip("<|>"): TOKENIZER.special(name) for name in SPECIAL_TOKENS}
CONTEXT = 64


def tiny_model(n_kv_head=2, seed=0, context=CONTEXT, dtype=torch.float32):
    """A random model that is not shy: its zero layers are filled, so that every token matters."""
    torch.manual_seed(seed)
    config = GPTConfig(sequence_len=context, vocab_size=TOKENIZER.vocab_size, n_layer=2, n_head=4,
                       n_kv_head=n_kv_head, n_embd=32)
    model = GPT(config, dtype)
    for name, p in model.named_parameters():
        if name == "lm_head.weight" or "c_proj" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model


class Scripted:
    """A stand-in for a model: wants a token by what was last fed, and keeps a record of that."""

    def __init__(self, follow, sequence_len=CONTEXT):
        self.config = SimpleNamespace(sequence_len=sequence_len, vocab_size=TOKENIZER.vocab_size,
                                      n_layer=1, n_head=1, n_kv_head=1, n_embd=2)
        self.device, self.compute_dtype = torch.device("cpu"), torch.float32
        self.follow, self.seen = follow, []

    def __call__(self, idx, kv_cache, positions=None):
        kv_cache.advance(idx.size(1))
        self.seen += idx.tolist() if len(idx) == 1 else []
        logits = torch.zeros(*idx.shape, self.config.vocab_size)
        ends = torch.full((len(idx),), idx.size(1) - 1) if positions is None else positions
        for row, end in enumerate(ends.tolist()):
            logits[row, end, self.follow(int(idx[row, end]))] = 30.0
        return logits if positions is None else logits[torch.arange(len(idx)), positions]


def speaks(ids):
    """A model that says ids after the token 'Q' and goes on, after a forced token, where it was."""
    left = list(ids)
    return Scripted(lambda fed: left.pop(0) if left else SPECIAL["assistant_end"])


def ids_of(text):
    return TOKENIZER.encode(text)


def run(engine, prompt, num_samples=1, **options):
    """generate -> (tokens of every sample, which of them were drawn)"""
    steps = list(engine.generate([prompt] * num_samples, **options))
    tokens = [[t for t in column if t is not None] for column in zip(*(s[0] for s in steps))]
    return tokens, [list(column) for column in zip(*(s[1] for s in steps))]


def greedy_without_cache(model, prompt, max_tokens):
    """The plain way: the whole text through the model for every token."""
    ids = list(prompt)
    for _ in range(min(max_tokens, CONTEXT - len(prompt))):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] in (SPECIAL["assistant_end"], SPECIAL["bos"]):
            break
    return ids[len(prompt):]


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_cached_logits_equal_the_full_forward(n_kv_head):
    model = tiny_model(n_kv_head)
    idx = torch.randint(0, 256, (3, 40))
    with torch.no_grad():
        full = model(idx)
        for pieces in ([40], [1] * 40, [17, 1, 1, 9, 12]):         # at once, one by one, mixed
            cache = KVCache(model, 3, 40)
            parts = [model(x, kv_cache=cache) for x in idx.split(pieces, dim=1)]
            assert cache.lengths == [40] * 3
            torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=1e-4, rtol=0)


def test_cached_tokens_equal_the_full_forward():
    for seed in range(3):
        model = tiny_model(seed=seed)
        prompt = [SPECIAL["bos"], *ids_of("hello")]
        tokens, drawn = run(Engine(model, TOKENIZER), prompt, max_tokens=30, temperature=0.0)
        assert tokens[0] == greedy_without_cache(model, prompt, 30)
        assert all(drawn[0])
        # several samples of one prompt share its computation and still see all of it
        options = dict(num_samples=3, max_tokens=30, temperature=0.0)
        assert run(Engine(model, TOKENIZER), prompt, **options)[0] == tokens * 3


def played(function, pool):
    """engine.captured without a GPU: what is captured is done anew, into the same memory."""
    result = function()
    return lambda: result.copy_(function()), result


@pytest.mark.parametrize("slots, num_replies, graphed", [(1, 2, False), (8, 14, False), (1, 2, True), (7, 14, True)])
def test_200_cached_tokens_equal_the_full_forward(monkeypatch, slots, num_replies, graphed):
    """Prompts of all lengths that come at any moment; now and then a reply is taken out."""
    monkeypatch.setattr(engine_module, "READ_ALIKE", 64)
    monkeypatch.setattr(engine_module, "captured", played)
    random.seed(slots)
    model = tiny_model(context=320)
    endless = SimpleNamespace(special=lambda name: -1)         # no token ends a reply
    batch, written = Batch(model, slots, 320, piece=50), {}
    batch.graphed_step = GraphedStep(batch.model, batch.cache) if graphed else None
    while len(written) < num_replies or any(reply.left for reply in written):
        if len(written) < num_replies and random.random() < 0.1:
            prompt = [random.randrange(256) for _ in range(random.choice((1, 2, 30, 64, 65, 110, 120)))]
            written[reply := Reply(endless, prompt, 200, temperature=0.0)] = []
            batch.add(reply)
        for reply, token, _ in batch.step():
            written[reply].append(token)
        if written and random.random() < 0.005:
            batch.remove(random.choice(list(written)))
    assert sum(len(tokens) == 200 for tokens in written.values()) >= num_replies // 2
    for reply, tokens in written.items():
        with torch.no_grad():                                  # with the tokens before it, each is the likeliest
            logits = model(torch.tensor([reply.prompt + tokens]))[0, len(reply.prompt) - 1:-1]
        chosen = logits.gather(1, torch.tensor(tokens, dtype=torch.int64)[:, None])[:, 0]
        assert (chosen >= logits.amax(dim=1) - 1e-4).all()     # or as likely, up to rounding
    if graphed:
        shapes = set(batch.graphed_step.graphs)
        assert len(shapes) > 3 and shapes <= {(rows, end) for rows in (1, 2, 4, 7) for end in (64, 128, 192, 256, 320)}


def test_where_no_graph_can_be_captured_generation_goes_on(monkeypatch, capsys):
    def refused(function, pool):
        raise RuntimeError("CUDA error: operation not permitted\nmore of it")

    monkeypatch.setattr(engine_module, "captured", refused)
    monkeypatch.setattr(GraphedStep, "possible", True)
    model, tokens = tiny_model(), {}
    for graphed in (False, True):
        batch = Batch(model, 2, CONTEXT)
        batch.graphed_step = GraphedStep(batch.model, batch.cache) if graphed else None
        replies = [Reply(TOKENIZER, [i, 7], 40, seed=i) for i in range(4)]
        for reply in replies:
            batch.add(reply)
        tokens[graphed] = []
        while any(reply.left for reply in replies):
            tokens[graphed] += [token for _, token, _ in batch.step()]
    assert tokens[True] == tokens[False] and len(tokens[True]) > 100
    assert capsys.readouterr().err == "(no CUDA graph: CUDA error: operation not permitted; generation goes on without, slower)\n"


def test_cache_refuses_more_than_it_holds():
    model = tiny_model()
    with pytest.raises(AssertionError, match="holds 4 tokens"), torch.no_grad():
        model(torch.zeros(1, 5, dtype=torch.long), kv_cache=KVCache(model, 1, 4))


def test_samples_are_drawn_separately_from_the_first_token_on():
    tokens, _ = run(Engine(tiny_model(), TOKENIZER), [SPECIAL["bos"]], num_samples=16, max_tokens=8)
    assert len(tokens) == 16
    assert len({sample[0] for sample in tokens}) > 8               # not one token for all
    assert len({tuple(sample) for sample in tokens}) == 16


def test_first_tokens_follow_the_model():
    """2,000 first tokens have the frequencies that the model gives them."""
    model = tiny_model()
    tokens, _ = run(Engine(model, TOKENIZER), ids_of("a"), num_samples=2000, max_tokens=1)
    counts = torch.bincount(torch.tensor(tokens).flatten(), minlength=TOKENIZER.vocab_size)
    with torch.no_grad():
        probs = torch.softmax(model(torch.tensor([ids_of("a")]))[0, -1], dim=-1)
    standard_error = (probs * (1 - probs) / 2000).sqrt()
    assert ((counts / 2000 - probs).abs() <= 5 * standard_error + 1e-3).all()


def test_same_seed_same_output():
    engine = Engine(tiny_model(), TOKENIZER)
    options = dict(num_samples=3, max_tokens=12, temperature=0.9, top_k=40)
    first = run(engine, ids_of("abc"), seed=7, **options)
    torch.rand(5)                                              # torch's own state does not matter
    assert run(engine, ids_of("abc"), seed=7, **options) == first
    assert run(engine, ids_of("abc"), seed=8, **options) != first


def wishes(n, seed=1, **options):
    """n replies that only want to draw."""
    replies = [Reply(TOKENIZER, [0], seed=seed + i, **options) for i in range(n)]
    for reply in replies:
        reply.generator = torch.Generator().manual_seed(reply.seed)
    return replies


def test_temperature_top_k_and_top_p_at_their_edges():
    logits = torch.randn(64, 50)
    best = logits.argmax(dim=-1).tolist()

    def drawn(**options):
        return draw(logits, wishes(64, **options))

    assert drawn(temperature=0.0) == drawn(temperature=0.0, top_k=5) == drawn(top_k=1) == best
    assert drawn(temperature=1e-300) == drawn(top_p=1e-9) == best              # no overflow, no nan, always one left
    free = drawn()
    assert free != best and free == drawn(top_k=50) == drawn(top_k=10**9)      # all of them = off
    third = logits.topk(3).values[:, -1]
    assert (logits.gather(1, torch.tensor(drawn(temperature=5.0, top_k=3))[:, None])[:, 0] >= third).all()
    # ties at the border: still only two of the four can come
    assert len(set(draw(torch.zeros(1000, 4), wishes(1000, top_k=2)))) == 2
    half = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log().expand(1000, -1)
    assert set(draw(half, wishes(1000, top_p=0.6))) == {0, 1} and set(draw(half, wishes(1000, top_p=0.95))) == {0, 1, 2, 3}
    for wrong in (dict(temperature=-0.1), dict(temperature=float("nan")), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.1)):
        with pytest.raises(AssertionError, match="temperature"):
            wishes(1, **wrong)


def test_a_row_is_drawn_as_if_it_were_alone():
    logits, many = torch.randn(5, 50), [dict(), dict(top_k=3), dict(temperature=0.0), dict(top_p=0.5), dict(temperature=2.0)]
    together = [reply for options in many for reply in wishes(1, **options)]
    alone = [draw(logits[i:i + 1], wishes(1, **options))[0] for i, options in enumerate(many)]
    before = logits.clone()
    assert draw(logits, together) == alone and torch.equal(logits, before)


def test_replies_that_join_and_leave_at_any_moment_are_the_same(seed=5):
    """Greedy and drawn ones, prompts of all lengths, three rows, pieces of four tokens, some taken out in between."""
    random.seed(seed)
    model = tiny_model()
    engine = Engine(model, TOKENIZER)

    def reply(i):
        rng = random.Random(i)
        prompt = [rng.randrange(256) for _ in range(rng.randint(1, 40))]
        return Reply(TOKENIZER, prompt, rng.randint(1, 30), temperature=rng.choice((0.0, 1.0)), top_k=rng.choice((0, 9)),
                     top_p=rng.choice((1.0, 0.8)), seed=i)

    def alone(i):
        batch = Batch(model, 1, CONTEXT)
        batch.add(one := reply(i))
        tokens = []
        while one.left:
            tokens += [token for _, token, _ in batch.step()]
        return tokens

    batch, replies, written = Batch(model, 3, CONTEXT, piece=4), [], {}
    while len(replies) < 25 or any(one.left for one in replies):
        if len(replies) < 25 and random.random() < 0.4:
            replies.append(reply(len(replies)))
            written[replies[-1]] = []
            batch.add(replies[-1])
        if replies and random.random() < 0.03:
            batch.remove(random.choice(replies))
        for one, token, _ in batch.step():
            written[one].append(token)
    whole = 0
    for i, one in enumerate(replies):
        expected = alone(i)
        assert written[one] == expected[:len(written[one])]
        whole += written[one] == expected
    assert whole > 15 and not batch.rows and not batch.reading and not batch.waiting
    prompt = reply(3).prompt
    assert run(engine, prompt, max_tokens=20, temperature=0.0)[0][0] == greedy_without_cache(model, prompt, 20)


def test_little_is_read_that_only_fills_up_and_who_is_through_writes():
    class Counting(Scripted):
        def __call__(self, idx, kv_cache, positions=None):
            self.read += idx.numel() if positions is not None else 0
            return super().__call__(idx, kv_cache, positions)

    lengths = [900, 30, 31, 500, 30, 300]
    for piece in (0, 100):
        model = Counting(lambda fed: ord("x"), sequence_len=1024)
        batch, model.read = Batch(model, 8, 1024, piece), 0
        replies = [Reply(TOKENIZER, [i] * length, 99) for i, length in enumerate(lengths)]
        for reply in replies:
            batch.add(reply)
        first = {}
        for step in range(12):
            for reply, _, _ in batch.step():
                first.setdefault(reply, step)
        assert sum(lengths) <= model.read < sum(lengths) + len(lengths) * STRIDE_CPU
        assert [first[reply] for reply in replies] == ([0] * 6 if not piece else [8, 0, 0, 4, 0, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_cast_once_give_the_same_logits(dtype):
    model = compiled(tiny_model(dtype=dtype))
    ready, idx = in_compute_dtype(model), torch.randint(256, (2, 20))
    assert {p.dtype for p in ready.parameters()} == {dtype} and {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(ready(idx), model(idx))
    assert (ready is model) == (dtype == torch.float32)
    assert in_compute_dtype(ready) is ready and Batch(Engine(model, TOKENIZER).model, 1, 8).model.lm_head.weight.dtype == dtype


def test_memory_that_runs_out_takes_fewer_rows(monkeypatch):
    rows = []
    create = KVCache.__init__

    def limited(self, model, B, max_len):
        rows.append(B)
        if B > 2:
            raise torch.OutOfMemoryError("full")
        create(self, model, B, max_len)

    engine, prompts = Engine(tiny_model(), TOKENIZER), [ids_of(text) for text in ("one", "two", "three", "x", "yy")]
    expected = engine.generate_batch(prompts, max_tokens=5)
    monkeypatch.setattr(KVCache, "__init__", limited)
    assert engine.generate_batch(prompts, max_tokens=5) == expected and rows[:2] == [5, 2]
    monkeypatch.setattr(KVCache, "__init__", lambda *args: limited(args[0], args[1], 3, args[3]))
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate_batch(prompts[:1])


def test_generation_ends_where_the_context_does():
    engine = Engine(Scripted(lambda fed: ord("x"), sequence_len=10), TOKENIZER)
    assert [len(run(engine, [65] * n, max_tokens=99)[0][0]) for n in (1, 5, 9)] == [9, 5, 1]
    assert len(run(engine, [65] * 5, max_tokens=3)[0][0]) == 3
    assert list(engine.generate([[65]], max_tokens=0)) == []
    for prompt in ([65] * 10, [65] * 11, []):
        with pytest.raises(ValueError, match="the model takes 1 to 9"):
            list(engine.generate([prompt]))
    # the real model asserts that nothing goes past its context
    engine = Engine(tiny_model(), TOKENIZER)
    tokens, _ = run(engine, [65] * (CONTEXT - 4), max_tokens=99, num_samples=2)
    assert max(map(len, tokens)) <= 4


@pytest.mark.parametrize("end", ["assistant_end", "bos"])
def test_a_sample_ends_and_the_others_go_on(end):
    script = {ord("Q"): ord("a"), ord("a"): ord("b"), ord("b"): SPECIAL[end]}
    engine = Engine(Scripted(lambda fed: script.get(fed, 0)), TOKENIZER)
    assert run(engine, ids_of("Q"))[0] == [[ord("a"), ord("b"), SPECIAL[end]]]
    # one row is two steps ahead: it ends first and is given out as None from then on
    a, b, stop = ord("a"), ord("b"), SPECIAL[end]
    steps = list(engine.generate([ids_of("Q"), ids_of("b")], 9, 0.0))
    assert [tokens for tokens, _ in steps] == [[a, stop], [b, None], [stop, None]]
    assert engine.generate_batch([ids_of("Q"), ids_of("b")]) == [ids_of("ab"), []]


def test_calculator_result_is_forced():
    call = [SPECIAL["python_start"], *ids_of("12*7"), SPECIAL["python_end"]]
    output = [SPECIAL["output_start"], *ids_of("84"), SPECIAL["output_end"]]
    # what the model wants during the four forced tokens ("????") is drawn and thrown away
    engine = Engine(speaks([*ids_of("so "), *call, *ids_of("????"), *ids_of("!")]), TOKENIZER)
    tokens, drawn = run(engine, ids_of("Q"))
    assert tokens == [[*ids_of("so "), *call, *output, *ids_of("!"), SPECIAL["assistant_end"]]]
    assert drawn == [[True] * 9 + [False] * 4 + [True] * 2]
    # the model was fed what stands in the text, the result included
    assert [i for fed in engine.model.seen for i in fed] == ids_of("Q") + tokens[0][:-1]
    assert text_of(TOKENIZER, tokens[0]) == "so [12*7 = 84]!"


@pytest.mark.parametrize("expression", ["__import__('os')", "1/0", "", "1+", "\xff\x00"])
def test_nothing_is_forced_when_the_calculator_declines(expression):
    said = [SPECIAL["python_start"], *ids_of(expression), SPECIAL["python_end"], *ids_of("ok")]
    tokens, drawn = run(Engine(speaks(said), TOKENIZER), ids_of("Q"))
    assert tokens == [[*said, SPECIAL["assistant_end"]]]
    assert all(drawn[0])


def test_tool_state_machine_at_its_edges():
    start, end = SPECIAL["python_start"], SPECIAL["python_end"]

    def forced(said, **options):
        tokens, drawn = run(Engine(speaks(said), TOKENIZER), ids_of("Q"), **options)
        return TOKENIZER.decode([t for t, d in zip(tokens[0], drawn[0]) if not d])

    assert forced([end, *ids_of("1+1"), end]) == ""                # never opened
    assert forced([start, *ids_of("1+1")]) == ""                   # never closed
    two, three = (f"<|output_start|>{n}<|output_end|>" for n in (2, 3))
    assert forced([start, *ids_of("9"), start, *ids_of("1+1"), end]) == two     # opened twice
    assert forced([start, *ids_of("'strawberry'.count('r')"), end]) == three
    assert forced([start, *ids_of("1+1"), end, *b"???", end]) == two             # closed twice
    # a result that is cut by max_tokens counts like every other token
    assert forced([start, *ids_of("1+1"), end], max_tokens=6) == "<|output_start|>"


def test_two_samples_use_the_calculator_at_different_times():
    start, end, stop = SPECIAL["python_start"], SPECIAL["python_end"], SPECIAL["assistant_end"]
    script = {ord("a"): ord("b"), ord("b"): start, start: ord("5"), ord("5"): end, end: ord("?"),
              SPECIAL["output_start"]: ord("?"), SPECIAL["output_end"]: stop}
    engine = Engine(Scripted(lambda fed: script.get(fed, 0)), TOKENIZER)
    replies = engine.generate_batch([ids_of("a"), ids_of("b")])
    call = [start, ord("5"), end, SPECIAL["output_start"], ord("5"), SPECIAL["output_end"]]
    assert replies == [[ord("b"), *call], call]
    # max_tokens counts from the end of a row's own prompt, and counts forced tokens
    replies = engine.generate_batch([ids_of("b"), ids_of("xxxxb")], max_tokens=5)
    assert replies == [call[:5], call[:5]]


def test_batch_equals_one_at_a_time():
    model = tiny_model()
    engine = Engine(model, TOKENIZER)
    texts = ("one", "a longer one", "x", "one", "y" * 40, "z" * 60, "two", "!")
    prompts = [ids_of(text) for text in texts]
    alone = [[t for t in greedy_without_cache(model, prompt, 9) if t not in engine.ends]
             for prompt in prompts]
    for batch_size in (1, 3, 100):
        assert engine.generate_batch(prompts, max_tokens=9, batch_size=batch_size) == alone
    assert engine.generate_batch([]) == []
    sampled = [engine.generate_batch(prompts, max_tokens=9, temperature=1.0, seed=seed)
               for seed in (3, 3, 4)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_model_and_tokenizer_must_belong_together():
    model = Scripted(lambda fed: 0)
    model.config.vocab_size = 300
    with pytest.raises(AssertionError, match="300 tokens"):
        Engine(model, TOKENIZER)


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語", "👩‍👩‍👧 🇩🇪 🙂", "a\nb\tc", ""])
def test_stream_never_yields_half_a_character(text):
    stream = TextStream(TOKENIZER)                             # byte by byte, the hardest case
    parts = [stream.feed(token) for token in TOKENIZER.encode(text)]
    assert "\ufffd" not in "".join(parts)
    assert "".join(parts) + stream.flush() == text
    assert all(len(part) <= 1 for part in parts)


@pytest.mark.parametrize("data", [b"\xff", b"a\x80b", b"\xe2\x82", b"\xe2\x82z", b"\xed\xa0\x80",
                                  b"\xf0\x9f\x99\xf0\x9f\x99\x82"])
def test_stream_replaces_bytes_that_are_no_text(data):
    assert text_of(TOKENIZER, list(data)) == data.decode("utf-8", errors="replace")


def test_stream_shows_no_special_token():
    emoji = list("🙂".encode())
    for name in SPECIAL_TOKENS:
        assert "<|" not in text_of(TOKENIZER, [*ids_of("a"), TOKENIZER.special(name), *ids_of("b")])
    # a character that a special token cuts in two stays broken, the rest does not suffer
    assert text_of(TOKENIZER, [*emoji[:2], SPECIAL["assistant_end"]]) == "\ufffd"
    assert text_of(TOKENIZER, [*emoji[:2], SPECIAL["user_end"], *emoji]) == "\ufffd🙂"
    assert text_of(TOKENIZER, [*emoji[:2], SPECIAL["user_end"], *emoji[2:]]) == "\ufffd" * 3


@pytest.mark.parametrize("tokens, shown", [
    (["python_start", "1+1", "python_end", "output_start", "2", "output_end", "."], "[1+1 = 2]."),
    (["python_start", "1/0", "python_end", " hm"], "[1/0] hm"),
    (["python_start", "1/0", "python_end", "assistant_end"], "[1/0]"),
    (["python_start", "1+"], "[1+]"),
    (["python_start", "1", "python_start", "2", "python_end"], "[1][2]"),
    (["python_end", "a", "output_start", "b", "output_end"], "ab"),
])
def test_stream_shows_tool_calls_readably(tokens, shown):
    ids = [i for t in tokens for i in ([SPECIAL[t]] if t in SPECIAL else ids_of(t))]
    assert text_of(TOKENIZER, ids) == shown


def test_printable_keeps_text_and_drops_control_characters():
    assert printable("a\tb\nc é 日 🙂") == "a\tb\nc é 日 🙂"
    assert printable("\x1b[31mred\x1b]0;title\x07\r\x00\x7f\x9b2J\b") == "[31mred]0;title2J"
