"""Every argument that stock models take is in `docs/stock_arguments.md`, and what its row says holds."""

import copy
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import METHODS, budgets_of, random_batch, stock_inputs, tiny_model, tiny_processor, tiny_tokenizer
from factories import uncompressed as stock_of
from PIL import Image
from transformers import (
    GenerationConfig,
    GenerationMixin,
    ImageTextToTextPipeline,
    InternVLForConditionalGeneration,
    LlavaForConditionalGeneration,
    LogitsProcessorList,
    StoppingCriteriaList,
    WatermarkingConfig,
)
from transformers.utils import TransformersKwargs

TESTS = Path(__file__).parent
GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
SAMPLED = GREEDY | {"do_sample": True}
BEAMS = GREEDY | {"num_beams": 3}
MANY_ENDS = list(range(0, 500, 3))


def tables():
    """Section -> argument -> (what ours does, its test)."""
    found, section = {}, None
    for line in (TESTS.parent / "docs" / "stock_arguments.md").read_text().splitlines():
        if line.startswith("## "):
            section = found.setdefault(line[3:], {})
        elif row := re.fullmatch(r"\| `(\w+)` \| .+ \| (.+) \| `(.+)` \|", line):
            assert row[1] not in section, f"{row[1]} has two rows"
            section[row[1]] = row[2], row[3]
    return found


TABLES = tables()


def parameters_of(function):
    return {
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }


INSTALLED = {
    "forward": parameters_of(LlavaForConditionalGeneration.forward)
    | parameters_of(InternVLForConditionalGeneration.forward)
    | set(TransformersKwargs.__annotations__),
    "generate": parameters_of(GenerationMixin.generate),
    # the others say where a config comes from
    "GenerationConfig": set(vars(GenerationConfig())) - {"_from_model_config", "_commit_hash", "transformers_version"},
    "pipeline": parameters_of(ImageTextToTextPipeline._sanitize_parameters),
}


@pytest.mark.parametrize("section", INSTALLED)
def test_every_argument_has_a_row(section):
    assert not sorted(INSTALLED[section] - set(TABLES[section])), "no row in docs/stock_arguments.md"


def test_every_row_has_its_test():
    for section, rows in TABLES.items():
        for name, (_, test) in rows.items():
            file, _, function = test.partition("::")
            assert f"def {function}(" in (TESTS / file).read_text(), f"{section}, {name}: {test}"


def test_every_row_that_a_test_here_must_show_has_its_case():
    for section, test, cases in (
        ("generate", "generate_gives", GENERATE),
        ("GenerationConfig", "generate_gives", GENERATE),
        ("forward", "forward_gives", FORWARD),
        ("pipeline", "the_pipeline", PIPELINE),
    ):
        shown = {name for name, (_, shown_by) in TABLES[section].items() if f"::test_{test}" in shown_by}
        assert not sorted(shown - set(cases)), section
    refused = {name for rows in TABLES.values() for name, (_, test) in rows.items() if "::test_refused" in test}
    assert refused == set(REFUSED)


@pytest.fixture(scope="module", params=("vico", "llavolta"))
def models(request):
    """A model and the stock model of its weights: InternVL and LLaVA."""
    ours = tiny_model(request.param)
    return ours, stock_of(ours)


def one_tile_each(config, num_rows=2):
    """Rows of one image of one tile: transformers 4.57 gives beams of larger images the tiles of others."""
    for seed in range(1000):
        generator = torch.Generator().manual_seed(seed)
        batch = random_batch(config, generator, images_per_row=[1] * num_rows, padding_side="left")
        if int(batch["num_tiles"].sum()) == num_rows:
            return batch
    raise AssertionError("no such batch")


def reverse_scores(input_ids, scores):
    return scores.roll(1, -1)


def always_stop(input_ids, scores, **kwargs):
    return torch.ones(input_ids.shape[0], dtype=torch.bool)


