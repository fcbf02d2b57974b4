"""Writes golden.json: every template here over every case, rendered by transformers.

    pip install transformers==5.24.0 && python make.py

`strftime_now` tells 2026-03-05 14:07:09. Ranges of generated text are given in bytes of UTF-8. A case that a template
refuses has its message instead of a text; one on which it fails otherwise has `"fails": true`.
"""

import datetime
import json
import pathlib

import jinja2
from transformers.utils import chat_template_utils


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 3, 5, 14, 7, 9)


chat_template_utils.datetime = Clock
HERE = pathlib.Path(__file__).parent
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def render(source, case, add_generation_prompt, arguments={}):
    marked = "generation %}" in source
    try:
        texts, ranges = chat_template_utils.render_jinja_template(
            conversations=[case["messages"]],
            tools=case.get("tools"),
            chat_template=source,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=add_generation_prompt,
            **TOKENS,
            **arguments,
        )
    except jinja2.exceptions.TemplateError as error:
        if type(error) is jinja2.exceptions.TemplateError:
            return {"raised": str(error)}
        return {"fails": True}
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, RecursionError):
        return {"fails": True}
    text = texts[0]
    size = lambda end: len(text[:end].encode())
    return {"text": text, "generation": [[size(start), size(end)] for start, end in ranges[0]] if marked else []}


def main():
    cases = json.loads((HERE / "cases.json").read_text())
    golden = [
        {"template": path.name, "case": name, "add_generation_prompt": prompt}
        | render(path.read_text(), case, prompt)
        for path in sorted(HERE.glob("*.jinja"))
        for name, case in cases.items()
        for prompt in (False, True)
    ]
    (HERE / "golden.json").write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
