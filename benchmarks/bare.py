"""The floor of the `chain` benchmark: FastAPI under uvicorn that streams recorded events."""

import asyncio
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from tera.contract.common import parse_json_object


def build_app(events: list[bytes]) -> FastAPI:
    """Return an application that answers every completion with the same events."""
    app = FastAPI(openapi_url=None)

    async def stream() -> AsyncGenerator[bytes]:
        for event in events:
            yield event
            # Tokens come one step at a time; without this all events would be one write.
            await asyncio.sleep(0)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/completions")
    async def completions(request: Request) -> StreamingResponse:
        parse_json_object(await request.body())
        return StreamingResponse(stream(), media_type="text/event-stream")

    return app


if __name__ == "__main__":
    recorded = Path(sys.argv[1]).read_bytes()
    pieces = [piece + b"\n\n" for piece in recorded.split(b"\n\n") if piece]
    uvicorn.run(
        build_app(pieces),
        host="127.0.0.1",
        port=int(sys.argv[2]),
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )
