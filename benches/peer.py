"""The PyTorch side of `potstill-bench`: one request on stdin (JSON), one line of results on stdout.

Each part is written as a user of transformers who cares for speed would write it: inference mode,
scaled-dot-product attention, `generate` with its cache, and the AdamW that is fastest here. Token ids
and targets come with the request, so both sides do the same work. Each part returns some of the
numbers that it computed, which are compared with Potstill's.

    python3 peer.py <request.json
"""

import ctypes
import gc
import importlib.metadata
import json
import math
import os
import sys
import time

request = json.load(sys.stdin)
# With `python -c` the working directory is searched first; a folder there may be called `datasets`.
if sys.path[:1] == [""]:
    sys.path.pop(0)
# These are set before torch is imported, which creates its thread pools on first use.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(request["threads"])
# Nothing is downloaded, and only the result goes to stdout.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
import transformers

transformers.utils.logging.disable_progress_bar()
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
# A tail with less mass than this counts as empty, as in Potstill.
TAIL_FLOOR = 2.0**-60


def memory():
    """Resident bytes now, and their peak."""
    if request["device"] != "cpu":
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    try:
        fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    except OSError:
        return None, None
    return tuple(1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM"))


def measured(work):
    """Seconds of each repetition after up to `warm_up` unmeasured ones, and what the first one gave.

    There are up to `repetitions`. After `budget_s` no further one begins, but two are measured unless
    one takes three times as long."""
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


def load(dtype=None):
    """The model, in `dtype` or else in the type of the request."""
    make, attention = transformers.AutoModelForCausalLM, "sdpa"
    if request["implementation"] == "liger-layers":
        # Liger's norms, rotations and gated layers; the loss below is that of all sides.
        from liger_kernel.transformers import AutoLigerKernelForCausalLM as make

        attention = "flash_attention_2"
    model = make.from_pretrained(
        request["model"],
        dtype=dtype or DTYPES[request["dtype"]],
        attn_implementation=attention,
    )
    model.to(request["device"]).eval()
    model.generation_config = transformers.GenerationConfig()
    return model


def ids():
    return torch.tensor(request["ids"], device=request["device"])


def forward_kl(logits, support, log_p):
    """Mean over rows of Σ p (log p − log q), over the support and one bucket for all other tokens.

    `logits` [n, v]; `support` and `log_p` [n, k]. The tail's mass is 1 − Σ on both sides, which saves
    a pass over [n, v] that Potstill's log-sum-exp over the tail needs."""
    logits = logits.float()
    # A log-softmax over [n, v] would need another pass, and another one in the gradient.
    log_q = logits.gather(1, support) - logits.logsumexp(1, keepdim=True)
    tail = (1.0 - log_q.exp().sum(1, keepdim=True)).clamp_min(TAIL_FLOOR).log()
    p_tail = (1.0 - log_p.double().exp().sum(1, keepdim=True)).clamp_min(TAIL_FLOOR)
    log_p = torch.cat([log_p.double(), p_tail.log()], 1).float()
    return (log_p.exp() * (log_p - torch.cat([log_q, tail], 1))).sum(1).mean()


def forward_kl_by_tail(logits, support, log_p):
    """The same KL by a log-sum-exp over the tail's logits, as Potstill computes it."""
    logits = logits.float()
    on_support = logits.gather(1, support)
    tail = logits.scatter(1, support, -math.inf).logsumexp(1, keepdim=True)
    log_q = torch.cat([on_support, tail], 1).log_softmax(1)
    log_p = torch.cat([log_p, (1.0 - log_p.exp().sum(1, keepdim=True)).log()], 1)
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()


class ForwardKl(torch.autograd.Function):
    """The same KL with its gradient written by hand, in place of the logits where nothing is compiled:
    q − p on the support, q (1 − p_tail / q_tail) elsewhere."""

    @staticmethod
    def forward(ctx, logits, support, log_p):
        numbers = logits.float()
        log_z = numbers.logsumexp(1, keepdim=True)
        log_q = numbers.gather(1, support) - log_z
        p, q = log_p.exp(), log_q.exp()
        p_tail = 1.0 - p.sum(1, keepdim=True)
        tail = (1.0 - q.sum(1, keepdim=True)).clamp_min(TAIL_FLOOR)
        ctx.save_for_backward(logits, support, log_z, q - p, 1.0 - p_tail / tail)
        return ((p * (log_p - log_q)).sum(1) + (p_tail * (p_tail / tail).log())[:, 0]).mean()

    @staticmethod
    def backward(ctx, by_loss):
        logits, support, log_z, on_support, elsewhere = ctx.saved_tensors
        share = by_loss / logits.shape[0]
        on_support, elsewhere = on_support * share, elsewhere * share
        if torch.compiler.is_compiling() or logits.dtype != torch.float32:
            gradient = (logits.float() - log_z).exp() * elsewhere
            gradient = gradient.scatter(1, support, on_support)
        else:
            gradient = logits.sub_(log_z).exp_().mul_(elsewhere).scatter_(1, support, on_support)
        return gradient.to(logits.dtype), None, None


FORMULATIONS = {
    "tail by 1 − Σ": forward_kl,
    "log-sum-exp over the tail": forward_kl_by_tail,
    "gradient by hand": ForwardKl.apply,
}


def adamw(model):
    """AdamW with Potstill's settings: norms and embeddings do not decay."""
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
    """Forward, forward KL to sparse targets, backward, clip by the global norm, AdamW.

    In bf16 the weights are f32 and the forward pass is under autocast, as Potstill computes with f32
    masters; `eager-bf16` has everything in bf16.
    """
    autocast = request["dtype"] == "bf16" and request["implementation"] == "eager"
    model = load(torch.float32 if autocast else None).train()
    optimizer = adamw(model)
    tokens = ids()
    support = torch.tensor(request["support"], device=request["device"])
    log_p = torch.tensor(request["logprobs"], device=request["device"])
    before, _ = memory()
    losses = []

    def one():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(request["device"].split(":")[0], torch.bfloat16, enabled=autocast):
            logits = model(input_ids=tokens, use_cache=False).logits
        # The last position has no next token to predict.
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


# First indices of the states, the head and the support in the sequence of numbers.
SEEDS = [1_000_000_007, 1_300_000_033, 1_700_000_009]
PRIME = 2**31 - 1


def hashed(first, count, seed):
    """Cubes of the numbers' indices, modulo a prime. Potstill computes the same."""
    x = (torch.arange(first, first + count, device=request["device"]) + seed) % PRIME
    return x * x % PRIME * x % PRIME


def numbers(rows, columns, seed, scale):
    """Uniformly distributed numbers between −`scale`/2 and `scale`/2."""
    made = torch.empty(rows * columns, device=request["device"], dtype=DTYPES[request["dtype"]])
    step = 1 << 22
    for first in range(0, len(made), step):
        shares = hashed(first, min(step, len(made) - first), seed).double() / PRIME
        made[first : first + step] = ((shares - 0.5) * scale).float()
    return made.view(rows, columns)


def timed(work):
    sync()
    began = time.perf_counter()
    work()
    sync()
    return time.perf_counter() - began


def sync():
    if request["device"] != "cpu":
        torch.cuda.synchronize()


def most_above(work, gradients):
    """Most bytes of one call beyond those of the inputs and of the tensors that `gradients` returns."""
    gc.collect()
    if request["device"] == "cpu":
        ctypes.CDLL(None).malloc_trim(0)
        open("/proc/self/clear_refs", "w").write("5")
    else:
        torch.cuda.reset_peak_memory_stats()
    before = memory()[0]
    work()
    return max(0, memory()[1] - before - sum(g.nbytes for g in gradients()))


def faster(hidden, head, support, log_p, wrap):
    """The formulation that takes the least time for some of the rows, and its name."""
    some = min(len(hidden), max(64, len(hidden) // 8))
    seconds = {}
    for name, formulation in FORMULATIONS.items():
        op = loss_op(hidden.detach()[:some].requires_grad_(), head, support[:some], log_p, wrap(formulation))
        op()
        seconds[name] = timed(op)
    name = min(seconds, key=seconds.get)
    return wrap(FORMULATIONS[name]), name


def loss_op(hidden, head, support, log_p, formulation):
    """Forward and backward; gives the loss and leaves the gradients."""

    def one():
        hidden.grad = head.grad = None
        value = formulation(hidden, head, support, log_p)
        value.backward()
        return value

    return one


def foreign_op(hidden, head, teacher):
    """A fused linear loss of Liger or QuACK, with the teacher that `foreign_teacher` made for it."""
    if request["implementation"] == "liger-jsd":
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        forward, arguments = LigerFusedLinearJSD(), [hidden, head, *teacher, None]
    elif request["implementation"] == "liger-kl":
        from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

        forward, arguments = LigerFusedLinearKLDivLoss(), [hidden, head, *teacher]
    elif request["implementation"] == "liger-cute-cross-entropy":
        from liger_kernel.ops.cutedsl.ops import fused_linear_cross_entropy_sm90

        forward = fused_linear_cross_entropy_sm90.LigerFusedLinearCrossEntropySM90Function.apply
        arguments = [hidden, head, *teacher]
    elif request["implementation"] == "quack-cross-entropy":
        from quack.linear_cross_entropy import chunked_linear_cross_entropy as forward

        arguments = [hidden, head, *teacher]
    else:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        forward, arguments = LigerFusedLinearCrossEntropyLoss(), [head, hidden, *teacher]

    def one():
        hidden.grad = head.grad = None
        value = forward(*arguments)
        value.backward()
        return value

    return one


def foreign_teacher(n, d, v):
    """A random teacher. It is an input like states and head, so its memory is not counted."""
    like = {"device": request["device"], "dtype": DTYPES[request["dtype"]]}
    if request["implementation"] == "liger-jsd":
        return [torch.randn(n, d, **like), torch.randn(v, d, **like) * 2.5 / math.sqrt(d)]
    if request["implementation"] == "liger-kl":
        return [torch.randn(n, v, **like).softmax(1)]
    return [torch.randint(v, [n], device=request["device"])]


def loss():
    """The mean forward KL with a tail bucket from states and head, and the gradients of both."""
    n, d, v = (request["loss"][name] for name in ("rows", "width", "vocab"))
    log_p = torch.tensor(request["logprobs"], device=request["device"])
    k = log_p.shape[1]
    hidden = numbers(n, d, SEEDS[0], math.sqrt(12.0)).requires_grad_()
    head = numbers(v, d, SEEDS[1], 2.5 * math.sqrt(12.0 / d)).requires_grad_()
    slots = torch.arange(k, device=request["device"]) * (v // (k + 1))
    support = (hashed(0, n, SEEDS[2])[:, None] % v + slots) % v
    note, teacher = "", []

    def whole(formulation):
        return lambda hidden, head, *target: formulation(hidden @ head.T, *target)

    if request["implementation"].startswith(("liger", "quack")):
        teacher = foreign_teacher(n, d, v)
        op = foreign_op(hidden, head, teacher)
        package = "quack-kernels" if request["implementation"].startswith("quack") else "liger_kernel"
        note = f"{package} {importlib.metadata.version(package)}; another loss"
    else:
        compiled = request["implementation"] == "compile"

        def wrap(formulation):
            return torch.compile(whole(formulation), dynamic=False) if compiled else whole(formulation)

        formulation, note = faster(hidden, head, support, log_p, wrap)
        op = loss_op(hidden, head, support, log_p, formulation)

    def products():
        with torch.no_grad():
            if request["implementation"] == "liger-jsd":
                teacher[0] @ teacher[1].T
            logits = hidden @ head.T
            logits @ head
            logits.T @ hidden

    check = checked(op(), hidden, head, support) if not teacher else []
    for _ in range(1, request["warm_up"]):
        op()
    hidden.grad = head.grad = None
    above = most_above(op, lambda: [hidden.grad, head.grad])
    seconds, alone = [], []
    while len(seconds) < request["repetitions"]:
        hidden.grad = head.grad = None
        seconds.append(timed(op))
        hidden.grad = head.grad = None
        alone.append(timed(products))
        if sum(seconds) > request["budget_s"] and len(seconds) >= 2:
            break
    result = {"seconds": seconds, "products": alone, "above_bytes": above, "check": check}
    return {**result, "note": note, "parts": copies(v) if request["implementation"] == "eager" else []}


def checked(value, hidden, head, support):
    """The loss, both gradients' norms, and some entries of each in units of its root mean square."""
    some = min(4, len(hidden))
    check = [value.item()]
    for gradient, rows in ((hidden.grad, list(range(some))), (head.grad, support[:some, 0].tolist())):
        norm = gradient.float().square().sum(1).double().sum().sqrt().item()
        check.append(norm * math.sqrt(len(hidden)))
        unit = norm / math.sqrt(gradient.numel())
        check += [gradient[row, 0].item() / unit for row in rows]
    return check


def copies(v):
    """Seconds of a copy of one chunk of logits."""
    rows = min(request["loss"]["rows"], request["loss"]["chunk_rows"])
    logits = torch.ones(rows, v, device=request["device"], dtype=DTYPES[request["dtype"]])
    copy = torch.empty_like(logits)
    return [["copy", min(timed(lambda: copy.copy_(logits)) for _ in range(5))]]


PARTS = {"step": step, "prefill": prefill, "decode": decode, "capture": capture, "loss": loss}

if __name__ == "__main__":
    torch.set_num_threads(request["threads"])
    result = PARTS[request["part"]]()
    result["peak_bytes"] = memory()[1]
    result["cpu_s"] = sum(os.times()[:2])
    result["engine"] = f"torch {torch.__version__}, transformers {transformers.__version__}"
    assert all(map(math.isfinite, result["check"])), "the results are not finite"
    print(json.dumps(result))
