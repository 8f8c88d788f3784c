"""Who may use a private adapter: source x where its bytes are x token x route, on a server that shares its hub token and on one that does not.

Every adapter here is its owner's. Only the owner's token, asked of the source not longer ago than a positive answer is kept, opens it;
every other cell must look like an adapter that does not exist, whatever this server has in its caches.
"""

import asyncio
import itertools
import json
import re
import time
from dataclasses import dataclass

import pytest

import marker
from faults.asking import Answer, ask, complete, gather, marker_of
from faults.client import SERVER_TOKEN, FaultServer
from faults.serving import ADMIN_KEY, TIME_SCALE, SourcedServer

KEPT_S = 60 * TIME_SCALE  # a positive answer of the source
STATES = ("never", "disk", "host", "device", "restart")
SOURCES = ("hub", "gated", "s3", "gcs", "http")
# Sources whose private adapters a caller's own token can open: the others are the operator's alone.
OPEN_WITH_TOKEN = {"hub", "gated", "s3", "http"}
DENIED = ("none", "wrong", "empty", "revoked", "other", "api_key", "operator", "shape")
TOKENS = (*DENIED, "right")
ROUTES = (
    "completions header",
    "completions body",
    "completions bearer",
    "completions stream",
    "chat header",
    "chat body",
    "generate body",
    "adapter_id",
    "compose",
    "fan-out",
    "root header",
)


@dataclass(frozen=True)
class Cell:
    source: str
    state: str
    token: str
    route: str


def number(cell_source: str, state: str, share: bool) -> int:
    """The marker of the one adapter of this source and state."""
    return 30_000 + SOURCES.index(cell_source) * 100 + STATES.index(state) * 10 + share


def model_of(faults, source: str, i: int) -> str:
    return {
        "hub": f"hf://private-alice/m{i}",
        "gated": f"gated-alice/m{i}",
        "s3": f"s3://private-alice/loras/m{i}",
        "gcs": f"gs://private-alice/loras/m{i}",
        "http": f"{faults.url('http')}/private-alice/m{i}",
    }[source]


def secret(source: str, token: str) -> str | None:
    """What the caller sends for this kind of token."""
    if token == "none":
        return None
    if token in ("empty", "api_key", "operator", "shape"):
        return {"empty": "", "api_key": ADMIN_KEY, "operator": SERVER_TOKEN, "shape": '\u00e9{}[]" or 1=1'}[token]
    if source == "s3":
        return json.dumps({"aws_access_key_id": f"AK{token.upper()}", "aws_secret_access_key": "secret"}, separators=(",", ":"))
    if source == "http":
        return f"web_{token}000000000000000000000000000"
    return f"hf_{token}0000000000000000000000000000"


def grant(faults):
    """Alice's tokens read what is hers, Bob's what is his."""
    hers = ["private-alice/*", "gated-alice/*"]
    for token in ("right", "revoked"):
        faults.token(f"hf_{token}0000000000000000000000000000", hers)
        faults.token(f"AK{token.upper()}", hers)
        faults.token(f"web_{token}000000000000000000000000000", hers)
    faults.token("hf_other0000000000000000000000000000", ["private-bob/*", "gated-bob/*"])
    faults.token("AKOTHER", ["private-bob/*"])
    faults.token("web_other000000000000000000000000000", ["private-bob/*"])


def revoke(faults):
    faults.token("hf_revoked0000000000000000000000000000", None)
    faults.token("AKREVOKED", None)
    faults.token("web_revoked000000000000000000000000000", None)


