"""Refusals of options by other libraries, told from faults: those keep their class and their traceback."""

from types import TracebackType

# Libraries that check options when a trainer or a model is built.
LIBRARIES = ("accelerate", "bitsandbytes", "huggingface_hub", "peft", "transformers", "trl")
# Words of refusals that do not name the option of a recipe.
OPTION_OF = {
    "arget modules": "lora_target_modules",
    "purely quantized": "load_in_4bit` without `use_peft",
    "FlashAttention": "attn_implementation`: leave it out, or install the package `flash-attn",
}


def is_refusal(error: BaseException) -> bool:
    """Return whether one of these libraries has raised the error itself, and not code that it has called."""
    return _raised_in(error.__traceback__).partition(".")[0] in LIBRARIES


def with_option(error: BaseException) -> str:
    """Return the message of a refusal, with the name of the option if it does not have it."""
    option = next((f" (`{name}`)" for words, name in OPTION_OF.items() if words in str(error)), "")
    return f"{error}{option}"


def _raised_in(trace: TracebackType | None) -> str:
    name = ""
    while trace is not None:
        name, trace = str(trace.tb_frame.f_globals.get("__name__", "")), trace.tb_next
    return name
