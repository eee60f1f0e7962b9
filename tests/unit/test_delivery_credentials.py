"""Who delivers shows who it is: signatures, and the credentials that a sink has asked for."""

import json
import logging
from dataclasses import replace
from urllib.parse import parse_qs

import jwt
import pytest
from http_message_signatures import (
    HTTPMessageVerifier,
    InvalidSignature,
    MappingKeyResolver,
    algorithms,
)
from receivers import PRIVATE, QUICK, Key, MemoryOutbox, dispatching, receiving, run
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from controlplane.sinks import SinkCredential, read_credential


def test_receivers_can_verify_what_they_get() -> None:
    keys = MappingKeyResolver(public_keys={Key.kid: PRIVATE.public_key()}, private_keys={})
    verifier = HTTPMessageVerifier(signature_algorithm=algorithms.ED25519, key_resolver=keys)

    async def scenario() -> None:
        outbox = MemoryOutbox()
        async with receiving() as receiver:

            async def check(request: Request, body: bytes) -> Response:
                assert request.headers["content-type"] == "application/cloudevents+json"
                needed = ("@method", "@target-uri", "content-type", "content-digest")
                verifier.verify(request, body=body, require_components=needed)
                with pytest.raises(InvalidSignature):
                    verifier.verify(request, body=body + b" ")
                return Response(status_code=204)

            receiver.handlers["/a"] = check
            outbox.add(receiver.root + "/a?session=%20x")
            async with dispatching(outbox, policy=replace(QUICK, max_age_s=0)):
                await outbox.until(lambda: not outbox.waiting)
            assert outbox.finished

    run(scenario())


def access_token(token: str, expires: str = "2099-01-01T00:00:00Z") -> SinkCredential:
    members = {"accessToken": token, "accessTokenType": "bearer", "accessTokenExpiresUtc": expires}
    return read_credential(json.dumps({"credentialType": "ACCESSTOKEN", **members}))


def test_the_token_goes_to_the_sink_and_nowhere_else(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def scenario() -> None:
        outbox = MemoryOutbox()
        async with receiving() as receiver:

            async def check(request: Request, body: bytes) -> Response:
                authorized = request.headers.get("authorization") == "Bearer s3cr3t"
                return Response(status_code=503 if authorized else 401)

            receiver.handlers["/a"] = check
            outbox.add(receiver.root + "/a", access_token("s3cr3t"))
            expired = outbox.add(
                receiver.root + "/b", access_token("s3cr3t", "2020-01-01T00:00:00Z")
            )
            async with dispatching(outbox):
                await outbox.until(lambda: outbox.waiting[1].attempts == 3)
            assert outbox.given_up == {expired: "its access token has expired"}
            assert not receiver.got["/b"]
            assert "s3cr3t" not in repr(outbox.waiting)

    run(scenario())
    assert "HTTP 503" in caplog.text
    assert "s3cr3t" not in caplog.text


def test_private_key_jwt_gets_a_token_once_and_again_when_it_is_refused() -> None:
    async def scenario() -> None:
        outbox = MemoryOutbox()
        async with receiving() as receiver:
            issued: list[str] = []

            async def token(request: Request, body: bytes) -> Response:
                form = parse_qs(body.decode())
                claims = jwt.decode(
                    form["client_assertion"][0],
                    PRIVATE.public_key(),
                    algorithms=["EdDSA"],
                    audience=receiver.root + "/token",
                    issuer="the-client",
                    options={"require": ["iss", "sub", "aud", "exp", "jti"]},
                )
                assert claims["sub"] == "the-client"
                assert form["grant_type"] == ["client_credentials"]
                issued.append(f"token-{len(issued)}")
                answer = {"access_token": issued[-1], "token_type": "Bearer", "expires_in": 60}
                return JSONResponse(answer, 503 if len(issued) == 1 else 200)

            async def check(request: Request, body: bytes) -> Response:
                expected = f"Bearer {issued[-1]}"
                assert request.headers["authorization"] == expected
                return Response(status_code=401 if len(receiver.got["/a"]) == 2 else 204)

            receiver.handlers |= {"/token": token, "/a": check}
            members = {"clientId": "the-client", "tokenUri": receiver.root + "/token"}
            credential = read_credential(
                json.dumps({"credentialType": "PRIVATE_KEY_JWT", **members})
            )
            ids = [outbox.add(receiver.root + "/a", credential) for _ in range(4)]
            async with dispatching(outbox):
                await outbox.until(lambda: not outbox.waiting)
            assert outbox.finished == [ids[0], *ids[2:]]
            assert outbox.given_up == {ids[1]: "HTTP 401"}
            assert len(issued) == 3  # one that failed, one for each token

    run(scenario())
