#!/usr/bin/env python3
"""Trains stories260K in processes under `mpirun` and in threads, and compares the results.

usage: POTSTILL_REAL=... mpi_training.py POTSTILL

POTSTILL is a build with the feature `mpi`. Asserts that
- loss and gradient norm of the first step differ by less than 1e-6 of their value between 1, 2 and 4 replicas;
- 2 and 4 processes write the bytes that as many threads write (weights, optimizer state, metrics without times), and so
  does a second run; in f32, in bf16, with an adapter, with a rate at which the guard goes back to a checkpoint, and with
  rates that are tried, one of which diverges;
- a rank that is killed with SIGKILL ends all processes, and so does an error of a rank, with its message and exit code;
  SIGTERM of one saves a checkpoint; the same command then ends in the same bytes.
"""
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from training_files import changed_run_file, differing, metrics, outcome, steps_done

binary = str(pathlib.Path(sys.argv[1]).resolve())
example = pathlib.Path(__file__).resolve().parent.parent / "examples" / "stories260k.toml"
TRAIN = ['controls = []', "steps = 24", "checkpoint_every = 6"]
FORMS = {
    "f32": [],
    "bf16": ['precision = "bf16"'],
    "an adapter": ["adapter = { rank = 4, alpha = 8 }"],
    "an adapter in bf16": ["adapter = { rank = 4, alpha = 8 }", 'precision = "bf16"'],
    "a return to a checkpoint": ["learning_rate = 1e3"],
}
# Open MPI 4 and 5: more processes than cores, of root.
MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
environment = os.environ | MPI
base = pathlib.Path(tempfile.mkdtemp(prefix="potstill-mpi-"))
# The run files are beside the example, whose data has a relative path.
run_files = []


def run_file(lines):
    """Writes a run file with these lines in [train]."""
    copy = example.with_name(f".{example.stem}-mpi-{os.getpid()}-{len(run_files)}.toml")
    run_files.append(changed_run_file(example, copy, TRAIN + lines))
    return copy


def started(run):
    """Makes a copy of the run directory in which everything before `train` is done."""
    shutil.copytree(base / "start", base / run)
    return base / run


def start(file, run, processes, command="train", last=()):
    """Starts a command in one process or several. `last` are arguments of the last one alone."""
    arguments = [binary, command, str(file), "--run-dir", str(run)]
    if processes > 1:
        others, one = ["-n", str(processes - 1), *arguments], ["-n", "1", *arguments, *last]
        arguments = ["mpirun", *others, ":", *one]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def end(child, want=0):
    """Waits for the end and returns the output."""
    try:
        out, _ = child.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        child.kill()
        sys.exit("no end after 60 s")
    if child.returncode != want:
        sys.exit(f"{child.args}: exit {child.returncode}, not {want}:\n{out[-3000:]}")
    return out


def train(name, replicas, processes, lines=(), expected="", commands=("train",)):
    """Trains with this number of replicas, in processes or in threads of one, and returns the run directory."""
    run, file = started(name), run_file([*lines, f"replicas = {replicas}"])
    out = "".join(end(start(file, run, processes, command)) for command in commands)
    expect(out, expected)
    return run


def ranks(child):
    """The processes that `mpirun` started, by rank."""
    found = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parent = re.search(r"^PPid:\s+(\d+)", (folder / "status").read_text(), re.M)
            if int(parent[1]) == child.pid:
                rank = re.search(rb"OMPI_COMM_WORLD_RANK=(\d+)", (folder / "environ").read_bytes())
                found[int(rank[1])] = int(folder.name)
        except (OSError, TypeError):
            continue
    return found


def check_same(what, want, run):
    differ = differing(want, outcome(run))
    if differ:
        sys.exit(f"{what}: other bytes than before: {', '.join(differ)}")
    print(f"{what}: the same {len(want)} files")


