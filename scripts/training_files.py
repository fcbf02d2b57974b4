"""Run files and outputs of trainings, for the scripts that compare trainings byte for byte."""
import hashlib
import json
import pathlib
import re


def changed_run_file(source, copy, lines):
    """Writes a copy of a run file, in which each line is added to the table [train] or replaces the line of the same key; a
    key alone removes its line. The copy has to be beside the run file, so that its relative paths stay right."""
    head, table, rest = source.read_text().partition("[train]\n")
    if not table:
        raise SystemExit(f"{source} has no table [train]")
    for line in lines:
        key = line.split("=")[0].strip()
        body, following, tables = rest.partition("\n[")
        body = "".join(l + "\n" for l in body.splitlines() if l.split("=")[0].strip() != key)
        added = f"{line}\n" if "=" in line else ""
        rest = f"{added}{body}{following}{tables}"
    copy.write_text(head + table + rest)
    return copy


def steps_done(run):
    """Number of lines of all metrics."""
    return sum(path.read_bytes().count(b"\n") for path in run.glob("students/*/metrics.jsonl"))


def metrics(run, model):
    """The lines of a model's metrics without what depends on time and memory."""
    lines = (run / "students" / model / "metrics.jsonl").read_text().splitlines()
    is_measured = re.compile(r"second|crc32c|memory|bytes")
    return [{key: value for key, value in json.loads(line).items() if not is_measured.search(key)} for line in lines]


def outcome(run):
    """Hashes of the weights and of the optimizer's state, and of the metrics without what depends on time."""
    out = {}
    for path in sorted(run.glob("students/*/**/*.safetensors")):
        out[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(run.glob("students/*/metrics.jsonl")):
        lines = metrics(run, path.parent.name)
        out[str(path.relative_to(run))] = hashlib.sha256(json.dumps(lines).encode()).hexdigest()
    return out


def differing(want, got):
    """Names of the files that only one of two outcomes has, or that differ."""
    return sorted(name for name in want.keys() | got.keys() if want.get(name) != got.get(name))
