"""The next command has the form in which the run was started, and the names that its stage needs."""

import pytest

from rlhf_recipes.options.commands import COMMAND, command_of, following_command
from rlhf_recipes.options.shipped import shipped

NEEDED = {"model_name_or_path": "runs/m/sft"}


@pytest.fixture(autouse=True)
def _by_its_file(monkeypatch):
    monkeypatch.delenv(COMMAND, raising=False)


def test_by_rlhf_or_by_the_file(monkeypatch):
    assert command_of("reward_modeling", {"seed": 1}) == "accelerate launch recipes/reward_modeling.py --seed 1"
    assert command_of("compare", {"experiment": "a b"}) == "python recipes/compare.py --experiment 'a b'"
    monkeypatch.setenv(COMMAND, "rlhf ppo")
    assert command_of("reward_modeling", {"seed": 1}) == "rlhf reward-modeling --seed 1"


def test_without_a_configuration_the_command_has_all_that_is_needed():
    end = "--config YOUR_CONFIG.yaml --model_name_or_path runs/m/sft"
    assert following_command("ppo", NEEDED, []) == f"accelerate launch recipes/ppo.py {end}"
    assert following_command("compare", {"experiment": "x"}, []) == "python recipes/compare.py --experiment x"


def test_a_neighbour_is_named_and_only_what_differs_is_added(tmp_path):
    (tmp_path / "reward_modeling.yaml").write_text("model_name_or_path: runs/m/sft\n")
    (tmp_path / "reward_modeling_lora.yaml").write_text("model_name_or_path: runs/m/sft_lora\n")
    own = ["--config", str(tmp_path / "sft.yaml")]
    start = f"accelerate launch recipes/reward_modeling.py --config {tmp_path}/reward_modeling"
    assert following_command("reward_modeling", NEEDED, own) == f"{start}.yaml"
    own = ["--config", str(tmp_path / "sft_lora.yaml")]
    assert following_command("reward_modeling", NEEDED, own) == f"{start}_lora.yaml --model_name_or_path runs/m/sft"


def test_a_shipped_configuration_has_its_name(monkeypatch):
    monkeypatch.setenv(COMMAND, "rlhf ppo")
    own = ["--config", str(shipped("recipes") / "configs/quickstart/sft.yaml")]
    needed = {"model_name_or_path": "runs/quickstart/sft"}
    assert (
        following_command("reward_modeling", needed, own) == "rlhf reward-modeling --config quickstart/reward_modeling"
    )


def test_the_quickstart_goes_on_by_itself(monkeypatch):
    monkeypatch.setenv(COMMAND, "")
    assert following_command("ppo", NEEDED, []) is None
