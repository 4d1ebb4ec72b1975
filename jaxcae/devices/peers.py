"""Who is still there: connections between the processes of a run, beside JAX's own.

JAX hears of a lost process by heartbeats, after 100 seconds, and then aborts the others without a
word of which one it was. Here every process holds a connection to process 0. A process that is
killed loses it at once; one that ends says with which exit code; one that is stopped, or whose
machine is off, no longer sends its beat. Who hears of any of these ends with one line.

Nothing on these connections is encrypted, as nothing is on JAX's; a token that process 0 hands out
keeps strangers who try ports from taking part.
"""

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable

BEAT = 1.0
"""Seconds between two signs of life."""
_MAX_LINE = 256

Ended = Callable[[int, int, str], None]
"""What to do where a process is no longer there: `(its number, exit code, how)`."""


def listener(host: str) -> socket.socket:
    """Listen on one address of this machine, at a port that the system chooses."""
    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((host, 0), family=family)


class Peers:
    """The connections of one process; a thread of its own looks after them.

    Args:
        process: The number of this process, from 0.
        count: How many there are.
        patience: Seconds without a sign of life after which a process counts as stuck. They are
            counted in this thread's own rounds, so that a pause of the whole machine is none.
        ended: Called from the thread, once, where a process is gone, stuck, or ended with an exit
            code other than 0.
    """

    def __init__(self, process: int, count: int, patience: float, ended: Ended):
        self._process, self._count = process, count
        self._rounds, self._tell = max(2, round(patience / BEAT)), ended
        self._links: dict[int, socket.socket] = {}
        self._silent: dict[int, int] = {}
        self._rest: dict[socket.socket, bytes] = {}
        self._over, self._first_ended = threading.Event(), threading.Event()
        self._poll = selectors.DefaultSelector()
        self._write = threading.RLock()  # a signal's handler may say farewell in the midst of it
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def serve(self, server: socket.socket, token: str, seconds: float) -> None:
        """Be process 0: take the connections of all others, who say `token`, and watch.

        Raises:
            OSError: If not all come in time.
        """
        server.settimeout(seconds)
        with server:
            while len(self._links) < self._count - 1:
                link, _ = server.accept()
                link.settimeout(seconds)
                words = _first_line(link).split()
                known = len(words) == 2 and words[0] == token and words[1].isdecimal()
                if known and 0 < (number := int(words[1])) < self._count:
                    self._keep(number, link)
                else:
                    link.close()
        self._thread.start()

    def join(self, host: str, port: int, token: str, seconds: float) -> None:
        """Be one of the others: connect to process 0, and watch.

        Raises:
            OSError: If it does not answer.
        """
        link = socket.create_connection((host, port), timeout=seconds)
        link.sendall(f"{token} {self._process}\n".encode())
        self._keep(0, link)
        self._thread.start()

    def farewell(self, code: int) -> None:
        """Tell the others that this process ends, and with which exit code."""
        self._over.set()
        self._send(f"end {self._process} {code}")

    def wait_for_first(self, seconds: float | None = None) -> None:
        """Wait until process 0 has ended well; where it does not, `ended` is called."""
        self._first_ended.wait(seconds)

    def _keep(self, number: int, link: socket.socket) -> None:
        link.settimeout(BEAT)  # for a send to one that does not read
        self._links[number], self._silent[number], self._rest[link] = link, 0, b""
        self._poll.register(link, selectors.EVENT_READ, number)

    def _watch(self) -> None:
        """Look after the connections until there is none, or something is told."""
        due = time.monotonic() + BEAT
        while self._links:
            for key, _ in self._poll.select(max(0.0, due - time.monotonic())):
                if self._hear(key.data, self._links[key.data]):
                    return
            if time.monotonic() < due:
                continue
            due = time.monotonic() + BEAT
            self._send("beat")
            for number in self._silent:
                self._silent[number] += 1
                if self._silent[number] > self._rounds and not self._over.is_set():
                    seconds = self._rounds * BEAT
                    return self._end(number, 1, f"has given no sign of life for {seconds:g} s")

    def _hear(self, number: int, link: socket.socket) -> bool:
        """Read what came; return whether it ended the watch."""
        try:
            data = link.recv(4096)
        except OSError:
            data = b""
        if not data:
            self._drop(number)
            if not self._over.is_set():
                self._end(number, 1, "is gone")
                return True
            return False
        self._silent[number] = 0
        *lines, self._rest[link] = (self._rest[link] + data)[-_MAX_LINE:].split(b"\n")
        for line in lines:
            words = line.decode("ascii", "replace").split(maxsplit=3)
            if words[:1] != ["end"] or len(words) < 3:
                continue
            who, code, how = int(words[1]), int(words[2]), " ".join(words[3:])
            if code == 0 and not how:
                self._drop(number)
                if who == 0:
                    self._first_ended.set()
            elif not self._over.is_set():
                self._end(who, code, how or f"ended with exit code {code}")
                return True
        return False

    def _end(self, who: int, code: int, how: str) -> None:
        if self._process == 0:  # the others have no connection to it
            self._send(f"end {who} {code} {how}", but=who)
        self._tell(who, code, how)

    def _send(self, text: str, but: int = -1) -> None:
        with self._write:
            for number, link in list(self._links.items()):
                if number != but:
                    with contextlib.suppress(OSError):
                        link.sendall(f"{text}\n".encode())

    def _drop(self, number: int) -> None:
        link = self._links.pop(number)
        del self._silent[number], self._rest[link]
        self._poll.unregister(link)
        link.close()


def _first_line(link: socket.socket) -> str:
    line = b""
    with contextlib.suppress(OSError):
        while not line.endswith(b"\n") and len(line) < _MAX_LINE and (byte := link.recv(1)):
            line += byte
    return line.decode("ascii", "replace")
