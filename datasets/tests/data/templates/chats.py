"""Writes chats.json and chats-golden.json: 200 chats, and what transformers renders of them.

    pip install transformers==5.24.0 && python chats.py [FOLDER]

FOLDER has the templates, `*.jinja`, and gets the two files; by default it is the folder `thinking` beside this script. A
folder with the templates of released models may be named `templates` below `POTSTILL_REAL`, where a test looks for it.

chats-golden.json has for each template and each set of arguments a list with a pair for each chat: the SHA-256 of the
rendering without and with generation prompt, its first 16 digits. A chat that the template refuses has `!` and the message
instead; one on which it fails otherwise has `?`.
"""

import hashlib
import json
import pathlib
import random
import sys

from make import render

ARGUMENTS = {
    "none": {},
    "on": {"enable_thinking": True, "thinking": True},
    "off": {"enable_thinking": False, "thinking": False},
    "more": {"reasoning_effort": "high", "date_string": "26 Jul 2024", "keep": [1, 2.5, {"a": "é"}], "xml_tools": []},
}
TEXTS = [
    "What is 2 + 2?", "Name <b>three</b> \"fruits\" & a 'tree'.", "你好,\ttell me more 😀", "  leading and trailing  \n",
    "\n\nline feeds\r\n\n", "<tool_response>\nnot a tool\n</tool_response>", "Use `{{ braces }}` and {% tags %}.",
    "a\\b\\n \u00a0\u200b\u2028", "<|im_end|> in the text", "x" * 300, "1. one\n2. two\n\n```python\nprint('hi')\n```",
    "/no_think please", "<think>", "É", "…",
]
ANSWERS = TEXTS[:11] + [
    "<think>\nTwo and two.\n</think>\n\n4", "<think>a</think>b</think>c", "no opening\n</think>\n\nanswer", "</think>", "4",
]
SYSTEMS = ["Be terse.", "  Be terse.\n", "You answer. /no_think", "Think. /think", "/system_override Only this.", "日本語で答えて。"]
REASONING = ["Two and two.\nIs four.", "\nline feeds\n\n", "a <b> & \"c\"", "é 😀"]
ARGUMENT_VALUES = [
    "Zürich", 2, 2.5, 1.0, 1e-7, 1e20, -0.0, 123456789012345678, True, None, [1, "a", None, [False]], {"k": {"n": [1.5]}}, "", "it's \"q\"\n", [], {},
]
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Weather <now> & \"later\"", "parameters": {"type": "object", "properties": {"place": {"type": "string", "description": "Ort, z. B. Zürich"}, "days": {"type": "integer", "default": 1}, "unit": {"type": "string", "enum": ["C", "F"]}}, "required": ["place"]}}},
    {"type": "function", "function": {"name": "time", "description": "It's the time", "parameters": {"type": "object", "properties": {}}}},
    {"type": "function", "function": {"name": "nested", "description": "Nested\nlines", "parameters": {"type": "object", "properties": {"list": {"type": "array", "items": {"type": "number", "minimum": 0.5}}, "flag": {"type": "boolean", "default": None}, "either": {"type": ["string", "null"]}}, "required": ["list", "flag"], "additionalProperties": False}}},
]


def tool_calls(rng, turn):
    calls = []
    for number in range(rng.choice([1, 1, 2, 3])):
        names = rng.sample(["place", "days", "unit", "list", "ключ"], rng.randrange(4))
        arguments = {name: rng.choice(ARGUMENT_VALUES) for name in names}
        call = {"type": "function", "function": {"name": rng.choice(["weather", "time", "nested"]), "arguments": arguments}}
        if rng.random() < 0.8:
            call = {"id": f"call{turn:03}{number:02}", **call}
        calls.append(call)
    return calls


def chat(rng):
    messages = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    tools = rng.sample(TOOLS, rng.choice([1, 2, 3])) if rng.random() < 0.4 else None
    for turn in range(rng.choice([1, 1, 2, 3])):
        messages.append({"role": "user", "content": rng.choice(TEXTS)})
        if rng.random() < 0.03:
            messages.append({"role": "user", "content": rng.choice(TEXTS)})
        while tools and rng.random() < 0.5:
            calls = tool_calls(rng, len(messages))
            message = {"role": "assistant", "content": rng.choice(["", "Let me look."]), "tool_calls": calls}
            if rng.random() < 0.4:
                message["reasoning_content"] = rng.choice(REASONING)
            messages.append(message)
            for call in calls:
                result = {"role": "tool", "content": rng.choice(["21", "{\"celsius\": 21}", "", "a\nb"])}
                if "id" in call:
                    result["tool_call_id"] = call["id"]
                messages.append(result)
        message = {"role": "assistant", "content": rng.choice(ANSWERS)}
        if rng.random() < 0.4:
            message["reasoning_content"] = rng.choice(REASONING)
        messages.append(message)
    # A chat ends with an answer, a question, or the results of tools.
    if rng.random() < 0.6:
        messages.pop()
    return {"messages": messages} | ({"tools": tools} if tools else {})


def short(rendered):
    if "raised" in rendered:
        return "!" + rendered["raised"]
    if rendered.get("fails"):
        return "?"
    return hashlib.sha256(rendered["text"].encode()).hexdigest()[:16]


def main():
    here = pathlib.Path(__file__).parent / "thinking"
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else here
    rng = random.Random(17)
    chats = [chat(rng) for _ in range(200)]
    (folder / "chats.json").write_text(json.dumps({"chats": chats, "arguments": ARGUMENTS}, ensure_ascii=False, indent=0) + "\n")
    golden = {
        path.name: {
            name: [[short(render(path.read_text(), case, prompt, arguments)) for prompt in (False, True)] for case in chats]
            for name, arguments in ARGUMENTS.items()
        }
        for path in sorted(folder.glob("*.jinja"))
    }
    (folder / "chats-golden.json").write_text(json.dumps(golden, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
