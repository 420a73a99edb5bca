"""An OpenAI-compatible server with faults: prints its port, then serves until its standard input ends.

The name of the model says what becomes of the first, second, ... request for a prompt and seed; its last word holds
for all further ones: `500 drop ok` fails once, drops the connection once, then answers. GET /seen tells what was asked.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

lock = threading.Lock()
tries: Counter[str] = Counter()
seen: dict[str, Any] = {"requests": [], "most_at_once": 0, "authorization": []}
at_once = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.answer(200, seen)

    def do_POST(self) -> None:
        global at_once
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with lock:
            at_once += 1
            seen["most_at_once"] = max(seen["most_at_once"], at_once)
            seen["requests"].append({"path": self.path, **body})
            seen["authorization"].append(self.headers.get("Authorization"))
            asked = json.dumps([body.get("prompt"), body.get("messages"), body["seed"], body["model"]])
            script = body["model"].split()
            fault = script[min(tries[asked], len(script) - 1)]
            tries[asked] += 1
        try:
            self.act(fault, body)
        finally:
            with lock:
                at_once -= 1

    def act(self, fault: str, body: dict[str, Any]) -> None:
        if fault == "slow":
            time.sleep(1.0)
        elif fault == "busy":
            time.sleep(0.05)
        if fault == "drop":
            self.hang_up()
        elif fault == "half":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.wfile.flush()
            self.hang_up()
        elif fault == "html":
            self.answer(200, "<html>welcome</html>", raw=True)
        elif fault == "empty":
            self.answer(200, {"choices": []})
        elif fault == "strange":
            self.answer(200, {"result": "fine"})
        elif fault == "nologprobs" and "logprobs" in body:
            self.answer(400, {"error": {"message": "Logprobs are not supported"}})
        elif fault.isdigit():
            headers = {"Retry-After": "0.2"} if fault == "429" else {}
            self.answer(int(fault), {"error": f"no: {self.headers.get('Authorization')}"}, headers)
        else:
            self.answer(200, completion(body, 1 if fault == "one" else body["n"]))

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, status: int, body: Any, headers: dict[str, str] | None = None, *, raw: bool = False) -> None:
        content = (body if raw else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def completion(body: dict[str, Any], n: int) -> dict[str, Any]:
    """Choice i is two tokens, the second the seed plus i; even ones are stopped, odd ones cut."""
    chat, choices = "messages" in body, []
    for i in range(n):
        stopped = i % 2 == 0
        tokens = [" so", f" {body['seed'] + i}"] + ["</s>"] * stopped
        logprobs = [-0.5, -0.25] + [-0.125] * stopped
        listed = {"tokens": tokens, "token_logprobs": logprobs}
        if chat:
            listed = {"content": [{"token": t, "logprob": x} for t, x in zip(tokens, logprobs, strict=True)]}
        text = "".join(tokens[:2])
        said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choices.append({"index": i, "finish_reason": "stop" if stopped else "length", **said})
        if body.get("logprobs"):
            choices[-1]["logprobs"] = listed
    return {"choices": choices, "usage": {"completion_tokens": 3}}


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()
