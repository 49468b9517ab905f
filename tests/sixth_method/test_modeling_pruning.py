"""The sixth method against a reference written by hand, and on the command line. Run inside of a copy of the package
that has it, see `test_sixth_method.py`."""

import json

import factories
import pytest
import torch
from llava_checkpoints import prompt, stock_model
from typer.testing import CliRunner

from hf_vtc.convert import from_base
from hf_vtc.methods import pruning
from hf_vtc_cli.app import app


@pytest.mark.parametrize("budget", ("auto", 0.5, 3, "full"))
@torch.no_grad()
def test_pruned_prompts_equal_rows_by_hand(budget):
    model = factories.tiny_model("pruning")
    batch = factories.random_batch(model.config, torch.Generator().manual_seed(2), num_rows=3)
    out, image_idx = model(**batch, vtc_budget=budget), 0
    for row, (ids, images) in enumerate(batch.rows):
        embeds = model.get_input_embeddings()(torch.tensor(ids))
        placeholders = (torch.tensor(ids) == model.config.image_token_id).nonzero().flatten()
        filled, dropped = embeds.clone(), []
        for image in images:
            tokens = model.model.multi_modal_projector(model.model.encode(image["pixel_values"]))
            scores = (tokens - tokens.mean(1, keepdim=True)).norm(dim=-1).flatten()
            places, placeholders = placeholders[: len(scores)], placeholders[len(scores) :]
            filled[places] = tokens.flatten(0, 1)
            share = {"auto": model.config.kept_share, "full": 1.0}.get(budget, budget)
            count = share if share == 3 else int(share * len(scores))
            dropped.append(places[scores.argsort(descending=True)[count:]])
            assert out.num_visual_tokens[image_idx] == count
            image_idx += 1
        keep = torch.ones(len(ids), dtype=torch.bool)
        keep[torch.cat([torch.zeros(0, dtype=torch.long), *dropped])] = False
        states = model.get_decoder()(inputs_embeds=filled[keep][None]).last_hidden_state
        ours = out.logits[row][out.kept_mask[row]]
        torch.testing.assert_close(ours, model.lm_head(states)[0], rtol=1e-4, atol=1e-5)


def test_conversion_keeps_every_weight_of_a_base(tmp_path, monkeypatch):
    base = stock_model()
    base.save_pretrained(tmp_path / "base")
    factories.tiny_tokenizer().save_pretrained(tmp_path / "base")
    inputs = prompt()
    with torch.no_grad():
        assert torch.equal(from_base(base, "pruning")(**inputs, vtc_budget="full").logits, base(**inputs).logits)
    arguments = ["convert", str(tmp_path / "base"), str(tmp_path / "out"), "--method", "pruning"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == pruning.RECORD.model_type
    assert (tmp_path / "out" / "modeling_pruning.py").is_file()
