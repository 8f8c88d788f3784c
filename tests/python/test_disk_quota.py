"""Adapter files that come and go on disk: a quota far smaller than what is served, and files that change where they lie."""

import asyncio
import os
import signal

import pytest

import marker
from faults.asking import complete, gather, marker_of
from faults.client import FaultServer
from faults.serving import SourcedServer, reference
from faults.world import marker_files
from loramux_server import wait_until

KIB = 200
QUOTA = 3 * (KIB + 16) * 1024


@pytest.fixture(scope="module")
def faults():
    with FaultServer() as server:
        yield server


def name(i: int) -> str:
    return f"acme/m{i}x{KIB}"


def ask(server, model: str, **more):
    return asyncio.run(complete(server.address, model, **more))


def stored_bytes(server) -> int:
    total = 0
    for path in (server.data / "store").rglob("adapter_*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            pass  # it went while we looked
    return total


def weights_of(server, i: int):
    """The stored weights of marker adapter i."""
    expected = marker_files(i, KIB)["adapter_model.safetensors"]
    found = [path for path in (server.data / "store").rglob("adapter_model.safetensors") if path.read_bytes() == expected]
    assert len(found) == 1, found
    return found[0]


def downloads(faults, mark: int, i: int) -> int:
    rows = faults.log(mark)
    return sum(row["method"] == "GET" and name(i) in row["path"] and "safetensors" in row["path"] and row["status"] == 200 for row in rows)


@pytest.mark.parametrize("host_memory", ["64MiB", "48KiB"], ids=["all fit host memory", "few fit host memory"])
def test_ten_adapters_on_a_disk_for_three(faults, host_memory):
    """Each answers right, in turn, together, and after the shard died under all of them; the disk never has more than it may."""
    numbers = range(200, 210)
    flags = ["--adapter-disk-quota", str(QUOTA), "--host-adapter-memory", host_memory]
    with SourcedServer(faults, *flags) as server:
        for i in numbers:
            put = server.admin("PUT", f"/adapters/a{i}?wait=600s", json={"ref": reference(faults, "s3", name(i))})
            assert put.status_code == 200, put.text
            assert stored_bytes(server) <= QUOTA
        for _ in range(2):
            for i in numbers:
                assert marker_of(ask(server, f"a{i}")) == marker.marker(i), i
                assert stored_bytes(server) <= QUOTA
        old = server.shard_pid()

        async def all_at_once():
            calls = [complete(server.address, f"a{i}", max_tokens=1500, ignore_eos=True) for i in numbers]
            answers = asyncio.ensure_future(gather(calls))
            while server.metric("vllm:num_requests_running") < 1 and not answers.done():
                await asyncio.sleep(0.005)
            assert not answers.done(), ("killed in the middle", [str(answer) for answer in answers.result()])
            os.kill(old, signal.SIGKILL)
            while not answers.done():
                assert stored_bytes(server) <= QUOTA
                await asyncio.sleep(0.02)
            return answers.result()

        for i, answer in zip(numbers, asyncio.run(all_at_once()), strict=True):
            assert marker_of(answer) == marker.marker(i), (i, str(answer))
        assert server.shard_pid() not in (None, old)
        for i in numbers:
            assert marker_of(ask(server, f"a{i}")) == marker.marker(i), i


@pytest.mark.parametrize("at", [3, 200, -9], ids=["length", "header", "weights"])
def test_a_byte_that_flips_under_a_running_server_is_fetched_again(faults, at):
    """Its host memory was given to others; what is read again is compared with what was read before."""
    with SourcedServer(faults, "--host-adapter-memory", "48KiB") as server:
        for i in (211, 212, 213, 214, 215):
            server.admin("PUT", f"/adapters/b{i}?wait=600s", json={"ref": reference(faults, "s3", name(i))}).raise_for_status()
        wait_until(lambda: server.admin("GET", "/adapters/b211").json()["residency"] == "disk", "it left host memory", 10)
        path = weights_of(server, 211)
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        os.chmod(path, 0o600)
        path.write_bytes(bytes(content))
        mark = faults.mark()
        assert marker_of(ask(server, "b211")) == marker.marker(211)
        assert downloads(faults, mark, 211) == 1
