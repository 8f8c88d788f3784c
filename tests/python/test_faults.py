"""Every fault of a source ends in the right state and the right code, leaves nothing behind, and the next good request is served."""

import asyncio
import os
import time

import pytest

import marker
from faults.asking import Answer, ask, complete, gather, marker_of
from faults.cells import ABSENT, CODES, FORBIDDEN, OK, REFUSED, RETRY, STATES, Cell, all_cells
from faults.client import FaultServer
from faults.serving import ADMIN, TIME_SCALE, SourcedServer, load_ms, reference
from loramux_server import wait_until

OLD = 40_000  # the marker of what in-place loads replace
FIRST = 41_000
WAIT_S = 1.5
AT_ONCE = 16


@pytest.fixture(scope="module")
def faults():
    with FaultServer() as server:
        yield server


@pytest.fixture(scope="module")
def server(faults):
    with SourcedServer(faults, "--adapter-loads", "64") as server:
        yield server


def outcome_of(answer: Answer) -> str:
    """Which of the outcomes an answer is, or its text if it is none."""
    for outcome, status in ((OK, 200), (RETRY, 503), (ABSENT, 404), (REFUSED, 422), (FORBIDDEN, 403)):
        if answer.status == status and (outcome == OK or answer.code in CODES[outcome]):
            if outcome == RETRY and not answer.headers.get("retry-after", "").isdigit():
                return f"503 without Retry-After: {answer}"
            return outcome
    return str(answer)


class Trial:
    """One cell's life on one server."""

    def __init__(self, server, faults, cell: Cell):
        self.server, self.faults, self.cell = server, faults, cell
        self.reference = reference(faults, cell.source, f"cells/m{cell.number}")
        self.name = f"cell-{cell.number}"
        self.problems = []
        self.seen = OK

    async def put(self, ref: str) -> Answer:
        return await ask(self.server.address, "PUT", f"/admin/v1/adapters/{self.name}?wait={load_ms(WAIT_S)}ms", {"ref": ref}, ADMIN)

    async def view(self) -> dict:
        return (await ask(self.server.address, "GET", f"/admin/v1/adapters/{self.name}", headers=ADMIN)).json()

    async def prepare(self):
        """Before the fault."""
        if self.cell.state == "in place":
            answer = await self.put(reference(self.faults, self.cell.source, f"cells/m{OLD}"))
            assert answer.status == 200, str(answer)

    async def meet(self):
        """While the fault is there."""
        expected = self.cell.mode.expected(self.cell.phase)
        if self.cell.state == "request":
            answer = await complete(self.server.address, self.reference, adapter_load_timeout_ms=load_ms(WAIT_S))
        else:
            answer = await self.put(self.reference)
        seen = RETRY if answer.status == 202 else outcome_of(answer)
        self.seen = seen
        if seen not in expected:
            self.problems.append(f"{seen}, not {' or '.join(sorted(expected))}: {answer}")
        if seen == OK and self.cell.state == "request" and marker_of(answer) != marker.marker(self.cell.number):
            self.problems.append("another adapter's marker")
        if self.cell.state == "in place" and seen != OK:
            old = await complete(self.server.address, self.name)
            if old.status != 200 or marker_of(old) != marker.marker(OLD):
                self.problems.append(f"the old version is gone: {old}")
        if self.cell.state == "registered" and seen != OK:
            await self.check_state(seen)

    async def check_state(self, seen: str):
        view = await self.view()
        state, error = view.get("state"), view.get("error") or {}
        if seen == RETRY and state not in ("failed", "resolving", "fetching", "verifying", "registered", "preparing"):
            self.problems.append(f"state {state}")
        if seen in (ABSENT, REFUSED, FORBIDDEN) and (state != "failed" or error.get("retryable") is not False):
            self.problems.append(f"state {state}, error {error}")

    async def recover(self):
        """After the fault is gone: the next good request is served. What was refused for good is kept so until somebody loads it again."""
        deadline, by_request = time.monotonic() + 12, self.cell.state == "request" and self.seen not in (REFUSED, FORBIDDEN)
        while True:
            if by_request:
                answer = await complete(self.server.address, self.reference)
                by_request = answer.status not in (422, 403)  # a later try of the same load was refused for good
            else:
                answer = await self.put(self.reference)
                if answer.status in (202, 503):  # it sleeps until its next try, which may be minutes away
                    await ask(self.server.address, "DELETE", f"/admin/v1/adapters/{self.name}", headers=ADMIN)
                    answer = await self.put(self.reference)
                if answer.status == 200:
                    answer = await complete(self.server.address, self.name)
            if answer.status == 200 and marker_of(answer) == marker.marker(self.cell.number):
                return
            if time.monotonic() > deadline:
                self.problems.append(f"no recovery: {answer}")
                return
            await asyncio.sleep(0.1)


