"""
Checkpoints: written so that a crash at any moment leaves the one before intact.

A step is three kinds of files in the stage's folder: model_NNNNNN.pt, optim_NNNNNN_rankR.pt and, last of all,
meta_NNNNNN.json with the sizes and sha256 of the others. No meta, no checkpoint. Tensors are loaded as data, not code.
A damaged one is passed over for the one before it; the trainer also renames its files to *.damaged.
In the middle of a run the training goes on while a thread writes what was copied in memory.
"""
import contextlib
import io
import math
import os
import re
import shlex
import shutil
import sys
import threading
import time

import torch

from model import GPT, GPTConfig
from plumbing.budget import KEEP, checkpoint_bytes
from plumbing.common import (RANK, TASK_CODE, WORLD_SIZE, atomic_write, base_path, code_hash, fingerprint, names_in,
                             print0, read_json, sync, write_json)
from plumbing.machine import PATIENCE, barrier, free_memory
from tokenizer import load_tokenizer

# the stages in their order: where their models are, what trains them, and the code that their weights depend on
FOLDERS = dict(base="base_checkpoints", mid="mid_checkpoints", sft="chatsft_checkpoints",
               rl="chatrl_checkpoints")
SCRIPTS = dict(base="base_train.py", mid="mid_train.py", sft="chat_sft.py", rl="chat_rl.py")
CODE = dict(base=("model.py", "muon.py", "data.py", SCRIPTS["base"]),
            mid=("model.py", "muon.py", *TASK_CODE, SCRIPTS["mid"]),
            sft=("model.py", "muon.py", *TASK_CODE, SCRIPTS["sft"]),
            rl=("model.py", "muon.py", "engine.py", "chat.py", "rollouts.py", *TASK_CODE, SCRIPTS["rl"]))

# what the meta of a checkpoint has to have, of whatever version
NEEDED = {"step", "num_iterations", "config", "model_config", "tokenizer", "world_size", "files"}

# knobs that may differ when a run is continued: they change how it runs or what it prints
FREE_KNOBS = {"run", "resume", "model_tag", "source_tag", "device", "dtype", "device_batch_size", "compile_model",
              "gradient_checkpointing", "save_every", "eval_every", "eval_tokens", "eval_examples", "eval_samples",
              "sample_every", "eval_metrics_every", "eval_metrics_max_problems", "core_metric_every",
              "core_metric_max_per_task", "final_eval_tokens"}


writing = None                     # the thread of the last checkpoint that was written while the training went on


def save_checkpoint(folder, step, model, optimizers, meta, wait=True):
    """
    Write one step; every rank calls it, each saves its own share of the optimizer's state.

    meta: JSON data with "stage"; step, tag, code, model_config and files are added. Older steps are removed after.
    wait: False = return when all is copied in memory, where there is room for that; the next call waits for its end
    raises SystemExit, before anything is written, where the weights or the validation result are no numbers
    """
    global writing
    finish_writing()
    bad = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    bad += [key for key in ("val_bpb", "val_loss") if not math.isfinite(meta.get(key) or 0.0)]
    if bad:
        steps = steps_in(folder)
        before = f"step {steps[-1]} stays the newest; go on from it with another dtype, or" if steps else "none was saved before;"
        raise SystemExit(f"{folder}: step {step} is not saved, {bad[0]} is not finite: the training has diverged; {before} "
                         "train anew with lower rates")
    os.makedirs(folder, exist_ok=True)
    if RANK == 0:
        remove_leftovers(folder)
    barrier()                                                    # before any rank writes
    meta = dict(step=step, **meta, tag=os.path.basename(folder), code={name: code_hash(name) for name in CODE[meta["stage"]]},
                model_config=vars(model.config), world_size=WORLD_SIZE)
    own = {path_of(folder, "optim", step): [o.state_dict() for o in optimizers]}
    if RANK == 0:
        own = {path_of(folder, "model", step): model.state_dict(), **own}
    if wait or free_memory() < 2 * WORLD_SIZE * checkpoint_bytes(model.config):
        write_step(folder, meta, own, together=wait)
    else:
        copies = {path: in_memory(data) for path, data in own.items()}
        writing = threading.Thread(target=write_beside, args=(folder, meta, copies), name="checkpoint")
        writing.start()                                          # no daemon: the program does not end before it
    if wait:
        barrier()


