"""
The training step as the original does it, written plainly: what python -m bench.train --compare=1 compares ours with.

The logits of all tokens at once and in float32, and Muon one matrix after the other. Parameters, first weights,
hyperparameters and batch are ours, so a step gives the same result within rounding; only time and memory differ.
"""
import torch
import torch.nn.functional as F

from model import LOGIT_CAP, GPT
from muon import NS_A, NS_B, NS_C


class PlainGPT(GPT):
    """Our parameters under a forward pass of its own, of torch's ordinary operations alone."""

    def forward(self, idx, targets):
        """idx, targets (B, T) int64, -1 = not scored -> loss in nats, summed over the scored tokens"""
        B, T = idx.shape
        dtype, width = self.compute_dtype, (self.config.n_embd,)
        cos, sin = self.cos[:, :T].to(dtype), self.sin[:, :T].to(dtype)
        x = F.rms_norm(F.embedding(idx, self.transformer.wte.weight).to(dtype), width)
        for block in self.transformer.h:
            x = x + attention(block.attn, F.rms_norm(x, width), cos, sin)
            hidden = F.relu(product(F.rms_norm(x, width), block.mlp.c_fc)).square()         # (B, T, 4C)
            x = x + product(hidden, block.mlp.c_proj)
        logits = product(F.rms_norm(x, width), self.lm_head).view(B * T, -1)                # (B*T, V)
        logits = (LOGIT_CAP * torch.tanh(logits / LOGIT_CAP)).float()                       # capped, then made float32
        return F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum")


def product(x, layer):
    return F.linear(x, layer.weight.to(x.dtype))


def attention(layer, x, cos, sin):
    """Causal self-attention of x (B, T, C), with rotary positions and then normalised queries and keys."""
    B, T, C = x.shape
    q, k, v = (product(x, c).view(B, T, -1, layer.head_dim) for c in (layer.c_q, layer.c_k, layer.c_v))
    q, k = (F.rms_norm(turned(t, cos, sin), (layer.head_dim,)) for t in (q, k))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))                                        # (B, H, T, D)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=layer.n_kv_head != layer.n_head)
    return product(y.transpose(1, 2).reshape(B, T, C), layer.c_proj)


def turned(x, cos, sin):
    """x (B, T, H, D) with the pairs (x[d], x[d + D/2]) turned by minus their position's angle."""
    a, b = x.chunk(2, dim=3)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=3)


def newton_schulz(G, dtype):
    """One matrix G (rows, cols) -> the same with singular values near 1, after five iterations."""
    X = G.to(dtype)
    if G.size(0) > G.size(1):
        X = X.t()
    X = X / (X.norm() + 1e-7)
    for _ in range(5):
        A = X @ X.t()
        X = NS_A * X + (NS_B * A + NS_C * A @ A) @ X
    return (X.t() if G.size(0) > G.size(1) else X).to(G.dtype)


class PlainMuon(torch.optim.Optimizer):
    """Muon that takes the matrices one after the other; orthogonalize is newton_schulz, or that compiled."""

    def __init__(self, params, lr, dtype, orthogonalize):
        self.dtype, self.orthogonalize = dtype, orthogonalize
        super().__init__(params, dict(lr=lr, momentum=0.95))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = self.orthogonalize(p.grad.lerp(state["momentum"], group["momentum"]), self.dtype)
                p.add_(update, alpha=-group["lr"] * max(1.0, p.size(0) / p.size(1)) ** 0.5)


def build_optimizers(model, matrix_lr, embedding_lr, unembedding_lr, compiled=False):
    """
    -> [AdamW, Muon] as muon.build_optimizers makes them, so that muon.set_schedule can set their rates.

    compiled  the Newton-Schulz iterations too, as the original has them wherever it compiles the model
    """
    scale = (model.config.n_embd / 768) ** -0.5
    tables = [dict(params=[model.transformer.wte.weight], lr=embedding_lr * scale),
              dict(params=[model.lm_head.weight], lr=unembedding_lr * scale)]
    adamw = torch.optim.AdamW(tables, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    dtype = torch.bfloat16 if model.device.type == "cuda" else model.compute_dtype
    orthogonalize = torch.compile(newton_schulz, dynamic=False) if compiled else newton_schulz
    muon = PlainMuon(model.matrices(), matrix_lr, dtype, orthogonalize)
    for optimizer in (adamw, muon):
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return [adamw, muon]


def clip(model, loss, grad_clip):
    """The gradient scaled down where its norm is above grad_clip -> (loss, norm before clipping) as floats."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    return loss.item(), norm.item()