# Connections that a client keeps for its next request: eight for each of the sources and the CDN, trusted or not.
KEPT_CONNECTIONS = 8 * 5


def has_more_files(before: dict, now: dict) -> bool:
    return now["others"] > before["others"] + 2 or now["sockets"] > before["sockets"] + KEPT_CONNECTIONS


def leaks(server, faults, files_before: dict) -> list[str]:
    """What a finished group may not leave; waits a moment for it to go."""
    found = []

    def clean() -> bool:
        status = server.admin("GET", "/status").json()
        downloads, store = status.get("downloads", {}), status.get("store", {})
        found[:] = [
            text
            for is_bad, text in (
                (server.temporary_files(), f"temporary files {server.temporary_files()[:5]}"),
                (any(downloads.values()), f"downloads {downloads}"),
                (store.get("reserved_bytes"), f"store {store}"),
                (has_more_files(files_before, server.open_files()), f"{server.open_files()} open files, {files_before} before"),
            )
            if is_bad
        ]
        return not found

    try:
        wait_until(clean, "nothing is left", 10)
    except AssertionError:
        pass
    return list(found)


async def run_group(server, faults, cells: list[Cell], at_once: int = AT_ONCE) -> list[Trial]:
    trials = [Trial(server, faults, cell) for cell in cells]
    faults.rules()
    await gather([trial.prepare() for trial in trials], at_once)
    faults.rules(*(rule for cell in cells for rule in cell.rules()))
    await gather([trial.meet() for trial in trials], at_once)
    faults.rules()
    await gather([trial.recover() for trial in trials], at_once)
    return trials


def groups() -> list[list[Cell]]:
    """Cells that run together: quick ones in hundreds, slow ones apart, since they hold what the others need."""
    cells = all_cells(FIRST)
    chosen = os.environ.get("LORAMUX_FAULT_MODE")
    cells = [cell for cell in cells if chosen is None or chosen in str(cell)]
    quick, slow = ([cell for cell in cells if cell.mode.slow is is_slow] for is_slow in (False, True))
    return [part[at : at + 96] for part in (quick, slow) for at in range(0, len(part), 96)]


def test_every_fault_ends_well(server, faults):
    wrong, count, started = [], 0, time.monotonic()
    assert asyncio.run(complete(server.address, reference(faults, "hub", "cells/m1"))).status == 200
    files_before, resident_before = server.open_files(), server.resident_bytes()
    for cells in groups():
        trials = asyncio.run(run_group(server, faults, cells, AT_ONCE if not cells[0].mode.slow else 48))
        count += len(trials)
        wrong += [f"{trial.cell} {problem}" for trial in trials for problem in trial.problems]
        wrong += [f"after {cells[0]} .. {cells[-1]}: {leak}" for leak in leaks(server, faults, files_before)]
    print(f"{count} cells in {time.monotonic() - started:.1f} s, {len(wrong)} wrong")
    for line in wrong:
        print(line[:600])
    assert wrong == [], f"{len(wrong)} of {count}, first: {wrong[0]}"
    assert "LORAMUX_FAULT_MODE" in os.environ or count >= 600
    assert server.resident_bytes() - resident_before < 512 << 20, "a bomb or an endless body was held in memory"
    assert server.metric("loramux_shard_restarts_total") == 0
    assert {cell.state for cells in groups() for cell in cells} == set(STATES)


