"""Batch arithmetic and what a run costs."""
from types import SimpleNamespace

import pytest

from plumbing.budget import (MICRO_TOKENS, eval_rows, even_batch, micro_batch, model_shape, peak_flops, row_bytes,
                             rows_per_step, state_bytes, usable_bytes)
from plumbing.fit import largest_that_runs

D12 = SimpleNamespace(sequence_len=1024, vocab_size=65536, **model_shape(12))


@pytest.mark.parametrize("tokens, T, rows", [(524288, 1024, 512), (524288, 2048, 256), (262144, 1536, 168),
                                             (131072, 1024, 128), (2048, 256, 8), (100, 256, 8)])
def test_a_step_has_a_multiple_of_eight_rows(tokens, T, rows):
    assert rows_per_step(tokens, T) == rows


@pytest.mark.parametrize("depth, head_dim, n_head", [(12, 0, 6), (20, 0, 10), (5, 0, 5), (9, 0, 9), (2, 32, 4), (1, 0, 1)])
def test_heads_follow_from_the_depth(depth, head_dim, n_head):
    shape = model_shape(depth, head_dim)
    assert shape["n_head"] == n_head and shape["n_embd"] == 64 * depth


@pytest.mark.parametrize("depth, head_dim", [(2, 48), (1, 7)])
def test_an_impossible_shape_is_one_line(depth, head_dim):
    with pytest.raises(SystemExit):
        model_shape(depth, head_dim)


def test_the_micro_batch_is_what_fits_and_never_more_than_is_of_use():
    def fit(gigabytes):
        return micro_batch(168, 1, 0, gigabytes * 1e9, D12, 2)
    assert fit(0) == 1 and fit(1000) == 56                  # 56 x 1,024 tokens: more at a time bring nothing
    for gigabytes in range(4, 60, 3):
        B = fit(gigabytes)
        assert B == 1 or state_bytes(D12) + B * row_bytes(D12, 2, False) <= gigabytes * 1e9


def test_a_step_is_split_into_as_few_micro_batches_of_about_one_size_as_possible():
    for rows in range(1, 200):
        for most in range(1, rows + 10):
            B = even_batch(rows, most)
            fewest = -(-rows // min(most, rows))
            assert 1 <= B <= most and even_batch(rows, B) == B
            assert rows % B == 0 and 4 * B >= 3 * -(-rows // fewest) or -(-rows // B) == fewest
    assert even_batch(344, 100) == 86 and even_batch(43, 32) == 22 and even_batch(43, 8) == 8


def test_the_micro_batch_that_is_asked_for_counts_and_each_process_has_a_row():
    assert micro_batch(168, 2, 4, 1e9, D12, 2) == 4 and micro_batch(32, 16, 4, 0, D12, 2) == 2
    with pytest.raises(SystemExit, match="8 rows per step for 9 processes"):
        micro_batch(8, 9, 0, 1e9, D12, 2)


# SPEC section 9: (depth, context, rows of a step)
CONFIGURATIONS = dict(conservative=(12, 1024, 128), balanced=(14, 1536, 168), aggressive=(16, 2048, 256), maximum=(18, 2048, 256),
                      demo=(12, 1024, 512), small=(14, 1536, 344), medium=(16, 2048, 256), d20=(20, 2048, 256))


@pytest.mark.parametrize("card", [12, 16, 24, 40, 80])
@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("error", [0.7, 1.0, 1.4])              # what a row needs, as a share of what the formula says
def test_every_configuration_is_fitted_to_every_card(card, name, error):
    depth, T, rows = CONFIGURATIONS[name]
    config = SimpleNamespace(sequence_len=T, vocab_size=65536, **model_shape(depth))
    free, tries = 0.95 * card * 1e9 - 2e9, []
    for checkpointing in (False, True):
        row = row_bytes(config, 2, checkpointing)

        def attempt(B):
            """A GPU of this size, twice as fast with many rows as with one."""
            tries.append(B)
            return 1000 * B * 2 / (B + 1) if state_bytes(config) + error * B * row <= free else 0.0
        guess = micro_batch(rows, 1, 0, usable_bytes(card * 1e9), config, 2, checkpointing)
        B, speed = largest_that_runs(rows, guess, max(1, MICRO_TOKENS // T), attempt)
        if B:
            break
    assert state_bytes(config) + error * row <= free if B else card <= 12, "every configuration fits from 16 GB on"
    assert len(tries) <= 12
    if B:
        assert state_bytes(config) + error * B * row <= free and B * T <= MICRO_TOKENS
        assert state_bytes(config) + error * 2.7 * B * row > free or 2.7 * B * T > MICRO_TOKENS, "much more would fit"



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
