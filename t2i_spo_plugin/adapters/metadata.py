"""What an adapter says of itself, and how a file's header spells it: our `spo.*`, `modelspec.*` and kohya's `ss_*`."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from t2i_spo_plugin.errors import InvalidAdapterError
from t2i_spo_plugin.files import quoted

from .architecture_names import bare_name, is_known_architecture, normalise_architecture
from .lora import LoraPair


PREDICTION_TYPES = ("epsilon", "v_prediction", "flow", "sample")

FORMAT_KEY = "spo.format"
"""Key of the header by which files that this package wrote are known."""

_LONGEST_NAME = 100
_FORMAT = "1"

_KOHYA_VERSIONS = {
    "stable-diffusion-v1": "sd_v1",
    "stable-diffusion-v2": "sd_v2",
    "stable-diffusion-xl-v1-base": "sdxl_base_v1-0",
    "stable-diffusion-3": "sd3",
    "flux-1-dev": "flux1",
}
_SPELLED_PREDICTIONS = {"stable-diffusion-v2-512": "epsilon", "stable-diffusion-v2-768-v": "v_prediction"}
_VERSION_OF_V = "_v"
"""What sd-scripts puts behind the base model's version when it predicts v."""
_RESOLUTIONS = {"stable-diffusion-v1": "512x512", "stable-diffusion-v2": "768x768"}
_SPEC_PREDICTION = {"epsilon": "epsilon", "v_prediction": "v"}
_OUR_KEYS = ("spo.base_architecture", "spo.prediction_type", FORMAT_KEY)
_WRITTEN_KEYS = (
    "modelspec.sai_model_spec",
    "modelspec.architecture",
    "modelspec.implementation",
    "modelspec.title",
    "modelspec.prediction_type",
    "modelspec.date",
    "modelspec.hash_sha256",
)


@dataclass(frozen=True)
class AdapterMetadata:
    """What an adapter says about itself.

    Attributes:
        base_architecture: such as `stable-diffusion-v1` or `flux-1-dev`; empty when a foreign file does not say.
        prediction_type: `epsilon`, `v_prediction`, `flow` or `sample`; empty when unknown.
        title: for people.
        extra: more metadata. A bare key such as `base_fingerprint` stands in the header as `spo.base_fingerprint`;
            keys that begin with `modelspec.` stand there as they are.
    """

    base_architecture: str = ""
    prediction_type: str = ""
    title: str = "Safety adapter"
    extra: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.prediction_type and self.prediction_type not in PREDICTION_TYPES:
            raise InvalidAdapterError(
                f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {self.prediction_type!r}"
            )
        for key, value in self.extra.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise InvalidAdapterError(f"metadata are text, got {key!r}: {value!r}")


def metadata_from_header(metadata: Mapping[str, str]) -> AdapterMetadata:
    """What the header of an adapter file says, ours or another program's.

    Raises:
        InvalidAdapterError: the prediction type is none that exists, or the architecture's name is not one.
    """
    spelled = metadata.get("spo.base_architecture") or metadata.get("modelspec.architecture", "")
    version = metadata.get("ss_base_model_version", "")
    if not spelled:
        named = normalise_architecture(version.removesuffix(_VERSION_OF_V))
        spelled = named if is_known_architecture(named) else ""
    architecture = normalise_architecture(spelled)
    if len(architecture) > _LONGEST_NAME or not architecture.isprintable():
        raise InvalidAdapterError(f"the name of its architecture is invalid: {quoted(architecture)}")
    prediction = metadata.get("spo.prediction_type", "")
    if not prediction:
        spec = metadata.get("modelspec.prediction_type", "")
        prediction = next((ours for ours, theirs in _SPEC_PREDICTION.items() if theirs == spec), "")
    if not prediction:
        is_v = version in {f"{known}{_VERSION_OF_V}" for known in _KOHYA_VERSIONS.values()}
        prediction = "v_prediction" if is_v else _SPELLED_PREDICTIONS.get(bare_name(spelled), "")
    extra = {
        key.removeprefix("spo."): value
        for key, value in metadata.items()
        if key.startswith("spo.") and key not in _OUR_KEYS
    }
    for key, value in metadata.items():
        is_default = key == "modelspec.resolution" and value == _RESOLUTIONS.get(architecture, "1024x1024")
        if key.startswith("modelspec.") and key not in _WRITTEN_KEYS and not is_default:
            extra[key] = value
    return AdapterMetadata(architecture, prediction, metadata.get("modelspec.title", "Safety adapter"), extra)


def metadata_to_header(
    metadata: AdapterMetadata, modules: Mapping[str, LoraPair], digest: str, folded: bool
) -> dict[str, str]:
    """The metadata of an adapter file's header: what `metadata_from_header` reads, and what other programs look for.

    Args:
        metadata: its architecture is not empty.
        modules: the pairs, for their ranks and alphas.
        digest: SHA-256 of the weights.
        folded: whether the layout states no alpha, so that each is its rank.

    Raises:
        InvalidAdapterError: `metadata.extra` has a key that is written from the adapter itself.
    """
    ranks = {pair.rank for pair in modules.values()}
    alphas = {float(pair.rank) if folded else pair.alpha for pair in modules.values()}
    architecture, prediction = metadata.base_architecture, metadata.prediction_type
    spelled = architecture
    if architecture == "stable-diffusion-v2":
        spelled += "-768-v" if prediction == "v_prediction" else "-512"
    header = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{spelled}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": metadata.title,
        "modelspec.resolution": _RESOLUTIONS.get(architecture, "1024x1024"),
        "modelspec.hash_sha256": f"0x{digest}",
        "sshs_model_hash": digest,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
        "spo.base_architecture": architecture,
        FORMAT_KEY: _FORMAT,
    }
    if prediction:
        header["spo.prediction_type"] = prediction
    if prediction in _SPEC_PREDICTION:
        header["modelspec.prediction_type"] = _SPEC_PREDICTION[prediction]
    if architecture in _KOHYA_VERSIONS:
        suffix = _VERSION_OF_V if prediction == "v_prediction" else ""
        header["ss_base_model_version"] = _KOHYA_VERSIONS[architecture] + suffix
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if epoch is not None:
        header["modelspec.date"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(int(epoch)))
    for key, value in metadata.extra.items():
        full = key if key.startswith("modelspec.") else f"spo.{key}"
        if full in _OUR_KEYS or full in _WRITTEN_KEYS:
            raise InvalidAdapterError(f"the metadata {key} is written from the adapter itself and cannot be given")
        header[full] = value
    return header
