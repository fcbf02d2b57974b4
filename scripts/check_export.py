#!/usr/bin/env python3
"""Loads an exported student in transformers and compares its greedy tokens with Potstill's.

usage: check_export.py FOLDER PROMPT...     needs torch and transformers; builds the example `generate`
"""
import json
import pathlib
import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 32


def main():
    folder, prompts = sys.argv[1], sys.argv[2:]
    if not prompts:
        sys.exit(__doc__)
    root = pathlib.Path(__file__).resolve().parent.parent
    command = ["cargo", "run", "--release", "--quiet", "--example", "generate", "--", str(pathlib.Path(folder).resolve())]
    out = subprocess.run(command + [str(NEW_TOKENS)] + prompts, cwd=root, check=True, capture_output=True, text=True).stdout
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {k: v for k, v in info.items() if v}
    if wrong:
        sys.exit(f"transformers does not load it cleanly: {wrong}")
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
