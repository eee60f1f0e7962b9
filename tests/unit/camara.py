"""CAMARA's definitions (tests/data/camara), and whether an answer is as they say."""

from pathlib import Path
from typing import Any, NamedTuple

import httpx
import yaml
from openapi_schema_validator import OAS30Validator
from referencing import Registry
from referencing.jsonschema import DRAFT4
from served import Api

DEFINITIONS = Path(__file__).parents[1] / "data" / "camara"
QOD, PROFILES = "/quality-on-demand/vwip", "/qos-profiles/vwip"
FILES = {QOD: "quality-on-demand", PROFILES: "qos-profiles"}


def _plain(schema: Any) -> Any:
    """Leave discriminators away: they only restate, and the validator goes round in circles."""
    if isinstance(schema, dict):
        return {key: _plain(value) for key, value in schema.items() if key != "discriminator"}
    return [_plain(item) for item in schema] if isinstance(schema, list) else schema


DOCUMENTS = {
    path.stem: _plain(yaml.safe_load(path.read_text())) for path in DEFINITIONS.glob("*/*.yaml")
}
REGISTRY: Registry[Any] = Registry().with_resources(
    (
        f"file:///{path.relative_to(DEFINITIONS)}",
        DRAFT4.create_resource(DOCUMENTS[path.stem]),
    )
    for path in DEFINITIONS.glob("*/*.yaml")
)
NO_SESSION = "3fa85f64-5717-4562-b3fc-2c963f66afa6"


class Operation(NamedTuple):
    """An operation of a definition."""

    prefix: str
    method: str
    path: str
    responses: dict[str, Any]


OPERATIONS = {
    described["operationId"]: Operation(prefix, method.upper(), path, described["responses"])
    for prefix, name in FILES.items()
    for path, methods in DOCUMENTS[name]["paths"].items()
    for method, described in methods.items()
}


def ask(
    api: Api, operation: str, body: Any = None, *, by: str = "clinic", of: str = "", **more: Any
) -> httpx.Response:
    """Call an operation and check the answer. `of`: the session's id, or the profile's name."""
    prefix, method, path, _ = OPERATIONS[operation]
    where = path.replace("{sessionId}", of).replace("{name}", of)
    headers = {"x-correlator": "call:1", **more.pop("headers", {})}
    answer = api.call(method, f"{prefix}{where}", body, by=by, headers=headers, **more)
    conforms(operation, answer)
    assert answer.headers["x-correlator"] == "call:1"
    return answer


def conforms(operation: str, answer: httpx.Response) -> None:
    """Check an answer against what the definition says of this operation and status."""
    prefix, _, _, responses = OPERATIONS[operation]
    described = responses.get(str(answer.status_code))
    assert described is not None, f"{answer.status_code} is not documented: {answer.text}"
    schema, base = _schema(f"file:///API_definitions/{FILES[prefix]}.yaml", described)
    if schema is None:
        assert not answer.content
        return
    assert answer.headers["content-type"] == "application/json"
    validate(schema, answer.json(), base)


def validate(schema: Any, value: Any, base: str) -> None:
    """Check a value against a schema whose references are relative to `base`."""
    OAS30Validator(
        _absolute(schema, base), registry=REGISTRY, format_checker=OAS30Validator.FORMAT_CHECKER
    ).validate(value)


def documented() -> set[tuple[str, int, str]]:
    """Return operation, status and code of every error in the definitions."""
    found = set()
    for name, operation in OPERATIONS.items():
        for status, described in operation.responses.items():
            if int(status) >= 400:
                base = f"file:///API_definitions/{FILES[operation.prefix]}.yaml"
                schema, _ = _schema(base, described)
                codes = [c for part in schema["allOf"] for c in _codes(part)]
                assert codes, f"{name} {status}"
                found |= {(name, int(status), code) for code in codes}
    return found


def _codes(part: dict[str, Any]) -> list[str]:
    codes: list[str] = part.get("properties", {}).get("code", {}).get("enum", [])
    return codes


def _schema(base: str, response: dict[str, Any]) -> tuple[Any, str]:
    """Return the schema of a response and where it stands; None if there is no body."""
    while "$ref" in response:
        found = REGISTRY.resolver(base).lookup(response["$ref"])
        base = str(httpx.URL(base).join(response["$ref"])).partition("#")[0]
        response = found.contents
    return response.get("content", {}).get("application/json", {}).get("schema"), base


def _absolute(schema: Any, base: str) -> Any:
    if isinstance(schema, dict):
        made = {key: _absolute(value, base) for key, value in schema.items()}
        if isinstance(schema.get("$ref"), str):
            ref = schema["$ref"]
            made["$ref"] = base + ref if ref.startswith("#") else str(httpx.URL(base).join(ref))
        return made
    return [_absolute(item, base) for item in schema] if isinstance(schema, list) else schema


# Requests

DEVICE = {"ipv4Address": {"publicAddress": "10.45.0.1", "privateAddress": "10.45.0.1"}}
SERVER = "203.0.113.7"


def body(**members: Any) -> dict[str, Any]:
    """Return the body of a createSession."""
    return {
        "device": DEVICE,
        "applicationServer": {"ipv4Address": SERVER},
        "qosProfile": "QOS_E",
        "duration": 600,
        **members,
    }


def without(name: str) -> dict[str, Any]:
    """Return such a body that lacks a property."""
    return {key: value for key, value in body().items() if key != name}


def servers(*addresses: str) -> dict[str, Any]:
    """Return such a body for these servers."""
    return body(applicationServer={"ipAddresses": list(addresses)})


def create(api: Api, asked: dict[str, Any] | None = None, by: str = "clinic") -> Any:
    """Create a session and return its description."""
    answer = ask(api, "createSession", body() if asked is None else asked, by=by)
    assert answer.status_code == 201, answer.text
    return answer.json()


def error(answer: httpx.Response) -> tuple[int, str]:
    """Return status and code of an error."""
    shown = answer.json()
    assert set(shown) == {"status", "code", "message"}
    assert shown["status"] == answer.status_code
    return answer.status_code, shown["code"]
