"""
What a run costs before it runs: parameters, FLOPs, memory, steps, and the batch arithmetic.

Plain numbers in, plain numbers out; no torch. `config` is a GPTConfig, or anything with its
attributes. tests/test_budget.py holds the parameter counts against the real model.
"""

import re
from types import SimpleNamespace

HEAD_DIM = 128               # dimensions of one attention head, where the width allows it
KEEP = 2                     # checkpoints of a stage that stay on the disk: the newest and the one before
SHARD_TOKENS = 52e6          # tokens in a shard of web text, about 250M characters
SHARD_BYTES = 95e6           # and its size on the disk
MICRO_TOKENS = 65536         # most tokens of an automatic micro-batch: a GPU is busy long before
CPU_BYTES = 1e9              # what a training step may take of a CPU's memory

# Dense bf16 matrix peak of a device in FLOP/s, from the makers' datasheets; the first name that
# the device's own name contains counts. A device that is not here gets no MFU rather than a guess.
PEAK_FLOPS = {
    "A100": 312e12, "A800": 312e12, "A10G": 70e12, "A10": 125e12, "A40": 149.7e12, "A6000": 154.8e12,
    "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H800": 989e12,
    "GH200": 989e12, "B200": 2250e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
    "RTX 3090": 71e12, "RTX 4090": 165.2e12, "RTX 5090": 209.5e12,
}
# Their memory in GB; of a card that is sold in two sizes the smaller.
CARD_GB = {
    "A100": 40, "A800": 80, "A10G": 24, "A10": 24, "A40": 48, "A6000": 48, "H200": 141, "H100 PCIe": 80, "H100 NVL": 94,
    "H100": 80, "H800": 80, "GH200": 96, "B200": 180, "L40S": 48, "L40": 48, "L4": 24,
    "RTX 3090": 24, "RTX 4090": 24, "RTX 5090": 32,
}


def peak_flops(device_name):
    """FLOP/s of the device in bf16, or 0.0 when it is not in the table."""
    if "Laptop" in device_name:                      # slower than the card of the same name
        return 0.0
    return next((flops for name, flops in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), 0.0)


def card_bytes(device_name):
    """Memory of a card that is not here: what its name says (A100 80GB), else the table; 0.0 when it is not there."""
    said = re.search(r"(\d+) ?gb?\b(?!\.)", device_name, re.IGNORECASE)
    return 1e9 * (int(said[1]) if said else
                  next((gb for name, gb in CARD_GB.items() if re.search(rf"\b{name}\b", device_name)), 0))


def model_shape(depth, head_dim=0):
    """
    The one dial: width is 64 per layer, a head is 128 wide (64 where 128 does not divide).

    returns dict(n_layer, n_embd, n_head, n_kv_head); head_dim other than 0 is taken as given
    """
    n_embd = 64 * depth
    head_dim = head_dim or (HEAD_DIM if n_embd % HEAD_DIM == 0 else 64)
    if head_dim % 2 or n_embd % head_dim:
        raise SystemExit(f"head_dim={head_dim}: it must be even and divide the width {n_embd} (64 x depth)")
    n_head = n_embd // head_dim
    return dict(n_layer=depth, n_embd=n_embd, n_head=n_head, n_kv_head=n_head)


def num_params(config):
    """Parameters as dict(matrices, wte, lm_head, total); there are no biases and no norm weights."""
    C, kv_dim = config.n_embd, config.n_embd // config.n_head * config.n_kv_head
    matrices = config.n_layer * (2 * C * C + 2 * C * kv_dim + 8 * C * C)    # c_q, c_proj; c_k, c_v; the MLP: C x 4C twice
    table = config.vocab_size * C
    return dict(matrices=matrices, wte=table, lm_head=table, total=matrices + 2 * table)


def flops_per_token(config):
    """
    FLOPs of a forward and backward pass for one token.

    6 per parameter that multiplies (the embedding table is only looked up), and attention as if
    it were not causal, which is the convention of PaLM's appendix B (arXiv 2204.02311) and of
    the original nanochat; counting only the causal half gives 5 to 10 % less.
    """
    params = num_params(config)
    return 6 * (params["matrices"] + params["lm_head"]) + 12 * config.n_layer * config.n_embd * config.sequence_len


def rows_per_step(total_batch_size, max_seq_len):
    """
    Rows in one optimizer step: tokens wanted / row length, rounded to a multiple of 8.

    So 1, 2, 4 or 8 GPUs share a step evenly. 262,144 / 1,536 = 170.7 becomes 168 rows.
    """
    return max(8, 8 * round(total_batch_size / max_seq_len / 8))


