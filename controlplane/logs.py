"""Structured logs: one JSON object a line on stderr, or text to read where that is a terminal.

The loggers of the standard library are used as they are, so libraries' lines look like ours:
`log.info("relocated", extra={"anchor": "edge2"})`. What `bind` binds is in every line of the task
that bound it and of those it starts. Secrets are masked in all of it.
"""

import json
import logging
import re
import sys
from collections.abc import Mapping
from contextvars import ContextVar, Token
from types import MappingProxyType
from typing import Any

from controlplane.clock import rfc3339
from controlplane.redaction import redact, redact_text

_NO_CONTEXT: Mapping[str, Any] = MappingProxyType({})
_context: ContextVar[Mapping[str, Any]] = ContextVar("log_context", default=_NO_CONTEXT)
_OF_EVERY_RECORD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_CONTAINERS = (Mapping, list, tuple, set, frozenset)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


def configure(*, json: bool | None = None, level: int = logging.INFO) -> None:
    """Log to stderr from now on; `json=None` means JSON unless stderr is a terminal."""
    if json is None:
        json = not sys.stderr.isatty()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if json else ConsoleFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in ("httpx", "httpcore"):  # at INFO, each request that we make is a line
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


class bind:  # not a generator, which takes three times as long
    """Add members to all lines within: `session_id`, `lease_id`, `ue`, `tenant`."""

    __slots__ = ("_members", "_token")
    _token: Token[Mapping[str, Any]]

    def __init__(self, **members: Any) -> None:
        self._members = members

    def __enter__(self) -> None:
        self._token = _context.set({**_context.get(), **self._members})

    def __exit__(self, *error: object) -> None:
        _context.reset(self._token)


class JsonFormatter(logging.Formatter):
    """One JSON object: `time` (RFC 3339, UTC), `level`, `logger`, `event`, and what was added."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": rfc3339(int(record.created * 1_000_000) * 1_000),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": _message(record),
        }
        for name, value in _members(record).items():
            line.setdefault(name, value)
        if trace := _trace(self, record):
            line["exception"] = redact_text(trace)
        return json.dumps(line)


class ConsoleFormatter(logging.Formatter):
    """The same to read: time of day in UTC, level, event, members, logger."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and the lines of a traceback below it."""
        time_of_day = rfc3339(int(record.created * 1_000) * 1_000_000)[11:23]
        members = "".join(f" {name}={value}" for name, value in _members(record).items())
        event = _message(record)
        line = f"{time_of_day} {record.levelname.lower():<8} {event}{members} ({record.name})"
        line = line.replace("\n", "\\n")
        if trace := _trace(self, record):
            line = f"{line}\n{redact_text(trace)}"
        # What came over the network must not drive the terminal.
        return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", line)


def _message(record: logging.LogRecord) -> str:
    # Within a container, masking goes by its keys: better than by what it looks like in the text.
    if isinstance(record.args, tuple):
        arguments: Any = tuple(redact(a) if isinstance(a, _CONTAINERS) else a for a in record.args)
    else:
        arguments = redact(record.args)
    try:
        message = str(record.msg) % arguments if arguments else str(record.msg)
    except Exception:  # logging itself would print the arguments, unmasked
        message = f"{record.msg} {arguments!r}"
    return redact_text(message)


def _members(record: logging.LogRecord) -> dict[str, Any]:
    """Return what was bound and what the call added, which wins, with secrets masked."""
    added = {name: value for name, value in vars(record).items() if name not in _OF_EVERY_RECORD}
    members: dict[str, Any] = redact({**_context.get(), **added})
    return members


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = []
    if record.exc_info and record.exc_info[0] is not None:
        parts.append(formatter.formatException(record.exc_info))
    if record.stack_info:
        parts.append(record.stack_info)
    return "\n".join(parts)
