"""All that loading an adapter could change of a pipeline, to compare before and after."""

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from support.pipelines import images, random_adapter

from t2i_spo_plugin.adapters import write_adapter
from t2i_spo_plugin.pipelines.architecture import lora_components


def tuner_layers(pipe):
    return [
        (component, path, layer)
        for component, model in lora_components(pipe).items()
        for path, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer)
    ]


def state_of(pipe):
    """All that loading could change: weights, adapters, who is active, how strongly, what is trainable."""
    layers = [(c, path, list(layer.active_adapters), dict(layer.scaling)) for c, path, layer in tuner_layers(pipe)]
    weights = {
        f"{component}.{name}": (weight.detach().clone(), weight.requires_grad)
        for component, model in lora_components(pipe).items()
        for name, weight in model.named_parameters()
    }
    return pipe.get_list_adapters(), layers, weights


def assert_same_state(before, after):
    assert after[:2] == before[:2]
    assert after[2].keys() == before[2].keys()
    for name, (weight, flag) in before[2].items():
        assert torch.equal(weight, after[2][name][0]) and flag == after[2][name][1], name


def load_style(pipe, tmp_path, weight=0.7, name="style", seed=7):
    """Load a style LoRA beside what is active, as diffusers does it; the image that the pipeline then gives."""
    path = write_adapter(random_adapter(pipe, seed=seed, layers=("to_k", "to_q")), tmp_path / f"{name}.safetensors")
    active = pipe.get_active_adapters()
    pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    pipe.set_adapters([*active, name], [1.0] * len(active) + [weight])
    return images(pipe)
