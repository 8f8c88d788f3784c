"""Fault programs: which requests they hit, and what they do to the honest reply.

A rule is a JSON object: `dialect`, `method`, `path` (a regular expression, searched) choose requests; `skip` lets the first ones pass,
`times` ends it, `chance` leaves it to a seeded die; `do` names the fault and the other keys are its parameters (`RULE_KEYS` below are not). Rules are tried in order, and
the first that matches acts.
"""

import asyncio
import functools
import gzip
import random
import re
import zlib
from dataclasses import dataclass, field

from faults.wire1 import Reply, Request, reset

RULE_KEYS = {"dialect", "method", "path", "skip", "times", "chance", "do"}
HTML = b"<!doctype html><html><head><title>Sign in</title></head><body>Please sign in to the hotel network.</body></html>"
FOREVER_S = 3600.0


@dataclass
class Rule:
    do: str
    with_: dict = field(default_factory=dict)
    dialect: str | None = None
    method: str | None = None
    path: str | None = None
    skip: int = 0
    times: int | None = None
    chance: float = 1.0
    hits: int = 0
    die: random.Random = field(default_factory=lambda: random.Random(1))

    @classmethod
    def parse(cls, rule: dict) -> "Rule":
        if rule["do"] not in PROGRAMS:
            raise ValueError(f"unknown fault {rule['do']!r}; known: {', '.join(sorted(PROGRAMS))}")
        own = {name: rule[name] for name in RULE_KEYS if name in rule}
        return cls(with_={name: value for name, value in rule.items() if name not in RULE_KEYS}, **own)

    def takes(self, dialect: str, request: Request) -> bool:
        if self.dialect not in (None, dialect) or self.method not in (None, request.method):
            return False
        if self.path is not None and not re.search(self.path, request.path):
            return False
        if self.chance < 1 and self.die.random() >= self.chance:
            return False
        self.hits += 1
        return self.hits > self.skip and (self.times is None or self.hits <= self.skip + self.times)


class Exchange:
    """One request, its honest reply, and the means to answer."""

    def __init__(self, request: Request, reply: Reply, writer: asyncio.StreamWriter):
        self.request, self.reply, self.writer = request, reply, writer
        self.sent = 0  # bytes of the body
        self.keep_alive = True

    async def send(self, data: bytes, body: bool = True):
        self.writer.write(data)
        await self.writer.drain()
        self.sent += len(data) if body else 0

    async def head(self, length: int | None = None, **more: str):
        """Status line and headers; `length` is what they claim about the body."""
        claimed = len(self.reply.body) if length is None else length
        await self.send(self.reply.head_bytes(**{"Content-Length": str(claimed), **more}), body=False)

    async def body(self, data: bytes):
        if self.request.method != "HEAD":
            await self.send(data)

    async def honest(self):
        await self.head()
        await self.body(self.reply.body)

    def close(self):
        self.keep_alive = False

    def cut(self, hard: bool):
        self.keep_alive = False
        if hard:
            reset(self.writer)


async def _drop(x: Exchange, at: float = 0, hard: bool = True):
    """The connection ends at byte `at` of the body (below 1: that part of it)."""
    body = x.reply.body
    await x.head()
    await x.body(body[: int(at * len(body)) if at < 1 else int(at)])
    x.cut(hard)


async def _reset(x: Exchange):
    """No reply at all."""
    x.cut(True)


async def _truncate(x: Exchange, at: float = 0.5):
    """A complete reply with fewer bytes than the file has."""
    body = x.reply.body
    x.reply.body = body[: int(at * len(body)) if at < 1 else int(at)]
    await x.honest()


async def _longer(x: Exchange, more: int = 1000, claim: bool = True):
    """More bytes than the file has; `claim`: and Content-Length says so."""
    length = len(x.reply.body)
    if claim:
        x.reply.body += b"\0" * more
        await x.honest()
        return
    await x.head(length)
    await x.body(x.reply.body + b"\0" * more)
    x.close()


async def _delay(x: Exchange, seconds: float = 1.0):
    """Waits before the first byte of the reply."""
    await asyncio.sleep(seconds)
    await x.honest()


async def _hang(x: Exchange):
    """Never answers."""
    await asyncio.sleep(FOREVER_S)


async def _stall(x: Exchange, at: float = 0.5):
    """Goes silent at byte `at` of the body."""
    body = x.reply.body
    await x.head()
    await x.body(body[: int(at * len(body)) if at < 1 else int(at)])
    await asyncio.sleep(FOREVER_S)


async def _tarpit(x: Exchange, bytes_per_s: float = 50.0):
    """Every byte comes, slowly."""
    await x.head()
    for at in range(len(x.reply.body)):
        await x.body(x.reply.body[at : at + 1])
        await asyncio.sleep(1 / bytes_per_s)


async def _slow_head(x: Exchange, bytes_per_s: float = 5.0):
    """The headers come a byte at a time."""
    for byte in x.reply.head_bytes(**{"Content-Length": str(len(x.reply.body))}):
        await x.send(bytes([byte]), body=False)
        await asyncio.sleep(1 / bytes_per_s)
    await x.body(x.reply.body)


async def _status(x: Exchange, status: int, headers: dict | None = None, body: str = "the upstream's own words"):
    """Another status."""
    x.reply = Reply(status, {"Content-Type": "text/plain", **(headers or {})}, body.encode())
    await x.honest()


