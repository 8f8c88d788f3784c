"""Stands between a client and the server: bytes pass unchanged both ways, and a copy is read as HTTP when the client is done."""

import socket
import threading
from dataclasses import dataclass

PIECE_BYTES = 65536


@dataclass
class Exchange:
    """One request and what came back. `whole` is false where the client left before the end."""
    method: str
    path: str
    request: bytes
    status: int
    headers: dict[str, str]
    body: bytes
    whole: bool

    def __str__(self):
        return f"{self.method} {self.path} -> {self.status}"


@dataclass
class Message:
    """A request or a reply as it was sent."""
    first: str
    headers: dict[str, str]
    body: bytes
    whole: bool


def messages(data: bytes):
    """The HTTP/1.1 messages that were sent one after the other on a connection."""
    while data:
        head, mark, data = data.partition(b"\r\n\r\n")
        if not mark:
            return  # whoever sent it left within the head
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if headers.get("transfer-encoding", "").lower() == "chunked":
            body, data, whole = _chunks(data)
        else:
            length = int(headers.get("content-length", 0))
            body, data, whole = data[:length], data[length:], len(data) >= length
        yield Message(first, headers, body, whole)


def _chunks(data: bytes) -> tuple[bytes, bytes, bool]:
    body = b""
    while True:
        size, mark, rest = data.partition(b"\r\n")
        if not mark:
            return body, b"", False
        length = int(size.partition(b";")[0], 16)
        if len(rest) < length + 2:
            return body + rest[:length], b"", False
        body, data = body + rest[:length], rest[length + 2:]
        if length == 0:
            return body, data, True


class Tee:
    """`with Tee(server.address) as tee:` listens on `tee.base`; afterwards `tee.exchanges()` are what passed."""

    def __init__(self, address: str):
        host, _, port = address.rpartition(":")
        self.upstream = (host, int(port))
        self.connections: list[tuple[bytearray, bytearray]] = []
        self.sockets: list[socket.socket] = []
        self.lock = threading.Lock()

    def __enter__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.base = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        with self.lock:
            self.listener.close()
            for each in self.sockets:
                _end(each)

    def exchanges(self) -> list[Exchange]:
        """All requests with their replies, connection by connection."""
        found = []
        for sent, received in self.connections:
            replies = [reply for reply in messages(bytes(received)) if not reply.first.startswith("HTTP/1.1 1")]
            for request, reply in zip(messages(bytes(sent)), replies):
                method, path, _ = request.first.split(" ", 2)
                found.append(Exchange(method, path, request.body, int(reply.first.split(" ")[1]), reply.headers, reply.body, reply.whole))
        return found

    def _accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return  # closed
            server = socket.create_connection(self.upstream)
            copies = (bytearray(), bytearray())
            with self.lock:
                self.connections.append(copies)
                self.sockets += [client, server]
            for source, sink, copy in ((client, server, copies[0]), (server, client, copies[1])):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=_pass_on, args=(source, sink, copy), daemon=True).start()


def _pass_on(source: socket.socket, sink: socket.socket, copy: bytearray):
    """Until either side ends; then the other side ends too, as it would without us."""
    try:
        while piece := source.recv(PIECE_BYTES):
            copy += piece
            sink.sendall(piece)
    except OSError:
        pass
    _end(sink)
    _end(source)


def _end(each: socket.socket):
    try:
        each.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    each.close()