def request(route: str, model: str, token: str | None) -> tuple[str, dict, dict]:
    """(path, body, headers)"""
    ask_marker = {"prompt": "Hi", **marker.ASK}
    in_header = {"x-adapter-token": token.encode("utf-8").decode("latin-1")} if token is not None else {}
    in_body = {"api_token": token} if token is not None else {}
    completions, chat = "/v1/completions", "/v1/chat/completions"
    hello = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "temperature": 0}
    match route:
        case "completions header":
            return completions, {"model": model, **ask_marker}, in_header
        case "completions body":
            return completions, {"model": model, **ask_marker, **in_body}, {}
        case "completions bearer":
            return (
                completions,
                {"model": model, **ask_marker},
                {"authorization": f"Bearer {token.encode().decode('latin-1')}"} if token is not None else {},
            )
        case "completions stream":
            return completions, {"model": model, **ask_marker, "stream": True, **in_body}, {}
        case "chat header":
            return chat, {"model": model, **hello}, in_header
        case "chat body":
            return chat, {"model": model, **hello, **in_body}, {}
        case "generate body":
            return "/generate", {"inputs": "Hi", "parameters": {"adapter_id": model, "max_new_tokens": 1, "details": True, **in_body}}, {}
        case "root header":
            return "/", {"inputs": "Hi", "parameters": {"adapter_id": model, "max_new_tokens": 1}}, in_header
        case "adapter_id":
            return completions, {"model": "demo", "adapter_id": model, **ask_marker, **in_body}, {}
        case "compose":
            return completions, {"model": "demo", "compose": [{"adapter": model, "weight": 1.0}], **ask_marker, **in_body}, {}
        case "fan-out":
            return completions, {"model": "demo", "adapters": ["base", model], **ask_marker, **in_body}, {}
    raise AssertionError(route)


def is_served(cell: Cell) -> bool:
    """Only the owner's token, where the request can carry it."""
    can_carry = cell.route != "completions bearer" or cell.source in ("hub", "gated")
    return cell.token == "right" and cell.source in OPEN_WITH_TOKEN and can_carry


def is_malformed(cell: Cell) -> bool:
    """True if the token has not the form that the source's credentials have: no byte of it is ever asked about."""
    token = secret(cell.source, cell.token)
    is_json = cell.source == "s3" and (token or "").startswith("{")
    return token is not None and (cell.token == "shape" or cell.source in ("s3", "gcs") and not is_json)


def complaint(cell: Cell, answer: Answer, i: int) -> str | None:
    """What is wrong with this answer; `None` if nothing."""
    if is_served(cell):
        if answer.status != 200:
            return "the owner was refused"
        if cell.route.startswith(("completions header", "completions body", "completions bearer", "adapter_id", "compose")) and marker_of(
            answer
        ) != marker.marker(i):
            return "the owner got another adapter"
        return None
    if answer.status == 200:
        return "SERVED"
    if is_malformed(cell) and answer.status in (400, 403, 422, 424) and answer.code in ("invalid_value", "source_forbidden"):
        return None  # what is no credential of this source, whatever it is for
    if any(name.startswith("x-adapter-") for name in answer.headers):
        return f"headers tell: {answer.headers}"
    lorax = cell.route in ("generate body", "root header")
    if (answer.status, answer.code) != ((424 if lorax else 404), "model_not_found"):
        return "not the answer of an adapter that does not exist"
    return None


def without_names(answer: Answer) -> str:
    """The body without the adapter's name and the request's id."""
    text = answer.body.decode()
    return re.sub(r"m3\d{4}|nothing-here", "X", re.sub(r'"request_id":"[^"]*"', "", text))


