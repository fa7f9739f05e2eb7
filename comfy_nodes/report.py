"""Nodes that put costs and quality into one number, and into report files."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.v0_0_2 import io, ui
from torch import Tensor

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.guards import Guard, SafetyReport, parse_prompts, safety_content, safety_page, summarise_images
from t2i_spo_plugin.images import channels_first
from t2i_spo_plugin.metrics import ScoreMetadata, ScoreSummary
from t2i_spo_plugin.quality import CompositeQuality, QualityModel
from t2i_spo_plugin.registry import QUALITY_MODELS, STICKER, load_quality_model, name_with_revision

from . import COST_MODELS, sockets
from .files import files_below, fingerprint, output_file
from .images import BATCH, score, steps


BUNDLED = f"{STICKER} (bundled)"


class UAScore(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPO_UAScore",
            display_name="UAScore",
            category="SPO/report",
            description="Puts safety and quality of a batch into one number from 0 to 100 (uascore/2, this project's "
            "own definition): every image is looked at in nine views. It needs images of harmful and of benign "
            "prompts, and compares systems on one base model and reference only.",
            search_aliases=["score", "benchmark", "evaluate", "metric", "safety score", "quality score"],
            is_output_node=True,
            inputs=[
                io.Image.Input("image", tooltip="The images of one system, harmful and benign prompts in one batch."),
                sockets.CostModel.Input("cost_model", tooltip="From Load Safety Cost Model."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    tooltip="The prompts of the images: one line an image, in order.",
                ),
                io.String.Input(
                    "safe_prompts",
                    multiline=True,
                    tooltip="One line an image: for a harmful prompt its safe completions, a vertical bar between "
                    "them; an empty line for a benign prompt.",
                ),
                io.Combo.Input(
                    "reference",
                    options=references(),
                    tooltip="The quality model and its scale: the bundled one, which knows the stickers of the demo, "
                    "or a reference file in models/safety_cost.",
                ),
            ],
            outputs=[
                sockets.Scores.Output("scores", tooltip="For Save Safety Report."),
                io.Float.Output("uascore", tooltip="From 0 to 100, higher is better."),
                io.String.Output("text", tooltip="The score with interval, counts, and what judged."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, reference: str, **others: Any) -> str:
        return fingerprint(_quality_files(_reference_path(reference)))

    @classmethod
    def execute(
        cls, image: Tensor, cost_model: Guard, prompts: str, safe_prompts: str, reference: str
    ) -> io.NodeOutput:
        asked = parse_prompts(prompts, safe_prompts, len(image))
        path = _reference_path(reference)
        if _is_bundled(path):
            cost_model.check_domain(QUALITY_MODELS.rows[STICKER].domain)
        model, name = _quality_model(path, fingerprint(_quality_files(path)))
        safety = score(cost_model, image, in_views=True)
        pixels = channels_first(image)
        quality = torch.full((len(image),), float("nan"))
        for part in steps(len(image), BATCH):
            scored = [n for n in range(len(image))[part] if safety.reasons[n] is None]
            if scored:
                texts, completions = zip(*[(asked[n].text, asked[n].safe_prompts) for n in scored], strict=True)
                quality[scored] = model.quality(pixels[scored].cpu(), texts, completions).q.float()
        metadata = ScoreMetadata(
            cost_model.name,
            name,
            model.reference_hash,
            cost_model.policy.name,
            realism_known=getattr(model, "knows_realism", True),
        )
        summary = summarise_images("these images", safety, quality, asked, metadata)
        return io.NodeOutput(summary, summary.uascore, str(summary), ui=ui.PreviewText(str(summary)))


class SaveReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPO_SaveReport",
            display_name="Save Safety Report",
            category="SPO/report",
            description="Writes costs, categories, small images with their cost maps, and the score, as JSON and as "
            "one HTML page that needs no other file, into ComfyUI's output folder.",
            search_aliases=["export", "html report", "json", "safety report", "save scores", "audit"],
            is_output_node=True,
            inputs=[
                sockets.Safety.Input("safety", optional=True, tooltip="From Safety Cost."),
                sockets.Scores.Input("scores", optional=True, tooltip="From UAScore."),
                io.String.Input(
                    "filename_prefix",
                    default="spo/report",
                    tooltip="Folder and name below the output folder; a number is added.",
                ),
            ],
            outputs=[io.String.Output("path", tooltip="The HTML file; the JSON file lies beside it.")],
        )

    @classmethod
    def execute(
        cls, filename_prefix: str, safety: SafetyReport | None = None, scores: ScoreSummary | None = None
    ) -> io.NodeOutput:
        if safety is None and scores is None:
            raise ConfigError("there is nothing to report: connect safety, scores, or both")
        content = json.dumps(safety_content(safety, scores), indent=1, ensure_ascii=False) + "\n"
        page = output_file(filename_prefix, ".html", ".json")
        page.write_text(safety_page(safety, scores), encoding="utf-8")
        page.with_suffix(".json").write_text(content, encoding="utf-8")
        return io.NodeOutput(str(page), ui=ui.PreviewText(str(page)))


def references() -> list[str]:
    """What UAScore offers: the bundled reference, single files, and the `reference.json` of quality models."""
    files = [name for name in folder_paths.get_filename_list(COST_MODELS) if name.endswith(".json")]
    return [BUNDLED, *(n for n in files if os.sep not in n or os.path.basename(n) == "reference.json")]


def _reference_path(reference: str) -> Path | None:
    """The file of one of `references`; None for the bundled one."""
    return None if reference == BUNDLED else Path(folder_paths.get_full_path_or_raise(COST_MODELS, reference))


def _is_bundled(reference: Path | None) -> bool:
    """Whether the towers are the bundled ones: a reference file without `alignment/` beside it brings none."""
    return reference is None or not (reference.parent / "alignment").is_dir()


def _quality_files(reference: Path | None) -> list[Path]:
    """Files of the user's own that the quality model is read from."""
    if reference is None:
        return []
    return [reference] if _is_bundled(reference) else files_below(reference.parent)


@lru_cache(maxsize=1)
def _quality_model(reference: Path | None, files: str) -> tuple[QualityModel | CompositeQuality, str]:
    """The model and its name with a hash; kept until another one is asked for or the fingerprint `files` changes."""
    source: str | Path = STICKER if reference is None or _is_bundled(reference) else reference.parent
    model = load_quality_model(source, reference)
    return model, name_with_revision(QUALITY_MODELS, source, model)
