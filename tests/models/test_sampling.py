"""Rows leave a batch when they have ended, and a batch is cut into chunks: the same answers from less work."""

from contextlib import contextmanager

import pytest
import tiny
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import (
    GenerationConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
)

from rlhf_recipes.models import sampling
from rlhf_recipes.models.sampling import sample_without_ended, thrifty_sampling

pytestmark = pytest.mark.tiny

LONG = 72
ENDS = [1, *range(20, 40)]
GREEDY = {"do_sample": False, "max_new_tokens": LONG, "eos_token_id": ENDS, "pad_token_id": 0}


class Lengths(LogitsProcessor):
    """End the answer to the prompt whose last token is i after `lengths[i]` tokens."""

    supports_continuous_batching = True  # the row is read from its tokens

    def __init__(self, lengths, prompt):
        self.lengths, self.prompt = torch.tensor(lengths), prompt

    def __call__(self, input_ids, scores):
        ends = input_ids.size(1) - self.prompt + 1 >= self.lengths[input_ids[:, self.prompt - 1]]
        scores = scores.clone()
        scores[:, 1] = -torch.inf
        scores[ends] = -torch.inf
        scores[ends, 1] = 0
        return scores


class OnGPU(LlamaForCausalLM):
    device = torch.device("cuda", 0)


