"""The optimizers against plain formulas."""
import pytest
import torch

from model import GPT, GPTConfig
from muon import Muon, build_optimizers, lr_multiplier, orthogonalize, set_schedule
from plumbing.budget import model_shape


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 64, 16), (2, 16, 64)])
def test_orthogonalize_brings_all_singular_values_near_one(shape):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(G, torch.float32))
    assert values.min() > 0.5 and values.max() < 1.3


def test_orthogonalize_is_the_polynomial_of_the_singular_values():
    G = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    U, S, V = torch.linalg.svd(G, full_matrices=False)
    s = S / (G.norm() + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    torch.testing.assert_close(orthogonalize(G[None], torch.float64)[0], U @ torch.diag(s) @ V)


def test_muon_steps_as_the_plain_formula_says():
    generator = torch.Generator().manual_seed(2)
    weights = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in ((6, 4), (4, 6), (6, 4))]
    mine = [w.detach().clone() for w in weights]
    momentum = [torch.zeros_like(w) for w in mine]
    optimizer = Muon(weights, lr=0.1, momentum=0.9, ns_dtype=torch.float32)
    for _ in range(3):
        for i, w in enumerate(weights):
            w.grad = torch.randn(w.shape, generator=generator)
            momentum[i] = 0.9 * momentum[i] + 0.1 * w.grad
            update = orthogonalize((0.1 * w.grad + 0.9 * momentum[i])[None], torch.float32)[0]
            mine[i] -= 0.1 * max(1.0, w.size(0) / w.size(1)) ** 0.5 * update
        optimizer.step()
    for w, m in zip(weights, mine):
        torch.testing.assert_close(w.detach(), m, rtol=1e-5, atol=1e-6)


def test_adamw_steps_as_the_plain_formula_says():
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=8, vocab_size=11, **model_shape(1)))
    adamw, _ = build_optimizers(model, 0.02, 0.2, 0.004)
    scale = (64 / 768) ** -0.5
    for p, lr in ((model.transformer.wte.weight, 0.2 * scale), (model.lm_head.weight, 0.004 * scale)):
        mine, m, v = p.detach().double().clone(), 0, 0
        group = next(g for g in adamw.param_groups if g["params"][0] is p)
        assert group["lr"] == pytest.approx(lr)
        for t in range(1, 4):
            p.grad = torch.randn_like(p)
            g = p.grad.double()
            m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
            mine -= lr * (m / (1 - 0.8 ** t)) / ((v / (1 - 0.95 ** t)).sqrt() + 1e-10)
            adamw.step()
        torch.testing.assert_close(p.detach().double(), mine, rtol=1e-5, atol=1e-6)
        p.grad = None


def test_every_parameter_belongs_to_exactly_one_optimizer():
    model = GPT(GPTConfig(sequence_len=8, vocab_size=11, **model_shape(2)))
    optimizers = build_optimizers(model, 0.02, 0.2, 0.004)
    owned = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert len(owned) == len(set(map(id, owned))) and {id(p) for p in model.parameters()} == set(map(id, owned))


def test_the_schedule_sets_rates_and_momentum():
    model = GPT(GPTConfig(sequence_len=8, vocab_size=11, **model_shape(2)))
    optimizers = build_optimizers(model, 0.02, 0.2, 0.004)
    muon = optimizers[1].param_groups[0]
    for step, momentum in ((0, 0.85), (150, 0.90), (300, 0.95), (9000, 0.95)):
        set_schedule(optimizers, 0.5, step)
        assert muon["lr"] == pytest.approx(0.01) and muon["momentum"] == pytest.approx(momentum)


def test_the_momentum_of_two_ranks_is_shared_out_to_one():
    weights = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(3)]
    optimizer = Muon(weights)
    saved = optimizer.state_dict()
    parts = [dict(saved, state={0: {"momentum": torch.arange(24.).view(2, 4, 3)}}),
             dict(saved, state={0: {"momentum": torch.arange(24., 36.).view(1, 4, 3)}})]
    optimizer.load_state_dict(optimizer.take_share(parts))
    assert torch.equal(optimizer.state[weights[0]]["momentum"], torch.arange(36.).view(3, 4, 3))


def test_the_learning_rate_stays_and_falls_to_zero_after_the_last_step():
    rates = [lr_multiplier(step, 10, 0.0, 0.2, 0.0) for step in range(11)]
    assert rates == pytest.approx([1] * 9 + [0.5, 0.0])


def test_the_learning_rate_warms_up_and_ends_at_its_final_share():
    assert lr_multiplier(0, 100, 0.1, 0.5, 0.05) == pytest.approx(0.1)
    assert lr_multiplier(9, 100, 0.1, 0.5, 0.05) == pytest.approx(1.0)
    assert lr_multiplier(75, 100, 0.1, 0.5, 0.05) == pytest.approx(0.525)
    assert lr_multiplier(100, 100, 0.1, 0.5, 0.05) == pytest.approx(0.05)


def test_fine_tuning_falls_all_the_way():
    assert [lr_multiplier(s, 4, 0.0, 1.0, 0.0) for s in range(4)] == pytest.approx([1, 0.75, 0.5, 0.25])
