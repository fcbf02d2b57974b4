#!/usr/bin/env python3
"""Loads an exported student in transformers and compares its greedy tokens with Potstill's.

usage: check_export.py GENERATE FOLDER PROMPT...     needs torch and transformers

GENERATE is the binary of the example program: target/release/examples/generate after `cargo build --release --examples`.
"""
import json
import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 32


def main():
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    generate, folder, *prompts = sys.argv[1:]
    command = [generate, folder, str(NEW_TOKENS), *prompts]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {k: v for k, v in info.items() if v}
    if wrong:
        sys.exit(f"transformers reports problems with the folder: {wrong}")
    model.eval()
    differ = 0
    for line in map(json.loads, out.splitlines()):
        ids = tokenizer(line["prompt"], return_tensors="pt").input_ids
        assert ids[0].tolist() == line["prompt_ids"], (line["prompt"], ids[0].tolist(), line["prompt_ids"])
        with torch.no_grad():
            whole = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1]:].tolist()
        same = whole == line["ids"]
        differ += not same
        print(f"{'same' if same else 'DIFFERENT'}: {len(whole)} tokens after {line['prompt']!r}: {tokenizer.decode(whole)!r}")
        if not same:
            print(f"  transformers {whole}\n  potstill     {line['ids']}")
    sys.exit(1 if differ else 0)


main()
