"""
Reinforcement learning: the arithmetic of rollouts.py beside a plain one, and the laws of chat_rl.py, tried as a user runs it.

The model of the runs has learned that the answer to a question about letters is "#### " and a digit from 0 to 3, whichever:
most often the right one is 1, and that is what a reward can teach it in seconds.
"""
import itertools
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from checkpoint import save_checkpoint, steps_in
from conftest import ROOT, run_script
from data import pad_batch
from model import GPT, LOGIT_CAP, GPTConfig
from muon import build_optimizers
from plumbing import common
from plumbing.common import read_log
from engine import seed_of
from rollouts import Answer, Rollouts, advantages, evaluate_pass_at_k, pass_at_k, policy_batches
from tasks import is_right, spelling_bee
from tokenizer import SPECIAL_TOKENS, Tokenizer

TOKENIZER = Tokenizer([bytes([i]) for i in range(256)])    # a token per byte
SPECIAL = {name.strip("<|>"): TOKENIZER.special(name) for name in SPECIAL_TOKENS}
RL = ["chat_rl.py", "--task=spelling_bee", "--device=cpu", "--examples_per_step=8", "--num_samples=8", "--max_new_tokens=12",
      "--eval_examples=20", "--eval_samples=4", "--eval_every=10", "--init_lr_frac=0.5", "--num_iterations=20"]


def small(vocab_size=TOKENIZER.vocab_size, sequence_len=128, seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(sequence_len=sequence_len, vocab_size=vocab_size, n_layer=1, n_head=2, n_kv_head=2, n_embd=64))


def problem(i):
    """A question about letters that any digit answers: with the reward 1 for '#### 1'."""
    return {"messages": [{"role": "user", "content": f"How many {i}?"}], "grading": "number", "answer": "1"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A base folder with a tokenizer and a fine-tuned model that answers with any digit."""
    base_dir, model, rng = tmp_path_factory.mktemp("rl"), small(), random.Random(0)
    optimizers, data = build_optimizers(model, 0.02, 0.2, 0.004), spelling_bee(400, "train", varied=False)
    for step in range(60):
        rows = []
        for i in range(16):
            row = data[rng.randrange(400)]["messages"][0]
            answer = {"role": "assistant", "content": f"#### {rng.randrange(4)}"}
            rows.append(TOKENIZER.render_conversation({"messages": [row, answer]}))
        x, y = map(torch.from_numpy, pad_batch(rows, 128))
        loss = model(x, y) / (y >= 0).sum()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    TOKENIZER.save(str(base_dir / "tokenizer"), {})
    meta = dict(stage="sft", num_iterations=60, config=dict(embedded=True), tokenizer=TOKENIZER.fingerprint)
    save_checkpoint(str(base_dir / "chatsft_checkpoints/d1"), 60, model, optimizers, meta)
    return base_dir


@pytest.fixture(scope="module")
def trained(source):
    """Reinforcement learning of 20 steps, with a checkpoint at step 10."""
    run(source, *RL, "--save_every=10")
    return source


@pytest.fixture
def copy(source, tmp_path):
    shutil.copytree(source, tmp_path / "copy", ignore=shutil.ignore_patterns("chatrl*"))
    return tmp_path / "copy"


def run(base_dir, script, *flags):
    """Run a script in this process, with its own base folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "BASE_DIR", str(base_dir))
        torch.set_num_threads(1)                           # as in begin
        try:
            names = run_script(script, *flags)
        finally:
            torch.set_num_threads(1)
        if "lock" in names:
            names["lock"].close()                          # it goes with the process, which is ours