def one_more_token(model, input_ids, **kwargs):
    return torch.cat([input_ids, torch.full_like(input_ids[:, :1], 5)], 1)


NEGATIVE = {"guidance_scale": 2.0, "negative_prompt_ids": torch.tensor([[5, 6], [5, 7]])}
EVERYTHING = GREEDY | {"return_dict_in_generate": True}

# `"L+4"` stands for the length of the prompt and 4, `"zeros"` for a tensor like the prompt
GENERATE = {
    "assistant_confidence_threshold": GREEDY | {"assistant_confidence_threshold": 0.3},
    "assistant_ensemble_weight": GREEDY | {"assistant_ensemble_weight": 0.3},
    "assistant_lookbehind": GREEDY | {"assistant_lookbehind": 3},
    "target_lookbehind": GREEDY | {"target_lookbehind": 3},
    "num_assistant_tokens": GREEDY | {"num_assistant_tokens": 3},
    "num_assistant_tokens_schedule": GREEDY | {"num_assistant_tokens_schedule": "heuristic"},
    "bad_words_ids": GREEDY | {"bad_words_ids": [[token] for token in range(400)]},
    "begin_suppress_tokens": GREEDY | {"begin_suppress_tokens": list(range(400))},
    "suppress_tokens": GREEDY | {"suppress_tokens": list(range(400))},
    "bos_token_id": GREEDY | {"bos_token_id": 1},
    "eos_token_id": GREEDY | {"eos_token_id": MANY_ENDS},
    "pad_token_id": GREEDY | {"eos_token_id": MANY_ENDS, "pad_token_id": 3},
    "decoder_start_token_id": GREEDY | {"decoder_start_token_id": 5},
    "cache_implementation": GREEDY | {"cache_implementation": "static", "disable_compile": True},
    "cache_config": GREEDY | {"cache_config": {}},
    "max_cache_len": GREEDY | {"cache_implementation": "static", "disable_compile": True, "max_cache_len": 500},
    "compile_config": GREEDY | {"compile_config": None},
    "disable_compile": GREEDY | {"disable_compile": True},
    "constraints": BEAMS | {"constraints": []},
    "force_words_ids": BEAMS | {"force_words_ids": [[5]]},
    "num_beam_groups": GREEDY | {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "diversity_penalty": GREEDY | {"diversity_penalty": 0.0},
    "dola_layers": GREEDY | {"dola_layers": "low"},
    "penalty_alpha": GREEDY | {"penalty_alpha": 0.5, "top_k": 4},
    "low_memory": GREEDY | {"low_memory": True},
    "early_stopping": BEAMS | {"early_stopping": True, "eos_token_id": MANY_ENDS},
    "length_penalty": BEAMS | {"length_penalty": 3.0, "eos_token_id": MANY_ENDS},
    "num_beams": BEAMS,
    "num_return_sequences": SAMPLED | {"num_return_sequences": 2},
    "do_sample": SAMPLED,
    "epsilon_cutoff": SAMPLED | {"epsilon_cutoff": 0.01},
    "eta_cutoff": SAMPLED | {"eta_cutoff": 0.01},
    "min_p": SAMPLED | {"min_p": 0.2},
    "temperature": SAMPLED | {"temperature": 0.5},
    "top_h": SAMPLED | {"top_h": 0.4},
    "top_k": SAMPLED | {"top_k": 3},
    "top_p": SAMPLED | {"top_p": 0.3},
    "typical_p": SAMPLED | {"typical_p": 0.3},
    "exponential_decay_length_penalty": GREEDY
    | {"eos_token_id": 7, "max_new_tokens": 20, "exponential_decay_length_penalty": (10, 1.9)},
    "forced_bos_token_id": GREEDY | {"forced_bos_token_id": 5},
    "forced_eos_token_id": GREEDY | {"forced_eos_token_id": 5},
    "guidance_scale": GREEDY | {"guidance_scale": 2.0},
    "is_assistant": GREEDY | {"is_assistant": True},
    "max_new_tokens": GREEDY | {"max_new_tokens": 3},
    "min_new_tokens": GREEDY | {"eos_token_id": MANY_ENDS, "min_new_tokens": 3},
    "max_length": {name: value for name, value in GREEDY.items() if name != "max_new_tokens"} | {"max_length": "L+4"},
    "min_length": GREEDY | {"eos_token_id": MANY_ENDS, "min_length": "L+3"},
    "max_time": GREEDY | {"max_time": 1e-9},
    "max_matching_ngram_size": GREEDY | {"max_matching_ngram_size": 2},
    "prompt_lookup_num_tokens": GREEDY | {"prompt_lookup_num_tokens": 3, "eos_token_id": 519},
    "no_repeat_ngram_size": GREEDY | {"no_repeat_ngram_size": 2, "max_new_tokens": 20},
    "repetition_penalty": GREEDY | {"repetition_penalty": 1.8},
    "renormalize_logits": SAMPLED | {"renormalize_logits": True},
    "remove_invalid_values": GREEDY | {"remove_invalid_values": True},
    "sequence_bias": GREEDY | {"sequence_bias": [[[5], 5.0], [[9, 8], 5.0]]},
    "watermarking_config": GREEDY | {"watermarking_config": WatermarkingConfig(bias=3.0)},
    "stop_strings": GREEDY | {"max_new_tokens": 30, "stop_strings": ["a", "b", "th"], "tokenizer": tiny_tokenizer()},
    "output_attentions": EVERYTHING | {"output_attentions": True},
    "output_hidden_states": EVERYTHING | {"output_hidden_states": True},
    "output_logits": EVERYTHING | {"output_logits": True},
    "output_scores": EVERYTHING | {"output_scores": True},
    "return_dict_in_generate": EVERYTHING,
    "return_legacy_cache": EVERYTHING | {"return_legacy_cache": True},
    "use_cache": GREEDY | {"use_cache": False},
    "use_mtp": GREEDY | {"use_mtp": True},
    "speculation_type": GREEDY | {"speculation_type": "mtp"},
    "continuous_batching_config": GREEDY | {"continuous_batching_config": {}},
    "logits_processor": GREEDY | {"logits_processor": LogitsProcessorList([reverse_scores])},
    "stopping_criteria": GREEDY | {"stopping_criteria": StoppingCriteriaList([always_stop])},
    "prefix_allowed_tokens_fn": GREEDY | {"prefix_allowed_tokens_fn": lambda row, ids: [len(ids) % 50, 60 + row]},
    "synced_gpus": GREEDY | {"synced_gpus": True},
    "negative_prompt_ids": GREEDY | NEGATIVE,
    "negative_prompt_attention_mask": GREEDY
    | NEGATIVE
    | {"negative_prompt_attention_mask": torch.tensor([[0, 1], [1, 1]])},
    "use_model_defaults": GREEDY | {"use_model_defaults": False},
    "custom_generate": GREEDY | {"custom_generate": one_more_token},
    "labels": GREEDY | {"labels": "zeros"},
    "logits_to_keep": GREEDY | {"logits_to_keep": 1},
}


def outcome_of(model, inputs, options):
    """What `generate` gives, or the type of its error."""
    torch.manual_seed(0)
    try:
        return model.generate(**inputs, **options)
    except Exception as error:  # whatever the stock method raises
        return type(error)


def assert_same(one, two):
    """Equal ids, floats up to rounding, whatever holds them."""
    if isinstance(one, torch.Tensor) and one.is_floating_point():
        finite = one > -1e30
        # the placeholder alone is banned here
        torch.testing.assert_close(one[finite & (two > -1e30)], two[finite & (two > -1e30)], rtol=0, atol=1e-5)
        assert int((finite != (two > -1e30)).sum()) <= len(one)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, (tuple, list)):
        assert len(one) == len(two)
        for first, second in zip(one, two, strict=True):
            assert_same(first, second)
    else:
        assert one == two


