"""What stands behind a gateway, found out before it serves: models, logprobs, keys.

`check_servers` logs what it finds and raises when the gateway could not work.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import aiohttp

from espo_gateway.config import Config
from espo_gateway.critic.server import CriticServer
from espo_gateway.errors import InvalidRequest, UpstreamError, said
from espo_gateway.front.auth import Keys
from espo_gateway.stop.gate_json import gate_from_json
from espo_gateway.upstream.server import base_url, decides

log = logging.getLogger(__name__)

#: Seconds for one question; a server that is busy or stuck does not hold up the start for long.
_PATIENCE = 10.0
#: Logprobs of one prompt at two temperatures that differ by less are the same, up to rounding.
_ROUNDING = 0.02
#: A top logprob this near 0 tells nothing: it hardly moves with the temperature.
_CERTAIN = -0.1


@dataclass(frozen=True)
class JsonAnswer:
    """Of one question to a server. data: its JSON, None when it is none."""

    status: int
    data: Any

    @property
    def words(self) -> str:
        error = self.data.get("error", self.data) if isinstance(self.data, dict) else None
        message = error.get("message", error) if isinstance(error, dict) else error
        return f"HTTP {self.status}" + (f": {str(message)[:200]}" if message else "")


class Probe(NamedTuple):
    """mode: "raw", or "processed" by temperature and the like, on which β depends; or "one" a token
    and no more, which is too few for chats. why: or why not.
    """

    mode: Literal["raw", "processed", "one", "none", "unknown"]
    why: str = ""


async def check_servers(config: Config, keys: Keys) -> None:
    """Log what the servers serve; wait for them as long as configured.

    Raises TimeoutError when waiting was asked for and one still does not answer, UpstreamError when
    one refuses the key, gives no logprobs and those are insisted on, or is a critic that is none,
    InvalidRequest when the gate is none.
    """
    try:
        gate = gate_from_json(config.read_gate() or b"{}", has_critic=True)
    except InvalidRequest as error:
        raise InvalidRequest(f"{config.gate_named}: {error}") from error
    alternatives = max(1, gate.top_logprobs)
    deadline = time.monotonic() + config.wait
    servers = [base_url(url) for url in config.upstreams]
    critic = base_url(config.critic_url) if config.critic_url is not None else None
    urls = [*servers, *([] if critic is None else [critic])]
    timeout = aiohttp.ClientTimeout(total=_PATIENCE, sock_connect=2.0)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        while True:
            asked = (_ask(session, url + "/v1/models", keys.upstream_headers) for url in urls)
            answers = dict(zip(urls, await asyncio.gather(*asked), strict=True))
            silent = [url for url, answer in answers.items() if answer is None]
            if not silent or time.monotonic() >= deadline:
                break
            await asyncio.sleep(0.5)
        if silent and config.wait:
            raise TimeoutError(f"no answer within {config.wait:g} s from {', '.join(silent)}")
        for url in silent:
            log.warning("%s does not answer yet", url)
        found = {url: answer for url, answer in answers.items() if answer is not None}
        answering = [url for url in servers if url in found]
        await asyncio.gather(
            *(
                _check_upstream(session, url, found[url], config, keys, alternatives)
                for url in answering
            )
        )
        if config.critic_in_engine:
            for url in answering:
                if not await decides(session, url, keys.upstream_headers, values=True):
                    raise UpstreamError(
                        f"--critic engine: {url} tells no V; start it with `python -m "
                        "espo_gateway.vllm_plugin MODEL --value-head FOLDER`"
                    )
    served = {url: sorted(_names(found[url])) for url in answering}
    if len({*map(tuple, served.values())} - {()}) > 1:
        what = "; ".join(f"{url}: {', '.join(names) or 'unknown'}" for url, names in served.items())
        log.info("the servers serve different models, and a request goes by its model (%s)", what)
    if critic is not None and critic in found:
        log.info("%s serves %s", critic, ", ".join(_names(found[critic])) or "unknown")
        await check_critic(critic, config.critic_timeout, keys.upstream_headers)


async def _check_upstream(
    session: aiohttp.ClientSession,
    url: str,
    listed: JsonAnswer,
    config: Config,
    keys: Keys,
    alternatives: int,
) -> None:
    if listed.status in (401, 403):
        if keys.pass_clients:
            log.info("%s wants a key; clients must send theirs. It is not looked at further", url)
            return
        told = "refuses the upstream key" if keys.upstream else "wants a key, and there is none"
        raise UpstreamError(f"{url} {told}: {listed.words}; see --upstream-key-file")
    models = _models(listed)
    names = ", ".join(_names(listed)) or "unknown"
    lengths = {m["max_model_len"] for m in models if isinstance(m.get("max_model_len"), int)}
    length = f" (max_model_len {', '.join(map(str, sorted(lengths)))})" if lengths else ""
    probe = Probe("unknown", "it lists no model")
    if models:
        probe = await _probe(session, url, str(models[0]["id"]), keys, alternatives)
    why = f" ({probe.why})" if probe.why else ""
    log.info("%s serves %s%s, logprobs %s%s", url, names, length, probe.mode, why)
    if probe.mode == "one":
        log.warning("%s refuses 2 logprobs a token, without which no chat can be stopped", url)
    if probe.mode == "none":
        problem = f"{url} gives no logprobs, without which nothing can be stopped ({probe.why})"
        if config.unmonitored == "refuse":
            raise UpstreamError(f"{problem}; unmonitored=refuse would refuse every request")
        log.warning("%s", problem)


async def _probe(
    session: aiohttp.ClientSession, url: str, model: str, keys: Keys, alternatives: int
) -> Probe:
    """What a server's logprobs are, from the first token of one prompt at two temperatures.

    alternatives: how many logprobs a token the rule reads; a server may give fewer.
    """
    tops: list[float] = []
    # A chat is asked for 2 at least.
    for temperature, count in ((1.0, alternatives), (2.0, max(2, alternatives))):
        body: dict[str, Any] = {
            "model": model,
            "prompt": "The",
            "max_tokens": 1,
            "temperature": temperature,
            "seed": 0,
            "logprobs": count,
        }
        answer = await _ask(session, url + "/v1/completions", keys.upstream_headers, body)
        if answer is not None and answer.status in (404, 405):
            # It may serve chats only.
            del body["prompt"]
            body |= {"messages": [{"role": "user", "content": "The"}], "logprobs": True}
            body |= {"top_logprobs": max(2, count)}
            answer = await _ask(session, url + "/v1/chat/completions", keys.upstream_headers, body)
        if answer is None:
            return Probe("unknown", f"no answer to a short completion within {_PATIENCE:g} s")
        if answer.status != 200:
            refused = 400 <= answer.status < 500 and answer.status != 429
            mode: Literal["one", "none"] = "one" if tops else "none"
            return Probe(mode if refused else "unknown", answer.words)
        top = _top_logprob(answer.data)
        if top is None:
            return Probe("none", "its answer has none")
        tops.append(top)
    if abs(tops[0] - tops[1]) > _ROUNDING:
        return Probe("processed")
    if min(tops) > _CERTAIN:
        return Probe("unknown", "it is too certain of the probe's answer to tell")
    return Probe("raw")


def _top_logprob(answer: Any) -> float | None:
    """The largest logprob of the first token, in either API's shape."""
    try:
        logprobs = answer["choices"][0]["logprobs"]
        if "content" in logprobs:
            tops = [entry["logprob"] for entry in logprobs["content"][0]["top_logprobs"]]
        else:
            tops = list(logprobs["top_logprobs"][0].values())
        top = max(float(value) for value in tops if value is not None)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None
    return top if math.isfinite(top) else None


