"""The trainer's side of a weight update: drives one server's routes in the right order.

Owns the order, the timeouts and the errors. Nothing here waits for ever, every failure names server
and route, and a server that was paused is resumed whatever happens in between.

    async with WeightClient("http://127.0.0.1:8000") as client:
        await client.update(["/dev/shm/model.safetensors"], version="12")
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Self

import aiohttp

from espo_gateway.vllm_plugin.pooling import ROUTE, pooled_values, pooling_body


class WeightSyncError(RuntimeError):
    """Weights could not be brought to a server, or it does not compute with them."""


class WeightRouteError(WeightSyncError):
    """A route of a server failed. Attributes: url, route, status (None: no answer), body."""

    def __init__(self, url: str, route: str, status: int | None, body: str) -> None:
        self.url, self.route, self.status, self.body = url, route, status, body
        answer = "no answer" if status is None else f"HTTP {status}"
        super().__init__(f"{url}{route}: {answer}: {body}")


class WeightClient:
    """One vLLM server that was started with ESPO's weight transfer.

    Args:
        url: of the server, without `/v1`.
        model: served name; asked of the server when not given.
        timeout: seconds for one call; loading a large model is one call.
        keep_kv: requests in flight keep the keys and values of the old weights. Without it, or
            under another scheduler than ESPO's, they are computed anew.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        timeout: float = 120.0,
        keep_kv: bool = False,
    ) -> None:
        self.url = url.rstrip("/")
        self._model = model
        self._timeout = timeout
        self._keep_kv = keep_kv
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def update(self, paths: Sequence[str], version: str) -> None:
        """`loaded`, with nothing to do meanwhile."""
        async with self.loaded(paths, version):
            pass

    @contextlib.asynccontextmanager
    async def loaded(self, paths: Sequence[str], version: str) -> AsyncIterator[None]:
        """Load the files into the server, whose weight transfer is ours; it goes on at the end of
        the context. What was sampled before is of the old weights, the rest of the new ones.

        Args:
            paths: safetensors files, as the server can open them, that hold the whole model.
            version: what `weight_version` returns from now on.

        Raises:
            WeightRouteError: when a route fails. The server is resumed; it has its old weights when
                `/update_weights` refused the files.
        """
        # Refused here, before anything is paused, by a server with another weight transfer.
        await self.post("/init_weight_transfer_engine", json={"init_info": {}})
        async with self.paused():
            await self.start()
            await self.post("/update_weights", json={"update_info": {"paths": list(paths)}})
            await self.post("/finish_weight_update", json={"weight_version": version})
            yield

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Requests wait while the weights change; they keep their tokens and go on.

        The prefix cache, which is of the old weights, is dropped, and requests in flight compute
        their prompt and tokens again under the new ones, unless they keep theirs (`keep_kv`). The
        server is resumed whatever happens.

        Raises:
            WeightRouteError: a route fails.
        """
        try:
            await self.post("/pause", params={"mode": "keep", "clear_cache": "false"})
            yield
            await self._drop_cache()
        except BaseException as error:
            try:
                await self._resume()
            except WeightRouteError as resume_error:
                # The first error is the reason; but nobody should wait for a paused server.
                error.add_note(f"and the server is still paused: {resume_error}")
            raise
        await self._resume()

    async def _resume(self) -> None:
        """To its end, however often whoever waits is cancelled. Raises WeightRouteError."""
        resuming = asyncio.ensure_future(self.post("/resume"))
        try:
            await asyncio.shield(resuming)
        except asyncio.CancelledError as cancelled:
            while not resuming.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([resuming])
            if (failure := resuming.exception()) is not None:
                cancelled.add_note(f"and the server is still paused: {failure}")
            raise

    async def start(self) -> None:
        """Begin an update. Raises WeightRouteError."""
        try:
            await self.post("/start_weight_update")
        except WeightRouteError:
            # Perhaps a trainer died between start and finish. An empty update is refused, which
            # ends the session that it left.
            with contextlib.suppress(WeightRouteError):
                await self.post("/update_weights", json={"update_info": {"paths": []}})
            await self.post("/start_weight_update")

    async def _drop_cache(self) -> None:
        """Requests in flight hold blocks of the cache: vLLM drops none while they do.

        `/pause` has a flag to do this, but it is deprecated and said to be ignored with mode=keep.
        """
        route = "/reset_prefix_cache"
        answer: dict[str, Any] = {}
        for anew in ("false", "true") if self._keep_kv else ("true",):
            params = {"reset_running_requests": anew, "reset_external": "true"}
            answer = await self.post(route, params=params)
            if answer.get("success"):
                return
        raise WeightRouteError(self.url, route, 200, f"the cache was not dropped: {answer}")

    async def weight_version(self) -> str:
        """The version of the last finished update ("default" before the first)."""
        return str((await self._call("GET", "/weight_info"))["weight_version"])

    async def model(self) -> str:
        """The served model's name."""
        if self._model is None:
            self._model = str((await self._call("GET", "/v1/models"))["data"][0]["id"])
        return self._model

    async def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """log π(token | tokens before it) of given tokens, computed anew (never from the cache).

        Args:
            token_ids: shape [tokens], at least 2.

        Returns:
            shape [tokens - 1]: nothing comes before the first token, so it has none.
        """
        route = "/v1/completions"
        body = {
            "model": await self.model(),
            "prompt": list(token_ids),
            "max_tokens": 1,
            # Asking for these makes vLLM pass over the prefix cache.
            "prompt_logprobs": 0,
        }
        answer = await self.post(route, json=body)
        try:
            found = answer["choices"][0]["prompt_logprobs"][1:]
            pairs = zip(found, token_ids[1:], strict=True)
            return [entry[str(token)]["logprob"] for entry, token in pairs]
        except (KeyError, TypeError, ValueError) as error:
            raise WeightRouteError(self.url, route, 200, f"{error!r} in {answer}"[:500]) from error

    async def values(self, token_ids: Sequence[Sequence[int]]) -> list[float]:
        """V(s) of a critic (`--runner pooling`, one label) after each of the given prefixes.

        Args:
            token_ids: shape [prefixes, tokens], ragged.

        Returns:
            shape [prefixes]; the raw score of the label, NaN where the server computes none.
        """
        prefixes = [list(ids) for ids in token_ids]
        answer = await self.post(ROUTE, json=pooling_body(await self.model(), prefixes))
        try:
            return pooled_values(answer, len(prefixes))
        except ValueError as error:
            raise WeightRouteError(self.url, ROUTE, 200, f"{error}: {answer}"[:500]) from error

    async def workers(self) -> int:
        """How many processes hold the server's weights, all its replicas counted."""
        return int((await self._call("GET", "/get_world_size"))["world_size"])

    async def checksums(self) -> dict[str, str]:
        """SHA-256 of the bytes of each of vLLM's parameters, by its name there."""
        answer = await self.post("/weight_checker", json={"action": "checksum"})
        return dict(answer["checksums"])

    async def post(self, route: str, **request: Any) -> dict[str, Any]:
        """Post to a route. json, params: as aiohttp takes them. Raises WeightRouteError."""
        return await self._call("POST", route, **request)

    async def _call(
        self,
        method: str,
        route: str,
        *,
        json: object = None,
        params: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        if self._session is None or self._session.closed:
            timeout = aiohttp.ClientTimeout(total=self._timeout)
            # A connection kept between syncs is closed by the server meanwhile; a POST that meets
            # the closed one fails and must not be repeated blindly.
            self._session = aiohttp.ClientSession(
                timeout=timeout, connector=aiohttp.TCPConnector(force_close=True)
            )
        try:
            async with self._session.request(
                method, f"{self.url}{route}", json=json, params=params
            ) as response:
                if response.status != 200:
                    text = await response.text()
                    raise WeightRouteError(self.url, route, response.status, text[:500])
                return await response.json()
        except TimeoutError as error:
            problem = f"none within {self._timeout:g} s"
            raise WeightRouteError(self.url, route, None, problem) from error
        except aiohttp.ClientError as error:
            raise WeightRouteError(self.url, route, None, repr(error)) from error
