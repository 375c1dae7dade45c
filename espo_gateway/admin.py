"""The gateway's own routes under /espo, for whoever runs it."""

from __future__ import annotations

import msgspec
from aiohttp import web

from espo_gateway.gates import gate_to_json
from espo_gateway.gateway import Gateway


def admin_routes(gateway: Gateway) -> list[web.RouteDef]:
    """Reading and pushing the gate; what was learnt."""

    async def get_gate(request: web.Request) -> web.Response:
        return web.Response(body=gate_to_json(gateway.gate), content_type="application/json")

    async def put_gate(request: web.Request) -> web.Response:
        gateway.push_gate(await request.read())
        return await get_gate(request)

    async def statistics(request: web.Request) -> web.Response:
        tuning, recorder = gateway.tuning, gateway.recorder
        return web.json_response(
            {
                "gate": msgspec.to_builtins(gateway.gate),
                "tuning": tuning.report() if tuning is not None else None,
                "recording": recorder.report() if recorder is not None else None,
            }
        )

    return [
        web.get("/espo/gate", get_gate),
        web.put("/espo/gate", put_gate),
        web.get("/espo/statistics", statistics),
    ]
