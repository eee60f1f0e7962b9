"""Logs: one line an event, with its context, and never a secret."""

import asyncio
import base64
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controlplane import logs
from controlplane.redaction import MASK, redact, redact_text

SECRET = "s3cr3t-Zq9"  # what no line may hold
KEYS = ("secret", "token", "authorization", "credential", "aist", "password")
AIST = "eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJ1ZTEifQ.c2lnbmF0dXJl"


@pytest.fixture
def stderr(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """Return what reads the lines logged since it was last called."""
    root = logging.getLogger()
    level = root.level
    yield lambda: capsys.readouterr().err
    root.handlers.clear()
    root.setLevel(level)


def parsed(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_line_says_when_what_and_for_whom(stderr: Callable[[], str]) -> None:
    logs.configure()  # JSON, as this is no terminal
    log = logging.getLogger("controlplane.x")
    with logs.bind(session_id="s1", ue="ue1"), logs.bind(lease_id="l1"):
        log.info("moved to %s\nat once", "edge2", extra={"epoch": 3})
    log.warning("alone")
    log.debug("not at this level")
    first, second = parsed(stderr())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", first.pop("time"))
    assert first == {
        "level": "info",
        "logger": "controlplane.x",
        "event": "moved to edge2\nat once",
        "session_id": "s1",
        "ue": "ue1",
        "lease_id": "l1",
        "epoch": 3,
    }
    assert (second["level"], "session_id" in second) == ("warning", False)


def test_context_stays_in_its_task(stderr: Callable[[], str]) -> None:
    logs.configure(json=True)

    async def work(name: str) -> None:
        with logs.bind(ue=name):
            await asyncio.sleep(0)
            logging.getLogger("x").info("of %s", name)

    async def main() -> None:
        await asyncio.gather(work("ue1"), work("ue2"))

    asyncio.run(main())
    assert {(line["event"], line["ue"]) for line in parsed(stderr())} == {
        ("of ue1", "ue1"),
        ("of ue2", "ue2"),
    }


def test_an_exception_is_one_line_of_json(stderr: Callable[[], str]) -> None:
    logs.configure(json=True)
    try:
        raise ValueError(f"not this: {AIST}")
    except ValueError:
        logging.getLogger("x").exception("failed")
    (line,) = parsed(stderr())
    assert "ValueError: not this: [redacted]" in line["exception"]


def test_text_for_a_terminal_cannot_drive_it(stderr: Callable[[], str]) -> None:
    logs.configure(json=False)
    with logs.bind(session_id="s1"):
        logging.getLogger("x").info("asked for \x1b[2J\nfake line", extra={"description": "\x9b2J"})
    text = stderr()
    assert "asked for \\x1b[2J\\nfake line" in text
    assert "session_id=s1 description=\\x9b2J" in text
    assert text.count("\n") == 1


def test_a_line_that_cannot_be_formatted_is_logged_and_masked(stderr: Callable[[], str]) -> None:
    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError

    logs.configure(json=True)
    logging.getLogger("x").info("%d of %d", {"password": SECRET})
    logging.getLogger("x").info("with", extra={"broken": Broken(), "rate": float("nan")})
    first, second = parsed(stderr())
    assert SECRET not in first["event"] and MASK in first["event"]
    assert (second["broken"], second["rate"]) == ("<Broken: RuntimeError>", "nan")


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (f"Authorization: Bearer {SECRET}", "Authorization: Bearer [redacted]"),
        (f"GET /x?access_token={SECRET}&y=1", "GET /x?access_token=[redacted]&y=1"),
        (f"Sink(client_secret='{SECRET}', url='u')", "Sink(client_secret=[redacted], url='u')"),
        (f'{{"password": "a \\" {SECRET}"}}', '{"password": [redacted]}'),
        (f"sent basic {SECRET}==", "sent basic [redacted]"),
        (f"refused {AIST}: expired", "refused [redacted]: expired"),
        # What is no secret stays.
        ("token refused: expired", "token refused: expired"),
        ("edge1.example.org answered 200", "edge1.example.org answered 200"),
        ("lease df7ae6b47f0b5e5e of 10.45.0.1", "lease df7ae6b47f0b5e5e of 10.45.0.1"),
    ],
)
def test_secrets_in_text(text: str, masked: str) -> None:
    assert redact_text(text) == masked


def jwts() -> st.SearchStrategy[str]:
    """Return what RFC 7519 allows: JSON objects and bytes, base64url without padding."""
    white_space = st.sampled_from(["", " ", "\n", "\t"])
    header = st.builds('{{{}"alg":"{}"}}'.format, white_space, st.text("ABCES256", min_size=4))

    def encode(part: bytes) -> str:
        return base64.urlsafe_b64encode(part).rstrip(b"=").decode()

    return st.builds(
        lambda head, payload, signature: ".".join(
            (encode(head.encode()), encode(payload), encode(signature))
        ),
        header,
        st.binary(min_size=1, max_size=60),
        st.binary(min_size=16, max_size=64),
    )


def secret_keys() -> st.SearchStrategy[str]:
    """Return names such as `X-Token`, `clientSecret`, `AIST`."""
    case = st.sampled_from([str.lower, str.upper, str.title])
    around = st.text("abX_-", max_size=4)
    word = st.builds(lambda key, fold: fold(key), st.sampled_from(KEYS), case)
    return st.builds("{}{}{}".format, around, word, around)


def nested(leaf: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return a value with `leaf` somewhere within."""
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=2),
            st.dictionaries(st.text("abc", max_size=3), inner, min_size=1, max_size=2),
        ),
        max_leaves=4,
    )


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    jwt=jwts(),
    prose=st.tuples(
        st.text("a./ =", max_size=3), st.text(max_size=10) | st.text("a. =", max_size=3)
    ),
    named=st.dictionaries(secret_keys(), nested(st.just(SECRET)), min_size=1, max_size=3),
    data=st.data(),
    as_json=st.booleans(),
)
def test_no_secret_in_a_log(
    stderr: Callable[[], str],
    jwt: str,
    prose: tuple[str, str],
    named: dict[str, Any],
    data: st.DataObject,
    as_json: bool,
) -> None:
    logs.configure(json=as_json)
    log = logging.getLogger("x")
    text = f"{prose[0]}{jwt}{prose[1]}"
    value = data.draw(nested(st.sampled_from([text, text.encode(), named])))
    with logs.bind(seen=value):
        log.info("%s and %r", text, named)
        log.info(text, extra={"value": value, **named})
        try:
            raise RuntimeError(text)
        except RuntimeError:
            log.exception("failed with %s", value)
    logged = stderr()
    assert len(logged) > 100
    assert SECRET not in logged
    assert jwt.rpartition(".")[2] not in logged  # the signature makes it a secret


@pytest.mark.parametrize(
    "unit", ["ey", "eyJhbGciOi", "token", "a.", "token=", '"', "bearer ", "\\"]
)
def test_masking_takes_linear_time(unit: str) -> None:
    text = unit * (65_536 // len(unit))
    started = time.process_time()
    redact(text)
    assert time.process_time() - started < 0.5
