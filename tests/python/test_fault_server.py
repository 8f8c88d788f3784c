"""The fault server itself: honest replies are right in every dialect, every fault does what its name says, markers are markers."""

import gzip
import hashlib
import socket
import ssl
import struct

import httpx
import pytest

import marker
from adapter_files import write_adapter
from faults.client import SERVER_KEY, FaultServer
from faults.programs import HTML, PROGRAMS
from faults.world import crc32c, git_sha1_hex
from loramux_server import Server, wait_until

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SIGNED = {"authorization": f"AWS4-HMAC-SHA256 Credential={SERVER_KEY}/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"}


@pytest.fixture(scope="module")
def faults():
    with FaultServer() as server:
        yield server


@pytest.fixture(autouse=True)
def honest(faults):
    yield
    faults.rules()


def get(faults, dialect: str, path: str, method: str = "GET", timeout: float = 5, **headers):
    return httpx.request(method, f"{faults.url(dialect)}{path}", headers=headers, timeout=timeout, trust_env=False)


def test_ten_thousand_markers_are_distinct_and_small():
    markers = {marker.marker(i) for i in range(10_000)}
    assert len(markers) == 10_000
    assert max(len(marker.weights_bytes(i)) for i in range(100)) < 16 * 1024


def test_marker_adapters_answer_their_marker_whatever_the_prompt(tmp_path, data_dir):
    for i in range(12):
        write_adapter(tmp_path / f"m{i}", marker.config_bytes(), marker.weights_bytes(i))
    with Server("--adapter-dir", str(tmp_path), data_dir=data_dir) as server:
        for turn in range(60):
            i, prompt = turn % 12, [3 + (turn * 7919 + k * 104729) % 2000 for k in range(1 + turn % 40)]
            answer = server.http.post("/v1/completions", json=dict(model=f"m{i}", prompt=prompt, **marker.ASK))
            assert answer.status_code == 200, answer.text
            assert marker.read_marker(answer.json()) == marker.marker(i), f"adapter {i}, prompt {prompt}"


def test_crc32c_is_castagnoli():
    assert crc32c(b"123456789") == bytes.fromhex("e3069283")


def test_the_hub_redirects_large_files_to_its_cdn_and_says_their_sha256(faults):
    content = marker.weights_bytes(5)
    reply = get(faults, "hub", f"/acme/m5/resolve/main/{WEIGHTS}", "HEAD")
    assert reply.status_code == 302
    assert reply.headers["x-linked-etag"] == f'"{hashlib.sha256(content).hexdigest()}"' and reply.headers["x-linked-size"] == str(
        len(content)
    )
    assert len(reply.headers["x-repo-commit"]) == 40
    assert httpx.get(reply.headers["location"], trust_env=False).content == content
    assert httpx.get(reply.headers["location"].replace("signature=", "signature=0"), trust_env=False).status_code == 403
    small = get(faults, "hub", f"/acme/m5/resolve/{reply.headers['x-repo-commit']}/{CONFIG}")
    assert small.content == marker.config_bytes() and small.headers["etag"] == f'"{git_sha1_hex(small.content)}"'
    assert get(faults, "hub", f"/acme/m5/resolve/nosuch/{CONFIG}").headers["x-error-code"] == "RevisionNotFound"
    api = get(faults, "hub", "/api/models/acme/m5/revision/main").json()
    assert api["sha"] == reply.headers["x-repo-commit"] and {row["rfilename"] for row in api["siblings"]} == {CONFIG, WEIGHTS}
    assert get(faults, "hub", "/api/models/acme/m5/tree/main").json()[1]["lfs"]["oid"] == hashlib.sha256(content).hexdigest()


def test_private_and_gated_repositories_answer_as_the_hub_does(faults):
    faults.token("hf_alice", ["private-alice/*", "gated-a/m1"])
    path = f"/private-alice/m1/resolve/main/{CONFIG}"
    bearer = lambda token: {"authorization": f"Bearer {token}"}
    assert get(faults, "hub", path).status_code == 401
    assert get(faults, "hub", path, **bearer("hf_unknown")).status_code == 401
    assert get(faults, "hub", path, **bearer("hf_alice")).status_code == 200
    faults.token("hf_bob", ["private-bob/*"])
    assert get(faults, "hub", path, **bearer("hf_bob")).status_code == 404
    assert get(faults, "hub", f"/gated-a/m1/resolve/main/{CONFIG}", **bearer("hf_bob")).status_code == 403
    assert get(faults, "hub", f"/gated-a/m1/resolve/main/{CONFIG}", **bearer("hf_alice")).status_code == 200
    faults.token("hf_alice", None)
    assert get(faults, "hub", path, **bearer("hf_alice")).status_code == 401


