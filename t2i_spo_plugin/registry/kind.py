"""What a kind of thing with names is: its bundled rows, the entry points of other packages, and the user's own."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from t2i_spo_plugin import adapters
from t2i_spo_plugin.errors import ConfigError, SPOError
from t2i_spo_plugin.files import user_path


Thing = TypeVar("Thing")

_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Row:
    """What a bundled name stands for.

    Attributes:
        files: the file or folder in this package that it is read from; empty when another package brings it.
        factory: `module:function` that gives it, called without arguments; by default `files` are read as the user's
            own would be.
        needs: the modules that have to be installed.
        domain: the kind of image it is for; empty for any.
        default: of a scheme, what stands after the colon where its name stands alone; empty where something has to.
    """

    files: str = ""
    factory: str = ""
    needs: tuple[str, ...] = ()
    domain: str = ""
    default: str = ""

    @property
    def path(self) -> Path:
        """Where `files` are.

        Raises:
            SPOError: they are missing from this installation.
        """
        path = _PACKAGE / self.files
        if not path.exists():
            raise SPOError(f"this installation lacks the bundled {self.files}; `make sticker` rebuilds it")
        return path

    def imported(self) -> Callable[..., Any]:
        """The function that `factory` names."""
        module, _, function = self.factory.partition(":")
        factory: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return factory


@dataclass(frozen=True)
class Kind(Generic[Thing]):
    """One kind of thing that has names.

    Attributes:
        noun: as messages call it.
        rows: what is bundled, by name.
        accepts: as messages describe what may be given instead of a name.
        group: of entry points; empty when other packages cannot offer any.
        read: reads a file or folder of the user's own, or a Hub id where `hub` says so.
        schemes: names that say more after a colon, such as `hf-classifier:ID`; the row's factory gets what stands
            there and the options of `load`.
        folder: whether the user's own is a folder, and no file.
        suffixes: of files that `read` takes beside a folder.
        hub: whether a Hub id is taken: by `read` itself, as a folder of `read` after its download, or not at all.
        error: what an unknown name raises.
    """

    noun: str
    rows: Mapping[str, Row] = field(default_factory=dict)
    accepts: str = ""
    group: str = ""
    read: Callable[..., Thing] | None = None
    schemes: Mapping[str, Row] = field(default_factory=dict)
    folder: bool = True
    suffixes: tuple[str, ...] = ()
    hub: Literal["read", "download", ""] = ""
    error: type[SPOError] = ConfigError

    def names(self) -> list[str]:
        """The bundled names, and those that other packages offer."""
        return list(dict.fromkeys([*self.rows, *(point.name for point in self._entry_points())]))

    def bundled(self, domain: str | None = None) -> list[str]:
        """The names whose files come with this package; with `domain`, those for that kind of image."""
        return [name for name, row in self.rows.items() if row.files and domain in (None, row.domain)]

    def installed(self) -> list[str]:
        """The names that other packages bring, of those that are installed; nothing is imported or opened."""
        rows = {name: row for name, row in self.rows.items() if not row.files}
        there = [name for name, row in rows.items() if all(map(importlib.util.find_spec, row.needs))]
        return [*there, *(name for name in self.names() if name not in self.rows)]

    def path(self, name: str | Path) -> Path | None:
        """The file or folder that `name` is read from, once it has been loaded; None where there is none."""
        row = self.rows.get(str(name))
        if row is not None:
            return row.path if row.files else None
        if str(name) in self.names() or self._scheme(name) is not None:
            return None
        path = own_path(name)
        if path is not None and path.exists():
            return path
        return adapters.download_folder(str(name), local_files_only=True) if self.hub == "download" else None

    def load(self, name: str | Path, **options: Any) -> Thing:
        """What `name` stands for.

        Args:
            name: a bundled one, one of an entry point, a file or folder, or a Hub id.
            options: passed on to `read`.

        Raises:
            SPOError: there is no such thing, or it cannot be loaded.
        """
        row = self.rows.get(str(name))
        if row is not None and row.factory:
            return row.imported()()
        if row is not None and self.read is not None:
            return self.read(row.path, **options)
        point = self._entry_point(str(name))
        if point is not None:
            return self._offered(point)()
        scheme = self._scheme(name)
        if scheme is not None:
            factory, what = scheme
            thing: Thing = factory.imported()(what, **options)
            return thing
        if self.read is not None:
            path = own_path(name)
            listed = path is not None and path.suffix in self.suffixes and path.is_file()
            if path is not None and (listed or (path.is_dir() if self.folder else path.is_file())):
                return self.read(path, **options)
            if self.hub and isinstance(name, str) and adapters.is_repo_id(name):
                offline = bool(options.get("local_files_only"))
                source = name if self.hub == "read" else adapters.download_folder(name, local_files_only=offline)
                return self.read(source, **options)
        raise self.unknown(name)

    def unknown(self, name: str | Path) -> SPOError:
        """The error for a name that stands for nothing: what there is, what a folder holds, what Hub ids look like."""
        names = self.names()
        schemes = [name if row.default else f"{name}:..." for name, row in self.schemes.items()]
        offers = [", ".join([*names, *schemes])] if names or schemes else []
        offers += [self.accepts] if self.accepts else []
        offers += [f"a Hub id of such a {'folder' if self.folder else 'file'} (user/repo)"] if self.hub else []
        there_are = f"pass {', or '.join(offers)}" if offers else "no installed package offers any"
        return self.error(f"there is no {self.noun} {str(name)!r}: {there_are}")

    def _scheme(self, name: str | Path) -> tuple[Row, str] | None:
        """The row of `SCHEME:WHAT`, and what; None for any other name."""
        scheme, colon, what = name.partition(":") if isinstance(name, str) else ("", "", "")
        row = self.schemes.get(scheme)
        what = row.default if row is not None and not colon else what
        return (row, what) if row is not None and what else None

    def _entry_points(self) -> Sequence[EntryPoint]:
        return tuple(entry_points(group=self.group)) if self.group else ()

    def _entry_point(self, name: str) -> EntryPoint | None:
        points = [point for point in self._entry_points() if point.name == name]
        if len(points) > 1:
            raise self.error(
                f"{' and '.join(map(_distribution, points))} both offer a {self.noun} {name!r}; uninstall one of them"
            )
        return points[0] if points else None

    def _offered(self, point: EntryPoint) -> Callable[[], Thing]:
        try:
            factory: Callable[[], Thing] = point.load()
            return factory
        except Exception as error:  # another package's code raises whatever it likes
            raise self.error(
                f"the {self.noun} {point.name!r} comes with the package {_distribution(point)}, which does not import "
                f"({type(error).__name__}: {error}); repair or uninstall it"
            ) from error


def own_path(name: str | Path) -> Path | None:
    """The path that a name would be, `~` for the home folder; None for no name, which is not the current folder."""
    return user_path(name) if str(name) else None


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value.partition(":")[0]
