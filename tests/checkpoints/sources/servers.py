"""Stand-ins for Hugging Face and Kaggle, as far as their libraries ask, with the faults that tests want."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from kagglesdk import kaggle_env

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Headers = dict[str, str]


class Server:
    """Serves files, and remembers what was asked of it.

    Attributes:
        files: what there is, by name; to be changed as a test likes.
        requests: method and path of every request so far, without the query.
        fault: given method and path, the status and headers to answer with instead of what was asked for.
        cut: how many bytes of a file are sent before the connection breaks off, by name.
        cuts: how often that happens.
        swapped: the content that is sent for a file, whatever was announced.
        gate: no file is sent before it is set.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = dict(files)
        self.requests: list[tuple[str, str]] = []
        self.fault: Callable[[str, str], tuple[int, Headers] | None] = lambda method, path: None
        self.cut: dict[str, int] = {}
        self.cuts = 1
        self.swapped: dict[str, bytes] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.url = ""

    def answer(self, request: Request) -> None:
        """Answer a request that no fault is meant for."""
        raise NotImplementedError

    def downloads(self) -> list[str]:
        """The names of the files whose content was asked for, in order."""
        raise NotImplementedError

    def send_file(self, request: Request, name: str, headers: Headers) -> None:
        if request.command != "HEAD":
            self.gate.wait(60)
        content = self.swapped.get(name, self.files[name])
        span = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        start = int(span[1]) if span else 0
        headers = {**headers, "Accept-Ranges": "bytes", "Content-Length": str(len(content) - start)}
        if span:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        request.head(206 if span else 200, headers)
        body = content[start:]
        if name in self.cut and self.cuts > 0 and request.command != "HEAD":
            self.cuts -= 1
            body = content[start : self.cut[name]]
            request.close_connection = True
        if request.command != "HEAD":
            request.wfile.write(body)


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stand_in: Server

    @property
    def asked(self) -> str:
        """The path, without the query."""
        return urllib.parse.unquote(self.path.partition("?")[0])

    def log_message(self, *args: object) -> None:
        pass

    def handle_all(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.asked
        self.stand_in.requests.append((self.command, path))
        fault = self.stand_in.fault(self.command, path)
        if fault is None:
            self.stand_in.answer(self)
        else:
            self.head(fault[0], {"Content-Length": "0", **fault[1]})

    do_GET = do_HEAD = do_POST = handle_all  # noqa: N815

    def head(self, status: int, headers: Headers) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/octet-stream", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def send_json(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.head(200, {"Content-Type": "application/json", "Content-Length": str(len(content))})
        self.wfile.write(content)


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Who asked has gone away."""


@contextlib.contextmanager
def serving(server: Server) -> Iterator[Server]:
    """Let a server answer at its `url`."""
    http = _Quiet(("127.0.0.1", 0), type("Bound", (Request,), {"stand_in": server}))
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


class HuggingFace(Server):
    """One repository, of any name, whose branch `main` is at `commit`.

    Attributes:
        commit: what its branches and tags are at.
        revisions: names of these.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(files)
        self.commit = COMMIT
        self.revisions = {"main"}

    def answer(self, request: Request) -> None:
        path = request.asked
        if found := re.fullmatch(r"/api/models/[^/]+/[^/]+(?:/revision/(.+))?", path):
            if (found[1] or "main") not in self.revisions | {self.commit}:
                request.head(404, {"X-Error-Code": "RevisionNotFound", "Content-Length": "0"})
            else:
                request.send_json({"id": "someone/model", "sha": self.commit, "siblings": []})
        elif re.fullmatch(rf"/api/models/[^/]+/[^/]+/tree/{self.commit}", path):
            request.send_json([self._entry(name) for name in self.files])
        elif (found := re.fullmatch(rf"/[^/]+/[^/]+/resolve/(?:{self.commit}|main)/(.+)", path)) and found[
            1
        ] in self.files:
            size = {"X-Linked-Size": str(len(self.files[found[1]]))}
            etag = {"X-Repo-Commit": self.commit, "ETag": f'"{self._hash(found[1])}"'}
            self.send_file(request, found[1], {**size, **etag})
        else:
            request.head(404, {"X-Error-Code": "EntryNotFound", "Content-Length": "0"})

    def downloads(self) -> list[str]:
        return [
            path.partition(f"{self.commit}/")[2]
            for method, path in self.requests
            if (method, "/resolve/" in path) == ("GET", True)
        ]

    def _hash(self, name: str) -> str:
        """As git-lfs names what is large, and git the rest."""
        content = self.files[name]
        if name.endswith(".json"):
            return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return hashlib.sha256(content).hexdigest()

    def _entry(self, name: str) -> dict[str, object]:
        size, digest = len(self.files[name]), self._hash(name)
        entry: dict[str, object] = {"type": "file", "path": name, "size": size, "oid": digest[:40]}
        return entry if len(digest) == 40 else {**entry, "lfs": {"size": size, "oid": digest, "pointerSize": 130}}


class Kaggle(Server):
    """One model, of any name, whose newest version is `version`; files come from a storage that it redirects to.

    Attributes:
        version: the newest.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(files)
        self.version = 3

    def answer(self, request: Request) -> None:
        path = request.asked
        if path.endswith("/GetModelInstance"):
            request.send_json({"id": 1, "versionNumber": self.version})
        elif path.endswith("/DownloadModelInstanceVersion"):
            asked = json.loads(request.body)
            name = asked["path"]
            # So that `requests` has it; the library sends all in the body.
            self.requests[-1] = ("POST", f"{path}/{asked['versionNumber']}/{name}")
            if name in self.files:
                request.head(302, {"Location": f"{self.url}/storage/{name}", "Content-Length": "0"})
            else:
                request.head(404, {"Content-Length": "0"})
        elif path.startswith("/storage/"):
            name = path.removeprefix("/storage/")
            digest = base64.b64encode(hashlib.md5(self.files[name]).digest()).decode()
            self.send_file(request, name, {"x-goog-hash": f"crc32c=AAAAAA==,md5={digest}"})
        else:
            request.head(404, {"Content-Length": "0"})

    def downloads(self) -> list[str]:
        return [path.removeprefix("/storage/") for _, path in self.requests if path.startswith("/storage/")]


def isolate(monkeypatch: pytest.MonkeyPatch, folder: Path, hugging_face: str, kaggle: str) -> None:
    """Point the libraries, as they are in this process, to stand-ins and to empty caches, without any account.

    Args:
        monkeypatch: of the test.
        folder: for the caches, in its folders `hugging_face` and `kaggle`.
        hugging_face: address to ask for Hugging Face.
        kaggle: for Kaggle.
    """
    for name in [*os.environ]:
        if name.startswith(("HF_", "HUGGING", "KAGGLE")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(folder))
    constants = huggingface_hub.constants
    # Read from the environment when the library was imported.
    monkeypatch.setattr(constants, "ENDPOINT", hugging_face)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hugging_face}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hugging_face"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(folder / "stored_tokens"))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(folder / "harnesses.json"), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, kaggle)
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(folder / "kaggle"))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(folder / "kaggle_config"))


def in_a_process(script: str, folder: Path, hugging_face: str, kaggle: str, **variables: str) -> subprocess.Popen[str]:
    """Start Python with `resolve` imported, with the libraries as `isolate` sets them."""
    start = (
        "from kagglesdk import kaggle_env\n"
        f"kaggle_env._env_to_endpoint[kaggle_env.KaggleEnv.PROD] = {kaggle!r}\n"
        "from gemma2_keras.checkpoints.hub import resolve\n"
    )
    keras = {name: value for name, value in os.environ.items() if name.startswith(("KERAS", "TF_", "OMP"))}
    own = {"HOME": str(folder), "HF_HUB_CACHE": str(folder / "hugging_face"), "KAGGLEHUB_CACHE": str(folder / "kaggle")}
    return subprocess.Popen(
        [sys.executable, "-c", start + script],
        cwd=Path(__file__).resolve().parents[3],
        env={"PATH": "/usr/bin:/bin", **keras, **own, "HF_ENDPOINT": hugging_face, **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
