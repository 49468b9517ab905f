"""Training-free methods from stock bases on, and beside models of other methods in an evaluation."""

import internvl_checkpoints
import llava_checkpoints
import pytest
import torch
from factories import CONTRACTED, random_batch, tiny_model, tiny_processor
from transformers import AutoModelForImageTextToText

from hf_vtc.convert import convert, from_base
from hf_vtc.evaluation.comparators import COMPARATORS, comparator
from hf_vtc.evaluation.running import Asker
from hf_vtc.methods import record_named

GREEDY = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
BASES = ("internvl", "llava", "llava siglip", "llava_next")


def stock_and_prompt(base):
    """A stock model, what it takes, and what ours takes."""
    if base == "internvl":
        prompt = internvl_checkpoints.prompt()
        return internvl_checkpoints.stock_model(), prompt, {**prompt, "num_tiles": torch.tensor([2, 1])}
    if base == "llava_next":
        stock = llava_checkpoints.stock_model("llava_next")
        return stock, *llava_checkpoints.next_prompt(stock)
    stock = llava_checkpoints.stock_model(tower="siglip" if base.endswith("siglip") else "clip")
    prompt = llava_checkpoints.prompt()
    return stock, prompt, prompt


@pytest.mark.window
@pytest.mark.parametrize("name", COMPARATORS)
@pytest.mark.parametrize("base", BASES)
@torch.no_grad()
def test_a_stock_base_is_converted_without_training(name, base, tmp_path):
    stock, theirs, ours = stock_and_prompt(base)
    stock.save_pretrained(tmp_path / "base")
    reason = record_named(name).config.refused_bases.get(base)
    if reason is not None:
        with pytest.raises(ValueError, match=f"{name} does not fit {base}: {reason}"):
            from_base(stock, name)
        return
    # the small decoders of these bases have a placeholder in their vocabulary
    report = convert(tmp_path / "base", tmp_path / "converted", name)
    assert not report.fresh_keys and not report.missing_keys and not report.unused_keys
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "converted")
    converted = from_base(stock, name)
    expected = stock(**theirs).logits
    for model in (reloaded, converted):
        assert type(model) is record_named(name).head
        assert torch.equal(model(**ours, vtc_budget="full").logits, expected)
        counts = model.count_visual_tokens(**ours, vtc_budget="full")
        for budget, kept in (("auto", (counts / 3 + 1e-6).long()), (0.5, counts // 2), (7, counts.clamp(max=7))):
            out = model(**ours, vtc_budget=budget)
            assert torch.equal(out.num_visual_tokens, kept) and bool(out.logits.isfinite().all())
            assert model.generate(**ours, **GREEDY, vtc_budget=budget).shape[1] == ours["input_ids"].shape[1] + 4


def asker_of(method):
    model, processor = tiny_model(method), tiny_processor(method.partition(" on ")[0])
    return Asker(model, processor, None, 4)


@pytest.mark.parametrize("name", COMPARATORS)
@pytest.mark.parametrize("method", CONTRACTED)
@torch.no_grad()
def test_a_comparator_runs_on_the_modules_of_another_method(name, method):
    asker = asker_of(method)
    try:
        model = comparator(asker, name).head
    except ValueError as error:
        refused = {
            "the method itself": method.partition(" on ")[0] == name,
            "sees no tiles": not asker.config.sees_tiles and asker.config.grid_base is None,
            # attention of a tower that is not read, or a recurrent decoder
            f"does not fit {asker.config.grid_base}": name == "visionzip" or asker.config.grid_base == "qwen3_5",
            "must be 'flat'": name == "visionzip" and asker.config.mm_patch_merge_type != "flat",
        }
        assert [fits for reason, fits in refused.items() if reason in str(error)] == [True]
        return
    assert {id(each) for each in model.parameters()} <= {id(each) for each in asker.head.parameters()}
    batch = random_batch(asker.config, torch.Generator().manual_seed(0), num_rows=2, images_per_row=[1, 2])
    # what is not compressed is the same model
    torch.testing.assert_close(
        model(**batch, vtc_budget="full").logits, asker.head(**batch, vtc_budget="full").logits, rtol=0, atol=1e-5
    )
    kept = [int(count) // 2 for count in asker.head.count_visual_tokens(**batch, vtc_budget="full")]
    assert model(**batch, vtc_budget=kept).num_visual_tokens.tolist() == kept
    # a base that converts to the method gives the same answers
    assert type(model).__name__ == record_named(name).head.__name__ and not model.training
