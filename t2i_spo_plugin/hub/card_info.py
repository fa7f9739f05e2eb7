"""What the author says for a model card: the dataclass that `publish_adapter` and `spo publish` take."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from t2i_spo_plugin import adapters
from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.options import expand_home


__all__ = ["ModelCardInfo", "check_repo_id"]

MAX_IMAGES = 12

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_LICENSE_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class ModelCardInfo:
    """What a model card says beside what the adapter's file says.

    Attributes:
        base_model: Hub id of the model that the adapter was trained on; always needed.
        license: the adapter's licence as the Hub names it, such as apache-2.0, or other; by default the one in the
            adapter's header.
        license_file: a text that is sent as LICENSE; needed when the licence is other.
        license_name: the licence's name; needed when the licence is other.
        title: heading of the card; by default the one in the adapter's header.
        summary: a few sentences on what the adapter is for.
        images: prompt and image file, several times; sent without metadata and at most 1024 pixels wide and high.
        results: the summary.json of an evaluation of this very file.
        system: the adapter's name in that evaluation, where it was measured at several strengths.
        dataset: Hub id of the prompts that the adapter was measured on; with it the results are sent as
            .eval_results too, which name a dataset by its id.

    Raises:
        ConfigError: the base model or the dataset is no Hub id, or options contradict each other.
    """

    base_model: str
    license: str = ""
    license_file: str | Path | None = None
    license_name: str = ""
    title: str = ""
    summary: str = ""
    images: tuple[tuple[str, str | Path], ...] = ()
    results: str | Path | None = None
    system: str = ""
    dataset: str = ""

    def __post_init__(self) -> None:
        expand_home(self)
        object.__setattr__(self, "images", tuple((prompt, file) for prompt, file in self.images))
        if not self.base_model:
            raise ConfigError(
                "name the model that the adapter was trained on by its Hub id (base_model, such as user/repo)"
            )
        check_repo_id("base_model", self.base_model)
        if self.dataset:
            check_repo_id("dataset", self.dataset)
        if self.license and not _LICENSE.fullmatch(self.license.replace("+", "")):
            raise ConfigError(f"license must be a name the Hub knows, such as apache-2.0, got {self.license!r}")
        if self.license_name and not _LICENSE_NAME.fullmatch(self.license_name):
            raise ConfigError(
                f"license_name must be one word of letters, digits, dots and dashes, got {self.license_name!r}"
            )
        if self.license == "other" and not (self.license_name and self.license_file):
            raise ConfigError("a licence of one's own (other) needs license_name and license_file")
        if self.license_file is not None and not Path(self.license_file).is_file():
            raise ConfigError(f"there is no licence file {self.license_file}")
        if len(self.images) > MAX_IMAGES:
            raise ConfigError(f"a card shows at most {MAX_IMAGES} images, got {len(self.images)}")
        if self.results is None and (self.system or self.dataset):
            raise ConfigError("system and dataset say what results are of; name the results too")

    def with_license(self, stated: str) -> ModelCardInfo:
        """The same with the licence that the adapter's header states, where none is given.

        Raises:
            ConfigError: neither says one.
        """
        if not (self.license or stated):
            raise ConfigError("say under which licence the adapter is published (license, such as apache-2.0)")
        return self if self.license else replace(self, license=stated)

    @property
    def license_in_words(self) -> str:
        """The licence's own name where the Hub calls it other."""
        return self.license_name if self.license == "other" else self.license


def check_repo_id(what: str, repo_id: str) -> None:
    """Refuse what is no Hub id.

    Raises:
        ConfigError: the sentence begins with `what`.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not adapters.is_repo_id(repo_id):
        raise ConfigError(f"{what} must be a Hub id such as user/repo, got {repo_id!r}")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"{what} is no Hub id: {error}") from error
