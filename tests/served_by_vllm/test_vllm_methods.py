"""Each method in vLLM's `LLM`: the ids and the counts of our own `generate`, in float32.

`pytest -m vllm tests/served_by_vllm` runs the short form, `-m "vllm and slow"` that of 20 prompts and every budget.
"""

import pytest

pytest.importorskip("vllm", reason="needs an environment with vllm, see docs/serve.md")

import peft
import torch
from served import CARDS, METHODS, PAGES, QUESTIONS, Case, Ours, as_ours, asked, cases, ours, run_engine

from hf_vtc.lora import default_lora_config

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("num_prompts", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_answers_and_counts_are_those_of_generate(method, num_prompts, tmp_path):
    folder, changed, budgets = METHODS[method]
    model = ours(folder, *changed.items())
    prompts = cases(num_prompts)
    calls = [[asked(model, case, budget) for case in prompts] for budget in budgets]
    # alone, and again, when every image is in the caches
    calls += [[call[0]] for call in calls] + calls[-1:]
    found = run_engine(folder, calls, tmp_path, **({"hf_overrides": changed} if changed else {}))
    counts = {}
    for budget, answers, alone in zip(budgets, found, found[len(budgets) :], strict=False):
        expected = [model.answer(case, budget) for case in prompts]
        assert [as_ours(model, each) for each in answers] == expected, budget
        assert alone == answers[:1]
        counts[budget] = [count for count, _ in expected]
    assert found[-1] == found[len(budgets) - 1]
    # this check can fail: budgets do not give one another's counts
    if method != "convllava":
        assert counts["full"][0] > counts[0.5][0]
        assert as_ours(model, found[budgets.index(0.5)][0]) != model.answer(prompts[0], "full")


def test_vico_can_decide_in_the_process_that_prepares_images(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_VTC_VLLM_AUTO", "1")
    model = ours(CARDS / "vico-tiny")
    prompts = [case for case in cases(4) if len(case.images) < 2]
    budgets = [None, "auto", 0.5]
    found = run_engine(
        CARDS / "vico-tiny", [[asked(model, case, budget) for case in prompts] for budget in budgets], tmp_path
    )
    for budget, answers in zip(budgets, found, strict=True):
        assert [as_ours(model, each) for each in answers] == [model.answer(case, budget) for case in prompts]


def test_budgets_of_the_server_and_of_a_request(tmp_path):
    # of a folder in shards, whose head has weights of its own
    folder = tmp_path / "untied"
    whole = Ours(CARDS / "vico-tiny", tie_word_embeddings=False)
    whole.model.lm_head.weight = torch.nn.Parameter(whole.model.lm_head.weight.flip(0) + 0.01)
    whole.model.save_pretrained(folder, max_shard_size="1MB")
    whole.processor.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    model = ours(folder)
    assert torch.equal(model.model.lm_head.weight, whole.model.lm_head.weight)
    one, two, none = cases(1)
    budgets = [None, 0.25, "full", 0.5, 0.25]
    calls = [[asked(model, two, budget)] for budget in budgets] + [[asked(model, none)], [asked(model, one, 0.5)]]
    # prompts in parts that are shorter than an image
    parts = {"max_num_batched_tokens": 64, "max_num_seqs": 4}
    found = run_engine(folder, calls, tmp_path, mm_processor_kwargs={"vtc_budget": 0.7}, **parts)
    expected = [model.answer(two, 0.7 if budget is None else budget) for budget in budgets]
    expected += [model.answer(none, None), model.answer(one, 0.5)]
    assert [as_ours(model, answer) for (answer,) in found] == expected
    assert len({count for count, _ in expected[:4]}) == 4


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vico-tiny", {}, "cannot be served for vtc_vico: its router reads the pixels"),
        (
            "avg-llava-tiny",
            {"vtc_budget": "auto"},
            "cannot be served for vtc_avg_llava: its router reads the question",
        ),
        ("vistog-tiny", {"vtc_budget": 1}, "the smallest admissible count is"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(name, arguments, message, tmp_path):
    model = ours(CARDS / name)
    case = cases(1)[0]
    (found,) = run_engine(CARDS / name, [[asked(model, case, arguments=arguments)]], tmp_path)
    assert message in found


def test_images_that_get_shorter_in_the_decoder_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match="`compress_layer_idx` must be -1 to be served by vLLM, got 2"):
        run_engine(CARDS / "llavolta-tiny", [], tmp_path)


@pytest.mark.parametrize("plugins", ["hf_vtc", ""])
def test_the_backend_for_models_of_transformers_is_refused(plugins, tmp_path, monkeypatch):
    # without the plugin it is what vLLM makes of a folder that carries its code
    folder = tmp_path / "exported"
    exported = ours(CARDS / "vico-tiny")
    exported.model.save_pretrained(folder)
    exported.processor.save_pretrained(folder)
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    engine = {"model_impl": "transformers"} if plugins else {}
    with pytest.raises(RuntimeError, match="vllm would serve this vtc_vico model uncompressed without saying so"):
        run_engine(folder, [], tmp_path, trust_remote_code=True, **engine)


def test_adapters_of_the_decoder_are_applied_and_others_refused(tmp_path):
    folder = CARDS / "vico-tiny"

    def save(adapter_config, place):
        model = Ours(folder)
        torch.manual_seed(0)
        model.model = peft.get_peft_model(model.model, adapter_config(model.model)).eval()
        for parameter_name, parameter in model.model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.model.save_pretrained(tmp_path / place)
        return model

    adapted = save(lambda model: default_lora_config(model, r=8, lora_dropout=0.0, compressor=()), "decoder")
    prompts = [Case(QUESTIONS[1], (page,)) for page in PAGES]
    plain = ours(folder)
    calls = [
        [asked(plain, case, 0.5, adapter=place) for case in prompts]
        for place in (None, str(tmp_path / "decoder"), None)
    ]
    found = run_engine(folder, calls, tmp_path, enable_lora=True, max_lora_rank=8)
    assert found[0] == found[2] != found[1]
    for model, answers in ((plain, found[0]), (adapted, found[1])):
        assert [as_ours(model, each) for each in answers] == [model.answer(case, 0.5) for case in prompts]
    # of routers too, whose layers have names of the decoder's
    save(lambda model: peft.LoraConfig(r=8, target_modules=["q_proj"]), "everywhere")
    save(lambda model: default_lora_config(model, r=8), "with compressor")
    for place, message in (("everywhere", "Merge it into the model"), ("with compressor", "modules_to_save")):
        call = [asked(plain, prompts[0], 0.5, adapter=str(tmp_path / place))]
        (refused,) = run_engine(folder, [call], tmp_path, enable_lora=True, max_lora_rank=8)
        assert message in refused
