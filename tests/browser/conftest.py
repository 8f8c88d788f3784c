"""Fixtures: the system's Chromium without a window, and servers of `tests/python`."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tests/python"))

from loramux_server import Server, slow_model  # noqa: E402, F401

AXE = "4.11.0"
LAPTOP, PHONE = (1280, 800), (360, 740)
ADAPTERS = REPOSITORY / "models/demo/adapters"


def missing(why: str):
    """An error where a browser is required, else a reason to skip."""
    pytest.fail(why) if os.environ.get("LORAMUX_REQUIRE_BROWSER") else pytest.skip(why)


def chromium() -> str:
    named = os.environ.get("LORAMUX_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    return found or missing("no Chromium: install it (apt-get install chromium), or name one in LORAMUX_CHROMIUM")


@pytest.fixture(scope="session")
def browser():
    with sync_playwright() as playwright:
        # Chromium's own sandbox cannot be set up by root in a container.
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=chromium(), args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def axe() -> str:
    """The script of axe-core, from npm once."""
    folder = REPOSITORY / ".cache" / f"axe-core-{AXE}"
    script = folder / "package/axe.min.js"
    if not script.is_file():
        if not shutil.which("npm"):
            missing("no npm, which brings axe-core")
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["npm", "pack", "--silent", f"axe-core@{AXE}"], cwd=folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"npm pack axe-core: {done.stderr[-500:]}"
        with tarfile.open(folder / f"axe-core-{AXE}.tgz") as archive:
            archive.extract("package/axe.min.js", folder, filter="data")
    return script.read_text()


class Page:
    """A tab that notes what must not happen: script errors, refused content, requests to anybody else."""

    def __init__(self, browser, base: str, size=LAPTOP, scheme="light"):
        self.base = base.rstrip("/")
        self.tab = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, reduced_motion="reduce")
        self.tab.set_default_timeout(20_000)
        self.page = self.tab.new_page()
        self.errors, self.foreign = [], []
        # A 401 that a test asks for is logged by the browser as a failed load; that is no error of the page.
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" and "Failed to load resource" not in m.text else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: None if request.url.startswith(self.base) else self.foreign.append(request.url))

    def open(self, view="overview"):
        self.page.goto(f"{self.base}/#{view}")
        self.page.wait_for_selector(f"#view-{view}:not([hidden])")
        return self.page

    def axe_violations(self, script: str) -> list:
        # By the debugger: the page's own policy lets no script in.
        debugger = self.tab.new_cdp_session(self.page)
        debugger.send("Runtime.evaluate", {"expression": script})
        run = ("axe.run(document, {resultTypes: ['violations']}).then(({violations}) => JSON.stringify(violations.map("
               "(v) => [v.id, ...v.nodes.map((n) => n.html.slice(0, 200) + ' ' + n.failureSummary)])))")
        answer = debugger.send("Runtime.evaluate", {"expression": run, "awaitPromise": True, "returnByValue": True})
        return json.loads(answer["result"]["value"])

    def close(self):
        self.tab.close()
        assert not self.errors, self.errors
        assert not self.foreign, self.foreign


@pytest.fixture
def tab(browser):
    """`tab(base, size=, scheme=)`; closed after the test, which fails if the page had errors or asked anybody else."""
    opened = []

    def new(base: str, **settings) -> Page:
        opened.append(Page(browser, base, **settings))
        return opened[-1]

    yield new
    for page in opened:
        page.close()


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def roots(tmp_path_factory) -> Path:
    """Adapters that the server may load by path."""
    root = tmp_path_factory.mktemp("roots")
    for name in ("haiku", "sql"):
        shutil.copytree(ADAPTERS / name, root / name)
    return root


@pytest.fixture(scope="session")
def server(data_dir, roots):
    """Without any key, with the operator's listener: its page can do everything."""
    with Server("--admin-listen", "127.0.0.1:0", "--adapter-root", str(roots), data_dir=data_dir) as server:
        with server.admin() as admin:
            server.console = str(admin.base_url).rstrip("/")
        yield server


def wait_for_text(locator, is_right, read=None, timeout_s: float = 20.0):
    """Waits until the text of an element (or what `read` gives) is right."""
    deadline = time.monotonic() + timeout_s
    while not is_right(text := (read or locator.inner_text)()):
        assert time.monotonic() < deadline, f"still {text!r}"
        time.sleep(0.05)
