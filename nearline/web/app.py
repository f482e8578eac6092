"""The HTTP application: `/health` for whoever restarts things, `/metrics` for Prometheus, `/runs` for scripts."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Header, Query, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client.exposition import choose_encoder
from starlette.middleware.trustedhost import TrustedHostMiddleware

from nearline.web.prometheus import registry_of, unreachable_registry
from nearline.web.service_view import ServiceView
from storage.errors import AccessDenied, BadName, NearlineError, ServiceUnavailable

__all__ = ["create_app"]

_LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]", "::1")

Authorization = Annotated[str | None, Header()]


def create_app(view: ServiceView, allowed_hosts: tuple[str, ...] = _LOOPBACK_NAMES) -> FastAPI:
    """The application for one service.

    Parameters
    ----------
    view : the service; closed with the application.
    allowed_hosts : names under which it may be asked. A page in somebody's browser can send requests to
        loopback under a name of its own; those are refused.
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        view.close()

    # The interactive pages would load their scripts from elsewhere; /openapi.json is enough.
    app = FastAPI(title="Nearline", lifespan=life, docs_url=None, redoc_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts))
    app.exception_handler(NearlineError)(_as_answer)

    @app.get("/health")
    def health(authorization: Authorization = None) -> JSONResponse:
        """200 when the service can do its work, else 503; why, in words."""
        try:
            status = view.status(_token(authorization))
        except ServiceUnavailable as error:
            content = {"status": "unreachable", "problems": [str(error)], "warnings": []}
            return JSONResponse(content, 503)
        problems = status.problems()
        content = {"status": "failing" if problems else "ok", "problems": problems, "warnings": status.warnings()}
        return JSONResponse(content | {"uptime_s": status.uptime_s}, 503 if problems else 200)

    @app.get("/metrics")
    def metrics(request: Request, authorization: Authorization = None) -> Response:
        """The service's counters in Prometheus' format."""
        try:
            registry = registry_of(view.status(_token(authorization)))
        except ServiceUnavailable:
            registry = unreachable_registry()
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), media_type=content_type)

    @app.get("/runs")
    def runs(
        authorization: Authorization = None, experiment: Annotated[str | None, Query(max_length=100)] = None
    ) -> Response:
        """The runs in the service's catalog, as `nearline runs --json` lists them."""
        return Response(view.runs(_token(authorization), experiment), media_type="application/json")

    return app


def _token(authorization: str | None) -> str | None:
    """The token of ``Authorization: Bearer TOKEN``."""
    if authorization is None:
        return None
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise AccessDenied("the Authorization header must be `Bearer TOKEN`")
    return token.strip()


def _as_answer(_: Request, error: Any) -> JSONResponse:
    """An error of ours as an answer with its sentence."""
    status, headers = 500, {}
    if isinstance(error, AccessDenied):
        status, headers = 401, {"WWW-Authenticate": "Bearer"}
    elif isinstance(error, ServiceUnavailable):
        status = 503
    elif isinstance(error, BadName):
        status = 422
    return JSONResponse({"error": type(error).__name__, "message": str(error)}, status, headers=headers)
