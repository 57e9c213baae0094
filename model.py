"""
The transformer. GPT(config) maps token ids to logits, or to a loss where targets are given.

It is nanochat's model of autumn 2025, and the names and shapes in its state dict are the same:
rotary positions, normalised queries and keys, RMSNorm without weights, relu^2, no biases, an
output head of its own whose logits are soft-capped. Needs torch alone.

B rows, T tokens a row, C channels (n_embd), H heads, D channels a head, V vocabulary
"""
import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

LOGIT_CAP = 15.0       # logits live in (-15, 15): 15 * tanh(logits / 15)
NORM_EPS = torch.finfo(torch.float32).eps          # whatever the model computes in
ROPE_BASE = 10000.0    # the slowest rotary channel turns once in about 2 pi * 10,000 tokens
CHUNK_LOGITS = 2 ** 28 # logits made at a time on a GPU: 4,096 tokens at V = 65,536, 1 GB in float32
CHUNK_CPU = 256        # tokens at a time on a CPU: with fewer the products are too small to be fast


@dataclass
class GPTConfig:
    sequence_len: int = 1024
    vocab_size: int = 65536
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6     # fewer than n_head: several query heads share a key/value head
    n_embd: int = 768


class RMSNorm(torch.autograd.Function):
    """F.rms_norm, whose backward pass needs its output y, which the next product keeps anyway, and one number a row."""

    @staticmethod
    def forward(ctx, x):
        wide = x.float()
        r = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + NORM_EPS)
        y = wide * r
        if x.dtype != y.dtype:              # torch 2.11, compiled, loses the gradient at a .to() that changes nothing
            y = y.to(x.dtype)
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, r = ctx.saved_tensors
        g, wide = grad.float(), y.float()
        # dx = r (dy - y mean(dy y))
        return torch.addcmul(g, wide, (g * wide).mean(dim=-1, keepdim=True), value=-1).mul_(r).to(y.dtype)


class ReluSquared(torch.autograd.Function):
    """relu(x)^2, whose backward pass needs its result y alone."""

    @staticmethod
    def forward(ctx, x):
        y = F.relu(x).square()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        # dx = 2 sqrt(y) dy; a CPU takes eight times as long for the root of exactly zero, which half of y is
        return (ctx.saved_tensors[0] + 1e-37).sqrt_().mul_(grad).mul_(2)


def norm(x):
    """RMSNorm without a learned weight: the mean square over the last dimension becomes 1."""
    if torch.is_grad_enabled():
        return RMSNorm.apply(x)
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)            # quicker to call, which generation notices


def relu_squared(x):
    """As good as GELU, and sparse (arXiv 2109.08668)."""
    return ReluSquared.apply(x) if torch.is_grad_enabled() else F.relu(x).square()


