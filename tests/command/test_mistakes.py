"""A mistake is one line that names the option, the file or the row, and the remedy: through the recipes themselves."""

import re
import socket
from contextlib import closing
from pathlib import Path

import pytest
import tiny
from processes import run_command

from rlhf_recipes.command.main import run
from rlhf_recipes.command.mistakes import UsageError
from rlhf_recipes.rewards.card import RewardModelCard, tokenizer_fingerprint

pytestmark = pytest.mark.recipe
PROGRESS = re.compile(r"%\||examples/s|examples \[")
RECIPES = Path(__file__).parents[2] / "recipes"
TRAINING = {
    "output_dir": "out",
    "use_cpu": "true",
    "bf16": "false",
    "per_device_train_batch_size": 4,
    "max_steps": 1,
    "tracking": "false",
}
PPO = TRAINING | {
    "model_name_or_path": "base",
    "reward_model_path": "rm",
    "dataset_name": "prompts",
    "max_completion_length": 8,
}
BASE = {
    "ppo": PPO,
    "sft": TRAINING | {"model_name_or_path": "base", "dataset_name": "prompts"},
    "serve_reward_model": {"model_name_or_path": "rm"},
}
FILES = {
    "typo.yaml": "output_dir: out\nlerning_rate: 1.0e-5\n",
    "syntax.yaml": "output_dir: out\nreward_functions: [a:b\nseed: 2\n",
    "broken/train.jsonl": '{"prompt": "a"}\n{"prompt": "b"\n',
    "one_split/test.jsonl": '{"prompt": "a"}\n',
    "notes/README.md": "nothing\n",
    "mine.py": "import package_that_is_nowhere\n",
    "file": "",
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A policy without a chat template, a reward model with its card, data, and wrong files."""
    directory = tmp_path_factory.mktemp("mistakes")
    tok = tiny.tokenizer()
    tok.chat_template = None
    for name, model in (("base", tiny.policy(tok)), ("rm", tiny.reward_model(tok))):
        model.save_pretrained(directory / name)
        tok.save_pretrained(directory / name)
    RewardModelCard("base", False, "\n\n", tokenizer_fingerprint(tok), None).save(directory / "rm")
    tiny.write_splits(tiny.prompts(count=8), directory / "prompts")
    tiny.write_splits(tiny.prompts(count=8, chat=True), directory / "chats")
    for name, text in FILES.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    return directory


@pytest.fixture(scope="module")
def taken_port():
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lerning_rate": 1}, "`lerning_rate` .* is no option of this recipe. Did you mean `learning_rate`?"),
        ({"config": "typo.yaml"}, "`lerning_rate` in typo.yaml is no option .* Did you mean `learning_rate`?"),
        ({"config": "nowhere.yaml"}, "`--config` nowhere.yaml cannot be read: No such file .* Name a file"),
        ({"config": "syntax.yaml"}, "`--config` syntax.yaml .* in line 3. Write each option as `name: value`"),
        ({"learning_rate": "fast"}, "learning_rate.* invalid float value: 'fast'"),
        ({"kl_coef": -1}, "`kl_coef` must not be negative, got -1.0"),
        ({"load_in_4bit": "true", "load_in_8bit": "true"}, "`load_in_4bit` and `load_in_8bit` exclude each other"),
        ({"bf16": "true", "use_cpu": None}, "`bf16: true` needs bfloat16, .* no GPU. Leave it out .* or add `use_cpu"),
        ({"use_cpu": "false"}, "`use_cpu: false` asks for a GPU, and there is none here .* Leave it out"),
        ({"report_to": "neptune"}, "`report_to` names neptune, which is not installed"),
        ({"use_vllm": "true"}, r"`use_vllm` needs the package `vllm`: `pip install 'rlhf-recipes\[vllm\]'`"),
        ({"output_dir": "file/out"}, "`output_dir` .*file/out cannot be written: Not a directory. Choose another"),
        ({"tracking": None, "tracking_uri": "http://127.0.0.1:9"}, "MLflow at `tracking_uri` .* Start the server"),
        ({"model_name_or_path": "bse"}, "`model_name_or_path` 'bse' .* correct the path, .* Did you mean `base`?"),
        (
            {"model_name_or_path": "./bse"},
            "`model_name_or_path` is ./bse, which .* not exist. Did you mean `./base`?",
        ),
        ({"reward_model_path": "nowhere"}, "`reward_model_path` 'nowhere' cannot be loaded .* correct the path"),
        ({"dataset_name": "prompt"}, "`dataset_name` 'prompt' cannot be loaded .* Did you mean `prompts`?"),
        ({"dataset_name": "notes"}, "`dataset_name` 'notes' .* no file with JSON lines.* Write `train.jsonl` there"),
        ({"dataset_name": "one_split"}, "`dataset_name` one_split has no split 'train', only 'test': set"),
        ({"dataset_name": "broken"}, "`dataset_name` 'broken' .*/train.jsonl is broken: line 2 is no JSON"),
        ({"dataset_name": "chats"}, "Row 0 of `train_dataset` holds messages, but the tokenizer has no chat template"),
        ({"reward_functions": "nowhere:f"}, "There is no module 'nowhere' for the function 'nowhere:f'"),
        ({"reward_functions": "mine:f"}, "'mine:f' cannot be imported: No module named 'package_th.*mine.py, line 1"),
        ({"response_separator": "|"}, r"`response_separator` is '\|', but .* Set `response_separator: \"\\n\\n\"`"),
        ({"attn_implementation": "flash_attention_2"}, "FlashAttention2 .*`attn_implementation`: leave it out"),
    ],
    ids=lambda value: "+".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_training_refuses(directory, change, message):
    _refused(directory, "ppo", change, message)


def test_demonstrations_without_an_answer(directory):
    _refused(directory, "sft", {}, "`dataset_name` has no column 'completion'; it has 'prompt'. Rename")


def test_a_server_finds_its_port_taken_before_it_loads_a_model(directory, taken_port):
    change = {"port": taken_port, "model_name_or_path": "nowhere"}
    _refused(directory, "serve_reward_model", change, f"`port` {taken_port}: Address already in use. Set another")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pppo", "`pppo` is no command of `rlhf`. Did you mean `ppo`?"),
        ("ppo --config quickstart/pppo", "`--config` quickstart/pppo is no file and no shipped .* Did you mean"),
        ("ppo --num_processes 2 --cpu", "`--num_processes` 2 needs as many GPUs, and this training has 0. Leave it"),
    ],
)
def test_the_command_refuses(tmp_path, monkeypatch, line, message):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UsageError, match=message):
        run(line.split())


def test_a_training_without_a_choice_uses_what_this_machine_has(directory):
    """Without a GPU, it runs, and says what it chose."""
    change = {"use_cpu": None, "bf16": None, "preflight_only": "true"}
    ended = _run(directory, "ppo", change)
    assert ended.returncode == 0
    assert "There is no GPU here, so the training uses the CPU and float32" in ended.stderr


def _refused(directory, recipe, change, message):
    """Check that the recipe ends with this message, and that it says little else."""
    ended = _run(directory, recipe, change)
    lines = [line for line in ended.stderr.splitlines() if line.strip() and not PROGRESS.search(line)]
    assert ended.returncode != 0
    assert len(lines) <= 3, ended.stderr
    assert re.search(message.replace("?", r"\?"), lines[-1]), ended.stderr
    assert "internet" not in ended.stderr
    assert not (directory / "out").exists()


def _run(directory, recipe, change):
    options = {name: value for name, value in (BASE[recipe] | change).items() if value is not None}
    line = [part for name, value in options.items() for part in (f"--{name}", value)]
    return run_command(RECIPES / f"{recipe}.py", *line, directory=directory)
