"""Supervised fine-tuning on captioned images of one's own: what is read, what is learnt, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.images import huge_png
from support.pairs import changed, train_config
from support.pipelines import SIZE, random_adapter, tiny_pipeline

from t2i_spo_plugin import load_spo_lora
from t2i_spo_plugin.adapters import read_adapter
from t2i_spo_plugin.errors import ImageError, PipelineError, TableError
from t2i_spo_plugin.training import TrainConfig, train
from t2i_spo_plugin.training.data.captions import read_captioned, read_captions


def image(path: Path, shade: int) -> None:
    Image.fromarray(np.full((SIZE + 8, SIZE, 3), shade, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four images of one's own, captions beside them; they are not square and of other types."""
    made = tmp_path / "mine"
    made.mkdir()
    for number, kind in enumerate(("png", "jpg", "webp", "png")):
        image(made / f"{number}.{kind}", 60 * number)
        (made / f"{number}.txt").write_text(f"an image number {number}\n")
    return made


@pytest.fixture
def config(folder, tmp_path) -> TrainConfig:
    options = {"caption_dropout": 0.3, "random_flip": True, "checkpoint_every": 2}
    return train_config(tmp_path, images=str(folder), objective={"name": "sft"}, **options)


def report_of(config: TrainConfig) -> dict:
    return json.loads((Path(config.output_dir) / "report.json").read_text())


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3"])
def test_a_folder_of_images_trains_an_adapter_that_loads(config, name):
    path = train(replace(config, steps=2), tiny_pipeline(name))
    adapter = read_adapter(path)
    assert adapter.metadata.extra["objective"] == "sft" and "beta" not in adapter.metadata.extra
    assert adapter.metadata.title == config.title
    report = report_of(config)
    # Two steps of two images, each once forward and once backward: no second side, no reference.
    assert report["passes"] == {"forward": 4, "backward": 4} and report["pairs"]["kept"] == 4
    load_spo_lora(tiny_pipeline(name), path)


def test_a_caption_table_is_read_once_and_what_it_lacks_is_said_once(config, folder):
    rows = ['{"file_name": "0.png", "text": "zero"}', '{"file_name": "9.png", "text": "x"}']
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    with pytest.warns(UserWarning) as caught:
        train(replace(config, steps=1, skip_bad_rows=True), tiny_pipeline("sd1"))
    assert [str(warning.message).count("9.png is not in its folder") for warning in caught].count(1) == 1
    assert report_of(config)["pairs"]["kept"] == 1


def test_the_images_are_learnt(config):
    # Near pure noise the velocity is the image itself, with its sign changed.
    options = {"steps": 12, "batch_size": 4, "learning_rate": 3e-2, "t_min": 990, "caption_dropout": 0.0}
    train(replace(config, **options), tiny_pipeline("sd1", prediction_type="v_prediction"))
    curve = [entry["loss"] for entry in report_of(config)["curve"]]
    assert np.mean(curve[-3:]) < 0.7 * np.mean(curve[:3])


def test_stopped_and_resumed_equals_never_stopped(config):
    whole = read_adapter(train(replace(config, output_dir=f"{config.output_dir}-whole"), tiny_pipeline("sd1")))
    train(replace(config, steps=2), tiny_pipeline("sd1"))
    resumed = read_adapter(train(config, tiny_pipeline("sd1")))
    assert all((resumed.modules[name].up == pair.up).all() for name, pair in whole.modules.items())
    assert report_of(config)["curve"] == report_of(replace(config, output_dir=f"{config.output_dir}-whole"))["curve"]


def test_prior_preservation_may_be_carried_and_asks_the_reference(config):
    train(changed(config, steps=2, terms={"prior_preservation": {"weight": 10.0}}), tiny_pipeline("sd1"))
    assert report_of(config)["passes"] == {"forward": 8, "backward": 4}


def test_an_adapter_must_be_off_while_another_is_trained(config):
    pipe = tiny_pipeline("sd1")
    load_spo_lora(pipe, random_adapter(pipe))
    with pytest.raises(PipelineError, match="unload it"):
        train(config, pipe)


def test_captions_stand_beside_images_or_in_a_table(folder):
    beside = read_captions(folder)
    assert [(path.name, text) for path, text in beside][:2] == [
        ("0.png", "an image number 0"),
        ("1.jpg", "an image number 1"),
    ]
    digest = read_captioned(folder).digest()
    (folder / "metadata.csv").write_text("file_name,text\n2.webp,two\n0.png,zero\n")
    assert [(path.name, text) for path, text in read_captions(folder)] == [("0.png", "zero"), ("2.webp", "two")]
    (folder / "metadata.jsonl").write_text('{"file_name": "3.png", "text": "three"}\n')
    assert [text for _, text in read_captions(folder)] == ["three"]
    assert read_captioned(folder).digest() != digest


def test_a_broken_image_is_named(config, folder):
    whole = (folder / "2.webp").read_bytes()
    (folder / "2.webp").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match="2.webp: it cannot be decoded"):
        train(config, tiny_pipeline("sd1"))
    (folder / "2.webp").write_bytes(huge_png(30_000))
    with pytest.raises(ImageError, match="2.webp: it has more pixels than"):
        train(config, tiny_pipeline("sd1"))


def test_what_begins_with_a_dot_is_no_image_of_the_folder(folder):
    image(folder / ".preview.png", 0)
    (folder / ".cache").mkdir()
    image(folder / ".cache" / "thumbnail.png", 0)
    assert len(read_captions(folder)) == 4


def test_reading_captions_refuses_what_is_no_folder_of_captioned_images(folder, tmp_path):
    with pytest.raises(TableError, match="no folder"):
        read_captions(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TableError, match="no images"):
        read_captions(tmp_path / "empty")
    (folder / "2.txt").unlink()
    with pytest.raises(TableError, match="no caption.*2.txt"):
        read_captions(folder)
    image(tmp_path / "outside.png", 0)
    for row in ({"file_name": "../outside.png", "text": "a"}, {"file_name": "9.png", "text": "a"}):
        (folder / "metadata.jsonl").write_text(json.dumps(row))
        with pytest.raises(TableError, match="not in its folder"):
            read_captions(folder)
    (folder / "metadata.jsonl").write_text('{"file": "0.png"}')
    with pytest.raises(TableError, match="file_name and text"):
        read_captions(folder)


@pytest.mark.parametrize("row", ['{"file_name": "0.png", "text": null}', '{"file_name": "0.png", "text": " "}', "{"])
def test_a_caption_that_is_missing_is_named_and_never_a_word(folder, row):
    (folder / "metadata.jsonl").write_text(row + '\n{"file_name": "2.webp", "text": "two"}\n')
    with pytest.raises(TableError, match="row 1: "):
        read_captions(folder)
    with pytest.warns(UserWarning, match="row 1: "):
        assert [text for _, text in read_captions(folder, skip_bad_rows=True)] == ["two"]
