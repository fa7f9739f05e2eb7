"""Micro-batches from real caches: whose latents, under which prompt, with which noise."""

from __future__ import annotations

import pytest
import torch
from support.toy_family import LEVELS, SCALE, SHAPE, SHIFT, ToyFamily, cached, text_of, toy_batches, toy_examples

from t2i_spo_plugin.training.sampling import draw, generator


@pytest.fixture
def batches(tmp_path):
    def make(**options):
        return toy_batches(tmp_path, ToyFamily(), **options)

    return make


def denoised(number: int, side: int, mirrored: bool = False) -> torch.Tensor:
    """The latents of an image as the denoiser sees them."""
    return (cached(number, side, mirrored) - SHIFT) * SCALE


def test_a_batch_holds_the_winners_first_and_everything_of_its_examples(batches):
    made = batches()
    batch = made.at(5, range(3, 7))
    numbers = [made.order.at(position)[0] for position in range(3, 7)]
    assert (len(batch), batch.step, batch.positions, batch.examples) == (4, 5, (3, 4, 5, 6), tuple(numbers))
    assert batch.slots == (0, 0, 0, 0)
    for side in (0, 1):
        torch.testing.assert_close(batch.latents[side], torch.stack([denoised(number, side) for number in numbers]))
    examples = toy_examples()
    assert torch.equal(batch.text["text"], torch.stack([text_of(examples.captions[number]) for number in numbers]))
    for name, values in examples.columns.items():
        assert torch.equal(batch.columns[name], values[numbers])


def test_both_images_of_a_pair_share_timestep_and_noise_that_are_drawn_for_step_and_position(batches):
    made = batches(seed=3, t_range=(2, 8))
    batch = made.at(1, [4, 5])
    for number, position in enumerate((4, 5)):
        expected = draw(generator(3, "sample", 1, position), SHAPE, (2, 8))
        for side in (0, 1):
            assert torch.equal(batch.noise[side, number], expected.noise)
            assert batch.index[side, number] == expected.index
    assert not torch.equal(made.at(2, [4, 5]).noise, batch.noise)
    assert torch.equal(made.at(1, [5]).noise[:, 0], batch.noise[:, 1]), "whatever else is in the micro-batch"
    drawn = {int(index) for step in range(12) for index in made.at(step, range(4)).index.flatten()}
    assert drawn == set(range(2, 8))


def test_the_autoencoders_noise_is_each_images_own(batches):
    batch = batches(std=0.5).at(0, [0])
    (number,) = batch.examples
    posterior = draw(generator(0, "sample", 0, 0), SHAPE, (0, LEVELS)).posterior
    for side in (0, 1):
        expected = (cached(number, side) + 0.5 * posterior[side] - SHIFT) * SCALE
        torch.testing.assert_close(batch.latents[side, 0], expected)


def test_single_images_have_one_side(batches):
    batch = batches(examples=toy_examples(sides=1)).at(0, [0, 1])
    assert batch.latents.shape == (1, 2, *SHAPE) and batch.noise.shape == batch.latents.shape
    assert batch.index.shape == (1, 2)


def test_stored_draws_belong_to_the_example_and_come_round(batches):
    made = batches(draws_per_pair=2)
    epochs = [made.at(step, range(4 * step, 4 * step + 4)) for step in range(3)]
    assert [set(batch.slots) for batch in epochs] == [{0}, {1}, {0}]
    by_example = [{number: batch.noise[0, place] for place, number in enumerate(batch.examples)} for batch in epochs]
    for number in range(4):
        assert torch.equal(by_example[0][number], by_example[2][number])
        assert not torch.equal(by_example[0][number], by_example[1][number])
        expected = draw(generator(0, "fixed", number, 1), SHAPE, (0, LEVELS)).noise
        assert torch.equal(by_example[1][number], expected)


def test_a_dropped_caption_becomes_the_empty_prompt_as_often_as_is_asked(batches):
    always = batches(caption_dropout=1.0).at(0, range(4)).text["text"]
    assert torch.equal(always, text_of("").expand(4, -1))


def test_some_captions_are_dropped_at_a_middle_rate(batches):
    texts = batches(caption_dropout=0.5).at(0, range(60)).text["text"]
    dropped = int((texts == text_of("")).all(1).sum())
    assert 15 < dropped < 45


def test_mirrored_latents_are_mirrored_on_both_sides_alike(batches):
    batch = batches(random_flip=True).at(0, range(12))
    mirrored = []
    for place, number in enumerate(batch.examples):
        as_they_are = [torch.allclose(batch.latents[side, place], denoised(number, side)) for side in (0, 1)]
        turned = [torch.allclose(batch.latents[side, place], denoised(number, side).flip(-1)) for side in (0, 1)]
        assert as_they_are == [not both for both in turned] and turned[0] == turned[1]
        mirrored.append(turned[0])
    assert set(mirrored) == {True, False}


def test_mirrored_images_are_taken_from_the_cache_where_they_are_cached(batches):
    latent = batches(random_flip=True).at(0, range(12))
    pixel = batches(random_flip=True, pixel_flip=True).at(0, range(12))
    for place, number in enumerate(pixel.examples):
        mirror = not torch.allclose(latent.latents[0, place], denoised(number, 0))
        for side in (0, 1):
            torch.testing.assert_close(pixel.latents[side, place], denoised(number, side, mirror))


def test_draws_of_another_place_are_its_own_and_stay_in_the_range(batches):
    made = batches(t_range=(4, 6))
    one, again, other = made.draws("view", 1), made.draws("view", 1), made.draws("view", 2)
    assert torch.equal(one.noise, again.noise) and not torch.equal(one.noise, other.noise)
    assert one.noise.shape == SHAPE
    assert {made.draws("view", number).index for number in range(20)} == {4, 5}


def test_benign_examples_come_as_often_as_their_share(batches):
    batch = batches(benign_share=0.25).at(0, range(8))
    assert batch.columns["benign"].sum() == 2
