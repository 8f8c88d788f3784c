"""A small OpenTelemetry collector: takes OTLP over HTTP in protobuf, and keeps the spans."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse


def plain(value):
    """An attribute's value."""
    return getattr(value, value.WhichOneof("value"))


class Span:
    def __init__(self, raw, resource: dict):
        self.name, self.resource = raw.name, resource
        self.trace_id, self.span_id, self.parent_id = raw.trace_id.hex(), raw.span_id.hex(), raw.parent_span_id.hex()
        self.start_ns, self.end_ns = raw.start_time_unix_nano, raw.end_time_unix_nano
        self.is_error = raw.status.code == 2
        self.kind = raw.kind
        self.attributes = {one.key: plain(one.value) for one in raw.attributes}


class Collector:
    """`with Collector() as collector`: its `url` is for --otlp-endpoint."""

    def __init__(self, hangs: bool = False):
        self.spans: list[Span] = []
        self.requests: list[tuple[str, dict]] = []
        self.hangs = hangs
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
                if collector.hangs:
                    time.sleep(60)
                    return
                collector.take(body)
                reply = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def take(self, body: bytes):
        for resource_spans in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = {one.key: plain(one.value) for one in resource_spans.resource.attributes}
            for scope in resource_spans.scope_spans:
                self.spans += [Span(raw, resource) for raw in scope.spans]

    def of(self, request_id: str) -> list[Span]:
        """The spans of a request, or none yet."""
        roots = [span for span in self.spans if span.attributes.get("loramux.request_id") == request_id]
        return [span for root in roots for span in self.spans if root.span_id in (span.span_id, span.parent_id)]

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
