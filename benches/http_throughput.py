"""Throughput over HTTP on loopback: Potstill's client beside OpenAI's Python client with asyncio.

Both ask the same server (`fault_server`, with no faults) the same questions: 20,000 requests of 1 kB with 512 in
flight at a latency of 250 ms, of which 2,048 a second is the ideal, and 2,000 answers of 512 tokens with their 20
likeliest, 580 kB each, with as many in flight as two cores and as one can read. Replies come whole, not streamed.
The Python client is given fewer of each; what counts is CPU time a request, its process's own.

    cargo build --release -p potstill-teacher --no-default-features --examples
    python benches/http_throughput.py            # with `openai` installed
"""

import argparse
import asyncio
import json
import pathlib
import resource
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
CASES = [
    # name, requests, requests of the Python client, in flight, prompt bytes, tokens, top, latency in ms
    ("1 kB", 20_000, 3_000, 512, 1000, 16, -1, 250),
    ("512 tokens, top 20", 2_000, 200, 64, 1000, 512, 20, 250),
    ("512 tokens, top 20, fewer at once", 2_000, 100, 32, 1000, 512, 20, 250),
]


def server(examples, latency, tokens):
    process = subprocess.Popen(
        [examples / "fault_server", "--latency-ms", str(latency), "--answer-tokens", str(tokens), "--same"],
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"


def ours(examples, url, case):
    _, requests, _, in_flight, prompt_bytes, tokens, top, _ = case
    numbers = [requests, in_flight, prompt_bytes, tokens, top]
    out = subprocess.run(
        [examples / "collect_many", url, *map(str, numbers)], check=True, capture_output=True, text=True
    )
    return json.loads(out.stdout)


async def ask(url, case, requests):
    import openai

    _, _, _, in_flight, prompt_bytes, tokens, top, _ = case
    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
    more = {"logprobs": True, "top_logprobs": top} if top >= 0 else {}
    numbers = iter(range(requests))

    async def worker():
        for n in numbers:
            text = f"prompt {n}: " + "words and words " * (prompt_bytes // 16)
            reply = await client.chat.completions.create(
                model="faulty", messages=[{"role": "user", "content": text}], max_tokens=tokens, **more
            )
            assert reply.choices[0].message.content
            if top >= 0:
                assert len(reply.choices[0].logprobs.content) == tokens

    await asyncio.gather(*(worker() for _ in range(in_flight)))


def theirs(url, case):
    """In this process's child, whose CPU time is its own; imports are not counted."""
    import openai  # noqa: F401

    requests = case[2]
    before, begun = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    asyncio.run(ask(url, case, requests))
    after, seconds = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - begun
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "answers": requests,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu, 2),
        "requests_per_second": round(requests / seconds),
        "cpu_us_per_request": round(cpu * 1e6 / requests, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=pathlib.Path, default=ROOT / "target/release/examples")
    parser.add_argument("--theirs", nargs=2, metavar=("URL", "CASE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.theirs:
        print(json.dumps(theirs(args.theirs[0], CASES[int(args.theirs[1])])))
        return
    for i, case in enumerate(CASES):
        process, url = server(args.examples, case[7], case[5])
        try:
            mine = ours(args.examples, url, case)
            command = [sys.executable, __file__, "--theirs", url, str(i)]
            peer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        finally:
            process.kill()
        ideal = case[3] * 1000 / case[7]
        ratio = peer["cpu_us_per_request"] / mine["cpu_us_per_request"]
        print(f"{case[0]}: {case[3]} in flight at {case[7]} ms, ideal {ideal:.0f} a second")
        print(f"  potstill {mine}")
        print(f"  openai   {peer}")
        print(f"  {mine['requests_per_second'] / ideal:.1%} of the ideal; {ratio:.1f} times the requests a CPU second")


if __name__ == "__main__":
    main()
