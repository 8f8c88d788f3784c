"""Nothing a caller writes makes the server connect where the operator did not say, or read a file outside the allowed roots.

Listeners on every local address count connections, and the kernel's table of connections is watched for attempts to reach others.
"""

import asyncio
import os
import socket
import time
from pathlib import Path

import pytest

from faults.asking import Answer, ask, complete, gather, marker_of
from faults.client import FaultServer
from faults.corpus import HOSTS, urls
from faults.listening import Canary, Watch
from faults.serving import ADMIN, SourcedServer, load_ms, write_named
from loramux_server import wait_until
import marker


@pytest.fixture(scope="module")
def faults():
    with FaultServer() as server:
        yield server


@pytest.fixture(scope="module")
def canary():
    canary = Canary()
    yield canary
    canary.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("roots") / "allowed"
    write_named(root, "m1")
    return root


@pytest.fixture(scope="module")
def server(faults, root):
    """The fault server's port is allowed, and 127.0.0.0/8 is open: only the list of hosts stands before the listener."""
    with SourcedServer(faults, "--adapter-root", str(root)) as server:
        yield server


@pytest.fixture(scope="module")
def listed(faults, canary):
    """The operator listed the bad hosts themselves, but opened no network: only the guard of addresses stands before the listener."""
    hosts = [
        f"http://{host}" + port
        for host in ("127.0.0.1", "localhost", "[::1]", "169.254.169.254", "10.0.0.1", "*.internal", "metadata")
        for port in ("", f":{canary.port}")
    ]
    flags = [part for host in hosts for part in ("--adapter-http-hosts", host)]
    with SourcedServer(faults, *flags, networks=None) as server:
        yield server


def watched(server, faults) -> Watch:
    return Watch(server.pid, {*faults.ports.values(), int(server.address.rsplit(":", 1)[1])})


async def try_all(server, references: list[str]) -> list[tuple[str, str, Answer]]:
    """Each reference through every door: a dynamic model, LoRAX's field with its source, the runtime routes, the admin API."""

    def doors(text: str):
        yield "model", complete(server.address, text, adapter_load_timeout_ms=load_ms(3))
        yield "adapter_id", ask(
            server.address,
            "POST",
            "/v1/completions",
            {"model": "demo", "prompt": "x", "max_tokens": 1, "adapter_id": text, "adapter_source": "http"},
        )
        yield "lora_path", ask(server.address, "POST", "/v1/load_lora_adapter", {"lora_name": "probe", "lora_path": text}, ADMIN)
        yield "validate", ask(server.address, "POST", "/admin/v1/adapters/validate", {"ref": text}, ADMIN)

    pairs = [(text, door, call) for text in references for door, call in doors(text)]
    answers = await gather([call for _, _, call in pairs], at_once=32)
    return [(text, door, answer) for (text, door, _), answer in zip(pairs, answers)]


def assert_refused(results):
    for text, door, answer in results:
        good = answer.status == 200 and not (door == "validate" and answer.json().get("ok") is False)
        assert not good, f"{door} {text!r}: {answer}"
        assert answer.status < 500 or answer.status == 503, f"{door} {text!r}: {answer}"


def test_the_listener_sees_who_comes(faults):
    """What the other tests rely on: where the operator lets it, this server does connect, and that is noticed."""
    canary = Canary()
    with SourcedServer(faults, "--adapter-http-hosts", f"http://127.0.0.1:{canary.port}") as server:
        watch = watched(server, faults)
        assert (
            asyncio.run(complete(server.address, f"http://127.0.0.1:{canary.port}/x/m1", adapter_load_timeout_ms=load_ms(2))).status == 503
        )
        wait_until(lambda: canary.connects, "a connection")
        watch.stop()
    canary.close()


def test_no_url_of_the_corpus_reaches_anything(server, faults, canary):
    allowed = f"127.0.0.1:{faults.ports['http']}"
    corpus = urls(canary.port, allowed)
    assert len(corpus) >= 500
    watch, mark = watched(server, faults), faults.mark()
    results = asyncio.run(try_all(server, corpus))
    strays = watch.stop()
    assert_refused(results)
    assert canary.connects == [], canary.connects[:5]
    assert strays == set()
    # `m1` with a query or behind userinfo may not have been taken for the allowed host either.
    assert [row["target"] for row in faults.log(mark) if row["dialect"] == "http"] == []
    assert marker_of(asyncio.run(complete(server.address, f"{faults.url('http')}/ok/m3"))) == marker.marker(3), "the allowed host works"


def test_listed_hosts_still_may_not_be_internal_addresses(listed, faults, canary):
    bad = [f"http://{host}{port}/x/m1" for host in HOSTS for port in ("", f":{canary.port}")]
    watch = watched(listed, faults)
    results = asyncio.run(try_all(listed, bad))
    strays = watch.stop()
    assert_refused(results)
    assert canary.connects == [] and strays == set(), (canary.connects[:5], strays)


