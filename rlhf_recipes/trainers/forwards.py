"""The forwards of a policy and of its reference: log-probabilities, and the values of the same forward.

Overrides only, on `trl.GRPOTrainer`.
"""

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from rlhf_recipes.algorithm.micro_batches import cut_rows
from rlhf_recipes.models.critic import causal_lm
from rlhf_recipes.models.forward import CompletionForward, rows_without_gradient
from rlhf_recipes.models.full_kl import Side, chunked_kl
from rlhf_recipes.models.loading import SHARDED
from rlhf_recipes.trainers.numbers import NumbersCallback
from rlhf_recipes.trainers.rollout import Rollout, loss_mask
from rlhf_recipes.trainers.setup import REFERENCE_ADAPTER, takes_positions
from rlhf_recipes.trainers.value_head import ValueHeadTrainer

# Image inputs of TRL's log-probability method.
IMAGE_ARGUMENTS = set(list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)[8:])


class ForwardTrainer(ValueHeadTrainer):
    """Run policy and reference through `CompletionForward`, once per rollout and micro-batch."""

    rollout: Rollout | None = None  # the latest
    numbers: NumbersCallback | None = None  # compares the forwards with plain transformers

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        kind = self.accelerator.distributed_type
        if self.args.kl_estimator == "full" and kind in SHARDED:
            raise ValueError(
                f"`kl_estimator: full` needs a whole LM head on each GPU, and {kind.value} cuts it into shards. "
                "Launch with `accelerate_configs/multi_gpu.yaml`, or set `kl_estimator: k1`."
            )

    def watch_numbers(self, start: Any) -> None:
        """Compare the forwards before the first step, and the reference after it.

        Args:
            start: What `given_model` returned.
        """
        self.numbers = NumbersCallback(self, start)
        self.add_callback(self.numbers)

    @functools.cached_property
    def _takes_positions(self) -> bool:
        """Return whether the policy gets the position of each token; a model for images counts by itself."""
        return not self._is_vlm and takes_positions(self.model)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run TRL's forward through a `CompletionForward`: on the tokens that count, and with the values kept."""
        forward = model if isinstance(model, CompletionForward) else self._completion_forward(model, logits_to_keep)
        given = (input_ids, attention_mask, logits_to_keep)
        # A micro-batch of the update is cut already. Images are stored in the order of the rows. Parts give no
        # entropies; TRL asks for none in a rollout.
        if batch_size is None or self._is_vlm or kwargs.get("compute_entropy"):
            results = super()._get_per_token_logps_and_entropies(forward, *given, batch_size, **kwargs)
            forward.finish(results[0])
        else:
            results = self._forward_in_parts(forward, *given, batch_size, **kwargs)
        if model is self.model and self.rollout is not None and not self.rollout.has("first_forward"):
            self.rollout.first_forward = forward
        return results

    def _forward_in_parts(
        self,
        forward: CompletionForward,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int,
        **kwargs: Any,
    ) -> tuple[Tensor, None, None]:
        """Run TRL's forward without gradient and entropies, in parts that compute little padding."""
        columns = forward.columns_of(attention_mask).cpu()  # one wait for the device
        parts = cut_rows(columns, rows_without_gradient(batch_size, input_ids.device))
        logps, forward.with_entropy = [], False
        for rows in parts:
            forward.columns = columns[rows].amax(dim=0).tolist()
            given = (input_ids[rows], attention_mask[rows], logits_to_keep)
            logps.append(super()._get_per_token_logps_and_entropies(forward, *given, **kwargs)[0])
        return forward.finish(torch.cat(logps), torch.cat(parts).argsort()), None, None

    def _completion_forward(
        self, model: Any, completion_length: int, columns: tuple[int, int] | None = None, *, own_head: bool = True
    ) -> CompletionForward:
        return CompletionForward(
            model,
            completion_length,
            pad_to_multiple_of=self.pad_to_multiple_of,
            takes_positions=self._takes_positions,
            columns=columns,
            own_head=own_head,
            keep_states=self.args.kl_estimator == "full" and not torch.is_grad_enabled(),
        )

    def _forward(self, model: Any, batch: dict[str, Any]) -> CompletionForward:
        """Run a model over a whole rollout, without gradient, as TRL does."""
        args = self.args
        batch_size = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
        with torch.no_grad(), disable_gradient_checkpointing(self.model, args.gradient_checkpointing_kwargs):
            forward = self._completion_forward(model, batch["completion_ids"].size(1))
            self._get_per_token_logps_and_entropies(
                forward,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                batch["completion_ids"].size(1),
                batch_size,
                **{key: batch[key] for key in IMAGE_ARGUMENTS if key in batch},
            )
        return forward

    @contextmanager
    def _as_reference(self) -> Iterator[Any]:
        """Give the network of the reference: a frozen copy, or the policy without its adapter."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        policy = self.accelerator.unwrap_model(self.model)
        with use_adapter(policy, REFERENCE_ADAPTER if REFERENCE_ADAPTER in policy.peft_config else None):
            yield self.model

    def _reference_logps(self, batch: dict[str, Any]) -> Tensor:
        """Return the reference's log-probabilities of a rollout, `(B, T)`; TRL has them if its own KL term is on."""
        if "ref_per_token_logps" in batch:
            return batch["ref_per_token_logps"]
        with self._as_reference() as model:
            forward = self._forward(model, batch)
        if forward.keep_states and self.rollout is not None and not self.rollout.has("reference_forward"):
            self.rollout.reference_forward = forward
        return forward.per_token_logps

    def _full_kl(self, policy: CompletionForward, rollout: Rollout, batch: dict[str, Any]) -> Tensor | None:
        """Return the KL over the vocabulary at the policy's own tokens, nats, `(B, T)`, with `kl_estimator: full`."""
        if not policy.keep_states:
            return None

        def through_head(model: Any, states: Tensor) -> Tensor:
            with self.accelerator.autocast():
                return causal_lm(self.accelerator.unwrap_model(model)).get_output_embeddings()(states)

        def of_reference(states: Tensor) -> Tensor:
            with self._as_reference() as model:
                return through_head(model, states)

        sides = (
            Side(policy, functools.partial(through_head, self.model)),
            Side(rollout.reference_forward, of_reference),
        )
        vocabulary = self.accelerator.unwrap_model(self.model).config.get_text_config().vocab_size
        own = loss_mask(batch["completion_mask"], batch)
        given = {"vocabulary": vocabulary, "temperature": self.temperature}
        kl = chunked_kl(*sides, batch["completion_ids"], own, **given)
        policy.forget_states()  # they are large, and nobody else reads them
        rollout.forget("reference_forward")
        return kl
