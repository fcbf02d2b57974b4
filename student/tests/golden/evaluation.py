#!/usr/bin/env python3
"""Writes evaluation/: two small random models and what PyTorch and transformers measure of them.

usage: python student/tests/golden/evaluation.py        needs torch, transformers and numpy

`evaluation/student` and `evaluation/teacher` are the models. `evaluation/golden.json` has five texts with the teacher's
distributions as the table `signals/` stores them, the figures of each text, and the figures over all tokens. Everything
is computed in f64 from whole distributions by PyTorch's own functions where it has one.
"""
import json
import math
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, TOP_K = 23, 4
# Length of each text and the positions that carry loss. The last text has two answers. 40 loss positions in all.
TEXTS = [(9, range(4, 9)), (21, range(3, 21)), (6, range(5, 6)), (14, range(8, 14)), (18, [*range(2, 6), *range(12, 18)])]


def model(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, max_position_embeddings=32, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, initializer_range=0.6,
    )
    return LlamaForCausalLM(config).eval()


def log_probs(network, ids):
    with torch.no_grad():
        return F.log_softmax(network.double()(torch.tensor([ids])).logits[0], -1)


def stored(log_p, target):
    """The k likeliest tokens and the target token, the likeliest first, and the rest as one mass."""
    order = torch.argsort(log_p, descending=True, stable=True).tolist()
    ids = [i for at, i in enumerate(order) if at < TOP_K or i == target]
    rest = [i for i in order if i not in ids]
    return {
        "ids": ids,
        "logprobs": log_p[ids].float().tolist(),
        "tail_logprob": torch.logsumexp(log_p[rest], 0).item(),
        "entropy": torch.distributions.Categorical(logits=log_p).entropy().item(),
    }


def text(student, teacher, ids, positions):
    log_q, log_p = log_probs(student, ids), log_probs(teacher, ids)
    out = {"token_ids": ids, "loss_mask": [t in positions for t in range(len(ids))], "rows": [],
           "kl": 0.0, "nll": 0.0, "agree": 0, "teacher_nll": 0.0, "teacher_entropy": 0.0, "reverse_kl": 0.0,
           "confidence": [], "expected": []}
    for t in positions:
        # The distribution of token t is at position t - 1.
        q, p, target = log_q[t - 1], log_p[t - 1], ids[t]
        row = stored(p, target)
        rest = [i for i in range(VOCAB) if i not in row["ids"]]
        coarse = lambda log: torch.cat([log[row["ids"]], torch.logsumexp(log[rest], 0)[None]])
        out["rows"].append(row)
        out["kl"] += F.kl_div(coarse(q), coarse(p), log_target=True, reduction="sum").item()
        out["reverse_kl"] += F.kl_div(p, q, log_target=True, reduction="sum").item()
        out["nll"] += F.nll_loss(q[None], torch.tensor([target])).item()
        out["teacher_nll"] += F.nll_loss(p[None], torch.tensor([target])).item()
        out["teacher_entropy"] += row["entropy"]
        out["agree"] += int(q.argmax() == p.argmax())
        out["confidence"].append(q[p.argmax()].exp().item())
        out["expected"].append(p.max().exp().item())
    return out


def calibration_error(q, p):
    """Expected calibration error with ten bins of equally many tokens."""
    order = np.argsort(q)
    bins = np.split(order, 10)
    return float(sum(len(b) / len(q) * abs(p[b].mean() - q[b].mean()) for b in bins))


def main():
    here = pathlib.Path(__file__).resolve().parent / "evaluation"
    student, teacher = model(1), model(2)
    for name, network in [("student", student), ("teacher", teacher)]:
        network.save_pretrained(here / name)
        (here / name / "generation_config.json").unlink()
    # The rest is computed with the weights as they are stored.
    generator = torch.Generator().manual_seed(3)
    texts = []
    for length, positions in TEXTS:
        ids = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        # The teacher's own choice at every third position, so that some answers are likely ones.
        for t in list(positions)[::3]:
            ids[t] = log_probs(teacher, ids)[t - 1].argmax().item()
        texts.append(text(student, teacher, ids, list(positions)))
    tokens = sum(len(t["rows"]) for t in texts)
    mean = lambda key: sum(t[key] for t in texts) / tokens
    q, p = (np.array([x for t in texts for x in t[key]]) for key in ["confidence", "expected"])
    means = {key: mean(key) for key in ["kl", "nll", "agree", "teacher_nll", "teacher_entropy", "reverse_kl"]}
    means |= {"distance": float(np.abs(q - p).mean()), "calibration_error": calibration_error(q, p)}
    assert math.isclose(means["distance"], F.l1_loss(torch.tensor(q), torch.tensor(p)).item())
    golden = {"vocab": VOCAB, "texts": texts, "tokens": tokens, "means": means}
    (here / "golden.json").write_text(json.dumps(golden, indent=1) + "\n")
    print(json.dumps(means, indent=1))


main()
