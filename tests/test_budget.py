"""Batch arithmetic and what a run costs."""
from types import SimpleNamespace

import pytest

from plumbing.budget import eval_rows, micro_batches, model_shape, peak_flops, row_bytes, rows_per_step, state_bytes

D12 = SimpleNamespace(sequence_len=1024, vocab_size=65536, **model_shape(12))


@pytest.mark.parametrize("tokens, T, rows", [(524288, 1024, 512), (524288, 2048, 256), (262144, 1536, 168),
                                             (131072, 1024, 128), (2048, 256, 8), (100, 256, 8)])
def test_a_step_has_a_multiple_of_eight_rows(tokens, T, rows):
    assert rows_per_step(tokens, T) == rows


@pytest.mark.parametrize("depth, head_dim, n_head", [(12, 0, 6), (20, 0, 10), (5, 0, 5), (9, 0, 9), (2, 32, 4), (1, 0, 1)])
def test_heads_follow_from_the_depth(depth, head_dim, n_head):
    shape = model_shape(depth, head_dim)
    assert shape["n_head"] == n_head and shape["n_embd"] == 64 * depth


@pytest.mark.parametrize("depth, head_dim", [(0, 0), (2, 48), (1, 7)])
def test_an_impossible_shape_is_one_line(depth, head_dim):
    with pytest.raises(SystemExit):
        model_shape(depth, head_dim)


def test_the_micro_batch_is_the_largest_divisor_that_fits():
    def fit(gigabytes):
        return micro_batches(168, 1, 0, gigabytes * 1e9, D12, 2)[0]
    assert fit(0) == 1 and fit(1000) == 56                  # 56 x 1,024 tokens: more at a time bring nothing
    assert all(168 % fit(g) == 0 for g in range(0, 60, 3))
    B, need = fit(8), lambda b: state_bytes(D12) + b * row_bytes(D12, 2, False)
    assert need(B) <= 8e9 < need(min(d for d in range(B + 1, 169) if 168 % d == 0))


def test_the_micro_batch_that_is_asked_for_must_divide():
    assert micro_batches(168, 2, 4, 1e9, D12, 2) == (4, 84, 21)
    with pytest.raises(SystemExit, match="4 and 6"):
        micro_batches(168, 1, 5, 1e9, D12, 2)
    with pytest.raises(SystemExit, match="3 processes; take one of"):
        micro_batches(8, 3, 0, 1e9, D12, 2)


def test_devices_are_found_by_a_part_of_their_name():
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A10G") == 70e12 and peak_flops("NVIDIA A10") == 125e12
    for name in ("Some New Card", "NVIDIA RTX A4000", "NVIDIA RTX A1000", "NVIDIA GeForce RTX 4090 Laptop GPU"):
        assert peak_flops(name) == 0.0


def test_evaluation_costs_at_most_two_percent_while_training_and_a_tenth_in_all():
    assert eval_rows(1024, 524288, 500, 250, 0, 10485760) == (2560, 10240)
    assert eval_rows(128, 1024, 5, 250, 0, 10485760) == (40, 8)
    assert eval_rows(256, 2048, 1200, 0, 0, 10 ** 6)[1] == 245760 // 256
