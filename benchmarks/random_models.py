"""Random models of a given shape. Speed and memory do not depend on the weights."""

import copy
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    tied: bool = False

    @property
    def kv_width(self) -> int:
        """Return the width of the keys of one token, equal to that of its values."""
        return self.kv_heads * self.hidden // self.heads

    @property
    def block_weights(self) -> int:
        """Return the number of weights in the linear layers of all blocks."""
        return self.layers * self.hidden * (2 * self.hidden + 2 * self.kv_width + 3 * self.mlp)

    @property
    def embedding(self) -> int:
        """Return the number of weights of the embedding, equal to that of the LM head."""
        return self.vocabulary * self.hidden

    def adapter_weights(self, rank: int) -> int:
        """Return the number of weights of LoRA on all linear layers of the blocks."""
        attention = 4 * self.hidden + 2 * (self.hidden + self.kv_width)
        return self.layers * rank * (attention + 3 * (self.hidden + self.mlp))

    def config(self, **kwargs: Any) -> LlamaConfig:
        """Return the configuration for `word_tokenizer`."""
        return llama_config(
            self.hidden, self.layers, self.heads, self.vocabulary, kv_heads=self.kv_heads, mlp=self.mlp,
            tie_word_embeddings=self.tied, **kwargs,
        )  # fmt: skip


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 176, 512),
    "4x128": Shape(128, 4, 4, 4, 341, 2_048),
    "8x512": Shape(512, 8, 8, 8, 1_365, 8_192),
    "4x256": Shape(256, 4, 4, 4, 682, 32_768),
    "smollm2_135m": Shape(576, 30, 9, 3, 1_536, 49_152, tied=True),
    "qwen2.5_0.5b": Shape(896, 24, 14, 2, 4_864, 151_936, tied=True),
    "qwen2.5_1.5b": Shape(1_536, 28, 12, 2, 8_960, 151_936, tied=True),
    "llama3.1_8b": Shape(4_096, 32, 32, 8, 14_336, 128_256),
}


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose token i is the word `wi`."""
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, vocabulary)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def llama_config(
    hidden: int,
    layers: int,
    heads: int,
    vocabulary: int,
    *,
    kv_heads: int | None = None,
    mlp: int | None = None,
    **kwargs: Any,
) -> LlamaConfig:
    """Return the configuration of a Llama for `word_tokenizer`."""
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=mlp or hidden * 8 // 3, num_key_value_heads=kv_heads or heads,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, **kwargs,
    )  # fmt: skip


def random_model(config: LlamaConfig, device: str, dtype: torch.dtype, *, classifier: bool = False) -> Any:
    """Return a causal LM, or a classifier with one output, made on the device in its precision."""
    torch.manual_seed(int(classifier))
    config, auto = copy.deepcopy(config), AutoModelForCausalLM
    if classifier:
        config.num_labels, auto = 1, AutoModelForSequenceClassification
    with torch.device(device):
        return auto.from_config(config, dtype=dtype)


def four_bit(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return NF4 with double quantisation."""
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def write_base(config: LlamaConfig, folder: str, device: str, dtype: torch.dtype) -> None:
    """Write a causal LM and its tokenizer."""
    random_model(config, device, dtype).save_pretrained(folder)
    word_tokenizer(config.vocab_size).save_pretrained(folder)


def write_reward_model(config: LlamaConfig, folder: str, device: str, dtype: torch.dtype) -> None:
    """Write a classifier and its tokenizer."""
    random_model(config, device, dtype, classifier=True).save_pretrained(folder)
    word_tokenizer(config.vocab_size).save_pretrained(folder)


def write_reward_adapter(
    config: LlamaConfig, folder: str, base: str, rank: int, device: str, dtype: torch.dtype, *, quantized: bool
) -> None:
    """Write a reward model that is a LoRA adapter on the base in the folder `base`, in 4 bit or not."""
    from rlhf_recipes.models.quantization import save_quantization

    classifier = random_model(config, device, dtype, classifier=True)
    classifier.name_or_path = base
    adapter = get_peft_model(classifier, LoraConfig(r=rank, target_modules="all-linear", task_type="SEQ_CLS"))
    adapter.save_pretrained(folder)
    if quantized:
        adapter.config.quantization_config = four_bit(dtype)
        save_quantization(adapter, folder)
    word_tokenizer(config.vocab_size).save_pretrained(folder)


def folder_for_weights(size: int) -> tempfile.TemporaryDirectory:
    """Return a temporary folder for `size` bytes: in memory if that leaves some free, else on the disk."""
    memory = Path("/dev/shm")
    fits = memory.is_dir() and shutil.disk_usage(memory).free > size + 2**30
    return tempfile.TemporaryDirectory(dir=memory if fits else None)
