"""What an adapter has to know of a pipeline: architecture, prediction type, fingerprint."""

import torch
from support.pipelines import denoiser, fresh, random_adapter

from t2i_spo_plugin.pipelines.architecture import (
    architecture_of,
    base_fingerprint,
    prediction_type_of,
)
from t2i_spo_plugin.pipelines.loading import (
    adapter_metadata,
    load_spo_lora,
)


def test_pipelines_have_their_architecture_and_prediction_type(family, pipe):
    names = {
        "sd1": ("stable-diffusion-v1", "epsilon"),
        "sdxl": ("stable-diffusion-xl-v1-base", "epsilon"),
        "sd3": ("stable-diffusion-3", "flow"),
        "flux": ("flux-1-dev", "flow"),
    }
    assert (architecture_of(pipe), prediction_type_of(pipe)) == names[family]
    metadata = adapter_metadata(pipe, "Title", seed="1")
    assert metadata.title == "Title" and metadata.extra == {"base_fingerprint": base_fingerprint(pipe), "seed": "1"}


def test_the_fingerprint_sees_shapes_and_nothing_else(sd1, tmp_path):
    print_of_sd1 = base_fingerprint(sd1)
    assert base_fingerprint(fresh("sd1", width=64)) != print_of_sd1
    torch.nn.init.normal_(denoiser(sd1).conv_in.weight)
    denoiser(sd1).conv_in = torch.nn.Conv2d(9, 32, 3, padding=1)
    assert base_fingerprint(sd1) == print_of_sd1
    load_spo_lora(sd1, random_adapter(sd1))
    assert base_fingerprint(sd1) == print_of_sd1
    assert prediction_type_of(fresh("sd1", prediction_type="v_prediction")) == "v_prediction"
