#!/usr/bin/env python3
"""Collects answers from a faulty server, kills the run with SIGKILL at random moments and resumes it, and
compares the result with the server's counts and with the bytes of an uninterrupted run.

usage: kill_collect.py POTSTILL [--prompts 10000] [--kills 100] [--faulty 0.3] [--in-flight 64] [--latency 0.05] [--longest 0.6]
"""
import argparse
import hashlib
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time

from faulty_server import Server, run_file

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("potstill")
parser.add_argument("--prompts", type=int, default=10_000)
parser.add_argument("--kills", type=int, default=100)
parser.add_argument("--faulty", type=float, default=0.3)
parser.add_argument("--in-flight", type=int, default=64)
parser.add_argument("--latency", type=float, default=0.05, help="seconds")
parser.add_argument("--longest", type=float, default=0.6, help="longest time until a kill, in seconds")
parser.add_argument("--seed", type=int, default=1)
arguments = parser.parse_args()
binary = str(pathlib.Path(arguments.potstill).resolve())
moments = random.Random(arguments.seed)


def begin(folder, server):
    folder.mkdir()
    prompts = "".join(json.dumps({"text": f"Prompt number {i}"}) + "\n" for i in range(arguments.prompts))
    (folder / "prompts.jsonl").write_text(prompts)
    text = run_file(server, attempts=30, concurrency=arguments.in_flight, backoff=0.01, longest_backoff=0.1)
    (folder / "run.toml").write_text(text)
    subprocess.run([binary, "import", "run.toml", "-q"], cwd=folder, check=True)


def collect(folder, kill_after=None):
    """Runs `collect` to its end, or kills it after `kill_after` seconds; returns whether it was killed."""
    with open(folder / "stderr.txt", "ab") as err:
        child = subprocess.Popen([binary, "collect", "run.toml"], cwd=folder, stdout=subprocess.DEVNULL, stderr=err)
        try:
            child.wait(kill_after)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            return True
    if child.returncode:
        sys.exit(f"exit {child.returncode}: {(folder / 'stderr.txt').read_text()[-2000:]}")
    return False


def published(folder):
    files = sorted((folder / "runs/served").rglob("*.parquet"))
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def manifest(folder):
    return json.loads((folder / "runs/served/completions_manifest.json").read_text())["counts"]


def spent(folder):
    lines = (folder / "runs/served/requests.jsonl").read_text().splitlines()
    over = [line["over"] for line in map(json.loads, lines) if "over" in line]
    return sum(o["usd"] for o in over), sum(o["charge"] == "reserved" for o in over), len(over)


with tempfile.TemporaryDirectory() as temp:
    temp = pathlib.Path(temp)
    whole_server = Server(arguments.faulty, refused=0.01, latency=arguments.latency)
    whole = temp / "whole"
    begin(whole, whole_server)
    began = time.monotonic()
    collect(whole)
    seconds = time.monotonic() - began
    counts = manifest(whole)
    print(f"uninterrupted: {counts['answers']} answers and {counts['failures']} failures of {arguments.prompts} prompts in {seconds:.1f} s; {whole_server.requests} requests, faults {dict(whole_server.faults)}")
    assert counts["answers"] + counts["failures"] == arguments.prompts
    assert whole_server.answered.total() == counts["answers"], "an answer was paid for twice, or lost"
    usd, reserved, _ = spent(whole)
    print(f"  requests.jsonl has ${usd:.6f}, the server ${whole_server.cost():.6f}; {reserved} charged in full")

    server = Server(arguments.faulty, refused=0.01, latency=arguments.latency)
    broken = temp / "broken"
    begin(broken, server)
    kills, early = 0, 0
    while kills < arguments.kills:
        if not collect(broken, moments.uniform(0.02, arguments.longest)):
            early += 1
            break
        kills += 1
    collect(broken)
    counts = manifest(broken)
    answers = server.answered.total()
    extra = answers - counts["answers"]
    usd, reserved, over = spent(broken)
    print(f"killed {kills} times: {counts['answers']} answers and {counts['failures']} failures; the server answered {answers}, {extra} more than were kept, at most {server.most_in_flight} in flight")
    print(f"  requests.jsonl has ${usd:.6f} for {over} requests, the server ${server.cost():.6f} for {server.requests}; {reserved} charged in full")
    assert counts["answers"] + counts["failures"] == arguments.prompts
    assert 0 <= extra <= kills * arguments.in_flight, "more was paid for twice than was in flight"
    assert usd >= server.cost() - 1e-9, "less was charged than the server counted"
    assert published(broken) == published(whole), "the published bytes differ"
    print(f"{'FEWER KILLS THAN REQUESTED' if early else 'ok'}: {len(published(whole))} files are equal byte for byte")
