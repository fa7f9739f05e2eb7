"""A policy and a cost model over images: guard, report, overlay, hiding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from t2i_spo_plugin._lazy import lazy_names


if TYPE_CHECKING:
    from .annotation import annotate as annotate
    from .annotation import marks as marks
    from .annotation import message_image as message_image
    from .annotation import wrap_text as wrap_text
    from .calibration import Calibration as Calibration
    from .calibration import LabelledImage as LabelledImage
    from .calibration import calibrate as calibrate
    from .calibration import labelled_folders as labelled_folders
    from .guard import Guard as Guard
    from .hiding import Block as Block
    from .hiding import Hiding as Hiding
    from .hiding import hide as hide
    from .judging import Judgement as Judgement
    from .judging import QualityJudge as QualityJudge
    from .judging import check_domains as check_domains
    from .judging import counterparts as counterparts
    from .judging import judge_images as judge_images
    from .judging import judge_quality as judge_quality
    from .overlay import COLOUR_MAPS as COLOUR_MAPS
    from .overlay import Box as Box
    from .overlay import boxes as boxes
    from .overlay import layer as layer
    from .overlay import tint as tint
    from .page import safety_content as safety_content
    from .page import safety_page as safety_page
    from .policy import Policy as Policy
    from .report import NO_MAP as NO_MAP
    from .report import OverlayKind as OverlayKind
    from .report import SafetyReport as SafetyReport
    from .report import join_reports as join_reports
    from .uascore import parse_prompts as parse_prompts
    from .uascore import summarise_images as summarise_images

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "Block": "hiding",
        "Box": "overlay",
        "COLOUR_MAPS": "overlay",
        "Calibration": "calibration",
        "Guard": "guard",
        "Hiding": "hiding",
        "Judgement": "judging",
        "LabelledImage": "calibration",
        "NO_MAP": "report",
        "OverlayKind": "report",
        "Policy": "policy",
        "QualityJudge": "judging",
        "SafetyReport": "report",
        "annotate": "annotation",
        "boxes": "overlay",
        "calibrate": "calibration",
        "check_domains": "judging",
        "counterparts": "judging",
        "hide": "hiding",
        "join_reports": "report",
        "judge_images": "judging",
        "judge_quality": "judging",
        "labelled_folders": "calibration",
        "layer": "overlay",
        "marks": "annotation",
        "message_image": "annotation",
        "parse_prompts": "uascore",
        "safety_content": "page",
        "safety_page": "page",
        "summarise_images": "uascore",
        "tint": "overlay",
        "wrap_text": "annotation",
    },
)