def test_redirects_lead_nowhere_they_should_not(server, faults, canary):
    """From the plain server, the hub and its CDN: to every bad host, for the first and for later requests."""
    targets = [
        f"{scheme}://{host}:{canary.port}{{path}}"
        for host in HOSTS
        for scheme in ("http", "https")
        if "@" not in host and ord(max(host)) < 128
    ]
    targets += [
        f"//127.0.0.1:{canary.port}{{path}}",
        f"http:\\\\127.0.0.1:{canary.port}",
        "file:///etc/passwd",
        "gopher://127.0.0.1/",
        "",
        "http://",
        "\\\\host\\share",
        f"http://user:pass@127.0.0.1:{canary.port}/",
    ]
    watch, n = watched(server, faults), 20_000
    for place, (dialect, where, method) in enumerate(
        [("http", "/r{}/", None), ("hub", "/r{}/", None), ("hub", "/r{}/", "GET"), ("cdn", "/repos/r{}/", None)]
    ):
        rules, models = [], []
        for i, target in enumerate(targets):
            name = f"{place}x{i}"
            rules.append(
                {
                    "do": "redirect",
                    "dialect": dialect,
                    "method": method,
                    "path": where.format(name).rstrip("/") + "[/%]",
                    "to": target,
                    "status": (301, 302, 303, 307, 308)[i % 5],
                }
            )
            models.append(f"{faults.url('http')}/r{name}/m{n + i}" if dialect == "http" else f"hf://r{name}/m{n + i}")
        faults.rules(*rules)
        answers = asyncio.run(
            gather([complete(server.address, model, adapter_load_timeout_ms=load_ms(1.5)) for model in models], at_once=24)
        )
        for model, answer, target in zip(models, answers, targets):
            assert answer.status in (400, 403, 404, 422, 503), f"{model} -> {target}: {answer}"
        assert any(hits for hits in faults.ask("hits")), f"no redirect of {dialect} was ever followed or seen"
    faults.rules()
    assert canary.connects == [] and watch.stop() == set()


def test_credentials_of_callers_name_no_endpoints(server, faults, canary):
    """A caller's own credential is a key, not a configuration: endpoints, proxies and token addresses in it are not for use."""
    evil = f"http://127.0.0.1:{canary.port}"
    tokens = [
        '{"aws_access_key_id":"A","aws_secret_access_key":"B","aws_endpoint_url":"%s"}',
        '{"aws_access_key_id":"A","aws_secret_access_key":"B","endpoint":"%s"}',
        '{"aws_access_key_id":"A","aws_secret_access_key":"B","aws_endpoint":"%s","aws_allow_http":"true"}',
        '{"aws_container_credentials_full_uri":"%s"}',
        '{"aws_metadata_endpoint":"%s"}',
        '{"gcs_base_url":"%s","disable_oauth":true,"client_email":"a","private_key":"","private_key_id":""}',
        '{"type":"authorized_user","client_id":"a","client_secret":"b","refresh_token":"c","token_uri":"%s"}',
        '{"type":"service_account","client_email":"a","private_key":"b","private_key_id":"c","token_uri":"%s"}',
        '{"type":"external_account","credential_source":{"url":"%s"}}',
        "%s",
        "x\r\nHost: %s",
    ]
    calls = [
        ask(
            server.address,
            "POST",
            "/v1/completions",
            {"model": f"{scheme}://bucket/c{i}/m{i}", "prompt": "x", "max_tokens": 1, "api_token": token % evil},
        )
        for i, token in enumerate(tokens)
        for scheme in ("s3", "gs", "hf")
    ]
    for answer in asyncio.run(gather(calls)):
        assert answer.status in (400, 403, 404, 422, 503), str(answer)
    assert canary.connects == []


def test_evil_names_in_headers_stay_out_of_paths(server, faults):
    """ETag, commit and hash headers are for comparing; what is no hash is refused."""
    bad = [
        '"../../../../tmp/evil"',
        "../evil",
        "/etc/passwd",
        '"%2e%2e%2fevil"',
        '""',
        '"' + "g" * 64 + '"',
        '"' + "a" * 63 + '"',
        'W/"' + "a" * 40 + '"',
        "a\\b",
        '"nul%00"',
        "sha256:" + "a" * 64,
        '"' + "A" * 40 + '" , "b"',
    ]
    rules, models = [], []
    for i, value in enumerate(bad):
        for header in ("ETag", "X-Linked-ETag", "X-Repo-Commit", "X-Linked-Size"):
            name = f"evil{i}{header.lower().replace('-', '')}"
            value_here = value.strip('"') if header == "X-Repo-Commit" else value
            rules.append(
                {
                    "do": "headers",
                    "dialect": "hub",
                    "path": f"/{name}/",
                    "set": {header: value_here} | ({"X-Linked-ETag": value} if header == "ETag" else {}),
                }
            )
            models.append(f"{name}/m{21_000 + len(models)}")
    faults.rules(*rules)
    before = outside(server)
    answers = asyncio.run(gather([complete(server.address, model, adapter_load_timeout_ms=load_ms(2)) for model in models], at_once=16))
    faults.rules()
    for model, rule, answer in zip(models, rules, answers):
        if "X-Linked-Size" in rule["set"]:
            assert answer.status in (200, 404, 422, 503), f"{model}: {answer}"
        else:
            assert answer.status in (404, 422, 503), f"{model} {rule['set']}: {answer}"
    assert outside(server) == before, "no file appeared outside the store"


