"""Adapters from every source: named in a request, on the command line, through the runtime route and the admin API; and what is kept of them."""

import asyncio
import json
import os
import threading

import pytest

import marker
from faults.asking import allow_files, ask, complete, gather, marker_of
from faults.client import SERVER_KEY, SERVER_TOKEN, FaultServer
from faults.serving import ADMIN, HTTP_SECRET, REMOTE, SourcedServer, load_ms, reference, write_named
from loramux_server import wait_until

ALL = (*REMOTE, "local")


@pytest.fixture(scope="module")
def faults():
    with FaultServer() as server:
        yield server


@pytest.fixture(autouse=True)
def honest(faults):
    faults.rules()
    yield
    faults.rules()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    for i in range(100, 130):
        write_named(root, f"acme/m{i}")
    return root


@pytest.fixture(scope="module")
def server(faults, root):
    with SourcedServer(faults, "--adapter-root", str(root), "--share-hub-token") as server:
        yield server


def served(server, model: str, **more):
    return asyncio.run(complete(server.address, model, **more))


def files_got(faults, mark: int, part: str) -> list[str]:
    """GETs of adapter files whose path has `part`, redirects not counted."""
    return [
        row["path"]
        for row in faults.log(mark)
        if row["method"] == "GET"
        and part in row["path"]
        and row["status"] in (200, 206)
        and ("adapter_" in row["path"] or row["dialect"] == "cdn")
    ]


@pytest.mark.parametrize("source", ALL)
def test_a_reference_in_a_request_is_loaded_and_served(server, faults, root, source):
    answer = served(server, reference(faults, source, "acme/m101", root))
    assert marker_of(answer) == marker.marker(101)
    assert answer.headers["x-adapter-source"] == source
    assert answer.headers["x-adapter-revision"] and len(answer.headers["x-adapter-content-id"]) == 16


@pytest.mark.parametrize("source", ALL)
def test_an_adapter_of_the_command_line_is_ready_before_the_server_is(faults, root, source):
    with SourcedServer(faults, "--adapter", f"mine={reference(faults, source, 'acme/m102', root)}") as server:
        if source == "local":
            listed = lambda: "mine" in [card["id"] for card in server.http.get("/v1/models").json()["data"]]
            wait_until(listed, "directories are looked at beside the start")
        assert "mine" in [card["id"] for card in server.http.get("/v1/models").json()["data"]]
        answer = served(server, "mine")
        assert marker_of(answer) == marker.marker(102)
        assert answer.headers["x-adapter-source"] == source


@pytest.mark.parametrize("source", ALL)
def test_runtime_route_and_admin_api_load_from_every_source(server, faults, root, source):
    loaded = asyncio.run(
        ask(
            server.address,
            "POST",
            "/v1/load_lora_adapter",
            {"lora_name": f"rt-{source}", "lora_path": reference(faults, source, "acme/m103", root)},
            ADMIN,
        )
    )
    assert loaded.status == 200, str(loaded)
    assert marker_of(served(server, f"rt-{source}")) == marker.marker(103)
    put = server.admin("PUT", f"/adapters/ad-{source}?wait=600s", json={"ref": reference(faults, source, "acme/m104", root)})
    assert put.status_code == 200, put.text
    assert put.json()["state"] == "ready" and put.json()["ref"].startswith(
        {"hub": "hf://", "s3": "s3://", "gcs": "gs://", "http": "http://", "local": "/"}[source]
    )
    assert marker_of(served(server, f"ad-{source}")) == marker.marker(104)
    assert server.admin("DELETE", f"/adapters/ad-{source}").status_code == 200
    assert served(server, f"ad-{source}").status == 404


def test_the_same_files_are_one_content_wherever_they_come_from(server, faults, root):
    for source in ALL:
        server.admin(
            "PUT", f"/adapters/same-{source}?wait=600s", json={"ref": reference(faults, source, "acme/m105", root)}
        ).raise_for_status()
    contents = {served(server, f"same-{source}").headers["x-adapter-content-id"] for source in ALL}
    assert len(contents) == 1


def test_validate_reads_every_source_and_keeps_nothing(server, faults, root):
    for source in ALL:
        answer = server.admin("POST", "/adapters/validate", json={"ref": reference(faults, source, "acme/m106", root)})
        assert answer.status_code == 200 and answer.json()["ok"] is True, answer.text
    assert "m106" not in server.admin("GET", "/adapters?limit=1000").text


