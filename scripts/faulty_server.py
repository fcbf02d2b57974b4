"""A server for `kill_collect.py` and `collect_memory.py`, with OpenAI's chat protocol on loopback, in a
thread. Some responses are faulty. Whether and how a response is faulty depends on the prompt, on the
number of earlier requests for that prompt, and on a seed.
"""
import asyncio
import collections
import hashlib
import json
import re
import threading

PRICE = {"input": 2.0, "output": 8.0}  # USD per million tokens
FAULTS = ["429", "500", "503", "reset", "truncated", "error inside", "shape", "empty"]


class Server:
    """Counts requests, answers and tokens. `faulty` is the share of faulty responses, `refused` the share of prompts
    that are refused permanently."""

    def __init__(self, faulty=0.0, refused=0.0, seed=1, latency=0.0):
        self.faulty, self.refused, self.seed, self.latency = faulty, refused, seed, latency
        self.asked = collections.Counter()
        self.answered = collections.Counter()
        self.prompt_tokens = self.completion_tokens = self.requests = 0
        self.in_flight = self.most_in_flight = 0
        self.faults = collections.Counter()
        self.loop = asyncio.new_event_loop()
        ready = threading.Event()
        threading.Thread(target=self.run, args=(ready,), daemon=True).start()
        ready.wait()

    def run(self, ready):
        asyncio.set_event_loop(self.loop)
        server = self.loop.run_until_complete(
            asyncio.start_server(self.connection, "127.0.0.1", 0, backlog=4096)
        )
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        self.loop.run_forever()

    def draw(self, *what):
        """Returns a pseudo-random number in [0, 1)."""
        digest = hashlib.sha256(repr((self.seed, what)).encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    def cost(self):
        """Computes the price of all answers in USD."""
        return (self.prompt_tokens * PRICE["input"] + self.completion_tokens * PRICE["output"]) / 1e6

    async def connection(self, reader, writer):
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(re.search(rb"content-length: *(\d+)", head, re.I).group(1))
                body = json.loads(await reader.readexactly(length))
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                try:
                    if not await self.answer(body, writer):
                        return
                finally:
                    self.in_flight -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, body, writer):
        """Answers a request; returns False if the connection is closed."""
        prompt = body["messages"][-1]["content"]
        attempt = self.asked[prompt]
        self.asked[prompt] += 1
        self.requests += 1
        if self.latency:
            await asyncio.sleep(self.latency)
        if self.draw("refused", prompt) < self.refused:
            return await self.send(writer, 400, {"error": {"message": "refused permanently"}})
        if self.draw("faulty", prompt, attempt) < self.faulty:
            fault = FAULTS[int(self.draw("which", prompt, attempt) * len(FAULTS))]
            self.faults[fault] += 1
            return await self.fail(fault, prompt, writer)
        text = "answer " + hashlib.sha256(prompt.encode()).hexdigest()
        usage = self.count(prompt)
        # Counted before sending, since a provider also charges for an answer that is cut off in transit.
        self.answered[prompt] += 1
        reply = self.reply(text, usage)
        if body.get("stream"):
            return await self.stream(writer, reply, text, usage)
        return await self.send(writer, 200, reply)

    def count(self, prompt):
        self.prompt_tokens += len(prompt)
        self.completion_tokens += 7
        return {"prompt_tokens": len(prompt), "completion_tokens": 7, "total_tokens": len(prompt) + 7}

    def reply(self, text, usage):
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}

    async def fail(self, fault, prompt, writer):
        if fault.isdigit():
            extra = b"retry-after: 0\r\n" if fault == "429" else b""
            return await self.send(writer, int(fault), {"error": {"message": fault}}, extra)
        if fault == "reset":
            writer.transport.abort()
            return False
        if fault == "error inside":
            return await self.send(writer, 200, {"error": {"message": "inside", "code": 500}})
        if fault == "shape":
            return await self.send(writer, 200, {"choices": 7})
        if fault == "empty":
            return await self.send(writer, 200, {"choices": []})
        body = json.dumps(self.reply("cut", {})).encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body))
        writer.write(body[: len(body) // 2])
        await writer.drain()
        return False

    async def send(self, writer, status, reply, extra=b""):
        body = json.dumps(reply).encode()
        head = b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\n%scontent-length: %d\r\n\r\n"
        writer.write(head % (status, extra, len(body)) + body)
        await writer.drain()
        return True

    async def stream(self, writer, reply, text, usage):
        chunk = lambda **more: {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", **more}
        choice = lambda delta, end=None: {"index": 0, "delta": delta, "finish_reason": end}
        half = len(text) // 2
        chunks = [
            chunk(choices=[choice({"role": "assistant", "content": text[:half]})]),
            chunk(choices=[choice({"content": text[half:]})]),
            chunk(choices=[choice({}, "stop")]),
            chunk(choices=[], usage=usage),
        ]
        body = "".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n"
        body = body.encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(body))
        writer.write(body)
        await writer.drain()
        return True


def run_file(server, **collect):
    """Builds a run file whose teacher is `server` and whose student learns from text alone."""
    keys = "\n".join(f"{key} = {json.dumps(value)}" for key, value in collect.items())
    return f"""[run]
name = "served"

[import]
path = "prompts.jsonl"
columns = {{ text = "text" }}

[teacher]
url = "http://127.0.0.1:{server.port}/v1"
model = "m"
price = {{ input = {PRICE["input"]}, output = {PRICE["output"]} }}

[collect]
max_new_tokens = 64
{keys}

[student]
path = "none"

[train]
loss = {{ forward_kl = 0.0, cross_entropy = 1.0 }}
controls = []
"""
