"""A trainer that pushes a model to the Hub, and that no failure of the Hub can end.

A mixin for TRL's trainers, of overrides of `transformers.Trainer`.
"""

import logging
import shlex
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub.utils import httpx
from torch import nn

from rlhf_recipes.durability.trainer import DurableTrainer
from rlhf_recipes.options.changes import with_changes
from rlhf_recipes.options.secrets import reason_of, without_secrets

# In `output_dir`, what the Hub gets. Samples, notes and checkpoints of the run are beside it and stay here.
PUSH_FOLDER = "_hub"
# A server that refuses or fails, a network that fails, and (the other two) huggingface_hub's answers to both.
HUB_ERRORS = (httpx.HTTPError, OSError, RuntimeError, ValueError)
REFUSALS = (400, 401, 403)  # these do not pass by themselves
logger = logging.getLogger(__name__)


class PushingTrainer(DurableTrainer):
    """Push the model, its tokenizer and its card from a folder of their own, and go on if the Hub fails.

    Only the main process pushes. After a failure the folder stays, and a warning says how to push it later.
    """

    hub_model_id: Any
    push_in_progress: Any = None  # transformers' uploads in the background
    _owes_repository = False  # the Hub could not be reached when it was to be created
    _owes_push = False  # of the checkpoint that is written
    _has_saved = False  # the model, in the push that runs

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository before the run. A Hub that cannot be reached is asked again with every push.

        Raises:
            ValueError: If the Hub refuses. Nothing has been trained yet.
        """
        error = self._create_repository(token, private)
        if error is None:
            return
        if (status := getattr(getattr(error, "response", None), "status_code", None)) in REFUSALS:
            raise ValueError(
                f"`push_to_hub`: the Hub refuses `hub_model_id` {self.hub_model_id} ({status}: {reason_of(error)}). "
                "Give a token that may write (`hf auth login`, or $HF_TOKEN), correct `hub_model_id`, or set "
                "`push_to_hub: false`."
            ) from error
        logger.warning(
            f"The Hub cannot be reached ({reason_of(error)}). The run goes on without it, and every push tries again."
        )

    def _create_repository(self, token: str | None = None, private: bool | None = None) -> Exception | None:
        """Create the repository if it does not exist, and return the error if that fails."""
        try:
            super().init_hf_repo(token, private)
        except HUB_ERRORS as error:
            self.hub_model_id = self.args.hub_model_id or self.name_of_run()
            self._owes_repository = True
            return error
        self._owes_repository = False
        return None

    def push_to_hub(self, commit_message: str | None = "End of training", *args: Any, **kwargs: Any) -> Any:
        """Push the model and its card. If the Hub fails, warn: the files stay. Every rank makes the call."""
        if self._owes_repository or self.hub_model_id is None:
            self._create_repository(kwargs.get("token"), kwargs.get("private"))
        self._finish_current_push()
        self._has_saved, folder = False, self._push_folder()
        named = {"model_name": self.name_of_run()} | kwargs
        with self._options(with_changes(self.args, output_dir=str(folder))):
            try:
                pushed = super().push_to_hub(commit_message, *args, **named)
            except HUB_ERRORS as error:
                if not self._has_saved:  # the disk failed, not the Hub
                    raise
                self._warn_of(error)
                return None
        if self.is_world_process_zero() and kwargs.get("blocking", True):
            shutil.rmtree(folder)
        return pushed

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and note for a push that it is saved."""
        super().save_model(output_dir, _internal_call)
        self._has_saved = True

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._owes_push:
            self._owes_push = False
            self._push_from_checkpoint(str(self._last_checkpoint))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is not None:  # the upload would lose the folder, which gets its final name
            self._owes_push = True
            return
        if self._owes_repository and (error := self._create_repository()):
            logger.warning(f"{checkpoint_folder} was not pushed to the Hub: {_sentence(error)}")
            return
        if self.push_in_progress is not None and self.push_in_progress.is_done():
            self._finish_current_push()
        name = self.name_of_run()
        with self._options(without_secrets(with_changes(self.args, output_dir=str(self._push_folder())))):
            self.create_model_card(model_name=name)
            super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        """Wait for the uploads in the background, and say which of them failed."""
        super()._finish_current_push()
        jobs = [] if self.push_in_progress is None else self.push_in_progress.jobs
        for error in filter(None, (job.exception() for job in jobs)):
            self._warn_of(error)
        self.push_in_progress = None

    def name_of_run(self) -> str:
        """Return the name of the model: that of the Hub, else that of the output directory."""
        folder = Path(self.args.output_dir).absolute()
        folder = folder.parent if folder.name == PUSH_FOLDER else folder
        return (self.args.hub_model_id or folder.name).rpartition("/")[2]

    def _push_folder(self) -> Path:
        folder = Path(self.args.output_dir, PUSH_FOLDER)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _warn_of(self, error: Any) -> None:
        own = Path(self.args.output_dir)
        folder = own if own.name == PUSH_FOLDER else own / PUSH_FOLDER
        private = " --private" if self.args.hub_private_repo else ""
        command = f"hf upload {shlex.quote(str(self.hub_model_id))} {shlex.quote(str(folder))}{private}"
        logger.warning(
            f"The push to the Hub failed: {_sentence(error)} The run goes on, and all files are here. To push later: "
            f"`{command}`"
        )


def _sentence(error: Exception) -> str:
    return f"{reason_of(error).rstrip('. ')}."
