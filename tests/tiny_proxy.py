"""A reverse proxy that serves a website under a path of its own, as nginx does: for the tests of the Space."""

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class Handler(BaseHTTPRequestHandler):
    """Passes what is under `path` on to `target`, without the path; everything else is not found."""

    path_prefix, target = "", ""

    def pass_on(self):
        if not self.path.startswith(self.path_prefix):
            # Browsers ask every host for this, and websites that have paths for others have one.
            return self.send_error(204 if self.path == "/favicon.ico" else 404)
        host = urlsplit(self.target).netloc
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
        connection = http.client.HTTPConnection(host, timeout=60)
        try:
            connection.request(self.command, self.path[len(self.path_prefix) :] or "/", body, {**headers, "Host": host})
            answer = connection.getresponse()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                    self.send_header(name, value)
            self.send_header("Connection", "close")
            self.end_headers()
            while part := answer.read1(2**16):
                self.wfile.write(part)
                self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):
            pass  # the browser has left
        finally:
            connection.close()
            self.close_connection = True

    do_GET = do_POST = do_HEAD = do_DELETE = pass_on

    def log_message(self, *_):
        pass


@contextmanager
def proxy(path: str) -> Iterator[tuple[str, Callable[[str], None]]]:
    """The proxy's address with the path, and a function that tells it which server to stand in front of."""
    handler = type("OneHandler", (Handler,), {"path_prefix": path})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}{path}", lambda target: setattr(handler, "target", target)
    finally:
        server.shutdown()
        server.server_close()
