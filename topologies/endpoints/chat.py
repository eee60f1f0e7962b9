"""The OpenAI chat-completions form, as far as anchors and UEs use it.

The answer to every prompt is `tok0 tok1 tok2 ...`: a reader can tell what is missing.
"""

import json
import time
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

ANCHOR_HEADER = "x-aipaging-anchor"
DONE = "data: [DONE]"
MAX_TOKENS = 100_000
DEFAULT_TOKENS = 64


class ChatMessage(BaseModel):
    """One message of a conversation; what it says has no influence on the answer."""

    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(BaseModel):
    """The fields used of an OpenAI chat-completion request. Others are ignored, as OpenAI does."""

    model_config = ConfigDict(strict=True)

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    stream: bool | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """What all parts of one completion have in common."""

    completion_id: str
    model: str
    created_unix_s: int = field(default_factory=lambda: int(time.time()))

    def _body(self, kind: str, choice: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self.completion_id,
            "object": kind,
            "created": self.created_unix_s,
            "model": self.model,
            "choices": [{"index": 0, **choice}],
        }

    def event(self, delta: dict[str, str], *, finish_reason: str | None = None) -> str:
        """Return one chunk of a streamed completion, as a server-sent event."""
        choice = {"delta": delta, "finish_reason": finish_reason}
        return f"data: {json.dumps(self._body('chat.completion.chunk', choice))}\n\n"

    def whole(self, text: str, tokens: int) -> dict[str, Any]:
        """Return a completion that is not streamed."""
        message = {"role": "assistant", "content": text}
        body = self._body("chat.completion", {"message": message, "finish_reason": "length"})
        usage = {"prompt_tokens": 0, "completion_tokens": tokens, "total_tokens": tokens}
        return {**body, "usage": usage}


def error_body(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """Return an error in OpenAI's form; `param` is the field at fault."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def token_text(number: int) -> str:
    """Return the text of a token, with the space that parts it from the one before."""
    return f" tok{number}" if number else "tok0"


def token_number(line: str) -> int | None:
    """Return the number in one line of a stream, or None if the line carries no token.

    Raises ValueError if it carries something else than `token_text` makes.
    """
    if not line.startswith("data: {"):
        return None
    try:
        content = json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content")
        return int(content.strip().removeprefix("tok")) if content else None
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"no chunk of a completion: {line[:100]}") from error
