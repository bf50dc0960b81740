"""From a micro-batch to the loss of the critic, and the figures of an update.

The policy's loss is TRL's: `PPOTrainer._compute_loss` adds the two. Every rank must make each call.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor

from rlhf_recipes.algorithm.distributed import global_sum
from rlhf_recipes.algorithm.kl import estimate_kl
from rlhf_recipes.algorithm.losses import MEANS_OVER_ROWS, is_value_clipped, per_token_value_loss
from rlhf_recipes.algorithm.masked import masked_sum
from rlhf_recipes.algorithm.micro_batches import cut_together
from rlhf_recipes.models.forward import CompletionForward, needed_columns
from rlhf_recipes.options.baselines import rollout_steps
from rlhf_recipes.trainers.rollout import loss_mask

# Means of TRL over the tokens of a micro-batch, if they are logged.
TOKEN_MEANS = ("entropy", "kl", *(f"clip_ratio/{kind}_mean" for kind in ("low", "high", "region")))
COUNT_OF = "count of "  # marks the number of tokens or completions behind a mean that waits for the next log


@dataclass(frozen=True)
class MicroBatch:
    """The current policy and critic beside those of the rollout; `(B, T)`, except `rollout_tokens`.

    Args:
        per_token_logps: Log-probabilities of the current policy, without their graph.
        old_per_token_logps: Log-probabilities of the policy that sampled.
        old_values: Values of the critic at that time.
        returns: Targets of the critic.
        advantages: Advantages of the rollout.
        mask: 1 = trains.
        rollout_tokens: Number of tokens of the rollout that train, on all ranks; a scalar.
        values: Values of the current critic; differentiated. `None` if it is not trained with the policy.
    """

    per_token_logps: Tensor
    old_per_token_logps: Tensor
    old_values: Tensor
    returns: Tensor
    advantages: Tensor
    mask: Tensor
    rollout_tokens: Tensor
    values: Tensor | None = None

    @classmethod
    def of(cls, forward: CompletionForward, inputs: dict[str, Any], *, has_value_head: bool = True) -> "MicroBatch":
        """Join the forward of an update with the columns of `Rollout.columns`."""
        mask = loss_mask(inputs["completion_mask"], inputs)
        critic = {"old_values": inputs["old_values"], "returns": inputs["returns"]}
        if has_value_head:
            critic["values"] = forward.state_values[:, :-1]
        return cls(
            per_token_logps=forward.per_token_logps.detach(),
            old_per_token_logps=inputs["old_per_token_logps"],
            advantages=inputs["advantages"],
            mask=mask,
            rollout_tokens=inputs["num_items_in_batch"],
            # The fill comes before the square: padding must not reach the gradient.
            **{name: x.masked_fill(mask == 0, 0) for name, x in critic.items()},
        )


def critic_loss(
    batch: MicroBatch,
    average: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    inside: Tensor,
    cliprange: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the value loss, and the metrics of the update: the number of tokens under "", and sums over the tokens.

    Args:
        batch: Rows of one process.
        average: Averages a token loss `(B, T)` like TRL's policy loss, given the mask and `rollout_tokens`.
        inside: 1 for a token that the trust region lets train, `(B, T)`.
        cliprange: Largest change of a value without a clip.
    """
    loss = torch.zeros((), device=batch.mask.device)
    measured = {
        "": torch.ones_like(inside),
        "policy/approx_kl": estimate_kl(batch.old_per_token_logps, batch.per_token_logps, "k3"),
        "policy/clip_fraction": 1 - inside,
    }
    if batch.values is not None:
        token_loss = per_token_value_loss(batch.values, batch.old_values, batch.returns, cliprange=cliprange)
        loss = average(token_loss, batch.mask, batch.rollout_tokens)
        clipped = is_value_clipped(batch.values.detach(), batch.old_values, cliprange=cliprange)
        measured |= {"loss/value": token_loss.detach(), "val/clip_fraction": clipped}
    return loss, {name: masked_sum(x.float(), batch.mask) for name, x in measured.items()}


