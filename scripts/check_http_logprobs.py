#!/usr/bin/env python3
"""Compares the prompt log-probabilities of a vLLM server with a forward pass of our own on the same weights.

usage: check_http_logprobs.py URL MODEL REFERENCE.json [--mean 0.12] [--most 1.0]
       check_http_logprobs.py --signals SIGNALS_OF_THE_SERVER SIGNALS_OF_OUR_OWN [--mean 0.12] [--most 1.0]

REFERENCE.json has `items`, each with `ids`, and by position `top20_ids` and `top20_logprobs` in f32. URL is the
server's base, such as http://127.0.0.1:8140/v1. The second form takes two `signals/` folders of runs over the same
texts, one scored by the server and one here, and compares the tokens that both supports have; it needs pyarrow.
Prints mean and largest difference in nats over the 20 likeliest tokens; exits with 1 where one is over its limit.
bf16 has steps of 1/8 for logits from 16 to 32 and of 1/4 above, so a few values are some steps apart.
"""

import argparse
import json
import sys
import urllib.request
from pathlib import Path


def asked(url, model, ids):
    body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 20}
    request = urllib.request.Request(
        f"{url}/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as reply:
        positions = json.load(reply)["choices"][0]["prompt_logprobs"]
    return [position and {int(i): entry["logprob"] for i, entry in position.items()} for position in positions]


def of_server(url, model, reference):
    """Differences by text. Entry t of the reference is what the model says after token t, that of the server what
    it said before it."""
    for item in json.loads(Path(reference).read_text(encoding="utf-8"))["items"]:
        given = asked(url, model, item["ids"])
        if len(given) != len(item["ids"]):
            sys.exit(f"{len(given)} positions for {len(item['ids'])} tokens")
        apart, shared, wanted = [], 0, 0
        for at in range(1, len(given)):
            theirs = given[at]
            ours = dict(zip(item["top20_ids"][at - 1], item["top20_logprobs"][at - 1]))
            wanted += len(ours)
            shared += len(ours.keys() & theirs.keys())
            apart += [abs(ours[i] - theirs[i]) for i in ours.keys() & theirs.keys()]
        yield (item["text"] or "chat")[:40], apart, shared, wanted


def rows(folder):
    import pyarrow.parquet

    for path in sorted(Path(folder).glob("*.parquet")):
        for row in pyarrow.parquet.read_table(path).to_pylist():
            yield (row["prompt_id"], row["sample_index"]), row


def of_signals(server, own):
    ours = dict(rows(own))
    for key, theirs in rows(server):
        if key not in ours:
            sys.exit(f"{key} is not in {own}")
        mine = ours[key]
        if mine["token_ids"] != theirs["token_ids"]:
            sys.exit(f"{key}: the texts differ")
        apart, shared, wanted = [], 0, 0
        for a, b in zip(supports(mine), supports(theirs), strict=True):
            likeliest = dict(sorted(a.items(), key=lambda pair: -pair[1])[:20])
            wanted += len(likeliest)
            shared += len(likeliest.keys() & b.keys())
            apart += [abs(likeliest[i] - b[i]) for i in likeliest.keys() & b.keys()]
        yield f"{key[0][:8]} {key[1]}", apart, shared, wanted


def supports(row):
    names = ("ids", "logprobs") if "ids" in row else ("support_ids", "support_logprobs")
    return [dict(zip(ids, values)) for ids, values in zip(row[names[0]], row[names[1]], strict=True)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*")
    parser.add_argument("--signals", nargs=2)
    parser.add_argument("--mean", type=float, default=0.12)
    parser.add_argument("--most", type=float, default=1.0)
    args = parser.parse_args()
    if not args.signals and len(args.what) != 3:
        parser.error("URL, MODEL and REFERENCE.json are needed, or --signals")
    texts = of_signals(*args.signals) if args.signals else of_server(*args.what)
    everything, shared, wanted = [], 0, 0
    for name, apart, of_shared, of_wanted in texts:
        if not apart:
            sys.exit(f"{name}: nothing in common")
        shared, wanted = shared + of_shared, wanted + of_wanted
        everything += apart
        print(f"{name!r:44} {len(apart):6} values  mean {sum(apart) / len(apart):.4f}  most {max(apart):.4f}")
    mean, most = sum(everything) / len(everything), max(everything)
    print(f"all: {len(everything)} values, mean {mean:.4f}, most {most:.4f} nats; {shared} of {wanted} likeliest tokens in both")
    if mean > args.mean or most > args.most or shared < 0.9 * wanted:
        sys.exit("the values differ by more than bf16 explains")


if __name__ == "__main__":
    main()
