"""Serve files with faults: dropped connections, busy answers, and silence."""

import socket
import threading
from collections import defaultdict
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server:
    """Serves the files of a folder.

    Each GET of a file takes one entry of ``faults[name]``. A number below 1 drops the connection after that share of
    the file. A number above 1 is the status of the answer. None is no fault. With an event, the answer waits for it.
    ``head_faults[name]`` lists the statuses of the next HEADs.

    ``ranges`` is ``none``, ``bytes`` or ``served``. With ``none``, clients read a file as one stream; else they request
    blocks of some megabytes. With ``bytes``, the header Range is ignored, as some servers do; ``served`` honours it.
    ``sent`` counts the bytes of all answers to GET.
    """

    def __init__(self, folder: Path) -> None:
        self.faults: dict[str, list[float | threading.Event | None]] = defaultdict(list)
        self.head_faults: dict[str, list[int]] = defaultdict(list)
        self.requests: list[str] = []
        self.ranges = "none"
        self.sent = 0
        self.lock = threading.Lock()
        self.tags: dict[str, str] = {}  # ETag of a file; none if not listed
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, owner: Server, *args, **others) -> None:
        self.owner = owner
        super().__init__(*args, **others)

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "none" if self.owner.ranges == "none" else "bytes")
        if tag := self.owner.tags.get(self.path.strip("/")):
            self.send_header("ETag", tag)
        super().end_headers()

    def do_HEAD(self) -> None:
        if statuses := self.owner.head_faults[self.path.strip("/")]:
            self.send_error(statuses.pop(0))
        else:
            super().do_HEAD()

    def do_GET(self) -> None:
        name = self.path.strip("/")
        self.owner.requests.append(name)
        faults = self.owner.faults[name]
        fault = faults.pop(0) if faults else None
        if isinstance(fault, threading.Event):
            fault.wait()
            fault = None
        wanted = self.headers.get("Range", "").removeprefix("bytes=")
        if fault is None and wanted and self.owner.ranges == "served":
            content = Path(self.translate_path(self.path)).read_bytes()
            first, last = map(int, wanted.split("-"))
            piece = content[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{first + len(piece) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(piece)))
            self.end_headers()
            self.count(len(piece))
            self.wfile.write(piece)
        elif fault is None:
            file = Path(self.translate_path(self.path))
            self.count(file.stat().st_size if file.exists() else 0)
            super().do_GET()
        elif fault > 1:
            self.send_error(int(fault))
        else:
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: int(fault * len(content))])
            self.wfile.flush()
            self.connection.close()

    def count(self, sent: int) -> None:
        with self.owner.lock:
            self.owner.sent += sent

    def log_message(self, format: str, *args) -> None:
        pass


class SilentServer:
    """Accepts connections and never answers. ``requests`` counts the connections."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def requests(self) -> int:
        return len(self.connections)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:  # it was closed
                return
            self.connections.append(connection)

    def close(self) -> None:
        self.socket.close()
        for connection in self.connections:
            connection.close()
