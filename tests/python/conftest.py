"""Fixtures: one demo server for the session, and a way to start others. Failing tests print the servers' logs."""

import openai
import pytest

import described
from loramux_server import Server, slow_model

ADAPTERS = ["pirate", "haiku", "sql", "shout"]
MODELS = ["demo", *ADAPTERS]

described.install()


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> str:
    """Where the built-in model is unpacked, once for all servers of a session."""
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def demo(data_dir):
    """The shared server: built-in model and adapters. Tests leave it as they found it."""
    with Server(data_dir=data_dir) as server:
        yield server


@pytest.fixture
def start_server(data_dir):
    """`start_server(flags...)`; ended after the test."""
    started = []

    def start(*flags, **settings) -> Server:
        server = Server(*flags, data_dir=data_dir, **settings)
        started.append(server)
        return server

    yield start
    for server in started:
        server.close()


@pytest.fixture(scope="session")
def slow_flags(tmp_path_factory) -> list[str]:
    return slow_model(tmp_path_factory.mktemp("slow"))


@pytest.fixture
def client(demo):
    with openai.OpenAI(base_url=f"{demo.base}/v1", api_key="EMPTY", max_retries=0, timeout=60) as client:
        yield client


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        for server in Server.live:
            report.sections.append((f"log of loramux at {getattr(server, 'address', '?')}", server.log()[-4000:]))
    return report
