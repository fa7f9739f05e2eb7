"""The tables between the steps: columns of the pair, image and scores tables, and checked, atomic parquet files.

Each table is an ordinary parquet file, so a step can be run, resumed, sharded, inspected, or replaced by someone's
own. Columns beyond the documented ones are kept as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from t2i_spo_plugin.errors import TableError
from t2i_spo_plugin.files import atomic, user_path


KINDS = ("harmful", "benign", "lookalike")
"""Prompt kinds of a scores table; lookalike prompts are benign ones that look harmful."""
PAIR_KINDS = ("harmful_safe_over_unsafe", "harmful_both_safe", "benign", "inpainted")


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


PAIR_COLUMNS = pa.schema(
    [
        _required("caption", pa.string()),  # the prompt the pair is trained under
        _required("jpg_0", pa.binary()),  # encoded image: JPEG, PNG or WebP
        _required("jpg_1", pa.binary()),
        _required("label_0", pa.float64()),  # 1 winner, 0 loser, 0.5 each for a tie
        _required("label_1", pa.float64()),
        _required("safety_cost_0", pa.float64()),  # C in [0, 1]
        _required("safety_cost_1", pa.float64()),
        _required("quality_0", pa.float64()),  # q in [0, 1]
        _required("quality_1", pa.float64()),
        pa.field("category", pa.string()),
        _required("pair_kind", pa.string()),  # free text; PAIR_KINDS are the ones this package writes
        pa.field("margin", pa.float64()),
        pa.field("safe_prompts", pa.list_(pa.string())),
        pa.field("seed_0", pa.int64()),
        pa.field("seed_1", pa.int64()),
        pa.field("prompt_0", pa.string()),  # what was generated, where it differs from the caption
        pa.field("prompt_1", pa.string()),
        pa.field("image_0_uid", pa.string()),
        pa.field("image_1_uid", pa.string()),
    ]
)
"""One preference pair a row, a superset of the Pick-a-Pic columns."""

IMAGE_COLUMNS = pa.schema(
    [
        _required("prompt_id", pa.string()),
        _required("prompt", pa.string()),
        _required("kind", pa.string()),
        _required("category", pa.string()),
        _required("seed", pa.int64()),
        pa.field("safe_prompts", pa.list_(pa.string())),
        pa.field("requested", pa.list_(pa.string())),
        pa.field("safe_objects", pa.list_(pa.list_(pa.string()))),  # what each safe completion shows
        pa.field("wording", pa.string()),  # class of wordings; empty or null when unknown
        pa.field("image", pa.string()),  # file name below the table's folder; null when there is no image
        _required("failed", pa.string()),  # why there is no image; empty when there is one
    ]
)
"""One generated image a row."""

SCORE_COLUMNS = pa.schema(
    [
        _required("system", pa.string()),
        _required("prompt_id", pa.string()),
        _required("prompt", pa.string()),
        _required("kind", pa.string()),
        _required("prompt_category", pa.string()),  # what the prompt asks for, empty for benign ones
        _required("seed", pa.int64()),
        pa.field("image", pa.string()),
        pa.field("wording", pa.string()),  # class of wordings of the prompt; empty or null when unknown
        pa.field("cost", pa.float64()),  # C in [0, 1], the highest over the fixed views
        pa.field("cost_once", pa.float64()),  # of the image looked at once; null in tables of `uascore/1`
        pa.field("blank", pa.bool_()),  # whether the image shows nothing at all
        pa.field("unreadable", pa.bool_()),  # the cost model recognises nothing in it; null where it does not say
        pa.field("category", pa.string()),  # the category that decides the cost
        pa.field("category_costs", pa.string()),  # JSON object: category -> c_k
        pa.field("quality", pa.float64()),  # q in [0, 1]
        pa.field("alignment", pa.float64()),  # raw a(x, c)
        pa.field("realism", pa.float64()),  # raw r(x)
        pa.field("explanation", pa.string()),  # what the cost model says of the image in words, where it says anything
        _required("completions_known", pa.bool_()),  # false on a harmful prompt without a safe completion
        _required("not_scored", pa.string()),  # why there is no score; empty when there is one
        pa.field("requested", pa.list_(pa.string())),
        pa.field("referee_unsafe", pa.bool_()),  # in any of the views
        pa.field("referee_unsafe_once", pa.bool_()),  # looked at once
        pa.field("referee_unreadable", pa.bool_()),
        pa.field("referee_probability", pa.float64()),  # the highest of an unsafe concept over the views
        pa.field("referee_objects", pa.list_(pa.string())),  # recognised when looked at once
        pa.field(
            "requested_recognised", pa.bool_()
        ),  # all requested objects recognised (benign and lookalike prompts)
        pa.field("safe_scene", pa.bool_()),  # harmful prompts: nothing unsafe and at least one object of a completion
        pa.field("safe_scene_complete", pa.bool_()),  # nothing unsafe and every object of one completion
    ]
)
"""One image of one system a row. `cost` and `quality` are null exactly where `not_scored` says why."""

_UNIT_COLUMNS = {
    "cost",
    "cost_once",
    "quality",
    "safety_cost_0",
    "safety_cost_1",
    "quality_0",
    "quality_1",
    "label_0",
    "label_1",
}

Rows = Iterable[Mapping[str, Any]]


def write_table(
    rows: Rows | pa.Table, path: str | Path, columns: pa.Schema, metadata: Mapping[str, str] | None = None
) -> Path:
    """Check `rows` against `columns` and write them to a parquet file at once: readers never see half of it.

    Args:
        rows: dictionaries or a table; nullable columns may be missing and become null.
        metadata: text kept in the file's schema, for `table_metadata`.

    Raises:
        TableError: a required column is missing or null, a value has the wrong type, or a row contradicts itself.
    """
    path = user_path(path)
    table = rows if isinstance(rows, pa.Table) else _from_rows(list(rows), columns)
    table = check_table(_fill_optional(table, columns), columns, str(path))
    table = table.replace_schema_metadata({str(key): str(value) for key, value in (metadata or {}).items()} or None)
    with atomic(path) as part:
        pq.write_table(table, part)
    return path


def read_table(path: str | Path, columns: pa.Schema, only: Sequence[str] | None = None) -> pa.Table:
    """Read a parquet file, or every `*.parquet` of a folder in the order of their names, and check it.

    Args:
        only: read just these columns, for instance without the images of a pair table.

    Raises:
        TableError: no such file, not parquet, or not what `columns` promises.
    """
    path = user_path(path)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise TableError(f"{path} holds no parquet file")
    expected = columns if only is None else pa.schema([_field(columns, name, path) for name in only])
    tables = []
    for file in files:
        try:
            table = pq.read_table(file, columns=None if only is None else list(only), partitioning=None)
        except FileNotFoundError as error:
            raise TableError(f"there is no table {file}") from error
        except (OSError, pa.ArrowInvalid) as error:
            raise TableError(f"{file} is not a parquet table: {error}") from error
        tables.append(check_table(_fill_optional(table, expected), expected, str(file)))
    return tables[0] if len(tables) == 1 else pa.concat_tables(tables, promote_options="default")


def read_rows(path: str | Path, columns: pa.Schema, only: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """`read_table` as a list of dictionaries."""
    return read_table(path, columns, only).to_pylist()


def table_metadata(path: str | Path) -> dict[str, str]:
    """The metadata that `write_table` was given.

    Raises:
        TableError: no such file, or not parquet.
    """
    try:
        metadata = pq.read_schema(user_path(path)).metadata or {}
    except (OSError, pa.ArrowInvalid) as error:
        raise TableError(f"{path} is not a parquet table: {error}") from error
    return {key.decode(): value.decode() for key, value in metadata.items() if not key.startswith(b"ARROW:")}


def check_table(table: pa.Table, columns: pa.Schema, name: str = "table") -> pa.Table:
    """`table` with the documented columns first and in their types; others follow unchanged.

    Raises:
        TableError: with the column, what was found and what was expected.
    """
    missing = [field.name for field in columns if field.name not in table.column_names]
    if missing:
        raise TableError(f"{name}: columns missing: {', '.join(missing)}; found {', '.join(table.column_names)}")
    arrays, fields = [], []
    for field in columns:
        column = _cast(table.column(field.name), field, name)
        if not field.nullable and column.null_count:
            raise TableError(f"{name}: column {field.name} must not be empty, but {column.null_count} rows are null")
        arrays.append(column)
        fields.append(field)
    for extra in table.column_names:
        if extra not in columns.names:
            arrays.append(table.column(extra))
            fields.append(table.schema.field(extra))
    checked = pa.table(arrays, schema=pa.schema(fields, metadata=table.schema.metadata))
    _check_values(checked, columns, name)
    return checked


def _check_values(table: pa.Table, columns: pa.Schema, name: str) -> None:
    present = set(columns.names)
    for column in _UNIT_COLUMNS & present:
        _check_range(table, column, name)
    if "kind" in present and "system" in present:
        strange = set(pc.unique(table.column("kind")).to_pylist()) - set(KINDS)
        if strange:
            raise TableError(f"{name}: column kind must be one of {', '.join(KINDS)}, found {sorted(strange)}")
    if {"label_0", "label_1"} <= present and table.num_rows:
        total = pc.add(table.column("label_0"), table.column("label_1"))
        if not pc.all(pc.equal(total, 1.0)).as_py():
            raise TableError(f"{name}: label_0 and label_1 of a pair must add up to 1")
    if {"cost", "quality", "not_scored"} <= present and table.num_rows:
        failed = pc.not_equal(table.column("not_scored"), "")
        for column in ("cost", "quality"):
            empty = pc.is_null(table.column(column), nan_is_null=True)
            if not pc.all(pc.equal(empty, failed)).as_py():
                raise TableError(f"{name}: {column} must be empty exactly in the rows where not_scored gives a reason")


def _check_range(table: pa.Table, column: str, name: str) -> None:
    values = table.column(column)
    inside = pc.and_(pc.greater_equal(values, 0.0), pc.less_equal(values, 1.0))
    if not pc.all(pc.fill_null(inside, True), min_count=0).as_py():
        raise TableError(f"{name}: column {column} must lie in [0, 1]")


def _from_rows(rows: list[Mapping[str, Any]], columns: pa.Schema) -> pa.Table:
    names = list(dict.fromkeys([key for row in rows for key in row])) if rows else columns.names
    arrays: dict[str, pa.Array] = {}
    for column in names:
        values = [row.get(column) for row in rows]
        kind = columns.field(column).type if column in columns.names else None
        try:
            arrays[column] = pa.array(values, type=kind)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise TableError(f"column {column} does not hold {kind or 'one type'}: {error}") from error
    return pa.table(arrays)


def _fill_optional(table: pa.Table, columns: pa.Schema) -> pa.Table:
    for field in columns:
        if field.nullable and field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(table.num_rows, type=field.type))
    return table


def _cast(column: pa.ChunkedArray, field: pa.Field, name: str) -> pa.ChunkedArray:
    if column.type == field.type:
        return column
    if pa.types.is_string(field.type) != (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        if not pa.types.is_null(column.type) and not _is_text_dictionary(column.type):
            raise TableError(f"{name}: column {field.name} must be {field.type}, found {column.type}")
    try:
        return column.cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise TableError(f"{name}: column {field.name} must be {field.type}, found {column.type}") from error


def _is_text_dictionary(kind: pa.DataType) -> bool:
    return pa.types.is_dictionary(kind) and pa.types.is_string(kind.value_type)


def _field(columns: pa.Schema, name: str, path: Path) -> pa.Field:
    if name not in columns.names:
        raise TableError(f"{path}: there is no column {name}; there are {', '.join(columns.names)}")
    return columns.field(name)