OF_GENERATE = INSTALLED["generate"] | INSTALLED["GenerationConfig"] | {"labels", "logits_to_keep"}


@pytest.mark.parametrize("name", [name for name in GENERATE if name in OF_GENERATE])
def test_generate_gives_what_stock_gives(models, name):
    ours, stock = models
    says = (TABLES["generate"] | TABLES["GenerationConfig"])[name][0]
    batch = one_tile_each(ours.config, 1 if name == "prompt_lookup_num_tokens" else 2)
    options, ids = dict(GENERATE[name]), batch["input_ids"]
    for key, value in options.items():
        if isinstance(value, str) and value.startswith("L+"):
            options[key] = ids.shape[1] + int(value[2:])
        elif isinstance(value, str) and value == "zeros":
            options[key] = torch.zeros_like(ids)
    expected = outcome_of(stock, stock_inputs(stock, batch), dict(options))
    given = outcome_of(ours, {**batch, "vtc_budget": "full"}, dict(options))
    assert isinstance(expected, type) == says.startswith("same error"), expected
    if isinstance(expected, (type, torch.Tensor)):
        return assert_same(expected, given)
    for field in ("sequences", "scores", "logits", "attentions", "hidden_states"):
        if expected.get(field) is not None:
            assert_same(expected[field], given[field])
    return None


