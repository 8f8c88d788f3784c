"""A small asyncio HTTP client: thousands of requests at once without a library's overhead, from as many local addresses as one likes."""

import asyncio
import json
import resource
from dataclasses import dataclass

import marker


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self):
        return json.loads(self.body)

    @property
    def code(self) -> str | None:
        """The error's code, in any of the envelopes; `None` for a good answer."""
        if self.status < 300:
            return None
        try:
            value = self.json()
        except ValueError:
            return None
        error = value.get("error")
        return error.get("code") if isinstance(error, dict) else value.get("code")

    def __str__(self):
        return f"{self.status} {self.body[:400].decode(errors='replace')}"


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return await reader.read()
    pieces = []
    while size := int((await reader.readline()).split(b";")[0], 16):
        pieces.append(await reader.readexactly(size))
        await reader.readline()
    return b"".join(pieces)


async def ask(
    address: str, method: str, path: str, body=None, headers: dict | None = None, timeout_s: float = 60, source: str | None = None
) -> Answer:
    """One request on a connection of its own."""
    host, port = address.rsplit(":", 1)
    content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()

    async def exchange() -> Answer:
        reader, writer = await asyncio.open_connection(host, int(port), local_addr=(source, 0) if source else None)
        try:
            lines = [
                f"{method} {path} HTTP/1.1",
                f"Host: {address}",
                "Connection: close",
                f"Content-Length: {len(content)}",
                "Content-Type: application/json",
                *(f"{name}: {value}" for name, value in (headers or {}).items()),
            ]
            writer.write("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + content)
            status = int((await reader.readline()).split(b" ")[1])
            answered = {}
            while line := (await reader.readline()).strip():
                name, _, value = line.decode("latin-1").partition(":")
                answered[name.lower()] = value.strip()
            return Answer(status, answered, await _body(reader, answered))
        finally:
            writer.close()

    return await asyncio.wait_for(exchange(), timeout_s)


async def complete(address: str, model: str, headers: dict | None = None, prompt="Hi", timeout_s: float = 60, **more) -> Answer:
    """A completion whose marker can be read."""
    return await ask(address, "POST", "/v1/completions", {"model": model, "prompt": prompt, **marker.ASK, **more}, headers, timeout_s)


def marker_of(answer: Answer) -> tuple[int, ...]:
    assert answer.status == 200, str(answer)
    return marker.read_marker(answer.json())


async def gather(calls, at_once: int = 64) -> list:
    """All of these coroutines, `at_once` at a time, results in order."""
    gate = asyncio.Semaphore(at_once)

    async def one(call):
        async with gate:
            return await call

    return await asyncio.gather(*(one(call) for call in calls))


def allow_files(count: int):
    """Raises this process's limit of open files, and so that of what it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= count, f"needs {count} open files; the hard limit is {hard}"
