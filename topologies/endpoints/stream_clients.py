"""Clients of other people's making that read token streams, one after another, in a UE.

    python -m topologies.endpoints.stream_clients < settings-and-rounds.jsonl

The first line of input is `Settings`; each further line asks for a round: every client starts
afresh, makes its requests over a connection that it keeps, and reads them to their end. For each
round two lines come out: one when every client has begun to read, and a list of `Outcome`s.
Nothing is retried but what the client retries by itself, and the one that would retry what HTTP
does not say is safe (openai) is told not to.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import httpx
import httpx2
import pycurl
from openai import APIConnectionError, APIStatusError, APITimeoutError, AsyncOpenAI
from pydantic import BaseModel

from topologies.endpoints.chat import ANCHOR_HEADER, DONE, token_number

POLL_S = 0.005  # for whether all clients have begun
SILENCE_S = 1.0  # after which a client gives a request up
_CURL_MARK = "#curl "
_CURL_FORMAT = (
    f"\n{_CURL_MARK}"
    '{"status": "%{http_code}", "exit": %{exitcode}, "port": %{local_port}, '
    '"anchor": "%header{x-aipaging-anchor}", "version": "%{http_version}"}\n'
)
# Exit codes of curl: what the client saw at the end of a request that failed.
_CURL_ENDINGS = {28: "timeout", 18: "closed", 52: "closed", 92: "closed", 55: "reset", 56: "reset"}


class Settings(BaseModel):
    """What every client asks for, and how often."""

    url: str  # of the service, without path
    model: str
    token: str  # AIST
    requests: int  # of a client in a round, one after another
    tokens: int  # of each request


@dataclass(slots=True, kw_only=True)
class Outcome:
    """One request, as its client saw it. Instants are CLOCK_REALTIME ns in user space; 0: never."""

    client: str
    request: int  # within the round
    started_ns: int  # curl: the end of the one before
    ended_ns: int = 0
    status: int = 0
    anchor: str = ""  # which answered
    http_version: str = ""
    local_port: int = 0  # of the connection
    complete: bool = False  # it ended as it should
    ending: str = ""  # otherwise: timeout, reset, closed, refused, or failed
    error: str = ""  # the client's own words
    tokens: list[tuple[int, int]] = field(default_factory=list)  # (number, when)

    def token(self, number: int | None) -> None:
        """Take a token that has just come."""
        if number is not None:
            self.tokens.append((number, time.time_ns()))

    def failed(self, ending: str, error: object) -> None:
        """Take it that the request is over, and not well."""
        self.ending, self.error = ending, str(error)[:300] or type(error).__name__


Read = Callable[[Outcome], Awaitable[None]]


def body(settings: Settings) -> dict[str, Any]:
    """Return the request's JSON."""
    return {
        "model": settings.model,
        "messages": [{"role": "user", "content": "Count."}],
        "max_tokens": settings.tokens,
        "stream": True,
    }


async def one_after_another(
    name: str, settings: Settings, outcomes: list[Outcome], read: Read
) -> None:
    """Make a client's requests by `read`, which fills in an outcome."""
    for number in range(settings.requests):
        outcome = Outcome(client=name, request=number, started_ns=time.time_ns())
        outcomes.append(outcome)
        await read(outcome)
        outcome.ended_ns = time.time_ns()


def _describe(outcome: Outcome, response: Any) -> None:
    """Take in a response of httpx, or of the fork of it that openai uses."""
    outcome.status = response.status_code
    outcome.anchor = response.headers.get(ANCHOR_HEADER, "")
    outcome.http_version = response.http_version.removeprefix("HTTP/")
    stream = response.extensions["network_stream"]
    outcome.local_port = stream.get_extra_info("client_addr")[1]


def _ending(error: BaseException | None) -> str:
    if isinstance(error, httpx.TimeoutException | httpx2.TimeoutException):
        return "timeout"
    if isinstance(error, httpx.NetworkError | httpx2.NetworkError):
        return "reset"
    if isinstance(error, httpx.RemoteProtocolError | httpx2.RemoteProtocolError):
        return "closed"
    return "failed"


