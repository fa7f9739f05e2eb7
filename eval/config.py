"""One evaluation from names and files: what `spo eval` runs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from t2i_spo_plugin.data import KINDS, count_cut_prompts, with_seeds
from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.identity import pipeline_identity
from t2i_spo_plugin.options import expand_home
from t2i_spo_plugin.registry import (
    COST_MODELS,
    PIPELINES,
    QUALITY_MODELS,
    REFEREES,
    STICKER,
    load_guard,
    load_pipeline,
    load_prompts,
    load_quality_model,
    name_with_revision,
)

from .promptsets import Split, file_rows
from .report import write_report
from .runner import GenerationOptions, RunSummary, drop_images, generate_and_score, summarise_run, write_summary
from .scoring import Judges
from .systems import base_system, parse_adapters


ALL = "all"


@dataclass(frozen=True)
class EvalConfig:
    """What an evaluation generates, with which systems, and who judges it.

    Attributes:
        out: folder for images, tables, `summary.json` and `report.html`; an interrupted run is taken up again.
        pipeline: what generates: `sticker` (the bundled one), a diffusers folder, or a Hub id.
        adapters: systems to evaluate beside the base model: `NAME`, `NAME=SOURCE` or either with `@STRENGTH`; a source
            is `spo`, `dpo` or `style` (bundled), a file, a folder or a Hub id.
        strength: strength of adapters without an @STRENGTH; 0 is the base model exactly, 1 the adapter as trained.
        n_harmful: number of harmful prompts; of the sticker prompts so many of each wording class, and so below.
        n_benign: number of benign prompts.
        n_lookalike: number of benign prompts that look harmful.
        seeds_per_prompt: number of images of each prompt; one seed hides harm.
        wordings: wording classes of the sticker prompts (grammar, sentences, new words, order, negation, language,
            typos), by which results are printed, or `all`. Prompt files say theirs in a column `wording`.
        split: part of the sticker prompts; choose on `val`, report on `test`.
        harmful: file with harmful prompts instead of the sticker world's.
        benign: file with benign prompts; needed when one with harmful prompts is given.
        lookalike: file with benign prompts that look harmful.
        steps: denoising steps.
        guidance_scale: classifier-free guidance scale.
        batch_size: images generated at a time.
        shard_size: images after which a table is written.
        skip_bad_rows: leave rows of a prompt file out that cannot be used, instead of refusing the file.
        seed: seed of the prompt choice and the bootstrap; each prompt carries the seeds of its own images.
        judge: who judges: `cost` is cost and quality model; `referee` lets the referee look too, at test prompts only.
        policy: what counts as unsafe: `sticker`, `photo`, `photo-sexual`, or a YAML file.
        cost_model: what says how unsafe an image is: `sticker`, `open_nsfw`, `owen`, `nudenet`, a folder, or a Hub id.
        quality_model: what says how good an image is: `sticker`, a folder, or a Hub id.
        override_domain: use cost and quality model on images of a domain they were not made for.
        resamples: resamples of the bootstrap.
        gallery: number of prompts shown in the report.
        keep_images: keep the images after the report is written; by default only in the sticker world, whose unsafe
            images are harmless to look at. Images that are not kept are not shown in the report either.
        device: where the pipeline and the models run.
        progress: show progress bars.

    Raises:
        ConfigError: an option out of range, or the referee asked to look at prompts that choices are made on.
    """

    out: Path = Path("eval-out")
    pipeline: str = STICKER
    adapters: tuple[str, ...] = ("spo", "dpo")
    strength: float = 1.0
    n_harmful: int = 125
    n_benign: int = 125
    n_lookalike: int = 50
    seeds_per_prompt: int = 4
    wordings: tuple[str, ...] = ("grammar", "sentences")
    split: Split = "test"
    harmful: Path | None = None
    benign: Path | None = None
    lookalike: Path | None = None
    steps: int = 25
    guidance_scale: float = 3.0
    batch_size: int = 8
    shard_size: int = 64
    skip_bad_rows: bool = False
    seed: int = 0
    judge: Literal["cost", "referee"] = "cost"
    policy: str = STICKER
    cost_model: str = STICKER
    quality_model: str = STICKER
    override_domain: bool = False
    resamples: int = 2000
    gallery: int = 48
    keep_images: bool | None = None
    device: str = "cpu"
    progress: bool = True

    def __post_init__(self) -> None:
        expand_home(self)
        for name in ("n_harmful", "n_benign", "seeds_per_prompt", "steps", "batch_size", "shard_size", "resamples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("n_lookalike", "gallery", "strength"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not self.wordings or len(set(self.wordings)) < len(self.wordings):
            raise ConfigError(f"wordings must name classes, each once, got {', '.join(self.wordings) or 'none'}")
        if (self.harmful is None) != (self.benign is None) or (self.lookalike and not self.harmful):
            raise ConfigError("prompt files come together: give harmful and benign ones (lookalike ones may follow)")
        if self.pipeline != STICKER and self.harmful is None:
            raise ConfigError(
                "the bundled prompts are for the sticker world; give files with harmful and benign prompts"
            )
        if self.judge == "referee" and self.harmful is None and self.split != "test":
            raise ConfigError(
                "the referee looks at test prompts only, so that nothing is chosen by it; use judge='cost'"
            )
        if self.judge == "referee" and self.pipeline != STICKER:
            raise ConfigError("the bundled referee knows the sticker world only; use judge='cost'")

    @property
    def shows_images(self) -> bool:
        """Whether images are kept and shown."""
        return self.pipeline == STICKER if self.keep_images is None else self.keep_images

    @property
    def wording_classes(self) -> tuple[str, ...]:
        """`wordings`, with `all` spelt out."""
        from t2i_spo_plugin.sticker.wording import Wording

        return tuple(one.value for one in Wording) if self.wordings == (ALL,) else self.wordings

    def generation_options(self) -> GenerationOptions:
        """The part of the options that generation needs."""
        return GenerationOptions(self.steps, self.guidance_scale, self.batch_size, self.shard_size, self.progress)


def run_eval(config: EvalConfig) -> RunSummary:
    """Generate, score, summarise and report as `config` says; writes everything below `config.out`."""
    systems = [base_system(), *parse_adapters(config.adapters, config.strength)]
    counts = config.n_harmful, config.n_benign, config.n_lookalike
    if config.harmful is None:
        by_kind = dict(zip(KINDS, counts, strict=True))
        rows = load_prompts(STICKER, by_kind, config.split, config.seed, wordings=config.wording_classes)
        n_dropped = 0
    else:
        files = (("harmful", config.harmful), ("benign", config.benign), ("lookalike", config.lookalike))
        rows, n_dropped = file_rows(files, counts, config.seed, config.skip_bad_rows)
    judges = load_judges(config)
    pipe = load_pipeline(config.pipeline).to(config.device)
    pipeline_name = name_with_revision(PIPELINES, config.pipeline)
    every = with_seeds(rows, config.seeds_per_prompt)
    scores = generate_and_score(pipe, systems, every, judges, config.out, config.generation_options())
    metadata = {
        "pipeline": pipeline_name,
        "weights": pipeline_identity(pipe),
        "systems": {system.name: dict(system.metadata) for system in systems},
        "prompts": {kind: sum(row.kind == kind for row in rows) for kind in ("harmful", "benign", "lookalike")},
        "seeds per prompt": config.seeds_per_prompt,
        "prompts by wording": dict(Counter(row.wording for row in rows if row.wording)),
        "prompts removed because they mention minors": n_dropped,
        "prompts longer than the pipeline reads": count_cut_prompts(pipe, [row.prompt for row in rows]),
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()},
    }
    summary = summarise_run(scores, judges, metadata=metadata, resamples=config.resamples, seed=config.seed)
    write_summary(summary, config.out / "summary.json")
    write_report(summary, scores, judges, config.out, n_gallery=config.gallery if config.shows_images else 0)
    if not config.shows_images:
        drop_images(config.out)
    return summary


def load_judges(config: EvalConfig) -> Judges:
    """Cost model with policy, quality model, and the referee when `config.judge` asks for it."""
    guard = load_guard(config.cost_model, config.policy, config.override_domain)
    quality = load_quality_model(config.quality_model)
    guard.cost_model.to(config.device)
    quality.to(config.device)
    referee, referee_name, referee_metadata = None, "", {}
    if config.judge == "referee":
        referee, referee_name = REFEREES.load(STICKER), name_with_revision(REFEREES, STICKER)
        report = REFEREES.rows[STICKER].path / "report.json"
        if report.is_file():
            referee_metadata = json.loads(report.read_text(encoding="utf-8"))["measured"]
    return Judges(
        guard=guard,
        quality_model=quality,
        cost_name=name_with_revision(COST_MODELS, config.cost_model, guard.cost_model),
        # By its content: the text tower of the bundled one lies elsewhere, and the folder of a composite holds the
        # images of its reference too.
        quality_name=name_with_revision(QUALITY_MODELS, config.quality_model, quality),
        referee=referee,
        referee_name=referee_name,
        referee_metadata=referee_metadata,
    )
