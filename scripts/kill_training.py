#!/usr/bin/env python3
"""Kills trainings with SIGKILL at random moments and runs them again, until they are done; compares weights, optimizer state
and metrics with those of an uninterrupted training, byte for byte (metrics without times).

usage: POTSTILL_REAL=... kill_training.py POTSTILL RUN_FILE [--kills 50] [--seed 1] [--train 'precision = "bf16"' ...]

Each `--train` is a line that is added to the table [train] in a copy of the run file, or replaces the line of the same key.
Where a training is done before the given number of kills, another one begins. Everything before `train` is computed once.
"""
import argparse
import hashlib
import json
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("potstill")
parser.add_argument("run_file")
parser.add_argument("--kills", type=int, default=50)
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--train", action="append", default=[])
args = parser.parse_args()
binary = str(pathlib.Path(args.potstill).resolve())
source = pathlib.Path(args.run_file).resolve()
chance = random.Random(args.seed)


def changed_run_file():
    """A copy of the run file beside it, so that its relative paths stay right."""
    head, table, rest = source.read_text().partition("[train]\n")
    if not table:
        sys.exit(f"{source} has no table [train]")
    for line in args.train:
        key = line.split("=")[0].strip()
        body, following, tables = rest.partition("\n[")
        body = "".join(l + "\n" for l in body.splitlines() if l.split("=")[0].strip() != key)
        rest = f"{line}\n{body}{following}{tables}"
    copy = source.with_name(f".{source.stem}-kills-{args.seed}.toml")
    copy.write_text(head + table + rest)
    return copy


def start(run_file, command, run):
    with open(run.parent / "stderr.txt", "ab") as err:
        arguments = [binary, command, str(run_file), "--run-dir", str(run)]
        return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=err)


def finish(run_file, command, run):
    child = start(run_file, command, run)
    if child.wait() != 0:
        sys.exit(f"{command}: exit {child.returncode}: {(run.parent / 'stderr.txt').read_text()[-2000:]}")


def steps_done(run):
    """Number of lines of all metrics."""
    return sum(path.read_bytes().count(b"\n") for path in run.glob("students/*/metrics.jsonl"))


def outcome(run):
    """Hashes of the weights and of the optimizer's state, and the metrics without what depends on time."""
    out = {}
    for path in sorted(run.glob("students/*/**/*.safetensors")):
        out[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(run.glob("students/*/metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            for key in [key for key in line if re.search(r"second|crc32c|memory|bytes", key)]:
                del line[key]
        out[str(path.relative_to(run))] = hashlib.sha256(json.dumps(lines).encode()).hexdigest()
    return out


def train_with_kills(run_file, run, pace, left):
    """Trains until it is done, and returns how often it was killed."""
    kills = 0
    while True:
        before, child = steps_done(run), start(run_file, "train", run)
        began, wanted = time.time(), None
        # Some kills come while the model is loaded, others some steps later, at a random moment of a step or a checkpoint.
        steps = chance.choice([0, 1, 2, 3, 5, 8, 13]) if kills < left else 10**9
        delay = chance.random() * 2 * pace
        while child.poll() is None:
            if wanted is None and (abs(steps_done(run) - before) >= steps or steps == 0 and time.time() - began > 0):
                wanted = time.time() + delay
            if wanted is not None and time.time() >= wanted:
                child.kill()
                break
            time.sleep(0.001)
        code = child.wait()
        if code == 0:
            return kills
        if code > 0:
            sys.exit(f"train: exit {code}: {(run.parent / 'stderr.txt').read_text()[-2000:]}")
        kills += 1


def main():
    run_file = changed_run_file()
    base = pathlib.Path(tempfile.mkdtemp(prefix="potstill-kill-"))
    try:
        whole = base / "whole" / "run"
        whole.parent.mkdir()
        optional = {"score", "grade"}
        for stage in ["import", "collect", "score", "grade", "curate"]:
            if stage not in optional or f"\n[{stage}]" in run_file.read_text():
                finish(run_file, stage, whole)
        shutil.copytree(whole, base / "start")
        began = time.time()
        finish(run_file, "train", whole)
        pace = (time.time() - began) / max(steps_done(whole), 1)
        want = outcome(whole)
        print(f"uninterrupted: {steps_done(whole)} steps, {pace:.3f} s each; {len(want)} files are compared")
        kills, trainings, bad = 0, 0, 0
        while kills < args.kills:
            folder = base / str(trainings)
            folder.mkdir()
            shutil.copytree(base / "start", folder / "run")
            now = train_with_kills(run_file, folder / "run", pace, args.kills - kills)
            got = outcome(folder / "run")
            differ = sorted(name for name in want.keys() | got.keys() if want.get(name) != got.get(name))
            bad += bool(differ)
            print(f"training {trainings}: {now} kills, then {'DIFFERENT: ' + ', '.join(differ) if differ else 'the same bytes'}")
            kills, trainings = kills + now, trainings + 1
            shutil.rmtree(folder)
        print(f"{kills} kills in {trainings} trainings, {bad} of them different")
    finally:
        run_file.unlink()
        shutil.rmtree(base)
    sys.exit(1 if bad else 0)


main()
