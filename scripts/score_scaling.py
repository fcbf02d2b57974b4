#!/usr/bin/env python3
"""Time of `score` over HTTP for each answer, by the number of answers, with a server of its own on loopback. The time for
an answer should not depend on their number.

usage: score_scaling.py POTSTILL TOKENIZER [--answers 1000 10000 100000] [--in-flight 256]

TOKENIZER is a folder with a `tokenizer.json`, such as $POTSTILL_REAL/models/stories260K.
"""
import argparse
import asyncio
import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import tempfile
import time

RUN_FILE = """[run]
name = "scaling"

[import]
path = "answers.jsonl"
columns = {{ instruction = "question", output = "answer" }}
answers = "given"

[teacher]
url = "http://127.0.0.1:{port}/v1"
model = "m"
dialect = "vllm"
tokenizer = "{tokenizer}"
template = "plain"

[collect]
concurrency = {in_flight}

[score]
top_k = 2

[student]
path = "none"
"""


async def answer(reader, writer):
    """Answers requests on a connection: one token, and two log-probabilities for each token of the prompt."""
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(re.search(rb"content-length: *(\d+)", head, re.I).group(1))
            ids = json.loads(await reader.readexactly(length))["prompt"]
            positions = [
                {str(i): {"logprob": -0.5, "rank": 1}, str(7 if i != 7 else 8): {"logprob": -1.0, "rank": 2}} for i in ids
            ]
            positions[0] = None
            choice = {"index": 0, "text": "x", "finish_reason": "length", "prompt_logprobs": positions}
            usage = {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1}
            body = json.dumps({"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice], "usage": usage})
            writer.write(
                f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()
            )
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


def serve(port):
    async def run():
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=4096)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def stage(binary, folder, name):
    """Runs a stage, and returns its wall time and CPU time in seconds."""
    began = time.monotonic()
    child = subprocess.Popen([binary, name, "run.toml", "-q"], cwd=folder)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"`{name}` failed")
    return time.monotonic() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("potstill")
    parser.add_argument("tokenizer")
    parser.add_argument("--answers", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--in-flight", type=int, default=256)
    arguments = parser.parse_args()
    binary = str(pathlib.Path(arguments.potstill).resolve())
    tokenizer = pathlib.Path(arguments.tokenizer).resolve()
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    port = ours.recv()
    for count in arguments.answers:
        with tempfile.TemporaryDirectory() as temp:
            folder = pathlib.Path(temp)
            with open(folder / "answers.jsonl", "w") as file:
                for number in range(count):
                    file.write(json.dumps({"question": f"Story {number}: once", "answer": f"and then {number}"}) + "\n")
            run_file = RUN_FILE.format(port=port, tokenizer=tokenizer, in_flight=arguments.in_flight)
            (folder / "run.toml").write_text(run_file)
            stage(binary, folder, "import")
            collected, _, _ = stage(binary, folder, "collect")
            wall, cpu, mib = stage(binary, folder, "score")
            print(
                f"{count:>7} answers: {wall:8.2f} s, {wall / count * 1e6:7.0f} us an answer; "
                f"CPU of potstill {cpu:8.2f} s, {cpu / count * 1e6:7.0f} us an answer; {mib:.0f} MiB; "
                f"collect of the given answers {collected:.2f} s",
                flush=True,
            )
    server.terminate()


if __name__ == "__main__":
    main()
