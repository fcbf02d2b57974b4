#!/usr/bin/env python3
"""Checks that the `openai` package accepts the test fixtures of OpenAI's protocol.

    pip install openai
    python scripts/check_fixtures.py [FOLDER]

FOLDER is teacher/tests/fixtures/replies by default. Fixtures of other protocols are listed and skipped. Exits with 1 if a
fixture is rejected, or if none is accepted.
"""

import json
import pathlib
import sys

from openai.types.chat import ChatCompletion, ChatCompletionChunk

KINDS = {"chat.completion": ChatCompletion, "chat.completion.chunk": ChatCompletionChunk}


def replies(fixture):
    if "response" in fixture:
        return [fixture["response"]]
    lines = fixture["sse"].split("\n")
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(text) for text in data if text != "[DONE]"]


def main():
    here = pathlib.Path(__file__).resolve().parent.parent
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else here / "teacher/tests/fixtures/replies"
    accepted, rejected = 0, 0
    for path in sorted(folder.glob("*.json")):
        fixture = json.loads(path.read_text())
        missing = {"source", "date", "recorded", "what", "kind"} - fixture.keys()
        kind = KINDS.get(fixture.get("kind"))
        if missing:
            print(f"{path.name}: no {', '.join(sorted(missing))}")
            rejected += 1
        elif kind is None:
            print(f"{path.name}: skipped, {fixture['kind']} is not OpenAI's")
        else:
            try:
                for reply in replies(fixture):
                    kind.model_validate(reply, strict=True)
                accepted += 1
            except ValueError as error:
                print(f"{path.name}: {error}")
                rejected += 1
    print(f"{accepted} accepted, {rejected} rejected")
    return int(rejected > 0 or accepted == 0)


if __name__ == "__main__":
    sys.exit(main())
