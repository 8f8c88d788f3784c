"""The honest answers: Hugging Face Hub and its CDN, S3, Google Cloud Storage, plain HTTP."""

import base64
import json
import re
from email.utils import formatdate
from urllib.parse import quote
from xml.sax.saxutils import escape

from faults.wire1 import Reply, Request, file_reply, text_reply
from faults.world import FILES, World, commit_of, crc32c, files_of, git_sha1_hex, is_private, md5_hex, sha256_hex

MODIFIED = formatdate(1_760_000_000, usegmt=True)
CREDENTIAL = re.compile(r"AWS4-HMAC-SHA256 Credential=([^/]+)/")


def _json(value, **headers: str) -> Reply:
    return Reply(200, {"Content-Type": "application/json", **headers}, json.dumps(value).encode())


# ---- hub

_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/(.+?)/([^/]+)")
_API = re.compile(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+?))?/?")


def hub(world: World, request: Request, ports: dict) -> Reply:
    found = _RESOLVE.fullmatch(request.path)
    if found:
        return _hub_file(world, request, found[1], found[2], found[3], ports)
    found = _API.fullmatch(request.path)
    if found:
        return _hub_api(world, request, found[1], found[2], found[3] or "main")
    return text_reply(404, "not found")


def _hub_refusal(world: World, request: Request, name: str, repo: dict | None) -> Reply | None:
    """What the Hub says to a token it does not know, or to one that may not read this."""
    token = request.bearer()
    if token is not None and not world.knows(token):
        return text_reply(401, "Invalid credentials in Authorization header")
    private, gated = (repo or {}).get("private", is_private(name)), (repo or {}).get("gated", name.startswith("gated-"))
    if repo is not None and world.may_read(token, name, private or gated):
        return None
    if repo is not None and gated:
        return text_reply(403 if token else 401, "Access to this model is restricted.", X_Error_Code="GatedRepo")
    return text_reply(404 if token else 401, "Repository not found", X_Error_Code="RepoNotFound")


def _hub_commit(name: str, repo: dict, revision: str) -> tuple[str, dict] | None:
    """(commit, spec) of a branch or a commit."""
    for branch, spec in repo["branches"].items():
        commit = commit_of(name, spec)
        if revision in (branch, commit):
            return commit, spec
    return None


def _hub_file(world: World, request: Request, name: str, revision: str, file: str, ports: dict) -> Reply:
    repo = world.repo(name)
    refusal = _hub_refusal(world, request, name, repo)
    if refusal:
        return refusal
    at = _hub_commit(name, repo, revision)
    if at is None:
        return text_reply(404, "Invalid rev id", X_Error_Code="RevisionNotFound")
    commit, spec = at
    content = files_of(spec).get(file)
    if content is None:
        return text_reply(404, "Entry not found", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
    headers = {"X-Repo-Commit": commit, "Last-Modified": MODIFIED}
    if file == FILES[0]:
        return file_reply(request, content, f'"{git_sha1_hex(content)}"', headers)
    digest = sha256_hex(content)
    headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
    if world.settings["cdn"]:
        to = f"http://127.0.0.1:{ports['cdn']}/repos/{quote(name, safe='')}/{commit}/{digest}?signature={_signature(name, digest)}"
        return Reply(302, {**headers, "Location": to, "ETag": f'"{digest}"'}, b"")
    return file_reply(request, content, f'"{digest}"', headers)


def _signature(name: str, digest: str) -> str:
    return sha256_hex(f"signed {name} {digest}".encode())[:16]


def cdn(world: World, request: Request, ports: dict) -> Reply:
    """Who has a signed link may read; a bearer token is not asked for, and would be a leak."""
    _, kind, name, commit, digest, *_ = request.path.split("/") + [""] * 4
    if request.path.count("/") == 5:  # the decoded name holds a slash
        _, kind, owner, name, commit, digest = request.path.split("/")
        name = f"{owner}/{name}"
    repo = world.repo(name)
    if kind != "repos" or repo is None or request.query.get("signature") != _signature(name, digest):
        return text_reply(403, "<Error><Code>AccessDenied</Code></Error>")
    at = _hub_commit(name, repo, commit)
    content = files_of(at[1]).get(FILES[1]) if at else None
    if content is None or sha256_hex(content) != digest:
        return text_reply(404, "gone")
    return file_reply(request, content, f'"{md5_hex(content)}"', {"Last-Modified": MODIFIED})


def _hub_api(world: World, request: Request, name: str, what: str | None, revision: str) -> Reply:
    repo = world.repo(name)
    refusal = _hub_refusal(world, request, name, repo)
    if refusal:
        return refusal
    at = _hub_commit(name, repo, revision)
    if at is None:
        return text_reply(404, "Invalid rev id", X_Error_Code="RevisionNotFound")
    commit, spec = at
    files = files_of(spec)
    if what == "tree":
        return _json(
            [
                {"type": "file", "path": file, "size": len(content), "oid": git_sha1_hex(content)}
                | ({"lfs": {"oid": sha256_hex(content), "size": len(content), "pointerSize": 134}} if file == FILES[1] else {})
                for file, content in files.items()
            ]
        )
    return _json(
        {
            "_id": "0" * 24,
            "id": name,
            "modelId": name,
            "sha": commit,
            "private": is_private(name),
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": ["peft"],
            "lastModified": "2026-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": file} for file in files],
        },
        **{"X-Repo-Commit": commit},
    )


