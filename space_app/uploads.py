"""What happens to uploads: none is too large, all together stay below a quota, and each becomes a small PNG at once.

So a picture is decoded once, before its question waits for the model, however often it is asked about.
"""

import asyncio
import json
import os
from contextlib import suppress
from pathlib import Path
from time import time
from typing import Any

from pictures import MAX_FILE_MEGABYTES, MAX_PICTURES, TOO_LARGE, Refusal, open_picture
from starlette.responses import JSONResponse, PlainTextResponse

UPLOADS_MEGABYTES = 200  # of all visitors
UPLOAD_SECONDS = 600  # from the last use of an upload to its end
REQUEST_BYTES = (MAX_PICTURES * MAX_FILE_MEGABYTES + 1) * 2**20


class Uploads:
    """Stands between the server and Gradio's route for uploads (ASGI).

    A picture that cannot be used is refused where the request has `?check`, as the page's own have; programs would
    see no more than the status of the refusal, and are told when they ask.
    """

    def __init__(self, app: Any):
        self.app = app
        self.lane = asyncio.Semaphore(1)  # large pictures are decoded one at a time, for the memory's sake

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        """Passes a request on, and its answer back when the uploads are reduced."""
        if scope["type"] != "http" or not scope["path"].rstrip("/").endswith("/upload"):
            return await self.app(scope, receive, send)
        length = int(dict(scope["headers"]).get(b"content-length", REQUEST_BYTES + 1))
        if length > REQUEST_BYTES:
            return await PlainTextResponse(TOO_LARGE, 413)(scope, receive, send)
        await asyncio.to_thread(make_room, length)
        answer: list[dict] = []

        async def keep(message: dict) -> None:
            answer.append(message)

        await self.app(scope, receive, keep)
        refusals = []
        if answer[0]["status"] == 200:
            for path in json.loads(b"".join(message.get("body", b"") for message in answer)):
                async with self.lane:
                    refusals.append(await asyncio.to_thread(reduce_file, Path(path)))
        refusal = next(filter(None, refusals), "")
        if refusal and scope["query_string"].startswith(b"check"):
            return await JSONResponse({"refusal": refusal})(scope, receive, send)
        for message in answer:
            await send(message)


def reduce_file(path: Path) -> str:
    """Replaces a picture by a PNG as small as `open_picture` gives it; returns why it cannot be used, if so."""
    whole = path.with_name(f"{path.name}.part")  # the same picture of another visitor may be read meanwhile
    try:
        open_picture(path).save(whole, "PNG", compress_level=1)
    except Refusal as refusal:
        return refusal.message
    whole.replace(path)
    return ""


def make_room(coming: int) -> None:
    """Deletes uploads that were not used for UPLOAD_SECONDS and, beyond the quota, the oldest."""
    found = []
    for path in Path(os.environ["GRADIO_TEMP_DIR"]).rglob("*"):
        with suppress(FileNotFoundError):
            found.append((path.stat(), path))
    kept = coming
    for state, path in sorted(
        ((one, path) for one, path in found if path.is_file()), key=lambda file: -file[0].st_ctime
    ):
        kept += state.st_size
        if kept > UPLOADS_MEGABYTES * 2**20 or time() - state.st_ctime > UPLOAD_SECONDS:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # others may be in it
                path.parent.rmdir()
