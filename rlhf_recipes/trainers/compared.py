"""Compare the policy in training with the policy that it started from, and keep what a resume needs for that.

Mixins for TRL's trainers, of overrides. A subclass calls `prepare_rewards` before it trains.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS
from trl.trainer.utils import RepeatSampler

from rlhf_recipes.algorithm.heads import combine_heads
from rlhf_recipes.console import visible_tables
from rlhf_recipes.data.messages import ends_in_prefill
from rlhf_recipes.data.rendering import prompt_ids
from rlhf_recipes.data.rows import check_reward_columns
from rlhf_recipes.durability.state import PROGRESS_FILE, STATE_FILE, Stateful, load_ppo_state, save_ppo_state
from rlhf_recipes.evaluation.held_out import HeldOutComparison, own_randomness
from rlhf_recipes.evaluation.samples import write_evaluation, write_table
from rlhf_recipes.models.critic import causal_lm
from rlhf_recipes.models.forward import keep_out_of_autocast, rows_without_gradient
from rlhf_recipes.models.generation import check_static_cache, merged_config, plain_output
from rlhf_recipes.models.loading import mixed_precision, prepare_frozen
from rlhf_recipes.models.sampling import thrifty_sampling
from rlhf_recipes.options.followed_rewards import FollowedRewardConfig
from rlhf_recipes.options.given import GivenInputs
from rlhf_recipes.preflight.policy import check_ends, warn_of_sampling
from rlhf_recipes.rewards.calls import RewardCalls
from rlhf_recipes.rewards.context import check_context
from rlhf_recipes.rewards.functions import distinct_names
from rlhf_recipes.rewards.protocol import Scorer, ScoringRun, scorer_of
from rlhf_recipes.trainers.saving import SavingTrainer
from rlhf_recipes.trainers.update import COUNT_OF, episodes, weigh_means


class ComparedTrainer(SavingTrainer):
    """Compare the policy with the one that training started from, after every evaluation of TRL.

    A subclass sets the attributes declared here before it trains.
    """

    held_out: HeldOutComparison
    reward_calls: RewardCalls
    scorers: list[Scorer]
    reward_func_names: list[str] = []  # TRL's, in its logs
    _metrics: Any  # TRL's: figures since the latest log
    _stateful: dict[str, Stateful]  # by its name in a checkpoint
    _state_file = STATE_FILE

    def prepare_rewards(
        self,
        functions: list[Any],
        limits: FollowedRewardConfig,
        eos_token_ids: list[int],
        judges: dict[str, Callable[..., Any]] | None,
        pairwise_judges: dict[str, Callable[..., Any]] | None,
    ) -> list[Any]:
        """Prepare reward functions and judges. Return the functions with time limits and retries.

        Args:
            functions: Reward functions and scorers.
            limits: Limits of the calls, and the rule for several heads.
            eos_token_ids: Ids that end a completion.
            judges: Functions that score the answers of an evaluation, by name.
            pairwise_judges: Functions that compare two answers, by name.

        Raises:
            ValueError: If a column has the name of an argument of theirs.
        """
        sees_images = hasattr(self.processing_class, "tokenizer")  # a processor holds a tokenizer
        check_reward_columns(self.train_dataset, "train_dataset", sees_images=sees_images)
        check_reward_columns(self.eval_dataset, "eval_dataset", pairs=bool(pairwise_judges), sees_images=sees_images)
        own = (limits.reward_timeout, limits.reward_retries, limits.failed_rewards)
        self.reward_calls = RewardCalls(*own)
        self.held_out = HeldOutComparison(judges, pairwise_judges, seed=self.args.seed, calls=RewardCalls(*own))
        self.scorers = [scorer_of(function) for function in functions]
        self.reward_func_names = distinct_names(self.reward_func_names)
        run = ScoringRun(
            policy=self.model,
            policy_eos_token_ids=eos_token_ids,
            batch_size=rows_without_gradient(self.args.per_device_train_batch_size, self.accelerator.device),
            timeout=limits.reward_timeout,
            prepare_frozen=functools.partial(prepare_frozen, accelerator=self.accelerator),
        )
        rule = functools.partial(combine_heads, rule=limits.reward_heads, coef=limits.reward_heads_coef)
        for scorer in self.scorers:
            scorer.prepare(replace(run, combine=rule))
        for judge in map(scorer_of, self.held_out.judges.values()):
            judge.prepare(run)
        self._check_context(limits.reward_overflow)
        return [self.reward_calls.guard(function) for function in functions]

    def _check_context(self, reward_overflow: str) -> None:
        held_out, length = {"eval_dataset": self.eval_dataset}, self.args.max_completion_length
        check_context(self.scorers, {"train_dataset": self.train_dataset} | held_out, length, reward_overflow)
        check_context(self.held_out.judges.values(), held_out, length, reward_overflow)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as TRL does, and compare with the policy that training started from."""
        seed = self.args.seed + self.accelerator.process_index  # samples of one prompt on two ranks must differ
        with own_randomness(seed, self.accelerator.device):
            output = super().evaluation_loop(*args, **kwargs)
            self.answer_held_out()
        metrics, rows = self.held_out.finish(is_start=self.state.global_step == 0)
        if self.args.should_save:
            write_evaluation(rows, self.args.output_dir, self.state.global_step)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in metrics.items()})
        return output

    @property
    def given(self) -> GivenInputs:
        """Add the rewards."""
        sources = [getattr(scorer, "source", None) for scorer in self.scorers]
        paths = [x if isinstance(x, str) else x.config._name_or_path for x in sources if x is not None]
        functions = [scorer.origin for scorer in self.scorers if scorer.origin]
        return replace(super().given, reward_model_path=next(iter(paths), None), reward_functions=functions)

    def conclude(self) -> dict[str, float]:
        """Save also the state of the trainer, with the figures of the whole run."""
        figures = super().conclude()
        self.save_state()
        return figures

    def answer_held_out(self) -> None:
        """Answer the held-out prompts. The trainers that sample have done it in TRL's evaluation."""

    def card_facts(self) -> dict[str, str]:
        """Add the rewards and the judges to the card."""
        named = getattr((self._named or (None,))[0], "reward_model_path", None)
        places = [getattr(scorer, "source", None) for scorer in self.scorers]
        if places and named is not None:
            places[:1] = [named]  # a recipe gives the reward model of this option first
        facts = {f"reward `{s.__name__}`": _quality(s, place) for s, place in zip(self.scorers, places, strict=True)}
        judges = ", ".join(f"`{name}`" for name in (*self.held_out.judges, *self.held_out.pairwise_judges))
        return super().card_facts() | facts | ({"judges, not trained on": judges} if judges else {})

    def _log_metrics(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)

    def _log_counts(self, count: float, names: Iterable[str]) -> None:
        """Log how many tokens or completions of all ranks are behind the means that were just logged.

        The log weighs the means by these numbers. Without them, each has the same weight.
        """
        self._log_metrics({f"{COUNT_OF}{name}": count for name in names})

    def _save_progress(self, folder: Path) -> None:
        super()._save_progress(folder)
        if self.args.should_save:
            save_ppo_state(folder, self._stateful, self._state_file)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        load_ppo_state(Path(checkpoint), self._stateful, self._state_file)
        if self.args.eval_strategy != "no":
            self.held_out.check_baseline(checkpoint)


