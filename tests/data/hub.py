"""Serve a folder of repositories by the protocol of the Hugging Face hub."""

import json
import threading
from functools import partial
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 50  # entries of a folder that are listed in one answer


class Hub:
    """Serves ``FOLDER/datasets/OWNER/NAME`` and ``FOLDER/models/OWNER/NAME``, each with the one branch ``main``.

    ``busy[path]`` lists the statuses that answer the next requests for a path. ``newer[name]`` lists the folders of
    later commits of a repository; the last of them is ``main``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.requests, self.busy, self.newer = folder, [], {}, {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def commits(self, kind: str, name: str) -> dict[str, Path]:
        """List the folder of each commit of a repository, the newest last."""
        folders = [self.folder / kind / name, *self.newer.get(name, [])]
        return {sha1(f"{name}@{number}".encode()).hexdigest(): folder for number, folder in enumerate(folders)}

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *args) -> None:
        self.hub = hub
        super().__init__(*args)

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        path = unquote(address.path).strip("/")
        self.hub.requests.append(f"{self.command} {path}")
        if statuses := self.hub.busy.get(path):
            return self.answer(statuses.pop(0), headers={"Retry-After": "0"})
        kind, *rest = path.removeprefix("api/").split("/")
        if not path.startswith("api/"):
            # models are at the root
            kind, rest = ("datasets", rest) if kind == "datasets" else ("models", [kind, *rest])
        if kind not in ("datasets", "models") or len(rest) < 2:
            return self.missing("EntryNotFound")
        commits = self.hub.commits(kind, "/".join(rest[:2]))
        if not all(folder.is_dir() for folder in commits.values()):
            return self.missing("RepoNotFound")
        command, revision, inside = next(iter(rest[2:]), None), next(iter(rest[3:]), "main"), "/".join(rest[4:])
        commit = list(commits)[-1] if revision == "main" else revision
        if commit not in commits:
            return self.missing("RevisionNotFound")
        folder = commits[commit]
        if command in (None, "revision"):
            return self.object({"id": "/".join(rest[:2]), "sha": commit, "siblings": []})
        if command == "tree":
            return self.tree(folder, inside, parse_qs(address.query))
        if command == "resolve" and (folder / inside).is_file():
            return self.file(folder / inside, commit)
        return self.missing("EntryNotFound", {"X-Repo-Commit": commit})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def tree(self, folder: Path, inside: str, query: dict[str, list[str]]) -> None:
        if not (folder / inside).is_dir():
            return self.missing("EntryNotFound")
        recursive = query.get("recursive", ["false"])[0].lower() == "true"
        found = sorted((folder / inside).rglob("*") if recursive else (folder / inside).iterdir())
        begin = int(query.get("cursor", ["0"])[0])
        entries = []
        for path in found[begin : begin + PAGE]:
            entry = {"path": path.relative_to(folder).as_posix(), "oid": sha1(str(path).encode()).hexdigest()}
            size = path.stat().st_size if path.is_file() else 0
            entries.append(entry | {"type": "file" if path.is_file() else "directory", "size": size})
        headers = {}
        if len(found) > begin + PAGE:
            following = f"{self.hub.url}{urlsplit(self.path).path}?recursive={recursive}&cursor={begin + PAGE}"
            headers["Link"] = f'<{following}>; rel="next"'
        return self.object(entries, headers)

    def file(self, path: Path, commit: str) -> None:
        content = path.read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range", "").removeprefix("bytes=")
        if not wanted:
            return self.answer(200, content, headers)
        first, _, last = wanted.partition("-")
        end = min(int(last) + 1 if last else len(content), len(content))
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
        return self.answer(206, content[int(first) : end], headers)

    def object(self, content: object, headers: dict[str, str] | None = None) -> None:
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def missing(self, code: str, headers: dict[str, str] | None = None) -> None:
        self.answer(404, b"{}", {"X-Error-Code": code, "X-Error-Message": code} | (headers or {}))

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args) -> None:
        pass
