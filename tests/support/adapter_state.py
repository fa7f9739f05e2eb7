"""All that loading an adapter could change of a pipeline, to compare before and after."""

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

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
