"""
Laws of CORE: what the prompts are, what is scored, and that batches decide as a plain loop does.

A bundle in miniature with invented items; the real one where NANOCHAT_TEST_HUB names a mirror.
"""
import ast
import bisect
import csv
import functools
import http.server
import json
import math
import os
import random
import re
import subprocess
import sys
import threading
import time
import zipfile

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT, run_script
from evals import core
from evals.core import LM, MC, SCHEMA, TASKS, CoreTask
from evals.metrics import TIE, choose, ticket_of
from model import GPT, GPTConfig
from plumbing import download as download_module
from tokenizer import Tokenizer

HUB = os.environ.get("NANOCHAT_TEST_HUB", "")
needs_hub = pytest.mark.skipif(not HUB, reason="NANOCHAT_TEST_HUB names no mirror of the hub")
TOKENIZER = Tokenizer([bytes([i]) for i in range(256)])          # the id of a byte is the byte
WORDS = "red old big sad lamp tree boat king road moon seven green window quiet river stone".split()


# a bundle in miniature


def words(rng, n):
    return " ".join(rng.choices(WORDS, k=n))


def invented_row(task, rng, i):
    """No two rows of a task are alike, and no choice is the beginning of another."""
    if task.kind == MC:
        choices = [f"{letter} {words(rng, rng.randint(0, 4))}." for letter in "ABCD"[:rng.choice([2, 4])]]
        return dict(query=f"Number {i}: {words(rng, 6)}?", choices=choices, gold=rng.randrange(len(choices)))
    if task.kind == SCHEMA:
        return dict(context_options=[f"Number {i}, {words(rng, 4)}, the {end}" for end in ("cat", "oak")],
                    continuation=f"is {words(rng, 3)}.", gold=rng.randrange(2))
    return dict(context=f" Number {i}: {words(rng, 6)}: ", continuation=words(rng, 2))


def write_bundle(folder, num_rows=14):
    """All tasks with num_rows invented rows each."""
    for task in TASKS:
        path = folder / "eval_data" / task.file
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = random.Random(task.file)
        path.write_text("".join(json.dumps(invented_row(task, rng, i)) + "\n" for i in range(num_rows)))
    (folder / core.GPT2["small"]).write_text("Task , Accuracy , Centered \ncopa , 0.6 , 0.200000 \nCORE , , 0.113891 \n")
    return folder


@pytest.fixture
def base(tmp_path, monkeypatch):
    """An empty base folder of this test's own."""
    monkeypatch.setattr(core, "base_path", lambda *parts: os.path.join(tmp_path, "base", *parts))
    return tmp_path / "base"