def begin(base_dir, *argv):
    """Start a script in a process of its own, its output in one pipe."""
    env = dict(os.environ, NANOCHAT_BASE_DIR=str(base_dir), OMP_NUM_THREADS="1")
    return subprocess.Popen([sys.executable, *argv], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def signalled(process, words, number):
    """Send the signal when these words are said -> (exit code, all it has said)."""
    said = ""
    for line in process.stdout:
        said += line
        if words in line:
            process.send_signal(number)
    return process.wait(), said


def folder(base_dir):
    return os.path.join(base_dir, "chatrl_checkpoints", "d1")


def logged(base_dir, key):
    return {row["step"]: row[key] for row in read_log(folder(base_dir)) if key in row}


def require_same_end(a, b, step=20):
    old, new = (torch.load(os.path.join(folder(base_dir), f"model_{step:06d}.pt")) for base_dir in (a, b))
    assert all(torch.equal(old[name], new[name]) for name in old)
    for key in ("reward", "policy_loss", "grad_norm", "pass@1"):
        assert logged(a, key) == logged(b, key)


# the arithmetic


def test_advantages_are_what_is_better_than_the_mean_of_the_prompt():
    assert advantages([1.0, 0.0, 0.0, 0.0]) == [0.75, -0.25, -0.25, -0.25]
    for reward in (0.0, 1.0, 0.1):
        assert advantages([reward] * 7) == [0.0] * 7
    rewards = [random.Random(0).random() for _ in range(9)]
    assert sum(advantages(rewards)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("right, total", [(0, 5), (1, 5), (3, 5), (5, 5)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_answers_with_a_right_one(right, total):
    answers = [True] * right + [False] * (total - right)
    for k in range(1, total + 1):
        choices = [any(choice) for choice in itertools.combinations(answers, k)]
        assert pass_at_k(right, total, k) == pytest.approx(sum(choices) / len(choices))
    assert pass_at_k(right, total, 1) == pytest.approx(right / total)


def test_a_seed_belongs_to_one_answer_alone():
    seeds = {seed_of(step, n, i) for step in range(20) for n in range(16) for i in range(16)}
    assert len({seed % 2 ** 32 for seed in seeds}) == 20 * 16 * 16, "a CPU's generator takes 32 bits of them"
    assert seed_of(3, 5, 7) == seed_of(3, 5, 7)
    torch.Generator().manual_seed(max(seeds))


def some_answers(V=97, seed=4):
    """Answers of random tokens, of several lengths, to three prompts; some tokens forced, one prompt without advantages."""
    rng, groups = random.Random(seed), []
    for rewards in ([1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.25, 1.0]):
        prompt = [rng.randrange(V) for _ in range(rng.randrange(3, 9))]
        for reward, advantage in zip(rewards, advantages(rewards)):
            ids = [rng.randrange(V) for _ in range(rng.randrange(2, 30))]
            groups.append(Answer(prompt, ids, [int(rng.random() < 0.7) for _ in ids], reward, advantage))
    return groups


def plain_reinforce(model, answers):
    """- the sum over answers of advantage * log p of each drawn token, written out; divided by the number of drawn tokens."""
    total = 0.0
    for answer in answers:
        ids = torch.tensor([answer.prompt + answer.ids])
        logits = LOGIT_CAP * torch.tanh(model.lm_head(model.trunk(ids))[0] / LOGIT_CAP)
        for i, (token, drawn) in enumerate(zip(answer.ids, answer.drawn)):
            if drawn:
                total = total - answer.advantage * F.log_softmax(logits[len(answer.prompt) + i - 1], dim=0)[token]
    return total / sum(sum(answer.drawn) for answer in answers)


@pytest.mark.parametrize("B", [1, 2, 100])
def test_the_gradient_is_that_of_reinforce_written_out(B):
    model = small(vocab_size=97, sequence_len=64)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (1.0 if p is model.transformer.wte.weight else 0.1))
    answers = some_answers()
    num_tokens = sum(sum(answer.drawn) for answer in answers)
    plain = plain_reinforce(model, answers)
    want = torch.autograd.grad(plain, list(model.parameters()))
    total = 0.0
    for x, y, weights in policy_batches(answers, B, 64):
        loss = model(torch.from_numpy(x), torch.from_numpy(y), weights=torch.from_numpy(weights)) / num_tokens
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(plain.item(), rel=1e-4)
    for p, g in zip(model.parameters(), want):
        torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-6)


def test_only_drawn_tokens_of_answers_with_an_advantage_are_scored():
    answers = some_answers()
    batches = policy_batches(answers, 4, 64)
    assert sum(len(x) for x, _, _ in batches) == 6, "the prompt whose answers are all right teaches nothing"
    scored = sorted((float(w), row[row >= 0].tolist()) for _, y, weights in batches for w, row in zip(weights, y))
    assert scored == sorted((np.float32(a.advantage).item(), [t for t, drawn in zip(a.ids, a.drawn) if drawn])
                            for a in answers if a.advantage)
    lengths = [x.shape[1] for x, _, _ in batches]
    assert lengths == sorted(lengths), "answers of about equal length share a micro-batch"


def test_a_rank_without_anything_to_learn_gives_a_gradient_of_zero():
    answers = some_answers()[3:6]
    [(x, y, weights)] = policy_batches(answers, 4, 64)
    model = small(vocab_size=97, sequence_len=64)
    model(torch.from_numpy(x), torch.from_numpy(y), weights=torch.from_numpy(weights)).backward()
    assert all((p.grad == 0).all() for p in model.parameters())


# the answers


def test_answers_do_not_depend_on_what_is_drawn_beside_them(monkeypatch):
    model, tokens = small(), []
    problems, seeds = [problem(i) for i in (1, 22, 333)], [[seed_of(n, i) for i in range(5)] for n in range(3)]
    draw = Rollouts(model, TOKENIZER, is_right, 20, 1.0, 50)
    for draw.slots in (256, 4, 1):
        tokens.append([[(answer.prompt, answer.ids, answer.drawn) for answer in group] for group in draw(problems, seeds)])
    assert tokens[0] == tokens[1] == tokens[2]
    assert tokens[0][1:2] == [[(a.prompt, a.ids, a.drawn) for a in group] for group in draw(problems[1:2], seeds[1:2])]
    assert len({tuple(ids) for group in tokens[0] for _, ids, _ in group}) == 15
    draw.slots, memory = 4, [torch.OutOfMemoryError("no memory")] * 2
    write = Rollouts.write
    monkeypatch.setattr(Rollouts, "write", lambda *args: (_ for _ in ()).throw(memory.pop()) if memory else write(*args))
    again = draw(problems, seeds)
    assert not memory and draw.slots == 1 and tokens[0] == [[(a.prompt, a.ids, a.drawn) for a in group] for group in again]


def test_the_calculators_tokens_are_marked_and_the_end_is_drawn():
    script = [SPECIAL["python_start"], *b"2*3", SPECIAL["python_end"], *b"#### 6", SPECIAL["assistant_end"]]
    model = small()
    model.eval()

    class Scripted:
        """Wants the script's next token, whatever it is given."""
        config, device, compute_dtype, left = model.config, model.device, model.compute_dtype, list(script)

        def __call__(self, idx, kv_cache, positions=None):
            kv_cache.advance(idx.size(1))
            logits = torch.zeros(*idx.shape, self.config.vocab_size)
            wanted = 0 if self.skip else self.left.pop(0)
            logits[..., wanted] = 100.0
            return logits if positions is None else logits[torch.arange(len(idx)), positions]
        skip = False

    asked = problem(0) | dict(answer="6")
    scripted = Scripted()
    # after <|python_end|> the calculator puts in <|output_start|> 6 <|output_end|>, for which the model's wishes do not count
    scripted.left = script[:5] + [0, 0, 0] + script[5:]
    [[answer]] = Rollouts(scripted, TOKENIZER, is_right, 30, 1.0, 0)([asked], [[1]])
    assert answer.ids == script[:5] + [SPECIAL["output_start"], *b"6", SPECIAL["output_end"]] + script[5:]
    assert answer.drawn == [1] * 5 + [0] * 3 + [1] * 7 and answer.reward == 1.0


def test_a_question_that_is_too_long_leaves_room_and_an_answer_ends_where_the_context_does():
    model = small()
    long = problem("x" * 500)
    [[answer]] = Rollouts(model, TOKENIZER, is_right, 40, 1.0, 0)([long], [[1]])
    assert len(answer.prompt) == 128 - 40 and answer.prompt[-1] == SPECIAL["assistant_start"] and 0 < len(answer.ids) <= 40


def test_pass_at_1_is_what_single_answers_have_right():
    class Coin:
        """Right for the first answers of each problem, which the seeds tell."""
        def __init__(self, right):
            self.right, self.model = right, small()

        def __call__(self, problems, seeds):
            return [[Answer([], reward=float(i < self.right[n])) for i in range(len(own))] for n, own in enumerate(seeds)]

    task = [problem(i) for i in range(4)]
    found = evaluate_pass_at_k(Coin([0, 1, 2, 4]), task, 400, 4)
    assert found == {1: pytest.approx(7 / 16), 4: pytest.approx(3 / 4)}


# the stage


def test_the_reward_rises(trained, capsys):
    rewards, passed = list(logged(trained, "reward").values()), logged(trained, "pass@1")
    first, last = statistics.fmean(rewards[:4]), statistics.fmean(rewards[-8:])
    print(f"reward {first:.2f} to {last:.2f}, pass@1 {passed}")
    assert last > first + 0.08 and passed[20] > passed[0] + 0.15     # 43 % of the answers are 1, it cannot count
    with pytest.raises(SystemExit):                        # the end of an answer
        run(trained, "chat_cli.py", "-i", "rl", "-p", "How many 'a' are in 'cat'?", "--temperature=0.0")
    assert capsys.readouterr().out.splitlines()[-1] == "#### 1"


def test_ten_steps_and_ten_resumed_are_twenty_bit_for_bit(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "copy")
    for name in os.listdir(folder(tmp_path / "copy")):
        if "000020" in name:
            os.remove(os.path.join(folder(tmp_path / "copy"), name))
    run(tmp_path / "copy", *RL, "--save_every=10", "--resume=1")
    require_same_end(trained, tmp_path / "copy")


def test_the_micro_batch_does_not_change_the_training(trained, copy):
    run(copy, *RL, "--device_batch_size=3")
    for key in ("reward", "grad_norm", "policy_loss"):     # of the first steps: later a sum's last bit changes an answer
        three, all_at_once = logged(copy, key), logged(trained, key)
        assert [three[step] for step in range(2)] == pytest.approx([all_at_once[step] for step in range(2)], rel=1e-3, abs=1e-6)


def test_two_ranks_are_one_process(trained, copy):
    torchrun = ["-m", "plumbing.launch", "--standalone", "--nproc_per_node=2", "--"]
    code, said = signalled(begin(copy, *torchrun, *RL, "--save_every=3"), "model_000003", signal.SIGTERM)
    assert code == 143 and "stopped at step" in said, said
    assert steps_in(folder(copy))[-1] >= 3
    for key in ("reward", "grad_norm", "policy_loss"):
        one, two = logged(trained, key), logged(copy, key)
        assert [two[step] for step in range(2)] == pytest.approx([one[step] for step in range(2)], rel=1e-3, abs=1e-6)


def test_a_stop_and_a_kill_lose_nothing(trained, copy):
    flags = [*RL, "--save_every=4", "--resume=1"]
    code, said = signalled(begin(copy, *flags), "problems, ", signal.SIGTERM)    # the first test is made again
    assert code == 143 and "Traceback" not in said and not logged(copy, "pass@1"), said
    code, said = signalled(begin(copy, *flags), "step     2/", signal.SIGINT)
    assert code == 130 and "saved; the same command with" not in said and "saved; the same command goes on" in said, said
    code, said = signalled(begin(copy, *flags), "model_000008", signal.SIGKILL)
    assert code == -9 and "Traceback" not in said
    run(copy, *flags)
    require_same_end(trained, copy)
    before = os.listdir(folder(copy))
    with pytest.raises(SystemExit) as end:
        run(copy, *flags)
    assert end.value.code == 0 and before == os.listdir(folder(copy))


@pytest.mark.parametrize("argv, words", [
    (["--task=chess"], "task=chess: must be gsm8k or spelling_bee"), (["--num_samples=1"], "num_samples=1: must be 2 to"),
    (["--source=base"], "source=base: must be sft or mid"), (["--temperature=0"], "temperature=0"),
    (["--source_tag=d9"], "d9: no checkpoint here; run chat_sft.py first"), (["--task=gsm8k"], "run: python prepare.py --tasks=1"),
])
def test_a_mistake_is_one_line(source, argv, words):
    with pytest.raises(SystemExit, match=words) as error:
        run(source, *RL, "--model_tag=other", *argv)
    assert "\n" not in str(error.value)


def test_a_stage_that_had_nothing_to_learn_is_not_taken_for_its_source(source, copy, capsys):
    never = [*RL, "--num_iterations=1", "--model_tag=still"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.is_right", lambda *_: False)
        run(copy, *never)
    assert "so there is nothing to learn from" in capsys.readouterr().out
    old, new = (torch.load(copy / name) for name in ("chatsft_checkpoints/d1/model_000060.pt", "chatrl_checkpoints/still/model_000001.pt"))
    assert all(torch.equal(old[name], new[name]) for name in old), "momentum has not moved it"
    with pytest.raises(SystemExit) as error:
        run(copy, *never)
    assert str(error.value).count("mv ") == 1 and "still.old" in str(error.value)


def test_the_report_and_the_tests_know_the_stage(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "copy")
    run(tmp_path / "copy", "chat_eval.py", "-i", "rl", "--embedded=1", "-a", "counts a letter", "-x", "5", "--max_tokens=12")
    run(tmp_path / "copy", "report.py", "--copy_to=")
    page = (tmp_path / "copy/report/d1.md").read_text()
    for words in ("## Reinforcement learning", "BASE | MID | SFT | RL |", "| GSM8K |  | - (0.0250) | - (0.0455) | - (0.0758) |",
                  "| reward, the share of right answers |", "| pass@1 on held-out problems |", "8 per step with 8 answers to each"):
        assert words in page, page