def micro_batch(rows, world_size, asked, free_bytes, config, compute_bytes, gradient_checkpointing=False):
    """
    B, the rows of a micro-batch: as asked for, or (0) the most that fit into free_bytes and have at most MICRO_TOKENS.

    The rows of a step are given by the configuration, the micro-batch by the memory, so a
    smaller GPU changes the speed and never the training. A GPU then tries it (fit.py).
    """
    if rows < world_size:
        raise SystemExit(f"{rows} rows per step for {world_size} processes: each needs one; lower NPROC or raise "
                         "total_batch_size")
    room = free_bytes - state_bytes(config)
    fitting = min(room // row_bytes(config, compute_bytes, gradient_checkpointing), MICRO_TOKENS // config.sequence_len)
    return even_batch(-(-rows // world_size), max(1, asked or int(fitting)))


def even_batch(rows, most):
    """
    Rows of a micro-batch, at most `most`, so that as few as possible hold a rank's `rows` and are about equally large.

    A size that divides the rows counts for more than one up to a third larger: the last micro-batch
    is then as large as the others, and the compiler has one size to compile. 84 rows, at most 32: 28.
    """
    B = -(-rows // -(-rows // min(most, rows)))
    divisor = max(d for d in range(1, B + 1) if rows % d == 0)
    return divisor if 4 * divisor >= 3 * B else B


def largest_depth(free_bytes, config, compute_bytes):
    """The deepest model below config's depth of which a row fits with gradient checkpointing; at least 1."""
    for depth in range(config.n_layer - 1, 1, -1):
        smaller = SimpleNamespace(**{**vars(config), **model_shape(depth)})
        if state_bytes(smaller) + row_bytes(smaller, compute_bytes, True) <= free_bytes:
            return depth
    return 1


def steps_text(steps, rows, sequence_len, B):
    """The batch arithmetic for people: "800 steps of 2,048 tokens (8 rows of 256, 8 at a time)"."""
    return f"{steps:,} steps of {rows * sequence_len:,} tokens ({rows} rows of {sequence_len:,}, {B} at a time)"


def usable_bytes(gpu_bytes):
    """
    Of a GPU's memory what weights, optimizer and activations may take: a tenth stays for
    fragments, 4 GB for one chunk of logits with its gradient and for workspaces.
    """
    return 0.9 * gpu_bytes - 4e9


def state_bytes(config):
    """float32 weights, gradients and momentum (12 bytes a parameter), a second moment for the tables."""
    params = num_params(config)
    return 12 * params["total"] + 4 * (params["wte"] + params["lm_head"])


def checkpoint_bytes(config):
    """Disk that one checkpoint takes: the state without the gradients."""
    return state_bytes(config) - 4 * num_params(config)["total"]


def row_bytes(config, compute_bytes, gradient_checkpointing):
    """
    Memory of one row of a micro-batch in a training step, in bytes.

    Per token and layer 10 values of the model's width stay for the backward pass, compiled or not:
    what the two norms, q, k, v, attention and relu^2 (4) give; 4 more at the two ends. With gradient
    checkpointing one per layer, and 20 for the layer at work and its gradients. The logits do not
    count: model.py makes them a chunk of tokens at a time. Predicted, not measured, for a compiled
    step: d12 T 1,024 B 64 16.6 GB, d14 T 1,536 B 42 21.8, d16 T 2,048 B 32 28.4, d18 35.7, d20 B 16
    26.9; these rows, state_bytes and 1.5 GB (a chunk, copies of weights) make that to within 4 %.
    """
    kept = config.n_layer + 20 if gradient_checkpointing else 10 * config.n_layer + 4
    return config.sequence_len * config.n_embd * kept * compute_bytes


def peak_bytes(config, B, compute_bytes, gradient_checkpointing=False):
    """
    Most memory that a training step in micro-batches of B rows holds, in bytes, without what the device's driver takes.

    The state, the rows, and at the output head one chunk of logits (model.CHUNK_LOGITS: 1.1 GB), the weight and its
    gradient. Within 3 % of what is predicted from generated code at d12 (B 64) and d18 (B 16, T 2,048).
    """
    head = 4 * 2 ** 28 + (4 + compute_bytes) * config.vocab_size * config.n_embd
    return state_bytes(config) + B * row_bytes(config, compute_bytes, gradient_checkpointing) + head


def eval_rows(sequence_len, tokens_per_step, total_steps, eval_every, eval_tokens, final_eval_tokens):
    """
    Rows that evaluations of bits per byte score -> (during the run, at its end).

    During the run eval_tokens, or 2 % of the tokens trained between two evaluations; at the end
    final_eval_tokens. Never more than a tenth of what was trained, so that a short try is short,
    and never fewer than 8 rows, in which there is something to score.
    """
    between = tokens_per_step * (eval_every or total_steps)
    during = min(eval_tokens or between // 50, between // 10)
    final = min(final_eval_tokens, tokens_per_step * total_steps // 10)
    return max(8, during // sequence_len), max(8, final // sequence_len)
