"""Build the pair table: draw candidates with the model itself, judge each by cost and quality, and pair them.

The table is a folder of parquet shards. A shard appears whole or not at all; whoever starts again makes what is
missing. Candidate images, unsafe ones among them, are removed once their shard is written.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from tqdm.auto import tqdm

from t2i_spo_plugin.data import PAIR_COLUMNS, PromptRow, drop_minors, generate, table_metadata, write_table
from t2i_spo_plugin.errors import NoPairsError
from t2i_spo_plugin.files import write_json
from t2i_spo_plugin.guards import Guard, Judgement, QualityJudge, check_domains, counterparts, judge_images
from t2i_spo_plugin.identity import claim, model_identity, pipeline_identity, rows_identity
from t2i_spo_plugin.images import open_image
from t2i_spo_plugin.metrics import check_not_scored
from t2i_spo_plugin.pipelines import pipeline_domain
from t2i_spo_plugin.registry import load_guard, load_pipeline, load_prompts, load_quality_model

from .pairing import Candidate, Judged, PairConfig, candidates_of, pairs_of_group, reason_without_pairs


__all__ = ["PairConfig", "build_pairs"]

_NO_PAIR = "no pair: "
"""Beginning of the counts of groups that made no pair."""
_SOURCES = ("prompts", "pipeline", "cost_model", "policy", "quality_model", "harmful", "benign", "lookalike", "split")
_NOT_IN_THE_TABLE = ("output", "keep_images", "progress", "batch_size", *_SOURCES)
"""Options that change no pair, or that are known by what they gave."""


def build_pairs(
    config: PairConfig,
    pipe: Any = None,
    guard: Guard | None = None,
    quality: QualityJudge | None = None,
    rows: Sequence[PromptRow] | None = None,
) -> Path:
    """Generate candidates, judge and pair them; returns the folder of the table. Existing shards are not built again.

    Processes that `accelerate launch` starts (with `--cpu` where there is no accelerator) share the missing shards.

    Args:
        config: see `PairConfig`.
        pipe: a loaded pipeline instead of the one that `config` names.
        guard: likewise.
        quality: likewise.
        rows: likewise, the prompts.

    Raises:
        ConfigError: `output` holds pairs of other settings.
        NotScoredError: more than one image in a hundred of a shard could not be scored.
        DomainError: a judge was made for other images than the pipeline's.
        NoPairsError: the table is whole and holds no pair; the message counts why.
    """
    output = Path(config.output)
    if rows is None:
        counts = {"harmful": config.harmful, "benign": config.benign, "lookalike": config.lookalike}
        rows = load_prompts(config.prompts, counts, config.split, config.seed, config.skip_bad_rows)
    rows = _mixed(drop_minors(rows)[0])
    if pipe is None:
        pipe = load_pipeline(config.pipeline)
    guard = guard or load_guard(config.cost_model, config.policy, config.override_domain)
    quality = quality or load_quality_model(config.quality_model)
    check_domains(guard, quality, pipeline_domain(pipe))
    weights = pipeline_identity(pipe)
    judges = {**guard.identity, "quality_model": model_identity(quality)}
    options = {key: value for key, value in asdict(config).items() if key not in _NOT_IN_THE_TABLE}
    claim(output, {**options, **judges, "prompts": rows_identity(rows), "pipeline": weights}, "pairs")
    shards = [rows[start : start + config.shard_size] for start in range(0, len(rows), config.shard_size)]
    missing = [(number, shard) for number, shard in enumerate(shards) if not _shard_file(output, number).is_file()]
    # Every process must have seen the same shards missing before the first of them writes one.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    state.wait_for_everyone()
    with state.split_between_processes(missing) as part:
        # Older versions give the last item to processes that there is none left for.
        todo = part if state.process_index < len(missing) else []
    for number, shard in tqdm(todo, desc="pairs", unit="shard", disable=not (todo and config.progress)):
        _build_shard(number, shard, config, pipe, guard, quality, weights)
    state.wait_for_everyone()
    if state.is_main_process:
        counted = _write_counts(output, len(shards))
        if counted is not None and not counted["pairs"]:
            reasons = "; ".join(
                f"{value} x {key.removeprefix(_NO_PAIR)}" for key, value in counted.items() if _NO_PAIR in key
            )
            raise NoPairsError(
                f"{output} holds no pair: {counted['prompts']} prompts, {counted['images']} images, "
                f"{counted['not_scored']} not scored; {reasons or 'no prompt'}"
            )
    return output


def _build_shard(
    number: int,
    rows: Sequence[PromptRow],
    config: PairConfig,
    pipe: Any,
    guard: Guard,
    quality: QualityJudge,
    weights: Mapping[str, str],
) -> None:
    output = Path(config.output)
    work = output / "candidates" / f"{number:05d}"
    candidates = [candidate for row in rows for candidate in candidates_of(row, config)]
    files = _generate(candidates, work, config, pipe, weights)
    generated = [candidate for candidate in candidates if candidate.image in files]
    images = [open_image(files[one.image]) for one in generated]
    domain = None if config.override_domain else pipeline_domain(pipe)
    prompts = [one.caption for one in generated]
    completions = [counterparts(one.harmful, one.completions) for one in generated]
    judgements = judge_images(images, prompts, completions, guard, quality, domain)
    reasons = [one for one in judgements if isinstance(one, str)]
    failed = len(reasons) + len(candidates) - len(generated)
    check_not_scored(failed, len(candidates), why=reasons[0] if reasons else "")
    table: list[dict[str, Any]] = []
    reasons_without: Counter[str] = Counter()
    for group in _groups(generated, files, judgements):
        pairs = pairs_of_group(group, config)
        table += pairs
        if not pairs:
            reasons_without[f"{_NO_PAIR}{reason_without_pairs(group, config)}"] += 1
    metadata = {"images": len(files), "not_scored": failed, "prompts": len(rows), **reasons_without}
    write_table(table, _shard_file(output, number), PAIR_COLUMNS, {key: str(value) for key, value in metadata.items()})
    if not config.keep_images:
        shutil.rmtree(work, ignore_errors=True)


def _generate(
    candidates: Sequence[Candidate], work: Path, config: PairConfig, pipe: Any, weights: Mapping[str, str]
) -> dict[tuple[str, int, bool], bytes]:
    """File content of every image, generated once however often it is judged."""
    plain: dict[str, Any] = {"steps": config.steps, "guidance_scale": config.guidance_scale}
    poorer: dict[str, Any] = {
        "steps": config.degraded_steps or config.steps,
        "guidance_scale": config.guidance_scale if config.degraded_guidance is None else config.degraded_guidance,
    }
    harmful = {one.caption for one in candidates if one.harmful}
    files: dict[tuple[str, int, bool], bytes] = {}
    for degraded, options in ((False, plain), (True, poorer)):
        wanted = dict.fromkeys(one.image for one in candidates if one.degraded == degraded)
        if not wanted:
            continue
        # Numbers for ids, which become file names: a harmful prompt may stand in none.
        requests = {f"{place:06d}": request for place, request in enumerate(wanted)}
        rows = [
            PromptRow(id=number, prompt=prompt, kind="harmful" if prompt in harmful else "benign", seed=seed)
            for number, (prompt, seed, _) in requests.items()
        ]
        report = generate(
            pipe,
            rows,
            work / ("degraded" if degraded else "plain"),
            batch_size=config.batch_size,
            progress=config.progress,
            identity=weights,
            **options,
        )
        for image in report.images:
            if image.path is not None:
                files[requests[image.row.id]] = image.path.read_bytes()
    return files


def _groups(
    generated: Sequence[Candidate], files: dict[tuple[str, int, bool], bytes], judgements: Sequence[Judgement | str]
) -> Iterator[list[Judged]]:
    groups: dict[str, list[Judged]] = {}
    for candidate, one in zip(generated, judgements, strict=True):
        if not isinstance(one, str):
            judged = Judged(candidate, files[candidate.image], one.cost, one.quality)
            groups.setdefault(candidate.group, []).append(judged)
    yield from groups.values()


def _mixed(rows: Sequence[PromptRow]) -> list[PromptRow]:
    """Kinds spread evenly, so that every shard has some of each."""
    kinds: dict[str, list[PromptRow]] = {}
    for row in rows:
        kinds.setdefault(row.kind, []).append(row)
    placed = [((n + 0.5) / len(some), kind, row) for kind, some in kinds.items() for n, row in enumerate(some)]
    return [row for _, _, row in sorted(placed, key=lambda item: item[:2])]


def _shard_file(output: Path, number: int) -> Path:
    return output / f"pairs-{number:05d}.parquet"


def _write_counts(output: Path, shards: int) -> dict[str, Any] | None:
    """The data card's numbers, once every shard is there; None before."""
    files = [_shard_file(output, number) for number in range(shards)]
    if not all(file.is_file() for file in files):
        return None
    totals: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    categories: Counter[str] = Counter()
    for file in files:
        totals.update({key: int(value) for key, value in table_metadata(file).items()})
        table = pq.read_table(file, columns=["pair_kind", "category"])
        kinds.update(table.column("pair_kind").to_pylist())
        categories.update(name for name in table.column("category").to_pylist() if name)
    content = {**totals, "pairs": sum(kinds.values()), "kinds": dict(kinds), "categories": dict(categories)}
    write_json(output / "counts.json", content)
    return content
