"""A model from a real MLflow server computes the same as after its training, or is refused."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
import tiny
import torch
import yaml
from processes import free_port, mlflow_server, run_script
from safetensors.torch import load_file, save_file

from rlhf_recipes.models.loading import load_policy
from rlhf_recipes.rewards.card import RewardModelCard
from rlhf_recipes.rewards.scorer import RewardModelScorer
from rlhf_recipes.tracking.registry import download_model, load_registered_policy, load_registered_reward_model

pytestmark = pytest.mark.recipe

RECIPES = Path(__file__).parents[2] / "recipes"
ROWS = {"prompts": ["hello ", "the fox "], "completions": ["the bear eats", "red"]}
LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["all-linear"]}


def _recipe(world, recipe, **options):
    common = {} if recipe == "export" else {"response_separator": " "}
    common |= tiny.RECIPE if recipe in ("ppo", "reward_modeling") else {}
    if recipe == "ppo":
        common |= {"steps_per_generation": 2, "num_iterations": 2, "max_steps": 4, "dataset_name": "prompts"}
    if recipe in ("ppo", "evaluate"):
        common |= {"max_completion_length": 6}
    config = world.directory / f"{recipe}.yaml"
    config.write_text(yaml.safe_dump(common | options))
    environment = {"MLFLOW_TRACKING_URI": world.uri, "HF_HOME": str(world.directory / "cache")}
    code, output = run_script(
        RECIPES / f"{recipe}.py", "--config", config.name, directory=world.directory, **environment
    )
    assert code == 0, output[-3000:]


@pytest.fixture(scope="module")
def world(empty_store, tmp_path_factory):
    """Start a server with a LoRA reward model and a LoRA policy in its registry."""
    directory, port = tmp_path_factory.mktemp("registry"), free_port()
    shutil.copy(empty_store, directory)
    world = SimpleNamespace(directory=directory, uri=f"http://127.0.0.1:{port}")
    world.base = tiny.save(tiny.policy(tiny.tokenizer()), directory / "base")
    for name, data in (("prompts", tiny.prompts()), ("pairs", tiny.preferences())):
        tiny.write_splits(data, directory / name)
    registered = {"model_name_or_path": world.base, "registered_model_alias": "candidate", "learning_rate": 0.01}
    with mlflow_server(directory, port):
        _recipe(
            world, "reward_modeling", output_dir="out/rm-1.0", registered_model_name="rm", dataset_name="pairs",
            max_steps=2, score_heads=2, **registered, **LORA,
        )  # fmt: skip
        _recipe(
            world, "ppo", output_dir="out/ppo", registered_model_name="policy", reward_model_path="out/rm-1.0",
            **registered, **LORA,
        )  # fmt: skip
        yield world


@pytest.fixture(autouse=True)
def _workplace(world, monkeypatch):
    monkeypatch.chdir(world.directory)
    monkeypatch.setenv("HF_HOME", str(world.directory / "cache"))
    mlflow.set_tracking_uri(world.uri)
    yield
    mlflow.set_tracking_uri(None)


def _run(stage, output_dir):
    """Return the run that wrote a directory."""
    run = mlflow.MlflowClient().get_run(json.loads(Path(output_dir, "mlflow_run.json").read_text())["run_id"])
    assert run.data.tags["stage"] == stage
    return run


def _edges(run):
    inputs = {model.model_id for model in run.inputs.model_inputs}
    return inputs, [(model.model_id, model.step) for model in run.outputs.model_outputs]


def _logits(policy):
    with torch.no_grad():
        return policy.eval()(torch.arange(4, 40).reshape(2, 18)).logits


def _other_weights(world, directory):
    """Write the base with one other tensor."""
    shutil.copytree(world.base, directory)
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 1.01
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return str(directory)


@pytest.mark.parametrize("uri", ["models:/policy@candidate", "models:/policy/1", "models:/{model_id}"])
def test_a_policy_from_mlflow_is_the_one_that_was_trained(world, uri):
    model_id = json.loads(Path("out/ppo/mlflow_run.json").read_text())["model_id"]
    loaded = _logits(load_registered_policy(uri.format(model_id=model_id)))
    assert torch.equal(loaded, _logits(load_policy("out/ppo")))
    assert not torch.equal(loaded, _logits(load_policy(world.base))), "it has learnt something"


def test_a_policy_comes_with_its_value_head_and_tokenizer(world):
    directory = Path(download_model("models:/policy@candidate"))
    saved, loaded = (load_file(path / "value_head.safetensors") for path in (Path("out/ppo"), directory))
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (directory / name).read_bytes() == Path("out/ppo", name).read_bytes()
    assert not list(directory.glob("trainer_state.json"))


def test_a_reward_model_from_mlflow_scores_as_the_one_that_was_trained(world):
    loaded = load_registered_reward_model("models:/rm@candidate")
    trained = RewardModelScorer.from_pretrained("out/rm-1.0")
    assert loaded(**ROWS) == trained(**ROWS)
    assert loaded(**ROWS) != RewardModelScorer(tiny.reward_model(tiny.tokenizer()), tiny.tokenizer())(**ROWS)
    assert loaded.card == RewardModelCard.load("out/rm-1.0")
    assert loaded.card.eval_accuracy is not None
    assert loaded.card.score_heads == 2


def test_a_base_may_lie_elsewhere(world, tmp_path):
    shutil.copytree(world.base, tmp_path / "copy")
    expected = _logits(load_policy("out/ppo")), RewardModelScorer.from_pretrained("out/rm-1.0")(**ROWS)
    Path(world.base).rename(tmp_path / "away")
    try:
        with pytest.raises(ValueError, match=f"an adapter on {world.base}, which is neither .* `load_registered_pol"):
            load_registered_policy("models:/policy@candidate")
        policy = load_registered_policy("models:/policy@candidate", base=str(tmp_path / "copy"))
        scorer = load_registered_reward_model("models:/rm@candidate", base=str(tmp_path / "copy"))
        assert torch.equal(_logits(policy), expected[0])
        assert scorer(**ROWS) == expected[1]
    finally:
        (tmp_path / "away").rename(world.base)


@pytest.mark.parametrize(
    ("load", "uri"),
    [(load_registered_policy, "models:/policy@candidate"), (load_registered_reward_model, "models:/rm@candidate")],
)
def test_other_weights_are_refused(world, tmp_path, load, uri):
    other = _other_weights(world, tmp_path / "other")
    with pytest.raises(ValueError, match=f"^{uri} was trained on {world.base} .* but {other} holds other weights"):
        load(uri, base=other)
    original = tmp_path / "original"
    Path(world.base).rename(original)
    try:
        shutil.copytree(other, world.base)
        with pytest.raises(ValueError, match=f"but {world.base} holds other weights .*base=") as error:
            load(uri)
        assert "\n" not in str(error.value)
    finally:
        shutil.rmtree(world.base)
        original.rename(world.base)


def test_a_download_that_is_not_what_was_recorded_is_refused(world, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "fresh"))
    model_id = json.loads(Path("out/ppo/mlflow_run.json").read_text())["model_id"]
    (stored,) = world.directory.glob(f"artifacts/**/{model_id}/artifacts/adapter_model.safetensors")
    content = stored.read_bytes()
    try:
        stored.write_bytes(content[:-4] + b"\0\0\0\1")
        with pytest.raises(ValueError, match="does not hold the weights"):
            download_model(f"models:/{model_id}")
    finally:
        stored.write_bytes(content)
    assert Path(download_model(f"models:/{model_id}"), "adapter_model.safetensors").read_bytes() == content


def test_a_model_that_is_not_whole_is_refused(world):
    client = mlflow.MlflowClient()
    model = client.create_logged_model(_run("ppo", "out/ppo").info.experiment_id, name="half")
    with pytest.raises(ValueError, match=f"models:/{model.model_id} is not whole"):
        download_model(f"models:/{model.model_id}")


def test_edges_lead_from_the_reward_model_to_the_policy(world):
    reward_model, policy = _run("reward_modeling", "out/rm-1.0"), _run("ppo", "out/ppo")
    assert _edges(reward_model)[0] == set()
    ((reward_model_id, _),) = _edges(reward_model)[1]
    ((policy_id, step),) = _edges(policy)[1]
    assert _edges(policy)[0] == {reward_model_id}
    assert step == 4
    client = mlflow.MlflowClient()
    kinds = [client.get_logged_model(model_id).model_type for model_id in (reward_model_id, policy_id)]
    assert kinds == ["reward_model", "policy"]
    metrics = {metric.key: metric.value for metric in client.get_logged_model(policy_id).metrics}
    assert metrics["objective/scores"] == policy.data.metrics["objective/scores"]
    assert policy.data.metrics.keys() - metrics.keys() == {
        name for name in policy.data.metrics if name.startswith("system/")
    }


def test_recipes_take_models_from_mlflow(world):
    """Train a second policy from the first with the same reward model, and evaluate and export it."""
    first, reward_model = (
        _edges(_run(*run))[1][0][0] for run in (("ppo", "out/ppo"), ("reward_modeling", "out/rm-1.0"))
    )
    before = _logits(load_registered_policy("models:/policy@candidate"))
    _recipe(
        world, "ppo", model_name_or_path="models:/policy@candidate", output_dir="out/second",
        reward_adapter=f"models:/{reward_model}", registered_model_name="policy",
        registered_model_alias="candidate", learning_rate=0.01,
    )  # fmt: skip
    _recipe(
        world, "evaluate", model_name_or_path="models:/policy/2", baseline_path="models:/policy/1",
        reward_model_path="models:/rm@candidate", dataset_name="prompts", output_dir="out/evaluation",
    )  # fmt: skip
    _recipe(world, "export", model_name_or_path="models:/policy@candidate", output_dir="out/export")

    second = _run("ppo", "out/second")
    assert _edges(second)[0] == {first, reward_model}
    assert second.data.tags["lineage.policy"] == _run("ppo", "out/ppo").info.run_id
    assert second.data.params["model_name_or_path"] == "models:/policy@candidate"
    assert {"rewards/rm-1_0/mean"} <= second.data.metrics.keys(), "named as its directory was"
    evaluation = _run("evaluation", "out/evaluation")
    assert _edges(evaluation) == ({first, reward_model, _edges(second)[1][0][0]}, [])
    after = _logits(load_registered_policy("models:/policy@candidate"))
    assert torch.equal(after, _logits(load_policy("out/second")))
    assert not torch.equal(after, before), "the alias has moved"
    assert torch.equal(_logits(load_registered_policy("models:/policy/1")), before)
    assert torch.equal(_logits(load_policy("out/export")), after)


SCRIPT = """
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from rlhf_recipes.options.recipes import TrackingArguments
from rlhf_recipes.tracking.session import log_model, track_run

