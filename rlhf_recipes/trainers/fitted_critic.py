"""A critic that is no part of the policy: it is fitted to the returns of each rollout, for several epochs.

It has an optimiser of its own. Each rank keeps a copy, and all ranks take the same steps.
"""

import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import mse_loss, pad
from torch.nn.utils.rnn import pad_sequence

from rlhf_recipes.algorithm.distributed import global_sum, of_first_rank
from rlhf_recipes.algorithm.value_head import ValueHead
from rlhf_recipes.durability.finite import all_finite
from rlhf_recipes.models.critic import seeded
from rlhf_recipes.options.critic import FITTED
from rlhf_recipes.options.ppo import PPOConfig
from rlhf_recipes.trainers.rollback import RollbackError
from rlhf_recipes.trainers.rollout import Rollout

MINI_BATCHES = 4  # per epoch
PRETRAINING_ROWS = 32  # per mini-batch
ADAPTER_RATE = 0.1  # learning rate of an adapter, as a share of the head's
FOLDER = "critic"  # beside the policy: what loads a model from all `*.safetensors` of its directory must not find it
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MiniBatch:
    """Rows of this rank that take one step together with those of the other ranks.

    Args:
        rows: What the critic reads of each row.
        keep: Tokens of each row that train, `(t,)`.
        targets: Returns of these tokens, one tensor per row.
        count: Number of these tokens on all ranks.
    """

    rows: list[Any]
    keep: list[Tensor]
    targets: list[Tensor]
    count: float


