"""A long stream beside a test."""

import json
import threading

import httpx

from loramux_server import Server, wait_until
from wire import Stream, check_error, sse_lines

LONG = dict(model="demo", prompt="Once upon a time", temperature=0, max_tokens=1900, ignore_eos=True)


class Background:
    """A long stream in a thread. `events` counts what has arrived; `stop` closes the connection."""

    def __init__(self, server: Server, **changes):
        self.events, self.stream, self.failure, self.status = 0, None, None, None
        self._client = httpx.Client(base_url=server.base, timeout=120, headers=server.headers, trust_env=False)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=({**LONG, **changes, "stream": True},), daemon=True)
        self._thread.start()

    def _run(self, body: dict):
        try:
            with self._client.stream("POST", "/v1/completions", json=body) as answer:
                self.status = answer.status_code
                if answer.status_code != 200:
                    self.failure = check_error(json.loads(answer.read()))
                    return
                self.stream = Stream(self._lines(answer))
        except (httpx.HTTPError, AssertionError) as error:
            self.failure = error

    def _lines(self, answer):
        for line in sse_lines(answer):
            self.events += line.startswith("data: ")
            yield line
            if self._stopped.is_set():
                answer.close()
                return

    def wait_running(self):
        wait_until(lambda: self.events > 3 or self.failure, "the stream runs")
        assert not self.failure, self.failure
        return self

    def stop(self):
        self._stopped.set()
        self._thread.join(30)

    def result(self, timeout_s: float = 60) -> Stream:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the stream has not ended"
        assert self.failure is None, self.failure
        return self.stream
