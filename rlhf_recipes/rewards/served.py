"""Recognise what serves a reward model at an address: `rlhf serve`, vLLM, or text-embeddings-inference."""

from typing import Any

from rlhf_recipes.models.process_reward_model import is_process_reward_model
from rlhf_recipes.rewards.attempts import PermanentRewardError, RewardCallError, retrying
from rlhf_recipes.rewards.client import RemoteRewardModel
from rlhf_recipes.rewards.pooled import PooledRewardModel, TEIRewardModel, VLLMRewardModel
from rlhf_recipes.rewards.pooled_steps import VLLMProcessRewardModel
from rlhf_recipes.rewards.transport import TOKEN_VARIABLE, Server


def served_reward_model(address: str, retries: int = 4) -> RemoteRewardModel | PooledRewardModel:
    """Return the scorer for an address: that of `rlhf serve`, of vLLM, or of text-embeddings-inference.

    Args:
        address: Address. `#DIRECTORY` behind it names the reward model's files for a server that has no card.
        retries: Further attempts to reach a server that is still starting.

    Raises:
        ValueError: If no reward model answers there.
    """
    url, _, files = address.partition("#")
    asked = Server(url, 1, 1, None)
    try:
        kind, described = retrying(retries, asked._note_waiting)(_recognised, asked)
    except RewardCallError:
        return RemoteRewardModel(url, retries=0)  # it says that nothing answers there, and what to do
    except PermanentRewardError as error:
        raise ValueError(f"The server at {url} lets nobody in ({error}). Set {TOKEN_VARIABLE} to its key.") from error
    if kind is None:
        if files:
            raise ValueError(f"The server at {url} is no vLLM and no text-embeddings-inference: leave out `#{files}`.")
        return RemoteRewardModel(url, retries=retries)
    if kind is VLLMRewardModel and _judges_steps(files or kind.named(described)):
        kind = VLLMProcessRewardModel
    pooled = kind(url, described, files)
    pooled.check()
    return pooled


def _recognised(server: Server) -> tuple[type[PooledRewardModel] | None, dict[str, Any]]:
    """Return the class for a server and what the server says about its model; `None` for one that is neither."""
    kinds: list[tuple[type[PooledRewardModel], str]] = [(TEIRewardModel, "model_type"), (VLLMRewardModel, "data")]
    for kind, key in kinds:
        try:
            described = server.describe(kind.about)
        except PermanentRewardError as error:
            if any(f"answered {status}" in str(error) for status in (401, 403)):
                raise
            continue
        if key in described:
            return kind, described
    return None, {}


def _judges_steps(files: str) -> bool:
    try:
        return is_process_reward_model(files)
    except (OSError, ValueError):  # the class for its server says what is missing
        return False
