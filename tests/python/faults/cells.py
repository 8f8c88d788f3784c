"""Fault cells: what is broken, in which reply, at which source, for an adapter in which state; and what must come of it.

Outcomes: `ok` served with its marker; `retry` 503, a Retry-After, and the next try is planned; `absent` 404 `model_not_found`;
`refused` 422; `forbidden` 403, a redirect to a host that the operator did not list. Where two are listed, the standard allows both (a reply may be read as either).
"""

from dataclasses import dataclass, field

SOURCES = ("hub", "s3", "gcs", "http")
PHASES = ("head", "config", "weights")
STATES = ("request", "registered", "in place")
RETRY, ABSENT, REFUSED, FORBIDDEN, OK = "retry", "absent", "refused", "forbidden", "ok"
ANY_FAILURE = {RETRY, ABSENT, REFUSED}
CODES = {
    RETRY: {"adapter_load_failed", "adapter_loading", "adapter_auth_unavailable"},
    ABSENT: {"model_not_found"},
    REFUSED: {"adapter_invalid", "adapter_unsupported", "adapter_too_large"},
    FORBIDDEN: {"source_forbidden"},
}


@dataclass(frozen=True)
class Mode:
    name: str
    do: str
    with_: dict = field(default_factory=dict, hash=False)
    # Outcomes of the request that meets the fault, by phase; `every` for those not named.
    every: frozenset = frozenset({RETRY})
    head: frozenset | None = None
    config: frozenset | None = None
    weights: frozenset | None = None
    only: tuple = PHASES
    sources: tuple = SOURCES
    slow: bool = False
    # Set: the fault passes after so many replies.
    times: int | None = None
    then: tuple = ()  # further rules behind the first

    def expected(self, phase: str) -> frozenset:
        return getattr(self, phase) or self.every


def _mode(name: str, do: str, every={RETRY}, slow=False, only=PHASES, sources=SOURCES, times=None, then=(), phases=None, **with_) -> Mode:
    named = {phase: frozenset(outcomes) for phase, outcomes in (phases or {}).items()}
    return Mode(name, do, with_, frozenset(every), only=only, sources=sources, slow=slow, times=times, then=then, **named)


