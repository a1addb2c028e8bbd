"""The routes that move files: LFS, xet tokens, downloads; and the second origin, which must never see a token."""

import hashlib
import shutil
import time
from collections.abc import AsyncIterator
from math import ceil
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from .access import Refused
from .api import Api


class Transfer:
    """Routes of the Hub itself."""

    def __init__(self, hub: Any, api: Api):
        self.hub, self.api = hub, api

    def routes(self) -> list[Route]:
        found = [
            Route("/api/{kind}/{owner}/{name}/xet-{access}-token/{rev}", self.xet_token),
            Route("/lfs/verify", self.verify, methods=["POST"]),
            Route("/lfs/complete/{signature}", self.complete, methods=["POST"]),
        ]
        for repo in ("/{owner}/{name}", "/{kind}/{owner}/{name}"):
            found.append(Route(repo + "/info/lfs/objects/batch", self.batch, methods=["POST"]))
            found.append(Route(repo + "/resolve/{rev}/{path:path}", self.resolve))
        return found

    async def batch(self, request: Request) -> Response:
        """Where to put what is not here yet; a valid token is enough, as a reader may open a pull request."""
        self.api.repo(request)
        objects = []
        for asked in (await request.json())["objects"]:
            told = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                verify = {"href": f"{self.hub.url}/lfs/verify"}
                told |= {"authenticated": True, "actions": {"upload": self.upload(asked), "verify": verify}}
            objects.append(told)
        return JSONResponse({"transfer": "basic", "objects": objects})

    def upload(self, asked: dict) -> dict:
        """A signed address, or one for each part of a large file."""
        if asked["size"] <= self.hub.part_size:
            return {"href": f"{self.hub.storage_url}/upload/{asked['oid']}?X-Amz-Signature={self.hub.sign()}"}
        header = {"chunk_size": str(self.hub.part_size)}
        for part in range(1, ceil(asked["size"] / self.hub.part_size) + 1):
            address = f"{self.hub.storage_url}/part/{asked['oid']}/{part}"
            header[f"{part:05d}"] = f"{address}?X-Amz-Signature={self.hub.sign()}"
        return {"href": f"{self.hub.url}/lfs/complete/{self.hub.sign()}", "header": header}

    async def complete(self, request: Request) -> Response:
        """Joins the parts of an upload."""
        if request.path_params["signature"] not in self.hub.signatures:
            raise Refused(403, "Invalid signature")
        asked = await request.json()
        folder = self.hub.folder / "parts" / asked["oid"]
        parts = [folder / f"{part['partNumber']}.{part['etag'].strip(chr(34))}" for part in asked["parts"]]

        async def joined() -> AsyncIterator[bytes]:
            for part in parts:
                yield part.read_bytes()

        if not all(part.is_file() for part in parts) or not await self.hub.objects.receive(joined(), asked["oid"]):
            raise Refused(400, "The parts do not make the file")
        shutil.rmtree(folder)
        return JSONResponse({})

    async def verify(self, request: Request) -> Response:
        asked = await request.json()
        if self.hub.size_of(asked["oid"]) != asked["size"]:
            raise Refused(404, "The object is not here")
        return JSONResponse({})

    async def xet_token(self, request: Request) -> Response:
        """Sends the client to a store in a local folder, where hf_xet itself writes."""
        if self.hub.xet_store is None:
            raise Refused(404, "Not found")
        access = request.path_params["access"]
        revision = unquote(request.path_params["rev"])
        repo = self.api.repo(request, access if revision not in ("", "None") else "read")
        told = (f"local://{self.hub.xet_store}", f"xet-{access}-{repo.name}", int(time.time()) + 3600)
        names = ("X-Xet-Cas-Url", "X-Xet-Access-Token", "X-Xet-Token-Expiration")
        body = dict(zip(("casUrl", "accessToken", "exp"), told, strict=True))
        return JSONResponse(body, headers=dict(zip(names, map(str, told), strict=True)))

    async def resolve(self, request: Request) -> Response:
        """A file's bytes, or for a large one where they are."""
        repo = self.api.repo(request)
        commit = self.api.revision(repo, request)
        path = unquote(request.path_params["path"])
        file, headers = repo.files(commit).get(path), {"X-Repo-Commit": commit}
        if file is None:
            refused = Refused(404, "Entry not found", "EntryNotFound").response()
            refused.headers.update(headers)
            return refused
        if not file.lfs:
            data = self.hub.objects.path(file.sha256)
            return FileResponse(data, headers=headers | {"ETag": f'"{file.oid}"'}, media_type="text/plain")
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        if xet := self.hub.xet_hash(file.sha256):
            token = f"{self.hub.url}/api/{repo.kind}s/{repo.name}/xet-read-token/{commit}"
            headers |= {"X-Xet-Hash": xet, "Link": f'<{token}>; rel="xet-auth"'}
        address = f"{self.hub.storage_url}/object/{file.sha256}?X-Amz-Signature={self.hub.sign()}"
        return RedirectResponse(address, 302, headers)


class Storage:
    """Routes of the second origin: signed addresses only, and never with a token."""

    def __init__(self, hub: Any):
        self.hub = hub

    def routes(self) -> list[Route]:
        return [
            Route("/object/{oid}", self.download),
            Route("/upload/{oid}", self.upload, methods=["PUT"]),
            Route("/part/{oid}/{part:int}", self.part, methods=["PUT"]),
        ]

    def check(self, request: Request) -> str:
        if "authorization" in request.headers:
            raise Refused(400, "Only one auth mechanism allowed")
        if request.query_params.get("X-Amz-Signature") not in self.hub.signatures:
            raise Refused(403, "Invalid signature")
        return request.path_params["oid"]

    async def download(self, request: Request) -> Response:
        oid = self.check(request)
        path = self.hub.objects.path(oid) if oid in self.hub.objects else self.hub.object_from_xet(oid)
        return FileResponse(path, headers={"ETag": f'"{oid}"'}, media_type="application/octet-stream")

    async def upload(self, request: Request) -> Response:
        if not await self.hub.objects.receive(request.stream(), self.check(request)):
            raise Refused(400, "The content does not have the hash it was announced with")
        return PlainTextResponse("")

    async def part(self, request: Request) -> Response:
        folder: Path = self.hub.folder / "parts" / self.check(request)
        folder.mkdir(parents=True, exist_ok=True)
        data = b"".join([chunk async for chunk in request.stream()])
        etag = hashlib.md5(data).hexdigest()
        (folder / f"{request.path_params['part']}.{etag}").write_bytes(data)
        return PlainTextResponse("", headers={"ETag": f'"{etag}"'})
