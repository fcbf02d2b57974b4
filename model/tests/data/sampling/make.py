"""Writes golden.json: what transformers' logits warpers leave of fixed logits, in the order in which
`generate` applies them (repetition penalty, temperature, top_k, top_p, min_p).

usage: python make.py > golden.json. Needs: pip install torch transformers
"""

import json
import math

import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

LOGITS = [
    [0.5, 1.5, -0.3, 0.0, 2.25, -2.0, 1.0, -0.75],
    [round(3 * math.sin(7 * i), 4) for i in range(40)],
]
# Equal logits at the edge of top-k = 3: all of them stay. (Which of equal ones top-p keeps is arbitrary.)
EQUAL = [1.0, 0.25, 1.0, 2.0, 1.0, -1.0]
# temperature, top_k, top_p, min_p
SETTINGS = [
    (1.0, None, 1.0, 0.0),
    (0.7, None, 0.8, 0.0),
    (1.0, 3, 1.0, 0.0),
    (1.3, 1, 1.0, 0.0),
    (1.0, 100, 1.0, 0.0),
    (1.0, None, 1.0, 0.2),
    (0.5, None, 1.0, 0.2),
    (2.0, None, 1.0, 1.0),
    (0.8, 4, 0.7, 0.0),
    (1.5, 5, 0.95, 0.3),
    (1.0, 5, 0.97, 0.15),
]
# Of the first two rows of logits: ids seen so far (one of them twice), penalty, and settings as above.
PENALTIES = [
    ([4, 2, 4, 5], 1.3, (1.0, None, 1.0, 0.0)),
    ([0, 1, 6], 0.8, (1.0, None, 1.0, 0.0)),
    ([4, 1], 2.0, (0.7, 3, 1.0, 0.0)),
    ([4, 3, 7], 1.5, (1.2, None, 0.8, 0.05)),
]


def probabilities(logits, temperature, top_k, top_p, min_p, seen=(), penalty=1.0):
    scores = torch.tensor([logits])
    warpers = [TemperatureLogitsWarper(temperature)]
    if penalty != 1.0:
        warpers.insert(0, RepetitionPenaltyLogitsProcessor(penalty))
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p > 0.0:
        warpers.append(MinPLogitsWarper(min_p))
    for warper in warpers:
        scores = warper(torch.tensor([list(seen)], dtype=torch.long), scores)
    return torch.softmax(scores.double(), dim=-1)[0].tolist()


cases = []
for logits in LOGITS + [EQUAL]:
    for temperature, top_k, top_p, min_p in SETTINGS:
        if logits is EQUAL and top_p < 1.0:
            continue
        case = {"logits": logits, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        case["probabilities"] = probabilities(logits, temperature, top_k, top_p, min_p)
        cases.append(json.dumps(case))
for logits in LOGITS:
    for seen, penalty, (temperature, top_k, top_p, min_p) in PENALTIES:
        case = {"logits": logits, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        case |= {"seen": seen, "repetition_penalty": penalty}
        case["probabilities"] = probabilities(logits, temperature, top_k, top_p, min_p, seen, penalty)
        cases.append(json.dumps(case))
print("[\n" + ",\n".join(cases) + "\n]")
