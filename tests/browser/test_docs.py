"""The page at `/docs` in a real browser: it shows the document, sends requests, and is usable by everybody."""

import pytest

from conftest import PHONE
from loramux_server import Server

KEY = "a-key-of-this-test"


def open_docs(tab, base: str, **settings):
    opened = tab(base, **settings)
    opened.page.goto(f"{base}/docs")
    return opened


def test_an_operation_shows_its_fields_and_sends_its_example(server, tab):
    page = open_docs(tab, server.base).page
    page.get_by_role("navigation").get_by_text("/v1/completions").click()
    box = page.locator("details#createCompletion")
    fields = box.locator(":scope > .inside dl.fields").first
    assert "required" in fields.locator("dt", has_text="prompt").first.inner_text()
    names = fields.locator("dt > code").all_inner_texts()
    assert names[:3] == ["model", "prompt", "max_tokens"], names
    box.locator("details.nested > summary", has_text="best_of").click()
    assert "≤ 8" in box.locator("dt", has_text="best_of").locator("xpath=following-sibling::dd[1]").inner_text()
    box.get_by_role("button", name="Send").click()
    box.get_by_text("200 OK").wait_for()
    assert '"object": "text_completion"' in box.get_by_label("Answer").inner_text()


def test_a_stream_is_shown_as_it_comes(server, tab):
    page = open_docs(tab, server.base).page
    page.get_by_role("navigation").get_by_text("/v1/chat/completions").click()
    box = page.locator("details#createChatCompletion")
    box.get_by_label("Body").fill('{"model": "demo", "messages": [{"role": "user", "content": "Hello!"}], "stream": true, "max_tokens": 8}')
    box.get_by_role("button", name="Send").click()
    box.locator("pre", has_text="data: [DONE]").wait_for()
    assert "text/event-stream" in box.get_by_text("200 OK").inner_text()


def test_with_keys_the_page_asks_for_one_and_keeps_it_nowhere(tab, data_dir):
    with Server(data_dir=data_dir, api_key=KEY) as guarded:
        page = open_docs(tab, guarded.base).page
        page.get_by_text("This server needs an API key.").wait_for()
        page.get_by_label("API key").fill(KEY)
        page.get_by_role("button", name="Load").click()
        page.get_by_role("navigation").get_by_text("/v1/completions").wait_for()
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie, location.href.includes('key')]") == [0, 0, "", False]


@pytest.mark.parametrize("settings", [{}, {"scheme": "dark"}, {"size": PHONE}], ids=["light", "dark", "phone"])
def test_axe_finds_nothing(server, tab, axe, settings):
    opened = open_docs(tab, server.base, **settings)
    opened.page.locator("details#createCompletion > summary").click()
    opened.page.locator("details#createCompletion").get_by_role("button", name="Send").wait_for()
    assert opened.axe_violations(axe) == []
