"""Export: a trained policy as a plain model of transformers, for `pipeline`, vLLM or the Hub.

    python recipes/export.py --model_name_or_path runs/my_model/ppo --output_dir runs/my_model/export

An adapter is merged into its base, a 4-bit one into a dequantised copy of what it was trained on. The value head stays
behind; tokenizer, chat template and the tokens that end an answer come along.
"""

from rlhf_recipes.console import print_lines, quiet_start  # first: imports below print notes

# isort: split
from trl import ModelConfig

from rlhf_recipes.durability.earlier_run import move_earlier_run, own_directory
from rlhf_recipes.durability.finite import all_finite
from rlhf_recipes.evaluation.policies import eos_token_ids
from rlhf_recipes.models.generation import mend_generation_config
from rlhf_recipes.models.loading import load_policy, load_tokenizer, model_init_kwargs
from rlhf_recipes.options.parser import RecipeParser
from rlhf_recipes.options.recipes import ExportArguments
from rlhf_recipes.tracking.registry import require_model


def main(script_args: ExportArguments, model_args: ModelConfig) -> None:
    """Load, merge and save."""
    with own_directory(script_args, script_args, model_args):
        path = require_model("model_name_or_path", model_args.model_name_or_path, model_args.model_revision)
        policy, tokenizer = load_policy(path, **model_init_kwargs(model_args)), load_tokenizer(path)
        if not all_finite(policy.parameters()):
            raise ValueError(
                f"{path} holds weights that are not finite. Nothing is exported: name an earlier checkpoint."
            )

        policy.generation_config.eos_token_id = eos_token_ids(policy, tokenizer)
        policy.generation_config.pad_token_id = tokenizer.pad_token_id
        mend_generation_config(policy)

        move_earlier_run(script_args.output_dir)
        policy.save_pretrained(script_args.output_dir)
        tokenizer.save_pretrained(script_args.output_dir)
    print_lines(
        f"Written to {script_args.output_dir}. Try:",
        f"  vllm serve {script_args.output_dir}",
    )


if __name__ == "__main__":
    quiet_start()
    parser = RecipeParser((ExportArguments, ModelConfig))
    main(*parser.parse_args_and_config())
