"""The reward model card: what a reward model was trained with, so that a run can refuse to use it differently.

`reward_model_card.json` lies beside the reward model's weights.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

CARD_FILE = "reward_model_card.json"
# Upper and lower case, digits, white space, non-ASCII and punctuation: what tokenizers treat differently.
_PROBE = "The quick brown Fox\n\n jumps 1234 times — déjà vu, 日本語! {code}\t<tag>"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of what a tokenizer does: its vocabulary, its special tokens and how it splits a probe text.

    Behaviour, not files: saving and reloading a tokenizer rewrites the files and must not change the digest.
    """
    content = [
        sorted(tokenizer.get_vocab().items()),
        [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        tokenizer(_PROBE)["input_ids"],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def chat_template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a digest of the chat template, or `None` without one."""
    template = tokenizer.chat_template
    return None if template is None else hashlib.sha256(str(template).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class RewardModelCard:
    """What `RewardModelTrainer` writes and `PPOTrainer` checks.

    Args:
        base_model: Name or path of the model the training started from.
        conversational: Whether the preferences were chat messages; the chat template is then the boundary.
        response_separator: Boundary between prompt and response of plain text; `None` for chat.
        tokenizer_fingerprint: See `tokenizer_fingerprint`.
        chat_template_fingerprint: See `chat_template_fingerprint`; `None` for plain text.
        score_mean: Mean score over the evaluation pairs' responses, `None` if never evaluated.
        score_std: Standard deviation of the same scores.
        eval_accuracy: Share of evaluation pairs ranked as the annotators did.
    """

    base_model: str
    conversational: bool
    response_separator: str | None
    tokenizer_fingerprint: str
    chat_template_fingerprint: str | None
    score_mean: float | None = None
    score_std: float | None = None
    eval_accuracy: float | None = None

    def save(self, directory: str | Path) -> None:
        """Write the card into `directory`."""
        Path(directory, CARD_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> "RewardModelCard | None":
        """Read the card from `directory`; `None` if it has none (a reward model from elsewhere)."""
        path = Path(directory, CARD_FILE)
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def check(
        self, tokenizer: PreTrainedTokenizerBase | None, *, conversational: bool, response_separator: str | None
    ) -> None:
        """Compare the card with a run.

        Args:
            tokenizer: The one that the run gives to the reward model; `None` if it is its server's affair.
            conversational: Whether the run's prompts are chat messages.
            response_separator: The run's boundary for plain text.

        Raises:
            ValueError: If the run would show the reward model other text than it was trained on; names the option.
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
                f"The reward model's chat template has fingerprint {chat_template_fingerprint(tokenizer)}, the card "
                f"says {self.chat_template_fingerprint}. Use the chat template saved beside the reward model."
            )
