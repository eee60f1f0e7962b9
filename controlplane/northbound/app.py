"""The HTTP application: all resources, their errors, and the OpenAPI document."""

from collections.abc import Mapping
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.dependencies.utils import get_flat_params
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from controlplane.answers import Refusal
from controlplane.enforcement import EnforcementError
from controlplane.northbound import (
    anchors,
    camara_common,
    camara_profiles,
    camara_qod,
    events,
    evidence,
    operations,
    sessions,
    tokens,
)
from controlplane.northbound.direct import DirectPages
from controlplane.northbound.plane import ControlPlane
from controlplane.northbound.problem import Problem, of_error, problem
from controlplane.store import StoreError

_CAUSE_OF_STATUS = {404: "NO_SUCH_RESOURCE", 405: "METHOD_NOT_ALLOWED"}


def create_app(plane: ControlPlane, lifespan: "Lifespan | None" = None) -> FastAPI:
    """Return the ASGI application over a control plane."""
    app = FastAPI(
        title="AI-Paging",
        version="1",
        summary="Intents in, verifiable leases out.",
        lifespan=lifespan,
        # Traces and metrics are ours; FastAPI would look for others' providers at each request.
        telemetry={"tracing": False, "metrics": False, "logs": False},
        docs_url=None,
        redoc_url=None,
        dependencies=[Depends(_only_known_parameters)],
        exception_handlers={
            Refusal: _on_error,
            RequestValidationError: _on_invalid,
            HTTPException: _on_http,
            StoreError: _on_error,
            EnforcementError: _on_error,
        },
    )
    app.state.plane = plane
    app.add_middleware(DirectPages, plane=plane)
    for module in (sessions, anchors, operations, events, evidence, tokens):
        app.include_router(module.router)
    app.include_router(camara_qod.router, prefix=f"/quality-on-demand/{camara_qod.VERSION}")
    app.include_router(camara_profiles.router, prefix=f"/qos-profiles/{camara_profiles.VERSION}")
    _describe_problems(app)
    return app


Lifespan = Any  # of Starlette: an async context manager made from the application


def _describe_problems(app: FastAPI) -> None:
    """Put what every problem looks like into the OpenAPI document."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            schemas["Problem"] = Problem.model_json_schema()
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


async def _on_error(request: Request, error: Exception) -> Response:
    return of_error(error)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return problem(*invalid(error))


def invalid(error: RequestValidationError) -> tuple[str, str]:
    """Return cause and detail for a request that cannot be understood; nothing of it is quoted."""
    found = error.errors()
    if any(item["type"] == "json_invalid" for item in found):
        return "MALFORMED", "the request body is not JSON"
    what = [f"{_where(item)}: {item['msg']}" for item in found[:10]]
    return "INVALID", "; ".join(what)


def _where(item: Mapping[str, Any]) -> str:
    return ".".join(str(part)[:64] for part in item["loc"]) or "body"


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    cause = _CAUSE_OF_STATUS.get(error.status_code, "MALFORMED")
    headers = dict(error.headers or {})
    if error.status_code == 405:  # the router names the methods of one route only
        headers["Allow"] = ", ".join(sorted(_methods(request)))
    if request.url.path.startswith(camara_common.ROOTS):
        return camara_common.unrouted(request, error, headers)
    return problem(cause, f"{request.method} {request.url.path}: {error.detail}", headers)


def _methods(request: Request) -> set[str]:
    """Return the methods that a resource takes, as the OpenAPI document says."""
    paths: dict[str, dict[str, Any]] = request.app.openapi()["paths"]
    return {
        method.upper()
        for path, operations in paths.items()
        if compile_path(path)[0].match(request.url.path)
        for method in operations
    }


async def _only_known_parameters(request: Request) -> None:
    """Refuse query parameters that the operation does not have, as unknown members are."""
    route = request.scope.get("route")
    if isinstance(route, APIRoute) and request.query_params:
        known = {parameter.alias for parameter in get_flat_params(route.dependant)}
        unknown = [name[:64] for name in request.query_params if name not in known]
        if unknown:
            raise Refusal("INVALID", f"there is no parameter {unknown[0]}")
