#!/usr/bin/env python3
"""Writes losses.json beside it: values by row and gradients at the student's logits, in f64 on the CPU,
of TRL's and Liger's generalised JSD and of torch's own losses, on the same few rows.

usage: losses.py     needs torch, trl and liger-kernel
"""

import json
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction
from trl.experimental.gkd.gkd_trainer import GKDTrainer

ROWS, VOCAB, SUPPORT = 3, 50, 8
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]

torch.manual_seed(5)
# Far apart, peaked, and nearly equal.
teacher = torch.randn(ROWS, VOCAB, dtype=torch.float64) * torch.tensor([[2.0], [6.0], [3.0]])
student = torch.randn(ROWS, VOCAB, dtype=torch.float64) * 3
student[2] = teacher[2] + 1e-3 * student[2]
labels = torch.tensor([3, 17, 41])
log_p = F.log_softmax(teacher, dim=-1)


def kl(a, b):
    """D(a ‖ b) by row; kl_div takes its second argument first."""
    return F.kl_div(b, a, reduction="none", log_target=True).sum(-1)


def mixture(weight, log_a, log_b):
    return (weight * log_a.exp() + (1 - weight) * log_b.exp()).log()


def coarse(logprobs, ids):
    """Log probabilities of the support's tokens and, last, of everything else."""
    inside = torch.zeros_like(logprobs, dtype=torch.bool).scatter(-1, ids, True)
    tail = logprobs.masked_fill(inside, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logprobs.gather(-1, ids), tail], -1)


def numbers(tensor):
    return json.loads(json.dumps([float(f"{x:.15g}") for x in tensor.detach().flatten().tolist()]))


def measured(loss):
    """`loss` maps the student's logits to a value by row, or to one number."""
    logits = student.clone().requires_grad_()
    values = loss(logits)
    values.sum().backward()
    return {"values": numbers(values), "gradient": numbers(logits.grad)}


def trl(beta):
    return lambda z: GKDTrainer.generalized_jsd_loss(z, teacher, beta=beta, reduction="none").sum(-1)


def liger(beta):
    return lambda z: LigerFusedLinearJSDFunction.distillation_loss_fn(z, teacher, beta=beta)


support = teacher.topk(SUPPORT).indices
log_q = lambda z: F.log_softmax(z, dim=-1)
golden = {
    "versions": {name: version(name) for name in ["torch", "trl", "liger-kernel"]},
    "rows": ROWS,
    "vocab": VOCAB,
    "teacher": numbers(teacher),
    "student": numbers(student),
    "labels": labels.tolist(),
    "support": support.tolist(),
    "trl_jsd": [{"beta": beta, **measured(trl(beta))} for beta in BETAS],
    "liger_jsd": [{"beta": beta, **measured(liger(beta))} for beta in BETAS],
    "forward_kl": measured(lambda z: kl(log_p, log_q(z))),
    "reverse_kl": measured(lambda z: kl(log_q(z), log_p)),
    "skew_kl_0.1": measured(lambda z: kl(log_p, mixture(0.1, log_p, log_q(z)))),
    "skew_reverse_kl_0.1": measured(lambda z: kl(log_q(z), mixture(0.9, log_p, log_q(z)))),
    "total_variation": measured(lambda z: 0.5 * F.l1_loss(log_q(z).exp(), log_p.exp(), reduction="none").sum(-1)),
    "cross_entropy_0.1": measured(lambda z: F.cross_entropy(z, labels, reduction="none", label_smoothing=0.1)),
    "bucket_forward_kl": measured(lambda z: kl(coarse(log_p, support), coarse(log_q(z), support))),
    "bucket_reverse_kl": measured(lambda z: kl(coarse(log_q(z), support), coarse(log_p, support))),
    "renormalize_forward_kl": measured(
        lambda z: kl(F.log_softmax(teacher.gather(-1, support), -1), F.log_softmax(z.gather(-1, support), -1))
    ),
}
# One list a line.
text = json.dumps(golden)
text = text.replace('], "', '],\n"').replace(', {"beta"', ',\n{"beta"')
Path(__file__).with_name("losses.json").write_text(text + "\n")