@dataclass
class Config:
    output_dir: str
    model_name_or_path: str

tracking = TrackingArguments(log_model=sys.argv[2] == "true", registered_model_name=sys.argv[3] or None)
with track_run(tracking, "mine", "sft", Config(sys.argv[1], sys.argv[4])):
    log_model(tracking, sys.argv[1], "policy")
    time.sleep(float(sys.argv[5]))
"""


def _log(world, directory, log_model="true", name="", policy="base", seconds=0):
    script = world.directory / "log.py"
    script.write_text(SCRIPT)
    arguments = directory, log_model, name, policy, seconds
    return run_script(script, *arguments, directory=world.directory, MLFLOW_TRACKING_URI=world.uri)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_model_stays_out_of_the_store_if_asked(world, tmp_path, wanted):
    tiny.save(tiny.policy(tiny.tokenizer()), tmp_path)
    code, output = _log(world, tmp_path, str(wanted).lower(), seconds=3)
    assert code == 0, output[-3000:]
    note = json.loads((tmp_path / "mlflow_run.json").read_text())
    sent = [model_id for model_id, _ in _edges(_run("sft", tmp_path))[1]]
    assert len(sent) == wanted
    assert [note[name] for name in note if name == "model_id"] == sent, "also if it was sent before the run has ended"


def test_a_run_without_weights_is_recorded_without_a_model(world, tmp_path):
    code, output = _log(world, tmp_path)
    assert code == 0, output[-3000:]
    assert f"{tmp_path} holds no weights" in output
    assert not _edges(_run("sft", tmp_path))[1]


def test_a_model_of_another_store_is_no_edge(world, tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "mlflow_run.json").write_text('{"run_id": "elsewhere", "model_id": "m-elsewhere"}')
    code, output = _log(world, tmp_path / "out", policy=tmp_path / "policy")
    assert code == 0, output[-3000:]
    run = _run("sft", tmp_path / "out")
    assert run.data.tags["lineage.policy"] == "elsewhere"
    assert _edges(run) == (set(), [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "a/b"}, "`registered_model_name` is refused by MLflow: "),
        (
            {"policy": "models:/nobody@nowhere"},
            "models:/nobody@nowhere cannot be read from MLflow at http://127.0.0.1",
        ),
    ],
)
def test_what_mlflow_does_not_know_or_take_is_said_before_the_run(world, tmp_path, options, message):
    code, output = _log(world, tmp_path, **options)
    assert code == 1
    last = output.splitlines()[-1]
    assert message in last
    assert "Start the server" not in last
    assert not (tmp_path / "mlflow_run.json").exists()
