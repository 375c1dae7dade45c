"""The gateway's own routes under /espo, for whoever runs it; `auth` says who may."""

from __future__ import annotations

import msgspec
from aiohttp import web

from espo_gateway.admin.live import Live
from espo_gateway.admin.page import page_routes
from espo_gateway.front.gateway import Gateway
from espo_gateway.stop.gate_json import gate_to_dict, gate_to_json


def admin_routes(gateway: Gateway, live: Live) -> list[web.RouteDef]:
    """The gate, read and pushed; the files, read anew; the page that shows the gateway live."""

    async def get_gate(request: web.Request) -> web.Response:
        return web.Response(body=gate_to_json(gateway.gate), content_type="application/json")

    async def put_gate(request: web.Request) -> web.Response:
        gateway.push_gate(await request.read())
        return await get_gate(request)

    async def reload(request: web.Request) -> web.Response:
        gateway.reload()
        counts = {"api_keys": len(gateway.keys.api), "gate_version": gateway.gate.version}
        return web.json_response(counts)

    async def snapshot(request: web.Request) -> web.Response:
        data = msgspec.json.encode(live.snapshot())
        headers = {"Cache-Control": "no-store"}
        return web.Response(body=data, content_type="application/json", headers=headers)

    async def statistics(request: web.Request) -> web.Response:
        gate = gate_to_dict(gateway.gate)
        return web.json_response({"gate": gate, **gateway.observers.report()})

    return [
        web.get("/espo/gate", get_gate),
        web.put("/espo/gate", put_gate),
        web.post("/espo/reload", reload),
        web.get("/espo/live", snapshot),
        *page_routes(),
        web.get("/espo/statistics", statistics),
    ]
