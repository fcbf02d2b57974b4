#!/usr/bin/env python3
"""Predicted and measured memory and time of trainings, each in processes of its own.

    scripts/memory_table.py --potstill target/release/potstill --model PATH [--model PATH] [--case NAME] [--steps 6]

For each model and case, `potstill plan` predicts the peak of memory and the seconds of a step, and `potstill train` then
makes `--steps` steps on the same text. The measured peak is the largest resident size of that process (ru_maxrss), the
checkpoint at its end included; the measured time is the mean of the steps after the first in `metrics.jsonl`. All
sequences have `--length` tokens. Without `--steps`, the peak of the calibration that `plan` makes is the measured one.
Needs Python 3.9 and no packages; the models are not in this repository.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

CASES = {
    "full f32": "",
    "full bf16": 'precision = "bf16"',
    "recomputed f32": "recompute = true",
    "recomputed bf16": 'precision = "bf16"\nrecompute = true',
    "LoRA f32": "adapter = { rank = 16 }",
    "LoRA bf16": 'precision = "bf16"\nadapter = { rank = 16 }',
    "QLoRA q8_0": 'precision = "bf16"\nadapter = { rank = 16, base = "q8_0" }',
    "QLoRA q4_0": 'precision = "bf16"\nadapter = { rank = 16, base = "q4_0" }',
}
WORDS = "the of and to in a is that for it as was with be by on not he this are or his from at which but have".split()


def run_file(model, case, options):
    """Writes the run file of a case and its data; returns its path."""
    folder = Path(tempfile.mkdtemp(prefix="potstill-memory-"))
    chosen = random.Random(5)
    with open(folder / "data.jsonl", "w") as data:
        for number in range(64):
            # Every sequence is cut at the wanted length.
            text = " ".join(chosen.choices(WORDS, k=2 * options.length))
            row = {"instruction": f"Text {number}", "output": text}
            data.write(json.dumps(row) + "\n")
    (folder / "run.toml").write_text(
        f"""[run]
name = "memory"
[import]
path = "data.jsonl"
columns = {{ instruction = "instruction", output = "output" }}
answers = "given"
[curate]
keep = "all"
[student]
path = "{model}"
[train]
steps = {max(options.steps, 2)}
batch = {options.batch}
micro_batch = {options.micro_batch}
max_length = {options.length}
overlong = "cut"
loss = {{ cross_entropy = 1.0 }}
controls = []
{case}
"""
    )
    return folder


def potstill(options, folder, *arguments):
    """Runs a command in a process of its own; returns its events and its largest resident size in bytes."""
    command = [options.potstill, *arguments, "run.toml", "--json"]
    environment = dict(os.environ, HF_HUB_OFFLINE="1")
    with open(folder / "events", "wb") as out, open(folder / "errors", "wb") as err:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=err, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        lines = (folder / "errors").read_text().strip().splitlines()
        raise RuntimeError(" ".join(lines[-2:]))
    events = [json.loads(line) for line in (folder / "events").read_text().splitlines()]
    return events, usage.ru_maxrss * 1024


def measure(model, case, options):
    folder = run_file(model, case, options)
    events, _ = potstill(options, folder, "plan")
    plan = next(event for event in events if event["event"] == "plan")
    result = {
        "predicted": plan["memory_bytes"],
        "measured": plan.get("calibration_bytes"),
        "predicted_s": plan.get("step_seconds"),
        "measured_s": None,
        "parts": plan["memory"],
    }
    if options.steps:
        for stage in ["import", "collect", "curate"]:
            potstill(options, folder, stage)
        _, result["measured"] = potstill(options, folder, "train")
        steps = (folder / "runs/memory/students/student/metrics.jsonl").read_text().splitlines()
        # A line ends with a checksum behind a tab.
        steps = [json.JSONDecoder().raw_decode(line)[0] for line in steps][1:]
        seconds = [step["tokens"] / step["tokens_per_second"] for step in steps]
        result["measured_s"] = sum(seconds) / len(seconds)
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--potstill", default="target/release/potstill", type=lambda path: str(Path(path).resolve()))
    parser.add_argument("--model", action="append", required=True, type=lambda path: str(Path(path).resolve()))
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--parts", action="store_true", help="print the predicted parts too")
    options = parser.parse_args()
    print("| model | case | predicted | measured | ratio | predicted s | measured s | ratio |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for model in options.model:
        for name in options.case or CASES:
            line = f"| {Path(model).name} | {name} |"
            try:
                result = measure(model, CASES[name], options)
            except (RuntimeError, StopIteration) as error:
                print(f"{line} {error} |", flush=True)
                continue
            for predicted, measured, form in [
                (result["predicted"], result["measured"], lambda value: f"{value / 1e9:.2f} GB"),
                (result["predicted_s"], result["measured_s"], lambda value: f"{value:.2f}"),
            ]:
                shown = [form(value) if value else "–" for value in (predicted, measured)]
                ratio = f"{predicted / measured:.2f}" if predicted and measured else "–"
                line += f" {shown[0]} | {shown[1]} | {ratio} |"
            print(line, flush=True)
            if options.parts:
                parts = {part: f"{size / 1e6:.0f} MB" for part, size in result["parts"].items() if size}
                print(parts, file=sys.stderr)


if __name__ == "__main__":
    main()
