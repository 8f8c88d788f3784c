"""Proof that nobody connected: listeners on every local address, and an eye on a process's sockets."""

import os
import socket
import threading
import time
from pathlib import Path


class Canary:
    """Listens on every local address, IPv4 and IPv6, and counts who comes; watches for connections of the server to elsewhere."""

    def __init__(self, port: int = 0):
        self.sockets, self.connects, self.strays = [], [], set()
        four = socket.create_server(("0.0.0.0", port), backlog=128)
        self.port = four.getsockname()[1]
        self.sockets.append(four)
        if socket.has_ipv6:
            try:
                six = socket.socket(socket.AF_INET6)
                six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                six.bind(("::", self.port))
                six.listen(128)
                self.sockets.append(six)
            except OSError:
                six.close()
        self.is_open = True
        for one in self.sockets:
            threading.Thread(target=self._accept, args=(one,), daemon=True).start()

    def _accept(self, listener: socket.socket):
        while self.is_open:
            try:
                connection, peer = listener.accept()
            except OSError:
                return
            self.connects.append((time.time(), peer))
            connection.close()

    def close(self):
        self.is_open = False
        for one in self.sockets:
            one.close()


class Watch:
    """Every remote end of a process's TCP sockets, attempts included, seen by looking every few milliseconds."""

    def __init__(self, pid: int, known_ports: set[int]):
        self.pid, self.known, self.strays, self.is_on = pid, known_ports, set(), True
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self):
        while self.is_on:
            inodes = self._inodes()
            for table in ("tcp", "tcp6"):
                for line in Path(f"/proc/{self.pid}/net/{table}").read_text().splitlines()[1:]:
                    fields = line.split()
                    remote, port = fields[2].rsplit(":", 1)
                    local_port = int(fields[1].rsplit(":", 1)[1], 16)
                    if fields[9] in inodes and fields[3] != "0A" and not {int(port, 16), local_port} & self.known:
                        self.strays.add((remote, int(port, 16), fields[3]))
            time.sleep(0.004)

    def _inodes(self) -> set[str]:
        found = set()
        for fd in Path(f"/proc/{self.pid}/fd").iterdir():
            try:
                link = os.readlink(fd)
            except OSError:
                continue
            if link.startswith("socket:["):
                found.add(link[8:-1])
        return found

    def stop(self) -> set:
        self.is_on = False
        self.thread.join()
        return self.strays