REFUSED = {
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "mm_encoder_outputs": torch.zeros(1),
    "position_ids": torch.zeros(1, 1, dtype=torch.long),
    "assistant_early_exit": 1,
    "prefill_chunk_size": 4,
    "token_healing": True,
    "encoder_repetition_penalty": 1.5,
    "encoder_no_repeat_ngram_size": 2,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(method, name):
    model = tiny_model(method)
    batch = random_batch(model.config, torch.Generator().manual_seed(1), images_per_row=[1, 2], padding_side="left")
    text = random_batch(model.config, torch.Generator().manual_seed(1), images_per_row=[0, 0], padding_side="right")
    value = REFUSED[name]
    if name in TABLES["forward"] and name != "position_ids":
        with pytest.raises(TypeError, match=f"`{name}` is no argument"):
            model(**batch, **{name: value})
    for inputs in (batch, text):
        with pytest.raises((ValueError, TypeError), match=name):
            model.generate(**inputs, **GREEDY, **{name: value})
    if name not in TABLES["GenerationConfig"]:
        return
    # in the call's config, and in the model's, which fills it up
    with pytest.raises(ValueError, match=name):
        model.generate(**batch, generation_config=GenerationConfig(**GREEDY, **{name: value}))
    setattr(model.generation_config, name, value)
    for config in (None, GenerationConfig(**GREEDY)):
        with pytest.raises(ValueError, match=name):
            model.generate(**batch, generation_config=config)


def test_arguments_without_their_names_are_seen():
    model = tiny_model("vico")
    batch = random_batch(model.config, torch.Generator().manual_seed(1), images_per_row=[1], padding_side="left")
    ids = batch.pop("input_ids")
    names = list(inspect.signature(GenerationMixin.generate).parameters)
    before = [None] * (names.index("assistant_model") - 2)
    with pytest.raises(ValueError, match="assistant_model"):
        model.generate(ids, *before, torch.nn.Identity(), **batch, **GREEDY)


@pytest.mark.parametrize("method", METHODS)
def test_lengths_of_the_models_config_count_the_original_prompt(method):
    model = tiny_model(method)
    batch = random_batch(model.config, torch.Generator().manual_seed(1), images_per_row=[1, 2], padding_side="left")
    length, budget = batch["input_ids"].shape[1], budgets_of(model.config)[0]
    options = {name: value for name, value in GREEDY.items() if name != "max_new_tokens"}
    model.generation_config.max_length = length + 4
    for config in (None, GenerationConfig(**options)):
        extra = options if config is None else {}
        out = model.generate(**batch, **extra, generation_config=config, vtc_budget=budget)
        assert out.shape[1] == length + 4
    # as in the stock method a number of new tokens wins, wherever it is written
    model.generation_config.max_new_tokens = 2
    config = GenerationConfig(**options, max_length=length + 5)
    assert model.generate(**batch, generation_config=config, vtc_budget=budget).shape[1] == length + 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("images_per_row", ([1, 2], [0, 0]))
@pytest.mark.parametrize("mode", ({}, {"num_beams": 3}, {"do_sample": True}), ids=str)
def test_the_placeholder_is_never_generated(method, images_per_row, mode):
    """What `generate` returns is valid input of `forward`, however likely the model finds the placeholder."""
    model = tiny_model(method)
    batch = random_batch(model.config, torch.Generator().manual_seed(1), images_per_row=images_per_row)
    likely = batch["input_ids"][0, -1]
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
        state = model.model(**batch).last_hidden_state[:, -1].mean(0)
        model.lm_head.weight[model.config.image_token_id] = state
        assert int(model(**batch).logits[0, -1].argmax()) == model.config.image_token_id, likely
    length = batch["input_ids"].shape[1]
    torch.manual_seed(0)
    out = model.generate(**batch, **(GREEDY | mode))
    assert not bool((out[:, length:] == model.config.image_token_id).any())
    mask = torch.cat([batch["attention_mask"], torch.ones_like(out[:, length:])], 1)
    if batch.padding_side == "left":
        with torch.no_grad():
            assert model(**{**batch, "input_ids": out, "attention_mask": mask}).logits.shape[1] == out.shape[1]


# forward

FORWARD = {
    "input_ids": {},
    "pixel_values": {},
    "inputs_embeds": "embeds",
    "labels": {"labels": "ids"},
    "cache_position": {"cache_position": "columns"},
    "logits_to_keep": {"logits_to_keep": 2},
    "use_cache": {"use_cache": False},
    "output_attentions": {"output_attentions": True},
    "output_hidden_states": {"output_hidden_states": True},
    "output_router_logits": {"output_router_logits": True},
    "num_items_in_batch": {"labels": "ids", "num_items_in_batch": 7},
    "is_causal": {"is_causal": True},
}


@pytest.mark.parametrize("name", [name for name in FORWARD if name in INSTALLED["forward"] | {"use_cache"}])
def test_forward_gives_what_stock_gives(models, name):
    ours, stock = (copy.deepcopy(model) for model in models)
    if name == "output_attentions":
        for model in (ours, stock):
            model.set_attn_implementation("eager")
    batch = dict(one_tile_each(ours.config))
    options = {} if name == "inputs_embeds" else dict(FORWARD[name])
    ids = batch["input_ids"]
    special = {
        # stock models count placeholders, which their processors mask
        "ids": ids.masked_fill((ids == ours.config.image_token_id) | (batch["attention_mask"] == 0), -100),
        "columns": torch.arange(ids.shape[1]),
    }
    options = {key: special[value] if isinstance(value, str) else value for key, value in options.items()}
    if options.get("labels") is not None:
        # nothing stands before the first token of a row
        options["labels"][batch["attention_mask"].cumsum(1) == 1] = -100
    theirs = stock_inputs(stock, batch)
    if name == "inputs_embeds":
        embeds = ours.get_input_embeddings()(ids)
        for inputs in (batch, theirs):
            del inputs["input_ids"]
            inputs["inputs_embeds"] = embeds
    # LLaVA hands it to its tower too, where it is no default
    asked = {} if name == "is_causal" else options
    with torch.no_grad():
        given, expected = ours(**batch, vtc_budget="full", **options), stock(**theirs, **asked)
    for field in ("loss", "logits", "attentions", "hidden_states"):
        if expected.get(field) is not None:
            torch.testing.assert_close(given[field], expected[field], rtol=0, atol=1e-5)
        assert (given.get(field) is None) == (expected.get(field) is None), field
    assert (given.past_key_values is None) == (name == "use_cache")


BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [name for name in BOUNDS if name in INSTALLED["forward"]])
def test_bounds_of_packed_sequences_are_refused_where_rows_get_shorter(method, name):
    model = tiny_model(method)
    batch = random_batch(model.config, torch.Generator().manual_seed(1), images_per_row=[1], padding_side="left")
    bounds = {name: torch.tensor([0, batch["input_ids"].shape[1]], dtype=torch.int32)}
    with torch.no_grad():
        expected = model(**batch, vtc_budget="full")
        assert torch.equal(model(**batch, vtc_budget="full", **bounds).logits, expected.logits)
        if model.count_visual_tokens(**batch, vtc_budget=(budget := budgets_of(model.config)[0])) < len(
            batch["input_ids"][batch["input_ids"] == model.config.image_token_id]
        ):
            with pytest.raises(ValueError, match=name):
                model(**batch, vtc_budget=budget, **bounds)


