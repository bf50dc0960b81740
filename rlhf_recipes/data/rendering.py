"""Render prompts and answers as token ids, in one way for policy and reward model.

TRL's trainers tokenise training data by themselves. `for_training` gives them the same result.
"""

import copy
import json
from typing import Any

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase

from rlhf_recipes.data.messages import Text, conversation, ends_in_prefill, plain_messages


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: list[Text], **template: Any) -> list[list[int]]:
    """Return the tokens that the policy reads for each prompt.

    An answer follows the prompt, so nothing ends it: tokens that the tokenizer appends to every text are left off. A
    prompt that ends with a message of the assistant is continued.

    Args:
        tokenizer: Tokenizer of the model that reads.
        prompts: Text that ends with the separator, or messages.
        template: Options of the chat template.
    """
    texts = [row for row, prompt in enumerate(prompts) if isinstance(prompt, str)]
    result: list[list[int]] = [[]] * len(prompts)
    if texts:
        end = len(appended_ids(tokenizer))
        for row, ids in zip(texts, tokenizer([prompts[row] for row in texts])["input_ids"], strict=True):
            result[row] = list(ids[: len(ids) - end])
    for continues in (False, True):
        chats = [row for row, x in enumerate(prompts) if not isinstance(x, str) and ends_in_prefill(x) is continues]
        if chats:
            asked = [plain_messages(prompts[row]) for row in chats]
            options = {"continue_final_message": continues, "add_generation_prompt": not continues, **template}
            rendered = tokenizer.apply_chat_template(asked, return_dict=True, **options)["input_ids"]
            for row, ids in zip(chats, without_stray_end(tokenizer, asked, rendered, **template), strict=True):
                result[row] = list(ids)
    return result


def answered_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, answer: Text, finished: bool, *, appended: int | None = None
) -> list[int]:
    """Return the tokens that a reward model reads for a prompt and its answer.

    Plain text is `prompt + answer + EOS`, with one EOS. An answer that was cut off has none, also if the tokenizer
    appends one. The chat template writes the end of a chat.

    Args:
        tokenizer: Tokenizer of the model that reads.
        prompt: Text that ends with the separator, or messages.
        answer: Answer in the same form.
        finished: Whether the answer has ended and was not cut off.
        appended: Number of tokens of `appended_end`, if it is known.
    """
    if isinstance(prompt, str) and isinstance(answer, str):
        ids = tokenizer(answered_text(tokenizer, prompt, answer, finished))["input_ids"]
        return list(ids[: len(ids) - (len(appended_end(tokenizer)) if appended is None else appended)])
    chat = conversation(plain_messages(prompt), plain_messages(answer))  # type: ignore[arg-type]
    return list(tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"])


def answered_text(tokenizer: PreTrainedTokenizerBase, prompt: Text, answer: Text, finished: bool) -> str:
    """Return the text whose tokens are those of `answered_ids`, if nothing is added to it but opening tokens."""
    if isinstance(prompt, str) and isinstance(answer, str):
        return prompt + answer + (tokenizer.eos_token if finished else "")
    chat = conversation(plain_messages(prompt), plain_messages(answer))  # type: ignore[arg-type]
    return str(tokenizer.apply_chat_template(chat, tokenize=False))


def appended_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that a tokenizer appends to every text, for example by `add_eos_token`."""
    with_all, own = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (True, False))
    starts = range(len(with_all) - len(own) + 1)
    start = next((i for i in starts if with_all[i : i + len(own)] == own), len(with_all) - len(own))
    return with_all[start + len(own) :]


def appended_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the appended tokens if they end with the EOS. An encoder's separator stays."""
    ids = appended_ids(tokenizer)
    return ids if ids and ids[-1] == tokenizer.eos_token_id else []


def prepended_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that a tokenizer writes before every text."""
    with_all, own = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (True, False))
    return with_all[: len(with_all) - len(own) - len(appended_ids(tokenizer))]


def without_stray_end(
    tokenizer: PreTrainedTokenizerBase, prompts: list[Any], rendered: list[list[int]], **template: Any
) -> list[list[int]]:
    """Return rendered chat prompts without an EOS after the place where the answer begins.

    Some templates end each turn with the EOS and have no header for the answer. It then belongs to the prompt, and a
    chat with an answer holds it too. Other templates write it after the header: it is then left off.
    """
    eos = tokenizer.eos_token_id
    ending = next((row for row, ids in enumerate(rendered) if ids and ids[-1] == eos), None)
    if ending is None:
        return rendered
    chat = conversation(prompts[ending], [{"role": "assistant", "content": "a"}])
    whole = tokenizer.apply_chat_template(chat, return_dict=True, **template)["input_ids"]
    prompt = rendered[ending]
    if whole[: len(prompt)] == prompt:
        return rendered
    return [ids[:-1] if ids and ids[-1] == eos else ids for ids in rendered]


def for_training(tokenizer: Any) -> Any:
    """Return a tokenizer for TRL, which writes the EOS into the text: a copy that appends none, if this one does.

    Raises:
        ValueError: If the tokenizer appends an EOS in a way that cannot be switched off.
    """
    inner = getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds a tokenizer
    if not appended_end(inner):
        return tokenizer
    backend = getattr(inner, "backend_tokenizer", None)
    if inner is tokenizer and backend is not None:
        whole = json.loads(Tokenizer(models.BPE()).to_str())
        whole["post_processor"] = _without_end(json.loads(backend.post_processor.__getstate__()))
        own = copy.deepcopy(tokenizer)
        own.backend_tokenizer.post_processor = Tokenizer.from_str(json.dumps(whole)).post_processor
        if not appended_end(own):
            return own
    raise ValueError(
        f"The tokenizer appends {inner.eos_token!r} to every text, so a text would end twice. Set `add_eos_token: "
        "false`, or remove the EOS from its post-processor (`tokenizer.backend_tokenizer.post_processor`)."
    )


def _without_end(processor: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a post-processor that writes nothing after a text."""
    if processor["type"] == "Sequence":
        return {**processor, "processors": [_without_end(part) for part in processor["processors"]]}
    if processor["type"] != "TemplateProcessing":
        return processor
    text = next(i for i, piece in enumerate(processor["single"]) if "Sequence" in piece)
    return {**processor, "single": processor["single"][: text + 1]}
