"""`/openapi.json` and `/docs` over real sockets, and schemathesis against all routes.

That every answer of the other tests is as the document says is `described.py`'s business.
"""

import os
import re
import subprocess
from html.parser import HTMLParser

import httpx
import jsonschema
import pytest

import described
import third_party
from loramux_server import Server

KEY, ADMIN_KEY = "a-key-of-this-test", "an-admin-key-of-this-test"
FUZZ_S = int(os.environ.get("LORAMUX_FUZZ_SECONDS", "40"))


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A server with an API key and an admin key: its document has every route. What is pinned by chance stays in its own folder."""
    data_dir = str(tmp_path_factory.mktemp("guarded"))
    with Server("--admin-key", ADMIN_KEY, "--allow-runtime-adapters", data_dir=data_dir, api_key=KEY) as server:
        yield server


def test_the_document_is_of_this_server(demo, guarded):
    document = demo.http.get("/openapi.json").json()
    sampling = document["components"]["schemas"]["SamplingFields"]["properties"]
    context = demo.http.get("/v1/models").json()["data"][0]["max_model_len"]
    drawing = document["components"]["schemas"]["DrawingFields"]["properties"]
    assert drawing["min_tokens"]["maximum"] == context and sampling["n"]["maximum"] == 8
    assert "security" not in document["paths"]["/v1/completions"]["post"]
    assert not any(path.startswith("/admin") for path in document["paths"])
    document = guarded.http.get("/openapi.json").json()
    assert document["paths"]["/v1/completions"]["post"]["security"] == [{"bearer": []}]
    assert "/admin/v1/adapters/{name}" in document["paths"]


def test_without_the_key_there_is_no_document_but_a_page(guarded):
    with httpx.Client(base_url=guarded.base) as nobody:
        assert nobody.get("/openapi.json").status_code == 401
        assert nobody.get("/docs").status_code == 200


def test_a_document_that_did_not_change_is_not_sent_again(demo):
    first = demo.http.get("/openapi.json")
    again = demo.http.get("/openapi.json", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_the_page_names_no_other_host(demo):
    found = []

    class Links(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.extend((tag, name, value) for name, value in attributes if name in ("src", "href", "style") or name.startswith("on"))

    page = demo.http.get("/docs")
    Links().feed(page.text)
    assert page.headers["content-type"].startswith("text/html")
    assert {value for _, _, value in found} == {"#routes", "/console/icon.svg", "/docs/docs.css", "/docs/docs.js", "/openapi.json"}, found
    for path in ("/docs/docs.css", "/docs/docs.js"):
        assert not re.search(r"https?:|url\(|@import", demo.http.get(path).text)
        assert "default-src 'none'" in demo.http.get(path).headers["content-security-policy"]


def test_examples_are_valid_and_answered(demo):
    """Each body that the document shows is a request that works, or names an adapter that is not there."""
    document = demo.http.get("/openapi.json").json()
    for path, item in document["paths"].items():
        for method, operation in item.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if body is None:
                continue
            complaint = described.Document(document).complaint(body["schema"], body["example"])
            assert complaint is None, f"{path}: {complaint}"
            answer = demo.http.request(method.upper(), path, json=body["example"])
            refused = path.endswith("_lora_adapter")
            assert answer.is_success or refused, f"{path}: {answer.text}"


def test_a_reply_with_a_member_that_nobody_documented_is_found(demo):
    """The check of the other tests sees something."""
    checked = described.document()
    reply = demo.http.get("/version").json()
    schema = checked.spec["paths"]["/version"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert checked.complaint(schema, reply) is None
    assert "more" in checked.complaint(schema, {**reply, "more": 1})
    assert checked.complaint(schema, {"version": None})
    chunk = {"$ref": "#/components/schemas/CompletionChunk"}
    assert checked.complaint(chunk, {"id": "cmpl-x"})
    with pytest.raises(jsonschema.ValidationError):
        checked.validator(schema).validate({})


def fuzz(server: Server, key: str | None, folder, seconds: int, *flags: str):
    """Runs schemathesis: wrong and right data on every operation that the document names.

    Wrong data may be accepted here: in members that this server reads over, of any type. What has to be refused is in
    bad_input.jsonl and in the unit tests of the document.
    """
    config = folder / "schemathesis.toml"
    config.write_text("\n".join([
        "seed = 20260101", "[checks.not_a_server_error]",
        "expected-statuses = [\"2xx\", \"3xx\", \"4xx\", \"503\", \"504\"]",
        # An unknown header is nobody's mistake.
        "[generation]", "allow-x00 = true", "allow-extra-parameters = false",
    ]))
    command = [
        third_party.environment("clients-schemathesis") / "bin/schemathesis", "--config-file", str(config), "run",
        f"{server.base}/openapi.json", "--checks",
        "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
        "response_headers_conformance,unsupported_method,allow_header_conformance",
        "--phases", "coverage,fuzzing", "--max-time", str(seconds), "--continue-on-failure", "--suppress-health-check", "all",
        "--request-timeout", "30", "--workers", "2", "--no-color", *flags,
    ]
    if key:
        command += ["-H", f"Authorization: Bearer {key}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=seconds * 4 + 120)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert server.is_healthy() and server.shard_pid()


def test_schemathesis_finds_nothing(start_server, tmp_path):
    # Routes that are off answer 404 to every method.
    fuzz(start_server("--allow-runtime-adapters"), None, tmp_path, FUZZ_S)


def test_schemathesis_finds_nothing_with_keys(guarded, tmp_path):
    fuzz(guarded, KEY, tmp_path, FUZZ_S // 2, "--exclude-tag", "Admin")


def test_schemathesis_finds_nothing_in_the_admin_api(start_server, tmp_path):
    # Without an API key, the admin's may read the document too.
    fuzz(start_server("--admin-key", ADMIN_KEY), ADMIN_KEY, tmp_path, FUZZ_S // 2, "--include-tag", "Admin", "--exclude-operation-id", "adminDrain")