def test_branches_move(faults):
    def commit():
        return get(faults, "hub", f"/acme/moving/resolve/main/{CONFIG}").headers["x-repo-commit"]

    faults.repo("acme/moving", {"branches": {"main": {"marker": 1}}})
    first = commit()
    faults.repo("acme/moving", {"branches": {"main": {"marker": 2}, "v1": {"marker": 1}}})
    assert commit() != first
    assert get(faults, "hub", f"/acme/moving/resolve/{first}/{CONFIG}").status_code == 200


@pytest.mark.parametrize(
    "dialect,path,headers", [("s3", "/bucket/loras/m7/", SIGNED), ("gcs", "/bucket/loras/m7/", {}), ("http", "/loras/m7/", {})]
)
def test_object_stores_serve_ranges_and_conditions(faults, dialect, path, headers):
    content = marker.weights_bytes(7)
    whole = get(faults, dialect, path + WEIGHTS, **headers)
    assert whole.content == content
    part = get(faults, dialect, path + WEIGHTS, range="bytes=100-199", **headers)
    assert part.status_code == 206 and part.content == content[100:200] and part.headers["content-range"] == f"bytes 100-199/{len(content)}"
    assert get(faults, dialect, path + WEIGHTS, **{"if-match": '"other"'}, **headers).status_code == 412
    assert get(faults, dialect, path + WEIGHTS, **{"if-match": whole.headers["etag"]}, **headers).status_code == 200
    head = get(faults, dialect, path + WEIGHTS, "HEAD", **headers)
    assert head.headers["content-length"] == str(len(content)) and head.content == b""
    assert get(faults, dialect, path + "other.bin", **headers).status_code == 404
    assert get(faults, dialect, path + WEIGHTS, range=f"bytes={len(content)}-", **headers).status_code == 416


def test_s3_wants_a_signature_and_lists(faults):
    assert get(faults, "s3", f"/bucket/m7/{WEIGHTS}").status_code == 403
    assert get(faults, "s3", f"/public-bucket/m7/{WEIGHTS}").status_code == 200
    stranger = {"authorization": SIGNED["authorization"].replace(SERVER_KEY, "AKIASTRANGER")}
    assert get(faults, "s3", f"/bucket/m7/{WEIGHTS}", **stranger).status_code == 403
    listing = get(faults, "s3", "/bucket?list-type=2&prefix=loras/m7/", **SIGNED).text
    assert f"loras/m7/{WEIGHTS}" in listing and "<KeyCount>2</KeyCount>" in listing


def faulty(faults, do: str, timeout: float = 1, headers: dict | None = None, **parameters):
    faults.rules({"do": do, "dialect": "http", **parameters})
    return get(faults, "http", f"/loras/m3x200/{WEIGHTS}", timeout=timeout, **(headers or {}))


def test_faults_of_the_transport(faults):
    for do, parameters in (
        ("drop", {"at": 0.5}),
        ("drop", {"at": 0}),
        ("drop", {"at": 0.5, "hard": False}),
        ("reset", {}),
        ("garbage", {}),
        ("chunked", {"cut": True}),
        ("length", {"claim": 10**7}),
        ("huge_headers", {"bytes_": 1 << 23}),
    ):
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            faulty(faults, do, **parameters)
    for do, parameters in (("hang", {}), ("stall", {}), ("tarpit", {"bytes_per_s": 1}), ("slow_head", {"bytes_per_s": 1})):
        with pytest.raises(httpx.TimeoutException):
            faulty(faults, do, timeout=0.2, **parameters)
    assert faulty(faults, "delay", seconds=0.3).elapsed.total_seconds() >= 0.3


