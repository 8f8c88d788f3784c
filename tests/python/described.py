"""Holds every answer that a test gets over httpx to the server's own OpenAPI document: the route, the status and the error's code
are documented, and the body (of a stream: each event) is valid. In replies, members that the document does not name are errors too.

`install` wraps httpx's clients; whatever is built on them (the OpenAI client) is checked as well.
"""

import copy
import json
import re
import tempfile
import urllib.request

import httpx
import jsonschema
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from loramux_server import Server

ADMIN_KEY = "an-admin-key-for-the-document"
# Statuses of any path: an unknown one, and one that does not have the method.
ELSEWHERE = {404: "route_not_found", 405: "method_not_allowed"}
BODY_BYTES_MAX = 4 << 20


class Document:
    """An OpenAPI document, compiled for checking answers."""

    def __init__(self, spec: dict):
        self.spec = spec
        self.operations = []
        for path, item in spec["paths"].items():
            pattern = re.sub(r"\\\{\w+\\\}", "(.+)", re.escape(path))
            self.operations += [(method.upper(), re.compile(pattern), path.count("{"), path, one) for method, one in item.items()]
        # `/adapters/validate` is no adapter's name.
        self.operations.sort(key=lambda operation: operation[2])
        closed = copy.deepcopy(spec)
        for name in replied(spec):
            close(closed["components"]["schemas"][name])
        self.registry = Registry().with_resource("urn:loramux", Resource(contents=closed, specification=DRAFT202012))
        self.validators = {}

    def operation(self, method: str, path: str):
        for known, pattern, _, template, operation in self.operations:
            if known == method and pattern.fullmatch(path):
                return template, operation
        return None, None

    def validator(self, schema: dict):
        text = json.dumps(schema).replace('"#/', '"urn:loramux#/')
        if text not in self.validators:
            self.validators[text] = jsonschema.Draft202012Validator(json.loads(text), registry=self.registry)
        return self.validators[text]

    def complaint(self, schema: dict, value) -> str | None:
        error = jsonschema.exceptions.best_match(self.validator(schema).iter_errors(value))
        return error and f"{list(error.absolute_path)}: {error.message[:500]}"


def close(schema):
    """Forbids what is not named."""
    if isinstance(schema, dict):
        if "properties" in schema and "additionalProperties" not in schema:
            schema["additionalProperties"] = False
        for member in schema.values():
            close(member)
    elif isinstance(schema, list):
        for member in schema:
            close(member)


def mentioned(node, found: set):
    if isinstance(node, dict):
        if "$ref" in node:
            found.add(node["$ref"].rsplit("/", 1)[1])
        for member in node.values():
            mentioned(member, found)
    elif isinstance(node, list):
        for member in node:
            mentioned(member, found)


def replied(spec: dict) -> set[str]:
    """Names of the schemas that replies are made of."""
    found: set[str] = set()
    mentioned([one["responses"] for item in spec["paths"].values() for one in item.values()], found)
    while True:
        more = set(found)
        for name in found:
            mentioned(spec["components"]["schemas"][name], more)
        if more == found:
            return found
        found = more


_document: Document | None = None
_is_loading = False


def document() -> Document:
    """Of a server with every route, started once and only for this."""
    global _document, _is_loading
    if _document is None:
        _is_loading = True
        try:
            with tempfile.TemporaryDirectory() as folder, Server("--admin-key", ADMIN_KEY, data_dir=folder) as server:
                with urllib.request.urlopen(f"{server.base}/openapi.json", timeout=30) as answer:
                    _document = Document(json.load(answer))
        finally:
            _is_loading = False
    return _document


