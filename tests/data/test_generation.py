"""Drawing: the same image whatever the batch or order, resumable, idempotent, and honest about failures."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support.pipelines import tiny_pipeline

from t2i_spo_plugin.data.generation import generate, image_name
from t2i_spo_plugin.data.prompts import PromptRow, with_seeds
from t2i_spo_plugin.data.tables import IMAGE_COLUMNS, read_rows
from t2i_spo_plugin.errors import ConfigError, SPOError
from t2i_spo_plugin.files import folder_hash


ROWS = [PromptRow(f"p{i}", f"prompt {i}", "benign", seed=100 + i, requested=("cat",)) for i in range(7)]


class StubPipeline:
    """Draws 8x8 noise from each row's own generator; prompts with 'broken' or 'nan' go wrong."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompt, generator, num_inference_steps, guidance_scale, output_type):
        self.calls.append(list(prompt))
        if any("broken" in text for text in prompt):
            raise RuntimeError("no ink")
        images = np.stack([torch.rand(8, 8, 3, generator=g).numpy() for g in generator])
        for image, text in zip(images, prompt, strict=True):
            if "nan" in text:
                image[0, 0, 0] = np.nan
        return SimpleNamespace(images=images)

    @property
    def prompts(self):
        return sorted(text for call in self.calls for text in call)


def run(rows, out_dir, pipe=None, **options):
    pipe = StubPipeline() if pipe is None else pipe
    return generate(pipe, rows, out_dir, steps=2, progress=False, **options), pipe


def table(out_dir):
    """The rows of what was generated."""
    return read_rows(out_dir, IMAGE_COLUMNS)


def pixels(out_dir):
    return {row["prompt_id"]: np.asarray(Image.open(out_dir / row["image"])) for row in table(out_dir)}


def test_images_do_not_depend_on_batch_size_or_order(tmp_path):
    run(ROWS, tmp_path / "a", batch_size=1)
    run(ROWS[::-1], tmp_path / "b", batch_size=3, shard_size=4)
    one, two = pixels(tmp_path / "a"), pixels(tmp_path / "b")
    assert one.keys() == two.keys() and len(one) == 7
    assert all((one[name] == two[name]).all() for name in one)
    assert not (one["p0"] == one["p1"]).all()


def test_a_real_pipeline_generates_the_same_in_batches_and_alone(tmp_path):
    pipe = tiny_pipeline("sd1")
    options = {"call_options": {"height": 32, "width": 32}}
    run(ROWS[:3], tmp_path / "a", pipe, batch_size=1, **options)
    run(ROWS[2::-1], tmp_path / "b", pipe, batch_size=2, **options)
    one, two = pixels(tmp_path / "a"), pixels(tmp_path / "b")
    for name in one:
        assert one[name].shape[-1] == 3
        assert np.abs(one[name].astype(int) - two[name].astype(int)).max() <= 2, name
    apart = np.abs(one["p0"].astype(int) - one["p1"].astype(int)).max()
    assert apart > 20


def test_a_second_run_generates_and_changes_nothing(tmp_path):
    first, _ = run(ROWS, tmp_path, shard_size=3)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    second, pipe = run(ROWS, tmp_path, shard_size=3)
    assert pipe.calls == [] and (first.n_generated, second.n_generated, second.n_reused) == (7, 0, 7)
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_a_killed_run_is_resumed(tmp_path):
    class Killed(StubPipeline):
        def __call__(self, prompt, **options):
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().__call__(prompt, **options)

    with pytest.raises(KeyboardInterrupt):
        Killed.__name__ = StubPipeline.__name__
        run(ROWS, tmp_path, Killed(), batch_size=2, shard_size=4)
    report, pipe = run(ROWS, tmp_path, batch_size=2, shard_size=4)
    assert report.n_reused == 4 and pipe.prompts == ["prompt 4", "prompt 5", "prompt 6"]
    run(ROWS, tmp_path / "whole")
    assert all((pixels(tmp_path)[k] == v).all() for k, v in pixels(tmp_path / "whole").items())


def test_a_bad_row_does_not_stop_the_others_and_is_tried_again(tmp_path):
    rows = [*ROWS[:2], PromptRow("bad", "broken", "benign"), PromptRow("nan", "nan", "benign"), *ROWS[2:]]
    report, _ = run(rows, tmp_path, batch_size=3)
    assert (report.n_generated, report.n_failed) == (7, 2)
    failed = {row["prompt_id"]: row["failed"] for row in table(tmp_path) if row["image"] is None}
    assert failed == {"bad": "RuntimeError: no ink", "nan": "the pipeline returned NaN or Inf"}
    with pytest.raises(SPOError, match="no ink"):
        report.images[2].open()
    _, pipe = run(rows, tmp_path, batch_size=1)
    assert pipe.prompts == ["broken", "nan"]


def test_a_broken_pipeline_ends_the_run_early(tmp_path):
    rows = [PromptRow(f"r{i}", "broken", "benign") for i in range(40)]
    with pytest.raises(SPOError, match="no ink"):
        run(rows, tmp_path, batch_size=4)


