"""Each question about the form of an option has one answer, wherever it is asked."""

import pytest
from trl import SFTConfig

from rlhf_recipes.options.paths import is_address, is_function, require_path, why_unread
from rlhf_recipes.options.recipes import JudgeArguments
from rlhf_recipes.options.secrets import reason_of
from rlhf_recipes.options.training import check_training
from rlhf_recipes.rewards.functions import import_function


@pytest.mark.parametrize("reference", ["1a..b:2", "a.:b", ".a:b", "a:1b", "a:b:c", "a b:c", "a", ":b", "a:"])
def test_options_and_imports_refuse_the_same_references_to_functions(reference):
    with pytest.raises(ValueError, match="`judge_functions` must name each function as `package.module:function`"):
        JudgeArguments(dataset_name="d", judge_functions=[reference])
    with pytest.raises(ValueError, match="A function is named as `package.module:function`"):
        import_function(reference)


@pytest.mark.parametrize("reference", ["a:b", "a.b_1:_c", "größe:f"])
def test_a_reference_to_a_function_is_known(reference):
    assert is_function(reference)


@pytest.mark.parametrize("path", ["httpd_rm", "http_models/rm", "https/rm", "http:/rm", None, 3])
def test_a_directory_is_no_address(path):
    assert not is_address(path)


def test_two_judges_may_not_have_one_name_because_it_begins_with_http():
    with pytest.raises(ValueError, match="Judges must have different names, got httpd_rm, httpd_rm"):
        JudgeArguments(dataset_name="d", judge_models=["httpd_rm", "other/httpd_rm"])
    with pytest.raises(ValueError, match="Judges must have different names, got rm, rm"):
        JudgeArguments(dataset_name="d", judge_models=["httpd/rm", "other/rm"])


def test_a_directory_without_the_file_is_told_from_one_that_has_it(tmp_path):
    assert why_unread(str(tmp_path), "config.json", "other.json") == "it has no `config.json`"
    (tmp_path / "other.json").write_text("{}")
    assert why_unread(str(tmp_path), "config.json", "other.json") is None
    assert "not a/valid/name" in why_unread("not a/valid/name", "config.json")


def test_a_directory_that_cannot_be_read_hides_no_message(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    with pytest.raises(FileNotFoundError, match=rf"`m` is .*which does not exist. Did you mean `{tmp_path}/base`\?$"):
        require_path("m", f"{tmp_path}/bse/")
    monkeypatch.setattr("pathlib.Path.iterdir", _refuse)  # root reads all
    with pytest.raises(FileNotFoundError, match=r"`m` is .*bse, which does not exist\.$"):
        require_path("m", f"{tmp_path}/bse")


def _refuse(path):
    raise PermissionError


def test_a_chat_template_that_is_nowhere_is_refused(tmp_path):
    options = {"use_cpu": True, "bf16": False}
    message = "`chat_template_path` 'me/nowhere' is no file here, and no tokenizer: the Hub "
    with pytest.raises(ValueError, match=message):
        check_training(SFTConfig(str(tmp_path), chat_template_path="me/nowhere", **options))
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    for path in (None, str(tmp_path / "template.jinja"), str(tmp_path)):
        check_training(SFTConfig(str(tmp_path), chat_template_path=path, **options))


def test_the_reason_of_an_error_is_one_short_line_without_secrets():
    assert reason_of(ValueError(f"\n at http://me:word@host\nmore {'x' * 400}")) == "at http://***@host"
    assert len(reason_of(ValueError("x" * 400))) == 300
    assert reason_of(ValueError()) == reason_of(ValueError(" \n")) == "ValueError"