def test_spellings_of_the_hub(server, faults):
    repo = "acme/m107"
    commit = faults.http.get(f"{faults.url('hub')}/api/models/{repo}").json()["sha"]
    for model in (repo, f"hf://{repo}", f"huggingface://{repo}", f"{repo}@main", f"{repo}@{commit}", f"hf://{repo}@latest", f"demo:{repo}"):
        answer = served(server, model)
        assert marker_of(answer) == marker.marker(107), model
        assert answer.headers["x-adapter-revision"] == commit
    lorax = asyncio.run(
        ask(
            server.address,
            "POST",
            "/v1/completions",
            {"model": "demo", "prompt": "Hi", "adapter_id": repo, "adapter_source": "hub", **marker.ASK},
        )
    )
    assert marker_of(lorax) == marker.marker(107)
    assert served(server, f"{repo}@nosuch").status == 404


def test_a_branch_that_moves_gives_the_new_content_and_a_commit_the_old(server, faults):
    faults.repo("acme/moving", {"branches": {"main": {"marker": 108}}})
    first = served(server, "acme/moving")
    assert marker_of(first) == marker.marker(108)
    faults.repo("acme/moving", {"branches": {"main": {"marker": 109}, "v1": {"marker": 108}}})
    wait_until(lambda: marker_of(served(server, "acme/moving")) == marker.marker(109), "the new commit is served", 10)
    for old in (first.headers["x-adapter-revision"], "v1"):
        assert marker_of(served(server, f"acme/moving@{old}")) == marker.marker(108)


def test_names_are_case_sensitive_and_do_not_collide(server, faults):
    names = {"Acme/case": 110, "acme/case": 111, "acme/Case": 112, "acme--case": None, "acme/case-": 113, "acme.case/x": 114}
    for name, i in names.items():
        if i is not None:
            faults.repo(name, {"branches": {"main": {"marker": i}}})
    for _ in range(2):
        for name, i in names.items():
            answer = served(server, name)
            assert answer.status == 404 if i is None else marker_of(answer) == marker.marker(i), name


def test_the_operators_credentials_are_for_what_the_operator_named(faults, root):
    """A prefix of the operator and a registered name are read with its own keys; a caller without any gets what everyone may read."""
    secret = "private-operator/m115"
    flags = ["--adapter-source-prefix", "s3://private-operator/loras/", "--adapter", f"named=hf://{secret}"]
    with SourcedServer(faults, *flags) as server:
        assert marker_of(served(server, "named")) == marker.marker(115)
        assert marker_of(served(server, "m116")) == marker.marker(116), "a bare name below the prefix"
        for model in (
            f"hf://{secret}",
            "s3://private-operator/other/m116",
            "s3://private-operator/lorasx/m116",
            "gs://private-operator/m116",
        ):
            assert served(server, model).status == 404, model
    with SourcedServer(faults, "--share-hub-token") as server:
        assert marker_of(served(server, secret)) == marker.marker(115)
        assert served(server, secret, api_token="hf_wrong").status == 404, "after the caller's own token was refused"


def test_a_token_of_another_source_does_not_shadow_the_operators_prefix(faults):
    with SourcedServer(faults, "--adapter-source-prefix", "s3://private-operator/loras/") as server:
        assert marker_of(served(server, "m116", headers={"authorization": "Bearer hf_ofAnotherSource"})) == marker.marker(116)


def test_http_headers_of_the_operator_go_to_their_host_only(faults):
    faults.token(HTTP_SECRET, ["private-web/*"])
    host = f"http://127.0.0.1:{faults.ports['http']}"
    with SourcedServer(
        faults, "--adapter-http-header", f"{host}=Authorization:Bearer {HTTP_SECRET}", "--adapter", f"web={host}/private-web/m117"
    ) as server:
        assert marker_of(served(server, "web")) == marker.marker(117)
        mark = faults.mark()
        faults.rules({"do": "redirect", "dialect": "http", "path": "/private-web/m118", "to": f"{faults.url('s3')}{{path}}"})
        assert server.admin("PUT", "/adapters/moved?wait=600s", json={"ref": f"{host}/private-web/m118"}).status_code >= 400
        assert all(HTTP_SECRET not in str(row["headers"]) for row in faults.log(mark) if row["dialect"] != "http")