def read_means(sums: Sequence[dict[str, Tensor]]) -> list[tuple[float, dict[str, float]]]:
    """Return for each micro-batch its number of tokens on all ranks, and its means over them.

    This costs one reduction and one wait for the device for all micro-batches together.

    Args:
        sums: Metrics of each micro-batch on this rank, as `critic_loss` returns them.
    """
    totals = global_sum(torch.stack([torch.stack(list(of_batch.values())) for of_batch in sums])).tolist()
    names = [name for name in sums[0] if name]
    return [
        (count, {name: total / max(count, 1.0) for name, total in zip(names, own, strict=True)})
        for count, *own in totals
    ]


def weigh_means(metrics: dict[str, list[float]]) -> None:
    """Replace the means that have counts beside them by their mean over all that was counted, in place.

    A mean that is not a number does not count. Without any other, the result is not a number; over nothing, it is 0.

    Args:
        metrics: Figures since the latest log by name, and the counts of a figure by `COUNT_OF` and its name.
    """
    for key in [name for name in metrics if name.startswith(COUNT_OF)]:
        name, counts = key.removeprefix(COUNT_OF), metrics.pop(key)
        # A checkpoint of an earlier version has means without their counts in front.
        known = [pair for pair in zip(metrics[name][-len(counts) :], counts, strict=True) if not math.isnan(pair[0])]
        total = sum(mean * count for mean, count in known)
        metrics[name] = [total / max(sum(count for _, count in known), 1.0) if known else math.nan]


def group_by_length(
    micro_batches: list[dict[str, Any]], window: int, pad_to_multiple_of: int | None = None
) -> list[dict[str, Any]]:
    """Cut the rows of each optimiser step into micro-batches anew, so that each needs little padding.

    A step keeps its rows and its number of micro-batches, which differ in their number of rows. On all ranks the same
    micro-batch has the same number of rows, because TRL gathers its figures by row. The gradient of a step stays the
    same: `PPOConfig` admits losses that are sums, and means over rows, which `row_share` weighs. The new entries of a
    micro-batch are Python numbers, so that no forward waits for the device.

    Args:
        micro_batches: Micro-batches of one rollout, all of one size, in the order of training.
        window: Number of micro-batches per optimiser step.
        pad_to_multiple_of: Argument of `CompletionForward`.
    """
    prompts, completions = (torch.cat([x[f"{part}_mask"] for x in micro_batches]) for part in ("prompt", "completion"))
    state, size = PartialState(), len(micro_batches[0]["completion_mask"])
    columns = gather(needed_columns(prompts, completions, pad_to_multiple_of or 1)).cpu()  # one wait for the device
    columns, rank = columns.view(state.num_processes, -1, 2), state.process_index
    grouped = []
    for start in range(0, len(micro_batches), window):
        step, needed = micro_batches[start : start + window], columns[:, start * size : (start + window) * size]
        names = [name for name, x in step[0].items() if isinstance(x, Tensor) and x.ndim > 0]
        rows = {name: torch.cat([batch[name] for batch in step]) for name in names}
        for batch, parts in zip(step, cut_together(needed, size), strict=True):
            part = parts[rank]
            longest = tuple(needed[rank, part].amax(dim=0).tolist())
            own = {"columns": longest, "row_share": len(part) / size, "window": window}
            grouped.append({**batch, **{name: x[part] for name, x in rows.items()}, **own})
    return grouped


def row_weight(micro_batch: dict[str, Any], loss_type: str, window: int) -> float:
    """Return the weight of a micro-batch in the loss of its optimiser step.

    A checkpoint of an earlier version holds equal micro-batches, and so does a rollout that is not cut anew. After a
    resume with another number of micro-batches per step, the steps have other rows, and all of these count the same.

    Args:
        micro_batch: Micro-batch of `group_by_length`, or of TRL.
        loss_type: Kind of average.
        window: Number of micro-batches per optimiser step.
    """
    is_cut = loss_type in MEANS_OVER_ROWS and micro_batch.get("window") == window
    return micro_batch["row_share"] if is_cut else 1.0


def episodes(step: int, args: Any) -> int:
    """Return how many completions all ranks have sampled at the end of a step. A started rollout counts in full."""
    return math.ceil(step / rollout_steps(args)) * args.generation_batch_size
