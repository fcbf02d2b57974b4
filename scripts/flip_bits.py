#!/usr/bin/env python3
"""Flips one bit in a file of a run directory, again and again, and checks that each flip is noticed or harmless.

Makes four small run directories with the binary itself: a finished run, one killed during training, one killed while a
local teacher answered, and one whose server was cut off by the budget. Then, for each flip: copies one of them, flips a
random bit of a random file, deletes the outputs that were made from that file so that it has to be read again, and runs
the commands that read it. A flip is
  detected   if the command fails and its message names the file;
  harmless   if the command succeeds and everything that it published is what it publishes without the flip;
  SILENT     otherwise. A crash, and a command that takes over 60 s, count as SILENT too.
Prints a table by kind of file, and exits with 1 if a flip was silent.

usage: flip_bits.py POTSTILL [--flips 200] [--seed 1] [--keep FOLDER]
"""
import argparse
import array
import collections
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from faulty_server import Server

SLOWEST = 60  # seconds
RUN = """[run]
name = "tiny"
seed = 3
[import]
path = "prompts.jsonl"
columns = { question = "text", answer = "answer" }
[teacher]
path = "model"
template = "plain"
[collect]
samples = 4
max_new_tokens = 16
batch = 4
signals = { top_k = 6 }
[grade]
grader = "exact"
[curate]
keep = "all"
wrong = "keep"
test = 0.4
[student]
layers = { every = 2 }
[train]
steps = 60
batch = 4
micro_batch = 2
learning_rate = 1e-2
checkpoint_every = 5
controls = ["sft"]
[eval]
resamples = 100
answers = { grader = "exact", max_new_tokens = 4 }
"""
SERVED = (
    RUN.replace('path = "model"\ntemplate = "plain"', 'url = "http://127.0.0.1:PORT/v1"\nmodel = "m"\ntokenizer = "model"\ntemplate = "plain"')
    .replace("signals = { top_k = 6 }\n", "concurrency = 1\n")
    .replace("[curate]", "[budget]\nrequests = 60\n[curate]")
    .replace('layers = { every = 2 }', 'path = "model"')
    .replace("[train]\n", "[train]\nloss = { forward_kl = 0.0, cross_entropy = 1.0 }\n")
    .replace('controls = ["sft"]', "controls = []")
)


