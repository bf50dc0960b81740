"""Serve the answers of a stand-in for vLLM or text-embeddings-inference on 127.0.0.1."""

import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


@contextmanager
def served(stand_in):
    """Give the address of a stand-in.

    `stand_in.answer(path, body)` returns status and content. A GET needs the token "word", but `GET /` of
    text-embeddings-inference, which answers with 200 and nothing.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if stand_in.kind == "tei" and self.path == "/":
                self._send(200, None)
            elif self.headers.get("Authorization") == "Bearer word":
                self._send(*stand_in.answer(self.path, None))
            else:
                self._send(401, {"error": "Unauthorized"})

        def do_POST(self):
            length = int(self.headers["Content-Length"])
            self._send(*stand_in.answer(self.path, json.loads(self.rfile.read(length))))

        def _send(self, status, content):
            data = b"" if content is None else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
