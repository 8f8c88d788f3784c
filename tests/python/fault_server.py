#!/usr/bin/env python3
"""Serves adapters as a hub, a CDN, S3, GCS and a plain web server would, and breaks them on demand.

    python fault_server.py            prints one JSON line with its ports and its TLS authority, then serves until its standard input ends

`faults/world.py` says what it has, `faults/programs.py` which faults there are. All of it is set and read at the control port:
`POST /control` with a JSON object `{"op": ..}`, see `Control`.
"""

import asyncio
import json
import sys
import time
import traceback

from faults import programs, tls
from faults.dialects import DIALECTS
from faults.programs import Exchange, Rule
from faults.wire1 import HEAD_MAX, Reply, Request, read_request
from faults.world import World


class Control:
    """The operations of the control port: each is a method, its parameters the other members of the JSON object."""

    def __init__(self, world: World):
        self.world = world

    def answer(self, request: Request) -> Reply:
        try:
            ask = json.loads(request.body)
            value, status = getattr(self, f"op_{ask.pop('op')}")(**ask), 200
        except Exception as error:  # the test that asked wrongly should see why
            value, status = {"error": f"{type(error).__name__}: {error}"}, 400
        return Reply(status, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def op_rules(self, rules: list[dict]):
        """Replaces all rules."""
        self.world.rules = [Rule.parse(rule) for rule in rules]

    def op_add_rules(self, rules: list[dict]):
        """Adds rules behind those that are there."""
        self.world.rules += [Rule.parse(rule) for rule in rules]

    def op_hits(self):
        """How many requests each rule has matched, those it let pass included."""
        return [rule.hits for rule in self.world.rules]

    def op_repo(self, name: str, value: dict | None):
        self._set(self.world.repos, name, value)

    def op_object(self, name: str, value: dict | None):
        self._set(self.world.objects, name, value)

    def op_token(self, name: str, value: list[str] | None):
        """Whom a credential lets read what; null revokes it."""
        self._set(self.world.tokens, name, value)

    def op_settings(self, **settings):
        self.world.settings |= settings

    def op_log(self, since: int = 0):
        """Requests from number `since` on, oldest first."""
        first = self.world.seen - len(self.world.log)
        return list(self.world.log)[max(0, since - first) :]

    def op_count(self):
        return {"requests": self.world.seen, "open_connections": self.world.open_connections}

    @staticmethod
    def _set(where: dict, name: str, value):
        if value is None:
            where.pop(name, None)
        else:
            where[name] = value


class Listener:
    """One port, one dialect."""

    def __init__(self, world: World, dialect: str, ports: dict):
        self.world, self.dialect, self.ports = world, dialect, ports

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        counts = self.world.open_connections
        counts[self.dialect] = counts.get(self.dialect, 0) + 1
        ends = asyncio.create_task(reader_ended(reader, writer))
        try:
            while await self._one(reader, writer, ends):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, TimeoutError):
            pass  # the client went away, which it may
        except Exception:
            traceback.print_exc()
        finally:
            ends.cancel()
            counts[self.dialect] -= 1
            writer.transport.abort() if writer.is_closing() else writer.close()

    async def _one(self, reader, writer, ends) -> bool:
        request = await read_request(reader)
        if request is None:
            return False
        # One `Rule.takes` for each request: it counts.
        rule = self.world.rule_for(self.dialect, request)
        if rule is not None and rule.do == "no_range":
            request.headers = [(name, value) for name, value in request.headers if name.lower() != "range"]
        reply = DIALECTS[self.dialect](self.world, request, self.ports)
        exchange = Exchange(request, reply, writer)
        entry = {
            "dialect": self.dialect,
            "method": request.method,
            "path": request.path,
            "target": request.target,
            "headers": request.headers,
            "rule": rule.do if rule else None,
            "start": time.time(),
        }
        self.world.log.append(entry)
        self.world.seen += 1
        try:
            if rule is None:
                await exchange.honest()
            else:
                fault = asyncio.create_task(programs.run(rule, exchange))
                done, _ = await asyncio.wait({fault, ends}, return_when=asyncio.FIRST_COMPLETED)
                if fault not in done:
                    fault.cancel()
                    return False
                fault.result()
        finally:
            entry |= {"status": exchange.reply.status, "sent": exchange.sent, "end": time.time()}
        return exchange.keep_alive and (request.header("connection") or "").lower() != "close"


async def reader_ended(reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
    """Returns when the client closes, so that no fault program outlives its client."""
    while not reader.at_eof() and not writer.is_closing() and reader.exception() is None:
        await asyncio.sleep(0.02)


async def control_connection(control: Control, reader, writer):
    while (request := await read_request(reader)) is not None:
        reply = control.answer(request)
        writer.write(reply.head_bytes(**{"Content-Length": str(len(reply.body))}) + reply.body)
        await writer.drain()
    writer.close()


async def serve():
    world, ports = World(), {}
    servers = []

    async def listen(name: str, handler, **more):
        server = await asyncio.start_server(handler, "127.0.0.1", 0, limit=HEAD_MAX, backlog=1024, **more)
        servers.append(server)
        ports[name] = server.sockets[0].getsockname()[1]

    for dialect in DIALECTS:
        await listen(dialect, Listener(world, dialect, ports).connection)
    folder, certificates = tls.temporary()
    for name, certificate in certificates.items():
        await listen(f"tls_{name}", Listener(world, "http", ports).connection, ssl=certificate)
    control = Control(world)
    await listen("control", lambda reader, writer: control_connection(control, reader, writer))
    print(json.dumps({"ports": ports, "authority": f"{folder.name}/trusted.pem"}), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    folder.cleanup()


if __name__ == "__main__":
    asyncio.run(serve())