# pipeline

PIPELINE = {
    "max_new_tokens": {"max_new_tokens": 3},
    "generate_kwargs": {"generate_kwargs": {"max_new_tokens": 4, "vtc_budget": "full"}},
    "timeout": {"timeout": 1.0},
    "return_full_text": {"return_full_text": True},
    "return_tensors": {"return_tensors": True},
    "return_type": {"return_type": "new_text"},
    "clean_up_tokenization_spaces": {"clean_up_tokenization_spaces": False},
    "stop_sequence": {"stop_sequence": "a"},
    "continue_final_message": {"continue_final_message": True},
    "skip_special_tokens": {"skip_special_tokens": False},
    "processor_kwargs": {"processor_kwargs": {}},
}


def chat(picture, answer=None):
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "what is this?"}]
    begun = [] if answer is None else [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    return [{"role": "user", "content": content}, *begun]


@pytest.mark.parametrize("name", [name for name in PIPELINE if name in INSTALLED["pipeline"]])
@pytest.mark.parametrize("method", METHODS)
def test_the_pipeline_hands_on_its_arguments(method, name):
    """What the pipeline returns is what template, `generate` and `decode` give, called one by one."""
    model, processor = tiny_model(method), tiny_processor(method)
    generator = ImageTextToTextPipeline(model=model, processor=processor, device="cpu")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 64, 3), np.uint8))
    options = {"generate_kwargs": GREEDY} | PIPELINE[name]
    if name == "max_new_tokens":
        options["generate_kwargs"] = {key: value for key, value in GREEDY.items() if key != name}
    elif name == "generate_kwargs":
        options[name] = GREEDY | options[name]
    continued = name == "continue_final_message"
    messages = chat(picture, "it is" if continued else None)
    inputs = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **({name: True} if continued else {"add_generation_prompt": True}),
    )
    asked = dict(options["generate_kwargs"])
    if name == "max_new_tokens":
        asked[name] = options[name]
    if name == "stop_sequence":
        asked |= {"stop_strings": ["a"], "tokenizer": processor.tokenizer}
    expected = model.generate(**inputs, **asked)
    new = expected[0, inputs["input_ids"].shape[1] :]
    # the pipeline writes into the dictionaries that it is given
    [result] = generator(text=messages, **copy.deepcopy(options))
    if name == "return_tensors":
        assert torch.equal(torch.as_tensor(result["generated_token_ids"]).flatten(), expected.flatten())
        return
    keeps_special = name == "skip_special_tokens"
    text = processor.decode(new, skip_special_tokens=not keeps_special)
    given = result["generated_text"]
    given = given if isinstance(given, str) else given[-1]["content"]
    given = given if isinstance(given, str) else given[0]["text"]
    assert given.endswith(text), (given, text)
