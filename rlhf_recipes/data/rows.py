"""Read the rows of a user's dataset into the form that is trained, and refuse the rest by its row.

The checks are linear in the rows. The chat template renders one row of each sequence of roles, not every row.
"""

import itertools
import logging
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf_recipes.data.messages import (
    ROLES,
    conversation,
    ends_in_prefill,
    looks_like_messages,
    parsed_messages,
    plain_messages,
)
from rlhf_recipes.data.prompts import AnyDataset, MaybeDataset, check_columns, column_names, rows_of
from rlhf_recipes.data.rendering import prepended_ids, prompt_ids
from rlhf_recipes.data.transcripts import ANSWERS, is_cut_inside, split_transcript

logger = logging.getLogger(__name__)
# TRL passes these to a reward function by name, so a column of the dataset cannot have the name too.
REWARD_ARGUMENTS = (
    "prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments",
)  # fmt: skip
# An answer that begins with this many characters of its prompt does not do so by chance.
REPEATED = 32
EXAMPLES = 100  # rows that decide about a column


def readable_rows(dataset: MaybeDataset, columns: tuple[str, ...], name: str, *, keep_parts: bool = False) -> Any:
    """Return a dataset whose columns hold text or plain messages, and check it.

    Text parts of a message are joined, messages written as JSON text are parsed, the keys of ShareGPT are renamed, and
    messages of the prompt that an answer repeats are taken out of it. A dataset that needs none of this is returned
    unchanged. Of a stream only the first row is checked here, and the others when they are read.

    Args:
        dataset: Dataset of the user. `None` is accepted.
        columns: Names of the required columns.
        name: Name of the argument, for the message.
        keep_parts: Whether content may stay a list of parts, for a model that sees images.

    Raises:
        ValueError: If a row cannot be read (`plain_messages`), repeats its prompt as text, or fails `check_columns`.
    """
    if dataset is not None and not isinstance(dataset, dict) and (first := next(iter(dataset), None)) is not None:
        present = [column for column in columns if column in first]
        as_json = [column for column in present if _is_json(dataset, column)]
        options = {"columns": present, "as_json": as_json, "name": name, "keep_parts": keep_parts}
        if _changes(dataset, first, options):
            dataset = dataset.map(_readable_row, with_indices=True, fn_kwargs=options)
        if isinstance(dataset, Dataset):
            _check_repeated_prompts(dataset, present, name)
    check_columns(dataset, columns, name)
    return dataset


def _is_json(dataset: AnyDataset, column: str) -> bool:
    """Return whether the first texts of a column all look like messages. One alone may be a task about JSON."""
    return all(looks_like_messages(value) for (value,) in itertools.islice(rows_of(dataset, (column,)), EXAMPLES))


def _changes(dataset: AnyDataset, first: dict[str, Any], options: dict[str, Any]) -> bool:
    if not isinstance(dataset, Dataset):
        return any(isinstance(value, list) for value in _readable_row(first, 0, **options).values())
    columns, name = options["columns"], options["name"]
    changes = False
    kinds: dict[str, type] = {}
    for index, values in enumerate(rows_of(dataset, columns)):
        row = dict(zip(columns, values, strict=True))
        read = _readable_row(row, index, **options)
        changes = changes or read != row
        for column, value in read.items():
            if isinstance(value, str | list) and kinds.setdefault(column, type(value)) is not type(value):
                raise ValueError(
                    f"`{name}` mixes text and messages in {column!r}: row {index} differs from the rows before it. "
                    "Write all rows in one form."
                )
    return changes


def _readable_row(
    row: dict[str, Any], index: int, columns: list[str], as_json: list[str], name: str, keep_parts: bool
) -> dict[str, Any]:
    read = {}
    for column in columns:
        try:
            value = parsed_messages(row[column]) if column in as_json else row[column]
            read[column] = plain_messages(value, keep_parts=keep_parts) if isinstance(value, list) else value
        except ValueError as error:
            raise ValueError(f"`{name}` has a {column!r} that cannot be read in row {index}: {error}.") from None
    prompt = read.get("prompt")
    for column in ANSWERS:
        if isinstance(prompt, list) and isinstance(answer := read.get(column), list):
            read[column] = _without_prompt(prompt, answer, f"`{name}` has a {column!r} in row {index}")
    return read


