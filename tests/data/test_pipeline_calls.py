"""Calling a pipeline for rows of prompts."""

import pytest
from support.pipelines import fresh

from t2i_spo_plugin.data import PromptRow, count_cut_prompts, generate


@pytest.mark.parametrize(("letters", "cut"), [(75, 0), (76, 1)])
def test_prompts_beyond_the_token_limit_are_counted(sd1, letters, cut):
    # The tiny tokenizer makes a token of a letter, and adds one at either end.
    limit = sd1.tokenizer.model_max_length
    text = "a" * (letters - 77 + limit)
    assert count_cut_prompts(sd1, [text, text, "a"]) == cut


def test_the_text_encoder_that_reads_most_decides():
    pipe = fresh("flux")
    longest = max(pipe.tokenizer.model_max_length, pipe.tokenizer_2.model_max_length)
    assert count_cut_prompts(pipe, ["a" * (pipe.tokenizer.model_max_length + 5)]) == int(
        longest <= pipe.tokenizer.model_max_length
    )


def test_generation_reports_prompts_that_are_cut(sd1, tmp_path):
    rows = [PromptRow("a", "a" * 200, "benign"), PromptRow("b", "b", "benign")]
    assert generate(sd1, rows, tmp_path, steps=1, progress=False).n_cut == 1