def finish_writing():
    """Return when the checkpoint that is written beside the training is whole; every rank calls it."""
    if writing and RANK != 0:
        writing.join()
    barrier()                                                    # all shares are on the disk
    if writing and RANK == 0:
        writing.join()
    barrier()                                                    # and the meta


def write_beside(*args):
    """write_step in a thread; what fails in it ends the program, with the same line as in the loop."""
    try:
        write_step(*args)
    except BaseException as error:
        if isinstance(error, SystemExit):
            print(error, file=sys.stderr)
        else:
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def write_step(folder, meta, own, together=False):
    """
    Write a rank's own files {path: content}; the first rank waits for those of the others, then writes the meta.

    together: no rank trains meanwhile, so they meet; else the loop may be at an exchange of its own, and only files tell
    """
    for path, data in own.items():
        save_tensors(path, data)
    if together:
        barrier()
    if RANK != 0:
        return
    paths = [path_of(folder, "model", meta["step"]), *(path_of(folder, "optim", meta["step"], r) for r in range(WORLD_SIZE))]
    clock = time.monotonic()
    while missing := [path for path in paths if not os.path.exists(path)]:    # there, it is whole
        time.sleep(0.1)
        patience = PATIENCE.seconds if threading.main_thread().is_alive() else 20      # it has ended by an error
        if time.monotonic() > clock + patience:
            raise SystemExit(f"{missing[0]}: not there after {patience} s, so this step is not saved; run again to go on")
    files = {os.path.basename(path): fingerprint(path) for path in paths}
    sync(os.path.join(folder, "log.jsonl"))                      # no step behind the checkpoint
    write_json(path_of(folder, "meta", meta["step"]), {**meta, "files": files})
    for old in steps_in(folder)[:-KEEP]:
        os.remove(path_of(folder, "meta", old))                  # first, so that what is left is never taken for whole
    remove_leftovers(folder)
    print0(f"saved {path_of(folder, 'model', meta['step'])}")


def in_memory(data):
    """The bytes that torch.save writes."""
    file = io.BytesIO()
    torch.save(data, file)
    return file.getbuffer()


def save_tensors(path, data):
    """torch.save, or what in_memory has made, to a file that appears whole; a full disk is an OSError, as in any other file."""
    with atomic_write(path) as f:
        if isinstance(data, memoryview):
            f.write(data)
            return
        try:
            torch.save(data, f)
        except RuntimeError as error:                            # torch's zip writer hides the cause
            raise error.__context__ if isinstance(error.__context__, OSError) else error


def path_of(folder, kind, step, rank=RANK):
    """Where a step's file is; kind: "model", "meta", or "optim", of which each rank has its own."""
    return os.path.join(folder, f"{kind}_{step:06d}" + dict(model=".pt", meta=".json", optim=f"_rank{rank}.pt")[kind])


def steps_in(folder):
    """Steps with a complete checkpoint, ascending."""
    return sorted(int(m[1]) for name in names_in(folder) if (m := re.fullmatch(r"meta_(\d{6,})\.json", name)))


def remove_leftovers(folder):
    """Remove what a crash has left: files of a step that has no meta."""
    whole = steps_in(folder)
    for name in os.listdir(folder):
        part = re.fullmatch(r"(model|optim|meta)_(\d{6,})(_rank\d+)?\.(pt|json)(\.\d+\.tmp)?", name)
        if part and (part[5] or int(part[2]) not in whole):
            os.remove(os.path.join(folder, name))


def read_meta(folder, step=0):
    """The meta of a step, 0 = the newest that can be read; {} where there is none. The other files are not looked at."""
    for number in [step] if step else reversed(steps_in(folder)):
        meta = read_json(path_of(folder, "meta", number), [])
        if meta.get("step") == number and NEEDED <= meta.keys() and \
                all(math.isfinite(meta.get(key) or 0.0) for key in ("val_bpb", "val_loss")):
            return meta
    return {}


