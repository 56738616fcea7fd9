"""A function for Weir in plain Python: it listens on $PORT and says when it is ready.

GET  /v2/health/ready   the health check
POST /hello             {"name": "you"} -> {"message": "Hello, you!", ...}
GET  /stream?n=5        n server-sent events, one each 200 ms
"""

import json
import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

GREETING = os.environ.get("GREETING", "Hello")
INSTANCE = os.environ.get("WEIR_INSTANCE_ID", "none")


class Hello(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept and used again

    def do_GET(self):
        url = urlsplit(self.path)
        if url.path == "/v2/health/ready":
            self.answer(200, {"status": "ready"})
        elif url.path == "/hello":
            self.hello({})
        elif url.path == "/stream":
            self.stream(parse_qs(url.query))
        else:
            self.answer(404, {"error": "there are /hello and /stream"})

    def do_POST(self):
        if "transfer-encoding" in self.headers:
            # The body stays unread, so the connection can't be used again.
            self.close_connection = True
            return self.answer(411, {"error": "send a content-length"})
        body = self.rfile.read(int(self.headers.get("content-length", "0")))
        if urlsplit(self.path).path != "/hello":
            return self.answer(404, {"error": "POST /hello"})
        try:
            asked = json.loads(body or "{}")
        except ValueError as error:
            return self.answer(400, {"error": f"the body is not JSON: {error}"})
        if not isinstance(asked, dict):
            return self.answer(400, {"error": "the body must be an object"})
        self.hello(asked)

    def hello(self, asked):
        name = asked.get("name", "world")
        self.answer(200, {"message": f"{GREETING}, {name}!", "instance": INSTANCE})

    def stream(self, query):
        try:
            count = int(query.get("n", ["5"])[0])
        except ValueError:
            return self.answer(400, {"error": "n must be a number"})
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("cache-control", "no-store")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        try:
            for i in range(count):
                self.chunk(f"data: {json.dumps({'n': i})}\n\n".encode())
                time.sleep(0.2)
            self.wfile.write(b"0\r\n\r\n")
        except OSError:  # the caller left
            self.close_connection = True

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()

    def answer(self, status, value):
        body = json.dumps(value).encode() + b"\n"
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        if "/v2/health/" not in self.path:
            super().log_message(format, *args)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


if __name__ == "__main__":
    with Server(("127.0.0.1", int(os.environ["PORT"])), Hello) as server:
        server.serve_forever()
