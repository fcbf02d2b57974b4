#!/usr/bin/env python3
"""Checks the report's conclusion when other models take the student's place: with `sft` of another seed it
must be no difference, and with `shuffled` it must be that distillation hurts. Needs a finished run with
`seeds = 4` in [train], and works on copies of its folder.

usage: verdicts.py POTSTILL RUN_FILE RUN_DIR
"""
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

binary, run_file, run_dir = (pathlib.Path(a).resolve() for a in sys.argv[1:4])
NO, HURTS = "no_difference", "hurts"
# Name, expected finding (None: any), number of seeds, and the models that replace others.
CASES = [
    ("unchanged, four seeds", None, 4, {}),
    ("unchanged, one seed", None, 1, {}),
    *(
        (f"sft against {other}", NO, 1, {"student": other})
        for other in ("sft-2", "sft-3", "sft-4")
    ),
    ("two seeds of sft against two others", NO, 2, {"student": "sft-3", "student-2": "sft-4"}),
    ("shuffled against sft", HURTS, 1, {"student": "shuffled"}),
]

failed = False
for name, expected, seeds, places in CASES:
    with tempfile.TemporaryDirectory() as temp:
        copy = pathlib.Path(temp) / "run"
        shutil.copytree(run_dir, copy)
        for place, model in places.items():
            shutil.rmtree(copy / "students" / place / "eval")
            shutil.copytree(run_dir / "students" / model / "eval", copy / "students" / place / "eval")
        # In the folder of the original, so that relative paths stay valid.
        text = re.sub(r"^seeds = .*$", f"seeds = {seeds}", run_file.read_text(), flags=re.M)
        edited = run_file.with_name(f".verdicts-{seeds}.toml")
        edited.write_text(text)
        try:
            subprocess.run(
                [binary, "report", edited, "--run-dir", copy, "--quiet"], check=True, stdout=subprocess.DEVNULL,
            )
        finally:
            edited.unlink()
        report = json.loads((copy / "report.json").read_text())
    found = report["conclusion"]["finding"]
    difference = next(
        (c["difference"] for c in report["comparisons"]
         if (c["metric"], c["left"], c["right"]) == ("kl", "student", "sft")), None)
    right = expected in (None, found)
    failed |= not right
    print(f"{'ok   ' if right else 'WRONG'} {name}: {found}, student - sft "
          f"{difference['mean']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}]")
sys.exit(failed)
