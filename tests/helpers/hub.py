"""A local stand-in of the HTTP interface of the Hugging Face Hub: as much of it as an upload and a download use."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, file_download

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A server on this machine."""

    def __init__(self, folder: Path):
        self.folder, self.repositories, self.uploads = folder, {}, {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, name: str) -> dict[str, bytes]:
        return self.repositories[name]

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make huggingface_hub of this process talk to this server alone."""
        own = {"ENDPOINT": self.address, "HUGGINGFACE_CO_URL_TEMPLATE": self.address + "/{repo_id}/resolve/{revision}/{filename}"}
        for name, value in {**own, "HF_HUB_CACHE": f"{self.folder}/cache", "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(constants, name, value)
        name = "HUGGINGFACE_CO_URL_TEMPLATE"  # versions before 1.0 have a second one
        monkeypatch.setattr(file_download, name, own[name], raising=False)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.body()
        if self.path == "/api/repos/create":
            request = json.loads(body)
            name = "/".join(filter(None, (request.get("organization"), request["name"])))
            self.hub.repositories.setdefault(name, {})
            self.answer({"url": f"{self.hub.address}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            paths = [file["path"] for file in json.loads(body)["files"]]
            mode = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
            self.answer({"files": [{"path": path, "uploadMode": mode[path], "shouldIgnore": False} for path in paths]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = [{**o, "actions": {"upload": {"href": f"{self.hub.address}/lfs/{o['oid']}", "header": {}}}} for o in objects]
            self.answer({"transfer": "basic", "objects": upload})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.hub.files(match[1])[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    self.hub.files(match[1])[value["path"]] = self.hub.uploads[value["oid"]]
            address = f"{self.hub.address}/{match[1]}/commit/{COMMIT}"
            self.answer({"commitUrl": address, "commitOid": COMMIT, "success": True})
        else:
            self.answer({"error": f"no such address: POST {self.path}"}, 404)

    def do_PUT(self) -> None:
        body, oid = self.body(), self.path.removeprefix("/lfs/")
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.uploads[oid] = body
        self.answer({})

    def do_GET(self) -> None:
        path, _, _ = self.path.partition("?")
        if (match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/.+)?", path)) and match[1] in self.hub.repositories:
            siblings = [{"rfilename": path} for path in self.hub.files(match[1])]
            self.answer({"id": match[1], "modelId": match[1], "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
        elif (match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/.+", path)) and match[1] in self.hub.repositories:
            files = self.hub.files(match[1]).items()
            self.answer([{"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for p, c in files])
        elif (match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)) and match[2] in self.hub.repositories.get(match[1], {}):
            content = self.hub.files(match[1])[match[2]]
            self.answer(content, headers={"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT})
        else:
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
