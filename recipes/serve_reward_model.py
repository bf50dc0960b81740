"""Serve a reward model or a process reward model over HTTP, to PPO runs on other machines or beside vLLM.

    python recipes/serve_reward_model.py --config recipes/configs/quickstart/serve_reward_model.yaml
    python recipes/serve_reward_model.py --model_name_or_path runs/my_model/reward_modeling --host 0.0.0.0

Clients set `reward_model_path: http://HOST:PORT`, and take the address in `judge_models` too. If REWARD_MODEL_TOKEN is
set in the environment of server and clients, the server answers only clients with this token. There is no encryption:
in a network that you do not trust, put a proxy with TLS in front and write `https://`.
"""

from rlhf_recipes.console import print_lines, quiet_start  # first: imports below print notes

# isort: split
import os

from accelerate import PartialState
from trl import ModelConfig

from rlhf_recipes.durability.termination import terminate_on_hangup
from rlhf_recipes.models.loading import model_init_kwargs
from rlhf_recipes.options.parser import RecipeParser
from rlhf_recipes.options.recipes import ServeArguments
from rlhf_recipes.rewards.functions import local_scorer
from rlhf_recipes.rewards.server import reward_app
from rlhf_recipes.rewards.serving import check_address, serve
from rlhf_recipes.rewards.transport import TOKEN_VARIABLE
from rlhf_recipes.tracking.registry import require_model


def main(script_args: ServeArguments, model_args: ModelConfig) -> None:
    """Load a reward model, and serve it until the process ends."""
    check_address(script_args.host, script_args.port)
    path = require_model("model_name_or_path", model_args.model_name_or_path, model_args.model_revision)

    init_kwargs = {**model_init_kwargs(model_args), "device_map": PartialState().device}
    scorer = local_scorer(path, **init_kwargs)
    scorer.batch_size = script_args.batch_size

    token = os.environ.get(TOKEN_VARIABLE)
    limits = {"max_request_bytes": script_args.max_request_bytes, "max_waiting": script_args.max_waiting}
    app = reward_app(scorer, weights=scorer.identity(), token=token, max_tokens=script_args.max_tokens, **limits)

    who = "Clients need the token." if token else f"{TOKEN_VARIABLE} is not set: every client gets answers."
    print_lines(f"Serving {path} at http://{script_args.host}:{script_args.port}. {who}")
    terminate_on_hangup()
    serve(app, script_args.host, script_args.port)


if __name__ == "__main__":
    quiet_start()
    parser = RecipeParser((ServeArguments, ModelConfig))
    main(*parser.parse_args_and_config())
