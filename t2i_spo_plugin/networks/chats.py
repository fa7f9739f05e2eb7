"""A vision-language model by its name: `vlm:ID` in this process, or `endpoint:URL` behind a server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.options import from_mapping

from .chat import Chat


def load_chat(name: str, options: Mapping[str, Any], local_files_only: bool = False) -> Chat:
    """The model of `vlm:ID` (options as `VLMOptions`) or `endpoint:URL` (options as `EndpointOptions`).

    Raises:
        SPOError: another name, an unknown option, or a model that cannot be reached.
    """
    scheme, _, source = name.partition(":")
    if scheme == "vlm" and source:
        from .vlm import LocalVLM, VLMOptions

        return LocalVLM(source, from_mapping(VLMOptions, options, f"{source}: "), local_files_only)
    if scheme == "endpoint" and source:
        from .endpoint import Endpoint, EndpointOptions

        if local_files_only:
            raise ConfigError("an endpoint is asked over the network, which was ruled out here")
        return Endpoint(source, from_mapping(EndpointOptions, options, "endpoint: "))
    raise ConfigError(f"expected vlm:ID or endpoint:URL, got {name!r}")
