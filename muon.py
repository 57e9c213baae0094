"""
The optimizers: Muon for the matrices of the transformer, AdamW for the two token tables.

Muon takes the momentum of a matrix and sets all its singular values to (about) 1, so that no
direction of the matrix is left behind because its gradient is small.
source: Keller Jordan, https://kellerjordan.github.io/posts/muon/

Why not Muon for the tables: in a matrix of a block every direction acts on every token, while a row of a table belongs
to one token, and few tokens are in a batch. Equal singular values would move the rows of rare tokens as far as those of
common ones; AdamW gives every entry a step size of its own.

One implementation serves one process and several: with torchrun each rank does the arithmetic
for its share of the matrices and the ranks exchange the results. Needs torch alone.
"""
import torch
import torch.distributed as dist

# the quintic whose repetition drives singular values towards 1, tuned for steepness at 0
NS_A, NS_B, NS_C = 3.4445, -4.7750, 2.0315


def orthogonalize(G, dtype, steps=5):
    """
    G (n, rows, cols): n matrices -> the same with singular values of about 0.7 ... 1.2.

    Those below 0.003 of the matrix's norm grow, but do not get there.

    Newton-Schulz: X <- aX + b(XX^T)X + c(XX^T)^2 X works on the singular values as the odd
    polynomial a*s + b*s^3 + c*s^5 does, without a singular value decomposition.
    """
    X = G.to(dtype)
    tall = X.size(-2) > X.size(-1)
    if tall:
        X = X.mT                                                 # XX^T is then the small one
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)          # all singular values at most 1
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=NS_B, alpha=NS_C)        # NS_B A + NS_C AA, and the sum is no pass of its own
        X = torch.baddbmm(X, B, X, beta=NS_A)
    return (X.mT if tall else X).to(G.dtype)


class Muon(torch.optim.Optimizer):
    """
    params    2-D parameters; those of one shape are stacked and updated together
    momentum  of the moving average of the gradients, applied the Nesterov way
    ns_dtype  what orthogonalize computes in: bfloat16 is enough where it is fast
    """

    def __init__(self, params, lr=0.02, momentum=0.95, ns_dtype=torch.bfloat16):
        by_shape = {}
        for p in params:
            by_shape.setdefault(p.shape, []).append(p)
        self.ns_dtype = ns_dtype
        super().__init__([dict(params=group) for group in by_shape.values()], dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, own = group["params"], self.own(group)
            share = share_size(params)
            update = torch.zeros(share, *params[0].shape, device=params[0].device)
            if own:
                update[:len(own)] = self.direction(group, torch.stack([p.grad for p in own]))
            if world_size() > 1:
                parts = [torch.empty_like(update) for _ in range(world_size())]
                dist.all_gather(parts, update)
                update = torch.cat(parts)                        # rank after rank = params in order
            rows, cols = params[0].shape
            scale = max(1.0, rows / cols) ** 0.5                 # tall matrices move more per entry
            torch._foreach_add_(params, list(update[:len(params)].unbind()), alpha=-group["lr"] * scale)

    def direction(self, group, grads):
        """(n, rows, cols) gradients of the rank's own matrices -> where to move, before lr."""
        state, beta = self.state[group["params"][0]], group["momentum"]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(grads)
        average = state["momentum"].lerp_(grads, 1 - beta)
        return orthogonalize(grads.lerp(average, beta), self.ns_dtype)

    def own(self, group):
        """The parameters of a group whose update this rank computes."""
        first = rank() * share_size(group["params"])
        return group["params"][first:first + share_size(group["params"])]

    def take_share(self, states):
        """
        State dicts that all ranks of an earlier run saved -> the one for this rank.

        So a run continues on another number of GPUs: the momentum of all ranks, laid end to
        end, stands in the order of the parameters.
        """
        merged = dict(states[0], state={})
        index = 0
        for group in self.param_groups:
            parts = [s["state"][index]["momentum"] for s in states if index in s["state"]]
            first, own = rank() * share_size(group["params"]), len(self.own(group))
            if parts and own:
                merged["state"][index] = {"momentum": torch.cat(parts)[first:first + own].clone()}
            index += len(group["params"])
        return merged


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def share_size(params):
    """How many matrices of a group one rank updates, rounded up."""
    return -(-len(params) // world_size())


def build_optimizers(model, matrix_lr, embedding_lr, unembedding_lr):
    """
    -> [AdamW, Muon]; every group remembers its learning rate as initial_lr.

    The rates of the tables fall with the root of the width, from width 768,
    where they were tuned; Muon's update has the same size at every width and needs no such rule.
    """
    scale = (model.config.n_embd / 768) ** -0.5
    tables = [dict(params=[model.transformer.wte.weight], lr=embedding_lr * scale),
              dict(params=[model.lm_head.weight], lr=unembedding_lr * scale)]
    adamw = torch.optim.AdamW(tables, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    ns_dtype = torch.bfloat16 if model.device.type == "cuda" else model.compute_dtype
    muon = Muon(model.matrices(), lr=matrix_lr, ns_dtype=ns_dtype)
    for optimizer in (adamw, muon):
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return [adamw, muon]


def lr_multiplier(step, num_iterations, warmup_ratio, warmdown_ratio, final_lr_frac):
    """
    What the learning rates are multiplied with at optimizer step `step` (counted from 0).

    A line up over the first warmup_ratio of the run, 1, then a line down to final_lr_frac over
    the last warmdown_ratio. The line ends at num_iterations, so the last step still moves.
    """
    warmup, warmdown = warmup_ratio * num_iterations, warmdown_ratio * num_iterations
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    left = num_iterations - step
    if left >= warmdown:
        return 1.0
    return final_lr_frac + (1 - final_lr_frac) * left / warmdown


def set_schedule(optimizers, multiplier, step):
    """
    For this step: the learning rates, the multiplier times what they were built with, and Muon's momentum, 0.85 -> 0.95
    over the first 300 steps.

    returns dict(matrix_lr, embedding_lr, unembedding_lr), the rates as they are now
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
            if "momentum" in group:
                group["momentum"] = 0.85 + 0.10 * min(step / 300, 1.0)
    adamw, muon = optimizers
    wte, lm_head = adamw.param_groups
    return dict(matrix_lr=muon.param_groups[0]["lr"], embedding_lr=wte["lr"], unembedding_lr=lm_head["lr"])
