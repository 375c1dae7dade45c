"""vLLM's scheduler, with the monitor in it: a request ends at its decision token.

    vllm serve MODEL --scheduler-cls espo_gateway.vllm_plugin.scheduler.EspoScheduler

The engine core has every sampled token's logprobs once a step. What a request orders comes with it
(`wire`); without an order it is vLLM's own. Logprobs that the client has not asked for the worker
computes all the same, and they end here. The step that is in flight when a request ends is
thrown away by vLLM, so a client gets no token past the cut, and one at most is sampled in vain.

Nothing here fails the engine: a fault of ours ends the monitor of that request, whose record says
so, and an order that is wrong ends the request (a 400 by `admission`, before it comes here).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Set
from typing import Any

import vllm
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from espo_gateway.errors import InvalidRequest, said
from espo_gateway.vllm_plugin import VALUE_WORKER, VALUES, head_folder
from espo_gateway.vllm_plugin.admission import check_order, is_tested, not_tested
from espo_gateway.vllm_plugin.batch import Batch
from espo_gateway.vllm_plugin.monitor import Monitor
from espo_gateway.vllm_plugin.wire import STOPPED, order_of

log = logging.getLogger(f"vllm.{__name__}")


class Monitored(Scheduler):
    """What is ours, before either of vLLM's schedulers in the order of classes."""

    def __init__(self, vllm_config: Any, *arguments: Any, **named: Any) -> None:
        check_engine(vllm_config)
        super().__init__(vllm_config, *arguments, **named)
        self._vllms_update = super()._update_request_with_output
        self._model_config = vllm_config.model_config
        self._has_values = head_folder(vllm_config.additional_config) is not None
        self._monitors: dict[str, Monitor] = {}
        #: by request, what the worker is asked in the place of what the client has asked
        self._worker_params: dict[str, Any] = {}
        #: those that are followed together, and those that are by themselves
        self._batch = Batch()
        self._alone: set[str] = set()
        #: whether what comes may be of a step before a preemption, and be dropped
        self._stale = False
        # Of the step whose output is being read: logprobs by row, V by row, each request's first
        # row, and the requests whose tokens their monitor must see.
        self._logprobs: Any = None
        self._values: Any = None
        self._first_rows: dict[str, int] = {}
        self._open: Set[str] = set()
        self._tested = is_tested(vllm.__version__)
        if not self._tested:
            log.error("%s; this engine decides nothing", not_tested(vllm.__version__))

    def add_request(self, request: Request) -> None:
        refused = False
        if self._tested and request.sampling_params is not None:
            try:
                self._begin(request)
            except InvalidRequest as error:
                log.error("request %s is refused: %s", request.request_id, error)
                refused = True
            except Exception as error:
                self._fault(request.request_id, error)
        super().add_request(request)
        if refused:
            # Ends with the next step, in an error: vLLM's way for what it finds out too late.
            self.grammar_compile_error_reqs.add(request.request_id)

    def _begin(self, request: Request) -> None:
        params = request.sampling_params
        order = order_of(params.extra_args)
        if order is None or request.request_id in self.requests:
            return
        check_order(order, params, self._model_config, has_values=self._has_values)
        if request.resumable:
            raise InvalidRequest(
                "espo_gate: input that is streamed has several answers, and one decision cannot "
                "end it; send whole prompts",
                param="espo_gate",
            )
        monitor = Monitor(order, request.num_prompt_tokens)
        wanted, asked = monitor.alternatives, params.logprobs
        if asked is None or 0 <= asked < wanted:
            params = copy.copy(params)
            params.logprobs = wanted
            self._worker_params[request.request_id] = params
        self._monitors[request.request_id] = monitor
        if monitor.batched:
            self._batch.add(request.request_id, monitor.watch)
        else:
            self._alone.add(request.request_id)

    def schedule(self, *arguments: Any, **named: Any) -> Any:
        scheduled = super().schedule(*arguments, **named)
        # The worker alone: what this side does not ask for it does not hand on.
        for new in scheduled.scheduled_new_reqs:
            new.sampling_params = self._worker_params.get(new.req_id, new.sampling_params)
        return scheduled

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        self._open = set()
        if self._monitors:
            try:
                self._open = self._read(model_runner_output)
            except Exception as error:
                for request_id in self._monitors:
                    self._fault(request_id, error)
        # Nearly every step decides nothing, and is vLLM's own, call for call.
        update = self._watched if self._open else self._vllms_update
        self._update_request_with_output = update
        return super().update_from_output(scheduler_output, model_runner_output)

    def _read(self, output: Any) -> Set[str]:
        """Which requests' tokens must be looked at."""
        self._logprobs, self._first_rows = output.logprobs, output.req_id_to_index
        self._values = getattr(output, VALUES, None)
        if self._stale:
            requests = self.requests.values()
            self._stale = any(request.num_stale_output_tokens for request in requests)
        # Only where every token of the step is one, and goes to its request.
        if (
            output.logprobs is None
            or output.logprobs.cu_num_generated_tokens is not None
            or output.kv_connector_output is not None
            or self._stale
        ):
            return self._monitors.keys()
        counts = [*map(len, output.sampled_token_ids)]
        return self._alone.union(self._batch.push(output.req_ids, counts, output.logprobs.logprobs))

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """vLLM's, except where requests run and are not to be reset, which vLLM refuses: they keep
        what has been computed of them, and no other request ever gets it."""
        # Connectors have names of blocks of their own.
        connected = self.connector is not None or self.aux_output_connector is not None
        if reset_running_requests or not self.running or connected:
            return bool(super().reset_prefix_cache(reset_running_requests, reset_connector))
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            manager.block_pool.evict_blocks({*range(len(manager.block_pool.blocks))})
        for request in filter(self._holds_kv_blocks, self.requests.values()):
            # Its later blocks build on those before the reset: they are cached under its own name.
            request.cache_salt = f"before a reset: {request.request_id}"
            request.block_hashes.clear()
            request.update_block_hashes()
        return True

    def _preempt_request(self, *arguments: Any, **named: Any) -> Any:
        self._stale = True
        return super()._preempt_request(*arguments, **named)

    def _watched(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        """`_update_request_with_output`, of a step in which a token may decide."""
        update, name = self._vllms_update, request.request_id
        if name not in self._open:
            return update(request, new_token_ids, is_stale)
        monitor = self._monitors[name]
        kept, stopped = [], False
        # Of several tokens of a step each is added by itself: what follows a stop never was.
        for place, token in enumerate(new_token_ids):
            added, stopped = update(request, [token], is_stale)
            kept += added
            stopped = self._push(request, monitor, place, stopped)
            if stopped:
                break
        return kept, stopped

    def _push(self, request: Request, monitor: Monitor, place: int, stopped: bool) -> bool:
        """Show the monitor a token; whether the request ends. stopped: what vLLM says."""
        name, capped = request.request_id, RequestStatus.FINISHED_LENGTH_CAPPED
        try:
            if monitor.fault is None:
                self._batch.settle(name, monitor.watch, request.num_output_tokens - 1)
                last = stopped and request.status != capped
                row = self._row(name, place, monitor.alternatives)
                if monitor.push(row, last=last, value=self._value(name)):
                    # Not "stopped": of a token that stops a text vLLM shows nothing.
                    request.status, request.stop_reason = capped, STOPPED
                    stopped = True
                self._batch.resume(name, monitor.watch)
                if monitor.done:
                    self._forget(name)
        except Exception as error:
            self._fault(name, error)
        return stopped

    def _row(self, name: str, place: int, alternatives: int) -> list[float] | None:
        """The logprobs of a request's token of this step, as `Monitor.push` takes them."""
        if self._logprobs is None:
            return None
        starts, first = self._logprobs.cu_num_generated_tokens, self._first_rows[name]
        row = (first if starts is None else starts[first]) + place
        found: list[float] = self._logprobs.logprobs[row, : alternatives + 1].tolist()
        return found

    def _value(self, name: str) -> float | None:
        """V of the state that a request's token of this step was sampled in."""
        values = self._values
        return None if values is None else float(values[self._first_rows[name]])

    def _handle_stopped_request(self, request: Request) -> Any:
        name = request.request_id
        monitor = self._monitors.get(name)
        if monitor is not None:
            try:
                tokens = request.num_output_tokens
                self._batch.settle(name, monitor.watch, tokens)
                request.stop_reason = monitor.stop_reason(request.stop_reason, tokens)
            except Exception as error:
                self._fault(name, error)
        return super()._handle_stopped_request(request)

    def _fault(self, request_id: str, error: Exception) -> None:
        """Go on without the monitor of a request."""
        monitor = self._monitors.get(request_id)
        if monitor is None or monitor.fault is None:
            log.error("request %s is not watched: %s", request_id, said(error), exc_info=error)
        if monitor is not None:
            monitor.fault = f"a fault in the engine's monitor: {said(error)}"
            self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        """Follow a request no further."""
        self._batch.remove(request_id)
        self._alone.discard(request_id)

    def _free_request(self, request: Request, *arguments: Any, **named: Any) -> Any:
        self._monitors.pop(request.request_id, None)
        self._forget(request.request_id)
        self._worker_params.pop(request.request_id, None)
        return super()._free_request(request, *arguments, **named)


class EspoPlainScheduler(Monitored):
    """Where vLLM does not schedule asynchronously."""


class EspoScheduler(Monitored, AsyncScheduler):
    """The one to name: it is the other where vLLM would take its plain one."""

    def __new__(cls, vllm_config: Any, *arguments: Any, **named: Any) -> Any:
        if vllm_config.scheduler_config.async_scheduling:
            return super().__new__(cls)
        return EspoPlainScheduler(vllm_config, *arguments, **named)


def check_engine(vllm_config: Any) -> None:
    """Raise ValueError where decisions could not be right."""
    model = vllm_config.model_config
    if head_folder(vllm_config.additional_config) is not None:
        check_values(vllm_config)
    if model.is_diffusion:
        raise ValueError(
            "EspoScheduler follows tokens in their order, and this is a diffusion model: start "
            "without --scheduler-cls"
        )
    if model.logprobs_mode not in ("raw_logprobs", "processed_logprobs"):
        raise ValueError(
            f"EspoScheduler reads logprobs, and --logprobs-mode {model.logprobs_mode} gives "
            "logits: use raw_logprobs or processed_logprobs"
        )


def check_values(vllm_config: Any) -> None:
    """Raise ValueError where V by a head could not be told of every token."""
    told = (
        (vllm_config.speculative_config is not None, "not with speculative decoding"),
        (vllm_config.parallel_config.pipeline_parallel_size > 1, "not with pipeline stages"),
        (vllm_config.use_v2_model_runner, "not by vLLM's V2 runner (VLLM_USE_V2_MODEL_RUNNER=0)"),
        (
            vllm_config.parallel_config.worker_cls != VALUE_WORKER,
            f"by --worker-cls {VALUE_WORKER} alone",
        ),
    )
    for wrong, when in told:
        if wrong:
            raise ValueError(f"--value-head: V is told {when}")