BODY = ("config", "weights")
HEAD_COMPLETE = {"head": {OK, RETRY}}  # the head arrived whole before the connection broke
MODES = [
    _mode("reset", "reset"),
    _mode("drop at the start", "drop", at=0, phases=HEAD_COMPLETE),
    _mode("drop in the middle", "drop", at=0.5, only=BODY),
    _mode("drop before the last byte", "drop", at=0.999, only=BODY),
    _mode("end in the middle", "drop", at=0.5, hard=False, only=BODY),
    _mode("truncated, length agrees", "truncate", at=0.5, only=BODY),
    _mode("empty body", "truncate", at=0, only=BODY),
    _mode("longer, length agrees", "longer", only=BODY),
    _mode("longer than its length", "longer", claim=False, only=BODY, every={OK, RETRY}),
    _mode("length lies high", "length", claim=10**7, only=BODY),
    _mode("length lies low", "length", claim=10, only=BODY),
    _mode("length is absurd", "length", claim=10**13, every={RETRY, REFUSED}),
    _mode("garbage", "garbage"),
    _mode("huge headers", "huge_headers"),
    _mode("chunked", "chunked", every={OK}, only=BODY, sources=("hub", "http")),
    _mode("chunked, where a length is promised", "chunked", every={OK, RETRY}, only=BODY, sources=("s3", "gcs")),
    _mode("chunked and cut", "chunked", cut=True, only=BODY),
    _mode("no length", "no_length", every={OK}, only=BODY, sources=("hub", "http")),
    _mode("no length, where one is promised", "no_length", every={OK, RETRY}, only=BODY, sources=("s3", "gcs")),
    _mode("page for people", "html", every=ANY_FAILURE, phases={"config": {RETRY}, "weights": {RETRY}}),
    _mode("page with the file's headers", "html", keep_headers=True, only=BODY),
    _mode("gzip nobody asked for", "gzip", every={RETRY, REFUSED}, only=BODY),
    _mode("gzip bomb", "gzip", bomb=64 << 20, every={RETRY, REFUSED}, only=BODY),
    _mode("endless", "endless", every={RETRY, REFUSED}, only=BODY, sources=("hub", "s3", "gcs")),
    _mode("redirect loop", "redirect_loop", every=ANY_FAILURE | {FORBIDDEN}),
    _mode("redirect to metadata", "redirect", to="http://169.254.169.254{path}", every=ANY_FAILURE | {FORBIDDEN}),
    _mode("redirect to a closed host", "redirect", to="https://elsewhere.invalid{path}", every=ANY_FAILURE | {FORBIDDEN}),
    _mode("redirect without a place", "redirect", to="", every=ANY_FAILURE | {FORBIDDEN}),
    *[_mode(f"status {status}", "status", status=status, every={ABSENT}) for status in (401, 403, 404, 410)],
    _mode("status 400", "status", status=400, every={ABSENT, REFUSED}),
    *[_mode(f"status {status}", "status", status=status) for status in (408, 425, 500, 502, 503, 504)],
    _mode("status 429", "status", status=429, headers={"Retry-After": "1"}),
    _mode("status 429 with a rate limit", "status", status=429, headers={"RateLimit": '"api";r=0;t=1'}),
    _mode("status 503 with a long pause", "status", status=503, headers={"Retry-After": "20"}),
    _mode("status 206 unasked", "status", status=206, headers={"Content-Range": "bytes 0-9/10"}, every={RETRY, REFUSED}, only=BODY),
    _mode("flip in the first bytes", "flip", at=8, only=BODY, sources=("hub", "s3", "gcs"), every={RETRY, REFUSED}),
    _mode("flip near the end", "flip", at=0.98, only=("weights",), sources=("hub", "s3", "gcs"), every={RETRY, REFUSED}),
    _mode("weak etag that changes", "headers", set={"ETag": 'W/"x"'}, only=("weights",), sources=("s3", "gcs", "http"), every={OK, RETRY}),
    _mode(
        "etag is a path",
        "headers",
        set={"ETag": '"../../../x"', "X-Linked-ETag": '"../../../x"'},
        only=("head",),
        sources=("hub",),
        every=ANY_FAILURE,
    ),
    _mode("commit is a path", "headers", set={"X-Repo-Commit": "../../../x"}, only=("head",), sources=("hub",), every=ANY_FAILURE),
    _mode("no commit", "headers", set={"X-Repo-Commit": None}, only=("head",), sources=("hub",), every=ANY_FAILURE),
    _mode(
        "xet at a foreign host",
        "headers",
        set={"X-Xet-Hash": "a" * 64, "Link": '<http://10.0.0.1/xet>; rel="xet-auth"'},
        only=("head",),
        sources=("hub",),
        every={OK},
    ),
    # These pass by themselves within one load: the bytes that came stay, the rest is asked for.
    _mode("one drop, then good", "drop", at=0.5, times=1, every={OK}, only=BODY),
    _mode("one reset, then good", "reset", times=1, every={OK}, only=BODY),
    _mode("one 503, then good", "status", status=503, times=1, every={OK}, only=BODY),
    _mode("a drop, then no ranges", "drop", at=0.5, times=1, every={OK}, only=("weights",), then=({"do": "no_range"},)),
    _mode("a drop, then a wrong range", "drop", at=0.5, times=1, every={OK, RETRY}, only=("weights",), then=({"do": "bad_range"},)),
    _mode(
        "a drop, then another etag",
        "drop",
        at=0.5,
        times=1,
        every={OK, RETRY},
        only=("weights",),
        then=({"do": "headers", "set": {"ETag": '"changed"'}},),
    ),
    _mode("a flip once", "flip", at=8, times=1, every={OK, RETRY}, only=BODY, sources=("hub", "s3", "gcs")),
    _mode("a short delay", "delay", seconds=0.05, every={OK}),
    # Those that only time ends.
    _mode("hang", "hang", slow=True),
    _mode("stall", "stall", slow=True, only=BODY),
    _mode("tarpit", "tarpit", bytes_per_s=20, slow=True, only=BODY),
    _mode("slow headers", "slow_head", bytes_per_s=5, slow=True),
]


@dataclass(frozen=True)
class Cell:
    mode: Mode
    source: str
    phase: str
    state: str
    number: int  # its adapter's marker

    def __str__(self):
        return f"[{self.mode.name} | {self.source} | {self.phase} | {self.state}]"

    def rules(self) -> list[dict]:
        """The fault server's rules for this cell alone: they name its adapter."""
        head, file = self.phase == "head", "adapter_model" if self.phase == "weights" else "adapter_config"
        method = "HEAD" if head else "GET"
        place = {"dialect": self.source, "method": method, "path": f"/m{self.number}/.*{file}"}
        if self.source == "hub" and self.phase == "weights":
            place = {"dialect": "cdn", "method": method, "path": f"/m{self.number}/"}
        first = {"do": self.mode.do, **self.mode.with_, **place}
        if self.mode.times:
            first["times"] = self.mode.times
        return [first, *({**rule, **place} for rule in self.mode.then)]


def all_cells(first_number: int) -> list[Cell]:
    """Every mode at every source in every reply it can be in: met by a request, and by a registration (plain and in place, in turns)."""
    cells, turn = [], 0
    for mode in MODES:
        for source in mode.sources:
            for phase in mode.only:
                turn += 1
                for state in ("request", STATES[1 + turn % 2]):
                    cells.append(Cell(mode, source, phase, state, first_number + len(cells)))
    return cells
