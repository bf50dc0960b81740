"""Reward the steps of completions with a process reward model that vLLM serves.

vLLM answers with the outputs of the head at every token. The client sends the tokens that a process reward model in
this process reads, and reads the outputs at the last token of each step's separator.

A probability in float32 would lose log-odds above 17, and one in bfloat16 those above 6, because `1 - p` is then 0 or
nearly so. So the outputs are asked for without sigmoid or softmax, and the start of a run proves that they are.

Source: vLLM 0.28, `/pooling` with the task `token_classify`.
"""

from typing import Any

import torch
from torch import Tensor

from rlhf_recipes.algorithm.steps import log_odds_of
from rlhf_recipes.console import visible
from rlhf_recipes.models.fingerprint import fingerprint
from rlhf_recipes.rewards.attempts import PermanentRewardError, RewardCallError, checked_number
from rlhf_recipes.rewards.card import CARD_FILE
from rlhf_recipes.rewards.pooled import ROW_BYTES, Rows, VLLMRewardModel
from rlhf_recipes.rewards.steps import ProcessRewardModelCard, StepReader, StepRow, Steps
from rlhf_recipes.rewards.transport import NUMBER_BYTES


class VLLMProcessRewardModel(VLLMRewardModel):
    """Reward the steps of completions with vLLM's endpoint for token classifiers.

    Args:
        url: Address of the server.
        described: What the server says about its model.
        files: Directory or Hub name of the process reward model. Its card says how answers are split and what a step
            gives.
        kwargs: See `PooledRewardModel`.

    Raises:
        ValueError: If there is no card, if the model has more than two labels, or if the answers of the server are not
            the raw outputs of all tokens.
    """

    gives_steps, gives_log_odds = True, False

    def _take_rules(self, config: Any) -> None:
        card, self.labels = ProcessRewardModelCard.load(self.files), config.num_labels
        if not isinstance(card, ProcessRewardModelCard):
            raise ValueError(
                f"{self.files} has no {CARD_FILE}, and vLLM does not say how answers are split into steps and what a "
                f"step gives. Write the directory with the card behind the address: `{self.url}#DIRECTORY`."
            )
        if self.labels > 2:
            raise ValueError(
                f"{self.files} has {self.labels} labels; a step has one output, or two (wrong and right)."
            )
        self.card, self.reader = card, StepReader(self.tokenizer, card)

    def identity(self) -> str:
        """Return the fingerprint of the weights, if they are here, else the name; and the reward of a step."""
        return self.reader.identity(fingerprint(self.files))

    def __call__(  # type: ignore[override]
        self, prompts: list[Any], completions: list[Any], completion_ids: Any = None, **kwargs: Any
    ) -> list[Steps | None]:
        """Return for each completion the ends of its steps and their rewards. There may be none.

        A completion has `None` if the model gives NaN for a step, or has no position for the end of a step.

        Raises:
            RewardCallError: If a request fails, but a later one may succeed.
            PermanentRewardError: If the server refuses a request for good, or has another model than at first.
        """
        self._check_model()
        rows = [self._cut(row) for row in self.reader.rows(prompts, completions)]
        asked = [row for row in rows if row.places and row.has_all_ends]
        judged = iter(self._sent(self._judged, rows=asked) if asked else [])
        return [next(judged) if row.places and row.has_all_ends else None if row.places else [] for row in rows]

    def prompt_lengths(self, prompts: list[Any]) -> list[int]:
        """Return the number of tokens that the model reads beside those of an answer in one step, one per prompt."""
        return self.reader.prompt_lengths(prompts)

    def _cut(self, row: StepRow) -> StepRow:
        return row.within(self.position_limit, self.tokenizer.bos_token_id)

    def _row(self, prompt: Any, answer: Any, finished: bool) -> StepRow:  # type: ignore[override]
        return self._cut(self.reader.rows([prompt], [answer])[0])

    def _judged(self, batch: dict[str, list[StepRow]]) -> list[Steps | None]:
        rows = batch["rows"]
        outputs = self._outputs(rows, raw=True)
        return [self.reader.rewards(row, log_odds_of(found)) for row, found in zip(rows, outputs, strict=True)]

    def _probed(self, rows: Rows, raw: bool = True) -> list[float]:
        return torch.cat(self._outputs(rows, raw)).flatten().tolist()

    def _outputs(self, rows: Rows, raw: bool) -> list[Tensor]:
        """Return the outputs of the head at the ends of the steps, `(N, K)` for each row."""
        asked = {
            "model": self.model_id,
            "task": "token_classify",
            "input": [row.token_ids for row in rows],
            "use_activation": not raw,
        }
        numbers = self.labels * sum(map(len, rows))
        answer = self._post("/pooling", asked, ROW_BYTES * (len(rows) + 16) + NUMBER_BYTES * numbers)
        try:
            data = [each["data"] for each in sorted(answer["data"], key=lambda each: each["index"])]
            lengths = [len(of_tokens) for of_tokens in data]
        except (KeyError, TypeError) as error:
            raise RewardCallError(f"{self.url} answered with something else than outputs of tokens") from error
        if lengths != [len(row) for row in rows]:
            raise RewardCallError(
                f"{self.url} answered with the outputs of {sum(lengths)} tokens in {len(lengths)} rows for "
                f"{sum(map(len, rows))} tokens in {len(rows)}. Serve the model without the `pooling_type` STEP."
            )
        return [
            self._at_ends(of_tokens, row, number)
            for number, (of_tokens, row) in enumerate(zip(data, rows, strict=True))
        ]

    def _at_ends(self, of_tokens: list[Any], row: StepRow, number: int) -> Tensor:
        """Return the outputs at the ends of the steps of one row, `(N, K)`; NaN for `null`."""
        read = [of_tokens[place] for place in row.places]
        if not all(isinstance(outputs, list) for outputs in read):
            raise RewardCallError(f"{self.url} answered with something else than outputs of tokens")
        if wrong := {len(outputs) for outputs in read} - {self.labels}:
            raise PermanentRewardError(
                f"{self.url} answers with {min(wrong)} numbers per token, and {self.files} has {self.labels} labels: "
                "it serves another model."
            )
        try:
            checked = [[checked_number(output, number) for output in outputs] for outputs in read]
        except (TypeError, ValueError) as error:
            raise RewardCallError(f"{self.url} answered with wrong outputs: {visible(str(error))}") from error
        return torch.tensor(checked, dtype=torch.float32).reshape(-1, self.labels)
