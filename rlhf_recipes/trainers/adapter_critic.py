"""A critic with an adapter of its own on the policy's frozen backbone: `critic: adapter`.

Adapter and head are trained end to end on the returns. Policy, reference and reward adapter never see them: PEFT
switches the adapter on for the critic's forwards, and off again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import PeftConfig, PeftModel, PeftType
from torch import Tensor, nn
from trl.trainer.utils import use_adapter

from rlhf_recipes.data.rendering import answered_ids, appended_end, prompt_ids
from rlhf_recipes.models.adapters import adapter_weights, copy_adapter
from rlhf_recipes.models.critic import causal_lm, seeded
from rlhf_recipes.models.forward import rows_without_gradient
from rlhf_recipes.models.loading import SHARDED, position_limit
from rlhf_recipes.models.rope import cut_by_length
from rlhf_recipes.options.changes import with_changes
from rlhf_recipes.options.ppo import PPOConfig
from rlhf_recipes.rewards.adapter import REWARD_ADAPTER
from rlhf_recipes.rewards.reading import padded
from rlhf_recipes.rewards.scorer import shared_length
from rlhf_recipes.trainers.fitted_critic import FittedCritic, MiniBatch
from rlhf_recipes.trainers.rollout import Rollout

CRITIC_ADAPTER = "critic"


@dataclass(frozen=True)
class TokenRow:
    """Tokens of a prompt and of the completion that follows it.

    Args:
        ids: Without padding.
        start: Index of the first token of the completion, at least 1.
    """

    ids: list[int]
    start: int

    def __len__(self) -> int:
        """Return the number of states before the tokens of the completion and after the last one."""
        return len(self.ids) - self.start + 1


class AdapterCritic(FittedCritic):
    """Estimate the value of states by a LoRA and a head on the policy's backbone.

    The LoRA starts from the reward adapter if the policy has one, and else from the model without an adapter. It has
    no dropout, and its weights are in float32.

    Args:
        args: Options.
        policy: Policy, which gets the adapter.
        tokenizer: The policy's.
        device: Device of the head.
        rewards: Identity of the rewards.
    """

    kind = "adapter"
    pretraining_epochs = 2  # each one costs a forward and a backward of the backbone per answer

    def __init__(
        self, args: PPOConfig, policy: PeftModel, tokenizer: Any, device: torch.device, *, rewards: str = ""
    ) -> None:
        self._policy, self.tokenizer, self._micro_batch = policy, tokenizer, args.per_device_train_batch_size
        self._checkpoints = args.gradient_checkpointing
        hidden_size = causal_lm(policy).config.get_text_config().hidden_size
        super().__init__(args, hidden_size, device, adapter=add_critic_adapter(policy, args.seed), rewards=rewards)

    def rows(self, rollout: Rollout, batch: dict[str, Any]) -> list[TokenRow]:
        """Return the tokens of each prompt and its completion."""
        masked = zip(batch["prompt_ids"].tolist(), batch["prompt_mask"].tolist(), strict=True)
        prompts = [[token for token, counts in zip(*row, strict=True) if counts] for row in masked]
        pairs = zip(prompts, rollout.completion_id_lists, strict=True)
        return [TokenRow(prompt + completion, len(prompt)) for prompt, completion in pairs]

    def read_answers(self, scorer: Any, prompts: list[Any], answers: list[Any]) -> tuple[list[float], list[TokenRow]]:
        """Return the scores of finished answers, and their tokens, as far as the policy has positions for them."""
        end, limit = len(appended_end(self.tokenizer)), position_limit(self._policy)
        rows = []
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = answered_ids(self.tokenizer, prompt, answer, True, appended=end)[:limit]
            rows.append(TokenRow(ids, max(shared_length(ids, prompt_ids(self.tokenizer, [prompt])[0]), 1)))
        return scorer.score_token_ids(scorer.token_ids(prompts, answers, [True] * len(prompts))), rows

    def _values(self, rows: list[TokenRow]) -> list[Tensor]:
        values = [torch.empty(0)] * len(rows)
        with self._switched_on():
            for part in self._parts(rows, rows_without_gradient(self._micro_batch, self._policy.device)):
                for i, of_row in zip(part, self._read([rows[i] for i in part]), strict=True):
                    values[i] = of_row
        return values

    def _backward(self, batch: MiniBatch) -> None:
        with self._switched_on(training=self._checkpoints):  # gradient checkpointing reads the layers again
            for part in self._parts(batch.rows, self._micro_batch):
                read = self._read([batch.rows[i] for i in part])
                values = torch.cat([of_row[:-1][batch.keep[i]] for i, of_row in zip(part, read, strict=True)])
                self._add_gradient(values, torch.cat([batch.targets[i] for i in part]), batch.count)

    def _read(self, rows: list[TokenRow]) -> list[Tensor]:
        """Return the values of the states of each row, from one forward."""
        # The padding is on the right, where no token that counts can see it.
        inputs = {name: x.to(self._policy.device) for name, x in padded([row.ids for row in rows], 0).items()}
        states = self._policy(**inputs, backbone_only=True, use_cache=False).last_hidden_state
        around = [of_row[row.start - 1 : len(row.ids)] for row, of_row in zip(rows, states, strict=True)]
        return list(self.head(torch.cat(around)).split([len(row) for row in rows]))

    def _parts(self, rows: list[TokenRow], size: int) -> list[list[int]]:
        return cut_by_length(self._policy, [len(row.ids) for row in rows], size)

    @contextmanager
    def _switched_on(self, *, training: bool = False) -> Iterator[None]:
        """Let the policy's network be the critic's inside.

        Args:
            training: Whether the network is in training mode, in which alone transformers checkpoints activations.
        """
        was_training = self._policy.training
        self._policy.train(training)
        try:
            with use_adapter(self._policy, CRITIC_ADAPTER):
                yield
        finally:
            self._policy.train(was_training)


def add_critic_adapter(policy: PeftModel, seed: int) -> dict[str, nn.Parameter]:
    """Add the critic's adapter to a policy, and return its weights by name, frozen. It is the same on every rank."""
    starts_from = REWARD_ADAPTER if REWARD_ADAPTER in policy.peft_config else None
    config = policy.peft_config[starts_from or policy.active_adapter]
    # The policy's initialisation may change the base, and what it trains beside LoRA is its own.
    own = {"init_lora_weights": True, "layer_replication": None, "modules_to_save": None, "lora_dropout": 0.0}
    if starts_from is None:
        own["trainable_token_indices"] = None
    with seeded(seed):
        policy.add_adapter(CRITIC_ADAPTER, with_changes(config, inference_mode=False, **own))
    if starts_from is not None:
        copy_adapter(policy, starts_from, CRITIC_ADAPTER, dtype=torch.float32)
    weights = adapter_weights(policy, CRITIC_ADAPTER)
    for weight in weights.values():
        weight.requires_grad_(False)  # the policy's optimiser must not find them
    return weights


