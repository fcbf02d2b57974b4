#!/usr/bin/env python3
"""Compares GGUF files that Potstill writes with transformers and with llama.cpp's own quantiser.

usage: check_gguf.py LLAMA_BIN GGUF FOLDER [TEXT]     needs torch, transformers, tokenizers and gguf

LLAMA_BIN is the folder with llama-server, llama-quantize, llama-tokenize and llama-perplexity; GGUF is the binary of the
example program, target/release/examples/gguf after `cargo build --release --examples`; FOLDER is a checkpoint in Hugging
Face layout. A folder without tokenizer.json gets a byte-level tokenizer of its vocabulary's size.

1. f16: llama-server gives the same greedy tokens as transformers on the weights rounded to f16, for prompts of ids. It
   rounds activations to f16 in products, so a token whose logit is within 0.01 of the largest counts as the same.
2. llama-server gives the same ids as tokenizer.json for the lines of TEXT.
3. q8_0, q4_0 and q4_k_m: every tensor equals llama-quantize's in type and bytes, from our bf16 file (checkpoints in bf16).
4. With TEXT, llama-perplexity: KL between f16 and each type, and of llama-quantize's q8_0 and q4_k_m, which ours may not
   exceed. q8_0-f32 is the q8_0 file expanded to F32: llama.cpp computes with q8_0 itself in integers, whose error is larger
   than that of the file.

Exits with 1 at the first difference.
"""
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request

import torch
import transformers
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM

PORT = 8137
NEW_TOKENS = 32
PROMPTS = 6
KL_CHUNKS = 8
TIE = 0.01


def main():
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    binaries, program, folder = (pathlib.Path(path).resolve() for path in sys.argv[1:4])
    text = pathlib.Path(sys.argv[4]) if len(sys.argv) == 5 else None
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=".") as out:
        out = pathlib.Path(out)
        folder = with_tokenizer(folder, out)
        for kind in ("f16", "bf16", "q8_0", "q4_0", "q4_k_m"):
            subprocess.run([program, "export", folder, out / f"{kind}.gguf", kind], check=True)
        check_greedy(binaries, folder, out, text)
        is_bf16 = all(t.dtype == torch.bfloat16 for t in load(folder, "auto").state_dict().values())
        if is_bf16:
            for kind in ("q8_0", "q4_0", "q4_k_m"):
                check_quantized(binaries, out, kind)
        if text:
            check_divergence(binaries, out, text, is_bf16)


def load(folder, dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


def with_tokenizer(folder, out):
    """Copies a folder without tokenizer.json and trains a byte-level one on this file."""
    if (folder / "tokenizer.json").exists():
        return folder
    # llama.cpp looks for certain tokens in models that are called phi3.
    copy = out / "folder"
    shutil.copytree(folder, copy)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([pathlib.Path(__file__).read_text()], trainer)
    tokenizer.save(str(copy / "tokenizer.json"))
    return copy


class Server:
    """llama-server with a file."""

    def __init__(self, binaries, model, log):
        command = [binaries / "llama-server", "-m", model, "--host", "127.0.0.1", "--port", str(PORT), "-c", str(context_of(model)[0]),
                   "-t", "2", "-np", "1", "-fa", "off", "-ctk", "f32", "-ctv", "f32"]
        self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def __enter__(self):
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health") as reply:
                    if reply.status == 200:
                        return self
            except OSError:
                pass
            if self.process.poll() is not None:
                sys.exit("llama-server ended: see the last lines of its log")
            time.sleep(0.2)
        sys.exit("llama-server does not answer")

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()

    def post(self, path, body):
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)