async def by_httpx(settings: Settings, outcomes: list[Outcome], *, http2: bool) -> None:
    """Read by httpx."""
    headers = {"authorization": f"Bearer {settings.token}"}
    async with httpx.AsyncClient(
        base_url=settings.url,
        http1=not http2,
        http2=http2,
        verify=False,
        trust_env=False,
        timeout=SILENCE_S,
        headers=headers,
    ) as client:

        async def read(outcome: Outcome) -> None:
            try:
                async with client.stream(
                    "POST", "/v1/chat/completions", json=body(settings)
                ) as response:
                    _describe(outcome, response)
                    if response.is_error:
                        outcome.failed("refused", (await response.aread()).decode())
                    async for line in response.aiter_lines():
                        outcome.token(token_number(line))
                        outcome.complete |= line == DONE
            except (httpx.HTTPError, ValueError) as error:
                outcome.failed(_ending(error), error)

        await one_after_another(f"httpx-http{1 + http2}", settings, outcomes, read)


async def by_openai(settings: Settings, outcomes: list[Outcome]) -> None:
    """Read by the openai library."""
    async with AsyncOpenAI(
        base_url=f"{settings.url}/v1", api_key=settings.token, max_retries=0, timeout=SILENCE_S
    ) as client:

        async def read(outcome: Outcome) -> None:
            try:
                stream = await client.chat.completions.create(
                    model=settings.model,
                    messages=[{"role": "user", "content": "Count."}],
                    max_tokens=settings.tokens,
                    stream=True,
                )
                _describe(outcome, stream.response)
                async for chunk in stream:
                    choice = chunk.choices[0]
                    if text := choice.delta.content:
                        outcome.token(int(text.strip().removeprefix("tok")))
                    outcome.complete |= choice.finish_reason is not None
            except APIStatusError as error:
                outcome.status = error.status_code
                outcome.failed("refused", error)
            except APITimeoutError as error:
                outcome.failed("timeout", error)
            except APIConnectionError as error:
                outcome.failed(_ending(error.__cause__), error.__cause__ or error)
            except (httpx2.HTTPError, ValueError) as error:
                outcome.failed(_ending(error), error)

        await one_after_another("openai", settings, outcomes, read)


