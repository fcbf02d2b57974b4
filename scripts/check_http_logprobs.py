#!/usr/bin/env python3
"""Compares the prompt log-probabilities of a vLLM server with those of Potstill's forward pass on the same weights.

usage: check_http_logprobs.py URL MODEL REFERENCE.json [--mean 0.12] [--most 1.0]
       check_http_logprobs.py --signals SERVER_SIGNALS LOCAL_SIGNALS [--mean 0.12] [--most 1.0]

REFERENCE.json has `items`, each with `ids` and, for each position, `top20_ids` and `top20_logprobs` in f32. URL is the
server's base URL, such as http://127.0.0.1:8140/v1. The second form takes the `signals/` folders of two runs over the
same texts, one scored by the server and one locally, and compares the tokens in both supports; it needs pyarrow.
Prints the mean and the largest difference in nats over the 20 most probable tokens, and exits with 1 if one of them is
over its limit. The resolution of bf16 is 1/8 for logits from 16 to 32 and 1/4 above, so a few values differ by more.
"""

import argparse
import json
import sys
import urllib.request
from pathlib import Path


def prompt_logprobs(url, model, ids):
    body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 20}
    request = urllib.request.Request(
        f"{url}/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as reply:
        positions = json.load(reply)["choices"][0]["prompt_logprobs"]
    return [position and {int(i): entry["logprob"] for i, entry in position.items()} for position in positions]


def compare_server(url, model, reference):
    """Yields the differences of each text. Entry t of the reference is the distribution after token t; entry t of the
    server is the distribution before it."""
    for item in json.loads(Path(reference).read_text(encoding="utf-8"))["items"]:
        given = prompt_logprobs(url, model, item["ids"])
        if len(given) != len(item["ids"]):
            sys.exit(f"{len(given)} positions for {len(item['ids'])} tokens")
        differences, shared, wanted = [], 0, 0
        for at in range(1, len(given)):
            theirs = given[at]
            ours = dict(zip(item["top20_ids"][at - 1], item["top20_logprobs"][at - 1]))
            wanted += len(ours)
            shared += len(ours.keys() & theirs.keys())
            differences += [abs(ours[i] - theirs[i]) for i in ours.keys() & theirs.keys()]
        yield (item["text"] or "chat")[:40], differences, shared, wanted


def rows(folder):
    import pyarrow.parquet

    for path in sorted(Path(folder).glob("*.parquet")):
        for row in pyarrow.parquet.read_table(path).to_pylist():
            yield (row["prompt_id"], row["sample_index"]), row


def compare_signals(server, own):
    ours = dict(rows(own))
    for key, theirs in rows(server):
        if key not in ours:
            sys.exit(f"{key} is not in {own}")
        mine = ours[key]
        if mine["token_ids"] != theirs["token_ids"]:
            sys.exit(f"{key}: the texts differ")
        differences, shared, wanted = [], 0, 0
        for a, b in zip(supports(mine), supports(theirs), strict=True):
            most_probable = dict(sorted(a.items(), key=lambda pair: -pair[1])[:20])
            wanted += len(most_probable)
            shared += len(most_probable.keys() & b.keys())
            differences += [abs(most_probable[i] - b[i]) for i in most_probable.keys() & b.keys()]
        yield f"{key[0][:8]} {key[1]}", differences, shared, wanted


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
    texts = compare_signals(*args.signals) if args.signals else compare_server(*args.what)
    everything, shared, wanted = [], 0, 0
    for name, differences, shared_here, wanted_here in texts:
        if not differences:
            sys.exit(f"{name}: the supports share no token")
        shared, wanted = shared + shared_here, wanted + wanted_here
        everything += differences
        print(f"{name!r:44} {len(differences):6} values  mean {sum(differences) / len(differences):.4f}  max {max(differences):.4f}")
    mean, most = sum(everything) / len(everything), max(everything)
    print(f"all: {len(everything)} values, mean {mean:.4f}, max {most:.4f} nats; {shared} of {wanted} most probable tokens in both")
    if mean > args.mean or most > args.most or shared < 0.9 * wanted:
        sys.exit("the values differ by more than bf16 explains")


if __name__ == "__main__":
    main()
