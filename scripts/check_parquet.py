#!/usr/bin/env python3
"""Opens the tables of a run with pyarrow, polars and DuckDB and compares their columns with docs/parquet.md.

usage: check_parquet.py RUN_DIR

completions/, signals/ and train/ must exist; other tables are checked if they exist. Prints one line for each table and
reader, and exits with 1 at the first difference. Needs: pip install pyarrow polars duckdb
"""

import re
import sys
from pathlib import Path

import duckdb
import polars
import pyarrow
import pyarrow.parquet

DOCS = Path(__file__).resolve().parent.parent / "docs" / "parquet.md"
FOLDERS = {"prompts": "prompts", "completions": "completions", "signals": "signals", "train": "train", "heldout": "train", "dropped": "dropped", "verdicts": "verdicts"}
# Optional columns of a table; a file has all of them or none.
OPTIONAL = {"signals": ["draw_ids", "draw_counts"]}
NEEDED = ["completions", "signals", "train"]


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


def with_pyarrow(files):
    tables = [pyarrow.parquet.read_table(file) for file in files]
    for file in files:
        footer = pyarrow.parquet.read_metadata(file).metadata or {}
        assert footer.get(b"potstill.schema") == b"1", f"{file}: no potstill.schema = 1 in the footer"
        assert b"potstill.provenance" in footer, f"{file}: no potstill.provenance in the footer"
    for table in tables:
        table.validate(full=True)
    columns = {field.name: arrow_type(field.type, field.nullable) for field in tables[0].schema}
    return columns, sum(table.num_rows for table in tables)


def with_polars(files):
    frame = polars.read_parquet([str(file) for file in files])
    return {name: polars_type(kind) for name, kind in frame.schema.items()}, frame.height


def with_duckdb(files):
    relation = duckdb.read_parquet([str(file) for file in files])
    columns = {name: duckdb_type(kind) for name, kind in zip(relation.columns, relation.types)}
    return columns, len(relation.fetchall())


def check(name, files, expected):
    rows_seen = set()
    for reader in (with_pyarrow, with_polars, with_duckdb):
        columns, rows = reader(files)
        lacks = [column for column in OPTIONAL.get(name, []) if column not in columns]
        if lacks == OPTIONAL.get(name):
            expected = {column: kind for column, kind in expected.items() if column not in lacks}
        # Only Arrow's schema says which columns may be null.
        wanted = expected if reader is with_pyarrow else {column: kind.replace("?", "") for column, kind in expected.items()}
        who = reader.__name__.removeprefix("with_")
        assert columns == wanted, f"{name}: {who} has {columns}, and docs/parquet.md {wanted}"
        rows_seen.add(rows)
        print(f"{name:12} {who:8} {len(columns)} columns as documented, {rows} rows in {len(files)} files")
    assert len(rows_seen) == 1, f"{name}: the readers count different rows: {rows_seen}"


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    run = Path(sys.argv[1])
    tables = documented()
    try:
        for folder, table in FOLDERS.items():
            files = sorted((run / folder).glob("*.parquet"))
            assert files or folder not in NEEDED, f"{run / folder} has no Parquet files"
            if files:
                check(folder, files, tables[table])
        for file in sorted(run.glob("students/*/eval/*/samples.parquet")):
            table = "samples" if file.parent.name == "heldout" else "task samples"
            check(str(file.relative_to(run)), [file], tables[table])
    except AssertionError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