class Linear(nn.Module):
    """y = x W^T. The weight is kept in float32 and multiplied in the type that x has."""

    def __init__(self, fan_in, fan_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def rotary_table(T, D, device=None):
    """cos and sin of position x frequency, (1, T, 1, D/2), float32 whatever the model computes in."""
    frequency = 1.0 / (ROPE_BASE ** (torch.arange(0, D, 2, dtype=torch.float32, device=device) / D))
    angle = torch.outer(torch.arange(T, dtype=torch.float32, device=device), frequency)
    return angle.cos()[None, :, None, :], angle.sin()[None, :, None, :]


def rotate(x, cos, sin):
    """
    Turn the pairs (x[d], x[d + D/2]) of x (B, T, H, D) by minus their position's angle.

    The product of two turned vectors depends on the distance between their positions alone.
    source: RoFormer, arXiv 2104.09864; the direction of the turn is nanochat's
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention: every token looks at itself and at what came before."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim = config.n_embd // config.n_head
        self.c_q = Linear(config.n_embd, self.n_head * self.head_dim)
        self.c_k = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.c_v = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, cos, sin, kv_cache):
        B, T, C = x.shape
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)
        # norm after the turn: the attention scores are bounded, which keeps training steady
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        mask = None
        if kv_cache is not None:
            k, v, mask = kv_cache.append(self.layer, k, v)                 # (B, H_kv, T_all, D) both
        # without a mask nothing came before the T tokens, or T is 1, which sees all
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1,
                                           enable_gqa=self.n_kv_head != self.n_head)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """C to 4C and back, with relu^2 between."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(relu_squared(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, kv_cache):
        x = x + self.attn(norm(x), cos, sin, kv_cache)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """
    compute_dtype is what the matrices are multiplied in; the weights themselves are float32.
    gradient_checkpointing drops each layer's activations and makes them again on the way back.
    """

    def __init__(self, config, compute_dtype=torch.float32, gradient_checkpointing=False):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd, _weight=torch.empty(config.vocab_size, config.n_embd)),
            h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
        ))
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        cos, sin = rotary_table(config.sequence_len, config.n_embd // config.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.compiled_parts, self.compiled_shapes = None, set()     # see compiled()
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """
        Every block adds nothing at first (c_proj is zero) and every token as equally likely
        (lm_head is zero), so the first loss is ln(V). The other matrices keep the size of what
        passes through them: std = min(1, sqrt(fan_out / fan_in)) / sqrt(fan_in).
        """
        nn.init.normal_(self.transformer.wte.weight, std=1.0)
        nn.init.zeros_(self.lm_head.weight)
        for block in self.transformer.h:
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.weight)
            for layer in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.c_fc):
                fan_out, fan_in = layer.weight.shape
                nn.init.normal_(layer.weight, std=min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in))

    @property
    def device(self):
        return self.lm_head.weight.device

    def matrices(self):
        """The parameters Muon trains: every matrix between the embedding and the head."""
        return list(self.transformer.h.parameters())

    def forward(self, idx, targets=None, kv_cache=None, positions=None, weights=None):
        """
        idx        (B, T) int64 token ids
        targets    (B, T) int64, the token wanted after each; -1 = not scored
        kv_cache   engine.KVCache: idx continues what it holds, and is added to it
        positions  (B,) int64: the one place in each row whose logits are wanted
        weights    (B,) float32: how often the losses of each row count, which may be negative; None = once

        returns  logits (B, T, V) float32, or (B, V) at the positions; with targets the loss instead, in nats,
                 summed over the scored tokens
        """
        # on an H100 attention is cuDNN's by default, and plans, for tens of milliseconds, each shape that it has not met:
        # good for training, which has few
        torch.backends.cuda.enable_cudnn_sdp(targets is not None)
        if targets is None:
            x = self.trunk(idx, kv_cache)
            if positions is not None:
                x = x[torch.arange(len(x), device=x.device), positions]    # (B, C)
            return capped(self.lm_head(x))
        parts = self.compiled_parts or EAGER
        if self.compiled_parts:
            self.compiled_shapes.add(idx.shape)
        x, y = self.trunk(idx, kv_cache, parts).flatten(0, 1), targets.flatten()       # (B*T, C), (B*T,)
        if weights is not None:
            weights = weights[:, None].expand_as(targets).flatten()        # (B*T,)
        if x.device.type == "cpu" and (y < 0).any():
            # a CPU skips the tokens nobody scores; a GPU would have to wait to learn how many there are
            x, y, weights = x[y >= 0], y[y >= 0], None if weights is None else weights[y >= 0]
        return capped_cross_entropy(x, self.lm_head.weight, y, parts.loss_chunk, weights)

    @torch.no_grad()
    def score(self, idx, targets, kv_cache=None):
        """
        For evaluation: how well the n scored targets are predicted, row after row.

        A compiled model uses what is compiled for batches of a shape that it is trained on; any other, such as the
        last rows of an evaluation, comes too seldom.

        returns  their losses in nats, (n,) float32, and the likeliest token in the place of each, (n,) int64
        """
        fast = self.compiled_parts and kv_cache is None and idx.shape in self.compiled_shapes
        parts = self.compiled_parts if fast else EAGER
        torch.backends.cuda.enable_cudnn_sdp(bool(fast))                   # see forward()
        x, y = self.trunk(idx, kv_cache, parts).flatten(0, 1), targets.flatten()
        if not fast:                                                       # then shapes may differ from batch to batch
            x, y = x[y >= 0], y[y >= 0]
        w = self.lm_head.weight.to(x.dtype)
        losses, best = zip(*[parts.score_chunk(x[rows], w, y[rows]) for rows in chunks(x, w)])
        return torch.cat(losses)[y >= 0], torch.cat(best)[y >= 0]

    def embed(self, idx):
        """What the first block takes: (B, T) int64 -> (B, T, C), normalised."""
        return norm(self.transformer.wte(idx).to(self.compute_dtype))

    def trunk(self, idx, kv_cache=None, parts=None):
        """Everything but the output head: (B, T) int64 -> (B, T, C), normalised."""
        parts = parts or EAGER
        T = idx.size(1)
        assert T <= self.config.sequence_len, f"{T} tokens in a context of {self.config.sequence_len}"
        at = slice(T) if kv_cache is None else kv_cache.begin(T)           # the positions of these tokens
        cos, sin = self.cos[0, at], self.sin[0, at]
        x = parts.embed(self, idx)
        for block in self.transformer.h:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(parts.block, block, x, cos, sin, None, use_reentrant=False)
            else:
                x = parts.block(block, x, cos, sin, kv_cache)
        if kv_cache is not None:
            kv_cache.advance(T)
        return parts.norm(x)


def capped(logits):
    """Logits soft-capped to (-15, 15); in float32, where the cap does not round away what tells tokens apart."""
    return LOGIT_CAP * torch.tanh(logits.float() / LOGIT_CAP)


