"""
Test a chat model on what tasks/ has tests for, and HumanEval; six of the tests make up ChatCORE.

reads   <stage>_checkpoints/<model_tag>/, tokenizer/, task_data/ (through tasks/)
writes  <stage>_checkpoints/<model_tag>/chat_eval.json
run     python chat_eval.py -i sft
        python chat_eval.py -i mid -a GSM8K,SpellingBee -x 100
"""
from plumbing import packages  # noqa: F401, I001: first, so that it can say what is missing
import os
import time

from checkpoint import find_checkpoint, load_model, sha_of
from engine import Engine
from evals import humaneval, sandbox
from evals.metrics import GUESSING, centered, constant_share, evaluate_task
from evals.saved import read_results, write_results
from plumbing.common import duration, print0, standard_error
from plumbing.configurator import configure
from plumbing.machine import finish, start
from tasks import all_tests, is_right, who_is

source = "sft"                 # -i: whose model: base, mid, sft or rl
model_tag = ""                 # which model of that stage, like d12; "" = the only one there is
step = 0                       # training step of the checkpoint; 0 = the newest
tasks = ""                     # -a: names with commas between; "" = all
max_problems = 0               # -x: problems of each task; 0 = all
batch_size = 16                # problems at a time
max_tokens = 512               # longest answer, in tokens
embedded = False               # 1 = the tests of the tiny run, which need no download
unsafe_exec = False            # 1 = run HumanEval's programs even where no sandbox can be had
resume = 0                     # 1 = keep what chat_eval.json has of this checkpoint and these settings
device = ""                    # cuda, mps or cpu; "" = the best there is
dtype = ""                     # float32 or bfloat16; "" = as in training
config = configure(globals())

CHATCORE = ["ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee"]


def chatcore(results, names):
    """
    Mean over the tasks of how far the accuracy is from guessing to perfect; None if one is missing.

    What one answer to all problems would get is no baseline here, or the score would not compare with the original's.
    """
    if not all("accuracy" in results.get(name, {}) for name in names):
        return None
    return sum(centered(results[name]["accuracy"], GUESSING.get(name, 0)) for name in names) / len(names)


folder, meta = find_checkpoint(source, model_tag, step)
machine = start(device, dtype, meta)
model, tokenizer = load_model(folder, meta, machine)
engine = Engine(model, tokenizer)
path = os.path.join(folder, "chat_eval.json")
tests = all_tests(embedded, who_is(meta)) | ({} if embedded else {"HumanEval": humaneval.humaneval()})
wanted = [name.strip() for name in tasks.split(",") if name.strip()] or list(tests)
if set(wanted) - set(tests):
    raise SystemExit(f"tasks={tasks}: must be some of {','.join(tests)}")

# results of the same weights stay; what is tested now takes the place of its own
fresh = dict(stage=source, step=meta["step"], checkpoint=sha_of(meta), tasks={}, seconds=0.0)
results = fresh | read_results(path, checkpoint=sha_of(meta))
settings = dict(max_problems=max_problems, max_tokens=max_tokens, dtype=machine.dtype_name)

for name in wanted:
    done = results["tasks"].get(name, {})
    if resume and "accuracy" in done and done["settings"] == settings:
        print0(f"{name}: {done['right']} of {done['total']}, there already")
        continue
    clock, check_answer, problem = time.perf_counter(), is_right, ""
    if name == "HumanEval":
        results["sandbox"], problem = sandbox.layers(), "" if unsafe_exec else sandbox.problem_with_layers()
        layers = ", ".join(sandbox.layers()) or "nothing at all"
        print0(f"{name}: " + (f"skipped, {problem}" if problem else f"programs run behind {layers}"))
        check_answer = lambda row, answer: humaneval.check(row, answer, unsafe=unsafe_exec).passed   # noqa: E731
    if problem:
        results["tasks"].setdefault(name, dict(skipped=problem))
    else:
        right, total = evaluate_task(engine, tests[name], check_answer, max_problems, max_tokens, batch_size)
        accuracy, seconds = right / total, time.perf_counter() - clock
        stderr, constant = standard_error(right, total), constant_share([tests[name][i] for i in range(total)])
        results["tasks"][name] = dict(right=right, total=total, accuracy=accuracy, stderr=stderr, constant=constant,
                                      seconds=seconds, settings=settings)
        results["seconds"] += seconds
        skewed = f"; one answer to all would get {100 * constant:.1f} %" if constant > GUESSING.get(name, 0) else ""
        print0(f"{name}: {right} of {total} = {100 * accuracy:.1f} % (standard error {100 * stderr:.1f} %{skewed}), "
               f"{duration(seconds)}")
    results["chatcore"] = chatcore(results["tasks"], CHATCORE)
    results["chatcore5"] = chatcore(results["tasks"], CHATCORE[:5])
    write_results(path, results)

if results.get("chatcore") is not None:
    print0(f"ChatCORE {results['chatcore']:.4f}, over the five tasks of the original's table "
           f"{results['chatcore5']:.4f}")
print0(f"chat_eval: {folder}, results in {path}")
finish()
