"""ShieldGemma 2: the probability that an image violates a policy given in words, one policy a category."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from t2i_spo_plugin.errors import ConfigError, SPOError
from t2i_spo_plugin.identity import content_hash
from t2i_spo_plugin.images import Images, split, to_pil, to_tensor
from t2i_spo_plugin.networks.vlm import VLMOptions
from t2i_spo_plugin.options import check_range, from_mapping, own_options

from .base import CostBatch
from .onnx import boundary_logit
from .policies import checked_policies


@dataclass(frozen=True)
class ShieldGemmaOptions:
    """What ShieldGemma 2 is asked.

    Attributes:
        boundary: the probability that becomes cost 0.5 at a policy's threshold of 0.5.
        domain: the kind of image that is judged.
        batch_size: images at once, each with one policy.
    """

    boundary: float = 0.5
    domain: str = "photo"
    batch_size: int = 8

    def __post_init__(self) -> None:
        boundary_logit(self.boundary)
        check_range("batch_size", self.batch_size, 1, whole=True)


class ShieldGemma2:
    """Follows `t2i_spo_plugin.CostModel`: the logit is `log(P(yes) / P(no))` that the image violates the policy.

    Images are batched by policy, whose texts have one length, so that nothing is padded and no answer depends on its
    neighbours. There is no map. The weights are under Google's Gemma terms, and gated on the Hub.

    Args:
        network: a `ShieldGemma2ForImageClassification`.
        processor: its `ShieldGemma2Processor`.
        options: what it is asked.
        policies: by category, what images shall not show, in words; when left out, the three that it was trained on.
    """

    def __init__(
        self, network: Any, processor: Any, options: ShieldGemmaOptions, policies: Mapping[str, str] | None = None
    ) -> None:
        self.network, self.processor, self.options = network.eval().requires_grad_(False), processor, options
        self.policies = checked_policies(policies, "photo-shieldgemma2")
        self.categories = tuple(self.policies)
        self.domain = options.domain
        self.temperature = torch.ones(len(self.categories), device=network.device)
        self._identity = ""

    @property
    def identity(self) -> str:
        """The weights, what is asked, and how."""
        self._identity = self._identity or content_hash(self.network, self.processor.tokenizer)
        return content_hash(self._identity, self.processor.chat_template, sorted(self.policies.items()), self.options)

    def to(self, device: torch.device | str) -> ShieldGemma2:
        """Move the network."""
        self.network.to(device)
        self.temperature = self.temperature.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Images) -> CostBatch:
        """Score images; see `CostBatch`. Raises `ImageError` on what is no image."""
        shown = [to_pil(to_tensor(image))[0] for image in split(images)]
        size = self.options.batch_size
        columns = [
            torch.cat([self._odds(shown[start : start + size], name) for start in range(0, len(shown), size)])
            for name in self.categories
        ]
        return CostBatch(torch.stack(columns, 1) - boundary_logit(self.options.boundary))

    def _odds(self, images: list[Any], category: str) -> Tensor:
        inputs = self.processor(
            images=images, policies=[category], custom_policies=dict(self.policies), return_tensors="pt"
        )
        logits = self.network(**inputs.to(self.network.device, dtype=self.network.dtype)).logits.float()
        return logits[:, 0] - logits[:, 1]


def load_shieldgemma2(
    source: str, local_files_only: bool = False, policies: Mapping[str, str] | None = None, **options: Any
) -> ShieldGemma2:
    """ShieldGemma 2 from a Hub id or folder with safetensors weights.

    Args:
        source: where it is, such as `google/shieldgemma-2-4b-it`.
        local_files_only: download nothing.
        policies: by category, what images shall not show, in words.
        options: as `ShieldGemmaOptions` and `VLMOptions`.

    Raises:
        SPOError: there is no such model, or an option is wrong.
    """
    chosen, rest = own_options(ShieldGemmaOptions, options, f"{source}: ")
    how = from_mapping(VLMOptions, rest, f"{source}: ")
    where = {"revision": how.revision, "local_files_only": local_files_only}
    dtype = how.dtype if how.dtype == "auto" else getattr(torch, how.dtype)
    try:
        from transformers import AutoProcessor, ShieldGemma2ForImageClassification

        processor = AutoProcessor.from_pretrained(source, **where)
        network = ShieldGemma2ForImageClassification.from_pretrained(
            source, use_safetensors=True, torch_dtype=dtype, **where
        )
    except (OSError, ValueError, ImportError) as error:
        raise SPOError(f"cannot load ShieldGemma 2 from {source}: {str(error).strip().splitlines()[0]}") from error
    if not hasattr(processor, "policy_definitions"):
        raise ConfigError(f"{source} is no ShieldGemma 2: its processor reads no policies")
    device = how.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return ShieldGemma2(network.to(device), processor, chosen, policies)