def test_an_explicit_load_tries_at_once(server, faults):
    """Whatever the schedule of retries says: an operator who repaired the source need not wait for it."""
    where = f"/adapters/explicit?wait={load_ms(0.5)}ms"
    faults.rules({"do": "status", "status": 503, "path": "m49500"})
    body = {"ref": reference(faults, "http", "explicit/m49500")}
    deadline = time.monotonic() + 12
    while time.monotonic() < deadline:
        assert server.admin("PUT", where, json=body).status_code in (202, 503)
    faults.rules()
    time.sleep(5 * TIME_SCALE * 1.5)
    assert server.admin("PUT", where, json=body).status_code == 200


def test_bytes_that_were_refused_are_fetched_again(server, faults):
    """A bit that flipped on the way, where no hash shows it: the loader refuses it, and the next explicit load asks the source."""
    body = {"ref": reference(faults, "http", "flipped/m49501")}
    faults.rules({"do": "flip", "at": 8, "dialect": "http", "method": "GET", "path": "adapter_model", "times": 1})
    assert server.admin("PUT", "/adapters/flipped?wait=600s", json=body).status_code == 422
    faults.rules()
    time.sleep(5 * TIME_SCALE * 1.5)
    assert server.admin("PUT", "/adapters/flipped?wait=600s", json=body).status_code == 200


def test_a_retry_after_is_handed_on(server, faults):
    faults.rules({"do": "status", "status": 429, "headers": {"Retry-After": "17"}, "dialect": "hub"})
    answer = asyncio.run(complete(server.address, "wait/m49001"))
    faults.rules()
    assert answer.status == 503 and 1 <= int(answer.headers["retry-after"]) <= 17, str(answer)


def test_no_word_of_an_upstream_is_repeated(server, faults):
    """An upstream's error text may hold anything: it goes to nobody."""
    text = "UPSTREAM-SECRET-TEXT"
    for i, (source, status) in enumerate((source, status) for source in ("hub", "s3", "gcs", "http") for status in (400, 403, 429, 500)):
        faults.rules({"do": "status", "status": status, "body": text, "headers": {"X-Error-Message": text, "X-Error-Code": text}})
        answer = asyncio.run(complete(server.address, reference(faults, source, f"words/m{49_100 + i}")))
        assert answer.status >= 400 and text not in str(answer) + str(answer.headers)
    faults.rules()
    assert text not in server.log()


def test_a_full_disk_quota_evicts_or_refuses_and_recovers(faults):
    """Reserved before a download, kept after: never more on disk than the quota; an adapter that cannot fit says `disk_full` or is too large."""
    with SourcedServer(faults, "--adapter-disk-quota", "2MiB") as server:
        for i in range(12):
            assert marker_of(asyncio.run(complete(server.address, f"quota/m{49_200 + i}x400"))) == marker.marker(49_200 + i)
            used = sum(path.stat().st_size for path in (server.data / "store").rglob("adapter_*") if path.is_file())
            assert used <= 2 << 20, used
        answer = asyncio.run(complete(server.address, "quota/m49299x4000"))
        assert (answer.status, answer.code) in ((503, "disk_full"), (422, "adapter_too_large")), str(answer)
        assert marker_of(asyncio.run(complete(server.address, "quota/m49200x400"))) == marker.marker(49_200)
        assert leaks(server, faults, server.open_files()) == []


def test_one_slow_source_does_not_hold_up_another(server, faults):
    faults.rules({"do": "tarpit", "bytes_per_s": 5, "dialect": "http"})

    async def both():
        slow = [asyncio.create_task(complete(server.address, reference(faults, "http", f"slow/m{49_300 + i}"))) for i in range(20)]
        await asyncio.sleep(0.1)
        started = time.monotonic()
        quick = await gather(
            [
                complete(server.address, reference(faults, source, f"quick/m{49_400 + i}"))
                for i, source in enumerate(["hub", "s3", "gcs"] * 4)
            ]
        )
        took = time.monotonic() - started
        for one in slow:
            one.cancel()
        return quick, took

    quick, took = asyncio.run(both())
    faults.rules()
    assert [answer.status for answer in quick] == [200] * 12
    assert took < 2, f"{took:.2f} s"
