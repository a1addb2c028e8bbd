"""What happens to uploads: none is too large, all together stay below a quota, and each becomes a small PNG at once.

So a picture is decoded once, before its question waits for the model, however often it is asked about.
"""

import asyncio
import json
import os
from contextlib import nullcontext, suppress
from pathlib import Path
from time import time
from typing import Any
from uuid import uuid4

from pictures import IMAGE_FORMATS, KEPT_PIXELS, MAX_FILE_MEGABYTES, MAX_PICTURES, TOO_LARGE, Refusal, open_picture
from PIL import Image
from starlette.responses import PlainTextResponse

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
        if answer[0]["status"] != 200:
            for message in answer:
                await send(message)
            return
        paths = json.loads(b"".join(message.get("body", b"") for message in answer))
        await send({**answer[0], "headers": [(b"content-type", b"application/json")]})
        refusals = asyncio.gather(*(self.reduce(Path(path)) for path in paths))
        while not (await asyncio.wait([refusals], timeout=1))[0]:  # spaces, for clients that wait no more than seconds
            await send({"type": "http.response.body", "body": b" ", "more_body": True})
        refusal = next(filter(None, refusals.result()), "")
        told = {"refusal": refusal} if refusal and scope["query_string"].startswith(b"check") else paths
        await send({"type": "http.response.body", "body": json.dumps(told).encode()})

    async def reduce(self, path: Path) -> str:
        """As `reduce_file`; large pictures wait for each other, small ones for none."""
        async with self.lane if await asyncio.to_thread(is_large, path) else nullcontext():
            return await asyncio.to_thread(reduce_file, path)


def reduce_file(path: Path) -> str:
    """Replaces a picture by a PNG as small as `open_picture` gives it; returns why it cannot be used, if so."""
    # Of a name of its own: other visitors may send the same picture, which has one place, or read it meanwhile.
    whole = path.with_name(f"{uuid4().hex}.part")
    try:
        open_picture(path).save(whole, "PNG", compress_level=1)
    except Refusal as refusal:
        return refusal.message
    whole.replace(path)
    return ""


def is_large(path: Path) -> bool:
    """Whether a picture takes long to decode, by its header."""
    with suppress(Exception), Image.open(path, formats=IMAGE_FORMATS) as image:
        return image.width * image.height > 4 * KEPT_PIXELS
    return False


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
