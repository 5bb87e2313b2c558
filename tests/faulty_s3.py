"""An S3 endpoint over HTTP on loopback that can be made to misbehave: a store behind a proxy that injects faults.

What passes is counted, so that a test can say how many requests an image costs.
"""

import http.client
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

Fault = str | None
"""None: none. slow_down: 503, not done. error: 500 after it was done. reset: the connection breaks, not done.
lost: it breaks after it was done. stall: no answer for `stall_seconds`.
truncate: half of the body, then a break. denied: 403. refused: 412."""
PASSING = ("slow_down", "error", "reset", "lost", "stall", "truncate")


class Store(NamedTuple):
    """Where an S3 store listens, and the keys of a user that it knows."""

    host: str
    port: int
    key: str = "test"
    secret: str = "test-secret"


@contextmanager
def moto() -> Iterator[Store]:
    """moto's server: it takes any keys, and checks no signatures."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield Store(*server.get_host_and_port())
    finally:
        server.stop()


class FaultyS3:
    """endpoint: of the proxy. choose(method, path) -> Fault, asked for every request. host: that it listens at."""

    def __init__(
        self, store: Store, choose: Callable[[str, str], Fault] = lambda method, path: None, host: str = "127.0.0.1"
    ):
        self.store, self.choose, self.stall_seconds = store, choose, 60.0
        self.requests: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        self.signed: list[bool] = []
        handler = type("Handler", (_Handler,), {"s3": self})
        self._server = _Server((host, 0), handler)
        self.host, self.endpoint = host, f"http://{host}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": self.store.key,
            "AWS_SECRET_ACCESS_KEY": self.store.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
            "NO_PROXY": self.host,
            "no_proxy": self.host,
        }

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def once(self, *faults: Fault, method: str = "", path: str = "") -> None:
        """The next requests of this kind meet these faults, one each."""
        left, lock = list(faults), threading.Lock()

        def choose(came: str, where: str) -> Fault:
            with lock:
                return left.pop(0) if left and method in came and path in where else None

        self.choose = choose


@contextmanager
def running(store: Store, host: str = "127.0.0.1") -> Iterator[FaultyS3]:
    s3 = FaultyS3(store, host=host)
    try:
        yield s3
    finally:
        s3.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address) -> None:
        pass  # broken connections are what this is for


class _Handler(BaseHTTPRequestHandler):
    s3: FaultyS3
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for the other side's acknowledgement

    def log_message(self, *args) -> None:
        pass

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.s3.choose(self.command, self.path)
        self.s3.requests[self.command] += 1
        self.s3.signed.append("Authorization" in self.headers)
        if fault:
            self.s3.injected[fault] += 1
        if fault == "slow_down":
            self._answer(503, {}, b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>")
        elif fault == "denied":
            self._answer(403, {}, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
        elif fault == "refused":
            self._answer(412, {}, b"<Error><Code>PreconditionFailed</Code></Error>")
        elif fault == "reset":
            self._break()
        elif fault == "stall":
            time.sleep(self.s3.stall_seconds)
            self._break()
        else:
            status, headers, data = self._forward(body)
            if fault == "error":
                self._answer(500, {}, b"<Error><Code>InternalError</Code><Message>We failed.</Message></Error>")
            elif fault == "lost" or (fault == "truncate" and not data):
                self._break()
            else:
                self._answer(status, headers, data, half=fault == "truncate")

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _any

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.s3.store.host, self.s3.store.port, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
        connection.request(self.command, self.path, body, headers | {"Host": self.headers["Host"]})
        answer = connection.getresponse()
        data = answer.read()
        kept = {n: v for n, v in answer.getheaders() if n.lower() not in ("connection", "transfer-encoding", "server")}
        connection.close()
        return answer.status, kept, data

    def _answer(self, status: int, headers: dict[str, str], data: bytes, half: bool = False) -> None:
        self.send_response_only(status)
        names = {name.lower() for name in headers}
        for name, value in headers.items():
            self.send_header(name, value)
        if "content-length" not in names:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if half else data)
        if half:
            self.wfile.flush()
            self._break()

    def _break(self) -> None:
        # Without lingering, closing sends a reset.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
        raise ConnectionAbortedError
