"""Random models of a given shape. Speed and memory do not depend on the weights."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose token i is the word `wi`."""
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, vocabulary)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def llama_config(hidden: int, layers: int, heads: int, vocabulary: int, **kwargs) -> LlamaConfig:
    """Return the configuration of a Llama for `word_tokenizer`."""
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, intermediate_size=hidden * 8 // 3,
        num_attention_heads=heads, num_key_value_heads=heads, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        **kwargs,
    )  # fmt: skip