# ---- object stores


def s3(world: World, request: Request, ports: dict) -> Reply:
    """Path style. A signature is asked for outside `public-` buckets, not checked: whose it is decides."""
    found = CREDENTIAL.match(request.header("authorization") or "")
    bucket, _, key = request.path.lstrip("/").partition("/")
    access_key = found[1] if found else None
    if found is None and not bucket.startswith("public-"):
        return _s3_error(403, "AccessDenied", request)
    if found is not None and not world.knows(access_key):
        return _s3_error(403, "InvalidAccessKeyId", request)
    if not world.may_read(access_key, f"{bucket}/{key}", is_private(bucket)):
        return _s3_error(403, "AccessDenied", request)
    if request.query.get("list-type") == "2":
        return _s3_list(world, bucket, request.query.get("prefix", ""))
    content = _object(world, "s3", f"{bucket}/{key}")
    if content is None:
        return _s3_error(404, "NoSuchKey", request)
    headers = {"Last-Modified": MODIFIED, "x-amz-request-id": "1"}
    if world.settings["checksums"] and request.header("x-amz-checksum-mode"):
        headers["x-amz-checksum-sha256"] = base64.b64encode(bytes.fromhex(sha256_hex(content))).decode()
    return file_reply(request, content, f'"{md5_hex(content)}"', headers)


def _s3_error(status: int, code: str, request: Request) -> Reply:
    body = b"" if request.method == "HEAD" else f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'.encode()
    return Reply(status, {"Content-Type": "application/xml"}, body)


def _s3_list(world: World, bucket: str, prefix: str) -> Reply:
    folder = prefix.rstrip("/")
    files = world.object_files("s3", f"{bucket}/{folder}") or {}
    rows = "".join(
        f"<Contents><Key>{escape(folder)}/{name}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>&quot;{md5_hex(content)}&quot;</ETag><Size>{len(content)}</Size></Contents>"
        for name, content in files.items()
    )
    body = (
        f'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>{escape(bucket)}</Name>'
        f"<Prefix>{escape(prefix)}</Prefix><KeyCount>{len(files)}</KeyCount><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
    )
    return Reply(200, {"Content-Type": "application/xml"}, body.encode())


def _object(world: World, dialect: str, path: str) -> bytes | None:
    prefix, _, file = path.rpartition("/")
    files = world.object_files(dialect, prefix)
    return files.get(file) if files else None


_GCS_JSON = re.compile(r"/(?:download/)?storage/v1/b/([^/]+)/o/(.+)")


def gcs(world: World, request: Request, ports: dict) -> Reply:
    """The XML paths (`/bucket/key`) and the JSON API's metadata and media."""
    found = _GCS_JSON.fullmatch(request.path)
    bucket, key = (found[1], found[2]) if found else request.path.lstrip("/").partition("/")[::2]
    token = request.bearer()
    if not world.may_read(token, f"{bucket}/{key}", is_private(bucket)):
        return text_reply(403 if token else 401, "<Error><Code>AccessDenied</Code></Error>")
    content = _object(world, "gcs", f"{bucket}/{key}")
    if content is None:
        return text_reply(404, "<Error><Code>NoSuchKey</Code></Error>")
    checksum = base64.b64encode(crc32c(content)).decode()
    if found and request.query.get("alt") != "media":
        return _json(
            {
                "kind": "storage#object",
                "name": key,
                "bucket": bucket,
                "generation": "1",
                "size": str(len(content)),
                "etag": md5_hex(content),
                "crc32c": checksum,
            }
        )
    headers = {"Last-Modified": MODIFIED, "x-goog-generation": "1", "x-goog-stored-content-length": str(len(content))}
    if world.settings["checksums"]:
        headers["x-goog-hash"] = f"crc32c={checksum}"
    return file_reply(request, content, f'"{md5_hex(content)}"', headers)


def plain(world: World, request: Request, ports: dict) -> Reply:
    """Files below folders. Those in `private-<who>/` want a header that the operator configured."""
    path = request.path.lstrip("/")
    if not world.may_read(request.bearer(), path, is_private(path)):
        return text_reply(403 if request.bearer() else 401, "no")
    content = _object(world, "http", path)
    if content is None:
        return text_reply(404, "not found")
    return file_reply(request, content, f'"{sha256_hex(content)[:32]}"', {"Last-Modified": MODIFIED})


DIALECTS = {"hub": hub, "cdn": cdn, "s3": s3, "gcs": gcs, "http": plain}