def write_model(folder, layers=2, width=16, inner=24, head=8):
    """Writes a random Llama with a token for each byte, as safetensors."""
    folder.mkdir(parents=True)
    draw = random.Random(5)
    rows = 3 + 256
    shapes = {"model.embed_tokens.weight": (rows, width), "model.norm.weight": (width,)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {at + "input_layernorm.weight": (width,), at + "post_attention_layernorm.weight": (width,)}
        shapes |= {at + "self_attn.q_proj.weight": (2 * head, width), at + "self_attn.o_proj.weight": (width, 2 * head)}
        shapes |= {at + f"self_attn.{p}_proj.weight": (head, width) for p in "kv"}
        shapes |= {at + f"mlp.{p}_proj.weight": (inner, width) for p in ("gate", "up")}
        shapes[at + "mlp.down_proj.weight"] = (width, inner)
    header, body = {}, b""
    for name, shape in shapes.items():
        count = shape[0] * (shape[1] if len(shape) == 2 else 1)
        numbers = array.array("f", [1.0] * count if "norm" in name else [draw.gauss(0, 0.1) for _ in range(count)])
        data = numbers.tobytes()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=rows, hidden_size=width,
        intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1, head_dim=head,
        rms_norm_eps=1e-5, rope_theta=10000.0, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2, hidden_act="silu", torch_dtype="float32",
    )
    special = ["<unk>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate(special)} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    added = [
        dict(id=i, content=t, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        for i, t in enumerate(special)
    ]
    tokenizer = dict(
        version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=None, pre_tokenizer=None,
        post_processor=None, decoder=dict(type="Sequence", decoders=[dict(type="ByteFallback"), dict(type="Fuse")]),
        model=dict(type="BPE", dropout=None, unk_token="<unk>", continuing_subword_prefix=None, end_of_word_suffix=None,
                   fuse_unk=True, byte_fallback=True, ignore_merges=False, vocab=vocabulary, merges=[]),
    )
    files = {
        "config.json": config,
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>"),
        "generation_config.json": dict(eos_token_id=2),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


class Scenario:
    """A folder with a run directory, and what its commands publish without a flip."""

    def __init__(self, name, folder, commands):
        self.name, self.folder, self.commands = name, folder, commands
        self.expected = {}

    def outcome(self, folder, deleted):
        """Runs the commands in a copy. Returns the exit code, the messages and what is published then."""
        run = folder / "runs/tiny"
        for path in deleted:
            target = run / path
            if target.is_dir():
                shutil.rmtree(target)
            elif target.exists():
                target.unlink()
        messages = ""
        for command in self.commands:
            code, text = potstill(folder, command)
            messages += text
            if code != 0:
                return code, messages, {}
        return 0, messages, published(run)


def potstill(folder, command):
    """Runs a command to its end; a negative code is a signal, and None a command that takes too long."""
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen([BINARY, *command], cwd=folder, stdout=output, stderr=subprocess.STDOUT, env=ENVIRONMENT)
        try:
            code = child.wait(SLOWEST)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            code = None
        output.seek(0)
        return code, output.read().decode("utf-8", "replace")


def published(run):
    """The content of all files that do not contain times. Of files with times, the rest."""
    found = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if not path.is_file() or name.startswith(".work") or "tfevents" in name:
            continue
        if name.endswith(("ledger.jsonl", "requests.jsonl", "state.json", "files.json", "report.html", "report.md")):
            continue
        content = path.read_bytes()
        if name.endswith("metrics.jsonl"):
            lines = [json.loads(line) for line in content.decode("utf-8", "replace").splitlines()]
            content = [{k: v for k, v in line.items() if k not in ("tokens_per_second", "stall_seconds", "peak_bytes", "mfu", "crc32c")} for line in lines]
        elif name == "report.json":
            report = json.loads(content)
            report["seconds"] = 0
            for stage in report["stages"]:
                stage["seconds"] = 0
            content = report
        elif name == "_manifest.json":
            content = sorted(json.loads(content)["files"])
        found[name] = content
    return found


def kind(name):
    """The kind of a file, for the table and for the choice of files."""
    base = name.rsplit("/", 1)[-1]
    if base == "journal.bin":
        return "journal"
    if base.endswith("_manifest.json"):
        return "manifests"
    if "/checkpoints/" in name:
        return "checkpoints"
    if "/export/" in name:
        return "exports"
    if base.endswith(".parquet"):
        return "results" if "/eval/" in name else "tables"
    if base.endswith(".jsonl"):
        return "line files"
    if base.endswith("_results.json"):
        return "results"
    return "other files"


def to_delete(name, draw):
    """The outputs to delete so that a file of the finished run is read again."""
    manifest = lambda *homes: [*homes, *(f"{home}_manifest.json" for home in homes)]
    report = ["report.html", "report.md", "report.json", "_manifest.json"]
    model = name.split("/")[1] if name.startswith("students/") else "student"
    top = name.split("/")[0]
    if name.endswith("_manifest.json"):
        return [] if name == "_manifest.json" else report
    if top in ("prompts", "completions", "verdicts"):
        return draw.choice([manifest("train"), manifest("verdicts")]) if top != "verdicts" else manifest("train")
    if top in ("signals", "test"):
        return manifest("students/untrained/eval/test")
    if top in ("train",):
        return manifest("students/unigram/eval/test")
    if "/checkpoints/" in name:
        return manifest(f"students/{model}/export")
    if "/export/" in name:
        return manifest(f"students/{model}/eval/test") + manifest(f"students/{model}/eval/answers")
    return report


def flip(path, draw):
    """Flips a random bit of a file and returns its number."""
    content = bytearray(path.read_bytes())
    bit = draw.randrange(len(content) * 8)
    content[bit // 8] ^= 1 << (bit % 8)
    mode = path.stat().st_mode
    path.chmod(mode | 0o200)
    path.write_bytes(content)
    return bit


def killed(folder, command, when):
    """Runs a command and kills it when `when()` is true."""
    child = subprocess.Popen([BINARY, *command], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    while child.poll() is None and not when():
        time.sleep(0.001)
    was_running = child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    return was_running


def size(path):
    return path.stat().st_size if path.exists() else 0


def prepare(root):
    """Makes the four run directories."""
    write_model(root / "model")
    rows = [{"text": f"Story {i}: once", "answer": "a"} for i in range(24)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "run.toml").write_text(RUN)

    def copy(name):
        folder = root.with_name(name)
        shutil.copytree(root, folder)
        return folder

    whole = copy("finished")
    code, text = potstill(whole, ["run", "run.toml"])
    assert code == 0, text
    scenarios = [Scenario("finished", whole, [["run", "run.toml"]])]

    training = copy("training")
    for stage in ("import", "collect", "grade", "curate"):
        assert potstill(training, [stage, "run.toml"])[0] == 0
    checkpoints = training / "runs/tiny/students/student/checkpoints"
    assert killed(training, ["train", "run.toml"], lambda: (checkpoints / "step-00000015").exists()), "training was too fast"
    scenarios.append(Scenario("training", training, [["train", "run.toml"]]))

    answering = copy("answering")
    assert potstill(answering, ["import", "run.toml"])[0] == 0
    journal = lambda: next(iter((answering / "runs/tiny/.work").glob("collect-*/journal.bin")), answering)
    begun = lambda: journal() != answering and size(journal()) > 4000
    assert killed(answering, ["collect", "run.toml"], begun), "collecting was too fast"
    scenarios.append(Scenario("answering", answering, [["collect", "run.toml"]]))

    served = copy("served")
    text = SERVED.replace("PORT", str(Server().port))
    (served / "run.toml").write_text(text)
    code, output = potstill(served, ["import", "run.toml"])
    assert code == 0, output
    code, output = potstill(served, ["collect", "run.toml"])
    assert code == 1 and "budget" in output, output
    (served / "run.toml").write_text(text.replace("requests = 60", "requests = 1000"))
    scenarios.append(Scenario("served", served, [["collect", "run.toml"]]))
    return scenarios


def choose(scenarios, draw, flips):
    """Chooses files evenly over the kinds: pairs of a scenario and a name."""
    by_kind = collections.defaultdict(list)
    for scenario in scenarios:
        run = scenario.folder / "runs/tiny"
        for path in sorted(run.rglob("*")):
            name = str(path.relative_to(run))
            if path.is_file() and path.stat().st_size > 0:
                # What is finished in an unfinished run is read as in the finished one.
                if scenario.name == "finished" or kind(name) in ("checkpoints", "journal", "line files", "other files") or (
                    scenario.name == "training" and name.split("/")[0] in ("signals", "train")):
                    by_kind[kind(name)].append((scenario, name))
    kinds = sorted(by_kind)
    return [draw.choice(by_kind[kinds[i % len(kinds)]]) for i in range(flips)]


def judge(scenario, name, deleted, folder, reference):
    """Runs the commands on a damaged copy; returns the class and the last line of the message."""
    code, messages, found = scenario.outcome(folder, deleted)
    last = [line for line in messages.splitlines() if line.startswith("error")]
    last = last[-1] if last else (messages.splitlines() or [""])[-1]
    if code is None:
        return "HANG", last
    if code < 0 or code > 2:
        return "CRASH", last
    if code != 0:
        named = name in messages or name.split("/", 1)[-1] in messages or name.rsplit("/", 1)[-1] in messages
        return ("detected" if named else "UNNAMED"), last
    # The damaged file itself, if nothing has read it, and manifests of stages that did not run, stay as they are.
    differ = [n for n in sorted(set(found) | set(reference)) if found.get(n) != reference.get(n) and n != name]
    return ("harmless", "") if not differ else ("SILENT", f"{', '.join(differ[:4])} differ")


def main():
    global BINARY, ENVIRONMENT
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("potstill")
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", help="keep the folders of flips that are neither detected nor harmless here")
    options = parser.parse_args()
    BINARY = str(pathlib.Path(options.potstill).resolve())
    ENVIRONMENT = dict(os.environ, HF_HUB_OFFLINE="1", RAYON_NUM_THREADS="1")
    draw = random.Random(options.seed)
    table = collections.defaultdict(collections.Counter)
    failures = []
    with tempfile.TemporaryDirectory() as temporary:
        scenarios = prepare(pathlib.Path(temporary) / "source")
        references = {}
        for number, (scenario, name) in enumerate(choose(scenarios, draw, options.flips)):
            deleted = to_delete(name, draw) if scenario.name == "finished" else []
            folder = pathlib.Path(temporary) / "flipped"
            key = (scenario.name, *deleted)
            if key not in references:
                shutil.copytree(scenario.folder, folder)
                code, text, references[key] = scenario.outcome(folder, deleted)
                assert code == 0, text
                shutil.rmtree(folder)
            shutil.copytree(scenario.folder, folder)
            bit = flip(folder / "runs/tiny" / name, draw)
            verdict, message = judge(scenario, name, deleted, folder, references[key])
            table[kind(name)][verdict] += 1
            print(f"{number}\t{verdict}\t{scenario.name}\t{name} bit {bit}\t{message}", flush=True)
            if verdict not in ("detected", "harmless"):
                failures.append((scenario.name, name, bit, verdict))
                if options.keep:
                    shutil.copytree(folder, pathlib.Path(options.keep) / f"flip-{number}")
            shutil.rmtree(folder)
    columns = ["detected", "harmless", "SILENT", "UNNAMED", "CRASH", "HANG"]
    print(f"\n{'kind':<14}" + "".join(f"{column:>10}" for column in columns))
    total = collections.Counter()
    for name in sorted(table):
        total.update(table[name])
        print(f"{name:<14}" + "".join(f"{table[name][column]:>10}" for column in columns))
    print(f"{'all':<14}" + "".join(f"{total[column]:>10}" for column in columns))
    for failure in failures:
        print("not noticed:", *failure)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
