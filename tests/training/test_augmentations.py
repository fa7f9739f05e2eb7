"""Augmentations of pairs on cached latents."""

from __future__ import annotations

import torch

from t2i_spo_plugin.training.objectives.augmentations import draw_shift, flip, shift


def test_shift_moves_the_image_and_repeats_the_border():
    latents = torch.arange(9.0).view(1, 1, 3, 3)
    moved = shift(latents, dy=1, dx=0)
    assert torch.equal(moved[0, 0], torch.tensor([[0.0, 1, 2], [0, 1, 2], [3, 4, 5]]))
    assert torch.equal(shift(latents, 0, -1)[0, 0], torch.tensor([[1.0, 2, 2], [4, 5, 5], [7, 8, 8]]))
    assert torch.equal(shift(latents, 0, 0), latents)
    assert torch.equal(flip(flip(latents)), latents)


def test_drawn_shifts_move_and_come_from_the_generator_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    drawn = {draw_shift(torch.Generator().manual_seed(seed)) for seed in range(60)}
    assert (0, 0) not in drawn and len(drawn) == 8
    assert torch.equal(state, torch.get_rng_state())
