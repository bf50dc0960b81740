"""A stand-in for the Hub on 127.0.0.1: what huggingface_hub asks to create a repository and to commit files."""

import base64
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

from huggingface_hub import constants
from huggingface_hub.utils import close_session


class Hub(ThreadingHTTPServer):
    """Keeps repositories, commits and files. With `refuse`, every answer is that status. `delay` is in seconds."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.refuse, self.delay = None, 0.0
        self.created, self.commits, self.files, self.tokens = [], [], {}, set()
        self._objects = {}

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, method, path, body):
        """Return status and content for a request."""
        route = path.split("?")[0]
        if method == "PUT":
            self._objects[route.rsplit("/", 1)[1]] = body
            return 200, {}
        asked = [json.loads(line) for line in body.splitlines() if line] if route.count("/commit/") else None
        if asked is not None:
            return self._commit(route, asked)
        asked = json.loads(body or "{}")
        if route == "/api/repos/create":
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.created.append((name, asked.get("visibility") == "private" or asked.get("private") is True))
            return 200, {"url": f"{self.address}/{name}", "name": name}
        if route == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in route:
            modes = {True: "lfs", False: "regular"}
            names = [file["path"] for file in asked["files"]]
            return 200, {
                "files": [
                    {"path": n, "uploadMode": modes[n.endswith((".safetensors", ".bin", ".pt", ".pth"))],
                     "shouldIgnore": False, "oid": None} for n in names
                ]
            }  # fmt: skip
        if route.endswith("/info/lfs/objects/batch"):
            uploads = [
                {**o, "actions": {"upload": {"href": f"{self.address}/objects/{o['oid']}", "header": {}}}}
                for o in asked["objects"]
            ]
            return 200, {"transfer": "basic", "objects": uploads}
        return 200, {"sha": "0" * 40, "id": "me/x", "siblings": []}

    def _commit(self, route, lines):
        repository = "/".join(route.split("/")[3:5])
        added = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                added[value["path"]] = self._objects[value["oid"]]
        self.commits.append((repository, lines[0]["value"]["summary"], sorted(added)))
        self.files |= added
        return 200, {"commitUrl": f"{self.address}/{repository}/commit/1", "commitOid": "1", "success": True}


class _Handler(BaseHTTPRequestHandler):
    def _do(self):
        hub = self.server
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self._chunks()
        time.sleep(hub.delay)
        if self.command != "PUT":  # the address of an upload is its own permission
            hub.tokens.add(self.headers.get("Authorization"))
        refusal = (hub.refuse, {"error": "refused"})
        status, content = refusal if hub.refuse else hub.answer(self.command, self.path, body)
        answer = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = _do

    def _chunks(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(parts)

    def log_message(self, *args):
        pass


@contextmanager
def serving(monkeypatch):
    """Serve a Hub, and let huggingface_hub and transformers in this process use it."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))  # of retries
    close_session()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
        close_session()
