"""The reward model card: the text and tokenizer of a reward model's training, which a run compares with its own.

The file `reward_model_card.json` is beside the reward model's weights.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

CARD_FILE = "reward_model_card.json"
# Tokenizers differ in case, digits, white space, non-ASCII characters and punctuation.
_PROBE = "The quick brown Fox\n\n jumps 1234 times — déjà vu, 日本語! {code}\t<tag>"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of a tokenizer's vocabulary, its special tokens and the tokens of a probe text.

    The files do not count, because saving a tokenizer rewrites them. A tokenizer without a padding token is the same
    as one that pads with EOS, which training makes of it.
    """
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    content = [
        sorted(tokenizer.get_vocab().items()),
        [tokenizer.bos_token_id, tokenizer.eos_token_id, pad_token_id],
        tokenizer(_PROBE)["input_ids"],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def chat_template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a digest of the chat template; `None` if there is none."""
    template = tokenizer.chat_template
    return None if template is None else hashlib.sha256(str(template).encode()).hexdigest()[:16]


def heads_of(card: "RewardModelCard | None") -> int:
    """Return the number of score heads of a reward model: one, unless its card says more."""
    return 1 if card is None else card.score_heads


@dataclass(frozen=True)
class RewardModelCard:
    """Describe the training of a reward model. `RewardModelTrainer` writes the card, and `PPOTrainer` checks it.

    Args:
        base_model: Name or path of the model that the training started from.
        conversational: Whether the preferences were chat messages. The chat template then separates the response.
        response_separator: Separator between prompt and response of plain text; `None` for chats.
        tokenizer_fingerprint: Result of the function with this name.
        chat_template_fingerprint: Result of the function with this name; `None` for plain text.
        score_mean: Mean score of the responses in the evaluation pairs; `None` without an evaluation.
        score_std: Standard deviation of the same scores.
        eval_accuracy: Share of the evaluation pairs that the model ranks like the annotators.
        pad_token_id: Padding token in training: the score is read at the last token that is another one. `None` in a
            card that an older version has written.
        calibration_error: Expected calibration error on the evaluation pairs; see `preference_metrics`.
        score_heads: Number of score heads.
        head_means: Mean score of each head over the same responses as `score_mean`.
        disagreement: Mean over the same responses of the standard deviation over the heads, from a common origin;
            `None` with one head.
    """

    ranks_pairs: ClassVar[bool] = True  # so an `eval_accuracy` of one half is chance

    base_model: str
    conversational: bool
    response_separator: str | None
    tokenizer_fingerprint: str
    chat_template_fingerprint: str | None
    score_mean: float | None = None
    score_std: float | None = None
    eval_accuracy: float | None = None
    pad_token_id: int | None = None
    calibration_error: float | None = None
    score_heads: int = 1
    head_means: list[float] | None = None
    disagreement: float | None = None

    def save(self, directory: str | Path) -> None:
        """Write the card into a directory."""
        Path(directory, CARD_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> "RewardModelCard | None":
        """Return the card in a directory; `None` if there is none.

        Raises:
            ValueError: If it is the card of another kind of model, or of a newer version.
        """
        path = Path(directory, CARD_FILE)
        if not path.is_file():
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        if others := sorted(content.keys() - {field.name for field in fields(cls)}):
            kind = "a process reward model, which judges steps" if "step_separator" in others else "a newer version"
            raise ValueError(
                f"{path} has {', '.join(f'`{name}`' for name in others)}: it is the card of {kind}. Name a reward "
                "model that scores whole answers, or update this library."
            )
        return cls(**content)

    def check(
        self, tokenizer: PreTrainedTokenizerBase | None, *, conversational: bool, response_separator: str | None
    ) -> None:
        """Compare the card with a run.

        Args:
            tokenizer: Tokenizer that the run uses for the reward model; `None` if a server has it.
            conversational: Whether the run's prompts are chat messages.
            response_separator: Separator of the run, for plain text.

        Raises:
            ValueError: If the run would give the reward model another kind of text. The message names the option.
        """
        kind = {True: "chat messages", False: "plain text"}
        if conversational != self.conversational:
            raise ValueError(
                f"The reward model was trained on {kind[self.conversational]}, but the prompts are "
                f"{kind[conversational]}. Convert the prompts, or train a reward model on {kind[conversational]}."
            )
        if not conversational and response_separator != self.response_separator:
            raise ValueError(
                f"`response_separator` is {response_separator!r}, but the reward model was trained with "
                f"{self.response_separator!r}. Set `response_separator: {json.dumps(self.response_separator)}`."
            )
        if tokenizer is None:
            return
        if tokenizer_fingerprint(tokenizer) != self.tokenizer_fingerprint:
            raise ValueError(
                f"The reward model's tokenizer has fingerprint {tokenizer_fingerprint(tokenizer)}, but the card "
                f"says {self.tokenizer_fingerprint}. Use the tokenizer saved beside the reward model."
            )
        if conversational and chat_template_fingerprint(tokenizer) != self.chat_template_fingerprint:
            raise ValueError(
                f"The reward model's chat template has fingerprint {chat_template_fingerprint(tokenizer)}, but the "
                f"card says {self.chat_template_fingerprint}. Use the chat template saved beside the reward model."
            )
