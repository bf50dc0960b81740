"""A new project parses, is consistent, and runs with a tiny model."""

import dataclasses
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import yaml
from processes import run_command
from transformers import AutoModelForCausalLM

from rlhf_recipes.command.main import run
from rlhf_recipes.command.mistakes import UsageError
from rlhf_recipes.command.plan import HARDWARE, plan, size_of
from rlhf_recipes.command.running import split_launcher
from rlhf_recipes.command.stages import STAGES
from rlhf_recipes.options.commands import COMMAND, following_command
from rlhf_recipes.options.parser import RecipeParser
from rlhf_recipes.options.shipped import shipped
from rlhf_recipes.preflight.schedule import kl_findings, rollout_schedule, schedule_findings

NEXT = {"sft": "reward_modeling", "reward_modeling": "ppo", "ppo": "evaluate"}
FILES = ("sft", "reward_modeling", "ppo", "evaluate")
MODELS = (None, "me/tiny-5M", "meta/Llama-3.1-8B", "gpt2")


class Project:
    """A project that is written and parsed once: for each file its text, its options and the parsed ones."""

    def __init__(self, directory, hardware, model):
        run(["init", str(directory / "mine"), "--hardware", hardware, *(["--model", model] if model else [])])
        self.hardware, self.processes = hardware, 8 if hardware == "multi-gpu" else 1
        self.texts = {file: (directory / "mine" / f"{file}.yaml").read_text() for file in FILES}
        self.given = {file: yaml.safe_load(text) for file, text in self.texts.items()}
        self.parsed = {file: self._parse(directory / "mine" / f"{file}.yaml") for file in FILES}

    def _parse(self, path):
        """Parse as the recipe does; this machine has no bf16, and only the CPU."""
        on_cpu = [] if path.stem == "evaluate" else ["--use_cpu", "true"]
        return RecipeParser(_kinds(path.stem)).parse_args_and_config(["--config", str(path), *on_cpu])


def _kinds(file):
    return STAGES[file.replace("_", "-")].options()


@pytest.fixture(
    scope="module",
    params=[(hardware, model) for hardware in HARDWARE for model in MODELS],
    ids=lambda param: "-".join(map(str, param)).replace("/", "_"),
)
def project(request, tmp_path_factory):
    return Project(tmp_path_factory.mktemp("project"), *request.param)


def _init(tmp_path, monkeypatch, hardware="cpu", model=None):
    monkeypatch.chdir(tmp_path)
    run(["init", "mine", "--hardware", hardware, *(["--model", model] if model else [])])
    monkeypatch.chdir(tmp_path / "mine")
    return tmp_path / "mine"


def test_every_file_parses_and_holds_only_what_differs(project):
    for file in FILES:
        assert project.parsed[file]
        defaults = {field.name: field.default for kind in _kinds(file) for field in dataclasses.fields(kind)}
        assert not {name for name, value in project.given[file].items() if defaults[name] == value}, file


def test_rollouts_and_steps_have_the_size_that_the_files_say(project):
    config, text = project.parsed["ppo"][1], project.texts["ppo"]
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * project.processes
    rollout = config.per_device_train_batch_size * config.steps_per_generation * project.processes
    assert rollout == (32 if project.hardware == "cpu" else 256)
    assert f"A rollout has {rollout} completions" in text
    assert f"{config.num_iterations} epochs of {rollout // per_step} mini-batches" in text
    assert f"# {config.max_steps * per_step // (config.num_iterations * rollout)} rollouts" in text
    for file in ("sft", "reward_modeling"):
        trained = project.parsed[file][1]
        rows = trained.per_device_train_batch_size * trained.gradient_accumulation_steps * project.processes
        assert rows == (16 if project.hardware == "cpu" else 64)
        assert f"{rows} {'rows' if file == 'sft' else 'pairs'} per step" in project.texts[file]


