"""An HTTP server on 127.0.0.1 that serves a folder, with byte ranges, as buckets do."""

import contextlib
import http.server
import pathlib
import re
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def served(folder: pathlib.Path) -> Iterator[str]:
    """The address under which the files of ``folder`` can be read."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = folder / self.path.lstrip("/").partition("?")[0]
            if not path.is_file():
                # Buckets that must not be listed say "forbidden" of what is not there.
                self.send_response(403 if "bucket" in self.path else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content, code = path.read_bytes(), 200
            total = len(content)
            asked = re.match(r"bytes=(\d*)-(\d*)$", self.headers.get("Range", ""))
            start = 0
            if asked:
                code = 206
                start = int(asked[1]) if asked[1] else max(0, total - int(asked[2]))
                stop = int(asked[2]) + 1 if asked[1] and asked[2] else total
                content = content[start:stop]
            self.send_response(code)
            self.send_header("ETag", f'"{hash(path.read_bytes()):x}"')
            if code == 206:
                self.send_header("Content-Range", f"bytes {start}-{start + len(content) - 1}/{total}")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