def batch(rows=16):
    """Return prompts of several lengths, padded on the left."""
    texts = [tiny.PROMPTS[i % 8] + " red" * (i // 8) for i in range(rows)]
    encoded = tiny.tokenizer()(texts, return_tensors="pt", padding=True, padding_side="left")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def config(**changes):
    return GenerationConfig(**{**GREEDY, **changes})


@contextmanager
def watched(model):
    """Note the shape of the tokens of each forward."""
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield shapes
    finally:
        hook.remove()


def both(model, inputs, settings, **thrift):
    """Return the answers and the shapes of the forwards, without and with thrift."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    with watched(causal) as plain_shapes:
        plain = model.generate(**inputs, generation_config=settings)
    with watched(causal) as shapes, thrifty_sampling(model, **thrift):
        answers = model.generate(**inputs, generation_config=settings)
    return plain, answers, plain_shapes, shapes


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_greedy_answers_are_the_same(rows, adapter):
    model = tiny.policy(tiny.tokenizer())
    model = tiny.sft_adapter(model).eval() if adapter else model.eval()
    plain, answers, before, after = both(model, batch(rows), config())
    assert torch.equal(plain, answers)
    assert len(before) == len(after)
    assert "generate" not in vars(model)
    if rows == 16:
        assert sum(n for n, _ in after) < 0.6 * sum(n for n, _ in before)


def test_an_answer_of_one_token_leaves_after_it():
    model, inputs = tiny.policy(tiny.tokenizer()).eval(), batch()
    first = model.generate(**inputs, generation_config=config(max_new_tokens=1))[:, -1]
    plain, answers, _, shapes = both(model, inputs, config(eos_token_id=first[:2].tolist()))
    assert torch.equal(plain, answers)
    assert shapes[1][0] == 16 - int(torch.isin(first, first[:2]).sum()) <= 14


def test_a_long_tail_costs_the_sum_of_its_lengths():
    """31 answers are short and one is long: what is computed is what counts, and a few tokens more."""
    lengths = [1 + i % 9 for i in range(31)] + [LONG]
    model = tiny.policy(tiny.tokenizer()).eval()
    inputs = {"input_ids": torch.arange(32)[:, None].repeat(1, 4), "attention_mask": torch.ones(32, 4).long()}
    processor = LogitsProcessorList([Lengths(lengths, 4)])
    with watched(model) as shapes, thrifty_sampling(model):
        answers = model.generate(
            **inputs, generation_config=config(eos_token_id=1, do_sample=True), logits_processor=processor
        )
    ended = answers[:, 4:].eq(1).int().argmax(dim=1) + 1
    assert ended.tolist() == lengths
    computed = sum(rows for rows, _ in shapes)
    assert sum(lengths) <= computed <= 1.15 * sum(lengths) < 0.12 * 32 * LONG
    assert len(shapes) == LONG  # no forward more than without


def test_sampled_answers_have_the_distribution_of_the_policy():
    """With a row in the wrong place, the surprise of a token would exceed the entropy of its distribution."""
    torch.manual_seed(0)
    model = tiny.policy(tiny.tokenizer()).eval()
    inputs = {name: x.repeat(32, 1) for name, x in batch().items()}
    with watched(model) as shapes, thrifty_sampling(model):
        settings = config(do_sample=True, top_k=0, eos_token_id=[1, *range(20, 30)])
        answers = model.generate(**inputs, generation_config=settings)
    assert shapes[-1][0] < shapes[0][0] / 4
    width = inputs["input_ids"].size(1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(answers[:, width:])], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logps = model(input_ids=answers, attention_mask=mask, position_ids=positions).logits[:, width - 1 : -1]
    logps = logps.log_softmax(-1)
    surprise = -logps.gather(2, answers[:, width:, None]).squeeze(2)
    entropy = -(logps.exp() * logps).sum(-1)
    variance = (logps.exp() * logps**2).sum(-1) - entropy**2
    ends = torch.isin(answers[:, width:], torch.tensor([1, *range(20, 30)])).int()
    counts = (ends.cumsum(1) - ends) == 0
    z = (surprise - entropy)[counts].sum() / variance[counts].sum().sqrt()
    assert abs(z) < 3


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},  # any choice: another cache may keep more than keys and values
        {"min_new_tokens": 12},
        {"repetition_penalty": 1.3},
        {"encoder_repetition_penalty": 1.3},
        {"use_cache": False},
    ],
    ids=lambda settings: "-".join(f"{name} {value}" for name, value in settings.items()),
)
def test_rows_stay_where_they_cannot_leave(settings):
    plain, answers, before, after = both(tiny.policy(tiny.tokenizer()).eval(), batch(), config(**settings))
    assert torch.equal(plain, answers)
    assert before == after


def test_rows_stay_with_the_beams_of_the_model():
    model = tiny.policy(tiny.tokenizer()).eval()
    model.generation_config.num_beams = 2
    plain, answers, before, after = both(model, batch(), config())
    assert torch.equal(plain, answers)
    assert before == after


def test_rows_leave_with_the_cache_that_files_of_gemma_name():
    """transformers ignores the name."""
    model = tiny.policy(tiny.tokenizer()).eval()
    model.generation_config.cache_implementation = "hybrid"
    plain, answers, before, after = both(model, batch(), config())
    assert torch.equal(plain, answers)
    assert before != after


def test_rows_stay_in_a_cache_of_more_than_keys_and_values():
    """Half of the layers keep the inputs of a convolution."""
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Lfm2ForCausalLM(Lfm2Config(**sizes, **layers, vocab_size=320, pad_token_id=0, initializer_range=0.2))
    plain, answers, before, after = both(model.eval(), batch(), config())
    assert torch.equal(plain, answers)
    assert before == after


@pytest.mark.parametrize("kind", ["prefix", "alora"])
def test_rows_stay_with_an_adapter_that_knows_them(kind):
    """A prefix is in the cache before the first token. An activated LoRA finds its place in each row."""
    adapter = (
        PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        if kind == "prefix"
        else LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", alora_invocation_tokens=[65])
    )
    model = get_peft_model(tiny.policy(tiny.tokenizer()), adapter).eval()
    plain, answers, before, after = both(model, batch(), config())
    assert torch.equal(plain, answers)
    assert before == after


@pytest.mark.parametrize("limit", [10, LONG])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_chunks_give_the_same_answers(limit, adapter):
    """A chunk has no padding before its own longest prompt, and short answers are padded again."""
    model = tiny.policy(tiny.tokenizer())
    model = tiny.sft_adapter(model).eval() if adapter else model.eval()
    inputs = batch()
    plain, answers, _, shapes = both(model, inputs, config(max_new_tokens=limit), rows_at_once=3)
    assert torch.equal(plain, answers)
    lengths = inputs["attention_mask"].sum(dim=1).sort().values
    prompts = [shape for shape in shapes if shape[1] > 1]
    ends = torch.tensor([n for n, _ in prompts]).cumsum(0)
    assert max(n for n, _ in prompts) == 3
    assert [width for _, width in prompts] == lengths[ends - 1].tolist()


def calls(inputs, **thrift):
    """Return the tensors of the calls of `generate` for one batch."""
    made = []

    def fake(generation_config, custom_generate=None, **inputs):
        made.append(inputs)
        return inputs["input_ids"]

    model = tiny.policy(tiny.tokenizer())
    model.generate = fake
    with thrifty_sampling(model, **thrift):
        model.generate(**inputs, generation_config=config(max_new_tokens=4))
    assert model.generate is fake
    return made


def test_images_are_not_cut():
    assert len(calls({**batch(), "pixel_values": torch.ones(5, 3)}, rows_at_once=2)) == 1


def test_a_tensor_of_the_shape_of_the_tokens_is_cut():
    inputs = batch()
    parts = calls({**inputs, "token_type_ids": 2 * inputs["input_ids"]}, rows_at_once=4)
    assert [len(part["input_ids"]) for part in parts] == [4] * 4
    assert all(torch.equal(part["token_type_ids"], 2 * part["input_ids"]) for part in parts)


@contextmanager
def autocast_on_gpu():
    """Do what `torch.autocast` does on a machine with a GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


def calls_on_gpu(inputs, weights=torch.float32, **thrift):
    """Return the inputs of the calls of `generate` for one batch, and its answers: a row's first column, twice."""
    calls = []

    def fake(input_ids, **others):
        calls.append(input_ids)
        return torch.cat([input_ids, input_ids[:, :1], input_ids[:, :1]], dim=1)

    model = OnGPU(tiny.policy(tiny.tokenizer()).config).to(weights)
    model.generate = fake
    with thrifty_sampling(model, **thrift):
        return calls, model.generate(**inputs, generation_config=config(max_new_tokens=400))[:, -2:]


@pytest.mark.parametrize(
    ("free", "weights", "autocast", "calls"),
    [
        (1e9, torch.float32, False, 1),
        (1.5e6, torch.float32, False, 2),
        (1.5e6, torch.bfloat16, False, 1),
        (1.4e6, torch.float32, True, 1),
        (1.29e6, torch.bfloat16, True, 1),
        (1.29e6, torch.float32, True, 2),  # autocast keeps a copy of the weights
        (0, torch.float32, False, 16),
    ],
)
def test_without_the_option_the_free_memory_of_the_gpu_decides(monkeypatch, free, weights, autocast, calls):
    monkeypatch.setattr(sampling, "free_memory", lambda device: free)
    precision = {"precision": autocast_on_gpu} if autocast else {}
    made, answers = calls_on_gpu(batch(), weights, **precision)
    assert len(made) == calls
    assert sum(map(len, made)) == len(answers) == 16


def test_with_weights_in_shards_all_ranks_make_the_same_calls(monkeypatch):
    monkeypatch.setattr(sampling, "free_memory", lambda device: 1e9)
    monkeypatch.setattr(sampling, "is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(sampling, "global_max", lambda most: most * torch.tensor([4, 1]))  # less memory elsewhere
    assert len(calls_on_gpu(batch())[0]) == 4
    few = batch(2)
    made, answers = calls_on_gpu(few)  # fewer rows here
    assert [len(ids) for ids in made] == [1] * 4
    firsts = few["attention_mask"].argmax(dim=1, keepdim=True)
    assert torch.equal(answers, few["input_ids"].gather(1, firsts).repeat(1, 2))
    monkeypatch.setattr(sampling, "global_max", lambda most: most.maximum(torch.tensor([4, 1])))  # images elsewhere
    assert len(calls_on_gpu(batch(), rows_at_once=2)[0]) == 1


def test_a_rank_with_images_tells_the_others(monkeypatch):
    told = []

    def note(most):
        told.append(most.tolist())
        return most.maximum(torch.tensor([4, 0]))

    monkeypatch.setattr(sampling, "is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(sampling, "global_max", note)
    assert len(calls({**batch(), "pixel_values": torch.ones(5, 3)})) == 1
    assert told == [[1, 1]]


def test_under_fsdp_autocast_keeps_no_copy_of_the_weights(monkeypatch):
    monkeypatch.setattr(sampling, "free_memory", lambda device: 1.29e6)
    monkeypatch.setattr(sampling, "is_fsdp_managed_module", lambda model: True)
    assert len(calls_on_gpu(batch(), precision=autocast_on_gpu)[0]) == 1


def test_rows_stay_with_weights_in_shards(monkeypatch):
    """The forwards of all ranks are one: a rank that has ended earlier would wait for ever."""
    monkeypatch.setattr(sampling, "is_deepspeed_zero3_enabled", lambda: True)
    plain, answers, before, after = both(tiny.policy(tiny.tokenizer()).eval(), batch(), config())
    assert torch.equal(plain, answers)
    assert before == after


@pytest.mark.parametrize(("limit", "leave"), [(16, False), (100, True)])
def test_rows_stay_if_the_longest_row_chooses_the_rope(limit, leave):
    longrope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
        "original_max_position_embeddings": limit,
    }  # fmt: skip
    torch.manual_seed(0)
    settings = tiny.policy(tiny.tokenizer()).config
    settings.rope_parameters = longrope
    plain, answers, before, after = both(LlamaForCausalLM(settings).eval(), batch(), config())
    assert torch.equal(plain, answers)
    assert (before != after) is leave


@pytest.mark.parametrize("weights", ["whole", "shards"])
def test_fixed_draws_keep_all_rows_and_only_the_option_cuts(monkeypatch, weights):
    monkeypatch.setattr(sampling, "free_memory", lambda device: 0)
    monkeypatch.setattr(sampling, "is_deepspeed_zero3_enabled", lambda: weights == "shards")
    plain, answers, before, after = both(tiny.policy(tiny.tokenizer()).eval(), batch(), config(), fixed_draws=True)
    assert torch.equal(plain, answers)
    assert before == after
    assert len(calls_on_gpu(batch(), fixed_draws=True)[0]) == 1
    assert len(calls_on_gpu(batch(), fixed_draws=True, rows_at_once=6)[0]) == 3


@pytest.mark.parametrize("rows_at_once", [None, 2])
def test_rows_without_a_token_for_padding(rows_at_once):
    """transformers pads with the first end."""
    model, settings = tiny.policy(tiny.tokenizer()).eval(), config(eos_token_id=ENDS[1:], pad_token_id=None)
    model.generation_config.pad_token_id = None
    plain, answers, _, _ = both(model, batch(), settings, rows_at_once=rows_at_once)
    assert torch.equal(plain, answers)


def test_a_chunk_of_empty_prompts():
    model, inputs, settings = (
        tiny.policy(tiny.tokenizer()).eval(),
        batch(),
        config(max_new_tokens=5, eos_token_id=None),
    )
    model.generation_config.eos_token_id = None
    inputs["attention_mask"][:2] = 0
    plain, answers, _, shapes = both(model, inputs, settings, rows_at_once=2)
    assert shapes[0] == (2, 1)
    assert torch.equal(plain[2:], answers[2:])


def test_a_call_through_the_hook_of_transformers():
    model, inputs = tiny.policy(tiny.tokenizer()).eval(), batch()
    plain = model.generate(**inputs, generation_config=config(max_new_tokens=30))
    answers = model.generate(
        **inputs, generation_config=config(max_new_tokens=30), custom_generate=sample_without_ended
    )
    assert torch.equal(plain, answers)