def test_no_option_works_against_another(project):
    """The preflight's own checks of relevance, and what has no effect beside something else."""
    config, given = project.parsed["ppo"][1], project.given["ppo"]
    rollout = config.generation_batch_size * project.processes  # this process is alone
    schedule = rollout_schedule(SimpleNamespace(**vars(config) | {"generation_batch_size": rollout}), rows=1000)
    assert not [*kl_findings(config, schedule), *schedule_findings(config, schedule, 100)]
    assert "warmup_steps" not in given or given["lr_scheduler_type"] == "constant_with_warmup"
    adapters = [file for file in FILES if "use_peft" in project.given[file]]
    assert adapters in ([], ["sft", "reward_modeling"])  # PPO trains the adapter of SFT further
    reward = "reward_adapter" if adapters else "reward_model_path"
    assert given.keys() & {"reward_adapter", "reward_model_path"} == {reward}
    on_cpu = {file for file in FILES if project.given[file].get("use_cpu")}
    assert on_cpu == ({*FILES[:3]} if project.hardware == "cpu" else set())


@pytest.mark.parametrize("hardware", HARDWARE)
def test_each_stage_reads_what_an_earlier_one_writes(hardware, tmp_path, monkeypatch):
    _init(tmp_path, monkeypatch, hardware)
    written = set()
    for file in FILES:
        given = yaml.safe_load(Path(f"{file}.yaml").read_text())
        for option in ("model_name_or_path", "reward_model_path", "reward_adapter", "baseline_path"):
            assert given.get(option) in {None, HARDWARE[hardware], *written}, file
        written.add(given["output_dir"])
        head = Path(f"{file}.yaml").read_text().splitlines()[2]
        assert head.startswith(f"# rlhf {file.replace('_', '-')} ")
        assert f"{head[2:]}\n" in Path("README.md").read_text()
        split_launcher(head.split()[3:])  # its files exist


@pytest.mark.parametrize("hardware", HARDWARE)
def test_each_stage_ends_with_the_next_command_of_the_readme(hardware, tmp_path, monkeypatch):
    _init(tmp_path, monkeypatch, hardware)
    sft, reward_model, ppo = (yaml.safe_load(Path(f"{file}.yaml").read_text()) for file in FILES[:3])
    source, result = "model_name_or_path", "output_dir"
    needed = {
        "reward_modeling": {source: sft[result]},
        "ppo": {source: reward_model[source], "reward_model_path": reward_model[result]},
        "evaluate": {source: ppo[result], "baseline_path": ppo[source]},
        "compare": {"experiment": "rlhf_recipes"},
    }
    commands = [line.strip() for line in Path("README.md").read_text().splitlines() if line.startswith("   rlhf ")][1:]
    for (recipe, options), typed, following in zip(needed.items(), commands, commands[1:], strict=False):
        monkeypatch.setenv(COMMAND, typed)
        assert following_command(recipe, options, typed.split()[2:]) == following
    assert following.startswith("rlhf compare ")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no model: there is no `config.json` in it. Name a directory that `save_pretrained` has written."),
        (["adapter_config.json"], "is an adapter, and a project starts from a whole model: `rlhf export` makes"),
        (["checkpoint-8/config.json"], "in it. Did you mean `runs/sft/checkpoint-8`?"),
    ],
)
def test_a_directory_without_a_model_is_refused(files, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("notes.txt", *files):
        path = Path("runs", "sft", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for given in ("runs/sft", str(path) if not files else "./runs/sft/"):
        with pytest.raises(UsageError, match=r"`--model` .*runs/sft") as error:
            run(["init", "mine", "--model", given])
        assert message in str(error.value)
    assert not Path("mine").exists()


def test_a_model_in_the_home_directory_is_found_from_the_project(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "base")
    project = _init(tmp_path, monkeypatch, model="~/base")
    assert yaml.safe_load((project / "sft.yaml").read_text())["model_name_or_path"] == str(tmp_path / "base")


def test_three_rows_of_each_kind_and_split(tmp_path, monkeypatch):
    _init(tmp_path, monkeypatch)
    columns = {"demonstrations": ["prompt", "completion"], "preferences": ["prompt", "chosen", "rejected"]}
    for name in ("demonstrations", "preferences", "prompts"):
        for split in ("train", "test"):
            rows = [json.loads(line) for line in Path("data", name, f"{split}.jsonl").read_text().splitlines()]
            assert [list(row) for row in rows] == [columns.get(name, ["prompt"])] * 3


def test_nothing_is_overwritten(tmp_path, monkeypatch):
    project = _init(tmp_path, monkeypatch)
    (project / "sft.yaml").write_text("mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="mine exists already"):
        run(["init", "mine"])
    assert (project / "sft.yaml").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    run(["init", "empty"])
    assert (tmp_path / "empty" / "ppo.yaml").exists()


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 135e6),
        ("Qwen/Qwen2.5-0.5B", 0.5e9),
        ("meta-llama/Llama-3.1-8B-Instruct", 8e9),
        ("gpt2", None),
        ("allenai/OLMo-2-0425-1B", 1e9),
    ],
)
def test_the_size_of_a_named_model(model, size):
    assert size_of(model) == size
    assert plan("x", model, "gpu").is_known is (size is not None)


