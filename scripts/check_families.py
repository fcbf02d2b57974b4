#!/usr/bin/env python3
"""Saves checkpoints with Potstill and loads them with transformers.

usage: check_families.py CONVERT FOLDER...

CONVERT is the built example (target/release/examples/convert); each FOLDER holds a checkpoint. Potstill loads it and
saves it in f32, transformers loads both. Every parameter must be equal bit for bit, the two configurations must agree in
every key that transformers knows except for the stored type, and the logits of 100 tokens must be equal. 8-bit
checkpoints (which transformers cannot load on a CPU) are compared by name and shape only, with the logits beside them in
expected.safetensors. Prints one line per folder and exits with 1 at the first difference.
Needs: pip install torch transformers safetensors
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import torch
import transformers
from safetensors.torch import load_file

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
UNCOMPARED = {"dtype", "torch_dtype", "transformers_version", "_name_or_path", "num_nextn_predict_layers", "quantization_config"}


def load(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return model.eval()


def configuration(model):
    return {key: value for key, value in model.config.to_dict().items() if key not in UNCOMPARED}


def logits(model):
    vocabulary = model.config.vocab_size
    ids = torch.randint(3, vocabulary, (100,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(ids[None]).logits[0]


def check(convert, folder):
    with tempfile.TemporaryDirectory() as saved:
        subprocess.run([convert, str(folder), saved, "f32"], check=True, stdout=subprocess.DEVNULL)
        after = load(saved)
        expected = folder / "expected.safetensors"
        if expected.exists():
            values = load_file(expected)
            with torch.no_grad():
                found = after(values["ids"][None].long()).logits[0]
            difference = (found - values["logits"]).abs().max().item()
            assert difference < 1e-4, f"{folder}: logits differ by {difference}"
        if "quantization_config" in json.loads((folder / "config.json").read_text()):
            return "logits as expected"
        before = load(folder)
        assert configuration(before) == configuration(after), f"{folder}: the configurations differ"
        ours, theirs = after.state_dict(), before.state_dict()
        assert ours.keys() == theirs.keys(), f"{folder}: {ours.keys() ^ theirs.keys()}"
        for name, tensor in theirs.items():
            assert torch.equal(tensor, ours[name]), f"{folder}: {name} differs"
        assert torch.equal(logits(before), logits(after)), f"{folder}: the logits differ"
        return f"{len(theirs)} tensors, configuration and logits equal"


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    for folder in map(pathlib.Path, sys.argv[2:]):
        print(f"{folder.name}: {check(sys.argv[1], folder)}", flush=True)


if __name__ == "__main__":
    main()