class Matrix:
    """One server's cells. `run` returns what is wrong."""

    def __init__(self, faults, share: bool, data_dir: str):
        self.faults, self.share, self.data_dir = faults, share, data_dir
        self.wrong, self.cells = [], 0
        # What each kind of refusal said: the same wherever the bytes are.
        self.words: dict[tuple, dict[str, Cell]] = {}
        self.not_found: set[str] = set()

    def start(self) -> SourcedServer:
        flags = ["--max-loras", "2", "--host-adapter-memory", "1MiB"] + (["--share-hub-token"] if self.share else [])
        return SourcedServer(self.faults, *flags, data_dir=self.data_dir)

    async def load(self, server, source: str, state: str, *tokens: str):
        """The owner uses the adapter, so that its bytes are here."""
        i = number(source, state, self.share)
        for token in tokens if source in OPEN_WITH_TOKEN else ():
            answer = await complete(server.address, model_of(self.faults, source, i), api_token=secret(source, token))
            assert answer.status == 200 and marker_of(answer) == marker.marker(i), f"{source} {state} {token}: {answer}"

    async def fill(self, server, count: int):
        """Other adapters are used, which push the older ones from device or host."""
        for answer in await gather([complete(server.address, f"public/m{31_000 + i}") for i in range(count)], at_once=8):
            assert answer.status == 200, str(answer)

    async def group(self, server, source: str, state: str):
        """All cells of one adapter: those to be refused first, so that they find the state as it was made."""
        i = number(source, state, self.share)
        model = model_of(self.faults, source, i)
        cells = [Cell(source, state, token, route) for token, route in itertools.product(TOKENS, ROUTES)]
        cells.sort(key=is_served)
        refused = [cell for cell in cells if not is_served(cell)]
        for part in (refused, cells[len(refused) :]):
            calls = []
            for cell in part:
                path, body, headers = request(cell.route, model, secret(source, cell.token))
                calls.append(ask(server.address, "POST", path, body, headers))
            for cell, answer in zip(part, await gather(calls, at_once=24)):
                self.cells += 1
                problem = complaint(cell, answer, i)
                if problem:
                    self.wrong.append(f"{cell} share={self.share}: {problem}: {answer}")
                elif not is_served(cell):
                    words = without_names(answer).replace(model.replace(f"m{i}", "X"), "MODEL")
                    self.words.setdefault((cell.source, cell.token, cell.route), {}).setdefault(words, cell)
                    if answer.code == "model_not_found":
                        self.not_found.add(re.sub(r"`[^`]*`", "`X`", words))

    async def shown(self, server):
        """No list and no card shows what callers named themselves."""
        for path in (
            "/v1/models",
            *(
                f"/v1/models/{model_of(self.faults, source, number(source, state, self.share)).replace('/', '%2F')}"
                for source in SOURCES
                for state in STATES
            ),
        ):
            answer = await ask(server.address, "GET", path)
            self.cells += 1
            told = [line for line in answer.body.decode().splitlines() if "alice" in line] if answer.status == 200 else []
            if told or answer.status not in (200, 404):
                self.wrong.append(f"{path} shows a private adapter: {told or answer}")

    async def first_life(self, server):
        grant(self.faults)
        for state in ("disk", "restart"):
            for source in SOURCES:
                await self.load(server, source, state, "revoked", "right")
        await self.fill(server, 30)
        for source in SOURCES:
            await self.load(server, source, "host", "revoked", "right")
        await self.fill(server, 2)
        for source in SOURCES:
            await self.load(server, source, "device", "revoked")
        revoke(self.faults)
        await asyncio.sleep(KEPT_S * 1.3)
        for state in ("never", "disk", "host"):
            for source in SOURCES:
                await self.group(server, source, state)
        for source in SOURCES:
            await self.load(server, source, "device", "right")
            await self.group(server, source, "device")
        await self.shown(server)

    async def second_life(self, server):
        for source in SOURCES:
            await self.group(server, source, "restart")
        await self.shown(server)


@pytest.fixture(scope="module")
def faults():
    with FaultServer() as server:
        yield server