@pytest.fixture
def bundle(base):
    return write_bundle(base / "eval_bundle")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A mirror without the bundle, and what it was asked for; write_zip puts the bundle there."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)
    handler = functools.partial(Handler, directory=str(tmp_path / "mirror"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(download_module, "MIRROR", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setattr(download_module, "PAUSES", (0, 0))
        yield asked
        server.shutdown()


def write_zip(tmp_path, without="", cut=0):
    source = write_bundle(tmp_path / "source")
    path = tmp_path / "mirror" / core.BUNDLE_URL.split("://")[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(source.rglob("*.*")):
            if file.name != without:
                archive.write(file, f"eval_bundle/{file.relative_to(source)}")
        archive.writestr("eval_bundle/eval_data/programming/other.jsonl", "not of CORE")
    if cut:
        path.write_bytes(path.read_bytes()[:cut])


def one_line(error):
    text = str(error.value)
    assert text and "\n" not in text
    return text


# the bundle


def test_the_bundle_is_fetched_once_and_unpacked_whole(base, server, tmp_path):
    write_zip(tmp_path)
    folder = core.fetch_bundle()
    assert sorted(os.listdir(base)) == ["eval_bundle"]               # no zip, no lock, no .part, no .tmp
    held = {os.path.relpath(file, folder) for file in (base / "eval_bundle").rglob("*.*")}
    assert {f"eval_data/{task.file}" for task in TASKS} < held and not any("programming" in name for name in held)
    assert core.fetch_bundle() == folder and len(server) == 1
    assert core.gpt2_scores(folder) == dict(small=dict(copa=0.2, CORE=0.113891))


@pytest.mark.parametrize("damage, words", [(dict(cut=3000), "no whole zip file"), (dict(without="copa.jsonl"), "copa.jsonl")])
def test_a_damaged_zip_is_one_line_and_nothing_is_kept(base, server, tmp_path, damage, words):
    write_zip(tmp_path, **damage)
    with pytest.raises(SystemExit) as error:
        core.fetch_bundle()
    assert words in one_line(error) and not (base / "eval_bundle").exists()
    if "cut" in damage:
        write_zip(tmp_path)                                          # the server is right again, and so are we
        assert os.path.isdir(core.fetch_bundle()) and os.listdir(base) == ["eval_bundle"]


def test_a_zip_that_is_damaged_inside_is_one_line(base, server, tmp_path):
    write_zip(tmp_path)
    path = tmp_path / "mirror" / core.BUNDLE_URL.split("://")[1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(SystemExit) as error:
        core.fetch_bundle()
    assert "eval_bundle.zip: damaged" in one_line(error) and "eval_bundle.zip" in os.listdir(base)


def test_other_ranks_wait_for_the_bundle_without_a_time_limit(base, monkeypatch):
    monkeypatch.setattr(core, "RANK", 1)         # no process group: a collective would fail here
    threading.Timer(0.5, os.makedirs, [base / "eval_bundle"]).start()
    clock = time.monotonic()
    assert os.path.isdir(core.fetch_bundle()) and time.monotonic() - clock > 0.4


def test_a_bundle_that_is_not_there_is_one_line(base, server):
    with pytest.raises(SystemExit) as error:
        core.fetch_bundle()
    assert "404" in one_line(error) and not (base / "eval_bundle").exists()


@pytest.mark.parametrize("text, words", [
    (None, "missing"), ("", "0 rows"), ('{"query": "a", "gold": 0}\n', "line 1: no choices"), ('{"query": \n', "line 1"),
    ("[1]\n", "line 1"), ('{"query": "a", "choices": ["b"], "gold": 0}\n' * 10, "10 rows, piqa shows 10")])
def test_a_bad_task_file_is_one_line(bundle, text, words):
    task = next(task for task in TASKS if task.label == "piqa")
    path = bundle / "eval_data" / task.file
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as error:
        core.read_rows(str(bundle), task)
    assert words in one_line(error) and "piqa" in one_line(error)


# prompts


def test_multiple_choice_reads_like_this():
    task = CoreTask("x", "x", MC, 2, "\nAnswer: ", 25)
    shots = [dict(query="Q: 1+1?\n", choices=["3", "2"], gold=1), dict(query="Q: 2+2?", choices=["4", "5"], gold=0)]
    assert core.render(task, dict(query="Q: 3+3?", choices=["6", "7", "8"], gold=0), shots) == [
        f"Q: 1+1?\n\nAnswer: 2\n\nQ: 2+2?\nAnswer: 4\n\nQ: 3+3?\nAnswer: {n}" for n in (6, 7, 8)]


def test_schema_reads_like_this():
    task = CoreTask("x", "x", SCHEMA, 1, " ", 50)
    shots = [dict(context_options=["It is hot: the sun", "It is hot: the ice"], continuation="shines.", gold=0)]
    row = dict(context_options=["The cup fell on the table, the cup", "The cup fell on the table, the table"],
               continuation="broke.", gold=0)
    assert core.render(task, row, shots) == [
        f"It is hot: the sun shines.\n\nThe cup fell on the table, the {noun} broke." for noun in ("cup", "table")]


def test_language_modeling_reads_like_this():
    task = CoreTask("x", "x", LM, 1, "\nAnswer: ", 0)
    shots = [dict(context=" ANIMALS: It barks ", continuation="a dog")]
    assert core.render(task, dict(context="ANIMALS: It purrs\n", continuation="a cat"), shots) == [
        "ANIMALS: It barks\nAnswer: a dog\n\nANIMALS: It purrs\nAnswer:",
        "ANIMALS: It barks\nAnswer: a dog\n\nANIMALS: It purrs\nAnswer: a cat"]


def test_the_shots_are_drawn_per_item_and_never_hold_the_item():
    rows = [dict(number=n) for n in range(14)]
    drawn = [[row["number"] for row in core.draw_shots(rows, i, 10)] for i in range(14)]
    assert all(len(set(shots)) == 10 and i not in shots for i, shots in enumerate(drawn))
    assert drawn == [[row["number"] for row in core.draw_shots(rows, i, 10)] for i in range(14)]
    assert len({tuple(shots) for shots in drawn}) == 14
    # the original's rule, written as it states it
    others = [n for n in range(14) if n != 5]
    assert drawn[5] == random.Random(1234 + 5).sample(others, 10)


def item_of(kind, texts, context=200, gold=0):
    return core.make_item(CoreTask("x", "x", kind, 0, " ", 0), dict(gold=gold), texts, TOKENIZER, context)


def items_of(task, rows, count, context):
    """The first items of a task."""
    return [core.make_item(task, rows[i], core.render(task, rows[i], core.draw_shots(rows, i, task.shots)), TOKENIZER, context)
            for i in range(count)]


@pytest.mark.parametrize("kind, texts, scored", [
    (MC, ["Sky is blue", "Sky is red"], ["blue", "red"]),
    (MC, ["Sky is red", "Sky is rose"], ["ed", "ose"]),              # what the choices share tells nothing
    (MC, ["He ran", "He ran far"], ["n", "n far"]),                  # each has one scored token at least
    (SCHEMA, ["The cup is new", "The car is new"], [" is new", " is new"]),
    (SCHEMA, ["It was", "It was"], ["It was", "It was"]),            # but never <|bos|>
    (LM, ["I see a", "I see a cat"], [" cat"]),
    (LM, ["Yes or", "Yes\n"], ["\n"])])
def test_what_is_scored(kind, texts, scored):
    item = item_of(kind, texts)
    assert [TOKENIZER.decode(prompt[start:]) for prompt, start in zip(item.prompts, item.starts)] == scored
    assert all(prompt[0] == TOKENIZER.bos for prompt in item.prompts) and min(item.starts) >= 1
    assert 0 <= item.shared < min(item.starts) and len({tuple(prompt[:item.shared]) for prompt in item.prompts}) == 1


def test_long_prompts_lose_their_beginning_and_all_choices_the_same_of_it():
    item = item_of(MC, ["0123456789 yes", "0123456789 never"], context=9)
    assert [TOKENIZER.decode(prompt[1:]) for prompt in item.prompts] == ["789 yes", "789 never"]
    assert [prompt[0] for prompt in item.prompts] == [TOKENIZER.bos] * 2 and item.starts == [5, 5]
    assert item_of(MC, ["0123456789 yes", "0123456789 never"], context=5).starts == [1, 1]
    assert item_of(MC, ["0123456789 yes", "0123456789 never"], context=4) is None
    assert [len(prompt) for prompt in item_of(SCHEMA, ["a long long road ends", "the sea ends"], context=15).prompts] == [16, 7]
    assert item_of(LM, ["a", "a continuation"], context=12) is None


# choosing


def test_ties_go_to_all_choices_alike():
    picks = [choose([1.0] * 4, ticket_of([f"text {n}"])) for n in range(2000)]
    assert all(abs(picks.count(c) - 500) < 4 * math.sqrt(2000 * 0.25 * 0.75) for c in range(4))
    assert [choose([2.0, 1.0, 1.0 + TIE / 2, 1.0 + 2 * TIE], ticket) for ticket in range(4)] == [1, 2, 1, 2]
    assert choose([3.0, 2.0, 1.0], 12345) == 2
    with pytest.raises(AssertionError, match="no numbers"):
        choose([1.0, math.nan], 0)


def test_choosing_a_text_that_reads_like_the_right_one_is_right():
    task = TASKS[0]
    item = item_of(MC, ["It is so", "It is so", "It is no"], gold=0)
    for ticket in range(2):
        assert core.is_right(task, item._replace(ticket=ticket), [(1.0, False), (1.0, False), (2.0, True)])
    assert not core.is_right(task, item, [(1.0, False), (1.0, False), (0.5, False)])


# the whole


def trained_model(texts, context=192, vocab_size=2048, steps=40):
    """A model that has read the texts a little; its vocabulary is larger than its tokenizer's."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=context, vocab_size=vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=64))
    ids = torch.tensor(TOKENIZER.encode("\n".join(texts)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        at = torch.randint(0, len(ids) - context - 1, (4, 1)) + torch.arange(context + 1)
        x = ids[at]
        (model(x[:, :-1], x[:, 1:]) / x[:, 1:].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def random_model(vocab_size=2048, context=192):
    torch.manual_seed(1)
    model = GPT(GPTConfig(sequence_len=context, vocab_size=vocab_size, n_layer=2, n_head=2, n_kv_head=1, n_embd=64))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


@torch.no_grad()
def plain_scores(model, item):
    """One item at a time, all logits, nothing shared: slow and easy to believe."""
    B, T = len(item.prompts), max(map(len, item.prompts)) - 1
    x, y = torch.zeros(B, T, dtype=torch.long), torch.full((B, T), -1)
    for b, (prompt, start) in enumerate(zip(item.prompts, item.starts)):
        x[b, :len(prompt) - 1], y[b, start - 1:len(prompt) - 1] = torch.tensor(prompt[:-1]), torch.tensor(prompt[start:])
    logits = model(x)
    losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1, reduction="none").view(B, T)
    hits = logits.argmax(dim=-1) == y
    return [(losses[b][y[b] >= 0].mean().item(), hits[b][y[b] >= 0].all().item()) for b in range(B)]


@pytest.mark.parametrize("which", ["trained", "random"])
def test_batches_decide_as_a_plain_loop_does(bundle, which):
    rows = {task: core.read_rows(str(bundle), task) for task in TASKS}
    model = random_model() if which == "random" else trained_model(
        [core.render(task, rows[task][i], core.draw_shots(rows[task], i, 2))[-1] for task in TASKS for i in range(4)])
    rights, plain_seconds, seconds, num_items = {True: 0, False: 0}, 0.0, 0.0, 0
    for task in TASKS:
        items = items_of(task, rows[task], 14, model.config.sequence_len)
        clock = time.perf_counter()
        plain = [plain_scores(model, item) for item in items]
        middle = time.perf_counter()
        batched = {item.ticket: scores for group in core.batches(items, core.TOKENS_CPU)
                   for item, scores in zip(group, core.read(model, group))}
        end = time.perf_counter()
        plain_seconds, seconds, num_items = plain_seconds + middle - clock, seconds + end - middle, num_items + len(items)
        for item, scores in zip(items, plain):
            assert [loss for loss, _ in batched[item.ticket]] == pytest.approx([loss for loss, _ in scores], abs=1e-5)
            assert core.is_right(task, item, batched[item.ticket]) == core.is_right(task, item, scores)
            rights[core.is_right(task, item, scores)] += 1
    print(f"{num_items} items, {which} model: plain loop {plain_seconds:.2f} s, batched {seconds:.2f} s, "
          f"{plain_seconds / seconds:.1f} times faster")
    assert min(rights.values()) > 10


def test_a_model_that_sees_no_difference_scores_what_guessing_does(base):
    folder = write_bundle(base / "eval_bundle", num_rows=150)
    model = GPT(GPTConfig(sequence_len=64, vocab_size=TOKENIZER.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=32))
    for task in TASKS:                                               # untrained: every logit is 0
        if task.kind != LM:
            rows = core.read_rows(str(folder), task)
            right, n, too_long = core.evaluate_core_task(model, TOKENIZER, task, rows)
            chance = [1 / len(row.get("choices") or row["context_options"]) for row in rows]
            error = math.sqrt(sum(p * (1 - p) for p in chance))
            assert n == 150 and too_long == 0 and abs(right - sum(chance)) < 3.5 * error, task.label


class Oracle:
    """Stands in for a model: tokens that continue one of the texts it knows are nearly certain."""
    device, compute_dtype = torch.device("cpu"), torch.float32
    config = GPTConfig(sequence_len=4096, vocab_size=TOKENIZER.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=2)

    def __init__(self, texts):
        self.texts = sorted(TOKENIZER.encode(text) for text in texts)

    def knows(self, ids):
        i = bisect.bisect_left(self.texts, ids)
        return i < len(self.texts) and self.texts[i][:len(ids)] == ids

    def __call__(self, idx, kv_cache, positions):                    # the shared beginning: only kept
        kv_cache.tokens = idx
        kv_cache.advance(idx.size(1))

    def score(self, idx, targets, kv_cache=None):
        seen = idx if kv_cache is None else torch.cat((kv_cache.cache.tokens[kv_cache.items], idx), dim=1)
        losses, best = [], []
        for b, t in (targets >= 0).nonzero().tolist():
            target = targets[b, t].item()
            known = self.knows(seen[b, 1:seen.size(1) - idx.size(1) + t + 1].tolist() + [target])
            losses.append(0.01 if known else 5.0)
            best.append(target if known else target + 1)
        return torch.tensor(losses), torch.tensor(best)


def right_text(task, row, shots):
    texts = core.render(task, row, shots)
    return texts[-1] if task.kind == LM else texts[row["gold"]]


def test_a_model_that_knows_the_right_answers_scores_1(bundle):
    texts = []
    for task in TASKS:
        rows = core.read_rows(str(bundle), task)
        texts += [right_text(task, row, core.draw_shots(rows, i, task.shots)) for i, row in enumerate(rows)]
    seen = []
    results, score = core.evaluate_core(Oracle(texts), TOKENIZER, report=lambda label, result: seen.append(label))
    assert score == 1 and all(result["accuracy"] == result["centered"] == 1 for result in results.values())
    assert seen == list(results) == [task.label for task in TASKS] and results["copa"]["n"] == 14
    # and one that knows nothing gets no continuation right
    results, score = core.evaluate_core(Oracle([]), TOKENIZER, max_per_task=5)
    assert score < 0.3 and results["copa"]["n"] == 5 and results["coqa"]["accuracy"] == 0


def test_items_that_do_not_fit_count_as_wrong_and_are_counted(bundle):
    model, task = random_model(context=8), next(task for task in TASKS if task.label == "coqa")
    rows = core.read_rows(str(bundle), task)
    fit = sum(len(row["continuation"]) + 1 <= 8 for row in rows)
    right, n, too_long = core.evaluate_core_task(model, TOKENIZER, task, rows)
    assert (n, too_long) == (14, 14 - fit) and right <= fit < 14


def test_two_ranks_share_the_items_and_a_cap_leaves_the_prompts_alone(bundle, monkeypatch):
    model = random_model()
    for task in (TASKS[3], TASKS[11]):
        rows = core.read_rows(str(bundle), task)
        whole = core.evaluate_core_task(model, TOKENIZER, task, rows)
        asked, read = [], core.read
        monkeypatch.setattr(core, "read", lambda model, items: asked.extend(items) or read(model, items))
        core.evaluate_core_task(model, TOKENIZER, task, rows, 3)
        assert sorted(asked) == sorted(items_of(task, rows, 14, 192)[:3])
        monkeypatch.undo()
        monkeypatch.setattr(core, "WORLD_SIZE", 2)
        parts = []
        for rank in range(2):
            monkeypatch.setattr(core, "RANK", rank)
            parts.append(core.evaluate_core_task(model, TOKENIZER, task, rows))
        monkeypatch.undo()
        assert tuple(map(sum, zip(*parts))) == whole


def test_scored_tokens_are_those_of_the_logits():
    model = random_model(vocab_size=97)
    idx = torch.randint(0, 97, (3, 11), generator=torch.Generator().manual_seed(0))
    y = torch.where(torch.rand(3, 11, generator=torch.Generator().manual_seed(1)) < 0.4, idx.roll(-1, 1), -1)
    losses, best = model.score(idx, y)
    plain = F.cross_entropy(model(idx).flatten(0, 1), y.flatten(), ignore_index=-1, reduction="none").view(y.shape)
    assert torch.allclose(losses, plain[y >= 0], atol=1e-5)
    assert torch.equal(best, model(idx).argmax(dim=-1)[y >= 0])


# the script


def run(base_dir, *argv):
    env = dict(os.environ, NANOCHAT_BASE_DIR=str(base_dir), OMP_WAIT_POLICY="PASSIVE", NANOCHAT_MIRROR="http://127.0.0.1:9")
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_base_eval_writes_what_it_prints_and_keeps_it(tmp_path):
    write_bundle(tmp_path / "eval_bundle", num_rows=11)
    run(tmp_path, "-c", """
import random
from checkpoint import save_checkpoint
from plumbing.common import base_path
from data import VAL_SHARD, shard_path, write_shard
from model import GPT, GPTConfig
from tokenizer import Tokenizer
tokenizer = Tokenizer([bytes([i]) for i in range(256)])
tokenizer.save(base_path("tokenizer"), {})
for shard in (0, VAL_SHARD):
    write_shard(shard_path(shard), ["A cat sees the moon %d times." % n for n in range(200)])
model = GPT(GPTConfig(sequence_len=64, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=32))
save_checkpoint(base_path("base_checkpoints", "d1"), 4, model, [], dict(stage="base", num_iterations=4, rows=8, device_batch_size=8,
    tokenizer=tokenizer.fingerprint, shards=["shard_00000.parquet"], config={}, source=None))
""")
    folder = tmp_path / "base_checkpoints" / "d1"
    argv = ["base_eval.py", "--resume=1", "--device=cpu", "--core_max_per_task=3"]
    run(tmp_path, *argv, "-a", "bpb")
    assert "core" not in json.loads((folder / "eval.json").read_text())
    done = run(tmp_path, *argv).stdout
    assert "val bpb" not in done                                     # known already
    results = json.loads((folder / "eval.json").read_text())
    # an untrained model takes log2(265) bits for each of the 256 bytes and the specials
    assert results["val_bpb"] == pytest.approx(math.log2(265), rel=1e-4) == results["train_bpb"]
    assert results["step"] == 4 and len(results["samples"]) == 7 and set(results["seconds"]) == {"bpb", "samples", "core"}
    assert list(results["tasks"]) == [task.label for task in TASKS] and results["gpt2_core"] == dict(small=0.113891)
    assert results["core"] == pytest.approx(sum(row["centered"] for row in results["tasks"].values()) / 22)
    assert re.search(rf"CORE .* {results['core']:.4f} \|   0.1139", done)
    lines = (folder / "core.csv").read_text().splitlines()
    assert len(lines) == 24 and lines[0] == "Task,Accuracy,Centered,Items" and lines[-1] == f"CORE,,{results['core']:.6f},"
    assert "finished already" in run(tmp_path, *argv).stdout
    with pytest.raises(SystemExit, match="tasks=bpb,corn: must be some of"):
        run_script("base_eval.py", "-a", "bpb,corn")


# the real bundle


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "eval_bundle"
    core.unpack(os.path.join(HUB, core.BUNDLE_URL.split("://")[1]), str(folder))
    return str(folder)


@needs_hub
def test_the_table_of_tasks_is_the_real_bundles():
    """core.yaml is read as far as that file uses YAML: a quoted text or a list reads the same in Python."""
    with zipfile.ZipFile(os.path.join(HUB, core.BUNDLE_URL.split("://")[1])) as bundle:
        tasks, meta = (bundle.read(f"eval_bundle/{name}").decode().splitlines() for name in ("core.yaml", "eval_meta_data.csv"))
    described = []
    for line in tasks:
        key, colon, value = line.strip().partition(": ")
        if key == "-":
            described.append({"continuation_delimiter": " "})
        elif colon and described:
            described[-1][key] = ast.literal_eval(value) if value[0] in "\"'[" else value
    baselines = {row["Eval Task"]: float(row["Random baseline"]) for row in csv.DictReader(meta)}
    assert TASKS == [CoreTask(task["label"], task["dataset_uri"], task["icl_task_type"], *task["num_fewshot"],
                              task["continuation_delimiter"], baselines[task["label"]]) for task in described]


@needs_hub
def test_the_real_bundle_has_the_scores_of_gpt2(real):
    scores = core.gpt2_scores(real)
    assert [round(scores[size]["CORE"], 4) for size in core.GPT2] == [0.1139, 0.1849, 0.2146, 0.2565]
    for size, row in scores.items():
        assert sum(row[task.label] for task in TASKS) / 22 == pytest.approx(row["CORE"], abs=1e-6), size


@needs_hub
@pytest.mark.parametrize("picker", ["ties", "seeded"])
def test_guessing_scores_one_over_the_choices_on_the_real_bundle(real, picker):
    rng, centered, expected = random.Random(0), [], []
    for task in TASKS:
        rows, right, chance = core.read_rows(real, task), 0, []
        for i, row in enumerate(rows if task.kind != LM else []):
            texts = core.render(task, row, core.draw_shots(rows, i, task.shots))
            item = core.Item(texts, [], 0, row["gold"], ticket_of(texts))
            right += core.is_right(task, item, [(0.0 if picker == "ties" else rng.random(), False) for _ in texts])
            chance.append(sum(text == texts[row["gold"]] for text in texts) / len(texts))
        error = math.sqrt(sum(p * (1 - p) for p in chance))
        assert abs(right - sum(chance)) <= 3 * error, f"{task.label}: {right} right, {sum(chance):.0f} +- {error:.0f} expected"
        accuracy, baseline = (right / len(rows), sum(chance) / len(rows)), task.baseline / 100
        centered.append((accuracy[0] - baseline) / (1 - baseline))
        expected.append((accuracy[1] - baseline) / (1 - baseline))
        print(f"{task.label:33} {accuracy[0]:.4f} expected {accuracy[1]:.4f} +- {error / len(rows):.4f}")
    print(f"CORE {sum(centered) / 22:.4f} expected {sum(expected) / 22:.4f}")
    assert abs(sum(centered) - sum(expected)) / 22 < 0.02


@needs_hub
def test_all_real_tasks_run_and_a_cheating_model_scores_1(real, monkeypatch):
    monkeypatch.setattr(core, "fetch_bundle", lambda: real)
    texts = []
    for task in TASKS:
        rows = core.read_rows(real, task)
        texts += [right_text(task, rows[i], core.draw_shots(rows, i, task.shots)) for i in range(4)]
    oracle = Oracle(texts)
    oracle.config = GPTConfig(sequence_len=2 ** 17, vocab_size=TOKENIZER.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=2)
    _, score = core.evaluate_core(oracle, TOKENIZER, max_per_task=4)
    assert score == 1
    clock = time.perf_counter()
    results, score = core.evaluate_core(random_model(context=256), TOKENIZER, max_per_task=4)
    print(f"88 items of 22 real tasks: CORE {score:.4f} in {time.perf_counter() - clock:.1f} s")
    assert len(results) == 22 and all(result["n"] == 4 for result in results.values()) and abs(score) < 0.5