def test_the_size_of_a_model_here(tmp_path):
    path = tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "model-7B")
    assert size_of(path) == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(path).parameters())


@pytest.mark.recipe
@pytest.mark.parametrize("hardware", ["cpu", "gpu"])
def test_the_chain_runs_on_its_example_rows(hardware, tmp_path, monkeypatch):
    """`gpu` as for 1.5 billion parameters: with adapters, and the reward model on the policy's base."""
    name = {"cpu": "base", "gpu": "base-1.5B"}[hardware]
    tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / name)
    monkeypatch.setattr("rlhf_recipes.command.plan._parameters", lambda file: 1.5e9 if hardware == "gpu" else 5e4)
    project = _init(tmp_path, monkeypatch, hardware, name)
    few = ("--per_device_train_batch_size", 3, "--gradient_accumulation_steps", 1)
    sampled = ("--max_completion_length", 8)
    rollouts = (*few, *sampled, "--steps_per_generation", 1, "--num_iterations", 1, "--max_steps", 1)
    on_cpu = ("--use_cpu", "true", "--bf16", "false", "--tracking", "false")
    plain = ("--dtype", "float32") if hardware == "gpu" else ()
    commands = {
        "sft": (*few, *on_cpu, *plain),
        "reward_modeling": (*few, *on_cpu, *plain),
        "ppo": (*rollouts, *on_cpu, *plain, "--eval_strategy", "no", "--critic_warmup_steps", 0),
        "evaluate": (*sampled, *plain, "--tracking", "false"),
    }
    for stage, options in commands.items():
        script = shipped("recipes") / f"{stage}.py"
        result = run_command(script, "--config", f"{stage}.yaml", *options, directory=project)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
        last = result.stdout.splitlines()[-1]
        if following := NEXT.get(stage):
            start = "python" if following == "evaluate" else "accelerate launch"
            assert last == f"Next: {start} recipes/{following}.py --config {following}.yaml"
        else:
            assert "Next: " not in result.stdout, "nothing was recorded, so there is nothing to compare"
    results = json.loads((project / "runs" / "mine" / "evaluate" / "results.json").read_text())
    assert results["prompts"] == 3


def test_a_shell_takes_the_next_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(["init", "mine", "--hardware", "multi-gpu"])
    command = capsys.readouterr().out.splitlines()[2].strip().replace("rlhf", "echo")
    told = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert told == "sft --config_file multi_gpu --config sft.yaml\n"
    assert (tmp_path / "mine" / "sft.yaml").exists()
