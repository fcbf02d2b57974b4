#!/usr/bin/env python3
"""Reads each table of a run as a whole folder and compares its columns with docs/parquet.md.

usage: check_parquet.py RUN_DIR

Every table is opened by its folder's path alone, with pyarrow, Hugging Face datasets, polars and DuckDB. All four must
find the documented columns and the same rows in the same order. completions/ and train/ must be there; other tables
are checked if they exist. Prints one line per table and reader, and exits with 1 at the first difference.
Needs: pip install pyarrow datasets polars duckdb
"""

import math
import os
import re
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import duckdb
import polars
import pyarrow
import pyarrow.parquet

DOCS = Path(__file__).resolve().parent.parent / "docs" / "parquet.md"
# Folders of a run and the heading of each in docs/parquet.md.
FOLDERS = {
    "prompts": "prompts",
    "completions": "completions",
    "failures": "failures",
    "signals": "signals",
    "unscored": "failures",
    "verdicts": "verdicts",
    "train": "train",
    "dev": "train",
    "test": "train",
    "dropped": "dropped",
    "near_duplicates": "near_duplicates",
}
# Columns that all shards of a table may lack together.
OPTIONAL = {"signals": ["draw_ids", "draw_counts"]}
REQUIRED = ["completions", "train"]


def documented():
    """Reads {table: {column: type}} from docs/parquet.md."""
    tables, table = {}, None
    for line in DOCS.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            table = line[3:].strip()
        elif match := re.match(r"\| `(\w+)` \| `([^`]+)` \|", line):
            tables.setdefault(table, {})[match[1]] = match[2]
    return tables


def arrow_type(kind, nullable):
    if pyarrow.types.is_list(kind):
        name = f"list<{arrow_type(kind.value_type, kind.value_field.nullable)}>"
    elif pyarrow.types.is_struct(kind):
        name = "struct<" + ", ".join(f"{f.name}: {arrow_type(f.type, f.nullable)}" for f in kind) + ">"
    else:
        name = {"float": "float32", "double": "float64"}.get(str(kind), str(kind))
    return name + ("?" if nullable else "")


def polars_type(kind):
    if isinstance(kind, polars.List):
        return f"list<{polars_type(kind.inner)}>"
    if isinstance(kind, polars.Struct):
        return "struct<" + ", ".join(f"{f.name}: {polars_type(f.dtype)}" for f in kind.fields) + ">"
    return {"Boolean": "bool"}.get(str(kind), str(kind).lower())


def duckdb_type(kind):
    if kind.id == "list":
        return f"list<{duckdb_type(dict(kind.children)['child'])}>"
    if kind.id == "struct":
        return "struct<" + ", ".join(f"{name}: {duckdb_type(child)}" for name, child in kind.children) + ">"
    names = {"varchar": "string", "uinteger": "uint32", "blob": "binary", "boolean": "bool", "float": "float32", "double": "float64"}
    return names.get(kind.id, kind.id)


def without_nulls(columns):
    return {name: kind.replace("?", "") for name, kind in columns.items()}


def with_pyarrow(folder):
    for file in folder.iterdir():
        footer = pyarrow.parquet.read_metadata(file).metadata or {}
        assert footer.get(b"potstill.schema") == b"1", f"{file}: no potstill.schema = 1 in the footer"
        assert b"potstill.provenance" in footer, f"{file}: no potstill.provenance in the footer"
    table = pyarrow.parquet.read_table(folder)
    table.validate(full=True)
    columns = {field.name: arrow_type(field.type, field.nullable) for field in table.schema}
    return columns, table.to_pylist()


def with_polars(folder):
    frame = polars.scan_parquet(folder).collect()
    return {name: polars_type(kind) for name, kind in frame.schema.items()}, frame.to_dicts()


def with_duckdb(folder):
    relation = duckdb.read_parquet(f"{folder}/*")
    columns = {name: duckdb_type(kind) for name, kind in zip(relation.columns, relation.types)}
    return columns, [dict(zip(columns, row)) for row in relation.fetchall()]


def with_datasets(folder):
    with tempfile.TemporaryDirectory() as cache:
        (table,) = datasets.load_dataset("parquet", data_dir=str(folder), cache_dir=cache).values()
        columns = {field.name: arrow_type(field.type, field.nullable) for field in table.features.arrow_schema}
        return without_nulls(columns), table.to_list()


def same(a, b):
    """Equality of nested values in which NaN equals NaN."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    return a == b


def check(name, folder, expected):
    shards = len(list(folder.iterdir()))
    first = None
    for reader in (with_pyarrow, with_polars, with_duckdb, with_datasets):
        who = reader.__name__.removeprefix("with_")
        if first == [] and reader is with_datasets:
            # load_dataset refuses any table without rows: 'Instruction "train" corresponds to no data!'
            print(f"{name:34} {who:8} not read: datasets opens no table without rows")
            continue
        columns, rows = reader(folder)
        optional = OPTIONAL.get(name, [])
        if optional and not any(column in columns for column in optional):
            expected = {column: kind for column, kind in expected.items() if column not in optional}
        # Only Arrow's schema says what may be null.
        wanted = expected if reader is with_pyarrow else without_nulls(expected)
        assert columns == wanted, f"{name}: {who} has {columns}, and docs/parquet.md {wanted}"
        if first is None:
            first = rows
        assert len(rows) == len(first), f"{name}: {who} has {len(rows)} rows, and pyarrow {len(first)}"
        for number, (row, other) in enumerate(zip(rows, first)):
            assert same(row, other), f"{name}, row {number}: {who} has {row}, and pyarrow {other}"
        print(f"{name:34} {who:8} {len(columns)} columns as documented, {len(rows)} rows in {shards} files")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    run = Path(sys.argv[1])
    datasets.disable_progress_bars()
    tables = documented()
    try:
        for folder, table in FOLDERS.items():
            assert (run / folder).is_dir() or folder not in REQUIRED, f"{run / folder} is absent"
            if (run / folder).is_dir():
                check(folder, run / folder, tables[table])
        for folder in sorted(run.glob("students/*/eval/*/")):
            table = {"test": "samples", "own_text": "own text"}.get(folder.name, "task samples")
            check(str(folder.relative_to(run)), folder, tables[table])
    except AssertionError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
