"""A child process that answers as vLLM's admin routes do; run by test_fleet.py.

Its token count grows with every look at its metrics, unless it is told to be busy and stuck, or
to say nothing of tokens (mute).

    python tests/helpers/fake_engine.py PORT [--stuck] [--mute] [--fail] [--sleepless]

What is posted stands in its log.
"""

import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

tokens = 0


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        global tokens
        if self.path == "/metrics" and "--stuck" not in sys.argv:
            tokens += 5
        bodies = {
            "/health": "",
            "/ready": "",
            "/metrics": ""
            if "--mute" in sys.argv
            else f"vllm:generation_tokens_total {tokens}\nvllm:num_requests_running 1\n",
            "/v1/models": '{"data": [{"id": "fake"}]}',
        }
        body = bodies.get(self.path)
        self.send_response(404 if body is None else 200)
        self.end_headers()
        self.wfile.write((body or "").encode())

    def do_POST(self) -> None:
        print(self.path, flush=True)
        self.send_response(404 if "--sleepless" in sys.argv else 200)
        self.end_headers()

    def do_PUT(self) -> None:
        self.send_response(400)
        self.end_headers()
        self.wfile.write(b"beta: must be positive")

    def log_message(self, *_: object) -> None:
        pass


if "--fail" in sys.argv:
    sys.exit("RuntimeError: no memory left")
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
