"""Keys: which routes they open, what the servers see of them, and how they are exchanged."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from pydantic import SecretStr
from yarl import URL

from espo_gateway.config import Config, parse
from espo_gateway.errors import InvalidRequest
from espo_gateway.front.auth import read_keys
from espo_gateway.front.gateway import Gateway
from espo_gateway.testing import FakeServer
from tests.helpers.gateway import (
    COMPLETIONS,
    FAILING,
    GATE,
    client_of,
    completion_body,
    gateway_for,
)

UPSTREAMS = ("http://127.0.0.1:9",)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def basic(password: str, user: str = "") -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


async def ask(
    method: str, url: str | URL, headers: Mapping[str, str] | None = None, **request: Any
) -> tuple[int, Any, Mapping[str, str]]:
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, url, headers=headers, **request) as response,
    ):
        text = await response.text()
        body = json.loads(text) if response.content_type == "application/json" else text
        return response.status, body, response.headers


CLOSED = [
    ("GET", "/v1/models"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/embeddings"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/elsewhere"),
    ("GET", "/espo/gate"),
    ("GET", "/espo"),
    ("GET", "/health/"),
    ("GET", "//health"),
    ("GET", "/x/../health"),
]


WRONG = [
    {},
    bearer("wrong"),
    bearer(""),
    bearer("key-"),
    bearer("key-11"),
    basic("wrong"),
    {"Authorization": "Basic !"},
    {"Authorization": "key-1"},
    {"Authorization": "Bearer key-\u00e9"},
    {"X-Api-Key": "key-1"},
]


@pytest.mark.parametrize("headers", WRONG)
async def test_every_route_but_two_needs_a_key(headers: dict[str, str], closed: str) -> None:
    for method, path in CLOSED:
        status, body, answered = await ask(method, URL(closed + path, encoded=True), headers)
        assert status == 401, path
        error = body["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        assert answered["WWW-Authenticate"].startswith("Basic ")
        assert "key-1" not in json.dumps(body)


@pytest.fixture
async def closed() -> Any:
    async with FakeServer(FAILING) as server, gateway_for(server, api_keys=("key-1",)) as gateway:
        yield gateway.url
        assert server.bodies == []


async def test_any_of_the_keys_will_do(closed: str) -> None:
    for path in ("/health", "/ready"):
        assert (await ask("GET", closed + path))[0] == 200
    for headers in (bearer("key-1"), basic("key-1"), basic("key-1", "somebody")):
        for path in ("/v1/models", "/metrics", "/espo/gate", "/openapi.json"):
            assert (await ask("GET", closed + path, headers))[0] == 200, path
    keys = ("key-1", "key-2")
    async with FakeServer(FAILING) as server, gateway_for(server, api_keys=keys) as gateway:
        for key in keys:
            assert (await ask("GET", gateway.url + "/v1/models", bearer(key)))[0] == 200


async def test_the_official_client_understands_a_refusal(closed: str) -> None:
    async with client_of(closed, api_key="wrong") as client:
        with pytest.raises(openai.AuthenticationError) as error:
            await client.completions.create(**completion_body())
    assert error.value.code == "invalid_api_key"


@pytest.mark.parametrize(
    ("settings", "seen"),
    [
        ({"api_keys": ("key-1",)}, None),
        ({"api_keys": ("key-1",), "upstream_key": "up"}, "Bearer up"),
        ({"upstream_key": "up"}, "Bearer up"),
        # Then it is the server's own business who may use it.
        ({}, "Bearer key-1"),
    ],
)
@pytest.mark.parametrize("espo", [{}, {"mode": "off"}])
async def test_what_the_server_sees_of_the_keys(
    settings: dict[str, Any], seen: str | None, espo: dict[str, Any]
) -> None:
    async with FakeServer(FAILING) as server, gateway_for(server, **settings) as gateway:
        body = completion_body(espo=espo, n=1 if espo else 2)
        headers = {"authorization": "Bearer key-1"}
        status, *_ = await ask("POST", gateway.url + COMPLETIONS, headers, json=body)
        assert status == 200
        assert {headers.get("Authorization") for headers in server.headers} == {seen}
        assert all("authorization" not in headers for headers in server.headers)


async def test_the_pool_shows_the_upstream_key_too() -> None:
    async with FakeServer(FAILING) as server, gateway_for(server, upstream_key="up") as gateway:
        assert gateway.pool.headers == {"Authorization": "Bearer up"}


# -- administration ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "headers", "status"),
    [
        ({}, {}, 200),
        ({"host": "::1"}, {}, 200),
        ({"host": "localhost"}, {}, 200),
        ({"host": "0.0.0.0"}, {}, 403),
        ({"host": "0.0.0.0", "api_keys": ("k",)}, bearer("k"), 403),
        ({"host": "0.0.0.0", "admin_key": "a"}, bearer("a"), 200),
        ({"host": "0.0.0.0", "admin_key": "a"}, basic("a"), 200),
        ({"api_keys": ("k",)}, {}, 401),
        ({"api_keys": ("k",)}, bearer("k"), 200),
        ({"admin_key": "a"}, {}, 401),
        ({"admin_key": "a", "api_keys": ("k",)}, bearer("k"), 401),
        ({"admin_key": "a", "api_keys": ("k",)}, bearer("a"), 200),
        # A proxy on this machine speaks for clients that are not.
        ({}, {"X-Forwarded-For": "8.8.8.8"}, 403),
        ({"admin_key": "a"}, {"X-Forwarded-For": "8.8.8.8", **bearer("a")}, 200),
    ],
)
async def test_administration_has_a_key_of_its_own(
    settings: dict[str, Any], headers: dict[str, str], status: int
) -> None:
    async with FakeServer(FAILING) as server, gateway_for(server, **settings) as gateway:
        url = gateway.url.replace("0.0.0.0", "127.0.0.1")
        got, body, _ = await ask("GET", url + "/espo/gate", headers)
        assert got == status
        # Also where there is no such route, so that none can be forgotten.
        hidden = {200: 404}.get(status, status)
        for path in ("/espo", "/espo/none", "/espo/%67ate/x"):
            assert (await ask("GET", url + path, headers))[0] in (hidden, 200), path
        put = await ask("PUT", url + "/espo/gate", headers, data=GATE)
        assert put[0] == status
        if status == 403:
            assert "--admin-key-file" in body["error"]["message"]


@pytest.mark.parametrize(("key", "status"), [(None, 403), ("a", 200)])
async def test_a_proxy_may_be_told_by_its_http_alone(key: str | None, status: int) -> None:
    """nginx's, without another line, asks in HTTP/1.0 for the address that it was given."""
    async with FakeServer(FAILING) as server, gateway_for(server, admin_key=key) as gateway:
        head = ("Connection: close", f"Authorization: Bearer {key}")
        for method, path in (("GET", "/espo/live"), ("PUT", "/espo/gate")):
            told = await administer(gateway, method, path, ["127.0.0.1:PORT"], *head, version="1.0")
            assert told == status
        told = await administer(gateway, "GET", "/health", ["127.0.0.1:PORT"], version="1.0")
        assert told == 200