async def by_curl(settings: Settings, outcomes: list[Outcome]) -> None:
    """Read by one curl, which is given all URLs at once, over HTTP/1.1.

    For HTTP/2 with prior knowledge see `by_libcurl`: curl 7.88 (Debian 12) fails at the second
    request on such a connection, with any server.
    """
    # What curl is to send and the token come by its standard input, not by its command line.
    config = {
        "url": f"{settings.url}/v1/chat/completions?request=[1-{settings.requests}]",
        "header": f"Authorization: Bearer {settings.token}",
        "json": json.dumps(body(settings)),
        "write-out": _CURL_FORMAT,
    }
    program = await asyncio.create_subprocess_exec(
        *("curl", "--silent", "--no-buffer", "--no-progress-meter", "--noproxy", "*"),
        *("--http1.1", "--max-time", str(SILENCE_S + 1), "--config", "-"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert program.stdin is not None
    lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in config.items())
    program.stdin.write(lines.encode())
    program.stdin.close()
    outcome = Outcome(client="curl-http1", request=0, started_ns=time.time_ns())
    outcomes.append(outcome)
    async for line in _lines(program):
        if not line.startswith(_CURL_MARK):
            outcome.token(token_number(line))
            outcome.complete |= line == DONE
            continue
        said = json.loads(line.removeprefix(_CURL_MARK))
        outcome.ended_ns = time.time_ns()
        outcome.status, outcome.anchor = int(said["status"]), said["anchor"]  # 000: none
        outcome.local_port, outcome.http_version = said["port"], said["version"]
        if said["exit"]:
            outcome.complete = False
            outcome.failed(_CURL_ENDINGS.get(said["exit"], "failed"), f"curl: {said['exit']}")
        elif outcome.status != 200:
            outcome.failed("refused", said["status"])
        number = outcome.request + 1
        if number < settings.requests:
            outcome = Outcome(client="curl-http1", request=number, started_ns=outcome.ended_ns)
            outcomes.append(outcome)
    await program.wait()


async def _lines(program: asyncio.subprocess.Process) -> AsyncIterator[str]:
    assert program.stdout is not None
    async for line in program.stdout:
        yield line.decode().rstrip("\n")


async def by_libcurl(settings: Settings, outcomes: list[Outcome]) -> None:
    """Read by libcurl, over HTTP/2: one handle, which keeps its connection."""
    handle = pycurl.Curl()
    handle.setopt(pycurl.URL, f"{settings.url}/v1/chat/completions")
    handle.setopt(pycurl.NOPROXY, "*")
    handle.setopt(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_2_PRIOR_KNOWLEDGE)
    handle.setopt(pycurl.TIMEOUT_MS, int((SILENCE_S + 1) * 1000))
    handle.setopt(pycurl.POSTFIELDS, json.dumps(body(settings)))
    handle.setopt(
        pycurl.HTTPHEADER,
        [f"Authorization: Bearer {settings.token}", "Content-Type: application/json"],
    )

    silent = False

    async def read(outcome: Outcome) -> None:
        nonlocal silent
        parted = b""

        def header(line: bytes) -> None:
            name, _, value = line.decode().partition(":")
            if name == ANCHOR_HEADER:
                outcome.anchor = value.strip()

        def take(data: bytes) -> None:
            nonlocal parted
            *lines, parted = (parted + data).split(b"\n")
            for line in lines:
                outcome.token(token_number(line.decode()))
                outcome.complete |= line.decode() == DONE

        handle.setopt(pycurl.HEADERFUNCTION, header)
        handle.setopt(pycurl.WRITEFUNCTION, take)
        # libcurl would go on with an HTTP/2 connection that has fallen silent, for ever.
        handle.setopt(pycurl.FRESH_CONNECT, silent)
        try:
            await asyncio.to_thread(handle.perform)
        except pycurl.error as error:
            outcome.complete = False
            outcome.failed(_CURL_ENDINGS.get(error.args[0], "failed"), error)
        silent = outcome.ending == "timeout"
        outcome.status = handle.getinfo(pycurl.RESPONSE_CODE)
        outcome.local_port = handle.getinfo(pycurl.LOCAL_PORT)
        outcome.http_version = "2"
        if outcome.status != 200 and not outcome.ending:
            outcome.failed("refused", outcome.status)

    try:
        await one_after_another("libcurl-http2", settings, outcomes, read)
    finally:
        handle.close()


CLIENTS: dict[str, Callable[[Settings, list[Outcome]], Awaitable[None]]] = {
    "curl-http1": by_curl,
    "libcurl-http2": by_libcurl,
    "httpx-http1": partial(by_httpx, http2=False),
    "httpx-http2": partial(by_httpx, http2=True),
    "openai": by_openai,
}


async def one_round(settings: Settings) -> list[Outcome]:
    """Let all clients make their requests; say when each of them has had a token."""
    outcomes: list[Outcome] = []
    working = asyncio.gather(*(client(settings, outcomes) for client in CLIENTS.values()))
    while len({each.client for each in outcomes if each.tokens or each.ended_ns}) < len(CLIENTS):
        await asyncio.wait([working], timeout=POLL_S)
        if working.done():
            break
    print(json.dumps("begun"), flush=True)
    await working
    return outcomes


def main() -> None:
    """Run rounds until the input ends."""
    settings = Settings.model_validate_json(sys.stdin.readline())
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        outcomes = asyncio.run(one_round(settings))
        print(json.dumps([asdict(outcome) for outcome in outcomes]), flush=True)


if __name__ == "__main__":
    main()