def is_alive(pid):
    """Whether a process runs. One that nobody has waited for does not."""
    try:
        return "\nState:\tZ" not in pathlib.Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def check_interrupted(what, want, stop, code):
    """Interrupts a training of two processes in its middle, and runs it again. Returns the output."""
    run, file = started(what.replace(" ", "-")), run_file(["replicas = 2"])
    child = start(file, run, 2)
    while steps_done(run) < 8:
        if child.poll() is not None:
            sys.exit(f"{what}: ended early:\n{child.communicate()[0]}")
        time.sleep(0.002)
    of_rank, began = ranks(child), time.time()
    stop(child, of_rank)
    out = end(child, code)
    seconds = time.time() - began
    alive = [pid for pid in of_rank.values() if is_alive(pid)]
    if len(of_rank) != 2 or alive:
        sys.exit(f"{what}: of the processes {of_rank}, {alive} have not ended")
    done = steps_done(run)
    if done >= 24:
        sys.exit(f"{what}: all steps were made before")
    end(start(file, run, 2))
    check_same(f"{what} after {done} of 24 steps (all ended in {seconds:.1f} s), then run again", want, run)
    return out


def main():
    one = run_file([])
    for command in ["import", "collect", "curate"]:
        end(start(one, base / "start", 1, command))

    # The first step of several replicas, and equal bytes of processes and threads.
    alone = metrics(train("one", 1, 1), "student")[0]
    for form, lines in FORMS.items():
        for replicas in [2, 4] if form == "f32" else [2]:
            name = f"{form.replace(' ', '-')}-{replicas}"
            expected = "training goes back to the checkpoint" if "return" in form else ""
            threads = train(f"{name}-threads", replicas, 1, lines, expected)
            want = outcome(threads)
            if form == "f32":
                first = metrics(threads, "student")[0]
                for key in ["loss", "gradient_norm"]:
                    difference = abs(first[key] / alone[key] - 1)
                    print(f"{replicas} replicas: {key} of the first step differs by {difference:.1e} of its value")
                    if not difference < 1e-6:
                        sys.exit("the limit is 1e-6")
            processes = train(f"{name}-processes", replicas, replicas, lines, expected)
            check_same(f"{replicas} processes and as many threads, {form}", want, processes)
    want = outcome(base / "f32-2-threads")
    check_same("2 processes again", want, train("again", 2, 2))
    rates = ["learning_rate", "learning_rates = [3e-3, 1e3]", 'controls = ["sft"]', "guard = { skips = 0, returns = 0 }"]
    diverged = "so this learning rate is not chosen"
    tuned = [train(f"tuned-{n}", 2, n, rates, diverged, ("tune", "train")) for n in [1, 2]]
    check_same("2 processes and 2 threads, learning rates", outcome(tuned[0]), tuned[1])

    # Interruptions.
    kill = lambda rank: lambda child, of_rank: os.kill(of_rank[rank], signal.SIGKILL)
    check_interrupted("rank 1 killed", want, kill(1), 137)
    check_interrupted("rank 0 killed", want, kill(0), 137)
    # `mpirun` sends SIGTERM to its processes a second after it got it itself, which is too late here.
    terminate = lambda child, of_rank: os.kill(of_rank[1], signal.SIGTERM)
    out = check_interrupted("rank 1 asked to stop", want, terminate, 1)
    expect(out, "train student: training state saved at step")

    # Errors: each is that of the process that fails.
    file, run = run_file(["replicas = 2"]), started("errors")
    out = end(start(file, run, 2, last=["--device", "none"]), 2)
    expect(out, "error: process 1 of 2: `--device`")
    out = end(start(one, run, 2), 2)
    expect(out, "hint: set `replicas = 2` in [train], or start `potstill` without `mpirun`")


def expect(out, text):
    if text not in out:
        sys.exit(f"{text!r} is not in:\n{out}")
    if text:
        print(f"seen: {text}")


try:
    began = time.time()
    main()
    print(f"{time.time() - began:.0f} s")
finally:
    for file in run_files:
        file.unlink()
    shutil.rmtree(base, ignore_errors=True)
