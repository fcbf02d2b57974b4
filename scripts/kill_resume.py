#!/usr/bin/env python3
"""Kills a run with SIGKILL at ten moments, five during collect and five during train, runs it again, and
compares each published file byte for byte with an uninterrupted run.

usage: POTSTILL_REAL=... kill_resume.py POTSTILL RUN_FILE [--collect-bytes TOTAL]
"""
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

binary, run_file = (str(pathlib.Path(a).resolve()) for a in sys.argv[1:3])
NAME = re.search(r'^name = "(.*)"', pathlib.Path(run_file).read_text(), re.M).group(1)


def published(run):
    """Hashes the files that must not depend on interruptions: Parquet, weights, samples, results."""
    keep = lambda p: p.suffix in {".parquet", ".safetensors"} or p.name.endswith(("curation.json", "results.json", "config.json"))
    out = {}
    for path in sorted(run.rglob("*")):
        inside = path.relative_to(run)
        if path.is_file() and keep(path) and inside.parts[0] != ".work":
            out[str(inside)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return out


def potstill(folder, kill_when=None):
    """Runs to the end, or kills the run when `kill_when()` is true; returns whether it was killed."""
    with open(folder / "stderr.txt", "ab") as err:
        child = subprocess.Popen([binary, "run", run_file], cwd=folder, stdout=subprocess.DEVNULL, stderr=err)
        while child.poll() is None:
            if kill_when and kill_when():
                child.kill()
                child.wait()
                return True
            time.sleep(0.002)
    if child.returncode != 0:
        sys.exit(f"exit {child.returncode}: {(folder / 'stderr.txt').read_text()}")
    return False


def journal_bytes(run):
    try:
        return sum(p.stat().st_size for p in (run / ".work").rglob("journal.bin"))
    except FileNotFoundError:  # a folder was published in the meantime
        return 0


def lines(path):
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def main():
    base = pathlib.Path(tempfile.mkdtemp(prefix="potstill-kill-"))
    whole = base / "whole"
    whole.mkdir()
    largest = 0

    def watch():
        nonlocal largest
        largest = max(largest, journal_bytes(whole / "runs" / NAME))
        return False

    potstill(whole, watch)
    want = published(whole / "runs" / NAME)
    steps = json.loads((whole / "runs" / NAME / "students/student/metrics.jsonl").read_text().splitlines()[-1])["step"]
    print(f"uninterrupted: {len(want)} files, journal {largest} bytes, {steps} steps")
    moments = [("collect", f"journal at {part}/6", lambda run, part=part: journal_bytes(run) >= largest * part / 6) for part in range(1, 6)]
    for name, part in [("student", 1), ("student", 3), ("sft", 2), ("shuffled", 3), ("shuffled", 5)]:
        at = max(1, steps * part // 6)
        test = lambda run, name=name, at=at: lines(run / "students" / name / "metrics.jsonl") >= at
        moments.append(("train", f"{name} after step {at}", test))
    bad = 0
    for number, (stage, what, when) in enumerate(moments):
        folder = base / str(number)
        folder.mkdir()
        run = folder / "runs" / NAME
        killed = potstill(folder, lambda: when(run))
        at = journal_bytes(run) if stage == "collect" else lines(run / "students" / what.split()[0] / "metrics.jsonl")
        potstill(folder)
        got = published(run)
        same = killed and got == want
        bad += not same
        print(f"{stage}, {what}: killed={killed} (at {at}), then {'the same bytes' if got == want else 'DIFFERENT'} in {len(got)} files")
        for name in sorted(set(got) ^ set(want)) + [n for n in want if n in got and got[n] != want[n]]:
            print("   ", name)
    shutil.rmtree(base)
    sys.exit(1 if bad else 0)


main()