def outside(server) -> set[str]:
    """Names right above the data directory and in /tmp that a path trick would make."""
    return {
        path.name
        for folder in (server.data.parent, Path("/tmp"))
        for path in folder.iterdir()
        if "evil" in path.name or "passwd" in path.name
    }


def test_paths_stay_below_their_root(server, root, tmp_path_factory):
    outside_dir = root.parent / "outside"
    write_named(outside_dir, "m2")
    write_named(root.parent, "allowed-not/m2")
    (root / "link-out").symlink_to(outside_dir / "m2")
    (root / "link-up").symlink_to("../outside/m2")
    (root / "link-in").symlink_to("m1")
    (root / "link-loop").symlink_to("link-loop")
    (root / "link-proc").symlink_to(f"/proc/{os.getpid()}/cwd")
    half = root / "half"
    half.mkdir()
    (half / "adapter_config.json").symlink_to(root / "m1/adapter_config.json")
    (half / "adapter_model.safetensors").symlink_to(outside_dir / "m2/adapter_model.safetensors")
    inner = root / "inner"
    inner.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (inner / name).symlink_to(f"../m1/{name}")
    bad = [
        f"{root}/../outside/m2",
        f"{root}/m1/../../outside/m2",
        f"{root}-not/m2",
        str(outside_dir / "m2"),
        f"{root}/link-out",
        f"{root}/link-up",
        f"{root}/link-loop",
        f"{root}/link-proc",
        f"{root}/half",
        f"file://{outside_dir}/m2",
        f"file://localhost{outside_dir}/m2",
        f"file://{root}/../outside/m2",
        f"{root}/%2e%2e/outside/m2",
        f"{root}/..%2foutside/m2",
        f"{root}\\..\\outside\\m2",
        f"{root}/m1\0",
        f"{root}//../outside/m2",
        f"{root}/./../outside/m2",
        "/",
        "//",
        str(root),
        "/etc",
        "/etc/passwd",
        "/dev/stdin",
        "/proc/self",
        "/proc/self/root",
        f"/proc/self/root{outside_dir}/m2",
        "/dev/fd/0",
        "~",
        "~/x",
        "../outside/m2",
        "..",
        ".",
        "./m1",
        "a/../b",
        "m1/..",
        "..%2f..%2fetc",
        "C:\\x",
        "\\\\host\\x",
        "org/..",
        "../repo",
        "org/repo/..",
        "org/repo@../../x",
        "org/repo@main/../..",
        "org/repo@%2e%2e",
        "hf://../x",
        "hf://a/b/../../c",
        "s3://bucket/../other/m1",
        "s3://bucket/%2e%2e/m1",
        "s3://../m1",
        "s3://bucket/a/../../m1",
        "gs://bucket/../m1",
        "s3://bucket//m1\0",
        "org/re\0po",
        "org/\u202erepo",
    ]
    results = asyncio.run(try_all(server, bad))
    assert_refused(results)
    for good, expected in ((f"{root}/m1", 1), (f"file://{root}/m1", 1), (f"{root}/link-in", 1), (f"{root}/inner", 1)):
        assert marker_of(asyncio.run(complete(server.address, good))) == marker.marker(expected), good


def test_special_files_are_not_opened(server, root):
    """FIFOs would hang, devices never end, sockets and directories are no files: each is an answer, and soon."""

    def folder(name: str, make) -> str:
        path = root / name
        path.mkdir()
        write_named(path, "m1")
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (path / "m1" / file).rename(path / file)
        (path / "m1").rmdir()
        target = path / ("adapter_config.json" if name.endswith("config") else "adapter_model.safetensors")
        target.unlink()
        make(target)
        return str(path)

    sockets = []

    def unix_socket(path: Path):
        one = socket.socket(socket.AF_UNIX)
        one.bind(str(path)) if len(str(path)) < 100 else path.mkdir()
        sockets.append(one)

    makers = {
        "fifo": os.mkfifo,
        "zero": lambda path: path.symlink_to("/dev/zero"),
        "folder": Path.mkdir,
        "socket": unix_socket,
        "stdin": lambda path: path.symlink_to("/dev/stdin"),
        "mem": lambda path: path.symlink_to("/proc/self/mem"),
    }
    if os.geteuid() == 0:
        makers["device"] = lambda path: os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))
    places = [folder(f"{kind}-{part}", make) for kind, make in makers.items() for part in ("config", "weights")]
    started = time.monotonic()
    try:
        results = asyncio.run(try_all(server, places))
    finally:
        for one in sockets:
            one.close()
    assert_refused(results)
    assert time.monotonic() - started < 20, "something waited for a special file"
