"""The page with its pictures, as one web application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.responses import Response

from visual_ground.app.bubbles import Album
from visual_ground.app.page import Page, PageSettings
from visual_ground.model import GroundedModel
from visual_ground.server.engine import Engine, EngineLimits
from visual_ground.server.failures import RequestFailure
from visual_ground.server.http import PICTURE_HEADERS
from visual_ground.server.pictures import Pictures, ShownIndex


def create_page(
    model: GroundedModel,
    indexes: Mapping[str, ShownIndex] | None = None,
    settings: PageSettings | None = None,
    limits: EngineLimits | None = None,
) -> FastAPI:
    """Return the page as an ASGI application.

    Args:
        model: the grounded model, which nothing else should use meanwhile; all its adapters can be chosen.
        indexes: pictures to choose from, by name.
        settings: what the page says at first.
        limits: how much is answered at once, and how much may wait.
    """
    limits = EngineLimits() if limits is None else limits
    engine = Engine(model, limits)
    albums = {
        name: Album(index, Pictures(index), f"images/{number}")
        for number, (name, index) in enumerate((indexes or {}).items())
    }
    shelves = [album.pictures for album in albums.values()]

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    async def image(number: int, name: str) -> Response:
        try:
            if not 0 <= number < len(shelves):
                raise RequestFailure(404, "There is no such index.")
            data, media_type = await asyncio.to_thread(shelves[number].read, name)
        except RequestFailure as failure:
            return Response(failure.message, failure.status, media_type="text/plain")
        return Response(data, media_type=media_type, headers=PICTURE_HEADERS)

    app = FastAPI(title="visual_ground", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.get("/images/{number}/{name:path}", response_model=None)(image)
    page = Page(engine, albums, PageSettings() if settings is None else settings)
    return page.mount(app)