def whole_checkpoint(folder, step=0, to_train=False):
    """
    The meta of the newest checkpoint that is what was saved, {} where the folder holds none.

    A damaged one is passed over, with a line on stderr, and the one before is taken.
    step      that one or none; 0 = the newest
    to_train  the optimizer's state must be whole too, and the files of a damaged one are renamed
    raises    SystemExit where none is whole, or the step asked for isn't
    """
    steps, bad = steps_in(folder), []
    if step and step not in steps:
        raise SystemExit(f"{folder}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    for number in [step] if step else reversed(steps):
        meta = read_meta(folder, number)
        wrong = first_damaged(folder, meta, number, to_train)
        if not wrong:
            break
        bad.append(wrong)
        if to_train and RANK == 0:
            rename_damaged(folder, number)
    else:                                                        # no break: there are none, or none is whole
        if not bad:
            return {}
        remedy = "there is no other checkpoint, and what trained it has to do so again"
        if to_train:
            remedy = "there is no checkpoint before, and the same command trains from the beginning"
        if step:
            remedy = "take another step"
        raise SystemExit(f"{', '.join(bad)}: missing or damaged, not what was saved; {remedy}")
    if bad and RANK == 0:
        print(f"({', '.join(bad)}: missing or damaged, not what was saved; taken instead: step {meta['step']})",
              file=sys.stderr, flush=True)
    return meta


def first_damaged(folder, meta, step, to_train):
    """The path of the first file of a checkpoint that is not what was saved, "" if all are; meta = {}: the meta itself."""
    if not meta:
        return path_of(folder, "meta", step)
    ranks = range(meta["world_size"]) if to_train and not is_finished(meta) else []
    for path in [path_of(folder, "model", step), *(path_of(folder, "optim", step, rank) for rank in ranks)]:
        try:
            if fingerprint(path) != meta["files"].get(os.path.basename(path)):
                return path
        except FileNotFoundError:
            return path
        except OSError as error:                                 # says nothing about what is in it
            raise SystemExit(f"{path}: can't be read ({error.strerror}); run again when it can be") from None
    return ""


def rename_damaged(folder, step):
    """Set the files of a step aside, its meta first: without it they are no checkpoint."""
    for name in sorted(os.listdir(folder)):
        if re.fullmatch(rf"(meta|model|optim)_{step:06d}(_rank\d+)?\.(json|pt)", name):
            with contextlib.suppress(OSError):                   # where nothing can be written, it is passed over anyway
                os.replace(os.path.join(folder, name), os.path.join(folder, f"{name}.damaged"))


def is_finished(meta):
    """The one rule for a finished stage: its newest checkpoint is of its last step."""
    return bool(meta) and meta["step"] == meta["num_iterations"]


def read_tensors(folder, meta, kind, rank=0):
    """The content of one of a checkpoint's files on the CPU; that it is what was saved whole_checkpoint has made sure."""
    return torch.load(path_of(folder, kind, meta["step"], rank), map_location="cpu", weights_only=True)


def checkpoint_to_resume(stage, folder, config, resume, source=None):
    """
    The meta of the checkpoint to go on from, or None to start at step 0. A finished stage ends here.

    config  the knobs of this run; those that shape the training must be the old ones
    source  what find_parent gives: a model that came from another parent is never taken for finished
    raises  SystemExit 0 where the stage is finished, with a line where going on would be wrong
    """
    code = {name: code_hash(name) for name in CODE[stage]}       # now: what is edited later is not what trains
    steps = steps_in(folder)
    if not steps:
        return None
    meta = whole_checkpoint(folder, to_train=True) if resume else read_meta(folder)
    if resume and not meta:                                      # rank 0 has just said why, and set the files aside
        return None
    anew = f"to train it again, first: {set_aside(folder, meta)}"
    came_from = [source["tag"] for source in sources(meta) if "tag" in source]
    drivers = f"BASE_TAG={came_from[-1]} MODEL_TAG=NEW" if came_from else "MODEL_TAG=NEW"
    beside = f"train another one beside it with --model_tag=NEW (for the drivers: {drivers}); {anew}"
    if not resume:
        raise SystemExit(f"{folder}: holds a checkpoint of step {steps[-1]}; --resume=1 continues it; {beside}")
    if source and meta["source"]["sha256"] != source["sha256"]:
        raise SystemExit(f"{folder}: was trained from another {source['stage']} checkpoint than the one in "
                         f"{stage_folder(source['stage'], source['tag'])} now; {anew}")
    if changed := [k for k, v in config.items() if k not in FREE_KNOBS and meta["config"].get(k, v) != v]:
        old, new = (", ".join(f"{k}={values[k]!r}" for k in changed) for values in (meta["config"], config))
        raise SystemExit(f"{folder}: trained with {old}; this run asks for {new}. Set it back, or {beside}")
    if edited := [name for name in code if meta.get("code", {}).get(name, code[name]) != code[name]]:
        goes = "stays as it is" if is_finished(meta) else f"goes on from step {meta['step']} with the new code"
        print0(f"{', '.join(edited)} changed since {folder} was trained; it {goes}; {beside}")
    if is_finished(meta):
        if RANK == 0:
            shutil.rmtree(os.path.join(folder, "tokens"), ignore_errors=True)     # a crash may have left them
        result = [f"{key.replace('_', ' ')} {meta[key]:.4f}" for key in ("val_bpb", "val_loss") if key in meta]
        print0(", ".join([f"{SCRIPTS[stage][:-3]}: finished already, {meta['step']} steps in {folder}", *result]))
        raise SystemExit(0)
    return meta


def set_aside(folder, meta):
    """The shell command that moves a model and all that were trained from it out of the way."""
    own = meta.get("stage"), sha_of(meta)            # the stage as well: one that had nothing to learn has its source's weights
    others = [stage_folder(stage, tag) for stage in FOLDERS for tag in tags_of(stage)]
    later = [other for other in others
             if own in [(source["stage"], source["sha256"]) for source in sources(read_meta(other))]]
    moves = []
    for old in [folder, *later]:
        new = f"{old}.old"
        while os.path.exists(new):
            new += "er"
        moves.append(f"mv {shlex.quote(old)} {shlex.quote(new)}")
    return " && ".join(moves)


def tokenizer_of(folder, meta):
    """The tokenizer in place; SystemExit where it is not the one of a checkpoint (its meta; None = there is no such)."""
    if meta is None:
        return load_tokenizer()
    place = base_path("tokenizer")
    if not os.path.exists(os.path.join(place, "meta.json")):
        raise SystemExit(f"{place}: no tokenizer here; copy the tokenizer/ folder that belongs to {folder} to this place "
                         "(a new one would have another vocabulary)")
    tokenizer = load_tokenizer()
    if meta["tokenizer"] != tokenizer.fingerprint:
        raise SystemExit(f"{folder}: was trained with another tokenizer than the one in {place}; put its own back, or "
                         "move the folder away")
    return tokenizer


def load_weights(folder, model, meta):
    """Copy the weights of a checkpoint into the model; names and shapes must be the same."""
    state = read_tensors(folder, meta, "model")
    model.load_state_dict({name.removeprefix("_orig_mod."): value for name, value in state.items()})


def load_optimizers(folder, optimizers, meta):
    """Continue the optimizers; saved by another number of ranks, Muon's state is shared out anew."""
    (adamw, muon), count = optimizers, meta["world_size"]
    if count == WORLD_SIZE:
        adamw_state, muon_state = read_tensors(folder, meta, "optim", RANK)
    else:
        print0(f"the run was saved by {count} processes and continues on {WORLD_SIZE}: right, but not bit for bit")
        saved = [read_tensors(folder, meta, "optim", rank) for rank in range(count)]
        adamw_state, muon_state = saved[0][0], muon.take_share([state for _, state in saved])
    adamw.load_state_dict(adamw_state)
    muon.load_state_dict(muon_state)


def stage_folder(stage, model_tag):
    """Where a stage keeps the model of that tag; SystemExit for what can't be a tag or a stage."""
    if stage not in FOLDERS:
        raise SystemExit(f"source={stage}: must be one of {', '.join(FOLDERS)}")
    if not (re.fullmatch(r"[^/]{1,100}", model_tag) and model_tag.isprintable()) or model_tag in (".", ".."):
        raise SystemExit(f"model_tag={model_tag[:100]!r}: must be a plain name, like d12 or try-2")
    return base_path(FOLDERS[stage], model_tag)


def tags_of(stage):
    """The tags of a stage that have a checkpoint, in order."""
    parent = os.path.dirname(stage_folder(stage, "any"))
    return sorted(tag for tag in names_in(parent) if steps_in(os.path.join(parent, tag)))


def find_checkpoint(stage, model_tag="", step=0, flag="--model_tag"):
    """
    (folder, meta) of a stage's model; step 0 = the newest. Without a tag the only one there is, never a guess.

    A folder that was copied or renamed counts only by its name, so a backup is in nobody's way.
    """
    folder = stage_folder(stage, model_tag or "any")
    tags = tags_of(stage)
    if model_tag not in tags:
        if not tags or model_tag:
            wanted = folder if model_tag else os.path.dirname(folder)
            raise SystemExit(f"{wanted}: no checkpoint here; run {SCRIPTS[stage]} first"
                             + (f" or choose {flag} from {', '.join(tags)}" if tags else ""))
        own = [tag for tag in tags if read_meta(stage_folder(stage, tag)).get("tag", tag) == tag]
        if len(own or tags) > 1:
            raise SystemExit(f"{os.path.dirname(folder)}: holds several models; choose one with {flag}= from "
                             f"{', '.join(tags)}")
        folder = stage_folder(stage, (own or tags)[0])
    return folder, whole_checkpoint(folder, step)


def find_parent(stage, source_tag, model_tag):
    """
    (folder, meta, source) of the finished model that the next stage starts from.

    It is the one with source_tag, if that is given; else with the tag of the model to be trained; else the only one.
    source is what the next stage's meta keeps of it: enough to tell it from another.
    """
    folder, meta = find_checkpoint(stage, source_tag or (model_tag if model_tag in tags_of(stage) else ""),
                                   flag="--source_tag")
    if not is_finished(meta):
        raise SystemExit(f"{folder}: only at step {meta['step']} of {meta['num_iterations']}; finish it first, with "
                         f"{SCRIPTS[stage]} --resume=1")
    return folder, meta, dict(stage=stage, tag=os.path.basename(folder), step=meta["step"], sha256=sha_of(meta),
                              config=meta["config"], source=meta.get("source"))


def load_model(folder, meta, machine, gradient_checkpointing=False):
    """
    A trained model on the machine's device, and its tokenizer -> (model, tokenizer).

    That the code has changed, or that what the model came from is gone, is said on stderr: stdout is the caller's.
    raises SystemExit where the files are damaged or the tokenizer is not the one in place
    """
    tokenizer, reasons = tokenizer_of(folder, meta), []
    if meta.get("code", {}).get("model.py") not in (None, code_hash("model.py")):
        reasons.append("model.py changed since this was trained, and may not fit these weights; "
                       "--model_tag=NEW trains a new one")
    for source in sources(meta):
        parent = stage_folder(source["stage"], source.get("tag") or meta.get("tag", ""))
        # a stage of which nothing is kept, as where only a finished model was copied to, is not missed
        if os.path.isdir(os.path.dirname(parent)) and sha_of(read_meta(parent)) != source["sha256"]:
            there = "another one is" if steps_in(parent) else "none is"
            reasons.append(f"it came from a {source['stage']} model of step {source['step']} in {parent}, where "
                           f"{there} now; the same command as before trains it again")
    for reason in reasons if RANK == 0 else []:
        print(f"({folder}: {reason})", file=sys.stderr, flush=True)
    model = GPT(GPTConfig(**meta["model_config"]), machine.dtype, gradient_checkpointing)
    load_weights(folder, model, meta)
    return model.to(machine.device), tokenizer


def sha_of(meta):
    """The sha256 of a checkpoint's weights; "" if it is not known."""
    return meta.get("files", {}).get(path_of("", "model", meta.get("step", 0)), [0, ""])[1]


def sources(meta):
    """The checkpoints that a model came from, its parent first, as find_parent told them apart."""
    while meta and (meta := meta.get("source")):
        yield meta


def require_finite(folder, step, rows, loss, norm):
    """
    SystemExit where the loss of a step or the norm of its gradient is no number, before the weights are touched.

    From a finite gradient and the learning rates that the configurator allows follows a finite update.
    rows  of a step: the message names those of this one, counted from the first of the training data
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    finish_writing()                                             # the newest may be the one to go on from
    saved = steps_in(folder)
    remedy = (f"the checkpoint of step {saved[-1]} is from before: go on from it with --resume=1 and another --dtype, "
              "or train anew beside it with --model_tag=NEW and lower learning rates" if saved else
              "no checkpoint is there yet: begin anew, with lower learning rates or another --dtype")
    raise SystemExit(f"step {step}, rows {step * rows:,} to {(step + 1) * rows - 1:,} of the data: loss {loss}, "
                     f"gradient norm {norm}: the training has diverged; {remedy}" if RANK == 0 else 1)
