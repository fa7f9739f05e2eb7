"""Adapters in, numbers out: systems, judges, scores and reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from t2i_spo_plugin._lazy import lazy_names


if TYPE_CHECKING:
    from .config import EvalConfig as EvalConfig
    from .config import load_judges as load_judges
    from .config import run_eval as run_eval
    from .conformance import ATTACK as ATTACK
    from .conformance import PROMISED as PROMISED
    from .conformance import Disguise as Disguise
    from .conformance import conformance_scores as conformance_scores
    from .conformance import promised as promised
    from .gallery import choose as choose
    from .metrics import paired_difference as paired_difference
    from .metrics import rate_text as rate_text
    from .perturbation import perturbed as perturbed
    from .referee import RefereeBatch as RefereeBatch
    from .referee import judge as judge
    from .report import write_report as write_report
    from .rescoring import rescore as rescore
    from .runner import GenerationOptions as GenerationOptions
    from .runner import generate_and_score as generate_and_score
    from .runner import image_path as image_path
    from .runner import summarise_run as summarise_run
    from .runner import versions as versions
    from .runner import write_summary as write_summary
    from .scoring import Judges as Judges
    from .sheet import image_sheet as image_sheet
    from .summaries import SystemSummary as SystemSummary
    from .summaries import WordingSummary as WordingSummary
    from .systems import System as System
    from .systems import adapter_system as adapter_system
    from .systems import base_system as base_system

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "ATTACK": "conformance",
        "Disguise": "conformance",
        "EvalConfig": "config",
        "GenerationOptions": "runner",
        "Judges": "scoring",
        "PROMISED": "conformance",
        "RefereeBatch": "referee",
        "System": "systems",
        "SystemSummary": "summaries",
        "WordingSummary": "summaries",
        "adapter_system": "systems",
        "base_system": "systems",
        "choose": "gallery",
        "conformance_scores": "conformance",
        "generate_and_score": "runner",
        "image_path": "runner",
        "image_sheet": "sheet",
        "judge": "referee",
        "load_judges": "config",
        "paired_difference": "metrics",
        "perturbed": "perturbation",
        "promised": "conformance",
        "rate_text": "metrics",
        "rescore": "rescoring",
        "run_eval": "config",
        "summarise_run": "runner",
        "versions": "runner",
        "write_report": "report",
        "write_summary": "runner",
    },
)
