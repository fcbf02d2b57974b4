#!/usr/bin/env python3
"""Checks that the typed fixtures of OpenAI's protocol are what the `openai` package takes a reply to be.

    pip install openai
    python scripts/check_fixtures.py [FOLDER]

Reads teacher/tests/fixtures/replies unless told otherwise. Fixtures of another kind are named and skipped. Exit 1 if one is
refused, or if there is none.
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
    accepted, refused = 0, 0
    for path in sorted(folder.glob("*.json")):
        fixture = json.loads(path.read_text())
        missing = {"source", "date", "recorded", "what", "kind"} - fixture.keys()
        kind = KINDS.get(fixture.get("kind"))
        if missing:
            print(f"{path.name}: no {', '.join(sorted(missing))}")
            refused += 1
        elif kind is None:
            print(f"{path.name}: {fixture['kind']}, not OpenAI's")
        else:
            try:
                for reply in replies(fixture):
                    kind.model_validate(reply, strict=True)
                accepted += 1
            except ValueError as error:
                print(f"{path.name}: {error}")
                refused += 1
    print(f"{accepted} accepted, {refused} refused")
    return int(refused > 0 or accepted == 0)


if __name__ == "__main__":
    sys.exit(main())