async def check_critic(
    url: str,
    timeout: float,  # noqa: ASYNC109 (of its requests)
    headers: Mapping[str, str],
) -> None:
    """Ask for one value. Raises UpstreamError: a wrong address would else be met by every token."""
    async with CriticServer(url, timeout=timeout, headers=headers) as critic:
        try:
            await critic.value([0], [])
        except UpstreamError as error:
            raise UpstreamError(
                f"--critic {url} gives no values ({error.in_full}); start it with "
                "`python -m espo_gateway.vllm_plugin MODEL --critic`"
            ) from error


async def _ask(
    session: aiohttp.ClientSession,
    url: str,
    headers: Mapping[str, str],
    body: Mapping[str, Any] | None = None,
) -> JsonAnswer | None:
    """None when nothing answers, or a proxy that has lost its server does."""
    method = "GET" if body is None else "POST"
    try:
        async with session.request(method, url, headers=headers, json=body) as response:
            if body is None and response.status in (502, 503, 504):
                return None
            try:
                return JsonAnswer(response.status, await response.json(content_type=None))
            except ValueError:
                return JsonAnswer(response.status, None)
    except (aiohttp.ClientError, TimeoutError) as error:
        log.debug("%s: %s", url, said(error))
        return None


def _models(listed: JsonAnswer) -> list[dict[str, Any]]:
    data = listed.data.get("data") if isinstance(listed.data, dict) else None
    models = data if isinstance(data, list) else []
    return [model for model in models if isinstance(model, dict) and "id" in model]


def _names(listed: JsonAnswer) -> list[str]:
    return [str(model["id"]) for model in _models(listed)]


def summary(config: Config, keys: Keys) -> list[str]:
    """How the gateway is set up, in lines for the log."""
    if keys.admin is not None:
        administration = "with the admin key"
    elif not config.loopback:
        administration = "off (--admin-key-file turns it on)"
    else:
        how = " with an API key" if keys.api else ", without key"
        administration = f"from this machine{how} (a proxy that adds no headers is taken for it)"
    upstream = "the gateway's own" if keys.upstream else "none"
    if keys.pass_clients:
        upstream = "the clients'"
    return [
        f"limits: {config.max_in_flight} requests in flight and {config.max_queue} waiting, bodies "
        f"of {config.max_request_bytes} bytes, {config.request_timeout:g} s to send a request",
        f"keys: {len(keys.api) or 'no'} API keys; administration {administration}; "
        f"servers see {upstream}",
    ]
