"""`evaluate`, on shipped checkpoints and pages that no training has seen.

One file, since most tests read one run that a fixture makes.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

import hf_vtc
from hf_vtc.data import RecordError
from hf_vtc.evaluation import EvalReport, drawing, read_questions, records_to_ask, running, sweep
from hf_vtc.evaluation.baselines import NAMES, smaller_options
from hf_vtc.evaluation.comparators import COMPARATORS
from hf_vtc.evaluation.recommendation import better_baseline, halves, qualifies
from hf_vtc.evaluation.statistics import margin_of

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
# of the run that several tests look at
RUN = {"budgets": ["auto", 0.25], "baselines": NAMES, "seeds": 2, "batch_size": 5}
CHECKPOINTS = ("vico-tiny", "avg-llava-tiny", "llavolta-tiny", "vistog-tiny", "convllava-tiny")


def load(name):
    folder = ROOT / "model_cards" / name
    model = hf_vtc.AutoModelForVision2Seq.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def vico():
    return load("vico-tiny")


@pytest.fixture(scope="module")
def pages():
    """Records of a seed that neither a training nor a card uses."""
    from digit_forms import evaluation_set

    return [
        {
            "id": f"page {idx}",
            "images": [item.image],
            "messages": [{"role": "user", "content": item.question}, {"role": "assistant", "content": item.answer}],
            "kind": item.kind,
        }
        for idx, item in enumerate(evaluation_set(18, seed=4321))
    ]


@pytest.fixture(scope="module")
def report(vico, pages, tmp_path_factory) -> tuple[EvalReport, Path]:
    folder = tmp_path_factory.mktemp("run")
    return hf_vtc.evaluate(*vico, pages, **RUN, output=folder), folder


def samples(folder):
    return [json.loads(line) for line in (folder / running.ANSWERS_FILE).read_text().splitlines()]


@pytest.mark.window
def test_every_question_is_answered_once_at_every_point(report, pages):
    found, folder = report
    answers = samples(folder)
    names = [(each["point"], each["key"]) for each in answers]
    assert len(set(names)) == len(names)
    points = {point for point, _ in names}
    assert len(names) == len(points) * len(pages)
    assert {"full", "auto", "0.25", "random beside auto #2", "pool beside 0.25", "smaller beside auto"} <= points
    assert {row.point for row in found.rows} == {point.removesuffix(" #1").removesuffix(" #2") for point in points}


@pytest.mark.window
def test_accuracy_is_what_the_checkpoint_can(report, pages):
    found, folder = report
    answers = {(each["point"], each["key"]): each["answer"] for each in samples(folder)}
    for point in ("full", "auto"):
        right = [answers[point, page["id"]] == page["messages"][1]["content"] for page in pages]
        assert found.row(point).score == np.mean(right) > 0.9
    # as many tiles, without the choice
    assert found.row("random beside auto").score < found.row("auto").score
    assert sum(row.num for row in found.row("auto").kinds.values()) == len(pages)


def test_a_wrong_metric_or_a_shuffled_pairing_is_noticed(vico, pages, report, tmp_path, monkeypatch):
    _, folder = report
    asked = {**RUN, "baselines": ()}
    for file in (running.ANSWERS_FILE, running.RUN_FILE, running.TIMES_FILE):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    hf_vtc.evaluate(*vico, pages, **asked, output=tmp_path)
    lines = samples(tmp_path)
    keys = [each["key"] for each in lines]
    for each, key in zip(lines, keys[1:] + keys[:1]):
        each["key"] = key
    (tmp_path / running.ANSWERS_FILE).write_text("".join(json.dumps(each) + "\n" for each in lines))
    with pytest.raises(ValueError, match="do not belong to these questions"):
        hf_vtc.evaluate(*vico, pages, **asked, output=tmp_path)
    (tmp_path / running.ANSWERS_FILE).write_bytes((folder / running.ANSWERS_FILE).read_bytes())
    with pytest.raises(ValueError, match="`data`, `metric` changed"):
        hf_vtc.evaluate(*vico, pages, **asked, metric="contains", output=tmp_path)
    exact = hf_vtc.evaluation.METRICS["exact"]
    broken = replace(exact, function=lambda answer, references: float(answer not in references))
    monkeypatch.setitem(hf_vtc.evaluation.METRICS, "exact", broken)
    with pytest.raises(ValueError, match="do not belong to these questions"):
        hf_vtc.evaluate(*vico, pages, **asked, output=tmp_path)


def test_a_page_of_the_training_data_is_refused(vico, pages, tmp_path):
    path = tmp_path / "renamed.png"
    pages[3]["images"][0].save(path)
    trained = [{**pages[0], "images": [Image.new("RGB", (64, 64))]}, {**pages[1], "images": [Image.open(path)]}]
    with pytest.raises(RecordError, match=r"1 of 18 questions.*record 3 \(id 'page 3'\) shows the image of record 1"):
        hf_vtc.evaluate(*vico, pages, train_records=trained)
    # other pages of the same kind are none
    hf_vtc.evaluate(*vico, pages[:2], budgets=["full"], train_records=trained[:1])


@pytest.mark.parametrize("killed_after", [1, 41.5, 130])
def test_an_ended_run_goes_on_to_the_same_answers(vico, pages, report, tmp_path, killed_after, monkeypatch):
    _, folder = report
    whole = (folder / running.ANSWERS_FILE).read_bytes().splitlines(keepends=True)
    number = int(killed_after)
    kept = b"".join(whole[:number])
    if killed_after != number:
        # in the midst of a line
        kept += whole[number][:20]
    (tmp_path / running.ANSWERS_FILE).write_bytes(kept)
    (tmp_path / running.RUN_FILE).write_bytes((folder / running.RUN_FILE).read_bytes())
    found = hf_vtc.evaluate(*vico, pages, **RUN, output=tmp_path)
    assert (tmp_path / running.ANSWERS_FILE).read_bytes() == b"".join(whole)
    assert [row.score for row in found.rows] == [row.score for row in report[0].rows]

    def never(*args, **kwargs):
        raise AssertionError("a finished run asks nothing")

    monkeypatch.setattr(running.Asker, "generate", never)
    hf_vtc.evaluate(*vico, pages, **RUN, output=tmp_path)


def test_answers_of_another_run_are_refused_by_name(vico, pages, report):
    _, folder = report
    with pytest.raises(ValueError, match="`batch_size` changed .*5 before, 8 now"):
        hf_vtc.evaluate(*vico, pages, batch_size=8, output=folder)
    with pytest.raises(ValueError, match="`data` changed"):
        hf_vtc.evaluate(*vico, pages[1:], batch_size=5, output=folder)
    other = hf_vtc.AutoModelForVision2Seq.from_pretrained(ROOT / "model_cards" / "vico-tiny", dtype=torch.float32)
    other.lm_head.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="`checkpoint` changed"):
        hf_vtc.evaluate(other, vico[1], pages, batch_size=5, output=folder)


@pytest.mark.window
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_answers_are_those_of_generate(name, pages):
    """The tower runs once for all points, and no point answers otherwise than by itself."""
    model, processor = load(name)
    asked = pages[:6]
    found = hf_vtc.evaluate(model, processor, asked, baselines=(), batch_size=6, max_new_tokens=12)
    records = records_to_ask(asked)
    questions = read_questions(records)
    for row in found.rows:
        texts, tokens = [], []
        for question in questions:
            content = [{"type": "image", "image": pages[question.record_idx]["images"][0]}]
            content.append({"type": "text", "text": question.text})
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            budget = float(row.point) if row.point[0].isdigit() else row.point
            out = model.generate(**inputs, vtc_budget=budget, max_new_tokens=12, do_sample=False)
            texts.append(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
            tokens.append(int(model.count_visual_tokens(**inputs, vtc_budget=budget)))
        scores = [question.score(text) for question, text in zip(questions, texts, strict=True)]
        assert row.score == np.mean(scores) and row.tokens == np.mean(tokens)


@pytest.mark.parametrize("name", CHECKPOINTS[:4])
def test_baselines_spend_as_many_tokens_image_by_image(name, pages, tmp_path):
    model, processor = load(name)
    asked = pages[:8]
    hf_vtc.evaluate(
        model, processor, asked, budgets=["auto", 0.25], baselines=NAMES, seeds=1, batch_size=8, output=tmp_path
    )
    tokens = {(each["point"], each["key"]): each["tokens"] for each in samples(tmp_path)}
    reserved = {each["key"]: each["reserved"] for each in samples(tmp_path)}
    points = {point for point, _ in tokens if " beside " in point}
    assert {point.split()[0] for point in points} >= {"random", "smaller", "subset", *COMPARATORS}
    for point in points:
        family, beside = point.split(" #")[0].split(" beside ")
        own = [tokens[point, page["id"]] for page in asked]
        its = [tokens[beside, page["id"]] for page in asked]
        if family in ("subset", *COMPARATORS) or family == "random" and name != "avg-llava-tiny":
            assert own == its
        elif family == "random":
            # granularities change hands, and each is as frequent as before
            shares = [
                sorted(count / reserved[page["id"]] for count, page in zip(counts, asked)) for counts in (own, its)
            ]
            assert shares[0] == shares[1]
        else:
            for count, wanted, page in zip(own, its, asked, strict=True):
                height, width = page["images"][0].height, page["images"][0].width
                options = range(reserved[page["id"]] + 1)
                if family == "smaller":
                    options = sorted(smaller_options(processor, [(height, width)]).values())
                elif name == "llavolta-tiny":
                    # square windows of a grid of 4 x 4 tokens leave one of these shares
                    options = [reserved[page["id"]] // 16 * kept for kept in (1, 4, 16)]
                below = max((option for option in options if option <= wanted), default=options[0])
                above = min((option for option in options if option >= wanted), default=options[-1])
                # of a tile's grid, whose two nearest sizes are shared out among tiles
                slack = 3 if family == "pool" else 0
                assert below - slack <= count <= above + slack


def test_the_tower_sees_an_image_once(vico, pages, monkeypatch):
    """However many questions and points there are."""
    model, processor = vico
    asked = [{**page, "images": pages[idx % 4]["images"]} for idx, page in enumerate(pages[:6])]
    apart = hf_vtc.evaluate(model, processor, asked, budgets=["auto"], baselines=["random"], batch_size=1)
    encode, seen = type(model.model).encode, []

    def counting(self, pixel_values, layout=None):
        seen.append(len(pixel_values))
        return encode(self, pixel_values, layout)

    monkeypatch.setattr(type(model.model), "encode", counting)
    together = hf_vtc.evaluate(model, processor, asked, budgets=["auto"], baselines=["random"], batch_size=6)
    num_tiles = [processor.image_processor.get_tile_layout(*page["images"][0].size[::-1]).num_tiles for page in pages]
    # all that follow are questions that are asked alone as well
    assert seen[0] == sum(num_tiles[:4]) and len(seen) == 1 + len(asked)
    for point in ("full", "auto"):
        texts = [[found.answers[point, page["id"]].answer for page in asked] for found in (together, apart)]
        assert texts[0] == texts[1]


def test_baselines_change_the_answers(report):
    """Of a baseline that is answered by the method nothing could be learned."""
    _, folder = report
    answers = {(each["point"], each["key"]): each["answer"] for each in samples(folder)}
    keys = {key for _, key in answers}
    for family in ("random", "pool", "smaller", "subset", *COMPARATORS):
        # as many tiles at 0.25 means all of them
        beside = "auto" if family == "random" else "0.25"
        lines = {point for point, _ in answers if point.startswith(f"{family} beside {beside}")}
        assert lines and any(answers[line, key] != answers[beside, key] for line in lines for key in keys), family
    drawn = [[answers[f"subset beside 0.25 #{draw}", key] for key in sorted(keys)] for draw in (1, 2)]
    assert drawn[0] != drawn[1]


def test_the_configuration_is_as_it_was(pages):
    model, processor = load("llavolta-tiny")
    before = model.config.to_dict()
    hf_vtc.evaluate(model, processor, pages[:3], budgets=["auto"])
    assert model.config.to_dict() == before


@pytest.mark.window
def test_a_budget_that_an_image_does_not_admit_is_refused_or_clipped(vico, pages):
    sizes = {page["images"][0].size for page in pages}
    assert len(sizes) > 1
    with pytest.raises(ValueError, match="too small for .* All of them admit shares from 0.25 or numbers .* from 36"):
        hf_vtc.evaluate(*vico, pages, budgets=[28])
    found = hf_vtc.evaluate(*vico, pages, budgets=[28], baselines=(), clip=True)
    row = found.row("28")
    larger = sum(page["images"][0].width * page["images"][0].height > 6 * 32 * 32 for page in pages)
    assert row.num_clipped == larger > 0 and row.tokens > 28
    assert f"28: {larger}" in found.to_markdown()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"budgets": []}, "`budgets` must name at least one"),
        ({"budgets": ["half"]}, "`vtc_budget` must be"),
        ({"baselines": ["bigger"]}, "`baselines` must be of .*'bigger'"),
        ({"tolerance": 0}, "`tolerance`"),
        ({"confidence": 0.3}, "`confidence`"),
        ({"seeds": 0}, "`seeds`"),
        ({"batch_size": True}, "`batch_size`"),
        ({"turns": "first"}, "`turns`"),
        ({"metric": "rouge"}, "`metric` must be"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(vico, pages, changed, message):
    with pytest.raises(ValueError, match=message):
        hf_vtc.evaluate(*vico, pages[:2], **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"metric": "rouge"}, "record 0.*`metric` of a record must be one of"),
        ({"answers": [1]}, "record 0.*`answers` must be a list of strings"),
        ({"answers": ["D"], "choices": ["cat", "dog"]}, "record 0.*must name one of the `choices`"),
        ({"unheard": 3}, "record 0.*'unheard'"),
    ],
)
def test_a_bad_record_is_named(pages, changed, message):
    with pytest.raises(RecordError, match=message):
        read_questions(records_to_ask([{**pages[0], **changed}]))


def test_questions_of_records():
    image = Image.new("RGB", (64, 96))
    turns = [
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "Second?"},
        {"role": "assistant", "content": "2"},
    ]
    records = [
        {"id": "a", "messages": turns, "images": [image], "shape": "long"},
        {"messages": turns[:1], "answers": ["1", "one", "uno"]},
        {"id": "a", "messages": turns[:1], "metric": "anls", "answers": ["one"]},
    ]
    last = read_questions(records_to_ask(records, group_by="shape"), group_by="shape")
    assert [question.text for question in last] == ["Second?", "First?", "First?"]
    assert [question.references for question in last] == [("2",), ("1", "one", "uno"), ("one",)]
    assert [question.metric.name for question in last] == ["exact", "exact", "anls"]
    assert [question.kind for question in last] == ["long", "", ""]
    assert len({question.key for question in last}) == 3 and last[0].num_images == 1 and last[1].num_images == 0
    assert len({question.image for question in last}) == 3
    every = read_questions(records_to_ask(records[:1], group_by="shape"), group_by="shape", turns="all")
    assert [question.text for question in every] == ["First?", "Second?"]
    assert every[0].image == every[1].image and len(every[1].messages) == 3
    with pytest.raises(RecordError, match="`answers` are those of one question"):
        read_questions(records_to_ask([{"messages": turns, "answers": ["1"]}]), turns="all")


@pytest.mark.parametrize(
    ("references", "choices", "expected"),
    [
        ([["a"], ["1"]], None, "exact"),
        ([["3"], ["1"]], None, "relaxed"),
        ([["3%"], ["$1,000"]], None, "relaxed"),
        ([["3", "4", "3"], ["a", "b", "c"]], None, "vqa"),
        ([["A"], ["cat"]], ["cat", "dog"], "choice"),
        ([["A"], []], ["cat", "dog"], "choice"),
    ],
)
def test_the_metric_goes_by_the_references(references, choices, expected):
    ask = [{"role": "user", "content": "?"}]
    records = [{"messages": ask, "answers": each, **({"choices": choices} if choices else {})} for each in references]
    assert {question.metric.name for question in read_questions(records_to_ask(records))} == {expected}


@pytest.mark.window
def test_text_alone_and_several_images(vico, pages):
    one, two = pages[0]["images"][0], pages[1]["images"][0]
    ask = pages[0]["messages"]
    records = [
        {"messages": ask, "images": [one, two], "kind": "two"},
        {"messages": ask, "kind": "none"},
        {"messages": ask, "images": [one], "kind": "one"},
    ]
    found = hf_vtc.evaluate(*vico, records, seeds=2, baselines=NAMES)
    full = found.row("full")
    sizes = [vico[1].reserved_tokens(image.height, image.width) for image in (one, two)]
    assert full.tokens == pytest.approx((2 * sizes[0] + sizes[1]) / 3)
    assert found.row("auto").kinds["none"].share == 1 and found.row("0.25").kinds["two"].share == 0.25
    alone = hf_vtc.evaluate(*vico, records[1:2])
    assert [row.point for row in alone.rows] == ["full"]


def test_without_references_answers_are_compared_with_full_length(vico, pages):
    records = [{"messages": page["messages"][:1], "images": page["images"]} for page in pages[:8]]
    found = hf_vtc.evaluate(*vico, records, baselines=(), budgets=["auto", 0.25])
    assert all(row.score is None and row.difference is None for row in found.rows)
    assert 0 <= found.row("0.25").same_answer < found.row("auto").same_answer <= 1
    assert found.recommendation.point is None and "No reference" in found.recommendation.sentence
    assert "No reference" in str(found) and "No reference" in found.to_markdown()


def test_a_report_survives_its_files(report, tmp_path):
    found, _ = report
    files = found.save(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(found.to_dict()))
    assert {file.name for file in files} == {
        "report.json",
        "report.md",
        *(f"{name}.{suffix}" for name in ("tokens", "time") for suffix in ("png", "svg")),
    }
    assert Image.open(tmp_path / "tokens.png").size == (1050, 675)
    # tables and lists, which is what the Hub renders
    text = (tmp_path / "report.md").read_text()
    lines = [line for line in text.splitlines() if line]
    assert all(line[0] in "#|-" or line == found.recommendation.sentence for line in lines)
    assert text.count("| full |") == 2 and "random beside auto" in text


def test_without_matplotlib_there_is_everything_but_the_plots(report, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(drawing.logger, "warning", warnings.append)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert [file.name for file in report[0].save(tmp_path)] == ["report.json", "report.md"]
    assert "pip install matplotlib" in warnings[0]


def test_only_points_that_qualify_are_recommended(report, vico, pages):
    found, folder = report
    for tolerance in (0.01, 0.2, 0.9):
        again = hf_vtc.evaluate(*vico, pages, **RUN, output=folder, tolerance=tolerance)
        chosen = again.recommendation
        margin = margin_of(tolerance, again.row("full").score, relative=False)
        if chosen.point is None:
            assert chosen.needed > 18 and f"{chosen.needed:,}" in chosen.sentence
        else:
            assert qualifies(again.row(chosen.point).difference, margin)
            assert f"{again.row(chosen.point).num:,} questions" in chosen.sentence
        qualified = [row for row in again.rows if row.family == "method" and row.difference is not None]
        qualified = [row for row in qualified if qualifies(row.difference, margin)]
        assert bool(qualified) == (chosen.point is not None)
    assert found.recommendation.point is None
    assert again.recommendation.point == "0.25"


def test_a_better_baseline_is_named_in_the_same_sentence(report):
    found = report[0]
    row, pool = found.row("0.25"), found.row("pool beside 0.25")
    better = [row, replace(pool, score=row.score + 0.1)]
    assert f"But pool has {100 * (row.score + 0.1):.1f} with" in better_baseline(row, better)
    assert better_baseline(row, [row, replace(pool, score=row.score)]) == ""
    # what stands beside another budget is no rival
    assert better_baseline(row, [row, replace(pool, score=1.0, beside="auto")]) == ""


def test_halves_share_no_image(pages):
    records = [{**page, "id": f"{idx}", "images": pages[idx % 7]["images"]} for idx, page in enumerate(pages)]
    questions = read_questions(records_to_ask(records))
    first, second = halves(questions, seed=0)
    assert sorted(first + second) == list(range(18))
    assert not {questions[idx].image for idx in first} & {questions[idx].image for idx in second}


def test_a_held_out_half_vouches_for_the_choice(vico, pages, report):
    found = hf_vtc.evaluate(*vico, pages, **RUN, output=report[1], tolerance=0.9, holdout=True).recommendation
    assert found.point == "0.25" and (found.num_chosen_on, found.num_vouched_on) == (9, 9)
    assert "on 9 questions" in found.sentence and "chosen on the other 9" in found.sentence


def test_an_answer_that_depends_on_its_batch_is_reported(vico, pages, monkeypatch):
    asked = {"budgets": ["auto"], "baselines": (), "batch_size": 4}
    assert not hf_vtc.evaluate(*vico, pages[:4], **asked).notes
    generate = running.Asker.generate

    def depending(self, inputs):
        texts, truncated, seconds = generate(self, inputs)
        return [text + "!" * (len(texts) == 1) for text in texts], truncated, seconds

    monkeypatch.setattr(running.Asker, "generate", depending)
    (note,) = hf_vtc.evaluate(*vico, pages[:4], **asked).notes
    assert "4 of 4 questions were answered otherwise alone than in a batch, at auto" in note


def test_a_limit_draws_questions(vico, pages):
    found = hf_vtc.evaluate(*vico, pages, budgets=["full"], limit=5)
    assert found.rows[0].num == 5
    assert hf_vtc.evaluate(*vico, pages, budgets=["full"], limit=5, seed=1).facts["data"] != found.facts["data"]


def test_adapters_are_measured_with_the_model(vico, pages):
    from peft import get_peft_model

    model, processor = load("vico-tiny")
    adapted = get_peft_model(model, hf_vtc.lora.default_lora_config(model, r=2))
    found = hf_vtc.evaluate(adapted, processor, pages[:4], baselines=["pool"], budgets=["auto"])
    plain = hf_vtc.evaluate(*vico, pages[:4], baselines=["pool"], budgets=["auto"])
    # adapters begin as nothing
    assert [row.score for row in found.rows] == [row.score for row in plain.rows]
    assert found.facts["checkpoint"] != plain.facts["checkpoint"]


def test_the_digest_of_a_checkpoint_is_that_of_its_weights(vico):
    copied = load("vico-tiny")[0]
    copied.config.name_or_path = "elsewhere"
    # as a trainer leaves it
    copied.train()
    assert sweep.checkpoint_digest(copied) == sweep.checkpoint_digest(vico[0])


def test_time_and_money_of_every_point(vico, pages, tmp_path):
    asked = {"baselines": ["pool"], "budgets": ["auto", 0.25], "time": True, "price_per_hour": 2.5}
    found = hf_vtc.evaluate(*vico, pages[:10], **asked)
    names = [(each.point, each.batch_size) for each in found.times]
    assert names == [(point, size) for size in (1, 8) for point in ("full", "auto", "0.25")]
    of_size = {size: next(each for each in found.times if each.batch_size == size) for size in (1, 8)}
    for each in found.times:
        full = of_size[each.batch_size]
        assert 0 < each.choice < each.first_token < each.answer and 0 < each.tower < each.first_token
        assert each.saved == pytest.approx(1000 * (full.answer - each.answer) * 2.5 / 3600)
    # to the answer: the last layers see a quarter of the tokens
    assert found.times[-1].first_token_speedup > 1 and of_size[8].answer_speedup == 1
    assert found.to_dict()["times"][1]["point"] == "auto" and found.facts["price_per_hour"] == 2.5
    for text in (str(found), found.to_markdown()):
        assert "first token" in text and "saved per 1,000 questions" in text
    unpriced = replace(found, times=[replace(each, saved=None) for each in found.times])
    assert "saved per" not in unpriced.to_markdown() and "first token" in unpriced.to_markdown()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"price_per_hour": 2.0}, "measured with `time=True` only"),
        ({"price_per_hour": -1.0, "time": True}, "`price_per_hour` must be a price above 0"),
    ],
)
def test_a_price_without_time_is_refused(vico, pages, asked, message):
    with pytest.raises(ValueError, match=message):
        hf_vtc.evaluate(*vico, pages[:1], **asked)


def test_time_needs_an_image(vico):
    text = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "1"}]}]
    with pytest.raises(ValueError, match="questions that show images"):
        hf_vtc.evaluate(*vico, text, time=True)


def test_models_of_others_are_refused(vico, pages):
    from transformers import LlamaConfig, LlamaForCausalLM

    other = LlamaForCausalLM(LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=16))
    with pytest.raises(ValueError, match="`model_type` must be one of"):
        hf_vtc.evaluate(other, vico[1], pages[:1])
