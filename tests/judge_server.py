"""A stand-in for a language model at an OpenAI-compatible address on 127.0.0.1."""

import json
import re
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MARKED = re.compile(r"<(request|answer[ AB]*) ([0-9a-f]{8})>\n(.*?)\n</\1 \2>", re.DOTALL)


class JudgeServer(ThreadingHTTPServer):
    """Answers each question by `reply(texts)`, with the marked texts by their title. `asked` keeps the requests.

    `statuses` are statuses and headers of the next answers, before it answers questions, with `refusal` as their body.
    `delay` is in seconds.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.delay, self.statuses, self.models = prefers_long, 0.0, [], ["tiny-judge"]
        self.refusal = {"error": "later"}
        self.asked, self.keys, self.refused_keys = [], [], set()
        self.running, self.most = 0, 0

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


def texts_of(question):
    """Return the texts between the marks of a question by their title: `request`, `answer A`, .."""
    return {title: text for title, _, text in MARKED.findall(question)}


def prefers_long(texts):
    """Prefer the longer answer, whatever its place."""
    a, b = len(texts["answer A"]), len(texts["answer B"])
    return f"Reasons. [[{'A' if a > b else 'B' if b > a else 'C'}]]"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        key = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if key in self.server.refused_keys:
            return self._send(401, {"error": {"message": f"Incorrect API key provided: {key}"}})
        if self.server.models is None:
            return self._send(404, {"error": "no such path"})
        return self._send(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.running += 1
        server.most = max(server.most, server.running)
        server.asked.append(request)
        server.keys.append(self.headers.get("Authorization"))
        time.sleep(server.delay)
        server.running -= 1
        if server.statuses:
            status, headers = server.statuses.pop(0)
            return self._send(status, server.refusal, headers)
        answer = server.reply(texts_of(request["messages"][0]["content"]))
        message = answer if isinstance(answer, dict) else {"message": {"role": "assistant", "content": answer}}
        return self._send(200, {"choices": [{"finish_reason": "stop"} | message], "usage": {"total_tokens": 10}})

    def _send(self, status, content, headers=()):
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(OSError):  # the client has gone
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextmanager
def serving():
    """Serve a judge until the block is left."""
    server = JudgeServer()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
