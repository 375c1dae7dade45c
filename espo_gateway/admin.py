"""The gateway's own routes under /espo, for whoever runs it; `auth` says who may."""

from __future__ import annotations

from aiohttp import web

from espo_gateway.gates import gate_to_json
from espo_gateway.gateway import Gateway


def admin_routes(gateway: Gateway) -> list[web.RouteDef]:
    """Reading and pushing the gate; reading the files anew."""

    async def get_gate(request: web.Request) -> web.Response:
        return web.Response(body=gate_to_json(gateway.gate), content_type="application/json")

    async def put_gate(request: web.Request) -> web.Response:
        gateway.push_gate(await request.read())
        return await get_gate(request)

    async def reload(request: web.Request) -> web.Response:
        gateway.reload()
        counts = {"api_keys": len(gateway.keys.api), "gate_version": gateway.gate.version}
        return web.json_response(counts)

    return [
        web.get("/espo/gate", get_gate),
        web.put("/espo/gate", put_gate),
        web.post("/espo/reload", reload),
    ]
