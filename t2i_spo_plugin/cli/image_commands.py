"""Commands that make images and judge them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from t2i_spo_plugin.errors import ConfigError, NotScoredError
from t2i_spo_plugin.options import read_options, split_strength
from t2i_spo_plugin.registry import STICKER

from .parsing import AsCSV, AsJSON, command
from .scoring import Form, image_paths, score_files, verdict


def demo(args: Sequence[str]) -> None:
    """Images without and with the safety adapter, what each costs, and the score; offline, in minutes."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    from .demo import DemoConfig, run_demo

    run_demo(read_options(DemoConfig, args, "spo demo"))


@command
def generate(
    prompts: tuple[str, ...],
    pipeline: str = STICKER,
    adapter: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    strength: float = 1.0,
    adapter_gate: str | None = None,
    out: Path = Path("outputs"),
    seed: int = 0,
    steps: int = 25,
    guidance: float = 3.0,
    batch_size: int = 4,
    skip_bad_rows: bool = False,
) -> None:
    """Generate images with a pipeline and safety adapters.

    Args:
        prompts: one or more prompts, or a single file of them: .csv, .tsv, .jsonl, .json, .parquet, or .txt with a
            prompt a line.
        pipeline: what generates: sticker (the bundled one), a diffusers folder, or a Hub id.
        adapter: a safety adapter: spo, dpo or style (bundled, for the sticker pipeline), a file, a folder, or a Hub
            id, each with an optional @STRENGTH; give it several times to have several side by side.
        strength: strength of adapters without an @STRENGTH; 0 is the base model exactly, 1 the adapter as trained.
        adapter_gate: switches the only adapter on for the images that need it: sticker (bundled, for the adapter
            spo), or a file that spo train-gate wrote.
        out: folder that receives the images.
        seed: seed of the first prompt; the following ones count up.
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        batch_size: images generated at a time.
        skip_bad_rows: leave rows of the file out that cannot be used, instead of refusing it.
    """
    from t2i_spo_plugin import data
    from t2i_spo_plugin.pipelines import compose, enable_spo, pipeline_domain
    from t2i_spo_plugin.registry import adapter_source, load_adapter_gate, load_pipeline

    rows = _prompt_rows(prompts, seed, skip_bad_rows)
    pipe = load_pipeline(pipeline)
    adapters = [split_strength(text, strength) for text in adapter]
    sources = [(adapter_source(source), value) for source, value in adapters]
    if adapter_gate is not None:
        if len(sources) != 1:
            raise ConfigError(f"--adapter-gate gates one adapter, {len(sources)} are named")
        enable_spo(pipe).load_spo_lora(*sources[0], steering=load_adapter_gate(adapter_gate))
    elif sources:
        compose(pipe, sources)
    generated = data.generate(pipe, rows, out, batch_size=batch_size, steps=steps, guidance_scale=guidance)
    if generated.n_dropped_minors:
        print(f"{generated.n_dropped_minors} prompts mention minors and were left out")
    if generated.n_cut:
        print(f"{generated.n_cut} prompts are longer than the pipeline reads; their end changes nothing")
    for image in generated.images:
        if image.path is None:
            print(f"{image.row.id}: not generated: {image.failed}", file=sys.stderr)
    images = [image for image in generated.images if image.path is not None]
    verdicts = _verdicts([image.open() for image in images], pipeline_domain(pipe))
    for image, words in zip(images, verdicts, strict=True):
        print(f"{image.path}: {words}: {image.row.prompt}")


@command
def score(
    images: Annotated[tuple[Path, ...], tyro.conf.Positional],
    domain: str | None = None,
    json_: AsJSON = False,
    csv_: AsCSV = False,
    fail_on: Literal["unsafe"] | None = None,
    overlays: Path | None = None,
    category: str | None = None,
    cost_model: str = STICKER,
    policy: str | None = None,
    override_domain: bool = False,
) -> int:
    """Report how unsafe images are, overall and by category, and where.

    All frames of an animation count, and transparency over white as well as over black. The exit code is 2 when an
    image was not scored.

    Args:
        images: image files, folders (with those below them), or quoted patterns such as "scenes/**/*.png"; files and
            folders that begin with a dot are left out unless named.
        domain: what the images are, such as sticker or photo. A cost model knows one domain and says nothing of
            another.
        json_: print one JSON document.
        csv_: print a table, one row an image.
        fail_on: with unsafe, the exit code is 1 when all images were scored and one is unsafe.
        overlays: folder that receives each image with its cost drawn over it.
        category: draw the cost of this category instead of the deciding one.
        cost_model: what judges: sticker (the bundled one), open_nsfw, owen or nudenet (for photographs; each says
            what to install), hf-classifier:ID, shieldgemma2:ID, vlm:ID, endpoint:URL, a YAML file that describes one
            of these or an ensemble, the name of one that another package offers, a folder that save_pretrained of a
            cost model wrote, or the Hub id of one.
        policy: what counts as unsafe: sticker, photo, photo-sexual, photo-harms, photo-shieldgemma2, or a YAML file;
            by default the bundled one with the cost model's categories.
        override_domain: score images of another domain all the same; their costs may mean little.
    """
    from t2i_spo_plugin.registry import load_guard

    if not images:
        raise ConfigError("name at least one image")
    if json_ and csv_:
        raise ConfigError("--json and --csv are two forms of one answer; name one")
    paths = image_paths(images)
    guard = load_guard(cost_model, policy, override_domain)
    if domain is None and not override_domain:
        known = guard.cost_model.domain
        raise ConfigError(
            f"say what the images are: the cost model knows {known} images only (--domain {known}); "
            "--override-domain scores others too, but their costs may mean little"
        )
    form: Form = "json" if json_ else "csv" if csv_ else "text"
    unsafe, not_scored = score_files(paths, guard, domain, overlays, category, form)
    if not_scored:
        raise NotScoredError(f"{not_scored} of {len(paths)} images were not scored; that says nothing of them")
    return 1 if unsafe and fail_on == "unsafe" else 0


def _prompt_rows(prompts: Sequence[str], seed: int, skip_bad_rows: bool) -> list[Any]:
    from t2i_spo_plugin.data import PromptRow, is_table_file, read_prompts

    if not prompts:
        raise ConfigError("name at least one prompt")
    files = [text for text in prompts if is_table_file(text)]
    if files and len(prompts) > 1:
        raise ConfigError(f"{files[0]} is a file of prompts; name it alone, or prompts without a file")
    if files:
        prompt_set = read_prompts(files[0], seed=seed, skip_bad_rows=skip_bad_rows)
        if prompt_set.n_dropped:
            print(f"{prompt_set.n_dropped} prompts mention minors and were left out")
        return list(prompt_set)
    return [PromptRow(f"{number:04d}", text, "unlabelled", seed=seed + number) for number, text in enumerate(prompts)]


def _verdicts(images: Sequence[Any], domain: str) -> list[str]:
    """What the bundled cost model for this kind of image says, where there is one."""
    from t2i_spo_plugin.registry import COST_MODELS, load_guard

    names = COST_MODELS.bundled(domain)
    if not names or not images:
        return [f"not scored: no bundled cost model knows {domain} images"] * len(images)
    report = load_guard(names[0])(images, domain)
    return [verdict(report, number) for number in range(len(images))]
