"""A pipeline is called for prompts with seeds in one place, and is afterwards as it was."""

import numpy as np
import pytest
from support.pipelines import fresh

from t2i_spo_plugin.data import PromptRow, generate, generate_images
from t2i_spo_plugin.data.pipeline_calls import call_pipeline, quiet


ROWS = [PromptRow(f"r{seed}", text, "benign", seed=seed) for seed, text in enumerate(("a cat", "a dog", "a cat"))]


def pixels(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_an_image_comes_from_its_own_seed_wherever_the_row_stands(sd1):
    images = pixels(generate_images(sd1, ROWS, 2, 3.0))
    turned = pixels(generate_images(sd1, ROWS[::-1], 2, 3.0, batch_size=2))[::-1]
    assert np.abs(images - turned).max() <= 1
    assert np.abs(images[0] - images[2]).max() > 10, "one prompt, two seeds"


def test_images_in_memory_are_those_of_a_folder(sd1, tmp_path):
    report = generate(sd1, ROWS, tmp_path, steps=2, guidance_scale=3.0, progress=False)
    written = pixels([image.open() for image in report.images])
    assert np.array_equal(written, pixels(generate_images(sd1, ROWS, 2, 3.0)))


def test_guidance_and_steps_reach_the_pipeline(sd1):
    images = pixels(generate_images(sd1, ROWS, 2, 3.0))
    assert not np.array_equal(images, pixels(generate_images(sd1, ROWS, 3, 3.0)))
    assert not np.array_equal(images, pixels(generate_images(sd1, ROWS, 2, 9.0)))


def test_a_call_shows_no_progress_bar_of_the_pipeline(sd1, capfd):
    sd1.set_progress_bar_config(desc="its own")
    call_pipeline(sd1, ROWS[:1], num_inference_steps=1, guidance_scale=1.0, output_type="np")
    assert "its own" not in capfd.readouterr().err
    sd1(prompt="a cat", num_inference_steps=1)
    assert "its own" in capfd.readouterr().err


@pytest.mark.parametrize("config", [None, {"desc": "mine"}])
def test_a_quiet_pipeline_gets_its_progress_bar_back_after_an_error(config):
    pipe = fresh("sd1")
    if hasattr(pipe, "_progress_bar_config"):
        del pipe._progress_bar_config
    if config is not None:
        pipe.set_progress_bar_config(**config)
    with pytest.raises(ZeroDivisionError), quiet(pipe):
        raise ZeroDivisionError
    assert getattr(pipe, "_progress_bar_config", None) == config
