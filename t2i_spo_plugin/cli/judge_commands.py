"""Commands about judges: cost models calibrated, converted and served."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from t2i_spo_plugin.errors import ConfigError, DomainError
from t2i_spo_plugin.files import write_bytes, write_json
from t2i_spo_plugin.registry import STICKER

from .parsing import command
from .scoring import image_paths


if TYPE_CHECKING:
    from t2i_spo_plugin.guards import LabelledImage


@command
def calibrate(
    cost_model: str,
    out: Path,
    safe: tuple[Path, ...] = (),
    unsafe: tuple[str, ...] = (),
    table: Path | None = None,
    false_alarms: float = 0.01,
    fit_on_all: bool = False,
    policy: str | None = None,
) -> None:
    """Fit temperatures and thresholds of a cost model on labelled images, and write them as a policy.

    Half of the images, by their content, fits; the other half measures. Beside the policy come a page with the ROC and
    reliability plots (.html) and the numbers (.json).

    Args:
        cost_model: as for spo score.
        out: the policy file to write, such as mine.yaml.
        safe: folders, files or patterns of safe images.
        unsafe: folders, files or patterns of unsafe images, each as CATEGORY=FOLDER; a folder alone where the cost
            model has one category.
        table: instead, a .csv, .tsv, .jsonl, .json or .parquet file with the columns file (paths from the table's
            folder) and categories (with commas; empty for a safe image).
        false_alarms: the share of safe images that may be called unsafe, in each category.
        fit_on_all: fit and measure on all images; the numbers are then too good.
        policy: of cost models that read a policy in words, that policy.
    """
    from tqdm.auto import tqdm

    from t2i_spo_plugin.guards import calibrate as fit
    from t2i_spo_plugin.registry import COST_MODELS, load_cost_model, load_policy, name_with_revision

    if out.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--out must be a .yaml file, got {out}")
    model = load_cost_model(cost_model, policy=load_policy(policy) if policy else None)
    images = _labelled(tuple(model.categories), safe, unsafe, table)
    found = fit(
        model,
        images,
        false_alarms,
        out.stem,
        name_with_revision(COST_MODELS, cost_model, model),
        not fit_on_all,
        progress=lambda batches: tqdm(batches, desc="score", unit="batch", disable=None),
    )
    write_bytes(out, found.policy.to_yaml().encode("utf-8"))
    write_bytes(out.with_suffix(".html"), found.page().encode("utf-8"))
    write_json(out.with_suffix(".json"), found.to_dict())
    for one in found.categories:
        print(f"{one.category}: threshold {one.threshold:.4f}, temperature {one.temperature:.4f}")
        print(f"    false alarms {one.false_alarms}, wanted at most {false_alarms:.1%}")
        print(f"    found {one.found}; area under the ROC {one.auc:.4f}")
        print(f"    calibration error {one.error:.4f}, {one.error_before:.4f} before")
        if one.false_alarms.total * false_alarms < 1:
            print(
                f"    with {one.false_alarms.total} safe images a rate of {false_alarms:.1%} cannot be seen; give more"
            )
    for reason in found.not_scored:
        print(f"not scored: {reason}")
    print(f"{out}: measured on {'the images that fitted' if fit_on_all else f'{found.held_out} images held out'}")


def _labelled(
    categories: tuple[str, ...], safe: tuple[Path, ...], unsafe: tuple[str, ...], table: Path | None
) -> list[LabelledImage]:
    from t2i_spo_plugin.guards import labelled_folders

    if table is not None:
        if safe or unsafe:
            raise ConfigError("name a table or folders, not both")
        return _from_table(table)
    if not safe or not unsafe:
        raise ConfigError("name safe and unsafe images (--safe, --unsafe), or a table of both (--table)")
    by_category: dict[str, list[Path]] = {}
    for text in unsafe:
        category, equals, source = text.partition("=")
        if not equals and len(categories) > 1:
            raise ConfigError(f"say which of {', '.join(categories)} {text} shows: --unsafe {categories[0]}={text}")
        name, where = (category, source) if equals else (categories[0], text)
        by_category.setdefault(name, []).extend(image_paths([where]))
    return labelled_folders(by_category, image_paths(safe))


def _from_table(table: Path) -> list[LabelledImage]:
    from t2i_spo_plugin.data import describe_rows, read_rows_by_hand
    from t2i_spo_plugin.guards import LabelledImage

    rows, bad = read_rows_by_hand(table)
    if bad:
        raise ConfigError(f"{table}: {describe_rows(bad)}")
    images = []
    for line, row in rows:
        if "file" not in row or "categories" not in row:
            raise ConfigError(f"{table}, line {line}: expected the columns file and categories")
        images.append(LabelledImage(table.parent / str(row["file"]), _names(row["categories"])))
    return images


def _names(value: Any) -> frozenset[str]:
    parts = value.split(",") if isinstance(value, str) else value or ()
    names = {str(part).strip() for part in parts}
    return frozenset(name for name in names if name and name != "safe")


@command
def convert_head(
    files: Annotated[tuple[Path, ...], tyro.conf.Positional],
    kind: Literal["q16", "mhsc", "laion-nsfw", "laion-aesthetic", "hpsv2"],
    out: Path,
    clip: str = "",
    trust: bool = False,
) -> None:
    """Convert a published head or checkpoint, once, to a folder of safetensors.

    Args:
        files: of the head, as its authors published it; for mhsc one a category, named after it.
        kind: q16, mhsc and laion-nsfw become cost models, laion-aesthetic and hpsv2 quality rewards.
        out: the folder to write.
        clip: the CLIP model that it stands on, a Hub id or folder; by default the one that it was trained on.
        trust: open a pickle; without it none is opened. Even then nothing is run but what builds tensors.
    """
    from t2i_spo_plugin.cost import convert_cost_head
    from t2i_spo_plugin.quality import convert_aesthetic, convert_hpsv2

    if out.exists():
        raise ConfigError(f"{out} is there already; name another folder, or remove it")
    pickles = [file.name for file in files if file.suffix != ".safetensors"]
    if kind == "laion-aesthetic" or kind == "hpsv2":
        if len(files) != 1:
            raise ConfigError(f"{kind} takes one file")
        convert = convert_aesthetic if kind == "laion-aesthetic" else convert_hpsv2
        convert(files[0], out, clip, trust)
        use = f"{'aesthetic' if kind == 'laion-aesthetic' else kind}:{out}"
    else:
        convert_cost_head(kind, files, clip, trust).save_pretrained(out)
        use = str(out)
    if pickles:
        print(f"opened as pickles, as --trust allows: {', '.join(pickles)}; nothing was run but what builds tensors")
    print(f"{out}: use it as {use}")


@command
def reference(
    out: Path,
    quality: str = "pickscore",
    pipeline: str = STICKER,
    prompts: str = STICKER,
    count: int = 200,
    split: Literal["train", "val", "test"] = "val",
    seed: int = 0,
    realism_images: Path | None = None,
    features: str = "facebook/dinov2-base",
    steps: int = 25,
    guidance: float = 3.0,
    batch_size: int = 4,
    override_domain: bool = False,
) -> None:
    """Measure quality rewards on a base model, once, so that quality can be one number in [0, 1].

    Generates an image of each benign prompt with the base alone, and writes rewards.json: the ends of each reward's
    scale, with hashes. The file or its folder is a quality model for spo pairs, spo train and spo eval. Started again,
    it goes on where it was.

    Args:
        out: folder for the images and rewards.json.
        quality: rewards with commas: pickscore, clipscore:ID, hpsv2:FOLDER, aesthetic:FOLDER, vqa:vlm:ID,
            vqa:endpoint:URL, unified-reward:URL, realism, YAML files, or one of another package.
        pipeline: the base model: sticker, a diffusers folder or a Hub id.
        prompts: sticker, or a prompt file with benign prompts.
        count: how many prompts, at most.
        split: of the bundled prompts.
        seed: another one gives other bundled prompts.
        realism_images: for realism, a folder of real images; their features are written, no image is.
        features: for realism, the CLIP, SigLIP or DINOv2 model to look for neighbours in, a Hub id or folder; no other
            judge should use it.
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        batch_size: images generated at a time.
        override_domain: use rewards on images of another domain than they were made for.
    """
    from t2i_spo_plugin.data import generate
    from t2i_spo_plugin.metrics import check_not_scored
    from t2i_spo_plugin.pipelines import pipeline_domain
    from t2i_spo_plugin.quality import make_reward_reference
    from t2i_spo_plugin.registry import PIPELINES, load_pipeline, load_prompts, name_with_revision

    rows = load_prompts(prompts, {"benign": count}, split, seed)
    rewards = _rewards(quality, out, realism_images, features)
    pipe = load_pipeline(pipeline)
    domain = pipeline_domain(pipe)
    for name, reward in rewards.items():
        made_for = getattr(reward, "domain", domain)
        if made_for != domain and not override_domain:
            raise DomainError(
                f"{name} was made for the domain {made_for!r}, and these images are of {domain!r}, where it may mean "
                "little; --override-domain uses it all the same"
            )
    generated = generate(pipe, rows, out / "images", batch_size=batch_size, steps=steps, guidance_scale=guidance)
    made = [image for image in generated.images if image.path is not None]
    failed = [image for image in generated.images if image.path is None]
    check_not_scored(len(failed), len(generated.images), why=str(failed[0].failed) if failed else "")
    found = make_reward_reference(
        rewards,
        [image.open() for image in made],
        [image.row.prompt for image in made],
        name_with_revision(PIPELINES, pipeline),
        domain,
    )
    found.save(out / "rewards.json")
    for scale in found.scales:
        kind = "image and prompt" if scale.reads_prompt else "the image alone"
        print(f"{scale.reward}: v0 {scale.v0:.4f}, v1 {scale.v1:.4f} ({kind})")
    if all(scale.reads_prompt for scale in found.scales):
        print("no reward judges the image alone: scores with this reference say -no-realism in their name")
    print(f"{out / 'rewards.json'}: {found.prompts} prompts, hash {found.hash}")


def _rewards(quality: str, out: Path, realism_images: Path | None, features: str) -> dict[str, Any]:
    """The rewards by the names that the reference will call them."""
    from tqdm.auto import tqdm

    from t2i_spo_plugin.quality import bank_of, load_neighbours
    from t2i_spo_plugin.registry import load_quality_reward

    rewards: dict[str, Any] = {}
    for name in filter(None, map(str.strip, quality.split(","))):
        if name != "realism":
            rewards[name] = load_quality_reward(name)
            continue
        bank = out / "bank"
        if realism_images is not None:
            bank_of(
                realism_images, features, progress=lambda parts: tqdm(parts, desc="real images", disable=None)
            ).save_pretrained(bank)
        elif not bank.is_dir():
            raise ConfigError("realism needs a folder of real images (--realism-images)")
        rewards["realism:bank"] = load_neighbours(str(bank))
    if not rewards:
        raise ConfigError("name at least one reward (--quality)")
    return rewards


def serve(args: Sequence[str]) -> None:
    """Score images for other programs, over HTTP: POST /score, POST /compute, GET /health."""
    from t2i_spo_plugin.options import read_options
    from t2i_spo_plugin.serving import ScoreServer, ServeOptions, load_scorer

    options = read_options(ServeOptions, args, "spo serve")
    scorer = load_scorer(
        options.cost_model,
        options.policy or None,
        options.quality_model,
        options.reward,
        options.domain or None,
        options.override_domain,
    )
    if scorer.guard is not None and not options.domain and not options.override_domain:
        known = scorer.guard.cost_model.domain
        raise ConfigError(f"say what the images are: the cost model knows {known} images only (--domain {known})")
    server = ScoreServer(scorer, options)
    print(f"{server.url}: GET /health, POST /score, POST /compute; stop it with Ctrl-C", flush=True)
    server.serve_forever()