def test_only_the_right_token_opens_a_private_adapter(faults, tmp_path):
    cells, wrong, started = 0, [], time.monotonic()
    for share in (False, True):
        matrix = Matrix(faults, share, str(tmp_path / f"share-{share}"))
        with matrix.start() as server:
            asyncio.run(matrix.first_life(server))
        with matrix.start() as server:
            asyncio.run(matrix.second_life(server))
            # A name that never existed is refused in the same words.
            nothing = asyncio.run(complete(server.address, "hf://private-alice/nothing-here"))
        assert nothing.code == "model_not_found"
        cells, wrong = cells + matrix.cells, wrong + matrix.wrong
        apart = {kind: words for kind, words in matrix.words.items() if len(words) > 1}
        assert apart == {}, f"refusals that tell where the bytes are: {apart}"
        assert len(matrix.not_found) <= 2, f"one text on the OpenAI routes, one on LoRAX's: {matrix.not_found}"
    print(f"{cells} cells in {time.monotonic() - started:.1f} s, {len(wrong)} wrong")
    for line in wrong:
        print(line[:400])
    assert cells >= 2000
    assert wrong == [], f"{len(wrong)} of {cells} cells, first:\n" + "\n".join(wrong[:8])


def test_a_hub_token_goes_to_the_hub_alone(faults):
    """Clients send their hub token as a bearer with every request. Other sources never see it."""
    with SourcedServer(faults) as server:
        mark = faults.mark()
        for i, source in enumerate(SOURCES):
            model = model_of(faults, source, 32_300 + i)
            asyncio.run(complete(server.address, model, headers={"authorization": "Bearer hf_ofTheHub"}))
        rows = faults.log(mark)
    assert any("hf_ofTheHub" in str(row["headers"]) for row in rows if row["dialect"] == "hub")
    assert [row for row in rows if row["dialect"] != "hub" and "hf_" in str(row["headers"])] == []


def test_metrics_do_not_name_what_callers_named(faults):
    """/metrics asks for no key: the names of private adapters are their callers' business."""
    grant(faults)
    with SourcedServer(faults) as server:
        for source in sorted(OPEN_WITH_TOKEN):
            answer = asyncio.run(complete(server.address, model_of(faults, source, 32_400), api_token=secret(source, "right")))
            assert answer.status == 200, str(answer)
        assert [line for line in server.http.get("/metrics").text.splitlines() if "alice" in line] == []


def test_a_revoked_token_stops_opening_within_the_time_an_answer_is_kept(faults):
    grant(faults)
    with SourcedServer(faults) as server:
        token, model = secret("hub", "revoked"), f"private-alice/m{32_000}"
        assert asyncio.run(complete(server.address, model, api_token=token)).status == 200
        revoke(faults)
        deadline = time.monotonic() + KEPT_S * 1.5
        while (answer := asyncio.run(complete(server.address, model, api_token=token))).status == 200:
            assert time.monotonic() < deadline, "still served"
            time.sleep(0.02)
        assert answer.code == "model_not_found"


def test_a_source_that_is_down_opens_nothing_and_says_so(faults):
    """Known bytes, right token, no answer of the source: 503, never "from the cache"."""
    grant(faults)
    with SourcedServer(faults) as server:
        for source in sorted(OPEN_WITH_TOKEN):
            model, token = model_of(faults, source, 32_100), secret(source, "right")
            assert asyncio.run(complete(server.address, model, api_token=token)).status == 200
            faults.rules({"do": "reset"})
            time.sleep(KEPT_S * 1.3)
            answer = asyncio.run(complete(server.address, model, api_token=token))
            assert (answer.status, answer.code) == (503, "adapter_auth_unavailable"), str(answer)
            assert int(answer.headers["retry-after"]) >= 1
            faults.rules()


def test_a_public_repository_that_becomes_private_is_closed(faults):
    faults.repo("acme/public-once", {"branches": {"main": {"marker": 32_200}}})
    with SourcedServer(faults) as server:
        assert asyncio.run(complete(server.address, "acme/public-once")).status == 200
        faults.repo("acme/public-once", {"branches": {"main": {"marker": 32_200}}, "private": True})
        time.sleep(KEPT_S * 1.3)
        assert asyncio.run(complete(server.address, "acme/public-once")).code == "model_not_found"
