"""A real HTTP server process that plays judges: `python playing_server.py PORT_FILE LOG`; the model's name is its part.

It writes its port into PORT_FILE when it listens, and one line per question into LOG before it answers.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

QUOTED = re.compile(r"\[answer ([12]) (\w+)\]\n(.*?)\n\[end of answer \1 \2\]", re.DOTALL)


def reply(part: str, asked: str) -> str | None:
    """What this judge says; None when it fails."""
    texts = {number: text for number, _, text in QUOTED.findall(asked)}
    coin = hashlib.sha256(asked.encode()).digest()[0] % 2
    if part in ("sensible", "slow", "half"):
        time.sleep(0.05 if part == "slow" else 0)
        longer = len(texts["1"]) - len(texts["2"])
        verdict = "TIE" if not longer else "1" if longer > 0 else "2"
        return (
            None if part == "half" and coin else f"They have {longer} characters between them.\n**VERDICT: {verdict}**"
        )
    says = {
        "first": "VERDICT: 1",
        "random": f"VERDICT: {1 + coin}",
        "gibberish": "lorem VERDICT: 1 or VERDICT: 2 ipsum",
    }
    return says.get(part)


class Player(BaseHTTPRequestHandler):
    """POST /v1/chat/completions."""

    log: Path

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = body["messages"][-1]["content"]
        with self.log.open("a") as file:
            file.write(json.dumps({"messages": body["messages"], "temperature": body["temperature"]}) + "\n")
        said = reply(body["model"], asked)
        status, answer = 400, {"error": {"message": "this judge is ill"}}
        if said is not None and self.path == "/v1/chat/completions":
            message = {"role": "assistant", "content": said}
            status, answer = 200, {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


if __name__ == "__main__":
    port_file, log = map(Path, sys.argv[1:])
    Player.log = log
    log.touch()
    with ThreadingHTTPServer(("127.0.0.1", 0), Player) as server:
        temporary = port_file.with_suffix(".tmp")
        temporary.write_text(str(server.server_address[1]))
        temporary.rename(port_file)
        server.serve_forever()
