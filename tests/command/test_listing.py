"""`rlhf config` shows every option once, ours first, each under a topic."""

import dataclasses
import re

import pytest

from rlhf_recipes.command.listing import main, print_help
from rlhf_recipes.command.mistakes import UsageError
from rlhf_recipes.command.stages import STAGES
from rlhf_recipes.command.topics import OTHER, options_of

LISTED = [name for name, stage in STAGES.items() if stage.kinds]


def _names(text):
    return re.findall(r"^  (\w+): ", text, re.MULTILINE)


@pytest.mark.parametrize("name", LISTED)
def test_every_option_is_listed_once_in_a_hundred_columns(name, capsys):
    main([name])
    text = capsys.readouterr().out
    kinds = STAGES[name].options()
    fields = {field.name for kind in kinds for field in dataclasses.fields(kind) if field.init}
    assert sorted(_names(text)) == sorted(fields)
    assert max(map(len, text.splitlines())) <= 100
    owners = re.findall(r"^OPTIONS OF (\w+)$", text, re.MULTILINE)
    assert owners == [owner for owner in ("RLHF_RECIPES", "TRL", "TRANSFORMERS") if owner in owners]
    assert text.startswith(f"{len(fields)} options of `rlhf {name}`")


def test_each_has_default_type_meaning_and_owner():
    options = {option.name: option for option in options_of(STAGES["ppo"].options())}
    kl = options["kl_coef"]
    assert (kl.default, kl.kind, kl.owner, kl.topic) == ("0.05", "number", "rlhf_recipes", "KL to the reference")
    assert kl.help.startswith("Price of one nat of KL")
    assert (options["kl_estimator"].kind, options["kl_estimator"].default) == ("k1 | k2 | k3 | full", "k1")
    assert (options["response_separator"].default, options["use_peft"].default) == (r'"\n\n"', "false")
    assert (options["beta"].owner, options["warmup_steps"].owner) == ("TRL", "transformers")
    assert (options["judge_models"].kind, options["reward_model_path"].default) == ("list", "null")
    assert options["num_iterations"].owner == "rlhf_recipes"  # TRL's name with a default of ours


def test_ours_all_have_a_topic():
    for name in LISTED:
        ours = [option for option in options_of(STAGES[name].options()) if option.owner == "rlhf_recipes"]
        assert not [option.name for option in ours if option.topic == OTHER]


def test_a_search_looks_at_names_and_meanings(capsys):
    main(["ppo", "--search", "KL"])
    found = _names(capsys.readouterr().out)
    assert {"kl_coef", "target_kl", "max_kl", "max_update_kl"} <= set(found)
    assert "learning_rate" not in found
    main(["ppo", "--search", "price of one nat"])
    assert _names(capsys.readouterr().out) == ["kl_coef"]
    with pytest.raises(UsageError, match=r"No option has 'kl_coeff' in it. Did you mean `kl_coef`\?"):
        main(["ppo", "--search", "kl_coeff"])


def test_the_method_of_a_baseline_chooses_its_options(capsys):
    main(["baseline", "--method", "dpo"])
    assert "f_divergence_type" in _names(capsys.readouterr().out)
    main(["baseline"])
    assert "f_divergence_type" not in _names(capsys.readouterr().out)


@pytest.mark.parametrize("name", LISTED)
def test_the_help_is_short_and_says_how_to_see_all(name, capsys):
    print_help(name, STAGES[name])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 80
    assert lines[-1].endswith(f"options: rlhf config {name}")
    assert lines[2] == STAGES[name].purpose