def check_greedy(binaries, folder, out, text):
    """Compares greedy tokens after prompts of ids, and the ids of texts."""
    model = load(folder, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # Vectors stay in F32.
            if parameter.dim() > 1:
                parameter.copy_(parameter.half().float())
    size = model.config.get_text_config().vocab_size
    context, length = context_of(out / "f16.gguf")
    new_tokens = min(NEW_TOKENS, context // 2 - 1)
    generator = torch.Generator().manual_seed(19)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    lines = [line for line in text.read_text().splitlines() if line.strip()] if text else []
    prompts = [tokenizer.encode(line).ids[:length] for line in lines[:PROMPTS]]
    prompts = prompts or [torch.randint(3, size, (length,), generator=generator).tolist() for _ in range(PROMPTS)]
    with open(out / "server.log", "w") as log, Server(binaries, out / "f16.gguf", log) as server:
        same = 0
        for prompt in prompts:
            body = {"prompt": prompt, "n_predict": new_tokens, "temperature": 0, "return_tokens": True,
                    "ignore_eos": False, "cache_prompt": False, "repeat_penalty": 1.0}
            found = server.post("/completion", body)["tokens"]
            same += compare(model, prompt, found)
        print(f"{folder.name}: {same} of {len(prompts)} greedy continuations are those of transformers")
        if same < len(prompts):
            sys.exit(1)
        differ = 0
        for line in lines[:500]:
            body = {"content": line, "add_special": True, "parse_special": True}
            differ += server.post("/tokenize", body)["tokens"] != tokenizer.encode(line).ids
        print(f"{folder.name}: {differ} of {len(lines[:500])} texts have other ids")
        if differ:
            sys.exit(1)


def context_of(path):
    """The context, and the length of a prompt. The context of a file ends with the window if llama.cpp does not have the
    family's window. LongRoPE has other divisors behind the original context, and llama.cpp's contexts are not below 256."""
    fields = GGUFReader(path).fields
    architecture = fields["general.architecture"].contents()
    context = min(512, fields[f"{architecture}.context_length"].contents())
    original = fields.get(f"{architecture}.rope.scaling.original_context_length")
    if original and original.contents() < min(256, context):
        return context, original.contents() + 10
    return context, min(20, context // 2)


def compare(model, prompt, found):
    """Whether each token is the most likely one after those before it. Each other token is printed."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + found])).logits[0, len(prompt) - 1:-1]
    for position, (row, token) in enumerate(zip(logits, found)):
        margin = (row.max() - row[token]).item()
        if margin > 0:
            print(f"  token {position} is {token}, transformers has {row.argmax().item()} by {margin:.5f}")
        if margin > TIE:
            return False
    return True


def tensors(path):
    return {t.name: (t.tensor_type.name, bytes(t.data.tobytes())) for t in GGUFReader(path).tensors}


def check_quantized(binaries, out, kind):
    """Compares each tensor with that of llama-quantize."""
    name = {"q4_k_m": "Q4_K_M", "q4_0": "Q4_0", "q8_0": "Q8_0"}[kind]
    theirs = out / f"llama-{kind}.gguf"
    with open(out / "quantize.log", "w") as log:
        command = [binaries / "llama-quantize", out / "bf16.gguf", theirs, name, "2"]
        subprocess.run(command, check=True, stdout=log, stderr=log)
    ours, theirs = tensors(out / f"{kind}.gguf"), tensors(theirs)
    wrong = [name for name in theirs if ours.get(name) != theirs[name]]
    types = sorted({kind for kind, _ in ours.values()})
    print(f"{kind}: {len(theirs) - len(wrong)} of {len(theirs)} tensors equal llama-quantize's ({', '.join(types)})")
    if wrong or len(ours) != len(theirs):
        sys.exit(f"these differ: {wrong[:5]}")


def check_divergence(binaries, out, text, is_bf16):
    base = out / "base.kld"
    common = ["-f", text, "-c", "256", "--chunks", str(KL_CHUNKS), "-t", "2", "--kl-divergence-base", base]
    run(binaries, ["-m", out / "f16.gguf", *common])
    with open(out / "quantize.log", "a") as log:
        command = [binaries / "llama-quantize", "--allow-requantize", out / "q8_0.gguf", out / "q8_0-f32.gguf", "F32", "2"]
        subprocess.run(command, check=True, stdout=log, stderr=log)
    files = ["q8_0", "q8_0-f32", "q4_0", "q4_k_m"] + (["llama-q8_0", "llama-q4_k_m"] if is_bf16 else [])
    figures = {}
    for name in files:
        report = run(binaries, ["-m", out / f"{name}.gguf", *common, "--kl-divergence"])
        mean = float(re.search(r"Mean\s+KLD:\s+([-\d.]+)", report)[1])
        top = float(re.search(r"Same top p:\s+([\d.]+)", report)[1])
        figures[name] = (mean, top)
        print(f"{name}: mean KL to f16 {mean:.6f} nats, same first token {top:.2f} %")
    for kind in ("q8_0", "q4_k_m"):
        if is_bf16 and figures[kind][0] > figures[f"llama-{kind}"][0] + 1e-6:
            sys.exit(f"{kind} is farther from f16 than llama-quantize's")


def run(binaries, arguments):
    done = subprocess.run([binaries / "llama-perplexity", *arguments], check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


if __name__ == "__main__":
    main()
