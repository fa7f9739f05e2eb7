"""Augmentations of pairs on cached latents."""

from __future__ import annotations

import pytest
import torch
from support.toy_family import ToyFamily, toy_batches

from t2i_spo_plugin.training.objectives.augmentations import augmented, draw_shift, flip, shift


@pytest.fixture
def batches(tmp_path):
    return toy_batches(tmp_path, ToyFamily(), t_range=(3, 8))


def test_shift_moves_the_image_and_repeats_the_border():
    latents = torch.arange(9.0).view(1, 1, 3, 3)
    moved = shift(latents, dy=1, dx=0)
    assert torch.equal(moved[0, 0], torch.tensor([[0.0, 1, 2], [0, 1, 2], [3, 4, 5]]))
    assert torch.equal(shift(latents, 0, -1)[0, 0], torch.tensor([[1.0, 2, 2], [4, 5, 5], [7, 8, 8]]))
    assert torch.equal(shift(latents, -1, 1)[0, 0], torch.tensor([[3.0, 3, 4], [6, 6, 7], [6, 6, 7]]))
    assert torch.equal(shift(latents, 0, 0), latents)
    assert torch.equal(flip(flip(latents)), latents)


def test_a_wide_image_keeps_its_shape_when_it_is_shifted():
    latents = torch.arange(8.0).view(1, 1, 2, 4)
    assert torch.equal(shift(latents, 1, 1)[0, 0], torch.tensor([[0.0, 0, 1, 2], [0, 0, 1, 2]]))


def test_drawn_shifts_move_and_come_from_the_generator_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    drawn = {draw_shift(torch.Generator().manual_seed(seed)) for seed in range(60)}
    assert (0, 0) not in drawn and len(drawn) == 8
    assert {step for move in drawn for step in move} == {-1, 0, 1}
    assert torch.equal(state, torch.get_rng_state())


def test_a_mirrored_batch_is_mirrored_left_to_right_and_else_the_same(batches):
    batch = batches.at(0, range(3))
    mirrored = augmented("flip", batch, batches)
    assert torch.equal(mirrored.latents, batch.latents.flip(4))
    assert mirrored.noise is batch.noise and mirrored.index is batch.index


def test_both_images_of_a_pair_are_shifted_alike_and_each_pair_by_its_own(batches):
    batch = batches.at(0, range(12))
    shifted = augmented("shift", batch, batches)
    moves = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    seen = set()
    for number in range(12):
        both = batch.latents[:, number]
        fitting = [move for move in moves if torch.equal(shifted.latents[:, number], shift(both, *move))]
        assert len(fitting) == 1 and fitting != [(0, 0)]
        seen.add(fitting[0])
    assert len(seen) > 2 and shifted.noise is batch.noise
    assert torch.equal(augmented("shift", batches.at(0, range(12)), batches).latents, shifted.latents)
    later = augmented("shift", batches.at(1, range(12)), batches)
    assert not torch.equal(later.latents, shifted.latents), "another step moves by other draws"


def test_fresh_noise_is_drawn_for_the_pair_and_not_for_its_images(batches):
    batch = batches.at(0, range(6))
    fresh = augmented("noise", batch, batches)
    assert fresh.latents is batch.latents
    assert torch.equal(fresh.noise[0], fresh.noise[1]) and torch.equal(fresh.index[0], fresh.index[1])
    assert not any(torch.equal(one, two) for one, two in zip(fresh.noise[0], batch.noise[0], strict=True))
    assert fresh.index.min() >= 3 and fresh.index.max() < 8 and not torch.equal(fresh.index, batch.index)
    assert torch.equal(augmented("noise", batches.at(0, range(6)), batches).noise, fresh.noise)
    assert torch.equal(augmented("noise", batches.at(0, [2]), batches).noise[:, 0], fresh.noise[:, 2])
