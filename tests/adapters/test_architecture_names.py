"""Architectures by the names that trainers write into headers."""

import pytest
import torch
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models import transformers
from support.pipelines import fresh, random_adapter

from t2i_spo_plugin.adapters import Adapter, AdapterMetadata, normalise_architecture
from t2i_spo_plugin.adapters.architecture import architecture_from_config
from t2i_spo_plugin.adapters.architecture_names import is_known_architecture
from t2i_spo_plugin.adapters.layouts.bases import BASES
from t2i_spo_plugin.adapters.metadata import metadata_from_header
from t2i_spo_plugin.errors import IncompatibleAdapterError
from t2i_spo_plugin.pipelines.loading import load_spo_lora


SPELLINGS = {
    "stable-diffusion-v1": ("stable-diffusion-v1/lora", "SD1.5", "sd_v1", "stable-diffusion-v1-5", "sd_1.5"),
    "stable-diffusion-v2": ("stable-diffusion-v2-512", "stable-diffusion-v2-768-v/lora", "sd_v2", "sd2.1"),
    "stable-diffusion-xl-v1-base": ("stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0", "SDXL", "sdxl_1.0"),
    "stable-diffusion-xl-v1-refiner": ("stable-diffusion-xl-v1-refiner", "sdxl-refiner"),
    "stable-diffusion-3": (
        "stable-diffusion-3",
        "stable-diffusion-3-m",
        "stable-diffusion-3.5-large/lora",
        "stable-diffusion-3-5-large-turbo",
        "stable-diffusion-v3-medium",
        "sd3.5",
    ),
    "flux-1-dev": ("Flux.1-dev/lora", "flux-1/lora", "flux-1-schnell", "FLUX.1-Kontext-dev", "flux1", "flux"),
    "flux-2": ("Flux.2-dev/lora", "Flux.2-klein-4b", "Flux.2-klein-base-9b", "flux2"),
    "chroma": ("chroma/lora", "Chroma1-HD"),
    "zimage": ("Z-Image/lora", "Z-Image-Turbo", "z_image", "zimage"),
    "lumina2": ("lumina-2/lora", "Lumina-Image-2.0", "lumina2"),
    "qwen-image": ("Qwen-Image/lora", "Qwen-Image-Edit-2511", "Qwen-Image-2512", "@@Qwen-Image-Edit-Plus@@"),
    "qwen-image21": ("Qwen-Image-2.1/lora",),
    "krea2": ("Krea-2/lora",),
    "cosmos": ("anima-preview/lora", "anima-unknown", "Cosmos-Predict2-2B"),
    "hi-dream-image": ("HiDream-I1-Full/lora", "hidream"),
    "ernie-image": ("ERNIE-Image/lora",),
    "wan": ("wan2.1/lora", "wan2.2", "Wan2.2-T2V-A14B", "wan21"),
    "ltxvideo": ("LTX-Video-0.9.5/lora", "ltxv"),
    "hunyuan-image": ("hunyuan-image-2.1/lora",),
    "hunyuan-video": ("hunyuan-video/lora",),
    "kandinsky5": ("Kandinsky-5/lora",),
    "aura-flow": ("AuraFlow",),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_the_architecture(name):
    for spelling in (name, *SPELLINGS[name]):
        assert normalise_architecture(spelling) == name, spelling
        assert metadata_from_header({"modelspec.architecture": spelling}).base_architecture == name
    assert is_known_architecture(name)


def test_the_names_of_models_stay_what_they_are():
    kinds = {kind: getattr(transformers, kind) for kind in dir(transformers)}
    models = [kind for kind, type_ in kinds.items() if isinstance(type_, type) and issubclass(type_, PeftAdapterMixin)]
    names = {architecture_from_config(kind, {}) for kind in models} | {base.architecture for base in BASES}
    assert len(names) > 20
    assert {name: normalise_architecture(name) for name in names} == {name: name for name in names}


def test_a_name_that_is_not_known_is_left_alone():
    assert normalise_architecture("My-Model-7/lora") == "my-model-7"
    assert not is_known_architecture("my-model-7")
    assert metadata_from_header({"ss_base_model_version": "my-model-7"}).base_architecture == ""
    assert metadata_from_header({"ss_base_model_version": "zimage"}).base_architecture == "zimage"


def test_an_adapter_of_an_unknown_claim_loads_with_a_note_where_all_of_it_fits():
    pipe = fresh("sd1")
    adapter = Adapter(random_adapter(pipe).modules, AdapterMetadata("my-model-7"))
    (note,) = load_spo_lora(pipe, adapter).notes
    assert "my-model-7" in note and "stable-diffusion-v1" in note
    assert any(torch.any(p) for name, p in pipe.unet.named_parameters() if ".lora_B." in name)


def test_a_known_claim_that_the_pipeline_contradicts_is_refused_and_so_are_shapes_that_do_not_fit():
    pipe = fresh("sd1")
    modules = random_adapter(pipe).modules
    for claim in ("flux-1-dev", "zimage", "stable-diffusion-v2"):
        with pytest.raises(IncompatibleAdapterError, match=f"made for {claim}, this pipeline is"):
            load_spo_lora(pipe, Adapter(modules, AdapterMetadata(claim)))
    wide = random_adapter(fresh("sd1", width=64)).modules
    with pytest.raises(IncompatibleAdapterError, match="made for another base"):
        load_spo_lora(pipe, Adapter(wide, AdapterMetadata("my-model-7")))
