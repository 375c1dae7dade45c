"""What can go wrong, and how each kind is told to a client.

GatewayError
 ├─ InvalidRequest          400  the client's request, or a pushed gate, is at fault
 │   └─ TooSlow, TooLarge   408, 413
 ├─ TooManyRequests         429  the gateway serves as many as it may, and its queue is full
 ├─ Unauthorized            401  no key, or a wrong one
 ├─ Forbidden               403  administration that is not enabled
 ├─ Draining                503  the gateway is about to end
 ├─ Conflict                409  the gateway's settings forbid it
 └─ UpstreamError           502
     ├─ UpstreamStatusError  as the server said it: its status and body, handed on unchanged
     ├─ UpstreamUnavailable 503  no connection, or lost before an answer
     ├─ UpstreamTimeout     504  nothing arrived for too long
     └─ UpstreamProtocolError 502  an answer that is not what was asked for
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: How much of an unreadable answer an error quotes.
EXCERPT = 200


class GatewayError(Exception):
    """Base of all errors a client is told of.

    status: the HTTP status. code: OpenAI's word for it, if it has one. headers: of the answer.
    param: the request field at fault, if one is.
    """

    status = 500
    type = "internal_error"
    code: str | None = None
    headers: Mapping[str, str] = {}

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if headers is not None:
            self.headers = dict(headers)

    def body(self) -> dict[str, Any]:
        """OpenAI's error shape, which every OpenAI client can read."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code or self.status,
            }
        }


class InvalidRequest(GatewayError):
    """The request cannot be served as it is; the message names the field and the fix."""

    status = 400
    type = "invalid_request_error"


class TooManyRequests(GatewayError):
    """No place to wait in; the headers say when to come back."""

    status = 429
    type = "too_many_requests"


class TooSlow(InvalidRequest):
    """The client took too long to send its request."""

    status = 408
    headers: Mapping[str, str] = {"Connection": "close"}


class TooLarge(InvalidRequest):
    """The body is larger than the gateway takes."""

    status = 413
    headers: Mapping[str, str] = {"Connection": "close"}


class Unauthorized(GatewayError):
    """No key, or one that does not open this route."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"
    # Makes a browser ask: the key is the password, the user name is anything.
    headers: Mapping[str, str] = {"WWW-Authenticate": 'Basic realm="espo_gateway", charset="UTF-8"'}


class Forbidden(GatewayError):
    """The route is not enabled here; the message says how to enable it."""

    status = 403
    type = "permission_error"


class Draining(GatewayError):
    """The gateway ends when its running requests have; another one must be asked."""

    status = 503
    type = "unavailable"
    headers: Mapping[str, str] = {"Connection": "close", "Retry-After": "1"}


class Conflict(GatewayError):
    """What was asked for does not go with how the gateway was started; the message says how."""

    status = 409
    type = "conflict"


class UpstreamError(GatewayError):
    """A server behind the gateway failed.

    excerpt: of what it has sent, for who has asked it: the message, which is logged, has none.
    """

    status = 502
    type = "upstream_error"

    def __init__(
        self, message: str, *, excerpt: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message, headers=headers)
        self.excerpt = excerpt

    @property
    def in_full(self) -> str:
        """The message and the excerpt."""
        return f"{self.message}: {self.excerpt}" if self.excerpt else self.message

    def body(self) -> dict[str, Any]:
        body = super().body()
        body["error"]["message"] = self.in_full
        return body


class UpstreamStatusError(UpstreamError):
    """A server answered with an error status, or sent an error within its stream."""

    def __init__(self, status: int, answer: Any, headers: Mapping[str, str] | None = None) -> None:
        excerpt = answer if isinstance(answer, str) else ""
        said = f"the upstream answered with status {status}"
        super().__init__(said, excerpt=excerpt, headers=headers)
        self.status = status
        self.answer = answer

    def body(self) -> dict[str, Any]:
        return self.answer if isinstance(self.answer, dict) else super().body()


class UpstreamUnavailable(UpstreamError):
    """No server could be reached, or the connection was lost."""

    status = 503
    type = "upstream_unavailable"


class UpstreamTimeout(UpstreamError):
    """A server's answer did not begin, or did not go on, in time."""

    status = 504
    type = "upstream_timeout"


class UpstreamProtocolError(UpstreamError):
    """A server's answer is malformed, or lacks what was asked for."""

    type = "upstream_protocol_error"


def said(error: BaseException) -> str:
    """An exception in words, also one that has none."""
    return str(error) or type(error).__name__
