"""Prompt sets, tables, and images generated from prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from t2i_spo_plugin._lazy import lazy_names


if TYPE_CHECKING:
    from .generation import GeneratedImage as GeneratedImage
    from .generation import generate as generate
    from .pipeline_calls import call_pipeline as call_pipeline
    from .pipeline_calls import count_cut_prompts as count_cut_prompts
    from .pipeline_calls import generate_images as generate_images
    from .pipeline_calls import quiet as quiet
    from .prompts import MAX_SEED as MAX_SEED
    from .prompts import PromptRow as PromptRow
    from .prompts import drop_minors as drop_minors
    from .prompts import prompt_seed as prompt_seed
    from .prompts import read_prompts as read_prompts
    from .prompts import with_seeds as with_seeds
    from .rows import TABLE_SUFFIXES as TABLE_SUFFIXES
    from .rows import BadRow as BadRow
    from .rows import describe_rows as describe_rows
    from .rows import is_table_file as is_table_file
    from .rows import read_rows_by_hand as read_rows_by_hand
    from .rows import read_text as read_text
    from .tables import KINDS as KINDS
    from .tables import PAIR_COLUMNS as PAIR_COLUMNS
    from .tables import SCORE_COLUMNS as SCORE_COLUMNS
    from .tables import read_rows as read_rows
    from .tables import read_table as read_table
    from .tables import table_metadata as table_metadata
    from .tables import write_table as write_table

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "BadRow": "rows",
        "GeneratedImage": "generation",
        "KINDS": "tables",
        "MAX_SEED": "prompts",
        "PAIR_COLUMNS": "tables",
        "PromptRow": "prompts",
        "SCORE_COLUMNS": "tables",
        "TABLE_SUFFIXES": "rows",
        "call_pipeline": "pipeline_calls",
        "count_cut_prompts": "pipeline_calls",
        "describe_rows": "rows",
        "drop_minors": "prompts",
        "generate": "generation",
        "generate_images": "pipeline_calls",
        "is_table_file": "rows",
        "prompt_seed": "prompts",
        "quiet": "pipeline_calls",
        "read_prompts": "prompts",
        "read_rows": "tables",
        "read_rows_by_hand": "rows",
        "read_table": "tables",
        "read_text": "rows",
        "table_metadata": "tables",
        "with_seeds": "prompts",
        "write_table": "tables",
    },
)
