"""V from a class of the user's own, given as `--critic package.module:Class`.

    class Critic:
        async def value(self, prompt_token_ids: list[int], token_ids: list[int]) -> float: ...

It is made without arguments. `async with` is honoured where the class has it, so that it can open
and close what it needs. It runs in the gateway's event loop, so what computes belongs in a thread
(`asyncio.to_thread`): all streams wait for a call that does not give way.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import os
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from importlib import import_module
from typing import Any, Self

from prometheus_client import CollectorRegistry

from espo_gateway.critic.metrics import CriticMetrics
from espo_gateway.critic.server import FailureLog, ValueServer
from espo_gateway.errors import InvalidRequest, UpstreamError, said

log = logging.getLogger(__name__)

#: Calls of the class at a time; what more is asked waits.
CALLS = 64


def load_critic(path: str) -> ValueServer:
    """Make the object that a dotted path names.

    Raises InvalidRequest naming the setting, the path and the fix.
    """
    module, _, name = path.partition(":")

    def refused(problem: str) -> InvalidRequest:
        return InvalidRequest(f"--critic {path}: {problem}", param="critic")

    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # as `python -m` has it, for the installed command
    try:
        made = getattr(import_module(module), name)()
    except ModuleNotFoundError as error:
        raise refused(
            f"{said(error)}; install it, or start the gateway where it can be imported (PYTHONPATH)"
        ) from error
    except AttributeError as error:
        raise refused(f"{said(error)}; name a class of that module") from error
    except Exception as error:
        raise refused(
            f"making it failed: {said(error)}; it must be made without arguments"
        ) from error
    if not inspect.iscoroutinefunction(getattr(made, "value", None)):
        raise refused(
            "it has no method `async def value(self, prompt_token_ids, token_ids) -> float`"
        )
    return made


class CustomCritic:
    """A user's object as a `ValueServer`: bounded in time and number, its faults kept away.

    After a failure one question at a time is put to it, and the others get no value at once, until
    one is answered: nobody waits for a class that hangs.

    Args:
        timeout: seconds for one answer, the wait for a free place included.
    """

    def __init__(
        self,
        own: ValueServer,
        *,
        name: str,
        timeout: float = 60.0,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self._own = own
        self._name = name
        self._timeout = timeout
        self._places = asyncio.Semaphore(CALLS)
        self._failing = self._trying = False
        self._waiting = 0
        self._failures = FailureLog(f"critic {name}")
        self._stack = AsyncExitStack()
        self._metrics = CriticMetrics(registry)
        self._metrics.waiting.set_function(lambda: self._waiting)

    async def __aenter__(self) -> Self:
        own: Any = self._own
        if hasattr(own, "__aenter__"):
            try:
                await self._stack.enter_async_context(own)
            except Exception as error:
                raise InvalidRequest(
                    f"--critic {self._name}: entering it failed: {said(error)}", param="critic"
                ) from error
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self._stack.aclose()
        except Exception:
            log.exception("--critic %s: leaving it failed", self._name)

    async def value(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> float:
        """V after the prompt and these sampled tokens. Raises UpstreamError: there is none."""
        with self._metrics.question():
            return await self._bounded(prompt_token_ids, token_ids)

    async def _bounded(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> float:
        if self._failing and self._trying:
            raise self._failed("it gives no values at the moment")
        trial, self._trying = self._failing, self._failing or self._trying
        self._waiting += 1
        entered = False
        try:
            async with asyncio.timeout(self._timeout), self._places:
                self._waiting -= 1
                entered = True
                value = await self._own.value(list(prompt_token_ids), list(token_ids))
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise self._failed(f"its value is no number: {value!r:.60}")
            self._failing = False
            return float(value)
        except UpstreamError:
            raise
        except TimeoutError as error:
            self._failing = True
            raise self._failed(f"no value within {self._timeout:g} s") from error
        except Exception as error:
            self._failing = True
            raise self._failed(f"{type(error).__name__}: {said(error)}") from error
        finally:
            if not entered:
                self._waiting -= 1
            if trial:
                self._trying = False

    def _failed(self, problem: str) -> UpstreamError:
        self._failures.tell(problem)
        return UpstreamError(f"{self._name}: {problem}")
