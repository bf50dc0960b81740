"""Secrets stay out of what a run shows of its options."""

import time
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_recipes.options.recipes import TrackingArguments, tracking_uri
from rlhf_recipes.options.secrets import holds_credentials, public_options, redact, without_credentials
from rlhf_recipes.tracking.store import flat_options, ui_command


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
    assert (
        without_credentials("postgresql://me:w/0@rd@db/x?sslpassword=w&size=3&api_key=a") == "postgresql://db/x?size=3"
    )
    assert without_credentials("https://host/x?token=w0rd") == "https://host/x"


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:///mlflow.db",
        "sqlite:////scratch/sk-my-long-name/mlflow.db",
        "sqlite+pysqlite:////scratch/token=abc/a:b@c/mlflow.db?key=1",
        "file:///scratch/hf_abcdefghijklmnopqrst/mlruns",
        "/scratch/sk-my-long-name/mlruns",
        "https://mlflow.example:5000/sk-my-long-name?size=3",
        "databricks://sk-my-long-profile",
    ],
)
def test_an_address_without_credentials_stays_as_it_is(uri):
    """It is noted for later use, and a name that looks like a token would lead to another file."""
    assert without_credentials(uri) == uri
    store = TrackingArguments(tracking_uri=uri)
    assert ui_command(store).endswith(tracking_uri(store))


@pytest.mark.parametrize(
    "address",
    [
        "http://reward:8000/sk-reward-model-v1",
        "http://reward:8000/users/@me/token",
        "https://hf-abcdefghijklmnopqrst.example/hf_abcdefghijklmnopqrst",
        "http://reward:8000/score?model=sk-reward-model-v1",
        "http://[::1]:8000/?",
        "reward:8000",
        None,
    ],
)
def test_a_correct_address_of_a_server_is_taken(address):
    assert not holds_credentials(address)


@pytest.mark.parametrize(
    "address",
    ["http://me:w@reward:8000", "me:w@reward:8000", "http://w@reward", "http://reward/?api_key=w", "http://me:p/w@a"],
)
def test_a_password_in_the_address_of_a_server_is_found(address):
    assert holds_credentials(address)


@pytest.mark.parametrize(
    "uri", ["https://me:w0rd@host/x", "https://host/x?token=w0rd", "postgresql://me:w/0rd@db/x?sslpassword=w0rd"]
)
def test_the_command_that_shows_the_runs_holds_no_password(uri):
    assert "0rd" not in ui_command(TrackingArguments(tracking_uri=uri))


def test_a_flat_option_is_short_and_there_once():
    flat = flat_options({"A": {"x": "abcdef", "same": 1}, "B": {"x": "other", "same": 1}}, 5)
    assert flat == {"x": "abcd…", "same": "1", "B.x": "other"}


WORD = st.text("ABCDEFGHIJKdefghijk0123456789", min_size=20, max_size=40)
FORMS = (
    *("me:p@{}@db.example", "https://me:p@{}@db/x", "postgresql://me:a/{}@db/x", "https%3A%2F%2Fme%3A{}%40db"),
    *(
        "sslpassword={}",
        "passwd={}",
        "password='two {}'",
        "PGPASSWORD={}",
        "pwd%3D{}&",
        "?pwd={}",
        "apikey={}",
        "?key={}",
    ),
    *("X-Amz-Signature={}", "X-Amz-Credential={}/eu", "X-Amz-Security-Token={}", "X-Goog-Signature={}", "?sig={}"),
    *("AccountKey={}==;", "SharedAccessSignature={}", "SharedAccessSignature sv=1&sig={}", "token%3D{}", "token={}"),
    *("Authorization: Bearer {}", "Authorization: Basic {}=", "Authorization%3A%20Bearer%20{}", "X-Api-Key: {}"),
    *(
        "{{'Authorization': 'Token {}'}}",
        '{{"client_secret": "{}"}}',
        "{{'token': '{}'}}",
        "HF_TOKEN={}",
        "Cookie: a={}",
    ),
    *("Bearer 1aB{}", "Basic aB{}=", "-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END RSA PRIVATE KEY-----"),
    *("eyJhbGciOi.{}.abc", "AKIA{}", "ASIA{}", "AIza{}", "ya29.{}", "npm_{}", "pypi-Ag{}", "dop_v1_{}", "hf_{}"),
    *(
        "gho_{}",
        "ghs_{}",
        "ghu_{}",
        "ghr_{}",
        "ghp_{}",
        "github_pat_{}",
        "glpat-{}",
        "sk-{}",
        "sk_live_{}",
        "rk_live_{}",
    ),
)
AROUND = st.text("abc xyz/.,:;()=&?%|\n", max_size=20)
PLACES = ("{}", "see {} now", "({})", "https://host/x?size=1&{}&b=2", "[{}]", "a%20{}%20b", "one\n{}\ntwo", '"{}"')


@given(form=st.sampled_from(FORMS), word=WORD, place=st.sampled_from(PLACES), before=AROUND, after=AROUND)
@settings(max_examples=600)
def test_a_secret_of_each_form_never_comes_out_at_any_place(form, word, place, before, after):
    word = word.upper() if form.startswith(("AKIA", "ASIA")) else word
    text = f"{before} {place.format(form.format(word))} {after}"
    shown = redact(text)
    assert word not in shown
    assert redact(shown) == shown
    nested = public_options((Options(model=text, kwargs={"list": [{"note": text}]}),))
    assert word not in str(nested)


@pytest.mark.parametrize(
    "text",
    [
        *("token", "the token: abc", "keyboard=3", "key=3", "monkey=1", "compass=3", "a secretary", "wrong password"),
        *(
            "pad_token=</s>",
            "eos_token: </s>",
            "{'pad_token': '<pad>'}",
            "?pad_token=x",
            "max_tokens=5",
            "pad_token_id=0",
        ),
        *(
            "num_key_value_heads=3",
            "per_token_logps=3",
            "tokenizer=gpt2",
            "pass: 3 of 4",
            "'key_size': 3",
            "sig_level: 3",
        ),
        *(
            "sk-learn-contrib-module",
            "risk-aversion-parameter-x",
            "hf_model",
            "hf_hub_download_timeout",
            "npm_config_x",
        ),
        *("models:/name@alias", "models:/my-name/3", "org/model@main", "python:3.11@sha256:0123456789abcdef"),
        *(
            "git@github.com:org/repo.git",
            "ssh://host/x",
            "git+https://github.com/a/b@v1.2",
            "https://host:5000/users/@me",
        ),
        *(
            "me@example.org",
            "mailto:me@example.org",
            "sqlite:////data/mlflow.db",
            "s3://bucket/key/x",
            "a basic understanding",
        ),
        *("http://[::1]:5000/#/experiments/1/runs/abc", "https://host/x?size=3&name=me", "my_rewards:brevity"),
        *("{'role': 'user', 'content': 'the key to it'}", "KeyError: 'key'", "Basic Understanding of Bearer tokens"),
    ],
)
def test_text_without_a_secret_does_not_change(text):
    assert redact(text) == text


def test_time_does_not_grow_with_the_square_of_the_length():
    for part in ("a_-", "://a:", "a+", "x:", '"a_-', "eyJabcdef.", "token = ", "%20", "?A_", "password: '"):
        start = time.perf_counter()
        redact(part * 20_000)
        assert time.perf_counter() - start < 2, part
