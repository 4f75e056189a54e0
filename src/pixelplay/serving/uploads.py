"""Read images from the body of a request into memory, never to a file."""

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from pixelplay.serving.admission import ReceivedBytes
from pixelplay.serving.problems import Problem
from pixelplay.serving.settings import LimitsConfig
from pixelplay.text import printable

FIELD = "images"
NAME_CHARS = 255
CLOSE = {"Connection": "close"}  # the rest of the body is not read
EXPECTED = (
    f"send multipart/form-data with files in the field {FIELD!r}, or one image as the body (image/jpeg)"
)


@dataclass(frozen=True)
class Upload:
    """One uploaded file; the name is only repeated in the answer."""

    name: str
    content: bytes


async def read_uploads(request: Request, limits: LimitsConfig, received: ReceivedBytes) -> list[Upload]:
    """Read the images of a request.

    Raises:
        Problem: 400 malformed or without images, 408 too slow, 413 too large or too many images, 415 another
            content type.
        ClientDisconnect: the connection was closed.
    """
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limits.max_bytes:
        raise _too_large(limits)
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    try:
        async with asyncio.timeout(limits.timeout):
            if kind == b"multipart/form-data":
                uploads = await _read_multipart(request, options.get(b"boundary", b""), limits, received)
            elif kind.startswith(b"image/") or kind == b"application/octet-stream":
                content = b"".join([chunk async for chunk in _chunks(request, limits, received)])
                uploads = [Upload("image", content)]
            else:
                shown = printable(kind.decode("latin-1")) or "missing"
                raise Problem(415, f"content type {shown!r} is not supported; {EXPECTED}", headers=CLOSE)
    except TimeoutError:
        reason = f"the request was not received within {limits.timeout:g} s"
        raise Problem(408, reason, headers=CLOSE) from None
    if not uploads:
        raise Problem(400, f"the request has no images; {EXPECTED}")
    return uploads


async def _chunks(request: Request, limits: LimitsConfig, received: ReceivedBytes) -> AsyncIterator[bytes]:
    async for chunk in request.stream():
        received.add(len(chunk))
        if received.n > limits.max_bytes:
            raise _too_large(limits)
        yield chunk


async def _read_multipart(
    request: Request, boundary: bytes, limits: LimitsConfig, received: ReceivedBytes
) -> list[Upload]:
    if not boundary:
        raise Problem(400, "the content type multipart/form-data has no boundary", headers=CLOSE)
    parts = _Parts(limits.max_images)
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": parts.begin,
                "on_header_field": parts.add_header_name,
                "on_header_value": parts.add_header_value,
                "on_header_end": parts.end_header,
                "on_headers_finished": parts.check_name,
                "on_part_data": parts.add_data,
                "on_part_end": parts.end,
                "on_end": parts.finish,
            },
        )
        async for chunk in _chunks(request, limits, received):
            parser.write(chunk)
    except FormParserError:
        raise Problem(400, "the body is not valid multipart/form-data", headers=CLOSE) from None
    if not parts.is_complete:
        raise Problem(400, "the multipart/form-data body ends before its last boundary", headers=CLOSE)
    return parts.uploads


class _Parts:
    """Collects the parts of a multipart body in memory.

    Starlette's own parser writes files above 1 MB to temporary files.
    """

    def __init__(self, max_images: int) -> None:
        self.uploads: list[Upload] = []
        self.is_complete = False
        self._max_images = max_images
        self.begin()

    def begin(self) -> None:
        self._headers: dict[bytes, bytes] = {}
        self._header_name, self._header_value = bytearray(), bytearray()
        self._file_name = ""
        self._content = bytearray()

    def add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def end_header(self) -> None:
        self._headers[bytes(self._header_name).lower()] = bytes(self._header_value)
        self._header_name, self._header_value = bytearray(), bytearray()

    def check_name(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        field = options.get(b"name", b"").decode("utf-8", "replace")
        if field != FIELD:
            shown = printable(field[:NAME_CHARS])
            raise Problem(400, f"unknown field {shown!r}; send files in the field {FIELD!r}", headers=CLOSE)
        if len(self.uploads) == self._max_images:
            reason = f"more than {self._max_images} images in one request; send them in several"
            raise Problem(413, reason, headers=CLOSE)
        self._file_name = safe_name(options.get(b"filename", b"").decode("utf-8", "replace"))

    def add_data(self, data: bytes, start: int, end: int) -> None:
        self._content += data[start:end]

    def end(self) -> None:
        name = self._file_name or f"[{len(self.uploads)}]"
        self.uploads.append(Upload(name, bytes(self._content)))
        self._content = bytearray()

    def finish(self) -> None:
        self.is_complete = True


def safe_name(name: str) -> str:
    r"""Return the last part of a file name, without control characters, shortened.

    >>> safe_name("C:\\photos\\a\n.jpg")
    'a\\n.jpg'
    """
    return printable(re.split(r"[/\\]", name)[-1])[:NAME_CHARS]


def _too_large(limits: LimitsConfig) -> Problem:
    return Problem(413, f"the body is larger than {limits.max_upload_mb:g} MB", headers=CLOSE)