def test_no_token_ever_reaches_another_origin(server, faults):
    """The hub's token goes to the hub: not to its CDN, not to a host it redirects to, not over the log or the metrics."""
    faults.token("hf_canaryOfTheCaller", ["private-canary/*"])
    mark = faults.mark()
    assert marker_of(served(server, "private-canary/m119", api_token="hf_canaryOfTheCaller")) == marker.marker(119)
    assert served(server, "private-canary/m119", headers={"x-adapter-token": "hf_canaryOfTheCaller"}).status == 200
    faults.rules({"do": "redirect", "dialect": "hub", "path": "/m120/", "to": faults.url("http") + "{path}"})
    served(server, "private-canary/m120", api_token="hf_canaryOfTheCaller", adapter_load_timeout_ms=load_ms(2))
    rows = faults.log(mark)
    assert any("hf_canaryOfTheCaller" in str(row["headers"]) for row in rows if row["dialect"] == "hub")
    leaked = [
        row
        for row in rows
        if row["dialect"] != "hub"
        and ("canary" in str(row["headers"]) or SERVER_TOKEN in str(row["headers"]) or "canaryOf" in row["target"])
    ]
    assert leaked == []
    shown = (
        server.log()
        + server.http.get("/metrics").text
        + server.http.get("/v1/models").text
        + server.admin("GET", "/adapters?limit=1000").text
        + server.admin("GET", "/status").text
    )
    for secret in ("hf_canaryOfTheCaller", SERVER_TOKEN, "operatorsSecret"):
        assert secret not in shown, secret


def test_what_was_loaded_is_there_after_a_restart_without_the_source(faults, tmp_path):
    flags = ["--adapter", f"kept={reference(faults, 's3', 'acme/m121')}"]
    with SourcedServer(faults, *flags, data_dir=str(tmp_path)) as server:
        assert marker_of(served(server, "kept")) == marker.marker(121)
        server.admin("PUT", "/adapters/admin-made?wait=600s", json={"ref": reference(faults, "hub", "acme/m122")}).raise_for_status()
    faults.rules({"do": "reset"})
    mark = faults.mark()
    with SourcedServer(faults, *flags, data_dir=str(tmp_path)) as server:
        assert marker_of(served(server, "kept")) == marker.marker(121)
        wait_until(lambda: served(server, "admin-made").status == 200, "the registration came back", 10)
        assert marker_of(served(server, "admin-made")) == marker.marker(122)
        answer = served(server, "acme/m122")
        assert answer.status == 503 and answer.code == "adapter_auth_unavailable", "bytes in the store grant nothing: " + str(answer)
    assert files_got(faults, mark, "m121") == files_got(faults, mark, "m122") == []


def test_bytes_changed_on_disk_are_never_served(faults, tmp_path):
    """A file of the store is hashed again before it is used; what does not match is fetched again."""
    flags = ["--adapter", f"kept={reference(faults, 's3', 'acme/m123')}"]
    with SourcedServer(faults, *flags, data_dir=str(tmp_path)) as server:
        assert marker_of(served(server, "kept")) == marker.marker(123)
    stored = [path for path in (tmp_path / "store").rglob("adapter_model.safetensors")]
    assert len(stored) == 1, stored
    for at in (3, 200, 9000):
        content = bytearray(stored[0].read_bytes())
        content[at] ^= 1
        os.chmod(stored[0], 0o600)
        stored[0].write_bytes(bytes(content))
        mark = faults.mark()
        with SourcedServer(faults, *flags, data_dir=str(tmp_path)) as server:
            assert marker_of(served(server, "kept")) == marker.marker(123), at
        assert files_got(faults, mark, "m123"), "it was fetched again"


@pytest.mark.parametrize("kind", ["expired", "wrong_host", "stranger"])
def test_a_bad_certificate_is_no_source(faults, kind):
    host = f"127.0.0.1:{faults.ports[f'tls_{kind}']}"
    mark = faults.mark()
    with SourcedServer(faults, "--adapter-http-hosts", host, env={"SSL_CERT_FILE": faults.authority}) as server:
        answer = served(server, f"https://{host}/acme/m124", adapter_load_timeout_ms=load_ms(3))
        assert answer.status == 503 and answer.code in ("adapter_auth_unavailable", "adapter_load_failed", "adapter_loading"), str(answer)
    assert faults.log(mark) == []


