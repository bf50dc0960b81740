"""The description of a run says how it ended and what it started from, and keeps what a user has written."""

import pytest
from mlflow.utils.validation import MAX_TAG_VAL_LENGTH

from rlhf_recipes.evaluation.figures import rounded
from rlhf_recipes.tracking.description import LAST_LINE, Description, Input, sentence_of_end, with_own_text


def test_the_end_comes_first_and_figures_have_their_intervals():
    description = Description("ppo", [Input("policy", "my_run|a (out/sft)", "#/experiments/1/runs/a")])
    description.add_log([{"step": 1, "objective/scores": -0.00001, "eval_gold/win_rate": 0.5, "note": "text"}])
    win_rate = {"eval_gold/win_rate": 0.7123, "eval_gold/win_rate_low": 0.65, "eval_gold/win_rate_high": 0.7654}
    description.add_log(
        [{"step": 40, "objective/scores": 1234567.0, "loss": 0.0, "completions/mean_length": 12.0, **win_rate}]
    )
    description.alarms = ["The KL accelerates."]
    description.end = sentence_of_end("FINISHED", 40, 100)
    assert description.text().split("\n") == [
        "**PPO**: finished at step 40 of 100.",
        *("", "- alarm: The KL accelerates.", ""),
        "- win rate by gold: 0.500 at step 1, 0.712 (95 %: 0.650 to 0.765) at step 40",
        "- score: 0.000 at step 1, 1,234,567 at step 40",
        "- length (tokens): 12.0",
        *("", r"- policy: [my\_run\|a (out/sft)](#/experiments/1/runs/a)"),
        *("", LAST_LINE),
    ]


def test_an_evaluation_of_reward_models_shows_the_accuracy_of_each():
    description = Description("reward_model_evaluation")
    accuracy = {"rm/accuracy": 0.7, "rm/accuracy_low": 0.65, "rm/accuracy_high": 0.75, "rm/category/x/accuracy": 0.1}
    description.add_figures(accuracy, 0)
    text = description.text()
    assert text.startswith("**Evaluation of reward models**")
    assert "- accuracy of rm: 0.700 (95 %: 0.650 to 0.750)" in text
    assert "0.100" not in text


@pytest.mark.parametrize("value", [-0.0, float("nan"), float("inf")])
def test_every_number_can_be_described(value):
    description = Description("ppo")
    description.add_figures({"loss": value}, 0)
    assert f"- loss: {rounded(value)}\n" in description.text()


def test_held_out_figures_are_those_of_the_weights_that_were_saved():
    description = Description("ppo", best_step=20)
    for step, rate in ((10, 0.5), (20, 0.75), (30, 0.25)):
        description.add_figures({"eval_gold/win_rate": rate, "objective/scores": rate}, step)
    text = description.text()
    assert "win rate by gold: 0.500 at step 10, 0.750 at step 20\n" in text
    assert "score: 0.500 at step 10, 0.250 at step 30\n" in text


def test_a_failure_says_why_on_one_line_without_secrets():
    text = sentence_of_end("FAILED", None, 0, "no\npassword=hunter2 `x`")
    assert text == r"failed. no password=\*\*\* \`x\`"
    assert sentence_of_end("KILLED", 3, 9, "Terminated") == "stopped at step 3 of 9."


def test_the_text_of_a_user_stays():
    first, second = Description("ppo").text(), Description("sft").text()
    assert with_own_text("", first) == first
    noted = with_own_text("mine", first)
    assert noted == f"{first}\n\nmine"
    assert with_own_text(noted, second) == f"{second}\n\nmine"
    replaced = with_own_text("only mine", second)
    assert replaced.endswith(f"{LAST_LINE}\n\nonly mine")


def test_the_text_of_a_user_is_not_cut():
    known = "x" * MAX_TAG_VAL_LENGTH
    assert with_own_text(known, "text") == known


def test_a_long_log_stays_short():
    description = Description("ppo", [Input("data", "x" * 5_000)], alarms=["y" * 999] * 99, end="z")
    description.add_figures({f"eval_{i}/win_rate": 0.5 for i in range(999)}, 1)
    assert len(description.text()) < MAX_TAG_VAL_LENGTH / 2