def test_faults_of_the_content(faults):
    good = get(faults, "http", f"/loras/m3x200/{WEIGHTS}").content
    assert len(good) > 200_000
    assert faulty(faults, "truncate").content == good[: len(good) // 2]
    assert faulty(faults, "longer").content == good + b"\0" * 1000
    flipped = faulty(faults, "flip", at=9).content
    assert len(flipped) == len(good) and [i for i in range(len(good)) if good[i] != flipped[i]] == [9]
    assert faulty(faults, "html").content == HTML
    assert faulty(faults, "no_length").content == faulty(faults, "chunked").content == good
    packed = faulty(faults, "gzip")
    assert packed.headers["content-encoding"] == "gzip" and packed.content == good
    with httpx.stream("GET", f"{faults.url('http')}/loras/m3/{WEIGHTS}", trust_env=False) as reply:
        assert gzip.compress(b"")[:2] != reply.read()[:2]
    ranged = {"range": "bytes=10-"}
    assert faulty(faults, "no_range", headers=ranged).status_code == 200
    assert faulty(faults, "bad_range", headers=ranged).headers["content-range"].startswith("bytes 17-")
    assert faulty(faults, "headers", set={"ETag": '"../../x"', "Accept-Ranges": None}).headers["etag"] == '"../../x"'


def test_a_gzip_bomb_is_small_on_the_wire_and_an_endless_body_is_not(faults):
    faults.rules({"do": "gzip", "bomb": 64 << 20})
    with httpx.stream("GET", f"{faults.url('http')}/loras/m3/{WEIGHTS}", trust_env=False) as reply:
        assert sum(len(piece) for piece in reply.iter_raw()) < 1 << 20
    faults.rules({"do": "endless", "bytes_max": 8 << 20})
    with pytest.raises(httpx.RemoteProtocolError):
        with httpx.stream("GET", f"{faults.url('http')}/loras/m3/{WEIGHTS}", trust_env=False) as reply:
            assert sum(len(piece) for piece in reply.iter_raw()) >= 8 << 20


def test_statuses_redirects_and_the_order_of_rules(faults):
    faults.rules(
        {"do": "status", "status": 429, "headers": {"Retry-After": "7"}, "times": 2}, {"do": "redirect", "to": "http://10.0.0.1{path}"}
    )
    replies = [get(faults, "http", "/loras/m3/adapter_config.json") for _ in range(3)]
    assert [reply.status_code for reply in replies] == [429, 429, 302] and replies[0].headers["retry-after"] == "7"
    assert replies[2].headers["location"] == "http://10.0.0.1/loras/m3/adapter_config.json"
    faults.rules({"do": "redirect_loop"})
    with pytest.raises(httpx.TooManyRedirects):
        httpx.get(f"{faults.url('http')}/loras/m3/x", follow_redirects=True, trust_env=False)
    faults.rules({"do": "reset", "skip": 1, "times": 1})
    assert get(faults, "http", "/loras/m3/adapter_config.json").status_code == 200
    with pytest.raises(httpx.TransportError):
        get(faults, "http", "/loras/m3/adapter_config.json")
    assert get(faults, "http", "/loras/m3/adapter_config.json").status_code == 200


def test_every_fault_is_tested_here():
    """A fault that nobody watched do its work proves nothing."""
    source = open(__file__).read()
    assert [name for name in PROGRAMS if f'"{name}"' not in source and name != "pass"] == []


def test_the_log_counts_and_shows_what_was_sent(faults):
    mark = faults.mark()
    get(faults, "http", "/loras/m3/adapter_config.json", authorization="Bearer leaked")
    log = faults.log(mark)
    assert len(log) == 1 and log[0]["status"] == 200 and log[0]["sent"] == len(marker.config_bytes())
    assert ["authorization", "Bearer leaked"] in [[name.lower(), value] for name, value in log[0]["headers"]]


def test_a_fault_ends_with_its_client(faults):
    faults.rules({"do": "hang"})
    before = faults.open_connections()
    with socket.create_connection(("127.0.0.1", faults.ports["http"])) as raw:
        raw.sendall(b"GET /loras/m3/adapter_config.json HTTP/1.1\r\nHost: x\r\n\r\n")
        assert faults.open_connections() == before + 1
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(lambda: faults.open_connections() == before, "the fault program has ended")


@pytest.mark.parametrize(
    "kind,complaint",
    [("good", None), ("expired", "expired"), ("wrong_host", "mismatch"), ("stranger", "self-signed|unable to get local issuer")],
)
def test_tls_certificates_are_bad_in_the_way_they_should_be(faults, kind, complaint):
    trusting = ssl.create_default_context(cafile=faults.authority)
    url = f"https://127.0.0.1:{faults.ports[f'tls_{kind}']}/loras/m3/{CONFIG}"
    if complaint is None:
        assert httpx.get(url, verify=trusting, trust_env=False).content == marker.config_bytes()
        return
    with pytest.raises(httpx.ConnectError, match=complaint):
        httpx.get(url, verify=trusting, trust_env=False)
