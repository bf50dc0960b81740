"""Train, log, evaluate, save and resume a policy that carries a value head.

Overrides only, on `trl.GRPOTrainer`; rollout and update are in `trainers/ppo.py`. A checkpoint holds everything that a
run needs to continue as if it had not been interrupted, also in the middle of a rollout.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from trl import GRPOTrainer

from rlhf_recipes.algorithm.value_head import ValueHead
from rlhf_recipes.models.critic import save_value_head, trained_value_head, without_value_head
from rlhf_recipes.models.loading import only_active_adapter
from rlhf_recipes.trainers.compared import RolloutTrainer
from rlhf_recipes.trainers.guard import TrainingGuard
from rlhf_recipes.trainers.rollback import RollbackError
from rlhf_recipes.trainers.update import TOKEN_MEANS, read_means


def set_learning_rate(optimizer: Optimizer, head: ValueHead, learning_rate: float) -> None:
    """Give the head's parameters a learning rate of their own, in an optimiser that has not stepped yet."""
    of_head = {id(parameter) for parameter in head.parameters()}
    for group in list(optimizer.param_groups):
        parameters = group["params"]
        group["params"] = [parameter for parameter in parameters if id(parameter) not in of_head]
        split = {**group, "params": [parameter for parameter in parameters if id(parameter) in of_head]}
        if not group["params"]:  # DeepSpeed takes no empty group
            group.update(params=parameters, lr=learning_rate)
        elif split["params"]:
            optimizer.add_param_group({**split, "lr": learning_rate})


class ValueHeadTrainer(RolloutTrainer, GRPOTrainer):
    """Treat a value head as part of the training, but not of the policy that is sampled from and saved.

    A subclass sets the attributes declared here before it trains.
    """

    guard: TrainingGuard
    _unread: tuple[dict[str, torch.Tensor], ...] = ()  # metrics of the micro-batches of this optimiser step

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as transformers does. After a `RollbackError`, go back to a checkpoint and train again from there."""
        while True:
            self._unread = ()  # an interrupted step leaves its figures
            try:
                return super().train(resume_from_checkpoint, *args, **kwargs)
            except RollbackError as error:
                reason = error.with_traceback(None)  # the traceback holds the tensors of the attempt
            resume_from_checkpoint = self.guard.roll_back(reason)
            self._step, self._buffered_inputs = 0, None
            self._metrics["train"].clear()

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Train on a micro-batch. If the guard has stopped its rollout, only count it."""
        if self.guard.rollback.is_pending:
            self._buffered_inputs = None  # the rollout may be the cause
        uses = self.args.steps_per_generation * self.num_iterations
        self.guard.begin_step(starts_rollout=self._step % uses == 0 or self._buffered_inputs is None)
        if not self.guard.has_stopped:
            return super().training_step(model, inputs, num_items_in_batch)
        self._step += 1
        return torch.zeros((), device=self.args.device)

    def note_update(self, sums: dict[str, torch.Tensor]) -> None:
        """Note the metrics of a micro-batch, and log those of a whole optimiser step with one wait for the device.

        TRL's own figures wait for the device in every micro-batch (`GRPOTrainer._compute_loss`).

        Args:
            sums: Metrics as `critic_loss` returns them.
        """
        is_training = self.model.training
        unread = (*self._unread, sums) if is_training else (sums,)
        if is_training:
            self._unread = () if self.accelerator.sync_gradients else unread
            if self._unread:
                return
        own = [name for name in TOKEN_MEANS if name in self._metrics["train" if is_training else "eval"]]
        for count, means in read_means(unread):
            self._log_metrics(means)
            self._log_counts(count, [*means, *own])
            if is_training:
                self.guard.observe_update(count, {name: count * mean for name, mean in means.items()})

    def finish_step(self, model: nn.Module, grad_norm: Any) -> None:
        """Let the guard decide on an optimiser step. It leaves out more steps, and can go back."""
        self.guard.finish_step(model, grad_norm, self.state.global_step)

    def diverged(self, reason: str, advice: str, latest: int) -> Exception:
        """Return the error that lets the run go back."""
        return RollbackError(reason, advice, latest)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Give the value head its own learning rate, unless the user has passed an optimiser."""
        if self.optimizer is None:
            optimizer = super().create_optimizer(model)
            if self.args.critic != "policy":
                return optimizer
            set_learning_rate(optimizer, trained_value_head(model or self.model), self.args.value_head_learning_rate)
        return self.optimizer

    def _generate(self, prompts: list[Any]) -> Any:
        with without_value_head(self.model):  # vLLM must get a plain policy
            return super()._generate(prompts)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the figures of training what the guard has done."""
        if self.model.training and "loss" in logs:
            self._log_metrics(self.guard.metrics())
        super().log(logs, start_time)

    def _log_advantages(self, mean_advantages: torch.Tensor) -> None:
        """Replace GRPO's advantages, which do not train, in TRL's log, and drop its statistic of groups."""
        self._metrics["train" if self.model.training else "eval"].pop("frac_reward_zero_std", None)
        advantages = self.accelerator.gather(mean_advantages).tolist()
        log = self._logs["advantages"]  # keeps one rollout: a larger evaluation batch loses its first rows
        for _ in range(min(len(log), len(advantages))):
            log.pop()
        log.extend(advantages)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a plain policy with the value head beside it; checkpoints carry the head inside."""
        with only_active_adapter(self.model):
            if _internal_call:
                super().save_model(output_dir, _internal_call=True)
                return
            with without_value_head(self.model):
                super().save_model(output_dir)
        if self.args.critic != "policy":
            return
        save_value_head(self.model, output_dir or self.args.output_dir, should_save=self.args.should_save)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push a plain policy. The value head and every other critic stay in `output_dir`."""
        with without_value_head(self.model):
            return super().push_to_hub(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.guard.rollback.after_loading(
                self.optimizer, self.lr_scheduler, Path(checkpoint), self.state.global_step
            )