def chunks(x, weight):
    """Slices over the tokens of x (N, C), so many that their logits (n, V) are not too much at a time."""
    N, cpu = x.size(0), x.device.type == "cpu"
    number = max(1, math.ceil(N / (CHUNK_CPU if cpu else max(1, CHUNK_LOGITS // weight.size(0)))))
    if not cpu:                             # of one size if they can be: another is compiled on its own
        number = next((n for n in range(number, 2 * number) if N % n == 0), number)
    size = CHUNK_CPU if cpu else max(1, math.ceil(N / number))
    return [slice(start, start + size) for start in range(0, max(1, N), size)]  # of no tokens one, which is empty


def loss_chunk(x, w, y, grad_w, weights=None):
    """
    The loss of n tokens, see CappedCrossEntropy, and its gradients.

    x (n, C), w (V, C) of x's type, y (n,); grad_w (V, C) float32: the gradient of w is added to it; weights (n,)
    returns  the loss, float32, and the gradient of x
    """
    # tanh(u) = 2 sigmoid(2u) - 1, so with s = sigmoid(2 z / cap) the capped logit is 2 cap s - cap
    s = F.linear(x, w).float().mul_(2 / LOGIT_CAP).sigmoid_()                        # (n, V)
    scored, y = (y >= 0).float()[:, None], y.clamp(min=0)[:, None]                   # (n, 1) both
    if weights is not None:
        scored = scored * weights[:, None]
    if torch.compiler.is_compiling():
        # two passes over the product make d, and nothing else of (n, V) is stored: logits this small need no maximum
        # taken off before exp, and one number in a row is picked and marked by comparing
        p = torch.exp(2 * LOGIT_CAP * s - LOGIT_CAP)
        p = p / p.sum(dim=1, keepdim=True)
        hot = (torch.arange(p.size(1), device=p.device) == y).float()
        p_y, p = (p * hot).sum(dim=1, keepdim=True), p - hot
    else:
        p = torch.softmax(2 * LOGIT_CAP * s, dim=1)
        p_y = p.gather(1, y)
        p.scatter_add_(1, y, torch.full_like(scored, -1.0))
    loss = -(p_y.log() * scored).sum()                                               # p is at least e^-30 / V
    # d loss / d z = (probability - one hot) * d (2 cap s) / d z = (p - 1[y]) * 4 s (1 - s)
    p.mul_(s)
    d, scale = p.addcmul_(p, s, value=-1).to(x.dtype), (4 * scored).to(x.dtype)
    grad_w += d.t() @ (x * scale)
    return loss, (d @ w) * scale


def score_chunk(x, w, y):
    """x (n, C), w (V, C), y (n,) -> each token's loss in nats, 0 where y is -1, and the likeliest token, (n,) both."""
    logits = capped(F.linear(x, w))
    return F.cross_entropy(logits, y, ignore_index=-1, reduction="none"), logits.argmax(dim=1)


@torch.compiler.disable(recursive=False)       # a graph never holds the loop: see compiled(); torch 2.11 would lose gradients
def capped_cross_entropy(x, weight, targets, chunk, weights):
    return CappedCrossEntropy.apply(x, weight, targets, chunk, weights)


class CappedCrossEntropy(torch.autograd.Function):
    """
    The loss, without ever storing the logits. What it computes, and its gradients:

        scored = targets >= 0
        logits = 15 * tanh(x @ weight.T / 15)
        losses = logsumexp(logits, dim=1) - logits[arange(N), targets]
        return (weights * losses)[scored].sum()

    At V = 65,536 the logits and their gradient would need as much memory as the whole rest of a
    d12 step. Here they exist for a few thousand tokens at a time: each chunk's loss is taken and
    its gradients are made at once, which costs the three matrix products that the plain way
    costs as well. measured on two CPU cores in float32, 2026-11: 2,048 tokens at V = 4,096 take 53 ms,
    157 ms all at once; a d4's step of 4,096 tokens at V = 65,536 6.3 s and 1.4 GB, 13.0 s and 5.3 GB
    """

    @staticmethod
    def forward(ctx, x, weight, targets, chunk=loss_chunk, weights=None):
        """x (N, C), weight (V, C) float32, targets (N,) int64 with -1 = not scored, weights (N,), None = 1 -> nats, float32"""
        total, w = torch.zeros((), device=x.device), weight.to(x.dtype)
        grad_x, grad_w = torch.empty_like(x), torch.zeros_like(weight)
        for rows in chunks(x, weight):
            loss, grad_x[rows] = chunk(x[rows], w, targets[rows], grad_w, None if weights is None else weights[rows])
            total += loss
        ctx.save_for_backward(grad_x, grad_w)
        return total

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad, grad_w * grad, None, None, None


# what a pass takes its time for; self comes first where it is a method
EAGER = SimpleNamespace(embed=GPT.embed, block=Block.forward, norm=norm, loss_chunk=loss_chunk, score_chunk=score_chunk)


def compiled(model):
    """
    Compile what model(idx, targets), the loss, takes its time for -> the model itself.

    Its parts are compiled, and the loops over the blocks and over the chunks of logits stay Python. So the blocks, which
    differ in nothing but their weights, are compiled once for all: for a d12 that takes a fifth of the time, and its
    step is predicted to be as fast. Their gradients are ready one block after the other, and exchanged meanwhile. And a
    loop over chunks would be unrolled, the products of all of them put off to its end, with the memory that takes.
    Each new shape of idx is compiled anew, with gradients and without, up to torch._dynamo.config.recompile_limit (8)
    times: a run should have few.
    """
    model.compiled_parts = SimpleNamespace(**{name: torch.compile(part, dynamic=False) for name, part in vars(EAGER).items()})
    return model
