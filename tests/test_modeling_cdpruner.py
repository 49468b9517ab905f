"""CDPruner against a slow reference: the greedy search by determinants of submatrices, in float64."""

import pytest
import torch
from factories import random_batch, tiny_config, tiny_model

from hf_vtc.models.modeling_cdpruner import min_max, most_diverse
from hf_vtc.models.tiling_vtc import ImageSizes


def chosen_by_hand(tokens, relevance, num_kept):
    """Indices of one image: always the token with which the determinant of equation 7's kernel is largest."""
    unit = (tokens / tokens.norm(dim=-1, keepdim=True)).double()
    kernel = relevance.double()[:, None] * (unit @ unit.T) * relevance.double()
    chosen = []
    for _ in range(num_kept):
        found = {}
        for token in range(len(tokens)):
            if token not in chosen:
                index = torch.tensor([*chosen, token])
                found[token] = float(torch.linalg.det(kernel[index][:, index]))
        chosen.append(max(found, key=found.get))
    return chosen


def relevance_by_hand(tokens, question):
    cosines = torch.stack([token @ question / token.norm() / question.norm() for token in tokens])
    return (cosines - cosines.min()) / (cosines.max() - cosines.min())


def test_a_choice_that_can_be_followed_by_eye():
    # 0 is most relevant; 1 is a copy of it, 2 adds a direction, and 3 adds one that is less relevant
    tokens = torch.tensor([[[2.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 1.0]]])
    relevance, real = torch.tensor([[1.0, 0.9, 0.8, 0.5]]), torch.ones(1, 4, dtype=torch.bool)
    for kept, expected in enumerate(([0], [0, 2], [0, 2, 3], [0, 1, 2, 3]), start=1):
        found = most_diverse(tokens, relevance, real, torch.tensor([kept]))
        assert found.nonzero()[:, 1].tolist() == expected


@pytest.mark.parametrize("seed", range(3))
def test_unequal_images_of_a_batch_equal_the_greedy_search(seed):
    generator = torch.Generator().manual_seed(seed)
    counts, kept = torch.tensor([9, 5, 12]), torch.tensor([4, 5, 7])
    tokens = torch.randn(3, 12, 16, generator=generator)
    real = torch.arange(12) < counts[:, None]
    # what lies behind an image is never read
    tokens[~real] = 1e4
    relevance = min_max(torch.rand(3, 12, generator=generator), real)
    found = most_diverse(tokens, relevance, real, kept)
    for image, (count, num_kept) in enumerate(zip(counts.tolist(), kept.tolist())):
        expected = chosen_by_hand(tokens[image, :count], relevance[image, :count], min(num_kept, count - 1))
        if num_kept == count:
            # the least relevant token has no weight at all, and is the last to come
            expected = range(count)
        assert found[image].nonzero().flatten().tolist() == sorted(expected)


def test_beyond_independent_tokens_the_most_relevant_are_taken():
    # all lie in two directions
    tokens = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]])
    relevance, real = torch.tensor([[0.9, 1.0, 0.3, 0.2, 0.0]]), torch.ones(1, 5, dtype=torch.bool)
    for kept, expected in enumerate(([1], [1, 2], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]), start=1):
        assert most_diverse(tokens, relevance, real, torch.tensor([kept]))[0].nonzero().flatten().tolist() == expected


def test_equal_scores_are_all_relevant():
    real = torch.tensor([[True, True, False], [True, False, False]])
    scores = torch.tensor([[0.5, 0.5, 9.0], [-0.2, -7.0, 3.0]])
    assert min_max(scores, real).tolist() == [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]


@pytest.mark.window
@pytest.mark.parametrize("budget", ("auto", 0.5, ["full", 7, 0.3]))
@torch.no_grad()
def test_decisions_equal_those_by_hand(budget):
    model = tiny_model("cdpruner")
    batch = random_batch(model.config, torch.Generator().manual_seed(6), num_rows=2, images_per_row=[2, 1])
    out = model(**batch, vtc_budget=budget)
    tokens = model.model.multi_modal_projector(model.model.encode(batch["pixel_values"])).flatten(0, 1)
    counts, first, image_idx = (16 * batch["num_tiles"]).tolist(), 0, 0
    for ids, images in batch.rows:
        text = torch.tensor([token for token in ids if token != model.config.image_token_id])
        question = model.get_input_embeddings()(text).mean(0)
        for _ in images:
            own, kept = tokens[first : first + counts[image_idx]], int(out.num_visual_tokens[image_idx])
            stays = out.router_decisions[first : first + counts[image_idx]]
            expected = range(len(own))
            if kept < len(own):
                expected = chosen_by_hand(own, relevance_by_hand(own, question), kept)
            assert stays.nonzero().flatten().tolist() == sorted(expected)
            first, image_idx = first + counts[image_idx], image_idx + 1
    placeholders = batch["input_ids"] == model.config.image_token_id
    # every token at its own placeholder
    assert torch.equal(out.kept_mask[placeholders], out.router_decisions)
    assert torch.equal(out.image_hidden_states, tokens[out.router_decisions])


@torch.no_grad()
def test_another_question_keeps_other_tokens():
    model = tiny_model("cdpruner")
    batch = dict(random_batch(model.config, torch.Generator().manual_seed(7), num_rows=1, images_per_row=[1]))
    first = model(**batch, vtc_budget=0.4).router_decisions
    text = batch["input_ids"] != model.config.image_token_id
    batch["input_ids"] = torch.where(text, batch["input_ids"] % 7 + 200, batch["input_ids"])
    second = model(**batch, vtc_budget=0.4).router_decisions
    assert first.sum() == second.sum() and not torch.equal(first, second)
    # `full` asks for no question
    assert bool(model(**batch, vtc_budget="full").router_decisions.all())


@torch.no_grad()
def test_without_the_question_nothing_can_be_chosen():
    model = tiny_model("cdpruner")
    images = {"pixel_values": torch.randn(2, 3, 32, 32), "num_tiles": torch.tensor([2])}
    assert len(model.get_image_features(**images).pooler_output[0]) == 32
    with pytest.raises(ValueError, match="CDPruner needs the question"):
        model.get_image_features(**images, vtc_budget=0.5)


@torch.no_grad()
def test_decisions_of_the_caller_are_taken():
    model = tiny_model("cdpruner")
    batch = dict(random_batch(model.config, torch.Generator().manual_seed(8), num_rows=2, images_per_row=[1, 1]))
    own = model(**batch, vtc_budget=0.5)
    given = model(**batch, router_decisions=own.router_decisions)
    assert torch.equal(given.logits, own.logits)
    assert torch.equal(
        model.count_visual_tokens(**batch, router_decisions=own.router_decisions), own.num_visual_tokens
    )
    none = own.router_decisions.clone()
    none[: int(16 * batch["num_tiles"][0])] = False
    with pytest.raises(ValueError, match="must keep a visual token of every image, of image 0 none"):
        model(**batch, router_decisions=none)
    with pytest.raises(ValueError, match="needs a truth value per visual token"):
        model(**batch, router_decisions=own.router_decisions[1:])


def test_counts_of_every_size_are_admissible():
    config = tiny_config("cdpruner", kept_share=0.5)
    sizes = ImageSizes(torch.tensor([1, 3]), None, None)
    assert [list(counts) for counts in config.levels(sizes)] == [list(range(16, 0, -1)), list(range(48, 0, -1))]
    assert [config.own_level(counts) for counts in config.levels(sizes)] == [8, 24]
    with pytest.raises(ValueError, match="`kept_share` of the visual tokens must lie in"):
        tiny_config("cdpruner", kept_share=1.5)
