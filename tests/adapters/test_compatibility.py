"""Whether an adapter fits a model, by plain data: claims of the header, and names and shapes of weights."""

from dataclasses import replace

import pytest
import torch

from t2i_spo_plugin.adapters import Adapter, AdapterMetadata, LoraPair
from t2i_spo_plugin.adapters.compatibility import Target, match_modules
from t2i_spo_plugin.errors import IncompatibleAdapterError, InvalidAdapterError


def lacks(name):
    return "this encoder lacks" if name.startswith("text_encoder") else "this model lacks"


NAMES = ("unet.block.to_q", "unet.block.to_k", "unet.block.to_v", "text_encoder.layer.q_proj")
TARGET = Target("model", "stable-diffusion-v1", "epsilon", lacks, "0123")
WEIGHTS = {name: (f"there.{name}", (8, 6)) for name in NAMES}


def adapter_of(*names, **metadata):
    pair = LoraPair(torch.ones(2, 6), torch.ones(8, 2), 2.0)
    return Adapter({name: pair for name in names or NAMES}, AdapterMetadata(**metadata))


def test_a_whole_match_has_every_module_and_no_problem():
    match = match_modules(adapter_of(), TARGET, WEIGHTS)
    assert match.places == {name: f"there.{name}" for name in NAMES}
    assert match.missing == () and match.problems == ()


@pytest.mark.parametrize(
    "metadata, words",
    [
        (
            {"base_architecture": "flux-1-dev"},
            "flux-1-dev, this model is stable-diffusion-v1; choose an adapter for SD1",
        ),
        ({"prediction_type": "flow"}, "a model that predicts flow, this one predicts epsilon"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_another_claim_is_refused_unless_one_side_makes_none(metadata, words, strict):
    with pytest.raises(IncompatibleAdapterError, match=words):
        match_modules(adapter_of(**metadata), TARGET, WEIGHTS, strict)
    silent = replace(TARGET, architecture="", prediction_type="")
    assert match_modules(adapter_of(**metadata), silent, WEIGHTS).problems == ()
    same = adapter_of(base_architecture=TARGET.architecture, prediction_type=TARGET.prediction_type)
    assert match_modules(same, TARGET, WEIGHTS).problems == ()


@pytest.mark.parametrize("shape", [(8, 7), (9, 6), (8, 6, 1, 1), (8, 6, 3, 3)])
@pytest.mark.parametrize("strict", [True, False])
def test_another_shape_is_refused_with_both(shape, strict):
    weights = WEIGHTS | {NAMES[2]: ("there", shape)}
    with pytest.raises(IncompatibleAdapterError, match="another base of the architecture stable-diff") as caught:
        match_modules(adapter_of(), TARGET, weights, strict)
    for part in (NAMES[2], "[8, 6]", f"{list(shape)}; choose an adapter for SD1"):
        assert part in str(caught.value)


def test_two_modules_in_one_place_are_refused_and_named():
    weights = WEIGHTS | {NAMES[2]: WEIGHTS[NAMES[0]]}
    with pytest.raises(InvalidAdapterError, match=f"twice: {NAMES[0]} and {NAMES[2]} are the same module"):
        match_modules(adapter_of(), TARGET, weights)


def test_a_partial_match_is_refused_with_counts_or_returned():
    weights = {name: WEIGHTS[name] for name in NAMES[:2]}
    problems = ("this model lacks 1 of its 4 modules", "this encoder lacks 1 of its 4 modules")
    with pytest.raises(IncompatibleAdapterError) as caught:
        match_modules(adapter_of(), TARGET, weights)
    assert f"{'; '.join(problems)}; the first is {NAMES[2]}; without strict, what fits is applied" in str(caught.value)
    match = match_modules(adapter_of(), TARGET, weights, strict=False)
    assert tuple(match.places) == NAMES[:2] and match.missing == NAMES[2:] and match.problems == problems


@pytest.mark.parametrize("strict", [True, False])
def test_no_match_at_all_is_refused(strict):
    with pytest.raises(IncompatibleAdapterError, match="no module of the adapter fits: this model lacks 3 of its 4"):
        match_modules(adapter_of(), TARGET, {}, strict)


def test_another_fingerprint_is_a_problem_unless_one_side_has_none():
    other = adapter_of(extra={"base_fingerprint": "4567"})
    with pytest.raises(IncompatibleAdapterError, match="another width or depth; without strict"):
        match_modules(other, TARGET, WEIGHTS)
    assert "width or depth" in match_modules(other, TARGET, WEIGHTS, strict=False).problems[0]
    for adapter, target in (
        (adapter_of(extra={"base_fingerprint": "0123"}), TARGET),
        (other, replace(TARGET, fingerprint="")),
        (adapter_of(), TARGET),
    ):
        assert match_modules(adapter, target, WEIGHTS).problems == ()


def test_an_adapter_of_text_encoders_alone_is_a_problem():
    alone = adapter_of(NAMES[3])
    with pytest.raises(IncompatibleAdapterError, match="text encoders only, not the denoiser"):
        match_modules(alone, TARGET, WEIGHTS)
    assert len(match_modules(alone, TARGET, WEIGHTS, strict=False).problems) == 1
    rest = match_modules(adapter_of(), TARGET, {NAMES[3]: WEIGHTS[NAMES[3]]}, strict=False)
    assert rest.problems == (
        "this model lacks 3 of its 4 modules",
        "it would change text encoders only, not the denoiser",
    )
