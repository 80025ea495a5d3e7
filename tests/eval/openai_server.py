"""An OpenAI-compatible server with scripted answers, which records every request.

    python openai_server.py --port 0 --ready FILE --log FILE [--name tiny] [--behaviour good]

The number k of times that a question was asked decides whether it is answered right: RIGHT. `behaviour` makes a server
that goes wrong: never_ready, other_model, garbage, dies (after 3 answers); slow takes a second.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# Text in the question -> (right answer, wrong answer, right for sample k?).
Answers = dict[str, tuple[str, str, Callable[[int], bool]]]


def always(_: int) -> bool:
    return True


def never(_: int) -> bool:
    return False


def every_second(k: int) -> bool:
    return k % 2 == 0


ADD = "```python\na, b = map(int, input().split())\nprint(a {} b)\n```"
TWICE = "```python\nclass Solution:\n    def double(self, x):\n        return {} * x\n```"
ECHO = "```python\nprint(input())\n```"
ANSWERS: Answers = {
    "17 * 19": (r"\boxed{323}", r"\boxed{17}", every_second),
    "x - y = 6": (r"so \boxed{023}", r"\boxed{46}", always),
    "divisors does 360": (r"\boxed{24}", r"\boxed{23}", never),
    "photon": ("photon", "gluon", every_second),
    "helium": ("helium", "neon", always),
    "print their sum": (ADD.format("+"), ADD.format("*"), every_second),
    "Return twice x": (TWICE.format(2), TWICE.format(3), always),
    "Edge of the window": (ECHO, "no code", never),
}


def choice_letter(text: str, word: str) -> str:
    """The letter in front of a choice."""
    found = re.search(r"\(?([ABCD])\)\s*" + word, text)
    return found.group(1) if found else "?"


def answer(text: str, asked: int) -> str:
    for key, (right, wrong, is_right) in ANSWERS.items():
        if key in text:
            said = right if is_right(asked) else wrong
            if key in ("photon", "helium"):
                letter = choice_letter(text, said)
                return rf"ANSWER: {letter}"
            return said
    return "2"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    options: argparse.Namespace
    asked: Counter[str] = Counter()
    answered = 0
    lock = threading.Lock()

    def log_message(self, *_: object) -> None: ...

    def say(self, value: object, status: int = 200) -> None:
        body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.options.behaviour == "never_ready":
            self.say({}, 503)
        elif self.path == "/v1/models":
            name = "another" if self.options.behaviour == "other_model" else self.options.name
            self.say({"object": "list", "data": [{"id": name, "object": "model"}]})
        else:
            self.say({})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        probe = body.get("max_tokens") == 1
        if self.options.behaviour == "garbage" and not probe:
            self.say("<html>", 200)
            return
        if self.options.behaviour == "slow" and not probe:
            time.sleep(1)
        choices = []
        with self.lock:
            with Path(self.options.log).open("a") as log:
                key = self.headers.get("Authorization")
                log.write(json.dumps({"path": self.path, "authorization": key, "body": body}) + "\n")
            for index in range(body.get("n") or 1):
                said = "maybe \\boxed{999} B </think> " + answer(text, Handler.asked[text])
                Handler.asked[text] += 1
                message = {"role": "assistant", "content": said}
                choices.append({"index": index, "finish_reason": "stop", "message": message})
            Handler.answered += not probe
            if self.options.behaviour == "dies" and Handler.answered > 3:
                print("out of memory", flush=True)
                os._exit(9)
        count = 5 * len(choices)
        usage = {"prompt_tokens": 10, "completion_tokens": count, "total_tokens": 10 + count}
        common = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
        self.say({**common, "choices": choices, "usage": usage})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--ready", type=Path)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--name", default="tiny")
    parser.add_argument("--behaviour", default="good")
    Handler.options = parser.parse_known_args()[0]
    server = ThreadingHTTPServer((Handler.options.host, Handler.options.port), Handler)
    if Handler.options.ready:
        Handler.options.ready.write_text(f"http://127.0.0.1:{server.server_port}")
    server.serve_forever()


if __name__ == "__main__":
    main()
