"""The UE agent: pages the network with an intent, then reads tokens from the anchor it is given.

python -m topologies.endpoints.ue --core http://192.0.2.1:8080 --task text-generation
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.alias_generators import to_camel

from topologies.endpoints.chat import ANCHOR_HEADER, DONE, token_number

NS_PER_MS = 1_000_000
TIMEOUT_S = 10.0  # without a byte


class PagingError(Exception):
    """The network refused, or did not answer; the message says which and why."""


class _FromJson(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, frozen=True)


class ServiceAddress(_FromJson):
    """The two addresses of a service."""

    ipv4: str
    ipv6: str


class Commit(_FromJson):
    """The lease: what was admitted, where, and until when."""

    lease_id: str
    epoch: int
    anchor: str
    qos_profile: str
    expires_at: str  # RFC 3339


class Answer(_FromJson):
    """What the network answers to an intent."""

    session_id: str
    aisi: str
    service_address: ServiceAddress
    service_port: int
    aist: str
    commit: Commit


@dataclass(frozen=True, slots=True, kw_only=True)
class Paged:
    """An answer, and how long the transaction took as the UE saw it."""

    answer: Answer
    transaction_ms: float  # connection set-up included


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenArrival:
    """One token as it came."""

    number: int
    at_ns: int  # CLOCK_MONOTONIC, in user space
    anchor: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamReport:
    """What became of one token stream."""

    tokens: tuple[TokenArrival, ...]
    lost: int  # of the numbers asked for
    repeated: int
    reordered: int  # came after a higher number
    interval_ms: float | None  # median spacing; none below two tokens
    longest_stall_ms: float | None  # beyond that spacing
    complete: bool  # ended by [DONE]
    error: str | None  # what ended it otherwise


def page(base_url: str, intent: Mapping[str, Any]) -> Paged:
    """Submit an intent to the core at `base_url`, or raise PagingError."""
    try:
        with httpx.Client(trust_env=False, timeout=TIMEOUT_S) as client:
            start_ns = time.monotonic_ns()
            response = client.post(
                f"{base_url.rstrip('/')}/sessions", json={"intent": dict(intent)}
            )
            transaction_ms = (time.monotonic_ns() - start_ns) / NS_PER_MS
        if not response.is_success:
            raise PagingError(f"the network refused ({response.status_code}): {response.text}")
        return Paged(
            answer=Answer.model_validate_json(response.content), transaction_ms=transaction_ms
        )
    except httpx.HTTPError as error:
        raise PagingError(f"{base_url} did not answer: {error!r}") from error
    except ValidationError as error:
        raise PagingError(f"{base_url} answered something else: {error}") from error


def stream(answer: Answer, prompt: str, max_tokens: int) -> StreamReport:
    """Ask for `max_tokens` tokens over IPv4 and read them as they come. Never raises for a loss."""
    body = {
        "model": answer.aisi,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "stream": True,
    }
    url = f"http://{answer.service_address.ipv4}:{answer.service_port}/v1/chat/completions"
    arrivals: list[TokenArrival] = []
    complete, failure = False, None
    try:
        with (
            httpx.Client(trust_env=False, timeout=TIMEOUT_S) as client,
            client.stream(
                "POST", url, json=body, headers={"authorization": f"Bearer {answer.aist}"}
            ) as response,
        ):
            if response.is_success:
                anchor = response.headers.get(ANCHOR_HEADER, "")
                for line in response.iter_lines():
                    at_ns = time.monotonic_ns()
                    if line == DONE:
                        complete = True
                    elif (number := token_number(line)) is not None:
                        arrivals.append(TokenArrival(number=number, at_ns=at_ns, anchor=anchor))
            else:
                failure = f"refused ({response.status_code}): {response.read().decode()}"
    except (httpx.HTTPError, ValueError) as error:
        failure = repr(error)
    return analyse(arrivals, max_tokens, complete=complete, error=failure)


def analyse(
    tokens: Sequence[TokenArrival], expected: int, *, complete: bool, error: str | None = None
) -> StreamReport:
    """Count what was lost, repeated and reordered of the numbers 0 to `expected` - 1."""
    seen: set[int] = set()
    highest = -1
    repeated = reordered = 0
    for token in tokens:
        if token.number in seen:
            repeated += 1
        elif token.number < highest:
            reordered += 1
        highest = max(highest, token.number)
        seen.add(token.number)
    gaps_ms = [(later.at_ns - earlier.at_ns) / NS_PER_MS for earlier, later in pairwise(tokens)]
    interval_ms = median(gaps_ms) if gaps_ms else None
    return StreamReport(
        tokens=tuple(tokens),
        lost=len(set(range(expected)) - seen),
        repeated=repeated,
        reordered=reordered,
        interval_ms=interval_ms,
        longest_stall_ms=None if interval_ms is None else max(gaps_ms) - interval_ms,
        complete=complete,
        error=error,
    )


def ask(core: str, intent: Mapping[str, Any], max_tokens: int) -> dict[str, Any]:
    """Page by intent, then read one stream; return both as JSON values, without the token.

    Raises PagingError if the network grants nothing.
    """
    paged = page(core, intent)
    report = stream(paged.answer, "Count.", max_tokens)
    return {
        "transaction_ms": paged.transaction_ms,
        "answer": paged.answer.model_dump(by_alias=True, exclude={"aist"}),
        "stream": asdict(report),
    }


def main() -> None:
    """Ask and print the result as JSON; exit code 1 if paging or the stream fails."""
    parser = argparse.ArgumentParser(prog="ue", description="UE agent")
    parser.add_argument("--core", required=True, metavar="URL")
    parser.add_argument("--task", required=True, help="Hugging Face pipeline tag")
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    try:
        result = ask(options.core, {"task": options.task}, options.max_tokens)
    except PagingError as error:
        raise SystemExit(f"error: {error}") from None
    print(json.dumps(result, indent=2))
    if not result["stream"]["complete"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