async def _html(x: Exchange, keep_headers: bool = False):
    """200 and a page for people."""
    headers = dict(x.reply.headers) if keep_headers else {}
    x.reply = Reply(200, {**headers, "Content-Type": "text/html"}, HTML)
    await x.honest()


async def _redirect(x: Exchange, to: str, status: int = 302):
    """Elsewhere. `{path}` in `to` is the request's path."""
    x.reply = Reply(status, {"Location": to.replace("{path}", x.request.path)})
    await x.honest()


async def _redirect_loop(x: Exchange, status: int = 302):
    """To itself, under a new query each time."""
    count = int(x.request.query.get("hop", "0")) + 1
    x.reply = Reply(status, {"Location": f"{x.request.path}?hop={count}"})
    await x.honest()


async def _headers(x: Exchange, set: dict):
    """The honest reply with other headers; null removes one."""
    names = {name.lower() for name in set}
    kept = {name: value for name, value in x.reply.headers.items() if name.lower() not in names}
    x.reply.headers = kept | {name: value for name, value in set.items() if value is not None}
    await x.honest()


async def _length(x: Exchange, claim: int, send: int | None = None):
    """A Content-Length that has nothing to do with the body."""
    await x.head(claim)
    await x.body(x.reply.body[:send] if send is not None else x.reply.body)
    x.close()


async def _no_length(x: Exchange):
    """A whole body whose end is the end of the connection."""
    await x.send(x.reply.head_bytes(Connection="close"), body=False)
    await x.body(x.reply.body)
    x.close()


async def _chunked(x: Exchange, cut: bool = False):
    """Chunks; `cut`: without the last one."""
    await x.send(x.reply.head_bytes(**{"Transfer-Encoding": "chunked"}), body=False)
    if x.request.method == "HEAD":
        return
    middle = len(x.reply.body) // 2
    for piece in (x.reply.body[:middle], x.reply.body[middle:]):
        await x.body(b"%x\r\n%s\r\n" % (len(piece), piece) if piece else b"")
        if cut:
            x.cut(False)
            return
    await x.body(b"0\r\n\r\n")


async def _flip(x: Exchange, at: float = 0.5, bit: int = 0):
    """One bit of the body is another."""
    if x.reply.body:
        body = bytearray(x.reply.body)
        place = min(len(body) - 1, int(at * len(body)) if at < 1 else int(at))
        body[place] ^= 1 << bit
        x.reply.body = bytes(body)
    await x.honest()


@functools.cache
def _bomb(zeros: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join(packer.compress(b"\0" * (1 << 20)) for _ in range(zeros >> 20)) + packer.flush()


async def _gzip(x: Exchange, bomb: int = 0):
    """Content-Encoding gzip nobody asked for; `bomb`: that many bytes of zeros behind it."""
    if bomb:
        x.reply.body = _bomb(bomb)
    else:
        x.reply.body = gzip.compress(x.reply.body)
    x.reply.headers["Content-Encoding"] = "gzip"
    await x.honest()


async def _endless(x: Exchange, bytes_max: int = 1 << 25):
    """A body without end (or until `bytes_max`, so that a broken reader does not fill the disk of whoever tests it)."""
    await x.send(x.reply.head_bytes(**{"Transfer-Encoding": "chunked"}), body=False)
    piece = b"10000\r\n" + b"\0" * 65536 + b"\r\n"
    while x.request.method != "HEAD" and x.sent < bytes_max:
        await x.body(piece)
        await asyncio.sleep(0)
    x.cut(False)


async def _garbage(x: Exchange):
    """Not HTTP."""
    await x.send(b"\x16\x03\x01\x02\x00 SSH-2.0-nonsense\r\n\r\n", body=False)
    x.close()


async def _huge_headers(x: Exchange, bytes_: int = 1 << 20):
    """A header that does not end where it should."""
    await x.head(**{"X-Padding": "p" * bytes_})
    await x.body(x.reply.body)


async def _no_range(x: Exchange):
    """Range is ignored: the reply is the whole file. `Dialect.answer` sees to it; here it is only sent."""
    await x.honest()


async def _bad_range(x: Exchange, shift: int = 7):
    """A 206 for other bytes than were asked for."""
    if x.reply.status == 206:
        start, rest = x.reply.headers["Content-Range"].removeprefix("bytes ").split("-", 1)
        x.reply.headers["Content-Range"] = f"bytes {int(start) + shift}-{rest}"
    await x.honest()


async def _pass(x: Exchange):
    """No fault; shields requests from later rules."""
    await x.honest()


PROGRAMS = {
    program.__name__.lstrip("_"): program
    for program in (
        _drop,
        _reset,
        _truncate,
        _longer,
        _delay,
        _hang,
        _stall,
        _tarpit,
        _slow_head,
        _status,
        _html,
        _redirect,
        _redirect_loop,
        _headers,
        _length,
        _no_length,
        _chunked,
        _flip,
        _gzip,
        _endless,
        _garbage,
        _huge_headers,
        _no_range,
        _bad_range,
        _pass,
    )
}


async def run(rule: Rule, x: Exchange):
    await PROGRAMS[rule.do](x, **rule.with_)
