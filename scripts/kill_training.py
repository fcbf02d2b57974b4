#!/usr/bin/env python3
"""Kills trainings with SIGKILL at random moments and runs them again, until they are done; compares weights, optimizer state
and metrics with those of an uninterrupted training, byte for byte (metrics without times).

usage: POTSTILL_REAL=... kill_training.py POTSTILL RUN_FILE [--kills 50] [--seed 1] [--train 'precision = "bf16"' ...]

Each `--train` is a line that is added to the table [train] in a copy of the run file, or replaces the line of the same key.
Where a training is done before the given number of kills, another one begins. Everything before `train` is computed once.
"""
import argparse
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

from training_files import changed_run_file, differing, outcome, steps_done

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


def start(run_file, command, run):
    with open(run.parent / "stderr.txt", "ab") as err:
        arguments = [binary, command, str(run_file), "--run-dir", str(run)]
        return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=err)


def finish(run_file, command, run):
    child = start(run_file, command, run)
    if child.wait() != 0:
        sys.exit(f"{command}: exit {child.returncode}: {(run.parent / 'stderr.txt').read_text()[-2000:]}")


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
    run_file = changed_run_file(source, source.with_name(f".{source.stem}-kills-{args.seed}.toml"), args.train)
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
            differ = differing(want, got)
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
