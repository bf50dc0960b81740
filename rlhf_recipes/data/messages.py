"""Convert prompts and completions between text and messages."""

from typing import Any

Text = str | list[dict[str, Any]]


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
