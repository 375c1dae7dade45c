"""`python -m espo_gateway`: checks its servers, serves until SIGTERM or SIGINT, exits with 0.

The first signal lets running requests finish, a second one does not. SIGHUP reads the key files and
the gate's again. `python -m espo_gateway calibrate` finds a gate from recorded traces.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import sys
from collections.abc import Callable, Sequence

from espo_gateway import event_loop
from espo_gateway.app import listen, running
from espo_gateway.config import Config, parse
from espo_gateway.errors import GatewayError
from espo_gateway.front.auth import read_keys
from espo_gateway.front.gateway import Gateway
from espo_gateway.startup import check_servers, summary
from espo_gateway.telemetry import logs
from espo_gateway.traces import calibrate

log = logging.getLogger("espo_gateway")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command. Exits with 0 after a signal, 1 with a message when it cannot start."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["calibrate"]:
        calibrate.main(given[1:])
        return
    config = parse(given)
    logs.configure(config.log_level, config.log_format)
    try:
        event_loop.run(serve(config))
    except (GatewayError, OSError, TimeoutError) as error:
        sys.exit(f"espo_gateway: {error}")


async def serve(config: Config) -> None:
    """Serve until a signal. Raises OSError, TimeoutError or GatewayError when it cannot start."""
    stop = asyncio.Event()
    _on_stop(stop.set)
    hung_up, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, hung_up.set)  # else it would end what is not up yet
    keys = read_keys(config)
    try:
        # Taken before anything is waited for: a busy port is known at once.
        sock = listen(config.host, config.port)
    except OSError as error:
        flag = "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
        raise OSError(
            f"cannot listen on {config.host}:{config.port}: {error.strerror}; "
            f"choose another with {flag}"
        ) from error
    check = asyncio.ensure_future(check_servers(config, keys))
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({check, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not stop.is_set():
            check.result()
            async with running(config, sock=sock) as gateway:
                loop.add_signal_handler(signal.SIGHUP, _reload, gateway)
                if hung_up.is_set():
                    _reload(gateway)
                for line in summary(config, gateway.keys):
                    log.info("%s", line)
                log.info("listening on %s, rule %s", gateway.url, gateway.gate.rule)
                await stopped
                _on_stop(gateway.traffic.abandon)
                log.info(
                    "stopping when %d running requests have finished, or in %g s; "
                    "a second signal ends them",
                    gateway.traffic.count,
                    config.drain_timeout,
                )
    finally:
        check.cancel()
        stopped.cancel()
        sock.close()


def _on_stop(action: Callable[[], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, action)


def _reload(gateway: Gateway) -> None:
    try:
        gateway.reload()
    except GatewayError as error:
        log.error("nothing was read again: %s", error)


if __name__ == "__main__":
    main()
