"""Prompts and completions as text or as messages."""

from typing import Any

Text = str | list[dict[str, Any]]


def as_message(text: str) -> list[dict[str, str]]:
    """Return a completion as an assistant's message."""
    return [{"role": "assistant", "content": text}]


def as_text(messages: Text) -> str:
    """Return plain text as it is, and messages as lines `role: content`; an answer of one message without its role."""
    if isinstance(messages, str):
        return messages
    if len(messages) == 1 and messages[0]["role"] == "assistant":
        return str(messages[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