def check_adapter_critic(policy: Any, peft_config: PeftConfig | None, *, sees_images: bool) -> None:
    """Check that the policy has a frozen backbone which a critic can share by an adapter of its own.

    Raises:
        ValueError: If not.
    """
    config = policy.peft_config[policy.active_adapter] if isinstance(policy, PeftModel) else peft_config
    if config is None:
        raise ValueError(
            "`critic: adapter` needs a policy that is a LoRA too: its backbone must stay as it is. Set `use_peft: "
            "true`, or `critic: policy`."
        )
    if config.peft_type != PeftType.LORA or config.bias != "none":
        raise ValueError(
            "`critic: adapter` needs a policy whose adapter is a LoRA with `bias: none`: others change the backbone "
            "under the critic, or cannot have a second adapter beside them. Set `critic: policy`."
        )
    if sees_images:
        raise ValueError("`critic: adapter` reads text, and this policy sees images. Set `critic: policy`.")


def check_weights_are_whole(kind: DistributedType) -> None:
    """Refuse DeepSpeed and FSDP, which keep shards or 16-bit copies of weights that only the critic trains.

    Raises:
        ValueError: If the run uses one of them.
    """
    if kind in SHARDED:
        raise ValueError(
            f"`critic: adapter` needs whole weights in float32 on each GPU, and {kind.value} does not keep these. "
            "Launch with `accelerate_configs/multi_gpu.yaml`, or set `critic: policy`."
        )
