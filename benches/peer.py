"""The PyTorch side of `potstill bench`: one request on stdin (JSON), one line of results on stdout.

Each part is written as a user of transformers would write it who cares for speed: inference mode,
scaled-dot-product attention, `generate` with its cache, the AdamW that is fastest here. Token ids
and targets come with the request, so both sides do the same work; what a part computed is sent
back for that to be checked.

    python3 peer.py <request.json
"""

import json
import math
import os
import sys
import time

request = json.load(sys.stdin)
# With `python -c` the working directory is searched first; a folder there may be called `datasets`.
if sys.path[:1] == [""]:
    sys.path.pop(0)
# Before torch is imported: its thread pools are made on first use.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(request["threads"])
# Nothing is fetched, and nothing but the result goes to stdout.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
import transformers

transformers.utils.logging.disable_progress_bar()
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
# The mass under which a tail counts as empty, as in Potstill.
TAIL_FLOOR = 2.0**-60


def memory():
    """Resident bytes now, and the most there ever were."""
    if request["device"] != "cpu":
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    try:
        fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    except OSError:
        return None, None
    return tuple(1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM"))


def measured(work):
    """Seconds of each repetition after up to `warm_up` unmeasured ones, and what the first one gave.

    There are up to `repetitions`; after `budget_s` no further one begins, but two are measured unless
    one takes thrice as long."""
    first, seconds, began = None, [], time.perf_counter()

    def one():
        nonlocal first
        result = work()
        if request["device"] != "cpu":
            torch.cuda.synchronize()
        first = result if first is None else first

    for _ in range(request["warm_up"]):
        if time.perf_counter() - began < request["budget_s"]:
            one()
    for _ in range(request["repetitions"]):
        began = time.perf_counter()
        one()
        seconds.append(time.perf_counter() - began)
        spent = sum(seconds)
        long = spent > 3 * request["budget_s"]
        if spent > request["budget_s"] and (len(seconds) >= 2 or long):
            break
    return seconds, first


def load():
    model = transformers.AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=DTYPES[request["dtype"]], attn_implementation="sdpa"
    )
    model.to(request["device"]).eval()
    model.generation_config = transformers.GenerationConfig()
    return model


def ids():
    return torch.tensor(request["ids"], device=request["device"])


def forward_kl(logits, support, log_p):
    """Mean over rows of Σ p (log p − log q), over the support and one bucket for all other tokens.

    `logits` [n, v]; `support` and `log_p` [n, k]. The tail's mass is 1 − Σ on both sides, which is
    one pass less over [n, v] than Potstill's log-sum-exp over the tail."""
    logits = logits.float()
    # A log-softmax over [n, v] would cost a pass more, and one more of its size in the gradient.
    log_q = logits.gather(1, support) - logits.logsumexp(1, keepdim=True)
    tail = (1.0 - log_q.exp().sum(1, keepdim=True)).clamp_min(TAIL_FLOOR).log()
    p_tail = (1.0 - log_p.double().exp().sum(1, keepdim=True)).clamp_min(TAIL_FLOOR)
    log_p = torch.cat([log_p.double(), p_tail.log()], 1).float()
    return (log_p.exp() * (log_p - torch.cat([log_q, tail], 1))).sum(1).mean()


def adamw(model):
    """AdamW as Potstill has it: no decay of norms and embeddings."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        spared = "norm" in name or "embed_tokens" in name
        (others if spared else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": request["weight_decay"]},
        {"params": others, "weight_decay": 0.0},
    ]
    settings = {"lr": request["learning_rate"], "betas": (0.9, 0.999), "eps": 1e-8}
    try:
        return torch.optim.AdamW(groups, fused=True, **settings)
    except (RuntimeError, TypeError):
        return torch.optim.AdamW(groups, foreach=True, **settings)


def step():
    """Forward, forward KL to sparse targets, backward, clip by the global norm, AdamW."""
    model = load().train()
    optimizer = adamw(model)
    tokens = ids()
    support = torch.tensor(request["support"], device=request["device"])
    log_p = torch.tensor(request["logprobs"], device=request["device"])
    before, _ = memory()
    losses = []

    def one():
        optimizer.zero_grad(set_to_none=True)
        logits = model(input_ids=tokens, use_cache=False).logits
        # The last position predicts a token that is not there.
        loss = forward_kl(logits[0, :-1], support, log_p)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), request["clip"])
        optimizer.step()
        losses.append(loss.item())

    seconds, _ = measured(one)
    return {"seconds": seconds, "check": losses, "before_bytes": before}


def prefill():
    """All hidden states, and logits of the last position."""
    model = load()
    tokens = ids()

    @torch.inference_mode()
    def one():
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits
        return logits[0, -1, :8].float().tolist()

    seconds, check = measured(one)
    return {"seconds": seconds, "check": check}


def decode():
    """Greedy tokens after each prompt, with the cache of `generate` and no stop token."""
    model = load()
    tokens = ids()
    settings = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=request["new_tokens"],
        eos_token_id=None,
        pad_token_id=0,
        use_cache=True,
    )
    mask = torch.ones_like(tokens)

    @torch.inference_mode()
    def one():
        made = model.generate(tokens, attention_mask=mask, generation_config=settings)
        return made[:, tokens.shape[1] :].flatten().tolist()

    seconds, check = measured(one)
    return {"seconds": seconds, "check": check}


def capture():
    """Top-k, log-sum-exp and entropy of each text's distributions, a text at a time."""
    model = load()
    tokens = ids()
    k = request["top_k"]

    @torch.inference_mode()
    def one():
        entropies, firsts = [], []
        for text in tokens:
            logits = model(input_ids=text[None], use_cache=False).logits[0, :-1].float()
            log_z = logits.logsumexp(1)
            top, _ = logits.topk(k, dim=1)
            top = top - log_z[:, None]
            log_q = logits.sub_(log_z[:, None])
            entropies.append(-(log_q.exp() * log_q).sum(1))
            firsts.append(top[:, 0])
        return [torch.cat(entropies).mean().item(), torch.cat(firsts).mean().item()]

    seconds, check = measured(one)
    return {"seconds": seconds, "check": check}


PARTS = {"step": step, "prefill": prefill, "decode": decode, "capture": capture}

if __name__ == "__main__":
    torch.set_num_threads(request["threads"])
    result = PARTS[request["part"]]()
    result["peak_bytes"] = memory()[1]
    result["cpu_s"] = sum(os.times()[:2])
    result["engine"] = f"torch {torch.__version__}, transformers {transformers.__version__}"
    assert all(map(math.isfinite, result["check"])), "the results are not finite"
    print(json.dumps(result))
