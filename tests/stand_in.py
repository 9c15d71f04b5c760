"""A web server on this machine that replaces an unreachable one and records its requests."""

import http.server
import threading


class StandIn:
    """Answers with what `respond` returns, until it is closed. `requests` are those so far: "GET /path"."""

    protocol = "HTTP/1.1"

    def __init__(self):
        self.requests = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = self.protocol

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.requests.append(f"{self.command} {self.path}")
                status, headers, content = outer.respond(self.command, self.path, self.headers, body)
                self.send_response(status)
                for name, value in {"Content-Length": len(content), **headers}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_HEAD = do_POST = do_PUT = do_CONNECT = answer

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def respond(self, method, path, headers, body):
        """Status, headers and content."""
        raise NotImplementedError

    def close(self):
        self.server.shutdown()
        self.server.server_close()
