"""Keys: who may use the gateway, who may administer it, and what it shows its servers.

Every route but `/health` and `/ready` needs an API key once there are any, OPTIONS excepted;
`/espo` and all below it needs the admin key. The decision is made on what the router has chosen, so
no spelling of a path comes to a handler past it.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import logging
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from aiohttp import HttpVersion11, web
from pydantic import SecretStr

from espo_gateway.addresses import is_loopback
from espo_gateway.config import Config
from espo_gateway.errors import Forbidden, InvalidRequest, Unauthorized
from espo_gateway.front.paths import served

log = logging.getLogger(__name__)

#: What a load balancer asks, which has no key.
_OPEN = frozenset({"/health", "/ready"})
_VISIBLE = re.compile(r"[\x21-\x7e]+")
#: Headers by which a proxy says that the client is not where the connection comes from.
_PROXIED = ("Forwarded", "X-Forwarded-For", "X-Real-IP", "Via")


@dataclass(frozen=True)
class Keys:
    """The keys in force; empty or None where there is none."""

    api: tuple[bytes, ...] = ()
    admin: bytes | None = None
    upstream: str | None = None

    @property
    def upstream_headers(self) -> dict[str, str]:
        """What the gateway shows its servers."""
        return {} if self.upstream is None else {"Authorization": f"Bearer {self.upstream}"}

    @property
    def pass_clients(self) -> bool:
        """Whether a client's own key is the server's business, not the gateway's."""
        return not self.api and self.upstream is None


def read_keys(config: Config) -> Keys:
    """From the settings and their files. Raises InvalidRequest naming the setting."""
    api = _given("api_keys", config.api_keys) + _from_file("api_keys_file", config.api_keys_file)
    admin = _one("admin_key", config.admin_key, config.admin_key_file)
    upstream = _one("upstream_key", config.upstream_key, config.upstream_key_file)
    if admin is not None and admin in api:
        raise InvalidRequest("admin_key: it is an API key too, so every client could administer")
    return Keys(
        tuple(key.encode() for key in dict.fromkeys(api)),
        None if admin is None else admin.encode(),
        upstream,
    )


def _one(name: str, value: SecretStr | None, path: Path | None) -> str | None:
    if value is not None and path is not None:
        raise InvalidRequest(f"{name} and {name}_file are both set; one is enough")
    if path is None:
        return None if value is None else _given(name, [value])[0]
    keys = _from_file(f"{name}_file", path)
    if len(keys) > 1:
        raise InvalidRequest(f"{name}_file: {path} holds {len(keys)} keys, and must hold one")
    return keys[0]


def _given(name: str, values: Iterable[SecretStr]) -> list[str]:
    keys = [value.get_secret_value() for value in values]
    for key in keys:
        _check(key, name)
    return keys


def _from_file(name: str, path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        text = path.read_text()
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or "not a text file"
        raise InvalidRequest(f"{name}: cannot read {path}: {why}", param=name) from None
    if mode & stat.S_IROTH:
        log.warning("%s: everybody on this machine can read %s (chmod 600)", name, path)
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        if (key := line.strip()) and not key.startswith("#"):
            _check(key, f"{name}: {path}, line {number}")
            keys.append(key)
    if not keys:
        raise InvalidRequest(f"{name}: {path} holds no key", param=name)
    return keys


def _check(key: str, where: str) -> None:
    """The key itself is never told."""
    if not _VISIBLE.fullmatch(key):
        raise InvalidRequest(
            f"{where}: a key must be one word of visible ASCII characters, as it goes in a header"
        )


def is_administration(request: web.Request) -> bool:
    """Whether this is a route under /espo, there or not."""
    for path in (_route(request), request.path):
        if path == "/espo" or path.startswith("/espo/"):
            return True
    return False


def authorize(request: web.Request, keys: Keys, *, loopback: bool) -> None:
    """Let a request through or raise.

    Args:
        loopback: whether the gateway listens where only this machine can reach it.

    Raises:
        Unauthorized: a key is needed, and this request has none or a wrong one.
        Forbidden: administration is not enabled, or another site's page asks for it.
    """
    route = _route(request)
    # A browser asks without a key whether its page may send one; servers answer that to anybody.
    if route in _OPEN or (request.method == "OPTIONS" and served(route)):
        return
    needed = keys.api
    if is_administration(request):
        if keys.admin is not None:
            needed = (keys.admin,)
        # nginx's proxy_pass alone adds no header, and has spoken HTTP/1.0 for long.
        elif (
            not loopback
            or request.version < HttpVersion11
            or any(name in request.headers for name in _PROXIED)
        ):
            raise Forbidden(
                "administration is off where others than this machine may ask, by the gateway's "
                "address or through a proxy; start it with --admin-key-file FILE"
            )
        _check_page(request, keyed=keys.admin is not None)
    if not needed:
        return
    presented = _presented(request.headers.get("Authorization"))
    if presented is None:
        raise Unauthorized("a key is needed; send the header `Authorization: Bearer KEY`")
    # Every key is compared, so that time tells nothing.
    if not sum(hmac.compare_digest(presented, key) for key in needed):
        raise Unauthorized("the key is not one of this gateway's, or does not open this route")


def _check_page(request: web.Request, *, keyed: bool) -> None:
    """Keep other sites' pages, open in a browser on this machine, away from the administration.

    A page may have its own name resolved to this machine (DNS rebinding): then the Host tells it,
    and it has no admin key. One that keeps its name tells its Origin; a browser that has been given
    the key may add it even there (Basic), but no page adds a header (Bearer) without knowing it.

    keyed: there is an admin key, so the gateway may be known by any name.
    """
    hosts = {*request.headers.getall("Host", [""]), request.host}
    if not keyed and not all(map(_names_loopback, hosts)):
        raise Forbidden(
            "administration without an admin key is for clients that ask for localhost or "
            "127.0.0.1; start the gateway with --admin-key-file FILE to use another name"
        )
    scheme = request.headers.get("Authorization", "").partition(" ")[0].lower()
    if keyed and scheme == "bearer":
        return
    for origin in request.headers.getall("Origin", []):
        if origin.lower() not in {f"{s}://{request.host}".lower() for s in ("http", "https")}:
            raise Forbidden(f"administration is not for pages of another site ({origin!r:.100})")


def _names_loopback(host: str) -> bool:
    """Whether a Host header, with its port or without, is a name of this machine alone."""
    name = re.fullmatch(r"(\[[^][]*\]|[^][:]*)(:[0-9]*)?", host.strip())
    return name is not None and is_loopback(name[1].strip("[]").lower().removesuffix("."))


def _route(request: web.Request) -> str:
    """The pattern that the router has chosen; empty for none."""
    resource = request.match_info.route.resource
    return "" if resource is None else resource.canonical


def _presented(header: str | None) -> bytes | None:
    """The key of an Authorization header: the bearer's, or Basic's password."""
    scheme, _, value = (header or "").partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer":
        return value.encode("utf-8", "surrogateescape")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return None
    return None