EVIL, ORIGIN = "evil.example", "http://evil.example"
#: Every way in, and some that lead nowhere.
ADMINISTRATION = [
    ("GET", "/espo"),
    ("GET", "/espo/"),
    ("GET", "/espo/gate"),
    ("PUT", "/espo/gate"),
    ("POST", "/espo/reload"),
    ("GET", "/espo/live"),
    ("GET", "/espo/statistics"),
    ("HEAD", "/espo/live"),
    ("OPTIONS", "/espo/gate"),
    ("GET", "/espo/none"),
    ("POST", "/espo/%67ate"),
]


async def administer(
    gateway: Gateway, method: str, path: str, hosts: list[str], *headers: str, version: str = "1.1"
) -> int:
    """The status, of a request with just these headers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.url.split(":")[-1]))
    named = [f"Host: {host.replace('PORT', gateway.url.split(':')[-1])}" for host in hosts]
    own = [line.replace("PORT", gateway.url.split(":")[-1]) for line in headers]
    head = [f"{method} {path} HTTP/{version}", *named, *own, f"Content-Length: {len(GATE)}", "", ""]
    writer.write("\r\n".join(head).encode() + GATE)
    status = int((await reader.readline()).split()[1])
    writer.close()
    return status


@pytest.mark.parametrize(
    "hosts",
    [
        [EVIL],
        ["evil.example:PORT"],
        ["localhost.evil.example"],
        ["127.0.0.1.evil.example"],
        ["127.0.0.1.nip.io:PORT"],
        ["localhost@evil.example"],
        ["evil.example#localhost"],
        ["localhost:PORT.evil.example"],
        ["192.168.0.7:PORT"],
        ["0.0.0.0:PORT"],
        ["[2001:db8::1]:PORT"],
        [""],
        ["localhost", EVIL],
        [EVIL, "localhost"],
    ],
)
async def test_a_name_that_was_made_to_mean_this_machine_does_not_administer(
    hosts: list[str],
) -> None:
    choices: list[dict[str, Any]] = [{}, {"api_keys": ("k",)}]
    for settings in choices:
        async with FakeServer(FAILING) as server, gateway_for(server, **settings) as gateway:
            before = gateway.gate
            for method, path in ADMINISTRATION:
                status = await administer(gateway, method, path, hosts, "Authorization: Bearer k")
                assert status in (400, 403), path
            assert gateway.gate is before


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:PORT", "LOCALHOST:1", "localhost.", "127.0.0.1", "127.9.9.9", "[::1]"],
)
async def test_names_of_this_machine_do(host: str) -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        assert await administer(gateway, "PUT", "/espo/gate", [host]) == 200
        origin = f"Origin: http://{host}"
        assert await administer(gateway, "PUT", "/espo/gate", [host], origin) == 200


async def test_the_target_may_name_a_host_too() -> None:
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        for target, status in (("http://evil.example", 403), ("http://localhost:PORT", 200)):
            got = await administer(gateway, "PUT", target + "/espo/gate", ["localhost"])
            assert got == status or target.endswith("PORT")


@pytest.mark.parametrize(
    "origin",
    [ORIGIN, "null", "http://localhost:1", "https://127.0.0.1", "file://", "", "http://localhost"],
)
async def test_another_sites_page_does_not_administer(origin: str) -> None:
    here, there = f"Origin: {origin}", "localhost:PORT"
    async with FakeServer(FAILING) as server, gateway_for(server) as gateway:
        for method, path in ADMINISTRATION:
            assert await administer(gateway, method, path, [there], here) == 403, path
        assert await administer(gateway, "GET", "/espo/live", [there], "X-Origin: x") == 200
    async with FakeServer(FAILING) as server, gateway_for(server, admin_key="a") as gateway:
        # A browser adds a password that it was given before; a page cannot add a key unknown to it.
        for key, status in ((bearer("a"), 200), (basic("a"), 403), (bearer("b"), 401)):
            authorization = f"Authorization: {key['Authorization']}"
            got = await administer(gateway, "PUT", "/espo/gate", [there], here, authorization)
            assert got == status


async def test_with_an_admin_key_a_gateway_may_have_any_name() -> None:
    async with FakeServer(FAILING) as server, gateway_for(server, admin_key="a") as gateway:
        for key in (bearer("a"), basic("a")):
            authorization = f"Authorization: {key['Authorization']}"
            for lines in ([], [f"Origin: {ORIGIN}"], ["Origin: https://evil.example"]):
                got = await administer(gateway, "PUT", "/espo/gate", [EVIL], authorization, *lines)
                assert got == 200
        assert await administer(gateway, "PUT", "/espo/gate", [EVIL]) == 401


async def test_an_admin_key_opens_nothing_else() -> None:
    settings: dict[str, Any] = {"admin_key": "a", "api_keys": ("k",)}
    async with FakeServer(FAILING) as server, gateway_for(server, **settings) as gateway:
        assert (await ask("GET", gateway.url + "/v1/models", bearer("a")))[0] == 401


# -- files -------------------------------------------------------------------------------------


def test_files_of_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (path := tmp_path / "keys").write_text("# clients\nkey-1\n\n  key-2  \n")
    path.chmod(0o600)
    given = (SecretStr("key-0"), SecretStr("key-1"))
    keys = read_keys(Config(UPSTREAMS, api_keys=given, api_keys_file=path))
    assert keys.api == (b"key-0", b"key-1", b"key-2")
    assert caplog.text == ""
    path.chmod(0o644)
    read_keys(Config(UPSTREAMS, api_keys_file=path))
    assert "everybody on this machine can read" in caplog.text
    assert "key-1" not in caplog.text


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "No such file"),
        ("", "holds no key"),
        ("# none\n\n", "holds no key"),
        ("secret one\n", "line 1: a key must be one word"),
        ("secret-é\n", "line 1: a key must be one word"),
        (b"\xff\xfe", "not a text file"),
    ],
)
@pytest.mark.parametrize("name", ["api_keys_file", "admin_key_file", "upstream_key_file"])
def test_bad_files_of_keys(tmp_path: Path, name: str, content: Any, told: str) -> None:
    path = tmp_path / "keys"
    wrong: dict[str, Any] = {name: path}
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InvalidRequest, match=told) as error:
        read_keys(Config(UPSTREAMS, **wrong))
    assert name in str(error.value)
    assert "secret" not in str(error.value)


def test_keys_that_cannot_be_meant(tmp_path: Path) -> None:
    (path := tmp_path / "keys").write_text("a\nb\n")
    for settings, told in (
        ({"api_keys": ("",)}, "api_keys: a key must be"),
        ({"admin_key": ""}, "admin_key: a key must be"),
        ({"admin_key": "a", "api_keys": ("a",)}, "admin_key: it is an API key too"),
        ({"admin_key": "a", "admin_key_file": path}, "are both set"),
        ({"upstream_key_file": path}, "holds 2 keys"),
    ):
        with pytest.raises(InvalidRequest, match=told):
            read_keys(Config(UPSTREAMS, **settings))


def test_keys_from_the_environment() -> None:
    environment = {"ESPO_GATEWAY_API_KEYS": "key-1, key-2", "ESPO_GATEWAY_ADMIN_KEY": "a"}
    config = parse(["--upstream", *UPSTREAMS], environment)
    assert read_keys(config).api == (b"key-1", b"key-2")
    assert "key-1" not in repr(config)


def test_a_key_in_an_address_is_refused() -> None:
    with pytest.raises(ValueError, match="upstream_key_file") as error:
        Config(("http://me:secret@127.0.0.1:9",))
    assert "secret@" not in str(error.value).split("[")[0]


# -- reload ------------------------------------------------------------------------------------


async def test_keys_and_gate_are_read_again_all_or_nothing(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("api", "admin", "upstream", "gate")}
    files["gate"].write_bytes(GATE)
    for name in ("api", "admin", "upstream"):
        files[name].write_text(f"{name}-1\n")
    settings: dict[str, Any] = {
        "api_keys_file": files["api"],
        "admin_key_file": files["admin"],
        "upstream_key_file": files["upstream"],
        "gate": files["gate"],
    }
    async with FakeServer(FAILING) as server, gateway_for(server, **settings) as gateway:
        reload, models = gateway.url + "/espo/reload", gateway.url + "/v1/models"
        files["api"].write_text("api-2\n")
        files["upstream"].write_text("upstream-2\n")
        files["gate"].write_text(json.dumps({**json.loads(GATE), "version": 4}))
        assert (await ask("POST", reload, bearer("api-1")))[0] == 401

        files["admin"].write_text("")
        status, body, _ = await ask("POST", reload, bearer("admin-1"))
        assert (status, body["error"]["param"]) == (400, "admin_key_file")
        assert gateway.gate.version == 3
        assert (await ask("GET", models, bearer("api-1")))[0] == 200

        files["admin"].write_text("admin-2\n")
        files["gate"].write_text('{"bta": 1}')
        status, body, _ = await ask("POST", reload, bearer("admin-1"))
        assert (status, body["error"]["param"]) == (400, "bta")
        assert (await ask("GET", models, bearer("api-2")))[0] == 401

        files["gate"].unlink()
        status, body, _ = await ask("POST", reload, bearer("admin-1"))
        assert (status, body["error"]["param"]) == (400, "gate")

        files["gate"].write_text(json.dumps({**json.loads(GATE), "version": 4}))
        status, body, _ = await ask("POST", reload, bearer("admin-1"))
        assert (status, body) == (200, {"api_keys": 1, "gate_version": 4})
        assert (await ask("GET", models, bearer("api-1")))[0] == 401
        assert (await ask("GET", models, bearer("api-2")))[0] == 200
        assert gateway.pool.headers == {"Authorization": "Bearer upstream-2"}

        # A gate that was pushed stays until its file says something new.
        gateway.push_gate(json.dumps({**json.loads(GATE), "version": 9}).encode())
        status, body, _ = await ask("POST", reload, bearer("admin-2"))
        assert (status, body["gate_version"]) == (200, 9)


async def test_no_key_is_ever_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    settings: dict[str, Any] = {"api_keys": ("secret-1",), "upstream_key": "secret-2"}
    async with FakeServer(FAILING) as server, gateway_for(server, **settings) as gateway:
        url = gateway.url + COMPLETIONS
        for headers in (bearer("secret-1"), bearer("secret-3"), basic("secret-3")):
            await ask(
                "POST", url + "?api_key=secret-4", headers, json=completion_body(prompt="secret-5")
            )
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", int(gateway.url.rsplit(":")[-1])
        )
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret-6\x00\r\n\r\n")
        assert b"400" in await reader.readline()
        writer.close()
    logged = caplog.text + "".join(str(vars(record)) for record in caplog.records)
    assert "/v1/completions" in logged
    assert "refused what is no HTTP request" in logged
    assert "secret" not in logged
