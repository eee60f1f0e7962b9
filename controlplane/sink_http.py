"""HTTP towards sinks and their token endpoints: whatever answers there cannot make us grow or wait.

No redirects, no proxies or credentials from the environment, no cookies, and of an answer only as
much as anyone needs.
"""

import ssl
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy

import httpx

MAX_ANSWER_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back; a body that is longer than MAX_ANSWER_BYTES is cut."""

    status: int
    headers: httpx.Headers
    body: bytes


def sink_client(*, verify: ssl.SSLContext | bool = True) -> httpx.AsyncClient:
    """Return a client to reach sinks with. `verify`: how to check their certificates."""
    client = httpx.AsyncClient(
        follow_redirects=False,
        trust_env=False,
        verify=verify,
        timeout=None,  # whoever calls `exchange` bounds all of it
    )
    client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    return client


async def exchange(client: httpx.AsyncClient, request: httpx.Request) -> Answer:
    """Send a request. Raises httpx.HTTPError. The caller bounds the time that it takes."""
    response = await client.send(request, stream=True)
    try:
        body = bytearray()
        async for piece in response.aiter_raw():
            body += piece
            if len(body) > MAX_ANSWER_BYTES:
                break
    finally:
        await response.aclose()
    return Answer(response.status_code, response.headers, bytes(body[:MAX_ANSWER_BYTES]))
