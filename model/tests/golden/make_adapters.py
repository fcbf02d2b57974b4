"""Makes the adapters in this folder with PEFT, with the logits that transformers and PEFT compute with them.

Usage: python make_adapters.py make TINY OUT       (TINY: the folder with the tiny checkpoints, OUT: this folder)
       python make_adapters.py check MODEL ADAPTER LOGITS
The second form loads an adapter with PEFT and compares its logits with those in the safetensors file LOGITS ("ids", "logits").
Needs torch, transformers, peft, safetensors. The adapters were made with peft 0.21.2 and transformers 5.24.0.
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)

CASES = {
    "llama31": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "qwen2": dict(r=3, lora_alpha=6, target_modules="all-linear", use_rslora=True),
    "phi3": dict(r=2, lora_alpha=5, target_modules="all-linear"),
    "gemma3": dict(
        r=2,
        lora_alpha=4,
        target_modules=r".*\.(q_proj|down_proj)",
        rank_pattern={"layers.0.self_attn.q_proj": 5},
        alpha_pattern={"down_proj": 1.5},
    ),
    "dsv2lite": dict(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        rank_pattern={"kv_b_proj": 3},
    ),
}


def model_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def make(tiny, out):
    for name, settings in CASES.items():
        torch.manual_seed(7)
        config = LoraConfig(task_type="CAUSAL_LM", **settings)
        model = get_peft_model(model_of(tiny / name), config).eval()
        for key, tensor in model.named_parameters():
            if "lora_B" in key:
                tensor.data = 0.1 * torch.randn_like(tensor)
        ids = torch.randint(3, 60, (1, 24))
        with torch.no_grad():
            logits = model(ids).logits[0]
        model.save_pretrained(out / name)
        (out / name / "README.md").unlink(missing_ok=True)
        expected = {"ids": ids[0].to(torch.int32), "logits": logits[-4:].contiguous()}
        save_file(expected, out / name / "expected.safetensors")
        print(name, logits.shape, sum(f.stat().st_size for f in (out / name).iterdir()))


def check(base, adapter, logits):
    expected = load_file(logits)
    ids = expected["ids"].long().reshape(1, -1)
    model = model_of(base)
    with torch.no_grad():
        plain = model(ids).logits[0]
        found = PeftModel.from_pretrained(model, adapter).eval()(ids).logits[0]
    rows = expected["logits"].shape[0]
    print("largest difference from PEFT", (found[-rows:] - expected["logits"]).abs().max().item())
    print("largest effect of the adapter", (found - plain).abs().max().item())


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        check(*sys.argv[2:5])
