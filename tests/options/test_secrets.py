"""Secrets stay out of what a run shows of its options."""

from dataclasses import dataclass, field

import pytest

from rlhf_recipes.options.secrets import public_options, redact, without_credentials
from rlhf_recipes.tracking.store import flat_options


@dataclass
class Options:
    """Some options, harmless and not."""

    learning_rate: float = 1e-5
    eos_token: str = "</s>"
    average_tokens_across_devices: bool = True
    hub_token: str = "abc"
    api_key: str = "abc"
    secret_path: str = "abc"
    kwargs: dict = field(default_factory=lambda: {"token": "abc", "nested": [{"password": "abc", "size": 3}]})
    output_dir: str = "runs/seed-0/ppo"
    model: str = "runs/seed-0/sft"
    seed: int = 0


def test_secrets_are_left_out_by_name_at_every_depth():
    options = public_options((Options(),))["Options"]
    assert "abc" not in str(options)
    assert options["eos_token"] == "</s>"
    assert options["average_tokens_across_devices"] is True
    assert options["kwargs"] == {"nested": [{"size": 3}]}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:pass@host:5000/x", "http://***@host:5000/x"),
        ("postgresql+psycopg://me:p%40ss@db/mlflow", "postgresql+psycopg://***@db/mlflow"),
        ("https://token@host", "https://***@host"),
        ("https://me:p@ss@host/x", "https://***@host/x"),
        ("https://host/x?access_token=abc&size=3", "https://host/x?access_token=***&size=3"),
        ("use hf_abcdefghijklmnop now", "use *** now"),
        ("me@example.org", "me@example.org"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("https://host/users/@me", "https://host/users/@me"),
    ],
)
def test_secrets_are_replaced_inside_values(text, shown):
    assert redact(text) == shown


def test_an_address_is_shown_without_its_password():
    assert without_credentials("https://ann:secret@mlflow.example:5000/x") == "https://mlflow.example:5000/x"
    assert without_credentials("https://ann:se@cret@mlflow.example") == "https://mlflow.example"
    assert without_credentials("sqlite:///mlflow.db") == "sqlite:///mlflow.db"


def test_a_flat_option_is_short_and_there_once():
    flat = flat_options({"A": {"x": "abcdef", "same": 1}, "B": {"x": "other", "same": 1}}, 5)
    assert flat == {"x": "abcd…", "same": "1", "B.x": "other"}
