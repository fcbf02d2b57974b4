#!/usr/bin/env python3
"""Writes curves/: a small random model, a random adapter, and twenty steps of training by PyTorch, transformers and PEFT.

usage: python student/tests/golden/curves.py        needs torch 2.9 or later, transformers and peft

`curves/start` is the model before training and `curves/adapter` the adapter. `curves/curves.json` has the batch that
every step learns from, as rows of `signals/`, the settings, and for each training the loss and the norm of the gradient
before clipping at each step:

- `f32`: AdamW, everything in f32; `f64` the same in f64, which shows how much of a difference is rounding;
- `bf16`: the same under `torch.autocast` with bfloat16, with f32 weights; `band` is the largest relative difference of its
  losses from those of `f32`. It differs by a factor of four from batch to batch, so `curves/bf16.json` has it for more
  batches, with the losses in f32;
- `lora`: PEFT's adapter on all linear layers, trained alone;
- `rslora`: the same with α / √r, rank and α of some layers by pattern, on `q_proj`, `v_proj` and `down_proj`;
- `muon`: Muon (torch.optim.Muon, with its products in f32) on the linear layers, AdamW on the rest;
- `wsd`, `linear`, `constant`: AdamW with other schedules.
"""
import contextlib
import json
import math
import pathlib

import peft
import torch
import torch.nn.functional as F
from torch.optim import _muon
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, TOP_K, SEQUENCES, STEPS = 61, 5, 8, 20
RATE, MIN_RATE, WARMUP, DECAY_STEPS, WEIGHT_DECAY, CLIP = 4e-3, 4e-4, 3, 6, 0.1, 1.0
HERE = pathlib.Path(__file__).resolve().parent / "curves"


def model(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def start(dtype=torch.float32):
    return LlamaForCausalLM.from_pretrained(HERE / "start", dtype=torch.float32).to(dtype)


def sequences(teacher, seed=4):
    """Random texts of 9 to 30 tokens, each with a prompt, and the teacher's distribution at each loss position."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(SEQUENCES):
        length = torch.randint(9, 31, (), generator=generator).item()
        ids = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        first = torch.randint(2, length - 4, (), generator=generator).item()
        with torch.no_grad():
            log_p = F.log_softmax(teacher(torch.tensor([ids])).logits[0].double(), -1)
        rows = []
        for t in range(first, length):
            p = log_p[t - 1]
            kept = torch.argsort(p, descending=True, stable=True)[:TOP_K].tolist()
            kept = sorted({*kept, ids[t]}, key=lambda i: -p[i])
            rest = [i for i in range(VOCAB) if i not in kept]
            rows.append({
                "ids": kept,
                "logprobs": p[kept].float().tolist(),
                "tail_logprob": torch.logsumexp(p[rest], 0).item(),
                "entropy": torch.distributions.Categorical(logits=p).entropy().item(),
            })
        out.append({"token_ids": ids, "loss_mask": [t >= first for t in range(length)], "rows": rows})
    return out


def loss_of(network, batch, context):
    """Mean forward KL over the loss positions, on the support and one bucket for the rest."""
    total, rows = 0.0, 0
    for sequence in batch:
        with context():
            logits = network(torch.tensor([sequence["token_ids"]])).logits[0]
        log_q = F.log_softmax(logits.float() if logits.dtype != torch.float64 else logits, -1)
        positions = [t for t, loss in enumerate(sequence["loss_mask"]) if loss]
        for t, row in zip(positions, sequence["rows"]):
            log_p = torch.tensor(row["logprobs"], dtype=torch.float64)
            tail = torch.tensor([row["tail_logprob"]], dtype=torch.float32).double()
            p = F.log_softmax(torch.cat([log_p, tail]), -1).to(log_q.dtype)
            rest = torch.ones(VOCAB, dtype=torch.bool)
            rest[row["ids"]] = False
            q = torch.cat([log_q[t - 1][row["ids"]], torch.logsumexp(log_q[t - 1][rest], 0)[None]])
            total = total + F.kl_div(q, p, log_target=True, reduction="sum")
            rows += 1
    return total / rows


def rate(step, shape):
    """Learning rate of a step, counted from 1."""
    if step <= WARMUP:
        return RATE * step / WARMUP
    progress = (step - WARMUP) / (STEPS - WARMUP)
    match shape:
        case "cosine":
            return MIN_RATE + (RATE - MIN_RATE) * 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return RATE + (MIN_RATE - RATE) * progress
        case "constant":
            return RATE
        case "wsd":
            into = max(0, step - (STEPS - DECAY_STEPS)) / DECAY_STEPS
            return RATE + (MIN_RATE - RATE) * into


def adamw(named):
    """AdamW with decay on the linear layers' weights and on adapters, as potstill's default."""
    decays = lambda name: "proj" in name
    groups = [
        {"params": [p for n, p in named if decays(n)], "weight_decay": WEIGHT_DECAY},
        {"params": [p for n, p in named if not decays(n)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=RATE, betas=(0.9, 0.999), eps=1e-8)


def newton_schulz_f32(grad, coefficients, steps, eps):
    """torch.optim.Muon's iteration without its rounding to bfloat16."""
    a, b, c = coefficients
    x = grad.T if grad.size(0) > grad.size(1) else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if grad.size(0) > grad.size(1) else x


def muon(named):
    matrices = [p for n, p in named if "proj" in n]
    rest = [p for n, p in named if "proj" not in n]
    return [
        torch.optim.Muon(matrices, lr=RATE, weight_decay=WEIGHT_DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0),
    ]


def train(network, batch, optimizers=None, shape="cosine", context=contextlib.nullcontext):
    named = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
    optimizers = optimizers(named) if optimizers else [adamw(named)]
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        loss = loss_of(network, batch, context)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_([p for _, p in named], CLIP).item())
        losses.append(loss.item())
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate(step, shape)
            optimizer.step()
            optimizer.zero_grad()
    return {"losses": losses, "gradient_norms": norms}


