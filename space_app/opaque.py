"""Hides where on the server uploads are: outside, their folder is called OUTSIDE."""

import json
import os
from typing import Any

OUTSIDE = "/uploads"


class Opaque:
    """Stands between the server and Gradio (ASGI), which needs and tells a file's whole path in files, events, errors.

    A request's paths are put back only where Gradio looks for them, so that nobody's words ever contain the real one.
    """

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        """Passes a request on with the paths inside, and its answer back with those outside."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        folder, told = os.environ["GRADIO_TEMP_DIR"], False

        async def put_back() -> dict:
            if dict(scope["headers"]).get(b"content-type", b"").split(b";")[0] != b"application/json":
                return await receive()
            body, more = b"", True
            while more:
                message = await receive()
                body, more = body + message.get("body", b""), message.get("more_body", False)
            return {**message, "body": inside(body, folder)} if body else message

        async def hide(message: dict) -> None:
            nonlocal told
            if message["type"] == "http.response.start":
                headers = message["headers"]
                told = dict(headers).get(b"content-type", b"").startswith((b"application/json", b"text/"))
                if told:
                    message = {**message, "headers": [one for one in headers if one[0] != b"content-length"]}
            elif told:
                message = {**message, "body": outside(message.get("body", b""), folder)}
            await send(message)

        path = scope["path"].replace(f"file={OUTSIDE}/", f"file={folder}/", 1)
        await self.app({**scope, "path": path}, put_back, hide)


def inside(body: bytes, folder: str) -> bytes:
    """A request's JSON with the files' paths as they are on the server; anything else stays."""

    def put_back(thing: dict) -> dict:
        path = thing.get("path")
        hidden = isinstance(path, str) and path.startswith(OUTSIDE + "/")
        return {**thing, "path": folder + path.removeprefix(OUTSIDE)} if hidden else thing

    try:
        return json.dumps(json.loads(body, object_hook=put_back)).encode()
    except ValueError:  # Gradio says so
        return body


def outside(body: bytes, folder: str) -> bytes:
    """What is told, without the folder: in JSON, or as it is."""
    for form in {json.dumps(folder)[1:-1], folder}:
        body = body.replace(form.encode(), OUTSIDE.encode())
    return body
