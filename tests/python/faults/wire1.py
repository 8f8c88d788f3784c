"""HTTP/1.1, only as much as a fault server needs: every byte of a reply is under its control."""

import asyncio
import socket
import struct
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

HEAD_MAX = 64 * 1024
REASONS = {
    200: "OK",
    206: "Partial Content",
    301: "Moved Permanently",
    302: "Found",
    303: "See Other",
    307: "Temporary Redirect",
    308: "Permanent Redirect",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    408: "Request Timeout",
    410: "Gone",
    412: "Precondition Failed",
    416: "Range Not Satisfiable",
    425: "Too Early",
    429: "Too Many Requests",
    500: "Internal Server Error",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}


@dataclass
class Request:
    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes = b""
    path: str = ""  # percent-decoded
    query: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        parts = urlsplit(self.target)
        self.path = unquote(parts.path)
        self.query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name), None)

    def bearer(self) -> str | None:
        value = self.header("authorization") or ""
        return value[7:] if value.lower().startswith("bearer ") else None


@dataclass
class Reply:
    """What an honest server would say. Fault programs bend it."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    def head_bytes(self, **more: str) -> bytes:
        headers = {**self.headers, **more}
        lines = [f"HTTP/1.1 {self.status} {REASONS.get(self.status, 'Unknown')}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def text_reply(status: int, text: str, **headers: str) -> Reply:
    return Reply(
        status, {"Content-Type": "text/plain", **{name.replace("_", "-"): value for name, value in headers.items()}}, text.encode()
    )


def file_reply(request: Request, content: bytes, etag: str, headers: dict[str, str]) -> Reply:
    """A file with Range, If-Range and If-Match."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", "ETag": etag, **headers}
    if_match = request.header("if-match")
    if if_match and if_match != "*" and etag not in [one.strip() for one in if_match.split(",")]:
        return text_reply(412, "precondition failed")
    wanted = request.header("range")
    if_range = request.header("if-range")
    if wanted and wanted.startswith("bytes=") and (if_range is None or if_range == etag):
        first, _, last = wanted[6:].partition("-")
        if first == "":
            start, end = max(0, len(content) - int(last)), len(content) - 1
        else:
            start, end = int(first), min(int(last), len(content) - 1) if last else len(content) - 1
        if start >= len(content) or end < start:
            return Reply(416, {"Content-Range": f"bytes */{len(content)}"})
        return Reply(206, {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"}, content[start : end + 1])
    return Reply(200, headers, content)


async def read_request(reader: asyncio.StreamReader) -> Request | None:
    """The next request of a connection; `None` at its end."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
        return None
    first, *lines = head[:-4].decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ", 2)
    headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    request = Request(method, target, headers)
    length = int(request.header("content-length") or 0)
    if length:
        request.body = await reader.readexactly(length)
    return request


def reset(writer: asyncio.StreamWriter):
    """Ends the connection with RST instead of FIN."""
    raw = writer.get_extra_info("socket")
    if raw is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