def test_images_of_other_settings_are_refused_not_mixed(tmp_path):
    run(ROWS, tmp_path, metadata={"adapter": "aa"})
    with pytest.raises(ConfigError, match="adapter"):
        run(ROWS, tmp_path, metadata={"adapter": "bb"})
    with pytest.raises(ConfigError, match="guidance_scale: 3.0 there, 4.0 now"):
        run(ROWS, tmp_path, metadata={"adapter": "aa"}, guidance_scale=4.0)


def test_images_of_other_weights_are_refused_and_of_the_same_ones_elsewhere_are_not(tmp_path):
    pipe, options = tiny_pipeline("sd1"), {"call_options": {"height": 32, "width": 32}}
    run(ROWS[:1], tmp_path, pipe, **options)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    report, _ = run(ROWS[:1], tmp_path, tiny_pipeline("sd1"), **options)
    assert report.n_reused == 1
    with pytest.raises(ConfigError, match=r"pipeline\.weights\.unet: \w{16} there, \w{16} now"):
        run(ROWS[:1], tmp_path, tiny_pipeline("sd1", seed=1), **options)
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_prompts_that_mention_minors_are_never_generated(tmp_path):
    rows = [PromptRow("m", "a child with a gun", "harmful"), PromptRow("u", "a 12 year old", "unlabelled"), *ROWS]
    report, pipe = run(rows, tmp_path)
    assert report.n_dropped_minors == 2 and all("prompt" in text for text in pipe.prompts)


def test_the_table_has_the_whole_row_of_what_was_generated(tmp_path):
    row = PromptRow("h", "a gun", "harmful", "weapons", 9, ("a spoon",), ("spoon",))
    run([row], tmp_path)
    (content,) = table(tmp_path)
    assert content.pop("image").endswith(image_name(row)) and content.pop("failed") == ""
    assert content.pop("prompt_id") == row.id
    assert content == {
        name: list(value) if isinstance(value, tuple) else value for name, value in asdict(row).items() if name != "id"
    }


def test_a_run_with_fewer_rows_leaves_no_stale_tables(tmp_path):
    run(ROWS, tmp_path, shard_size=2)
    run(ROWS[:3], tmp_path, shard_size=2)
    assert [row["prompt_id"] for row in table(tmp_path)] == ["p0", "p1", "p2"]


def test_processes_share_the_shards(tmp_path):
    for index in range(2):
        run(ROWS, tmp_path, shard_size=2, process=(index, 2))
    assert [(row["prompt_id"], row["prompt"], row["seed"]) for row in table(tmp_path)] == [
        (row.id, row.prompt, row.seed) for row in ROWS
    ]


def test_a_prompt_may_have_several_seeds(tmp_path):
    rows = with_seeds(ROWS[:2], 2)
    assert [row.id for row in rows] == ["p0", "p0", "p1", "p1"] and [row.seed for row in rows[::2]] == [100, 101]
    report, _ = run(rows, tmp_path)
    assert len({image.path for image in report.images}) == 4
    with pytest.raises(ConfigError, match="more than once"):
        run(ROWS[:1] * 2, tmp_path / "twice")


def test_what_completions_show_and_the_wording_come_back_from_the_table(tmp_path):
    shown = (("spoon", "cat"), ("cat",))
    row = PromptRow("h", "a knife", "harmful", safe_prompts=("a spoon", "a cat"), safe_objects=shown, wording="typos")
    run([row], tmp_path)
    (stored,) = read_rows(tmp_path, IMAGE_COLUMNS)
    assert stored["safe_objects"] == [list(part) for part in shown] and stored["wording"] == "typos"


def test_image_names_are_safe_and_distinct():
    assert "/" not in image_name(PromptRow("../a b", "x", "benign"))
    assert image_name(PromptRow("a", "x", "benign")) != image_name(PromptRow("a", "y", "benign"))


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"shard_size": 0}, {"process": (2, 2)}, {"call_options": {"prompt": "x"}}]
)
def test_generation_refuses_bad_options(tmp_path, options):
    with pytest.raises(ConfigError):
        run(ROWS, tmp_path, **options)


def test_the_progress_setting_of_the_pipeline_survives(tmp_path):
    pipe = tiny_pipeline("sd1")
    pipe.set_progress_bar_config(desc="mine")
    run(ROWS[:1], tmp_path, pipe, call_options={"height": 32, "width": 32})
    assert pipe._progress_bar_config == {"desc": "mine"}


def test_settings_are_readable_and_folder_hash_sees_contents(tmp_path):
    run(ROWS[:1], tmp_path / "a", metadata={"adapter": "aa"})
    assert json.loads((tmp_path / "a/settings.json").read_text())["metadata"] == {"adapter": "aa"}
    (tmp_path / "f").write_text("1")
    before = folder_hash(tmp_path / "f")
    (tmp_path / "f").write_text("2")
    assert folder_hash(tmp_path / "f") != before
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "weights").write_text("1")
    alone = folder_hash(tmp_path / "g")
    (tmp_path / "g" / "report.json").write_text("{}")
    assert folder_hash(tmp_path / "g") == alone
    with pytest.raises(ConfigError):
        folder_hash(tmp_path / "none")
