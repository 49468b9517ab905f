"""Tools on models that take videos: evaluation, fit, bench and the commands, each by the way that images go."""

import json

import pytest
import torch
from factories import tiny_model, tiny_processor
from fit_samples import differing, small_request, weights_of
from PIL import Image
from qwen_models import BASES
from test_data_videos import turns, video_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner
from video_records import clip, mixed_records, pair_of, write_pair, write_records

import hf_vtc
from hf_vtc import bench
from hf_vtc.data import RecordError, Video, VtcCollator
from hf_vtc.data.videos import metadata_of
from hf_vtc.evaluation import read_questions, records_to_ask, running
from hf_vtc.evaluation.baselines import NAMES
from hf_vtc.evaluation.comparators import COMPARATORS
from hf_vtc.evaluation.points import frames_of, levels_of, method_points
from hf_vtc.evaluation.running import Asker
from hf_vtc.fit import fit
from hf_vtc.fit.split import Split, image_digest
from hf_vtc.methods.costs import config_dict, tower_of
from hf_vtc.report.measured import Oracle, _tower_flops, plain_features
from hf_vtc_cli import answers
from hf_vtc_cli.app import app

pytestmark = pytest.mark.window

METHODS = ("llavolta", "avg_llava", "cdpruner")
CHANGE = {"frame_split": "change"}
# of each method, and of each base one way to split a budget over frames; windows over frames; frames that are tiles
PAIRS = [(method, base, fields) for method in METHODS for base, fields in zip(BASES, (CHANGE, {}), strict=True)]
PAIRS += [
    ("llavolta", BASES[0], {"compress_frames": 2, "compress_stride": 4}),
    ("llavolta", "llava_onevision", {}),
    ("cdpruner", "llava_onevision", CHANGE),
]


@pytest.fixture(scope="module", params=PAIRS, ids=lambda param: " ".join((*param[:2], *param[2])))
def pair(request):
    method, base, fields = request.param
    return pair_of(method, base, **fields)


def samples(folder):
    return [json.loads(line) for line in (folder / running.ANSWERS_FILE).read_text().splitlines()]


def asked_by_hand(processor, record):
    """Model inputs of a question, made by the processor alone."""
    videos, item = record.get("videos", []), record["messages"]
    texts = processor.apply_chat_template(
        [{"role": each["role"], "content": _parts(each["content"])} for each in item[:-1]],
        add_generation_prompt=True,
        tokenize=False,
    )
    media = {"videos": [video.frames for video in videos], "video_metadata": metadata_of(videos)} if videos else {}
    return processor(text=[texts], images=record["images"] or None, return_tensors="pt", **media)


def _parts(content):
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


# evaluation


def test_answers_and_tokens_are_those_of_generate(pair, tmp_path):
    """Of every point, at a budget for each image and each whole video."""
    model, processor = pair
    chosen = [mixed_records()[idx] for idx in (0, 2, 4, 5)]
    records = records_to_ask(chosen, takes_videos=True)
    budgets = ["auto", 7]
    hf_vtc.evaluate(
        model, processor, records, budgets=budgets, baselines=(), batch_size=4, max_new_tokens=3, output=tmp_path
    )
    answers = {(each["point"], each["key"]): each for each in samples(tmp_path)}
    assert len(answers) == 3 * len(records)
    for record, fields in zip(records, chosen, strict=True):
        inputs = asked_by_hand(processor, record)
        full = model.count_visual_tokens(**inputs, vtc_budget="full")
        for budget in ("full", *budgets):
            found = answers[str(budget), fields["id"]]
            out = model.generate(**inputs, vtc_budget=budget, max_new_tokens=3, do_sample=False)
            new = out[0, inputs["input_ids"].shape[1] :]
            assert found["answer"] == processor.decode(new, skip_special_tokens=True).strip()
            kept = model.count_visual_tokens(**inputs, vtc_budget=budget)
            assert (found["tokens"], found["reserved"]) == (int(kept.sum()), int(full.sum()))
            assert found["num_images"] == len(record["images"]) + len(record.get("videos", []))
            assert found["text_tokens"] == inputs["input_ids"].shape[1] - int(full.sum())