def _without_prompt(prompt: list[Any], answer: list[Any], where: str) -> list[Any]:
    asked, said = ([(m["role"], m.get("content")) for m in messages] for messages in (prompt, answer))
    if len(said) > len(asked) and said[: len(asked)] == asked:
        return answer[len(asked) :]
    opens = all(role in ("system", "developer") for role, _ in asked)  # then the question may follow in the answer
    if said and said[0][0] in ("system", "developer", "user") and not (opens and said[0][0] == "user"):
        raise ValueError(
            f"{where} that begins with a message of the {said[0][0]}. Leave in it only the messages that answer "
            "`prompt`; or drop the column `prompt`, if the others hold whole chats."
        )
    return answer


def _check_repeated_prompts(dataset: Dataset, columns: list[str], name: str) -> None:
    answers = [column for column in columns if column in ANSWERS]
    if "prompt" not in columns or not answers:
        return
    repeated = [
        (row, len(prompt))
        for row, (prompt, *said) in enumerate(rows_of(dataset, ("prompt", *answers)))
        if all(_repeats(prompt, text) for text in said)
    ]
    long = next((row for row, length in repeated if length >= REPEATED), None)
    is_rule = len(repeated) * 2 > len(dataset)
    if not (is_rule or long is not None):  # by chance
        return
    row = repeated[0][0] if long is None else long
    message = (
        f"`{name}` holds the prompt again at the beginning of {' and '.join(map(repr, answers))} in row {row}"
        f"{f' and {len(repeated) - 1} others' if len(repeated) > 1 else ''}."
    )
    if is_rule:
        raise ValueError(f"{message} Take it out of the answers (`text.removeprefix(prompt)`).")
    logger.warning(f"{message} If they are not meant so, take it out (`text.removeprefix(prompt)`).")


def _repeats(prompt: Any, answer: Any) -> bool:
    is_text = isinstance(prompt, str) and isinstance(answer, str)
    return is_text and bool(prompt.strip()) and answer.startswith(prompt) and len(answer) > len(prompt)


def mend_transcripts(dataset: MaybeDataset) -> Any:
    """Move the boundary of pairs of transcripts that were cut inside a sentence back to the last "Assistant:".

    `trl.extract_prompt` cuts them where their answers differ first.

    Args:
        dataset: Pairs with a prompt, as text; other datasets and rows stay unchanged. Call it before the separator is
            added.
    """
    columns = ("prompt", "chosen", "rejected")
    if dataset is None or not set(columns) <= set(column_names(dataset)):
        return dataset
    if isinstance(dataset, Dataset):
        cut = [row for row, (prompt, *said) in enumerate(rows_of(dataset, columns)) if is_cut_inside(prompt, said)]
        if not cut:
            return dataset
        logger.warning(
            f"The prompts of {len(cut):,} pairs, for example in row {cut[0]}, end inside the answer. Prompt and "
            "answers are divided after the last 'Assistant:'."
        )
    return dataset.map(_mended)


def _mended(row: dict[str, Any]) -> dict[str, Any]:
    answers = [row[column] for column in ANSWERS if column in row]
    return split_transcript(row) if is_cut_inside(row["prompt"], answers) else row


def join_prefill(dataset: MaybeDataset) -> Any:
    """Move the beginning of an answer, where the prompt holds it, into `chosen` and `rejected`, as one message.

    TRL joins the messages of prompt and answer, and would render two turns of the assistant.
    """
    if dataset is None or "prompt" not in column_names(dataset):
        return dataset
    if isinstance(dataset, Dataset) and not any(ends_in_prefill(row[0]) for row in rows_of(dataset, ("prompt",))):
        return dataset
    return dataset.map(_joined, with_indices=True)


def _joined(row: dict[str, Any], index: int) -> dict[str, Any]:
    if not ends_in_prefill(row["prompt"]):
        return row
    if len(row["prompt"]) == 1:
        raise ValueError(f"The 'prompt' in row {index} holds nothing but the beginning of the answer.")
    begun = row["prompt"][-1:]
    return {"prompt": row["prompt"][:-1]} | {name: conversation(begun, row[name]) for name in ANSWERS if name in row}


