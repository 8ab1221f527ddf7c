"""A client of `fbcache serve`, of Python's standard library alone."""

import json
import queue
import socket
import threading
import time
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.parse import urlsplit

LOOK_SECONDS = 0.1
"""So often it is asked whether somebody wants the drawing to end."""

SILENT_SECONDS = 60
"""A server that says nothing for so long is gone: it sends a comment every 15 seconds."""


class ServerError(RuntimeError):
    """What the server has answered in place of pictures."""


def draw(address, key, fields, check=lambda: None, on_step=lambda step: None):
    """The pictures of a request, as the server's objects: ``b64_json``, ``seed``, ``fbcache``.

    A server whose queue is full, or which is still starting, is asked again.

    Args:
        address: http://HOST:PORT.
        key: the API key; empty for none.
        fields: of POST /v1/images/generations.
        check: called ten times a second. What it raises ends the drawing, on the server too, at the next step.
        on_step: called with each event fbcache.step.

    Raises:
        ServerError: with the server's own words, or because nobody serves at the address.
    """
    fields = {**fields, "stream": True, "fbcache": {**fields.get("fbcache", {}), "progress": True}}
    while True:
        stream, events = Stream(address, key, fields), queue.Queue()
        threading.Thread(target=stream.read, args=(events,), daemon=True).start()
        try:
            pictures, wait = collect(events, check, on_step)
        finally:
            stream.leave()
        if wait is None:
            if len(pictures) < fields.get("n", 1):
                raise ServerError(f"{address}: the server has left before the last picture")
            return pictures
        moment = time.monotonic() + wait
        while time.monotonic() < moment:
            check()
            time.sleep(LOOK_SECONDS)


def collect(events, check, on_step):
    """(pictures, None) of what a Stream reads; (pictures, seconds) where the server wants to be asked again."""
    pictures = []
    while True:
        check()
        try:
            kind, what = events.get(timeout=LOOK_SECONDS)
        except queue.Empty:
            continue
        if kind == "fbcache.step":
            on_step(what)
        elif kind == "image_generation.completed":
            pictures.append(what)
        elif kind == "error":
            raise ServerError(what)
        elif kind in ("end", "again"):
            return pictures, what


class Stream:
    """A request, and the server-sent events that answer it."""

    def __init__(self, address, key, fields):
        kinds, found = {"http": HTTPConnection, "https": HTTPSConnection}, urlsplit(address)
        try:
            self.connection = kinds[found.scheme](found.hostname or "", found.port, timeout=SILENT_SECONDS)
        except (KeyError, ValueError):
            raise ServerError(f"the server's address must be http://HOST:PORT, not {address!r}") from None
        self.address, self.path, self.left = address, found.path.rstrip("/") + "/v1/images/generations", False
        self.fields, self.headers = fields, {"Content-Type": "application/json"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"

    def read(self, events):
        """Puts (kind, what) of each event into a queue; last "end", "error" or "again"."""
        try:
            self.connection.connect()
            if self.left:
                return
            self.connection.request("POST", self.path, json.dumps(self.fields), self.headers)
            response = self.connection.getresponse()
            if response.status == 200:
                kind = None
                for line in response:
                    if self.left:
                        return
                    name, _, value = line.decode().rstrip("\r\n").partition(": ")
                    if name == "event":
                        kind = value
                    elif name == "data":
                        found = json.loads(value)
                        events.put((kind, message_of(found) if kind == "error" else found))
                events.put(("end", None))
            elif response.status in (429, 503) and response.getheader("Retry-After"):
                events.put(("again", float(response.getheader("Retry-After"))))
            else:
                events.put(("error", f"{response.status}: {message_of(response.read())}"))
        except ConnectionRefusedError:
            events.put(("error", f"nobody serves at {self.address}; `fbcache serve` does"))
        except (OSError, HTTPException, ValueError) as error:
            events.put(("error", f"{self.address}: {type(error).__name__}: {error}"))
        finally:
            self.connection.close()

    def leave(self):
        """Ends ``read``, which another thread does. The server stops drawing what nobody waits for."""
        self.left, connected = True, self.connection.sock
        if connected is not None:
            # Wakes whoever reads, which closing does not. It may be closed already.
            with suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)


def message_of(body):
    """The sentence in an error's body; its beginning, where another server has answered."""
    try:
        found = json.loads(body) if isinstance(body, bytes) else body
        return found["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return str(body[:200], "utf-8", "replace") if isinstance(body, bytes) else str(body)[:200]
