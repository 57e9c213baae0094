"""Laws of the model: what it must be, whatever its weights."""
import functools
import math

import pytest
import torch
import torch.nn.functional as F

import model as model_module
from engine import KVCache
from model import GPT, LOGIT_CAP, NORM_EPS, CappedCrossEntropy, GPTConfig, compiled, loss_chunk, norm, relu_squared
from plumbing.budget import flops_per_token, model_shape, num_params


def small(depth=2, vocab_size=97, head_dim=32, n_kv_head=0, seed=0, trained=True):
    """A small model; `trained` fills the matrices that start at zero."""
    torch.manual_seed(seed)
    shape = model_shape(depth, head_dim)
    shape["n_kv_head"] = n_kv_head or shape["n_head"]
    model = GPT(GPTConfig(sequence_len=64, vocab_size=vocab_size, **shape))
    if trained:
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn_like(p) * (1.0 if p is model.transformer.wte.weight else 0.1))
    return model


def tokens(model, B=2, T=17, seed=1):
    return torch.randint(0, model.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def test_the_first_loss_is_the_log_of_the_vocabulary():
    model = small(trained=False)
    idx = tokens(model)
    assert model(idx, idx).item() / idx.numel() == pytest.approx(math.log(97), rel=1e-6)


def test_a_token_cannot_change_the_logits_before_it():
    model = small()
    idx = tokens(model)
    other = idx.clone()
    other[:, 9:] = (other[:, 9:] + 1) % 97
    a, b = model(idx), model(other)
    assert torch.equal(a[:, :9], b[:, :9]) and not torch.equal(a[:, 9], b[:, 9])


def test_logits_stay_below_the_cap_and_are_float32():
    model = small()
    model.lm_head.weight.data *= 1000
    logits = model(tokens(model))
    assert logits.dtype == torch.float32 and logits.abs().max() <= LOGIT_CAP


def test_every_weight_is_written_by_init_weights(monkeypatch):
    model = small(trained=False)
    for p in model.parameters():
        torch.nn.init.constant_(p, float("nan"))
    model.init_weights()
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("chunk", [1, 5, 10_000])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("body", [loss_chunk, torch.compile(loss_chunk, backend="aot_eager", dynamic=False)])
def test_the_chunked_loss_and_its_gradients_are_those_of_the_plain_one(monkeypatch, chunk, masked, body):
    monkeypatch.setattr(model_module, "CHUNK_CPU", chunk)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(23, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.randn(50, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 50, (23,), generator=generator)
    if masked:
        y[::3] = -1
    plain = F.cross_entropy(LOGIT_CAP * torch.tanh((x @ w.t()) / LOGIT_CAP), y, ignore_index=-1, reduction="sum")
    want = torch.autograd.grad(plain, (x, w))
    loss = CappedCrossEntropy.apply(x, w, y, body)
    got = torch.autograd.grad(3 * loss, (x, w))
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for g, v in zip(got, want):                          # float32 inside, so not to the last digit
        torch.testing.assert_close(g / 3, v, rtol=1e-4, atol=1e-5)


def test_the_loss_is_finite_and_right_where_the_cap_is_reached():
    x = torch.tensor([[1000.0, 0.0], [-1000.0, 1000.0]], requires_grad=True)
    w = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    y = torch.tensor([1, 0])                             # as wrong as can be
    plain = F.cross_entropy(LOGIT_CAP * torch.tanh((x @ w.t()) / LOGIT_CAP), y, reduction="sum")
    loss = CappedCrossEntropy.apply(x, w, y)
    loss.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6) and torch.isfinite(x.grad).all() and torch.isfinite(w.grad).all()


def test_the_sum_of_the_token_losses_is_the_loss():
    model = small()
    idx = tokens(model)
    y = idx.clone()
    y[0, :5] = -1
    each, best = model.score(idx, y)
    assert each.shape == best.shape == ((y >= 0).sum(),)
    losses, best = model.score(idx, torch.full_like(idx, -1))
    assert losses.shape == best.shape == (0,)
    assert each.sum().item() == pytest.approx(model(idx, y).item(), rel=1e-5)


def test_rows_count_as_often_as_their_weights_say():
    model, other = small(), small()
    idx = tokens(model, B=3)
    y = idx.clone()
    y[0, :5] = -1
    weighted = model(idx, y, weights=torch.tensor([0.5, 0.0, -2.0]))
    weighted.backward()
    each = 0.5 * other(idx[:1], y[:1]) - 2 * other(idx[2:], y[2:])
    each.backward()
    torch.testing.assert_close(weighted, each)
    same_gradients(model, other)


def test_a_fully_masked_batch_has_loss_and_gradients_zero():
    model = small()
    idx = tokens(model)
    loss = model(idx, torch.full_like(idx, -1))
    loss.backward()
    assert loss.item() == 0 and all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def test_logits_at_positions_are_those_of_the_full_pass():
    model = small()
    idx = tokens(model)
    at = torch.tensor([3, 16])
    torch.testing.assert_close(model(idx, positions=at), model(idx)[torch.arange(2), at])


def test_gradient_checkpointing_changes_nothing():
    plain, saving = small(), small()
    saving.gradient_checkpointing = True
    idx = tokens(plain)
    for model in (plain, saving):
        model(idx, idx).backward()
    for a, b in zip(plain.parameters(), saving.parameters()):
        assert torch.equal(a.grad, b.grad)


def same_gradients(a, b):
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


def test_compiled_loss_equals_eager_loss():
    model, other = small(), small()
    idx = tokens(model)
    a, b = model(idx, idx), torch.compile(other, backend="aot_eager")(idx, idx)   # traces all, needs no C compiler
    a.backward()
    b.backward()
    torch.testing.assert_close(a, b)
    same_gradients(model, other)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_equals_eager_and_only_training_shapes_are_compiled(monkeypatch, checkpointing):
    from torch._dynamo.utils import counters
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    monkeypatch.setattr(model_module, "CHUNK_CPU", 8)
    model, other = small(depth=3), small(depth=3)
    other.gradient_checkpointing = checkpointing
    idx, forward = tokens(model, B=2, T=17), compiled(other)                     # 34 tokens: the last chunk has 2
    for _ in range(2):
        a, b = model(idx, idx), forward(idx, idx)
        a.backward()
        b.backward()
        torch.testing.assert_close(a, b)
    same_gradients(model, other)
    assert counters["stats"]["unique_graphs"] == 5                # tokens, all blocks, norm, a chunk, the last chunk
    for rows, graphs in ((2, 10), (1, 10)):                                      # without gradients they are others
        scores, want = other.score(idx[:rows], idx[:rows]), model.score(idx[:rows], idx[:rows])
        torch.testing.assert_close(scores[0], want[0])
        assert torch.equal(scores[1], want[1]) and counters["stats"]["unique_graphs"] == graphs
    y = idx.clone()
    y[0, :5] = -1
    torch.testing.assert_close(other.score(idx, y)[0], model.score(idx, y)[0])
    assert counters["stats"]["unique_graphs"] == 10
    cache = KVCache(other, 2, 20)
    with torch.no_grad():
        torch.testing.assert_close(other(idx, kv_cache=cache), model(idx))
    assert counters["stats"]["unique_graphs"] == 10


def test_on_a_gpu_chunks_are_alike_where_they_can_be():
    def sizes(N, V=65536):
        weight = torch.empty(V, 8, device="meta")
        covered = [range(N)[rows] for rows in model_module.chunks(torch.empty(N, 8, device="meta"), weight)]
        assert [i for part in covered for i in part] == list(range(N))
        return [len(part) for part in covered]
    assert sizes(65536) == [4096] * 16 and sizes(42 * 1536) == [4032] * 16 and sizes(43 * 1536) == [2752] * 24
    assert sizes(300) == [300] and sizes(0) == [0] and sizes(4099) == [2050, 2049]
    assert sizes(7, V=2 ** 30) == [1] * 7


@pytest.mark.parametrize("ours, plain", [(norm, lambda x: F.rms_norm(x, x.shape[-1:], eps=NORM_EPS)),
                                         (relu_squared, lambda x: F.relu(x).square())])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_functions_with_a_backward_pass_of_their_own(ours, plain, dtype, tolerance):
    generator = torch.Generator().manual_seed(5)
    for size in (1.0, 1e-4):                                                     # at 1e-4 a norm's epsilon counts
        x = (size * torch.randn(3, 7, 32, generator=generator)).to(dtype)
        x[0, 0], x[1, 1, ::2] = 0, 0
        dy = torch.randn(x.shape, generator=generator).to(dtype)
        exact, mine = x.double().requires_grad_(), x.clone().requires_grad_()
        y = ours(mine)
        assert y.dtype == dtype and torch.equal(y, plain(x)) and torch.equal(ours(x), y)
        with torch.inference_mode():
            assert torch.equal(ours(x), y)
        [want], [got] = torch.autograd.grad(plain(exact), exact, dy.double()), torch.autograd.grad(y, mine, dy)
        assert got.dtype == dtype and (got.double() - want).norm() <= tolerance * want.norm()


def test_what_a_layer_keeps_for_the_backward_pass():
    model, kept = small(depth=2, head_dim=64, vocab_size=8), {}
    idx = tokens(model, B=4, T=64)

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.trunk(idx)
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    values = sum(n for key, n in kept.items() if key not in weights) / 4 / idx.numel() / model.config.n_embd
    assert values / model.config.n_layer < 11.5    # 2 norms, q, k, v, attention, 4 relu^2: 10; and the two ends


def test_bfloat16_is_close_to_float32():
    model = small()
    idx = tokens(model)
    exact = model(idx, idx).item()
    model.compute_dtype = torch.bfloat16
    assert model(idx, idx).item() == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("depth", [1, 2, 5, 12])
def test_parameters_are_as_budgeted(depth):
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=1000, **model_shape(depth)))
    assert sum(p.numel() for p in model.parameters()) == num_params(model.config)["total"]