class FittedCritic(ABC):
    """Estimate the value of states by a head, and perhaps an adapter, that only this critic uses.

    A row is what the critic reads of a prompt and its completion of t tokens. Its length is t + 1: it has a state
    before each token and one after the last.

    Args:
        args: Options.
        hidden_size: Width of the states, H.
        device: Device of the head.
        adapter: Other weights that it trains, by name.
        rewards: Identity of the rewards and of the scale of their returns. A critic that was saved with another one
            does not fit.
    """

    kind: ClassVar[str]  # value of `critic`
    pretraining_epochs: ClassVar[int] = 10
    bytes_per_token: int = 0  # memory of what it keeps of a rollout until it is fitted

    def __init__(
        self,
        args: PPOConfig,
        hidden_size: int,
        device: torch.device,
        *,
        adapter: Mapping[str, nn.Parameter] = MappingProxyType({}),
        rewards: str = "",
    ) -> None:
        with seeded(args.seed):
            head = ValueHead(hidden_size, args.value_head_size, args.value_head_activation)
        self.head, self.adapter, self.epochs, self.rewards = head.to(device), adapter, args.critic_epochs, rewards
        rate: Any = args.value_head_learning_rate
        groups = [{"params": list(self.head.parameters()), "lr": rate}]
        if adapter:
            groups.append({"params": list(adapter.values()), "lr": ADAPTER_RATE * rate})
        self.optimizer = torch.optim.Adam(groups, lr=rate, eps=1e-6)

    @abstractmethod
    def rows(self, rollout: Rollout, batch: dict[str, Any]) -> list[Any]:
        """Return what the critic reads of each completion of a rollout.

        Args:
            rollout: Rollout whose answers are scored.
            batch: TRL's batch of tokens.
        """

    @abstractmethod
    def read_answers(self, scorer: Any, prompts: list[Any], answers: list[Any]) -> tuple[list[float], list[Any]]:
        """Return the scores of finished answers, and the rows that the critic reads of them."""

    @abstractmethod
    def _values(self, rows: list[Any]) -> list[Tensor]:
        """Return the values of the states of each row, `(t + 1,)`."""

    @abstractmethod
    def _backward(self, batch: MiniBatch) -> None:
        """Add the gradient of a mini-batch, by `_add_gradient`."""

    def figures(self, rows: list[Any]) -> dict[str, float]:
        """Return figures for the log."""
        return {}

    def _is_readable(self, row: Any) -> Any:
        """Return whether the critic can be fitted to a row."""
        return True

    @property
    def weights(self) -> list[nn.Parameter]:
        """Return all weights that it trains."""
        return [*self.head.parameters(), *self.adapter.values()]

    @torch.no_grad()
    def values(self, rows: list[Any], length: int) -> Tensor:
        """Return the values of the states around each token, `(B, T + 1)`, 0 in the padding.

        Args:
            rows: Result of `rows`.
            length: Number of columns of the completions, T.
        """
        # A reward model may fail on a row that another reward scores.
        values = pad_sequence(self._values(rows), batch_first=True).nan_to_num()
        return pad(values, (0, length + 1 - values.size(1)))

    def fit(self, rows: list[Any], returns: Tensor, mask: Tensor, *, first_row: int = 0, step: int = 0) -> None:
        """Fit the critic to the returns of a rollout. Every rank must call this.

        Args:
            rows: Result of `rows`.
            returns: Targets, `(B, T)`.
            mask: Tokens that train, `(B, T)`.
            first_row: Number of this rank's first row in the rollout of all ranks.
            step: Optimiser steps of the policy so far.

        Raises:
            RollbackError: If the critic is not finite afterwards.
        """
        self._take_steps(self._mini_batches(rows, returns, mask, MINI_BATCHES, first_row), self.epochs, step)

    def pretrain(
        self, scorer: Any, dataset: Any, scale: Callable[[Tensor], Tensor], *, rank: int = 0, ranks: int = 1
    ) -> None:
        """Fit the critic to answers that exist already: the score of an answer is the target of all of its states.

        Every rank scores all answers, because their mean and deviation give the scale. It is fitted to its own share.

        Args:
            scorer: Reward model in this process.
            dataset: `prompt`, `chosen` and `rejected`.
            scale: Brings the scores of the answers, each `chosen` before its `rejected`, to the scale of the returns.
            rank: Number of this rank.
            ranks: Number of ranks.

        Raises:
            RollbackError: If the critic is not finite afterwards.
        """
        prompts = [prompt for prompt in dataset["prompt"] for _ in range(2)]
        answers = [answer for pair in zip(dataset["chosen"], dataset["rejected"], strict=True) for answer in pair]
        scores, rows = self.read_answers(scorer, prompts, answers)
        targets = scale(torch.tensor(scores, device=self.weights[0].device))
        lengths = torch.tensor([len(row) - 1 for row in rows], device=targets.device)
        mask = torch.arange(int(lengths.max()), device=targets.device) < lengths.unsqueeze(1)
        returns = targets.unsqueeze(1).expand(mask.shape)
        count = -(-len(rows) // PRETRAINING_ROWS)
        share = -(-len(rows) // ranks)
        own = slice(rank * share, (rank + 1) * share)
        batches = self._mini_batches(rows[own], returns[own], mask[own], count, first_row=rank * share)
        self._take_steps(batches, self.pretraining_epochs, step=0)

    def _take_steps(self, batches: list[MiniBatch], epochs: int, step: int) -> None:
        for batch in itertools.chain(*itertools.repeat(batches, epochs)):
            self._step(batch)
        moments = (value for state in self.optimizer.state.values() for value in state.values())
        if not all_finite([*self.weights, *moments]):
            reason = f"Step {step}: the critic of `critic: {self.kind}` is not finite after it was fitted."
            raise RollbackError(reason, "Lower `value_head_learning_rate`.", step)

    def _step(self, batch: MiniBatch) -> None:
        """Take one step on a mini-batch that all ranks share."""
        with torch.enable_grad():
            self._backward(batch)
        weights = self.weights  # a rank without a row has no gradient
        own = [torch.zeros_like(x) if x.grad is None else x.grad for x in weights]
        total = global_sum(torch.cat([gradient.flatten() for gradient in own]))
        for weight, gradient in zip(weights, total.split([x.numel() for x in weights]), strict=True):
            weight.grad = gradient.view_as(weight)
        self.optimizer.step()
        self.optimizer.zero_grad()  # an adapter is in the policy's network, whose gradients are clipped together

    def _add_gradient(self, values: Tensor, targets: Tensor, count: float) -> None:
        """Add the gradient of the mean squared error, given a part of its `count` values."""
        (mse_loss(values, targets, reduction="sum") / max(count, 1.0)).backward()  # type: ignore[no-untyped-call]

    def _mini_batches(
        self, rows: Sequence[Any], returns: Tensor, mask: Tensor, count: int, first_row: int
    ) -> list[MiniBatch]:
        """Return `count` mini-batches.

        The rows are dealt out by their number in the whole rollout, so the mini-batches do not depend on the number of
        ranks. A rank can have no row of a mini-batch, and takes part in its step all the same.
        """
        batches = []
        for number in range(count):
            own = range((number - first_row) % count, len(rows), count)
            keep = [
                mask[i, : len(rows[i]) - 1].bool() & returns[i].isfinite().all() & self._is_readable(rows[i])
                for i in own
            ]
            targets = [returns[i, : len(kept)][kept] for i, kept in zip(own, keep, strict=True)]
            batches.append(([rows[i] for i in own], keep, targets))
        sizes = [float(sum(map(len, targets))) for _, _, targets in batches]
        totals = global_sum(torch.tensor(sizes, device=returns.device)).tolist()
        return [MiniBatch(*batch, total) for batch, total in zip(batches, totals, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Return weights and optimiser."""
        adapter = {"adapter": {name: x.detach() for name, x in self.adapter.items()}} if self.adapter else {}
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()} | adapter

    def restore(self, state: dict[str, Any] | None) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: If the checkpoint had no such critic, or one of another shape.
        """
        if state is None or state.keys() != self.state_dict().keys():
            raise ValueError(
                f"The checkpoint holds no critic of `critic: {self.kind}`: resume with the `critic` of its run."
            )
        if not self._fits(state["head"], state.get("adapter", {})):
            raise ValueError("The checkpoint has a critic of another shape: resume with the options of its run.")
        self._load(state["head"], state.get("adapter", {}))
        self.optimizer.load_state_dict(state["optimizer"])

    def _fits(self, head: dict[str, Tensor], adapter: dict[str, Tensor]) -> bool:
        """Return whether weights have the names and shapes of this critic's."""
        return shapes(head) == shapes(self.head.state_dict()) and shapes(adapter) == shapes(self.adapter)

    @torch.no_grad()
    def _load(self, head: dict[str, Tensor], adapter: dict[str, Tensor]) -> None:
        self.head.load_state_dict(head)
        for name, weight in self.adapter.items():
            weight.copy_(adapter[name])

    def _file(self, directory: str | Path) -> Path:
        return Path(directory, FOLDER, f"{self.kind}.safetensors")

    def save(self, directory: str | Path) -> None:
        """Write the weights beside a policy, for a later run, in place of a critic of another kind."""
        path = self._file(directory)
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = {"head": self.head.state_dict(), "adapter": self.adapter}
        named = {f"{part}.{name}": x.detach().contiguous() for part, own in parts.items() for name, x in own.items()}
        save_file(named, path, metadata={"rewards": self.rewards})
        for kind in {*FITTED} - {self.kind}:
            path.with_name(f"{kind}.safetensors").unlink(missing_ok=True)

    @torch.no_grad()
    def load(self, directory: str, *, reads: bool = True) -> bool:
        """Load what `save` wrote, and return whether there was a critic of this kind for the same rewards.

        Every rank must call this. The first one reads the file for all: a disk may belong to one node.

        Args:
            directory: Directory of a policy, or "".
            reads: Whether this is the first rank.

        Raises:
            ValueError: If it has another shape.
        """
        path, device = self._file(directory), self.weights[0].device
        parts = read_weights(path, self.rewards, device) if reads and directory and path.is_file() else None
        fits = parts is not None and self._fits(**parts)
        status = torch.tensor([parts is not None, fits], dtype=torch.float32, device=device)
        found, fits_first = of_first_rank(status).tolist()
        if found and not fits_first:
            raise ValueError(
                f"{path} has a critic of another shape. Set `value_head_size` and the adapter as in the run that "
                "wrote it, or remove the file."
            )
        if parts is not None:
            self._load(**parts)
        if found:
            for weight in self.weights:
                weight.copy_(of_first_rank(weight))
        return bool(found)


def read_weights(path: Path, rewards: str, device: torch.device) -> dict[str, dict[str, Tensor]] | None:
    """Return head and adapter of a file for these rewards, and say in the log whether the critic starts with them."""
    with safe_open(path, "pt", device=str(device)) as file:
        if (file.metadata() or {}).get("rewards") != rewards:
            logger.warning(f"The critic of {path} is not used: its run had other rewards, or scaled them otherwise.")
            return None
        parts: dict[str, dict[str, Tensor]] = {"head": {}, "adapter": {}}
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            part, _, own_name = name.partition(".")
            parts[part][own_name] = file.get_tensor(name)
    logger.info(f"The critic starts with the weights of {path}.")
    return parts


def shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Return the shape of each weight, by name."""
    return {name: x.shape for name, x in weights.items()}