def _quality(scorer: Scorer, source: Any) -> str:
    """Return what is known about a reward: the place and the card of a reward model.

    Args:
        scorer: Scorer of the reward.
        source: Its path or address, or the model in memory that became the scorer.
    """
    card = scorer.card
    if card is None:
        return f"function `{scorer.origin}`" if scorer.origin else "no card"
    known = {"accuracy": card.eval_accuracy, "calibration error": card.calibration_error}
    figures = ", ".join(f"{name} {value:.3g}" for name, value in known.items() if value is not None)
    place = f"`{source}`, " if isinstance(source, str) else ""
    return f"reward model {place}trained from `{card.base_model}`; on its own evaluation: {figures or 'not evaluated'}"


class RolloutTrainer(ComparedTrainer):
    """Resume inside a rollout, and in later epochs with the same order of the data, which TRL loses."""

    rows_at_once: int | None = None  # completions that are sampled together; `None`: as many as fit
    eos_token_ids: list[int]
    num_iterations: int
    log_completions: bool
    use_vllm: bool  # TRL's
    generation_config: Any  # TRL's, without vLLM
    _logs: Any  # TRL's
    chat_template_kwargs: dict[str, Any]  # TRL's
    _buffered_inputs: Any  # TRL's: the micro-batches of the current rollout
    _samples: list[dict[str, Any]]  # rows of the latest rollout
    _step: int
    _progress_file = PROGRESS_FILE
    _train_sampler: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.accelerator.is_main_process:
            warn_of_sampling(self)
        if getattr(self.args, "cast_lm_head_to_fp32", False):  # RLOO has no such option
            keep_out_of_autocast(causal_lm(self.model).lm_head)
        self._check_cache()

    def _check_cache(self) -> None:
        """Let `generate` compile if its cache has a fixed size, wherever that is set. vLLM has a cache of its own."""
        with plain_output(self.model):
            cache = None if self.use_vllm else merged_config(self.model, self.generation_config).cache_implementation
        if cache is not None and cache in ALL_STATIC_CACHE_IMPLEMENTATIONS:
            check_static_cache(self.model, cache, mixed_precision(self.args) if self.accelerator.native_amp else None)
            self.generation_config.disable_compile = False  # TRL switches it off, and compiling is what pays

    def _generate(self, prompts: list[Any]) -> Any:
        policy = self.accelerator.unwrap_model(self.model)
        # PEFT samples from the model inside, whose forward accelerate has not wrapped.
        sampling = thrifty_sampling(
            policy,
            rows_at_once=self.rows_at_once,
            fixed_draws=not self.model.training,  # an evaluation is compared with that of the start
            precision=self.accelerator.autocast,
        )
        with plain_output(policy), sampling:
            return super()._generate(prompts)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log TRL's figures. With those of training, log the number of completions so far, and write some of them."""
        if self.model.training and "loss" in logs:
            self._log_metrics({"episode": episodes(self.state.global_step, self.args)})
            if self.args.should_save and self._samples:
                write_table(self._samples, self.args.output_dir, "training", self.state.global_step)
        weigh_means(self._metrics["train" if self.model.training else "eval"])
        with visible_tables():  # TRL prints completions
            super().log(logs, start_time)

    def rendered(self, prompts: list[Any], tokenize: Callable[[list[Any]], Any]) -> Any:
        """Tokenise as TRL does, but continue a message of the assistant, and leave off an EOS that ends a prompt.

        Args:
            prompts: Text or messages.
            tokenize: TRL's method, which returns token ids, images and fields of a processor.
        """
        # A strict template refuses to begin an answer after the assistant's message.
        asked = [prompt[:-1] if ends_in_prefill(prompt) and len(prompt) > 1 else prompt for prompt in prompts]
        ids, images, fields = tokenize(asked)
        if hasattr(self.processing_class, "tokenizer") or vars(self).get("environment_factories") is not None:
            return ids, images, fields  # a processor of images; or tools that differ between rows
        return prompt_ids(self.processing_class, prompts, **self.template_options), images, fields

    @property
    def template_options(self) -> dict[str, Any]:
        """Return the options with which TRL renders prompts. Its RLOO has no tools."""
        own = {"tools": vars(self).get("tools") or None, "chat_template": vars(self).get("chat_template")}
        return own | self.chat_template_kwargs

    def _progress(self) -> dict[str, Any]:
        """Add this rank's share of the current rollout."""
        is_inside_rollout = self._step % (self.args.steps_per_generation * self.num_iterations) != 0
        return super()._progress() | {
            "step": self._step,
            "rollout": self._buffered_inputs if is_inside_rollout else None,
            "samples": self._samples,
            "completions": self._logged_completions(),
        }

    def _logged_completions(self) -> dict[str, Any] | None:
        """Return the rows of TRL's table of `log_completions`, but no images and no columns of the user's own."""
        logs = self._logs
        if not self.log_completions or logs["extra"] or hasattr(self.processing_class, "tokenizer"):
            return None
        rewards = {name: list(values) for name, values in logs["rewards"].items()}
        return {"rewards": rewards, **{name: list(logs[name]) for name in ("prompt", "completion", "advantages")}}

    def restore_progress(self) -> None:
        """Continue the rollout, too."""
        super().restore_progress()
        if self._resumed_from is None:
            return
        progress = self._saved_progress(self._resumed_from, self.accelerator.process_index)
        # With another number of processes the shares of the rollout differ: it is then sampled again.
        if progress.get("num_processes") == self.accelerator.num_processes:
            parts = (progress[name] for name in ("step", "rollout", "samples"))
            self._step, self._buffered_inputs, self._samples = parts
            table = dict(progress.get("completions") or {})
            for name, values in table.pop("rewards", {}).items():
                self._logs["rewards"][name].extend(values)
            for name, values in table.items():
                self._logs[name].extend(values)

    def check_start(self) -> None:
        """Check that an answer can end, too. A recipe has said it in its preflight."""
        super().check_start()
        check_ends(self.eos_token_ids, self.model.config, self.args)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        epochs_trained, steps_trained = super()._init_training_state(*args, **kwargs)
        if isinstance(self._train_sampler, RepeatSampler) and self._train_sampler.shuffle:
            for _ in range(epochs_trained):  # TRL shuffles by one generator for all epochs
                torch.randperm(self._train_sampler.num_samples, generator=self._train_sampler.generator)
        return epochs_trained, steps_trained

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler
