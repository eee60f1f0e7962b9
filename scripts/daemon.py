"""A running daemon as the operator reaches it: over its Unix socket."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import click
import httpx

from scripts.errors import UserError, require_root
from scripts.testbed import OPERATOR_SOCKET
from topologies.isolation import SCRATCH
from topologies.registry import sweep

TIMEOUT_S = 10.0

Command = TypeVar("Command", bound=Callable[..., Any])


class NoAnswerError(UserError):
    """Nobody answers, or not now."""


def socket_option(command: Command) -> Command:
    """Add `--socket` to a command."""
    return click.option(
        "--socket",
        "path",
        type=click.Path(path_type=Path),
        help="The daemon's operator socket; by default that of the network that is up.",
    )(command)


class Daemon:
    """Asks a daemon as its operator; a context manager."""

    def __init__(self, path: Path | None) -> None:
        """`path`: its socket; None: the network's that is up. Raises UserError without one."""
        self.path = _socket_of_network() if path is None else path
        self.client = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(self.path)),
            base_url="http://controller",
            timeout=TIMEOUT_S,
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def ask(self, method: str, resource: str, body: Mapping[str, Any] | None = None) -> Any:
        """Return the JSON of an answer.

        Raises NoAnswerError, or UserError with the reason of a refusal.
        """
        try:
            answer = self.client.request(method, resource, json=body)
        except httpx.HTTPError as error:
            raise self.no_answer(error) from error
        check(answer)
        return answer.json()

    def no_answer(self, error: httpx.HTTPError) -> NoAnswerError:
        """Return what to tell a user about a request that was not answered."""
        cause = error.__context__
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        match cause:
            case FileNotFoundError():
                what = f"there is no {self.path}: start 'aipaging serve', or name its socket"
            case PermissionError():
                what = f"{self.path} is for its owner only: run the same command with sudo"
            case ConnectionRefusedError():
                what = f"nobody listens on {self.path}: the daemon has ended; start it again"
            case _:
                what = f"the daemon at {self.path} does not answer: {error or repr(error)}"
        return NoAnswerError(what)


def check(answer: httpx.Response) -> None:
    """Raise UserError with the problem's words if an answer is one."""
    if answer.is_error:
        answer.read()
        try:
            detail = answer.json()["detail"]
        except (ValueError, KeyError, TypeError):
            detail = f"{answer.status_code} {answer.reason_phrase}"
        raise UserError(f"refused: {detail}")


def _socket_of_network() -> Path:
    require_root("the operator's side of the network that is up")
    live = sweep()
    if not live:
        raise UserError(
            "no network is up: start one with 'aipaging up', or name a daemon's socket (--socket)"
        )
    # The socket is in the run's own mount namespace.
    return Path(f"/proc/{live[0].init_pid}/root") / (SCRATCH / OPERATOR_SOCKET).relative_to("/")
