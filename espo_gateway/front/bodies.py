"""Request bodies: taken within a time and a size, and read as JSON whatever they hold."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from espo_gateway.config import Config
from espo_gateway.errors import InvalidRequest, TooLarge, TooSlow


async def receive(request: web.Request, config: Config) -> None:
    """Have the whole body here, so that `request.read()` waits for nobody.

    Raises TooLarge, TooSlow, or InvalidRequest when it is broken.
    """
    if not request.can_read_body:
        return
    too_large = TooLarge(
        f"the request body is larger than {config.max_request_bytes} bytes (max_request_bytes)"
    )
    if (request.content_length or 0) > config.max_request_bytes:
        raise too_large
    try:
        async with asyncio.timeout(config.request_timeout):
            await request.read()
    except TimeoutError:
        raise TooSlow(
            f"the request body did not arrive within {config.request_timeout:g} s (request_timeout)"
        ) from None
    except web.HTTPRequestEntityTooLarge:
        raise too_large from None
    except (web.RequestPayloadError, HttpProcessingError) as error:
        broken = InvalidRequest("the request body is broken: its encoding or length is not as told")
        broken.headers = {"Connection": "close"}
        raise broken from error


def decode(request: web.Request, data: bytes) -> Any:
    """The JSON of a body; of a name that stands twice the last counts. Raises InvalidRequest."""
    if request.content_type != "application/json":
        # As vLLM does; it also keeps other sites' pages in a browser from sending requests.
        raise InvalidRequest("the request's Content-Type must be application/json")
    if not data:
        raise InvalidRequest("the request body is empty; it must be a JSON object")
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        # As Python servers read it: with a byte order mark, or in UTF-16 or UTF-32.
        encoding = json.detect_encoding(data)
        if encoding != "utf-8":
            with suppress(msgspec.DecodeError, UnicodeError):
                return msgspec.json.decode(data.decode(encoding))
        raise InvalidRequest(f"the request body is not valid JSON: {error}") from error