def test_an_adapter_over_the_limit_is_refused_before_it_is_downloaded(faults):
    with SourcedServer(faults, "--adapter-max-bytes", "100000") as server:
        for source in ("hub", "http"):
            mark = faults.mark()
            answer = served(server, reference(faults, source, "acme/m125x500"))
            assert answer.status == 422 and answer.code == "adapter_too_large", str(answer)
            assert sum(row["sent"] for row in faults.log(mark)) < 100_000
            assert marker_of(served(server, reference(faults, source, "acme/m125"))) == marker.marker(125)


def test_ten_thousand_first_requests_make_one_download(faults):
    """From many local addresses at once, all for one adapter that nobody had: one GET for each file, and every caller is served."""
    callers, limit = int(os.environ.get("LORAMUX_FIRST_CALLERS", "10000")), "20000"
    allow_files(callers + 2000)
    with SourcedServer(
        faults,
        "--max-connections",
        limit,
        "--max-queued-requests",
        limit,
        "--adapter",
        f"first-s3={reference(faults, 's3', 'acme/m126')}",
        load_timeout_s=120,
    ) as server:
        faults.rules({"do": "delay", "seconds": 0.5, "method": "GET", "path": "m127|/repos/"})
        mark = faults.mark()

        async def all_at_once():
            body = {"model": "acme/m127", "prompt": "Hi", **marker.ASK}
            return await asyncio.gather(
                *(
                    ask(server.address, "POST", "/v1/completions", body, timeout_s=150, source=f"127.0.0.{2 + i % 40}")
                    for i in range(callers)
                )
            )

        answers = asyncio.run(all_at_once())
        wrong = [str(answer) for answer in answers if answer.status != 200]
        assert wrong == [], f"{len(wrong)} of {callers}, first {wrong[:3]}"
        assert {marker_of(answer) for answer in answers} == {marker.marker(127)}
        got = files_got(faults, mark, "m127")
        assert len(got) == 2, got
        assert len([row for row in faults.log(mark) if row["method"] == "HEAD"]) <= 4, "authorisation of equal callers is shared too"


def test_a_caller_that_leaves_does_not_stop_the_others(server, faults):
    faults.rules({"do": "delay", "seconds": 0.4, "method": "GET", "path": "m128"})
    mark = faults.mark()

    async def leave_and_stay():
        leaving = asyncio.create_task(complete(server.address, "acme/m128"))
        await asyncio.sleep(0.2)
        staying = [asyncio.create_task(complete(server.address, "acme/m128")) for _ in range(20)]
        leaving.cancel()
        return await asyncio.gather(*staying)

    assert {marker_of(answer) for answer in asyncio.run(leave_and_stay())} == {marker.marker(128)}
    assert len(files_got(faults, mark, "m128")) == 2


@pytest.fixture(scope="module")
def moto():
    """A second opinion on S3, if it is installed: another implementation than ours."""
    moto_server = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


def test_s3_of_another_make(faults, moto):
    boto3 = pytest.importorskip("boto3")
    client = boto3.client("s3", endpoint_url=moto, aws_access_key_id="A", aws_secret_access_key="B", region_name="us-east-1")
    client.create_bucket(Bucket="adapters")
    for i in (1, 2):
        for name, content in marker.files(i).items():
            client.put_object(Bucket="adapters", Key=f"team a/v{i}/{name}" if i == 2 else f"team/v{i}/{name}", Body=content)
    env = {"AWS_ENDPOINT_URL": moto, "AWS_ACCESS_KEY_ID": "A", "AWS_SECRET_ACCESS_KEY": "B"}
    with SourcedServer(
        faults, "--adapter", "one=s3://adapters/team/v1", "--adapter-source-prefix", "s3://adapters/team/", env=env
    ) as server:
        assert marker_of(served(server, "one")) == marker.marker(1)
        assert marker_of(served(server, "v1")) == marker.marker(1)
        assert served(server, "v9").status == 404
        # New bytes under the same key: the entity tag is another, and so is the content, after the time a name is kept.
        for name, content in marker.files(2).items():
            client.put_object(Bucket="adapters", Key=f"team/v1/{name}", Body=content)
        assert (
            asyncio.run(
                ask(
                    server.address,
                    "POST",
                    "/v1/load_lora_adapter",
                    {"lora_name": "one", "lora_path": "s3://adapters/team/v1", "load_inplace": True},
                    ADMIN,
                )
            ).status
            == 200
        )
        assert marker_of(served(server, "one")) == marker.marker(2)
