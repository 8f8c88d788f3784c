"""What the fault server has: adapters at every source, who may read them, and the rules that break them.

Names carry their content, so that ten thousand adapters need no registration: a path whose last segment is `m<i>` is marker adapter i,
`m<i>x<k>` the same padded by k KiB. What is private says so in its first segment: `private-<who>/...`. Anything else is registered.
"""

import base64
import functools
import hashlib
import json
import re
from collections import deque
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import marker
from adapter_files import with_header
from faults.programs import Rule
from faults.wire1 import Request

LOG_MAX = 400_000
FILES = ("adapter_config.json", "adapter_model.safetensors")
_NAMED = re.compile(r"m(\d+)(?:x(\d+))?$")


def padded(weights: bytes, kib: int) -> bytes:
    """The same tensors behind a longer header, for bodies that take more than one packet."""
    length = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + length])
    header["__metadata__"] = {"format": "pt", "padding": "p" * (kib * 1024)}
    return with_header(json.dumps(header, separators=(",", ":")).encode(), weights[8 + length :])


@functools.lru_cache(maxsize=4096)
def marker_files(i: int, kib: int) -> dict[str, bytes]:
    files = marker.files(i)
    if kib:
        files[FILES[1]] = padded(files[FILES[1]], kib)
    return files


def files_of(spec: dict) -> dict[str, bytes]:
    """`{"marker": i, "kib": k}` or `{"files": {name: base64}}`."""
    if "marker" in spec:
        return marker_files(spec["marker"], spec.get("kib", 0))
    return {name: base64.b64decode(text) for name, text in spec["files"].items()}


def spec_of_name(path: str) -> dict | None:
    """What a name that carries its content stands for."""
    found = _NAMED.fullmatch(path.rsplit("/", 1)[-1])
    return {"marker": int(found[1]), "kib": int(found[2] or 0)} if found else None


@functools.lru_cache(maxsize=65536)
def sha256_hex(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@functools.lru_cache(maxsize=65536)
def git_sha1_hex(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@functools.lru_cache(maxsize=65536)
def md5_hex(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


_CRC32C = []
for _byte in range(256):
    for _ in range(8):
        _byte = (_byte >> 1) ^ (0x82F63B78 if _byte & 1 else 0)
    _CRC32C.append(_byte)


@functools.lru_cache(maxsize=65536)
def crc32c(content: bytes) -> bytes:
    """CRC-32C, big endian."""
    value = 0xFFFFFFFF
    for byte in content:
        value = (value >> 8) ^ _CRC32C[(value ^ byte) & 0xFF]
    return (value ^ 0xFFFFFFFF).to_bytes(4, "big")


@dataclass
class World:
    # Hub: repository -> {"branches": {name: spec}, "private": bool, "gated": bool}. Others: "dialect:bucket/prefix" -> spec.
    repos: dict[str, dict] = field(default_factory=dict)
    objects: dict[str, dict] = field(default_factory=dict)
    # Credential (hub token, S3 access key, bearer of the others) -> globs of what it may read, private things included.
    tokens: dict[str, list[str]] = field(default_factory=dict)
    rules: list[Rule] = field(default_factory=list)
    settings: dict = field(default_factory=lambda: {"cdn": True, "checksums": True})
    log: deque = field(default_factory=lambda: deque(maxlen=LOG_MAX))
    seen: int = 0
    open_connections: dict[str, int] = field(default_factory=dict)

    def rule_for(self, dialect: str, request: Request) -> Rule | None:
        return next((rule for rule in self.rules if rule.takes(dialect, request)), None)

    def may_read(self, token: str | None, name: str, private: bool) -> bool:
        if not private:
            return True
        return any(fnmatchcase(name, glob) for glob in self.tokens.get(token or "", ()))

    def knows(self, token: str) -> bool:
        return token in self.tokens

    def object_files(self, dialect: str, prefix: str) -> dict[str, bytes] | None:
        spec = self.objects.get(f"{dialect}:{prefix}") or spec_of_name(prefix)
        return files_of(spec) if spec else None

    def repo(self, name: str) -> dict | None:
        """A registered repository, or the one that its name stands for."""
        if name in self.repos:
            return self.repos[name]
        spec = spec_of_name(name)
        return {"branches": {"main": spec}} if spec else None


def commit_of(repo: str, spec: dict) -> str:
    """The commit under which a repository holds this content."""
    return hashlib.sha1(f"{repo} {json.dumps(spec, sort_keys=True)}".encode()).hexdigest()


def is_private(name: str) -> bool:
    return name.startswith(("private-", "gated-"))
