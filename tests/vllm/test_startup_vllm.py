"""What the start finds out about a real vLLM, and which name a request has there."""

from __future__ import annotations

import logging

import aiohttp
import pytest

from espo_gateway.config import Config
from espo_gateway.errors import UpstreamError
from espo_gateway.front.auth import Keys
from espo_gateway.startup import check_servers
from tests.helpers.gateway import completion_body, gateway_for, post
from tests.helpers.vllm import VllmServer, serve

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session")]


async def test_raw_logprobs(vllm_server: VllmServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    await check_servers(Config((vllm_server.url,)), Keys())
    assert f"{vllm_server.url} serves policy (max_model_len 512), logprobs raw" in caplog.text


async def test_a_rule_that_reads_more_logprobs_than_the_server_gives(
    vllm_server: VllmServer, caplog: pytest.LogCaptureFixture
) -> None:
    gate = b'{"rule": "confidence", "confidence": 1.0, "confidence_top_k": %d}'
    await check_servers(Config((vllm_server.url,), gate=gate % 20), Keys())
    assert "gives no logprobs" not in caplog.text
    await check_servers(Config((vllm_server.url,), gate=gate % 21), Keys())
    assert "gives no logprobs" in caplog.text
    assert "greater than max allowed: 20" in caplog.text


async def test_a_request_has_its_id_at_the_server(vllm_server: VllmServer) -> None:
    async with gateway_for(vllm_server, gate=None) as gateway:
        url = gateway.url + "/v1/completions"
        body = completion_body(model="policy", max_tokens=2)
        headers = {"X-Request-Id": "mine"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.post(url, json=body) as response,
        ):
            assert "mine" in (await response.json())["id"]
        _, answer = await post(url, {**body, "request_id": "theirs"})
        assert "theirs" in answer["id"]


async def test_processed_logprobs_and_a_key(
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    flags = ("--logprobs-mode", "processed_logprobs", "--api-key", "right")
    server = await serve(tmp_path_factory.mktemp("processed"), *flags)
    try:
        config = Config((server.url,))
        await check_servers(config, Keys(upstream="right"))
        assert "logprobs processed" in caplog.text
        with pytest.raises(UpstreamError, match="refuses the upstream key"):
            await check_servers(config, Keys(upstream="wrong"))
        await check_servers(config, Keys())
        assert "clients must send theirs" in caplog.text
        async with gateway_for(server, gate=None, upstream_key="right") as gateway:
            body = completion_body(model="policy", max_tokens=2)
            assert (await post(gateway.url + "/v1/completions", body))[0] == 200
    finally:
        await server.process.stop()