def test_known_sizes():
    for depth, millions in {12: 186, 14: 252, 16: 336, 18: 438, 20: 561}.items():
        total = num_params(GPTConfig(**model_shape(depth)))["total"]
        assert round(total / 1e6) == millions
    d20 = flops_per_token(GPTConfig(sequence_len=2048, **model_shape(20)))
    assert d20 == pytest.approx(3.492e9, rel=1e-3)


def test_state_dict_names_are_nanochats():
    names = set(small().state_dict())
    layer = {f"transformer.h.{i}.{name}.weight" for i in range(2) for name in
             ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert names == layer | {"transformer.wte.weight", "lm_head.weight"}


def test_logits_equal_transformers_nanochat_to_the_last_bit():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = small(n_kv_head=2)
    config = transformers.NanoChatConfig(
        vocab_size=97, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=torch.finfo(torch.float32).eps)
    theirs = transformers.NanoChatForCausalLM(config)
    rename = {"attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj", "attn.c_v": "self_attn.v_proj",
              "attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
              "transformer.wte": "model.embed_tokens", "transformer.h": "model.layers"}
    state = {}
    for name, value in model.state_dict().items():
        for old, new in rename.items():
            name = name.replace(old, new)
        state[name] = value
    theirs.load_state_dict(state, strict=True)
    idx = tokens(model)
    with torch.no_grad():
        assert torch.equal(model(idx), theirs(idx).logits.float())
