"""Read prompts and answers as users write them: text, messages, messages in parts, messages as JSON text."""

import json
import re
from typing import Any

Text = str | list[dict[str, Any]]
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
TEXT_TYPES = (None, "text", "input_text", "output_text")
JSON_MESSAGES = re.compile(r"\s*\[\s*\{\s*['\"](role|content|from|value)['\"]\s*:")


def answer_to(prompt: Text, text: str) -> Text:
    """Return a completion in the form of its prompt: as text, or as messages with one of the assistant."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def as_text(messages: Text) -> str:
    """Return plain text unchanged, and messages as lines `role: content`.

    A completion is often one message of the assistant. Its role is then left out.
    """
    if isinstance(messages, str):
        return messages
    if len(messages) == 1 and messages[0]["role"] == "assistant":
        return str(messages[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def ends_in_prefill(prompt: Text) -> bool:
    """Return whether a prompt ends with the beginning of the answer: with a message of the assistant."""
    return not isinstance(prompt, str) and bool(prompt) and prompt[-1].get("role") == "assistant"


def conversation(prompt: list[dict[str, Any]], answer: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a prompt and its answer as one chat. An answer to a prefill continues the prefill."""
    if not (answer and ends_in_prefill(prompt) and answer[0].get("role") == "assistant"):
        return [*prompt, *answer]
    begun, continued = prompt[-1].get("content") or "", answer[0].get("content") or ""
    return [*prompt[:-1], {**prompt[-1], **answer[0], "content": begun + continued}, *answer[1:]]


def plain_messages(messages: Text, *, keep_parts: bool = False) -> Text:
    """Return text unchanged, and messages with the keys `role` and `content`, whose content is text.

    Text parts are joined. The keys `from` and `value` of ShareGPT are renamed.

    Args:
        messages: Text or messages.
        keep_parts: Whether content may stay a list of parts, for a model that sees images.

    Raises:
        ValueError: If a message has no role or no content, or a part that is no text.
    """
    if isinstance(messages, str):
        return messages
    return [_plain_message(number, message, keep_parts) for number, message in enumerate(messages)]


def _plain_message(number: int, message: Any, keep_parts: bool) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"message {number} is {type(message).__name__} and no dictionary with `role` and `content`")
    if message.get("role") is None and message.get("from") is not None:
        message = {"role": SHAREGPT_ROLES.get(message["from"], message["from"]), "content": message.get("value")} | {
            name: value for name, value in message.items() if name not in ("role", "content", "from", "value")
        }
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise ValueError(f"message {number} has no `role`, only {', '.join(map(repr, message))}")
    if isinstance(content, list) and not keep_parts:
        return {**message, "content": "".join(_text_of(number, part) for part in content)}
    if isinstance(content, str | list) or (content is None and message.get("tool_calls")):
        return message
    raise ValueError(f"message {number} ({role}) has no text as its `content`, but {content!r}")


def _text_of(number: int, part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(text, str) and kind in TEXT_TYPES:
        return text
    named = f"of type {kind!r}" if kind not in TEXT_TYPES else "without text"
    raise ValueError(f"message {number} holds a part {named}, but the model reads text only")


def looks_like_messages(text: Any) -> bool:
    """Return whether a text may be a list of messages, written as JSON or by Python."""
    return isinstance(text, str) and JSON_MESSAGES.match(text) is not None and text.rstrip().endswith("]")


def parsed_messages(text: Any) -> Any:
    """Return the messages that a text holds as JSON, and anything else unchanged.

    Args:
        text: Text that looks like messages, or anything else.

    Raises:
        ValueError: If it looks like messages, and is no JSON.
    """
    if not looks_like_messages(text):
        return text
    try:
        messages = json.loads(text)
    except ValueError as error:
        raise ValueError(f"it looks like a list of messages as text, but it is no JSON ({error})") from None
    keys = ({"role", "content"}, {"from", "value"})
    is_chat = all(isinstance(m, dict) and any(pair <= m.keys() for pair in keys) for m in messages)
    return messages if is_chat else text