class Answer:
    """What one answer has to be."""

    def __init__(self, response: httpx.Response):
        request = response.request
        self.method, self.path, self.status = request.method, request.url.path, response.status_code
        self.type = response.headers.get("content-type", "").split(";")[0]
        self.template, self.operation = document().operation(self.method, self.path)
        self.rest = b""

    def fail(self, what: str):
        raise AssertionError(f"{self.method} {self.path} ({self.template}), status {self.status}: not as /openapi.json says: {what}")

    def check_head(self):
        """The route and the status; gives the description of the answer, if there is one to hold it to."""
        known = {template for _, pattern, _, template, _ in document().operations if pattern.fullmatch(self.path)}
        if self.operation is None or (self.status == 405 and known):
            if self.status not in (*ELSEWHERE, 401, 403, 431) and self.method not in ("HEAD", "OPTIONS"):
                self.fail("the route is not documented")
            return None
        description = self.operation["responses"].get(str(self.status))
        if description is None and self.status == 404 and (self.path.startswith("/admin/") or self.path == "/server_info"):
            return None  # on the main port without an admin key there are none of these
        if description is None:
            self.fail("the status is not documented")
        return description

    def check_body(self, body: bytes):
        description = self.check_head()
        if description is None or self.method == "HEAD" or len(body) > BODY_BYTES_MAX:
            return
        content = description.get("content", {})
        if not body or not content:
            return
        if self.type not in content:
            self.fail(f"the type {self.type!r} is not documented; {sorted(content)} are")
        if self.type != "application/json":
            return
        value = json.loads(body)
        complaint = document().complaint(content[self.type]["schema"], value)
        if complaint:
            self.fail(complaint)
        code = value.get("code") or (value.get("error") or {}) if isinstance(value, dict) else None
        code = code.get("code") if isinstance(code, dict) else code
        if "x-codes" in description and code and code not in description["x-codes"]:
            self.fail(f"the code {code!r} is not documented; {description['x-codes']} are")

    def feed(self, piece: bytes):
        """Takes a piece of a stream and checks the events that are whole."""
        *events, self.rest = (self.rest + piece).split(b"\n\n")
        for event in events:
            data = [line.removeprefix(b"data: ") for line in event.split(b"\n") if line.startswith(b"data: ")]
            if data and data[0] != b"[DONE]":
                self.check_event(json.loads(data[0]))

    def check_event(self, value: dict):
        content = self.operation["responses"]["200"]["content"].get("text/event-stream")
        if content is None:
            self.fail("it is not documented as a stream")
        complaint = document().complaint(content["schema"]["properties"]["data"]["contentSchema"], value)
        if complaint:
            self.fail(f"{complaint}: {json.dumps(value)[:500]}")


def is_ours(response: httpx.Response) -> bool:
    """True for an answer of a live server."""
    if _is_loading or response.request.url.port is None:
        return False
    asked = f"{response.request.url.host}:{response.request.url.port}"
    return any(asked in (getattr(server, "address", None), getattr(server, "admin_address", None)) for server in Server.live)


class Tee(httpx.SyncByteStream):
    def __init__(self, inner, answer: Answer):
        self.inner, self.answer = inner, answer

    def __iter__(self):
        for piece in self.inner:
            self.answer.feed(piece)
            yield piece

    def close(self):
        self.inner.close()


class AsyncTee(httpx.AsyncByteStream):
    def __init__(self, inner, answer: Answer):
        self.inner, self.answer = inner, answer

    async def __aiter__(self):
        async for piece in self.inner:
            self.answer.feed(piece)
            yield piece

    async def aclose(self):
        await self.inner.aclose()


def check(response: httpx.Response, tee):
    """Checks what is there, and arranges for the rest."""
    answer = Answer(response)
    if answer.type == "text/event-stream" and answer.status == 200:
        answer.check_head()
        if hasattr(response, "_content"):
            answer.feed(response.content)
        else:
            response.stream = tee(response.stream, answer)
    elif hasattr(response, "_content"):
        answer.check_body(response.content)
    else:
        answer.check_head()


def install():
    """From now on every answer is checked."""
    send, async_send = httpx.Client.send, httpx.AsyncClient.send

    def checked(self, request, **settings):
        response = send(self, request, **settings)
        if is_ours(response):
            check(response, Tee)
        return response

    async def async_checked(self, request, **settings):
        response = await async_send(self, request, **settings)
        if is_ours(response):
            check(response, AsyncTee)
        return response

    httpx.Client.send, httpx.AsyncClient.send = checked, async_checked
