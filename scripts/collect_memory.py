#!/usr/bin/env python3
"""Measures the peak memory of `collect` by the number of prompts, with the test server: of a run that is killed half
way, and of the run that resumes it.

    cargo build --release -p potstill-teacher --no-default-features --example fault_server
usage: collect_memory.py POTSTILL [--server target/release/examples/fault_server] [--prompts 10000 1000000]
"""
import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

from faulty_server import run_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("potstill")
parser.add_argument("--server", default=ROOT / "target/release/examples/fault_server")
parser.add_argument("--prompts", type=int, nargs="+", default=[10_000, 1_000_000])
arguments = parser.parse_args()
binary = str(pathlib.Path(arguments.potstill).resolve())


def answered(folder):
    """Estimates the number of answers from the size of requests.jsonl, whose lines have about the same length."""
    path = folder / "runs/served/requests.jsonl"
    return path.stat().st_size / 560 if path.exists() else 0


def peak(folder, command, kill_at=None):
    """Runs a command, kills it after `kill_at` answers, and returns its peak resident memory in bytes."""
    child = subprocess.Popen([binary, command, "run.toml", "-q"], cwd=folder)
    while kill_at:
        time.sleep(0.2)
        if answered(folder) >= kill_at:
            child.send_signal(signal.SIGKILL)
            break
        if child.poll() is not None:
            sys.exit(f"`{command}` ended before it could be killed")
    _, status, usage = os.wait4(child.pid, 0)
    if status and not kill_at:
        sys.exit(f"`{command}` failed")
    return usage.ru_maxrss * 1024


rows = []
for prompts in arguments.prompts:
    server = subprocess.Popen(
        [arguments.server, "--latency-ms", "0", "--answer-tokens", "8", "--same", "--threads", "1"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        port = server.stdout.readline().strip().rpartition(":")[2]
        with tempfile.TemporaryDirectory() as temp:
            folder = pathlib.Path(temp)
            with open(folder / "prompts.jsonl", "w") as file:
                for number in range(prompts):
                    file.write(json.dumps({"text": f"Prompt number {number}"}) + "\n")
            collect = run_file(SimpleNamespace(port=port), concurrency=256, stream=False)
            (folder / "run.toml").write_text(collect)
            peak(folder, "import")
            first = peak(folder, "collect", kill_at=prompts / 2)
            rows.append((prompts, first, peak(folder, "collect")))
    finally:
        server.kill()
    _, first, rest = rows[-1]
    print(f"{prompts} prompts: peak {first / 2**20:.1f} MiB until killed, {rest / 2**20:.1f} MiB after resuming", flush=True)
(few, *less), (many, *more) = rows[0], rows[-1]
for name, a, b in zip(("until killed", "after resuming"), less, more):
    each = (b - a) / (many - few)
    print(f"from {few} to {many}, {name}: {each:.1f} bytes per prompt ({'ok' if each <= 32 else 'MORE THAN 32'})")