def with_adapter(folder, **options):
    """A new adapter in which B is random too, so that all gradients are above zero from the first step."""
    torch.manual_seed(7)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
    network = peft.get_peft_model(start(), config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.3)
    network.peft_config["default"].base_model_name_or_path = "start"
    network.save_pretrained(folder)
    (folder / "README.md").unlink()
    return network


def apart(a, b):
    """The largest relative difference of two curves' losses."""
    return max(abs(x - y) / y for x, y in zip(a["losses"], b["losses"]))


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def bands():
    """Curves in f32, and what autocast changes, for more batches."""
    out = []
    for seed in range(10, 16):
        batch = sequences(model(seed), seed)
        f32 = train(start(), batch)
        out.append({"batch": batch, "losses": f32["losses"], "band": apart(train(start(), batch, context=autocast), f32)})
        print("band of batch", seed, out[-1]["band"])
    (HERE / "bf16.json").write_text(json.dumps(out) + "\n")


def main():
    network = model(1)
    network.save_pretrained(HERE / "start")
    (HERE / "start" / "generation_config.json").unlink()
    batch = sequences(model(2))
    curves = {
        "f32": train(start(), batch),
        "f64": train(start(torch.float64), batch),
        "bf16": train(start(), batch, context=autocast),
    }
    for shape in ["linear", "constant", "wsd"]:
        curves[shape] = train(start(), batch, shape=shape)
    curves["lora"] = train(with_adapter(HERE / "adapter", r=4, lora_alpha=8, target_modules="all-linear"), batch)
    pattern = {"rank_pattern": {"down_proj": 6}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}}
    curves["rslora"] = train(
        with_adapter(HERE / "rslora", r=3, lora_alpha=5, use_rslora=True,
                     target_modules=["q_proj", "v_proj", "down_proj"], **pattern), batch)
    rounded = train(start(), batch, optimizers=muon)
    _muon._zeropower_via_newtonschulz = newton_schulz_f32
    curves["muon"] = train(start(), batch, optimizers=muon)
    out = {
        "settings": {"vocab": VOCAB, "steps": STEPS, "rate": RATE, "min_rate": MIN_RATE, "warmup": WARMUP,
                     "decay": DECAY_STEPS, "weight_decay": WEIGHT_DECAY, "clip": CLIP},
        "batch": batch,
        "curves": curves,
        "band": apart(curves["bf16"], curves["f32"]),
        "muon_rounded": apart(rounded, curves["muon"]),
    }
    (HERE / "curves.json").write_text(json.dumps(out, indent=1) + "\n")
    for name, curve in curves.items():
        print(name, [round(loss, 5) for loss in curve["losses"][::4] + curve["losses"][-1:]])
    print("f32 and f64 differ by", apart(curves["f32"], curves["f64"]))
    print("bf16 and f32 differ by", out["band"], "; muon's rounding to bf16 makes", out["muon_rounded"])


if __name__ == "__main__":
    main()
    bands()
