#!/usr/bin/env python3
"""Runs the program on mutated inputs of each kind that it reads, and counts what it makes of them.

    scripts/mutate.py [--binary target/release/potstill] [--count 2400] [--seed 1] [--jobs 2] [--only KIND] [--table FILE]

A tiny model with random weights, data and a run file are made in a temporary folder, and a run of all stages from them. Each
case copies what it needs, changes one file in one to four places (bits, bytes, cuts, repeats, numbers, words of the format),
and runs one command. The classes:

    refused     exit code 1 or 2, and the message names the file (for a reply: says what is wrong with the reply)
    equal       exit code 0 with the result of the unchanged input: the change is to nothing that is read
    other       exit code 0 with another result, where the input is data, a setting or a weight that may have any value, so
                that the changed file is another valid input
    FAILED      a panic, a signal, over 20 seconds, over 4 GB, a message without the file, or another result from a file
                that Potstill wrote itself and has to check

Only the standard library is used. Exit code 1 if a case failed; the inputs that did are kept in the folder that is printed.
"""

import argparse
import collections
import gzip
import hashlib
import http.server
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

SECONDS = 20
MEMORY = 4 << 30
ROOT = pathlib.Path(__file__).resolve().parent.parent

RUN_FILE = """[run]
name = "tiny"
seed = 3

[import]
path = "prompts.jsonl"
columns = { text = "text" }

[teacher]
path = "model"

[collect]
samples = 2
max_new_tokens = 12
batch = 5
signals = { top_k = 6 }

[curate]
keep = "all"
test = 0.4

[student]
layers = { every = 2 }

[train]
steps = 6
batch = 4
micro_batch = 2
learning_rate = 1e-2
checkpoint_every = 2

[eval]
resamples = 100
"""

SERVED = """[run]
name = "served"

[import]
path = "prompts.jsonl"
columns = { text = "text" }
limit = 2

[teacher]
url = "http://127.0.0.1:PORT/v1"
model = "m"
tokenizer = "model"

[collect]
max_new_tokens = 12
stream = STREAM
attempts = 1
concurrency = 1
signals = SIGNALS

[curate]
keep = "all"

[student]
path = "model"

[train]
LOSS
"""

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }}{{ eos_token }}{% endgeneration %}{% else %}{{ message['content'] | trim }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)

NUMBERS = ["0", "-1", "1e999", "-0.0", "2147483648", "4294967296", "9223372036854775807", "18446744073709551615",
           "18446744073709551616", "1000000000", "0.5", "NaN"]
WORDS = {
    "json": ["null", "true", "[]", "{}", "[[[[[[[[", '{"a":', '""', '"', ",", ":", "]", "}", "\n", "\\u0000", "\\ud800", "\ufeff",
             "\u202e", "\x1b[31m", "../../", "/dev/zero"],
    "jinja": ["{{ x }}", "{% if %}", "{% endfor %}", "{{ messages }}", "{% for i in range(99999999) %}x{% endfor %}",
              "{% set s = 'aaaaaaaa' %}{% for i in range(60) %}{% set s = s ~ s %}{% endfor %}", "(" * 500, "{% if true %}" * 300,
              "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ raise_exception('\x1b[31mno') }}", "| batch(999999999, 0) | list",
              "| replace('', 'a' * 99999)", "{{ 'a' * 99999999 }}", "| indent(99999999)", "}}", "%}", "{#"],
    "toml": ["a = 1\n", "[a]\n", "[[b]]\n", "= ", "{", "[" * 500, "true", "inf", "nan", '"', "'''", "\n", "#", "${HOME}", "../"],
    "csv": [",", ";", "\t", '"', '""', "\n", "\r", "\0", "\ufeff"],
    "bytes": ["\0", "GGUF", "PAR1", "\n"],
}


def of_text(served):
    """The run file of a server without distributions."""
    return served.replace("signals = SIGNALS\n", "").replace("LOSS", "loss = { cross_entropy = 1.0 }")


