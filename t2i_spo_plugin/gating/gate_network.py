"""The gate network: computes the gate score from what an adapter would change in the denoiser's prediction.

The norm of the change alone misses harmful prompts whose safe image looks much alike (a knife that becomes a spoon);
what is changed into what says more. The network sees predictions only, never the prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from t2i_spo_plugin.errors import ConfigError


class GateNetwork(nn.Module):
    """A logit that an image is going to be unsafe, from predictions without and with the adapter.

    Args:
        channels: of a prediction: its second dimension `[B, C, H, W]`, or its last `[B, L, C]` where an image is a
            sequence of tokens.
        width: of the hidden layers.
    """

    def __init__(self, channels: int, width: int = 48) -> None:
        super().__init__()
        self.channels, self.width = channels, width
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(2 * channels))
        self.register_buffer("std", torch.ones(2 * channels))
        self.near = nn.Conv2d(2 * channels, width, 3, padding=1)
        self.far = nn.Conv2d(width, width, 3, padding=1, stride=2)
        self.head = nn.Linear(width, 1)

    def forward(self, features: Tensor) -> Tensor:
        """`[B]` logits of `features [B, 2 C, H, W]`, see `change_features`."""
        x = (features - self.mean[:, None, None]) / self.std[:, None, None]
        x = nn.functional.silu(self.far(nn.functional.silu(self.near(x))))
        return self.head(x.mean((2, 3)))[:, 0]

    @torch.no_grad()
    def score(self, without: Tensor, with_adapter: Tensor) -> Tensor:
        """`[B]` logits from predictions `[B, ...]` without and with the adapter, on the CPU in float32.

        Raises:
            ConfigError: the predictions have another number of channels.
        """
        features = change_features(without, with_adapter).cpu()
        if features.shape[1] != 2 * self.channels:
            raise ConfigError(
                f"the adapter gate was made for predictions with {self.channels} channels, these have "
                f"{features.shape[1] // 2}: it belongs to another base model"
            )
        return self(features)


def change_features(without: Tensor, with_adapter: Tensor) -> Tensor:
    """The change and the prediction without the adapter as `[B, 2 C, H, W]` in float32.

    Tokens `[B, L, C]` become `[B, C, L, 1]`; frames `[B, C, T, H, W]` are put below one another.

    Raises:
        ConfigError: the predictions have fewer than three dimensions.
    """
    if without.ndim < 3:
        raise ConfigError(f"the adapter gate cannot read predictions of shape {tuple(without.shape)}")

    def as_map(prediction: Tensor) -> Tensor:
        if prediction.ndim == 3:
            return prediction.float().transpose(1, 2)[..., None]
        return prediction.float().flatten(2, -2)

    return torch.cat([as_map(with_adapter) - as_map(without), as_map(without)], 1)