def check_rendering(
    dataset: AnyDataset | None,
    columns: tuple[str, ...],
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    reads_options: bool = False,
) -> None:
    """Check that the tokenizer renders every kind of row whole, and with one BOS.

    Args:
        dataset: Dataset that `readable_rows` returned. `None` is accepted. Of a stream, only the first row is checked.
        columns: Columns to render: the prompt, and its answers if they are trained.
        name: Name of the argument, for the message.
        tokenizer: Tokenizer of the model that reads.
        reads_options: Whether the trainer gives the columns `tools` and `chat_template_kwargs` to the template.

    Raises:
        ValueError: If messages have no chat template or an unknown role, if the template refuses a row or leaves out a
            message, if a text begins with the BOS that the tokenizer writes too, or if the template would read a
            column that the trainer does not give to it.
    """
    if dataset is None:
        return
    seen: set[Any] = set()
    bos = tokenizer.bos_token if tokenizer.bos_token_id in prepended_ids(tokenizer) else None
    for row, values in enumerate(rows_of(dataset, columns)):
        if isinstance(values[0], str):
            if bos and values[0].startswith(bos):
                raise ValueError(
                    f"`{name}` has a {columns[0]!r} in row {row} that begins with {bos!r}, which the tokenizer writes "
                    "too: the model would read it twice. Leave it out of the text, or give messages instead of text."
                )
            continue
        if not (seen or reads_options):
            _check_template_columns(dataset, name, str(tokenizer.chat_template))
        shape = tuple(tuple((m["role"], bool(m.get("tool_calls"))) for m in messages) for messages in values)
        if shape not in seen:
            seen.add(shape)
            _check_chat(values, f"Row {row} of `{name}`", tokenizer, columns[0] == "prompt")


def _check_template_columns(dataset: AnyDataset, name: str, template: str) -> None:
    """Refuse columns that SFT renders: a reward model or a policy that does not see them would read another text."""
    for column in ("tools", "chat_template_kwargs"):
        given = column in column_names(dataset) and any(value for (value,) in rows_of(dataset, (column,)))
        if given and (column in template or column != "tools"):
            raise ValueError(
                f"`{name}` has a column {column!r} for the chat template, which reward models and sampling do not "
                "give to it. Write its content into the messages, or rename or drop the column."
            )


def _check_chat(values: tuple[Any, ...], where: str, tokenizer: PreTrainedTokenizerBase, has_prompt: bool) -> None:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{where} holds messages, but the tokenizer has no chat template. Set `tokenizer.chat_template` and save "
            "it beside the model (in SFT, `chat_template_path` does it), or write prompts and answers as text."
        )
    prompt, *answers = values
    chats = [conversation(prompt, answer) for answer in answers] if has_prompt and answers else [*values]
    roles = ", ".join(message["role"] for message in chats[0])
    for message in chats[0]:
        if message["role"] not in ROLES and message["role"] not in str(tokenizer.chat_template):
            raise ValueError(f"{where} has the unknown role {message['role']!r}. Known roles: {', '.join(ROLES)}.")
    try:
        texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        if has_prompt:
            prompt_ids(tokenizer, [prompt])
    except Exception as error:  # a template may raise anything
        raise ValueError(f"{where} is refused by the chat template ({error}). Its roles are {roles}.") from error
    for number, message in enumerate(chats[0]):
        if isinstance(message.get("content"), str) and _is_left_out(tokenizer, chats[0], number, texts[0]):
            raise ValueError(
                f"{where} has a message {number} ({message['role']}) that the chat template leaves out. Its roles are "
                f"{roles}. Use another template, or write the message as one of the user."
            )


def _is_left_out(tokenizer: PreTrainedTokenizerBase, chat: list[Any], number: int, text: str) -> bool:
    """Return whether a rendered chat would be the same with another message in this place."""
    if chat[number]["content"].strip() in text:
        return False
    other = [*chat[:number], {**chat[number], "content": "x"}, *chat[number + 1 :]]
    return tokenizer.apply_chat_template(other, tokenize=False) == text


def check_reward_columns(
    dataset: AnyDataset | None, name: str, *, pairs: bool = False, sees_images: bool = True
) -> None:
    """Check that no column has the name of an argument that reward functions and judges get anyway.

    TRL puts the images of a column into the prompts, so a model for text cannot have them.

    Args:
        dataset: Dataset whose columns are passed on. `None` is accepted.
        name: Name of the dataset, for the message.
        pairs: Whether a judge compares two answers, which are arguments too.
        sees_images: Whether the model reads images.

    Raises:
        ValueError: If a column has such a name, or if it holds images that the model cannot read.
    """
    for column in () if dataset is None or sees_images else ("image", "images"):
        if column in column_names(dataset) and any(value for (value,) in rows_of(dataset, (column,))):
            raise ValueError(f"`{name}` has images in the column {column!r}, but the model reads text only.")
    reserved = (*REWARD_ARGUMENTS, *(("completions_a", "completions_b") if pairs else ()))
    taken = [] if dataset is None else [column for column in reserved if column in column_names(dataset)]
    if taken:
        raise ValueError(
            f"`{name}` has a column {', '.join(map(repr, taken))}, but reward functions get an argument of this name. "
            "Rename it (`dataset.rename_column`)."
        )
