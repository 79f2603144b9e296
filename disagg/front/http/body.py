"""A request's body: read within limits of size and time, and decoded from JSON."""

import asyncio
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request

from disagg.front.http.errors import HttpError

MOST_BYTES = 2**25
BODY_S = 30.0  # how long a client may take to send its body
CLOSE = {"connection": "close"}  # what is left of the body is not read


async def read_object(request: Request) -> dict[str, Any]:
    """Return the body, which must be a JSON object. Raises HttpError.

    Only a body that says that it is JSON is taken. A web page of another origin cannot send one without asking first.
    """
    kind = request.headers.get("content-type", "")
    media = kind.partition(";")[0].strip().lower()
    if media != "application/json" and not (media.startswith("application/") and media.endswith("+json")):
        raise HttpError(415, f"content-type is {kind!r:.60}; it must be application/json", headers=CLOSE)
    body = await _read(request)
    try:
        found = msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise HttpError(400, f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise HttpError(400, "the body is not JSON that can be read: it is nested too deeply") from None
    except (msgspec.DecodeError, ValueError) as error:
        raise HttpError(400, f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise HttpError(400, f"the body must be a JSON object, not {type(found).__name__}")
    return found


async def _read(request: Request) -> bytes:
    too_large = HttpError(413, f"the body is too large; it must have at most {MOST_BYTES:,} bytes", headers=CLOSE)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and len(length) < 20 and int(length) > MOST_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for piece in request.stream():
                body += piece
                if len(body) > MOST_BYTES:
                    raise too_large
    except TimeoutError:
        raise HttpError(408, f"the body did not arrive within {BODY_S:g} s", headers=CLOSE) from None
    except ClientDisconnect:
        raise HttpError(400, "the client left before its body was complete") from None
    return bytes(body)
