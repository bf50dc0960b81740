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
    monkeypatch.setenv(COMMAND, "rlhf sft --config_file multi_gpu --cpu --seed 3 --config a.yaml")
    assert command_of("reward_modeling", {"seed": 1}) == "rlhf reward-modeling --config_file multi_gpu --cpu --seed 1"
    assert command_of("evaluate", {"seed": 1}) == "rlhf evaluate --seed 1"


def test_without_a_configuration_the_command_has_all_that_is_needed():
    end = "--config YOUR_CONFIG.yaml --model_name_or_path runs/m/sft"
    assert following_command("ppo", NEEDED, []) == f"accelerate launch recipes/ppo.py {end}"
    assert following_command("compare", {"experiment": "x"}, []) == "python recipes/compare.py --experiment x"


def test_a_neighbour_is_named_and_only_what_it_lacks_is_added(tmp_path):
    """The neighbour with the ending starts from another model on purpose."""
    (tmp_path / "reward_modeling.yaml").write_text("seed: 1\n")
    (tmp_path / "reward_modeling_lora.yaml").write_text("model_name_or_path: me/base\n")
    own = ["--config", str(tmp_path / "sft.yaml")]
    start = f"accelerate launch recipes/reward_modeling.py --config {tmp_path}/reward_modeling"
    assert following_command("reward_modeling", NEEDED, own) == f"{start}.yaml --model_name_or_path runs/m/sft"
    own = ["--config", str(tmp_path / "sft_lora.yaml")]
    assert following_command("reward_modeling", NEEDED, own) == f"{start}_lora.yaml"


@pytest.mark.parametrize(
    ("written", "added"),
    [
        ("reward_model_path: runs/m/rm", "--reward_model_path new"),
        ("reward_adapter: runs/m/rm", "--reward_adapter new"),
        ("reward_adapter: other", ""),
        ("reward_adapter: null", "--reward_model_path new"),
        ("broken: [", "--model_name_or_path me/base --reward_model_path new"),
    ],
)
def test_what_the_command_line_changed_here_changes_there(tmp_path, written, added):
    own = tmp_path / "reward_modeling.yaml"
    own.write_text("model_name_or_path: me/base\noutput_dir: runs/m/rm\n")
    (tmp_path / "ppo.yaml").write_text(f"model_name_or_path: runs/m/sft\n{written}\n")
    needed = {"model_name_or_path": "me/base", "reward_model_path": "new"}
    command = following_command("ppo", needed, ["--output_dir=new", "--config", str(own)])
    assert command == f"accelerate launch recipes/ppo.py --config {tmp_path}/ppo.yaml {added}".strip()


def test_new_data_replace_those_of_the_configuration(tmp_path):
    (tmp_path / "reward_modeling.yaml").write_text("model_name_or_path: me/base\ndataset_name: runs/m/preferences\n")
    own = ["--config", str(tmp_path / "sample_preferences.yaml")]
    command = following_command("reward_modeling", {"dataset_name": "new"}, own)
    start = f"accelerate launch recipes/reward_modeling.py --config {tmp_path}/reward_modeling.yaml"
    assert command == f"{start} --dataset_name new"


def test_an_evaluation_is_of_this_result(tmp_path):
    (tmp_path / "evaluate.yaml").write_text("model_name_or_path: runs/m/ppo\nbaseline_path: runs/m/sft\n")
    needed = {"model_name_or_path": "runs/m/rloo", "baseline_path": "runs/m/sft"}
    command = following_command("evaluate", needed, ["--config", str(tmp_path / "baseline_rloo.yaml")])
    assert command == f"python recipes/evaluate.py --config {tmp_path}/evaluate.yaml --model_name_or_path runs/m/rloo"


def test_runs_without_a_record_are_not_compared():
    assert following_command("compare", {}, []) is None


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
