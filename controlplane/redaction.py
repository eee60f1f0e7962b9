"""No secret in a log: what looks like one, by its name or by its form, is masked.

Masks more than it must: `tokens: 17` goes too. Takes time linear in the length of a text, whoever
wrote it.
"""

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

MASK = "[redacted]"
_WORDS = r"secret|token|authorization|credential|aist|password|passphrase|private_?key|cookie"
_SECRET_KEY = re.compile(_WORDS, re.IGNORECASE)
_DOTTED = re.compile(r"(?<![\w-])[\w-]+(?:\.[\w-]*)+")  # what a JWT (RFC 7519) may be in
_JSON_OBJECT = re.compile(r"e[wy][\w-]{8}")  # base64url of "{" and a quote or white space
_NAMED = re.compile(
    # Authorization: scheme and credentials (RFC 9110, section 11.4).
    r"(?P<before>\b(?:bearer|basic|dpop)\s+)[\w.~+/=-]+"
    # name=value, "name": "value", and the like.
    rf"|(?P<name>(?:{_WORDS})[\w-]{{0,32}}[\"']?\s*[=:]\s*(?:(?:bearer|basic|dpop)\s+)?)"
    r"(?:b?\"(?:[^\"\\]|\\.)*\"?|b?'(?:[^'\\]|\\.)*'?|[^\s,;&)}\]]+)",
    re.IGNORECASE | re.DOTALL,
)
_MAX_DEPTH = 8


def redact_text(text: str) -> str:
    """Mask secrets within a text."""
    if text.isalnum():  # most identifiers; every pattern needs a dot, a space or a sign
        return text
    return _NAMED.sub(_mask_value, _DOTTED.sub(_mask_jwt, text))


def redact(value: Any, depth: int = 0) -> Any:
    """Return a value as JSON has it, with secrets masked; an object becomes its masked `repr`."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, Mapping) and depth < _MAX_DEPTH:
        return {
            key: MASK if is_secret and item is not None else redact(item, depth + 1)
            for (key, is_secret), item in ((_key(str(k)), item) for k, item in value.items())
        }
    if isinstance(value, list | tuple | set | frozenset) and depth < _MAX_DEPTH:
        return [redact(item, depth + 1) for item in value]
    try:
        return redact_text(repr(value))
    except Exception as error:  # a log line does not fail for what it is about
        return f"<{type(value).__name__}: {type(error).__name__}>"


@lru_cache(maxsize=1024)
def _key(key: str) -> tuple[str, bool]:
    """Return a key, masked, and whether its value is a secret."""
    return redact_text(key), _SECRET_KEY.search(key) is not None


def _mask_jwt(match: re.Match[str]) -> str:
    *segments, _ = match[0].split(".")
    return MASK if any(_JSON_OBJECT.search(segment) for segment in segments) else match[0]


def _mask_value(match: re.Match[str]) -> str:
    return f"{match['before'] or match['name']}{MASK}"
