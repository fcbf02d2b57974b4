#!/usr/bin/env python3
"""Peak memory of `collect` by the number of prompts, over a server of its own.

usage: collect_memory.py POTSTILL [--prompts 10000 100000]
"""
import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from faulty_server import Server, run_file

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("potstill")
parser.add_argument("--prompts", type=int, nargs="+", default=[10_000, 100_000])
arguments = parser.parse_args()
binary = str(pathlib.Path(arguments.potstill).resolve())


def peak(folder, command):
    """Runs a command and gives its peak resident memory, bytes."""
    child = subprocess.Popen([binary, command, "run.toml", "-q"], cwd=folder)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"`{command}` failed")
    return usage.ru_maxrss * 1024


rows = []
for prompts in arguments.prompts:
    server = Server()
    with tempfile.TemporaryDirectory() as temp:
        folder = pathlib.Path(temp)
        with open(folder / "prompts.jsonl", "w") as file:
            for number in range(prompts):
                file.write(json.dumps({"text": f"Prompt number {number}"}) + "\n")
        (folder / "run.toml").write_text(run_file(server, concurrency=256, stream=False))
        peak(folder, "import")
        rows.append((prompts, peak(folder, "collect")))
    print(f"{prompts} prompts: {rows[-1][1] / 2**20:.1f} MiB at most, {server.requests} requests", flush=True)
for (few, less), (many, more) in zip(rows, rows[1:]):
    each = (more - less) / (many - few)
    print(f"from {few} to {many}: {each:.1f} bytes a prompt ({'fine' if each <= 32 else 'MORE THAN 32'})")
