#!/usr/bin/env python3
"""Wait until an OpenAI-compatible server answers one request with the model that was asked for.

    API_KEY=... probe.py --url http://127.0.0.1:8801 --model NAME [--pid PID --log FILE] --timeout SECONDS

First /health, then /v1/models where the server has it, then a chat completion of one token. Ends with status 0, or with
one line and status 1: the process PID ended, the time is over, or another model answers.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

REQUEST_S = 120  # the first request may have to compile kernels


class Refused(Exception):
    """One line for the user."""


class Server:
    def __init__(self, url: str, key: str) -> None:
        self.url, self.key = url, key
        self.headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # not through a proxy

    def ask(self, path: str, body: dict[str, Any] | None = None, timeout: float = 10) -> tuple[int, bytes]:
        """(status, answer); status 0: no answer."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self.headers)
        try:
            with self.opener.open(request, timeout=timeout) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except (OSError, http.client.HTTPException):
            return 0, b""


def last_line(log: Path | None) -> str:
    """What a program that died said last."""
    try:
        lines = [line for line in (log.read_text(errors="replace") if log else "").splitlines() if line.strip()]
    except OSError:
        lines = []
    return lines[-1].strip()[:300] if lines else "it said nothing"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for_health(server: Server, options: argparse.Namespace) -> None:
    start = said = time.monotonic()
    status = 0
    while True:
        if options.pid and not alive(options.pid):
            raise Refused(f"the server ended before it was ready: {last_line(options.log)}; see {options.log}")
        status, _ = server.ask("/health")
        if status == 200:
            return
        now = time.monotonic()
        if now - start > options.timeout:
            found = f"HTTP status {status}" if status else "no answer"
            raise Refused(f"{server.url}/health: expected status 200 within {options.timeout:g} s, found {found}")
        if now - said >= 30:
            print(f"waiting for the server ({now - start:.0f} s)", file=sys.stderr, flush=True)
            said = now
        time.sleep(1)


def check_names(server: Server, model: str) -> None:
    """transformers serve lists its download cache, or fails at that: then the request decides."""
    status, answer = server.ask("/v1/models")
    if status in (401, 403):
        raise Refused(f"{server.url}: refuses this API_KEY; is it another server?")
    try:
        names = [entry["id"] for entry in json.loads(answer)["data"]] if status == 200 else []
    except (ValueError, KeyError, TypeError):
        raise Refused(f"{server.url}/v1/models: expected a list of models, found {answer[:100]!r}") from None
    if names and model not in names and not model.startswith("/"):
        raise Refused(f"{server.url}: expected the model {model}, found {', '.join(names)}")


def check_answer(server: Server, model: str) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "1 + 1 ="}], "max_tokens": 1}
    status, answer = server.ask("/v1/chat/completions", body, timeout=REQUEST_S)
    text = answer[:200].decode(errors="replace").strip()
    if status != 200:
        raise Refused(f"{server.url}: a request of one token failed with status {status}: {text}")
    try:
        said = json.loads(answer)
        content, name = said["choices"][0]["message"]["content"], said.get("model", model)
    except (ValueError, KeyError, IndexError, TypeError):
        raise Refused(f"{server.url}: expected a chat completion, found {text!r}") from None
    if not isinstance(content, (str, type(None))):
        raise Refused(f"{server.url}: expected text in a chat completion, found {content!r}")
    # transformers serve adds the revision.
    if name not in (model, f"{model}@main"):
        raise Refused(f"{server.url}: expected an answer of the model {model}, found {name}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="of the server, without /v1")
    parser.add_argument("--model", required=True, help="its name in requests")
    parser.add_argument("--worker", action="append", default=[], help="URL of a worker behind a router")
    parser.add_argument("--pid", type=int, help="the process of the server: when it ends, so does the wait")
    parser.add_argument("--log", type=Path, help="its output, for the message")
    parser.add_argument("--timeout", type=float, required=True, help="seconds")
    options = parser.parse_args(argv)
    server = Server(options.url, os.environ.get("API_KEY", "EMPTY"))
    try:
        # sglang-router 0.2.1 lists its own models, which are none: its workers are asked.
        for one in [Server(url, server.key) for url in options.worker] or [server]:
            wait_for_health(one, options)
            check_names(one, options.model)
        wait_for_health(server, options)
        check_answer(server, options.model)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"the server at {server.url} answers with {options.model}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