def test_levels_are_those_of_the_model(pair):
    model, processor = pair
    questions = read_questions(records_to_ask(mixed_records(), takes_videos=True))
    asker = Asker(model, processor, records_to_ask(mixed_records(), takes_videos=True), 4)
    told = levels_of(processor, model.config, questions)
    # images of all questions come first, as in a batch
    assert [list(own) for own in told] == [list(own) for own in asker.batch_of(questions, ["full"]).levels]


def test_baselines_spend_as_many_tokens(pair, tmp_path):
    model, processor = pair
    found = hf_vtc.evaluate(
        model,
        processor,
        mixed_records(),
        budgets=["auto", 0.75],
        baselines=NAMES,
        seeds=2,
        batch_size=6,
        max_new_tokens=2,
        output=tmp_path,
    )
    tokens = {(each["point"], each["key"]): each["tokens"] for each in samples(tmp_path)}
    left_out = {note.split("`")[1] for note in found.notes if note.startswith("No `")}
    made = {row.family for row in found.rows} - {"method"}
    assert made | left_out == set(NAMES) and not made & left_out and "random" in made
    keys = [record["id"] for record in mixed_records()]
    questions = read_questions(records_to_ask(mixed_records(), takes_videos=True))
    alone = {}
    for idx, question in enumerate(questions):
        if question.num_shown == 1:
            (alone[idx],) = frames_of(processor, model.config, [question])
    for point in {point for point, _ in tokens if " beside " in point}:
        family, beside = point.split(" #")[0].split(" beside ")
        own, its = ([tokens[name, key] for key in keys] for name in (point, beside))
        if family in COMPARATORS or family == "random" and "cdpruner" in model.config.model_type:
            # frames of one video may not get as many by rounding, and each gets one at least
            assert all(abs(count - wanted) < 6 for count, wanted in zip(own, its))
            assert own == its or family == "cdpruner"
        if family == "random" and "llavolta" in model.config.model_type:
            # the nearest numbers that a lot can leave, of which each frame gets as many
            for idx, (levels, num_frames, _, num_fixed) in alone.items():
                strides = range(1, levels[0] + 1)
                options = [num_fixed + num_frames * (levels[0] // stride) for stride in strides]
                below = max((option for option in options if option <= its[idx]), default=min(options))
                assert below <= own[idx] <= min(option for option in options if option >= its[idx])
        assert own[4] == 0 and all(own[:4])


def test_an_ended_run_goes_on_and_another_one_is_refused(tmp_path):
    model, processor = pair_of("llavolta", "qwen2_5_vl")
    asked = {"budgets": [0.75], "baselines": ["random"], "batch_size": 2, "max_new_tokens": 2, "output": tmp_path}
    first = hf_vtc.evaluate(model, processor, mixed_records(), **asked)
    whole = (tmp_path / running.ANSWERS_FILE).read_bytes()
    (tmp_path / running.ANSWERS_FILE).write_bytes(whole[: len(whole) // 2])
    again = hf_vtc.evaluate(model, processor, mixed_records(), **asked)
    assert (tmp_path / running.ANSWERS_FILE).read_bytes() == whole and again.rows[0].score == first.rows[0].score
    # the same frames at another speed are other positions in time
    slower = mixed_records()
    slower[0]["video"]["fps"] = 1
    with pytest.raises(ValueError, match="`data` changed"):
        hf_vtc.evaluate(model, processor, slower, **asked)


def test_budgets_are_those_of_whole_videos():
    model, processor = pair_of("avg_llava", "qwen3_vl")
    questions = read_questions(records_to_ask(mixed_records()[1:2], takes_videos=True))
    (levels,) = levels_of(processor, model.config, questions)
    # of six pictures three frames, of which at least one token is left
    assert levels[0] % 3 == 0 and min(levels) == 3
    with pytest.raises(ValueError, match=f"too small for 1 of 1 images and videos.* tokens from {min(levels)}"):
        method_points(processor, model.config, questions, [min(levels) - 1])
    found = hf_vtc.evaluate(
        model, processor, mixed_records()[1:2], budgets=[1], baselines=(), clip=True, max_new_tokens=1
    )
    assert found.row("1").tokens == min(levels) and found.row("1").num_clipped == 1


@pytest.mark.parametrize("of", ("a frame", "an image"))
def test_a_video_of_the_training_data_is_refused(of):
    model, processor = pair_of("llavolta", "qwen3_vl")
    black = Image.new("RGB", (24, 16))
    asked = [{"id": f"v{seed}", "conversations": turns(), "video": clip(4, seed)} for seed in range(2)]
    for record in asked:
        record["video"]["frames"][0] = black
    # begins with the frame of one colour that all of them begin with
    other = {"conversations": turns(), "video": {"frames": [black, *clip(3, 7)["frames"]], "fps": 1}}
    shared = asked[1]["video"]["frames"][2]
    trained = {"conversations": turns("what?"), "image": shared}
    if of == "a frame":
        trained = {"conversations": turns(), "video": {"frames": [black, shared], "fps": 1}}
    options = {"budgets": ["full"], "max_new_tokens": 1}
    hf_vtc.evaluate(model, processor, asked, train_records=[other], **options)
    with pytest.raises(RecordError, match=r"1 of 2 questions.*record 1 \(id 'v1'\) shows the image of record 1"):
        hf_vtc.evaluate(model, processor, asked, train_records=[other, trained], **options)


def test_videos_that_cannot_be_shown_are_named():
    model, processor = pair_of("llavolta", "qwen3_vl")
    short = [{"id": "short", "conversations": turns(), "video": clip(1, 0)}]
    with pytest.raises(RecordError, match="'short'.* needs at least 2 frames"):
        hf_vtc.evaluate(model, processor, short)
    processor.video = None
    with pytest.raises(RecordError, match="'r0'.*a field 'video'"):
        hf_vtc.evaluate(model, processor, mixed_records())
    with pytest.raises(RecordError, match="'r0'.* which this model does not take"):
        hf_vtc.evaluate(model, processor, records_to_ask(mixed_records(), takes_videos=True))


def test_times_of_videos():
    found = hf_vtc.evaluate(
        *pair_of("llavolta", "qwen3_vl"), mixed_records()[:2], budgets=["auto"], baselines=(), time=True
    )
    assert [(each.point, each.batch_size) for each in found.times] == [
        (point, size) for size in (1, 2) for point in ("full", "auto")
    ]


def test_eval_by_the_command(tmp_path):
    folder, data = write_pair("llavolta", "qwen3_vl", tmp_path / "model"), write_records(tmp_path / "data", 3)
    given = ["eval", str(folder), "--data", str(data), "--budgets", "full,0.75", "--baselines", "random", "--json"]
    found = CliRunner().invoke(app, given)
    assert found.exit_code == 0, found.output
    rows = json.loads(found.stdout)["rows"]
    assert [row["point"] for row in rows] == ["full", "0.75", "random beside 0.75"] and rows[0]["num"] == 4
    refused = CliRunner().invoke(app, [*given, "--train-data", str(data)])
    assert refused.exit_code == 2 and "4 of 4 questions show images of the training data" in refused.stderr


# fit


@pytest.mark.parametrize(
    ("method", "base", "lora"),
    [("llavolta", "qwen3_vl", True), ("avg_llava", "qwen2_5_vl", False), ("llavolta", "llava_onevision", False)],
)
def test_fit_of_videos(method, base, lora, monkeypatch, tmp_path):
    data, seen, call = write_records(tmp_path / "data"), set(), VtcCollator.__call__

    def noting(self, records):
        seen.update(image_digest(frame) for record in records for video in record["videos"] for frame in video.frames)
        return call(self, records)

    monkeypatch.setattr(VtcCollator, "__call__", noting)
    start = write_pair(method, base, tmp_path / "start")
    # frames that are tiles have four tokens here
    strides = ("options.scheme=null", "options.stages=[[1, 2, 1.0]]") if base == "llava_onevision" else ()
    request = small_request(
        start, data, tmp_path / "out", method, lora=lora, budgets=("full", 0.75), overrides=strides
    )
    measured = fit(request)
    split = Split.load(tmp_path / "out" / "fit" / "split.json")
    # a video as a whole, by its frames, or two that share one
    assert len(split.held_out) == 1 and len(split.images) == 4 and split.num_training == 8
    assert seen and not seen & set(split.images)
    tokens = {row["point"]: row["tokens"] for row in measured.after["rows"]}
    assert tokens["0.75"] < tokens["full"] and measured.before["num_questions"] == 1
    moved = differing(weights_of(start), weights_of(tmp_path / "out"))
    connector = "multi_modal_projector" if base == "llava_onevision" else "merger"
    assert any("language_model" in name for name in moved) and any(connector in name for name in moved)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "## Measured" in card and measured.after["recommendation"]["sentence"] in card


def test_a_fit_of_videos_names_what_cannot_be(tmp_path):
    start = write_pair("llavolta", "qwen3_vl", tmp_path / "start")
    data = write_records(tmp_path / "data", 2)
    request = small_request(start, data, tmp_path / "out", "llavolta", budgets=("full", 1))
    with pytest.raises(ValueError, match="`budgets` has 1, which is too small for 1 of 1 images and videos"):
        fit(request)
    records = json.loads(data.read_text())[:1]
    data.write_text(json.dumps(records))
    with pytest.raises(ValueError, match="whole images and videos aside, but there are no two"):
        fit(small_request(start, data, tmp_path / "other", "llavolta"))


# bench


def test_bench_measures_videos(pair):
    model, processor = pair
    record = records_to_ask(mixed_records()[2:3], takes_videos=True)[0]
    inputs = asked_by_hand(processor, record)
    report = bench(model, inputs, vtc_budget=0.75, repeats=1, warmup=0)
    assert report.num_kept == model.count_visual_tokens(**inputs, vtc_budget=0.75).tolist()
    assert report.num_reserved == model.count_visual_tokens(**inputs, vtc_budget="full").tolist()
    # an image, and two frames of two pictures, or tiles
    tiles = len(inputs["pixel_values"]) + 3
    assert report.num_tiles == (tiles if model.config.sees_tiles else 3)
    assert report.num_text_tokens == inputs["input_ids"].shape[1] - sum(report.num_reserved)
    with torch.no_grad():
        expected = model(**inputs, vtc_budget=0.75, logits_to_keep=1).logits
        torch.testing.assert_close(Oracle(model, dict(inputs), 0.75).logits(), expected, rtol=0, atol=1e-5)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            plain_features(model.model, inputs)()
    config = config_dict(model)
    if model.config.sees_tiles:
        assert _tower_flops(config, inputs) == counter.get_total_flops() == tiles * tower_of(config).flops()
        return
    sides = [size.tolist() for size in torch.cat([inputs["image_grid_thw"], inputs["video_grid_thw"]])]
    patch_size = model.config.vision_config.patch_size
    towers = [(frames, tower_of(config, (rows * patch_size, columns * patch_size))) for frames, rows, columns in sides]
    connectors = sum(frames * tower.connector_flops(tower.num_patches) for frames, tower in towers)
    assert _tower_flops(config, inputs) == counter.get_total_flops() - connectors


# run and bench by the command


@pytest.fixture
def files(monkeypatch):
    """Videos that need no library: a file of any name has these frames."""
    video = Video(clip(5, 0)["frames"], {"fps": 10.0, "total_num_frames": 30, "frames_indices": [0, 7, 15, 22, 29]})
    monkeypatch.setattr(answers, "read_video", lambda path: video)


def run(command, folder, *arguments):
    return CliRunner().invoke(app, [command, "--model", str(folder), *map(str, arguments)])


@pytest.mark.parametrize(("method", "base"), [(METHODS[0], BASES[0]), (METHODS[1], BASES[1]), (METHODS[2], BASES[0])])
def test_run_asks_about_videos(method, base, files, tmp_path):
    folder = write_pair(method, base, tmp_path / "model")
    Image.new("RGB", (24, 16), "red").save(tmp_path / "a.png")
    asked = ["--video", "clip.mp4", "--image", tmp_path / "a.png", "--question", "what?", "--max-new-tokens", 2]
    found = run("run", folder, *asked, "--save", tmp_path / "kept.png", "--no-gain", "--json")
    assert found.exit_code == 0, found.output
    results = json.loads(found.stdout)["results"]
    assert [sorted({"image", "video"} & {*result}) for result in results] == [["image"], ["video"]]
    for each in results[1]["runs"]:
        # three patches in time
        assert each["num_reserved"] % 3 == 0 and each["num_kept"] <= each["num_reserved"]
        assert (each["num_kept"] == each["num_reserved"]) == (each["budget"] == "full")
    assert Image.open(tmp_path / "kept.png").height > 100


def test_bench_by_the_command(files, tmp_path):
    folder = write_pair("llavolta", "qwen2_5_vl", tmp_path / "model")
    given = ["--video", "clip.mp4", "--video", "other.mp4", "--repeats", 1, "--warmup", 0, "--batch-size", 2, "--json"]
    found = run("bench", folder, *given)
    assert found.exit_code == 0, found.output
    (report,) = json.loads(found.stdout)["reports"]
    assert report["num_tiles"] == 12 and len(report["num_kept"]) == 4


@pytest.mark.parametrize("command", ("run", "bench"))
def test_commands_name_what_cannot_be(command, files, tmp_path):
    folder = tmp_path / "model"
    tiny_model("vico").save_pretrained(folder, save_code=False)
    tiny_processor("vico").save_pretrained(folder, save_code=False)
    found = run(command, folder, "--video", "clip.mp4")
    assert found.exit_code == 2 and "This model takes no videos" in found.stderr
    tiled = run("run", write_pair("llavolta", "llava_onevision", tmp_path / "tiled"), "--video", "clip.mp4")
    assert tiled.exit_code == 2 and "as tiles, of which what is kept cannot be drawn" in " ".join(tiled.stderr.split())
    (tmp_path / "clip.mp4").write_bytes(b"no image")
    found = run(command, folder, "--image", tmp_path / "clip.mp4")
    assert found.exit_code == 2 and "is a video. Give it as `--video`" in " ".join(found.stderr.split())
    found = CliRunner().invoke(app, ["bench", "--random-weights", "vico-8b", "--video", "clip.mp4"])
    assert found.exit_code == 2 and "`--random-weights` brings model" in " ".join(found.stderr.split())


def test_a_file_is_asked_about(tmp_path):
    video_file(tmp_path / "clip.mp4")
    folder = write_pair("llavolta", "qwen3_vl", tmp_path / "model")
    asked = ["--video", tmp_path / "clip.mp4", "--max-new-tokens", 1, "--save", tmp_path / "kept.png", "--no-gain"]
    assert run("run", folder, *asked).exit_code == 0 and (tmp_path / "kept.png").is_file()
    record = {"id": "v", "conversations": turns(), "video": "clip.mp4"}
    (tmp_path / "records.json").write_text(json.dumps([record]), encoding="utf-8")
    found = CliRunner().invoke(app, ["eval", str(folder), "--data", str(tmp_path / "records.json"), "--json"])
    assert found.exit_code == 0 and json.loads(found.stdout)["rows"][0]["tokens"] > 0
