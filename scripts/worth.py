#!/usr/bin/env python3
"""Measures what stored distributions are worth in answers: trains the student and `sft` of a run file with 1, 2, 4, 8
and 16 answers a prompt, and plots the test KL over the teacher's tokens and over the stored bytes. The test prompts
are the same in all runs. The drawing needs matplotlib.

usage: worth.py POTSTILL RUN_FILE OUT_DIR [SAMPLES…]
"""
import json
import pathlib
import re
import subprocess
import sys

binary, run_file, out = (pathlib.Path(a).resolve() for a in sys.argv[1:4])
SAMPLES = [int(a) for a in sys.argv[4:]] or [1, 2, 4, 8, 16]
COLOURS = {"student": "#0072b2", "sft": "#d55e00"}


def size(folder):
    return sum(f.stat().st_size for f in folder.glob("*.parquet"))


def measure(samples):
    """Runs with this number of answers a prompt, and returns a point for each model."""
    # Beside the original, so that relative paths stay valid.
    edited = run_file.with_name(f".worth-{samples}.toml")
    edited.write_text(re.sub(r"^samples = .*$", f"samples = {samples}", run_file.read_text(), flags=re.M))
    run = out / f"samples-{samples}"
    try:
        subprocess.run([binary, "run", edited, "--run-dir", run, "--quiet"], check=True)
    finally:
        edited.unlink()
    report = json.loads((run / "report.json").read_text())
    curation = json.loads((run / "curation.json").read_text())["train"]
    counts = json.loads((run / "completions_manifest.json").read_text())["counts"]
    # All splits are collected; training reads its share of the answers.
    share = curation["sequences"] / counts["answers"]
    tokens = share * counts["answer tokens"]
    text = share * size(run / "completions")
    distributions = share * size(run / "signals")
    points = []
    for model in report["students"]:
        if model["name"] not in COLOURS:
            continue
        points.append({
            "model": model["name"],
            "samples": samples,
            "sequences": curation["sequences"],
            "tokens": round(tokens),
            "bytes": round(text + (distributions if model["name"] == "student" else 0)),
            "kl": model["kl"]["mean"],
            "seeds": [seed["kl"] for seed in model["seeds"]],
            "accuracy": (model.get("accuracy") or {}).get("overall", {}).get("mean"),
        })
    return points


points = [point for samples in SAMPLES for point in measure(samples)]
(out / "worth.json").write_text(json.dumps(points, indent=1) + "\n")
print("| model | answers a prompt | training answers | teacher tokens | bytes stored | test KL | seeds | right answers |")
print("|---|---:|---:|---:|---:|---:|---|---:|")
for p in points:
    seeds = ", ".join(f"{kl:.4f}" for kl in p["seeds"])
    right = "–" if p["accuracy"] is None else f"{100 * p['accuracy']:.1f} %"
    print(f"| {p['model']} | {p['samples']} | {p['sequences']:,} | {p['tokens']:,} | {p['bytes']:,} | {p['kl']:.4f} | {seeds} | {right} |")

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "potstill", "font.family": "sans-serif", "font.size": 12})
from matplotlib import pyplot

figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2), sharey=True)
for axis, key, name in ((axes[0], "tokens", "teacher tokens to train on"), (axes[1], "bytes", "bytes stored to train on")):
    for model, colour in COLOURS.items():
        mine = [p for p in points if p["model"] == model]
        x = [p[key] for p in mine]
        style = {"student": "-", "sft": "--"}[model]
        axis.plot(x, [p["kl"] for p in mine], style, color=colour, marker="o", label=model)
        for p in mine:
            axis.plot([p[key]] * len(p["seeds"]), p["seeds"], "_", color=colour, alpha=0.7)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel(name)
    axis.grid(True, which="both", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    ticks = [0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8]
    axis.set_yticks(ticks, [f"{t:g}" for t in ticks], minor=False)
    axis.minorticks_off()
axes[0].set_ylabel("test KL to the teacher, nats per token")
axes[0].legend(frameon=False)
low, high = min(min(p["seeds"]) for p in points), max(max(p["seeds"]) for p in points)
axes[0].set_ylim(low * 0.92, high * 1.08)
figure.tight_layout()
figure.savefig(out / "worth.svg", metadata={"Date": None}, transparent=False)