def mutated(rng, data, words):
    """Returns bytes with one to four changes; never the same bytes."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randint(0, len(out))
        kind = rng.randrange(9)
        if kind <= 1 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 2 and at < len(out):
            out[at] = rng.randrange(256)
        elif kind == 3 and rng.random() < 0.3:
            del out[at:]
        elif kind == 4:
            del out[at:at + rng.randint(1, 64)]
        elif kind == 5:
            part = out[at:at + rng.randint(1, 64)]
            out[at:at] = part * rng.randint(1, 8)
        elif kind == 6:
            out[at:at] = rng.choice(WORDS[words]).encode()
        elif kind == 7:
            numbers = list(re.finditer(rb"(?<![0-9a-zA-Z])-?[0-9.]+", bytes(out[:200_000])))
            if numbers:
                found = rng.choice(numbers)
                out[found.start():found.end()] = rng.choice(NUMBERS).encode()
        elif len(out) > 8:
            at = rng.randint(0, len(out) - 8)
            width = rng.choice([1, 2, 4, 8])
            number = rng.choice([0, 1, 2**64 - 1, 2**31, 2**63 - 1, 2**40])
            out[at:at + width] = number.to_bytes(8, "little")[:width]
    return bytes(out) if bytes(out) != data else mutated(rng, data, words)


# The tiny run.

def tokenizer():
    special = ["<unk>", "<s>", "</s>"]
    vocabulary = {token: number for number, token in enumerate(special)}
    vocabulary.update({f"<0x{byte:02X}>": 3 + byte for byte in range(256)})
    vocabulary.update({token: 259 + number for number, token in enumerate(["a", "b", "ab", "\u2581"])})
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    added = [{"id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for number, token in enumerate(special)]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": space,
            "pre_tokenizer": None, "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                      "vocab": vocabulary, "merges": [["a", "b"]]}}


def safetensors(tensors):
    header, data = {}, b""
    for name, (shape, values) in tensors.items():
        packed = struct.pack(f"<{len(values)}f", *values)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(packed)]}
        data += packed
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_model(folder):
    rng = random.Random(5)
    width, inner, rows = 16, 24, 263
    shapes = {"model.embed_tokens.weight": [rows, width], "model.norm.weight": [width]}
    for layer in range(2):
        at = f"model.layers.{layer}."
        shapes |= {at + "input_layernorm.weight": [width], at + "post_attention_layernorm.weight": [width],
                   at + "self_attn.q_proj.weight": [16, width], at + "self_attn.k_proj.weight": [8, width],
                   at + "self_attn.v_proj.weight": [8, width], at + "self_attn.o_proj.weight": [width, 16],
                   at + "mlp.gate_proj.weight": [inner, width], at + "mlp.up_proj.weight": [inner, width],
                   at + "mlp.down_proj.weight": [width, inner]}
    def values(shape):
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        return [1.0] * count if len(shape) == 1 else [rng.gauss(0, 0.1) for _ in range(count)]
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(safetensors({n: (s, values(s)) for n, s in shapes.items()}))
    config = {"model_type": "llama", "vocab_size": rows, "hidden_size": width, "intermediate_size": inner,
              "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-5,
              "rope_theta": 10000.0, "max_position_embeddings": 96, "tie_word_embeddings": True, "bos_token_id": 1,
              "eos_token_id": [2]}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "bos_token_id": 1}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


class Base:
    """The folder with the unchanged inputs and runs."""

    def __init__(self, binary):
        self.binary = binary
        self.root = pathlib.Path(tempfile.mkdtemp(prefix="potstill-mutate-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
        base = self.root / "base"
        base.mkdir()
        self.folder = base
        write_model(base / "model")
        rows = [{"text": f"Story {number}: once"} for number in range(12)]
        (base / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        chats = [{"messages": [{"role": "user", "content": f"{n} + 7?"}, {"role": "assistant", "content": str(n + 7)}]} for n in range(4)]
        (base / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
        (base / "rows.json").write_text(json.dumps([{"question": f"{n} + 7?", "answer": n + 7} for n in range(4)]))
        (base / "rows.csv").write_text('question,answer\n"7 + 5?",12\n"say ""a"", b",b\n1 + 1?,2\n')
        (base / "rows.jsonl.gz").write_bytes(gzip.compress((base / "prompts.jsonl").read_bytes(), mtime=0))
        (base / "run.toml").write_text(RUN_FILE)
        self.must(["run", "run.toml"])
        gguf = RUN_FILE.replace('"tiny"', '"gguf"') + '\n[export]\nformat = "gguf"\ntype = "f16"\n'
        (base / "gguf.toml").write_text(gguf)
        self.must(["run", "gguf.toml"])
        found = sorted((base / "runs/gguf").rglob("*.gguf"))
        shutil.copy(found[0], base / "model.gguf")
        shutil.rmtree(base / "runs/gguf")
        (base / "gguf.toml").write_text(RUN_FILE.replace('path = "model"', 'path = "model.gguf"').replace('"tiny"', '"gguf"').replace("layers = { every = 2 }", 'path = "model"'))
        self.interrupted()
        self.begun()

    def must(self, arguments):
        done = subprocess.run([self.binary, *arguments], cwd=self.folder, capture_output=True, text=True, env=environment())
        if done.returncode != 0:
            sys.exit(f"potstill {' '.join(arguments)} failed on unchanged inputs:\n{done.stderr}")

    def interrupted(self):
        """Makes runs/stopped, whose training was killed behind a checkpoint."""
        base = self.folder
        text = RUN_FILE.replace('"tiny"', '"stopped"').replace("steps = 6", "steps = 300").replace("checkpoint_every = 2", "checkpoint_every = 50")
        (base / "stopped.toml").write_text(text)
        for stage in ["import", "collect", "curate"]:
            self.must([stage, "stopped.toml"])
        process = subprocess.Popen([self.binary, "train", "stopped.toml"], cwd=base, env=environment(),
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            if any(path.is_dir() for path in (base / "runs/stopped").rglob("checkpoints/step-*")):
                process.send_signal(signal.SIGKILL)
                process.wait()
            time.sleep(0.001)
        if not any((base / "runs/stopped").rglob("checkpoints/step-*")):
            sys.exit("the training was not interrupted in time")


    def begun(self):
        """Makes runs/served with a journal: the program was killed while it waited for the last of eight answers."""
        reached, is_waiting = threading.Event(), True
        def reply_to(body):
            if is_waiting and b"Story 7" in body:
                reached.set()
                time.sleep(2)
            return 200, "application/json", json.dumps(COMPLETION).encode()
        server = serve(reply_to)
        text = SERVED.replace("PORT", str(server.server_port)).replace("STREAM", "false").replace("limit = 2\n", "limit = 8\n")
        (self.folder / "served.toml").write_text(of_text(text))
        self.must(["import", "served.toml"])
        process = subprocess.Popen([self.binary, "collect", "served.toml"], cwd=self.folder, env=environment(),
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        reached.wait(10)
        time.sleep(0.5)
        process.kill()
        process.wait()
        is_waiting = False


def environment():
    keep = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "LANG")}
    return keep | {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", "RAYON_NUM_THREADS": "2", "NO_COLOR": "1"}


class Outcome:
    def __init__(self, code, output, message, seconds, peak):
        self.code, self.output, self.message, self.seconds, self.peak = code, output, message, seconds, peak


def execute(binary, arguments, folder):
    """Runs the program with its limits, and measures it."""
    def limits():
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out, err = folder / ".stdout", folder / ".stderr"
    began = time.monotonic()
    with open(out, "wb") as stdout, open(err, "wb") as stderr:
        process = subprocess.Popen([binary, *arguments], cwd=folder, stdout=stdout, stderr=stderr, stdin=subprocess.DEVNULL,
                                   env=environment(), preexec_fn=limits)
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - began
    text = lambda path: path.read_bytes().decode("utf-8", "replace")
    return Outcome(process.returncode, text(out), text(err), seconds, usage.ru_maxrss << 10)


# Kinds of inputs: the file that is changed, the command, and what the result is.

class Kind:
    """`copies` are what a case needs of the base folder; `is_own` says that Potstill wrote the file and checks it."""

    def __init__(self, name, share, files, words, command, copies, is_own=False, names=None, result=None, prepare=None):
        self.name, self.share, self.files, self.words = name, share, files, words
        self.command, self.copies, self.is_own = command, copies, is_own
        self.names, self.result, self.prepare = names, result, prepare


def stable(text):
    """The output without times."""
    return re.sub(r"\d+([.,]\d+)* ?(ms|s|min|h|tokens/s|tok/s|GB|MB|kB|GiB|MiB)\b", "T", text)


def of_output(folder, outcome):
    return stable(outcome.output)


# Files whose bytes depend on times, and those beside the results.
TIMED = ("ledger.jsonl", "requests.jsonl", "metrics.jsonl", "events.out", "tfevents", "report.html", "report.md", "report.json",
         "state.json", "_manifest.json", ".lock", "sources.json", "run.toml", "/checkpoints/", "/.work/", "/earlier/")


def of_run(name):
    """The published files of a run, and the figures of its report."""
    def result(folder, outcome):
        root, files = folder / "runs" / name, {}
        for path in sorted(root.rglob("*")):
            relative = "/" + str(path.relative_to(root))
            if path.is_file() and not any(part in relative for part in TIMED):
                files[relative] = hashlib.sha256(path.read_bytes()).hexdigest()
        report = root / "report.md"
        if report.exists():
            files["report"] = stable(report.read_text("utf-8", "replace"))
        return json.dumps(files)
    return result


MODEL = ["model", "prompts.jsonl", "run.toml"]


def kinds(base):
    runs = base.folder / "runs/tiny"
    listed = lambda pattern, root=runs: [str(path.relative_to(base.folder)) for path in sorted(root.glob(pattern)) if path.is_file()]
    check, run = ["check", "run.toml"], ["run", "run.toml"]
    model = lambda name, share, file, words, command=check: Kind(name, share, [f"model/{file}"], words, command, MODEL)
    data = lambda name, share, file, words, text, command: Kind(
        name, share, [file], words, command, ["model", file],
        prepare=lambda folder: (folder / "run.toml").write_text(RUN_FILE.replace("prompts.jsonl", file).replace('{ text = "text" }', text)))
    question = '{ question = "question", answer = "answer" }'
    own = lambda name, share, files, words, command=run, **rest: Kind(
        name, share, files, words, command, ["model", "prompts.jsonl", "run.toml", "runs/tiny"], is_own=True, result=of_run("tiny"), **rest)
    def without_report(folder):
        for path in [*(folder / "runs/tiny").glob("report*"), folder / "runs/tiny/_manifest.json"]:
            path.unlink()
    def without_students(folder):
        without_report(folder)
        shutil.rmtree(folder / "runs/tiny/students")
    stopped, served = base.folder / "runs/stopped", base.folder / "runs/served"
    parquet = [str(path) for path in sorted((ROOT / "tests/parsers/corpus/parquet_rows").glob("*")) if path.name not in ("dictionary", "gzip")]
    for path in parquet:
        shutil.copy(path, base.folder / (pathlib.Path(path).name + ".parquet"))
    parquet = [pathlib.Path(path).name + ".parquet" for path in parquet]
    found = [
        model("config.json", 12, "config.json", "json"),
        model("safetensors", 8, "model.safetensors", "bytes"),
        model("tokenizer.json", 10, "tokenizer.json", "json"),
        model("tokenizer_config.json", 4, "tokenizer_config.json", "json"),
        model("generation_config.json", 3, "generation_config.json", "json"),
        model("chat template, check", 8, "chat_template.jinja", "jinja"),
        model("chat template, render", 4, "chat_template.jinja", "jinja", ["render", "run.toml"]),
        Kind("run file", 12, ["run.toml"], "toml", check, MODEL),
        Kind("GGUF", 10, ["model.gguf"], "bytes", ["check", "gguf.toml"], ["model", "model.gguf", "prompts.jsonl", "gguf.toml"]),
        data("JSONL rows", 6, "prompts.jsonl", "json", '{ text = "text" }', ["import", "run.toml"]),
        data("JSONL messages", 6, "chats.jsonl", "json", '{ messages = "messages" }', ["import", "run.toml"]),
        data("JSON rows", 5, "rows.json", "json", question, ["import", "run.toml"]),
        data("CSV rows", 6, "rows.csv", "csv", question, ["import", "run.toml"]),
        data("gzip rows", 4, "rows.jsonl.gz", "bytes", '{ text = "text" }', ["import", "run.toml"]),
        Kind("Parquet rows", 6, parquet, "bytes", ["init", "--data", "FILE", "--teacher", "model"], ["model"]),
        Kind("rows, init", 4, ["chats.jsonl"], "json", ["init", "--data", "FILE", "--teacher", "model"], ["model"]),
        own("tables, training", 10, listed("*/*.parquet"), "bytes", prepare=without_students),
        own("tables, report", 6, listed("students/**/*.parquet"), "bytes", prepare=without_report),
        own("manifests", 10, listed("**/*_manifest.json"), "json"),
        own("exports", 6, [path for path in listed("students/*/export/**/*") if "manifest" not in path], "bytes", prepare=without_report),
        own("ledger and other JSON", 5, listed("*.jsonl") + [path for path in listed("*.json") if "manifest" not in path and "report" not in path],
            "json", prepare=without_report),
        Kind("journal and request log", 12, [path for path in listed("*.jsonl", served) + listed(".work/**/*", served) if "lock" not in path],
             "bytes", ["collect", "served.toml", "--retry-failures"], ["model", "prompts.jsonl", "served.toml", "runs/served"], is_own=True,
             result=of_run("served")),
        Kind("training checkpoints", 8, [path for path in listed("**/checkpoints/step-*/*", stopped)], "bytes", ["train", "stopped.toml"],
             ["model", "prompts.jsonl", "stopped.toml", "runs/stopped"], is_own=True, result=of_run("stopped")),
    ]
    return [kind for kind in found if kind.files]


# Replies of a server.

COMPLETION = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [{
    "index": 0, "message": {"role": "assistant", "content": "Hi you"}, "finish_reason": "stop",
    "logprobs": {"content": [{"token": text, "bytes": list(text.encode()), "logprob": -0.5, "top_logprobs": [
        {"token": text, "bytes": list(text.encode()), "logprob": -0.5}, {"token": "x", "bytes": [120], "logprob": -2.5}]}
        for text in ["Hi", " you"]]}}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}}


def chunks():
    parts = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
             {"choices": [{"index": 0, "delta": {"content": "Hi"}}]},
             {"choices": [{"index": 0, "delta": {"content": " you"}, "finish_reason": "stop"}]},
             {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}]
    return "".join(f"data: {json.dumps(part)}\n\n" for part in parts) + "data: [DONE]\n\n"


REPLIES = [
    (False, "application/json", 200, json.dumps(COMPLETION).encode()),
    (True, "text/event-stream", 200, chunks().encode()),
    (False, "application/json", 400, b'{"error": {"message": "bad", "type": "invalid_request_error", "code": null}}'),
    (False, "application/json", 429, b'{"error": {"message": "Rate limit reached", "type": "requests"}}'),
    (False, "application/json", 200, json.dumps({"error": {"message": "overloaded", "code": 503}}).encode()),
]


def serve(reply_to):
    """Starts a server that answers each request with what `reply_to` makes of its body: status, content type and body."""
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self, status, content_type, body):
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            if status == 429:
                self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.reply(200, "application/json", b'{"object": "list", "data": [{"id": "m", "object": "model"}]}')

        def do_POST(self):
            self.reply(*reply_to(self.rfile.read(int(self.headers.get("Content-Length", 0)))))

        def log_message(self, *_):
            pass

        def handle_one_request(self):
            try:
                super().handle_one_request()
            except OSError:
                self.close_connection = True

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


# Cases.

def copy(base, name, folder):
    source, target = base.folder / name, folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copy(source, target)


def prepare(base, kind, folder, file):
    for name in dict.fromkeys([*kind.copies, *([] if file.startswith("runs/") else [file])]):
        if (base.folder / name).exists():
            copy(base, name, folder)
    if kind.prepare:
        kind.prepare(folder)


def command_of(kind, file):
    return [file if part == "FILE" else part for part in kind.command]


def classify(kind, outcome, same, names):
    text = outcome.message + outcome.output
    if outcome.seconds > SECONDS:
        return "FAILED", f"took {outcome.seconds:.0f} s"
    if outcome.peak > MEMORY:
        return "FAILED", f"took {outcome.peak >> 20} MB"
    if outcome.code < 0:
        return "FAILED", f"signal {-outcome.code}"
    if outcome.code not in (0, 1, 2) or "panicked at" in text:
        return "FAILED", f"exit code {outcome.code}"
    if "\x1b" in text.replace("\x1b[2K", ""):
        return "FAILED", "an escape sequence in the output"
    if outcome.code == 0:
        if same():
            return "equal", ""
        return ("FAILED", "another result") if kind.is_own else ("other", "")
    if not any(name in text for name in names):
        return "FAILED", "the message does not name the file"
    return "refused", ""


def expected(base, kind, file, cache, lock):
    """The result of the unchanged input."""
    key = (kind.name, file if not kind.is_own else "")
    with lock:
        if key not in cache:
            folder = base.root / f"expected-{len(cache)}"
            folder.mkdir()
            prepare(base, kind, folder, file)
            outcome = execute(base.binary, command_of(kind, file), folder)
            if outcome.code != 0:
                sys.exit(f"{kind.name}: potstill {' '.join(command_of(kind, file))} failed on unchanged inputs:\n{outcome.message}")
            cache[key] = (kind.result or of_output)(folder, outcome)
            shutil.rmtree(folder)
        return cache[key]


def run_case(base, kind, number, seed, cache, lock):
    rng = random.Random(f"{seed} {kind.name} {number}")
    file = kind.files[number % len(kind.files)]
    wanted = expected(base, kind, file, cache, lock)
    folder = base.root / f"case-{kind.name.replace(' ', '_').replace(',', '')}-{number}"
    folder.mkdir()
    prepare(base, kind, folder, file)
    path = folder / file
    if not path.exists():
        shutil.rmtree(folder)
        return None
    path.chmod(0o644)
    path.write_bytes(mutated(rng, path.read_bytes(), kind.words))
    outcome = execute(base.binary, command_of(kind, file), folder)
    result = kind.result or of_output
    # A file of a folder is named by itself or, if it is part of a table or a checkpoint, by the folder; a model by its folder.
    names = kind.names or [path.name, str(pathlib.Path(file).parent / ""), "run.toml"][:3 if kind.name == "run file" else 2]
    names = [name for name in names if name and name != "."]
    label, why = classify(kind, outcome, lambda: result(folder, outcome) == wanted, names)
    return finish(base, kind.name, number, folder, file, label, why, outcome)


def run_reply(base, number, seed):
    rng = random.Random(f"{seed} reply {number}")
    stream, content_type, status, body = REPLIES[number % len(REPLIES)]
    folder = base.root / f"case-reply-{number}"
    folder.mkdir()
    for name in ["model", "prompts.jsonl"]:
        copy(base, name, folder)
    body = mutated(rng, body, "json")
    (folder / "reply").write_bytes(body)
    server = serve(lambda _: (status, content_type, body))
    text = SERVED.replace("PORT", str(server.server_port)).replace("STREAM", str(stream).lower())
    if stream or number % 2:
        text = of_text(text)
    text = text.replace("SIGNALS", "{ top_k = 2 }").replace("LOSS", "")
    (folder / "run.toml").write_text(text)
    outcome = execute(base.binary, ["import", "run.toml"], folder)
    if outcome.code == 0:
        outcome = execute(base.binary, ["collect", "run.toml"], folder)
    server.shutdown()
    server.server_close()
    kind = Kind("replies", 0, [], "json", [], [])
    names = ["127.0.0.1", "repl", "response", "answer", "request", "server"]
    label, why = classify(kind, outcome, lambda: False, names)
    return finish(base, "replies", number, folder, "reply", label, why, outcome)


def finish(base, kind, number, folder, file, label, why, outcome):
    if os.environ.get("POTSTILL_MUTATE_SHOW"):
        print(kind, number, label, why, repr(outcome.message[:300]), flush=True)
    if label == "FAILED":
        print(f"{kind} {number}: {why}: {folder}/{file}\n  {outcome.message.strip()[:400]!r}", flush=True)
    else:
        shutil.rmtree(folder)
    return kind, label, outcome.seconds, outcome.peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=str(ROOT / "target/release/potstill"))
    parser.add_argument("--count", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", help="one kind of input, by the beginning of its name")
    parser.add_argument("--table", help="file to write the table to")
    arguments = parser.parse_args()
    base = Base(str(pathlib.Path(arguments.binary).resolve()))
    found, cache, lock = kinds(base), {}, threading.Lock()
    replies = 12
    total = sum(kind.share for kind in found) + replies
    work = []
    for kind in found:
        cases = -(-kind.share * arguments.count // total)
        work += [lambda kind=kind, n=n: run_case(base, kind, n, arguments.seed, cache, lock) for n in range(cases)
                 if not arguments.only or kind.name.startswith(arguments.only)]
    work += [lambda n=n: run_reply(base, n, arguments.seed) for n in range(-(-replies * arguments.count // total))
             if not arguments.only or "replies".startswith(arguments.only)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = [done for done in pool.map(lambda case: case(), work) if done]
    rows = collections.OrderedDict()
    for kind, label, seconds, peak in results:
        row = rows.setdefault(kind, collections.Counter())
        row[label] += 1
        row["seconds"] = max(row["seconds"], seconds)
        row["peak"] = max(row["peak"], peak)
    labels = ["refused", "equal", "other", "FAILED"]
    lines = ["| input | cases | refused | equal | other | failed | longest, s | most memory, MB |", "|---|--:|--:|--:|--:|--:|--:|--:|"]
    for kind, row in rows.items():
        counts = [row[label] for label in labels]
        lines.append(f"| {kind} | {sum(counts)} | " + " | ".join(map(str, counts)) + f" | {row['seconds']:.1f} | {row['peak'] >> 20} |")
    sums = [sum(row[label] for row in rows.values()) for label in labels]
    longest, most = max(r["seconds"] for r in rows.values()), max(r["peak"] for r in rows.values())
    lines.append(f"| all | {sum(sums)} | " + " | ".join(map(str, sums)) + f" | {longest:.1f} | {most >> 20} |")
    print("\n".join(lines))
    if arguments.table:
        pathlib.Path(arguments.table).write_text("\n".join(lines) + "\n")
    if sums[3]:
        sys.exit(f"{sums[3]} cases failed; their folders are in {base.root}")
    shutil.rmtree(base.root)


if __name__ == "__main__":
    main()
