"""The two servers of a loopback Hub, in threads: they record what they are sent, and fail where a test asks them to."""

import asyncio
import re
import secrets
import shutil
import socket
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .access import Refused, User
from .api import Api
from .storage import Objects, Repo
from .transfer import Storage, Transfer
from .xet import stored_files


@dataclass
class Recorded:
    """A request as it came in; `storage` is the second origin."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    origin: str
    body: bytes = b""
    status: int | None = None

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass
class Fault:
    """What goes wrong with the `nth` to `nth + times - 1`th request of a method to a path.

    `status` answers so; without it the connection breaks, after `sent` bytes of the answer or `received` bytes of
    the request. `seconds` only slows the answer down, before it begins and before each piece.
    """

    method: str = ""
    path: str = ""
    nth: int = 1
    times: int = 1
    status: int | None = None
    message: str = "Internal Error"
    sent: int | None = None
    received: int | None = None
    seconds: float | None = None
    seen: int = 0

    def strikes(self, request: Recorded) -> bool:
        if not (re.fullmatch(self.method or ".*", request.method) and re.search(self.path, request.path)):
            return False
        self.seen += 1
        return self.nth <= self.seen < self.nth + self.times


class LoopbackHub:
    """A context: the Hub at `url`, its file storage at `storage_url`, everything it keeps below `folder`.

    With `xet`, large files go to a store in a local folder, else by LFS; in parts if larger than `part_size`.
    """

    def __init__(self, folder: Path, *, xet: bool = False, part_size: int = 2**40, page_size: int = 1000):
        self.folder = folder
        self.part_size, self.page_size = part_size, page_size
        self.xet_store = folder / "xet" if xet else None
        self.objects = Objects(folder / "objects")
        self.users: dict[str, User] = {}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.signatures: set[str] = set()
        self.requests: list[Recorded] = []
        self.faults: list[Fault] = []
        if xet:
            (folder / "xet").mkdir()

    def __enter__(self) -> "LoopbackHub":
        api = Api(self)
        self.servers = [
            Server("hub", self, api.routes() + Transfer(self, api).routes()),
            Server("storage", self, Storage(self).routes()),
        ]
        self.url, self.storage_url = (server.url for server in self.servers)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for server in self.servers:
            server.stop()

    def add_user(self, name: str, *, orgs: dict[str, str] | None = None, role: str = "write") -> str:
        """A new user's token; `orgs` maps names to "read" or "write"."""
        token = "hf_" + "".join(secrets.choice("abcdefghijklmnopqrstuvwxyzABCDEFGHIJ0123456789") for _ in range(34))
        self.users[token] = User(name, orgs or {}, role)
        return token

    def fault(self, **fields: Any) -> Fault:
        """Plans a Fault."""
        self.faults.append(Fault(**fields))
        return self.faults[-1]

    def model(self, name: str) -> Repo:
        return self.repos["model", name]

    def sent(self, method: str = ".*", path: str = "") -> list[Recorded]:
        """The requests of a method to paths that hold a pattern."""
        return [seen for seen in self.requests if re.fullmatch(method, seen.method) and re.search(path, seen.path)]

    def sign(self) -> str:
        made = secrets.token_hex(32)
        self.signatures.add(made)
        return made

    def size_of(self, sha256: str) -> int | None:
        """Size of an object in either store, or None."""
        if sha256 in self.objects:
            return self.objects.path(sha256).stat().st_size
        return self.object_from_xet(sha256).stat().st_size if self.xet_hash(sha256) else None

    def xet_hash(self, sha256: str) -> str | None:
        return stored_files(self.xet_store).get(sha256) if self.xet_store else None

    def object_from_xet(self, sha256: str) -> Path:
        """Puts a file of the xet store among the objects; on a copy, as hf_xet locks the store it works on."""
        if sha256 in self.objects:
            return self.objects.path(sha256)
        import hf_xet

        assert self.xet_store is not None
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            shutil.copytree(self.xet_store, f"{place}/xet")
            info = hf_xet.XetFileInfo(self.xet_hash(sha256), None)
            with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{place}/xet") as group:
                group.start_download_file(info, f"{place}/file")
            self.objects.add(Path(place, "file").read_bytes())
        return self.objects.path(sha256)


class Server:
    """One origin: an application on a port of its own."""

    def __init__(self, origin: str, hub: LoopbackHub, routes: list[Route]):
        self.origin, self.hub = origin, hub
        self.app = Starlette(routes=routes, exception_handlers={Refused: refuse, Exception: confess})
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        config = uvicorn.Config(self, http="h11", ws="none", lifespan="off", log_config=None, timeout_keep_alive=60)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive(), "the server did not start"
            threading.Event().wait(0.01)

    def stop(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join()
        self.socket.close()

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        scope["path"] = scope["raw_path"].decode()  # a quoted slash stays part of its segment
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        seen = Recorded(scope["method"], scope["path"], scope["query_string"].decode(), headers, self.origin)
        self.hub.requests.append(seen)
        fault = next(iter([fault for fault in self.hub.faults if fault.strikes(seen)]), None)  # each one counts
        exchange = Exchange(seen, fault, receive, send)
        with suppress(ClientDisconnect):
            if fault and fault.status:
                await exchange.drain()
                await Refused(fault.status, fault.message).response()(scope, exchange.receive, exchange.send)
            else:
                await self.app(scope, exchange.receive, exchange.send)


class Exchange:
    """A request and its answer on their way, recorded, slowed down or broken off."""

    def __init__(self, seen: Recorded, fault: Fault | None, receive: Any, send: Any):
        self.seen, self.fault = seen, fault
        self._receive, self._send = receive, send
        self.answered = 0
        self.broken = False

    def hang_up(self) -> None:
        """Closes the connection as a broken network does: uvicorn has no public way to."""
        self._receive.__self__.transport.abort()
        self.broken = True

    async def drain(self) -> None:
        while (await self.receive()).get("more_body"):
            pass

    async def receive(self) -> dict:
        message = await self._receive()
        if message["type"] == "http.request":
            self.seen.body += message.get("body", b"")
            limit = self.fault.received if self.fault else None
            if limit is not None and len(self.seen.body) >= limit:
                self.hang_up()
                return {"type": "http.disconnect"}
        return message

    async def send(self, message: dict) -> None:
        if self.broken:
            return
        body, fault = message.get("body", b""), self.fault
        if message["type"] == "http.response.start":
            self.seen.status = message["status"]
            await asyncio.sleep((fault and fault.seconds) or 0)
        if fault and fault.seconds and body:
            for start in range(0, len(body), 1 << 16):
                await asyncio.sleep(fault.seconds)
                more = message.get("more_body", False) or start + (1 << 16) < len(body)
                await self._send(message | {"body": body[start : start + (1 << 16)], "more_body": more})
            return
        if fault and fault.sent is not None and self.answered + len(body) > fault.sent:
            await self._send(message | {"body": body[: fault.sent - self.answered], "more_body": True})
            self.hang_up()
            return
        self.answered += len(body)
        await self._send(message)


async def refuse(request: Request, refused: Any) -> Response:
    return refused.response()


async def confess(request: Request, error: Exception) -> Response:
    """A mistake in this server is told to the test, not hidden behind a bare 500."""
    return JSONResponse({"error": repr(error)}, 500, {"X-Error-Message": repr(error).replace("\n", " ")})
