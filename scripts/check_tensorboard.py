#!/usr/bin/env python3
"""Reads a student's event file with TensorBoard and compares it with its metrics.jsonl.

usage: check_tensorboard.py STUDENT_DIR        (such as runs/NAME/students/student)

Each step of metrics.jsonl must occur once with all its numbers (TensorBoard stores them in 32 bits). Exits with 1 at
the first difference. Needs: pip install tensorboard
"""

import json
import struct
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util import tensor_util

LOSSES = ["forward_kl", "cross_entropy", "teacher_nll"]


def tag(field):
    if field == "loss":
        return "loss/total"
    return ("loss/" if field in LOSSES else "train/") + field


def single(number):
    return struct.unpack("f", struct.pack("f", number))[0]


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    student = Path(sys.argv[1])
    lines = (student / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    files = list((student / "tensorboard").iterdir())
    assert len(files) == 1 and "tfevents" in files[0].name, f"one event file expected, found {files}"
    # The loader verifies both checksums of each record.
    version, *events = EventFileLoader(str(files[0])).Load()
    assert version.file_version == "brain.Event:2", version
    assert [event.step for event in events] == [line["step"] for line in metrics], "the steps differ from metrics.jsonl"
    times = [event.wall_time for event in events]
    assert times == sorted(times), "times decrease"
    for event, line in zip(events, metrics):
        found = {value.tag: float(tensor_util.make_ndarray(value.tensor)) for value in event.summary.value}
        expected = {tag(field): single(number) for field, number in line.items() if field != "step"}
        assert found == expected, f"step {event.step}: TensorBoard has {found}, metrics.jsonl {expected}"
    print(f"{files[0]}: {len(events)} steps, {len(expected)} numbers each, as in metrics.jsonl")


if __name__ == "__main__":
    try:
        main()
    except AssertionError as error:
        sys.exit(f"error: {error}")
