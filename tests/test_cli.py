"""The command line: what it prints, what it writes, and how it refuses.

One file, since its tests share a folder with the shipped checkpoints and one way to call a command.
"""

import configparser
import json
import os
import pty
import re
import shutil
import statistics
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import factories
import pytest
import torch
from internvl_checkpoints import official_config, official_state, write_checkpoint
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

import hf_vtc.convert
import hf_vtc.hub
from hf_vtc.methods import costs
from hf_vtc.methods.shapes import Shape
from hf_vtc.models.tiling_vtc import TilingSettings
from hf_vtc.report import HARDWARE_NAMES, gain, shapes
from hf_vtc.report.hardware import CARDS
from hf_vtc_cli import answers, package
from hf_vtc_cli.app import app
from hf_vtc_cli.convert import convert
from hf_vtc_cli.errors import in_words_of
from hf_vtc_cli.estimate import CARD_NAMES
from hf_vtc_cli.export import export, push

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = [
    {"question": "What colour is the page?", "answer": "Red", "kind": "coarse"},
    {"question": "How many [boxes]?", "answer": "2", "kind": "middling"},
]


@pytest.fixture(scope="module")
def model_cards(tmp_path_factory):
    """A tiny model of every method with its processor, and a base that is no model of hf_vtc."""
    path = tmp_path_factory.mktemp("model_cards")
    for method in factories.METHODS:
        factories.tiny_model(method).save_pretrained(path / f"{method}-tiny", save_code=False)
        factories.tiny_processor(method).save_pretrained(path / f"{method}-tiny")
    factories.uncompressed(factories.tiny_model("vico")).config.save_pretrained(path / "base-tiny")
    return path


@pytest.fixture
def folder(model_cards):
    return model_cards / "vico-tiny"


@pytest.fixture
def shipped(model_cards, tmp_path, monkeypatch):
    """Models and pages in the places of those that come with hf_vtc; the current folder is `tmp_path`."""
    Image.new("RGB", (64, 32), "red").save(tmp_path / "a.png")
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "b.png")
    pages = [{"image": "a.png", "questions": QUESTIONS}, {"image": "b.png", "questions": QUESTIONS[:1]}]
    (tmp_path / "pages.json").write_text(json.dumps(pages), encoding="utf-8")
    monkeypatch.setattr(package, "SHIPPED_MODELS", model_cards)
    monkeypatch.setattr(package, "SHIPPED_PAGES", tmp_path / "pages.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*arguments):
    # the gain, which takes seconds to measure, has tests of its own
    quick = ("--no-gain",) if arguments[0] == "run" and "--gain" not in arguments else ()
    return CliRunner().invoke(app, [str(argument) for argument in (*arguments, *quick)])


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def output_of(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def test_help_names_every_command():
    text = output_of("--help")
    assert all(f" {name} " in text for name in ("run", "convert", "fit", "export", "estimate", "bench"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        *([name, "--help"] for name in ("run", "convert", "fit", "export", "estimate", "bench")),
        ["run", "--nope"],
        ["run", "--budget", "half"],
        ["run", "--dtype", "int8"],
        ["run", "--model", "./nope"],
        ["bench", "--budget", "half"],
        ["estimate", "--image-size", "448"],
    ],
    ids=" ".join,
)
def test_help_and_bad_arguments_load_no_torch(run_python, arguments):
    # what loads it takes seconds; the command starts by `hf_vtc_cli`, as in setup.cfg
    script = """
import sys
from hf_vtc_cli import main
sys.argv[0] = "hf-vtc"
try:
    main()
except SystemExit as end:
    print("status", end.code, sorted({"torch", "transformers"} & set(sys.modules)))
"""
    text = run_python(script, *arguments, installed=True)
    assert f"status {0 if '--help' in arguments else 2} []" in text


def test_the_command_is_the_command_line(shipped, folder, run_python):
    script = "import sys; from hf_vtc_cli import main; sys.argv[0] = 'hf-vtc'; main()"
    assert json.loads(run_python(script, "estimate", folder, "--json", installed=True))["model_type"] == "vtc_vico"


def test_console_script_is_the_launcher():
    settings = configparser.ConfigParser()
    settings.read(Path(__file__).resolve().parents[1] / "setup.cfg")
    assert settings["options.entry_points"]["console_scripts"].split() == ["hf-vtc", "=", "hf_vtc_cli:main"]
    assert "hf_vtc_cli" in settings["options.packages.find"]["include"].split()


@pytest.mark.window
def test_run_without_arguments(shipped):
    text = output_of("run", "--max-new-tokens", 3)
    assert "a.png" in text and "b.png" in text and "All questions, vico-tiny" in text
    assert "48 of 48" in text and "16 of 16" in text
    assert text.rstrip().endswith("What was kept: vtc_run.png")
    with Image.open(shipped / "vtc_run.png") as picture:
        # pages below each other, "auto" and 0.5 beside each other
        assert picture.width > 2 * 448 and picture.height > 224 + 448


@pytest.mark.window
def test_run_json(shipped, folder):
    content = json.loads(output_of("run", "--json", "--max-new-tokens", 3, "--save", "kept.png"))
    assert content["picture"] == "kept.png" and (shipped / "kept.png").is_file()
    assert (content["device"], content["dtype"], content["model"]) == ("cpu", "float32", str(folder))
    assert [Path(result["image"]).name for result in content["results"]] == ["a.png", "a.png", "b.png"]

    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many [boxes]?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=Image.new("RGB", (64, 32), "red"), text=text, return_tensors="pt")
    for attempt, budget in zip(content["results"][1]["runs"], ("full", "auto", 0.5), strict=True):
        tokens = model.generate(**inputs, vtc_budget=budget, max_new_tokens=3, do_sample=False)
        answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert (attempt["budget"], attempt["answer"]) == (budget, answer)
        assert attempt["num_reserved"] == 48
        assert attempt["num_kept"] == int(model.count_visual_tokens(**inputs, vtc_budget=budget))
        assert attempt["compression_ratio"] == 48 / attempt["num_kept"]
        assert attempt["correct"] == (answer.casefold() == "2")
        assert attempt["ttft_ms"] > 0
    for line, budget in zip(content["summary"], ("full", "auto", 0.5), strict=True):
        assert (line["budget"], line["num_marked"], line["num_reserved"]) == (budget, 3, 48 + 48 + 16)


def test_run_prints_json_alone(shipped, folder, run_python):
    # in a process of its own, where nothing has been imported or silenced yet
    arguments = ("run", "--image", shipped / "a.png", "--model", folder, "--json", "--max-new-tokens", 2)
    content = json.loads(run_python("from hf_vtc_cli.app import app; app()", *arguments, installed=True))
    assert len(content["results"]) == 1


def test_run_works_where_output_is_ascii(shipped, folder, run_python, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    script = "import sys; from hf_vtc_cli.app import app; sys.argv[0] = 'hf-vtc'; app()"
    arguments = ("run", "--image", shipped / "a.png", "--question", "Où?", "--model", folder, "--max-new-tokens", 8)
    assert "O?" in run_python(script, *arguments, installed=True)


def test_run_all_compares_the_shipped_models(shipped, model_cards):
    content = json.loads(output_of("run", "--all", "--json", "--max-new-tokens", 2))
    names = sorted(f"{method}-tiny" for method in factories.METHODS)
    with Image.open(shipped / "vtc_run.png") as picture:
        # a column per model
        assert picture.width > 448 * len(names)
    assert [Path(model["model"]).name for model in content["models"]] == names
    for model in content["models"]:
        assert [result["question"] for result in model["results"]] == [asked["question"] for asked in QUESTIONS] + [
            QUESTIONS[0]["question"]
        ]
        assert all([run["budget"] for run in result["runs"]] == ["full", "auto"] for result in model["results"])
        # what it says of a model is what that model says alone
        alone = json.loads(output_of("run", "--json", "--model", model["model"], "--max-new-tokens", 2))
        for one, other in zip(alone["results"], model["results"], strict=True):
            for run, same in zip(one["runs"], other["runs"]):
                assert all(run[name] == same[name] for name in ("budget", "answer", "num_kept", "num_reserved"))


def test_run_all_prints_every_model(shipped):
    text = output_of("run", "--all", "--max-new-tokens", 1)
    for method in factories.METHODS:
        # a column of answers, and a line in the ranking
        assert text.count(f" {method} ") == text.count(f" {method}-tiny ") == 1
    assert "base-tiny" not in text
    assert text.count("ratio ") >= 3 * len(factories.METHODS)


def test_run_all_takes_a_budget(shipped):
    content = json.loads(output_of("run", "--all", "--json", "--budget", "full", "--max-new-tokens", 1))
    assert {run["budget"] for model in content["models"] for run in model["summary"]} == {"full", "auto"}


def test_run_all_without_models(shipped, monkeypatch, tmp_path):
    monkeypatch.setattr(package, "SHIPPED_MODELS", tmp_path / "absent")
    result = invoke("run", "--all")
    assert result.exit_code == 2 and "The checkpoints that come with hf_vtc are not here" in result.stderr


@pytest.mark.parametrize("method", factories.METHODS)
def test_run_any_method(shipped, model_cards, method):
    arguments = ("--model", model_cards / f"{method}-tiny", "--image", "a.png", "--max-new-tokens", 1)
    content = json.loads(output_of("run", "--json", *arguments))
    budgets = [line["budget"] for line in content["summary"]]
    # half of the tokens only where the method has such a count
    assert budgets[:2] == ["full", "auto"] and budgets[2:] in ([], [0.5])
    kept = [line["num_kept"] for line in content["summary"]]
    assert all(count <= kept[0] for count in kept)
    assert "What was kept" in output_of("run", *arguments)


def test_run_shows_two_questions_where_what_is_kept_depends_on_them(shipped, monkeypatch):
    drawn = []

    class Asked:
        def __init__(self, name):
            self.name = name

        def overlay(self, budget, title, caption):
            drawn.append((self.name, budget, caption))
            return Image.new("RGB", (1, 1))

    def run(budget, kept, correct=None):
        return {"budget": budget, "num_kept": kept, "answer": "a", "correct": correct}

    asked = [
        {"question": "1?", "answer": "a", "runs": [run("full", 9), run("auto", 2, True), run(0.5, 4)]},
        {"question": "2?", "answer": "b", "runs": [run("full", 9), run("auto", 2, False), run(0.5, 4)]},
        {"question": "3?", "answer": "b", "runs": [run("full", 9), run("auto", 8, False), run(0.5, 4)]},
        {"question": "4?", "runs": [run("full", 9), run("auto", 6), run(0.5, 4)]},
    ]
    assert len(answers._pictures([Asked(idx) for idx in range(4)], asked, "model, page")) == 3
    assert [(name, budget) for name, budget, _ in drawn] == [(0, "auto"), (2, "auto"), (0, 0.5)]
    assert drawn[0][2] == ["Question: 1?", "Answer: a, right"]
    assert drawn[1][2] == ["Question: 3?", "Answer: a, expected b"]
    assert drawn[2][2] == ["Question: 1?", "Answer: a"]


def test_run_own_image_and_question(shipped):
    arguments = ("--image", "a.png", "--image", "b.png", "--question", "Why?", "--budget", 16, "--max-new-tokens", 2)
    content = json.loads(output_of("run", "--json", *arguments))
    assert [(result["image"], result["question"]) for result in content["results"]] == [
        ("a.png", "Why?"),
        ("b.png", "Why?"),
    ]
    for result in content["results"]:
        assert "answer" not in result and [attempt["correct"] for attempt in result["runs"]] == [None] * 3
        assert result["runs"][2]["num_kept"] <= 16
    assert content["summary"][0]["num_correct"] is None


def test_run_question_about_the_shipped_pages(shipped):
    content = json.loads(output_of("run", "--json", "--question", "Why?", "--max-new-tokens", 1))
    assert [result["question"] for result in content["results"]] == ["Why?", "Why?"]


@pytest.mark.parametrize("budget", ("auto", "full"))
def test_run_names_a_budget_once(shipped, budget):
    content = json.loads(output_of("run", "--json", "--image", "b.png", "--budget", budget, "--max-new-tokens", 1))
    assert [line["budget"] for line in content["summary"]] == ["full", "auto"]


def test_run_dtype(shipped):
    arguments = ("--image", "b.png", "--dtype", "bfloat16", "--device", "cpu", "--max-new-tokens", 1)
    assert json.loads(output_of("run", "--json", *arguments))["dtype"] == "bfloat16"


BAR = """
from hf_vtc_cli.options import ProgressBar, status
with status("Loading"):
    pass
with ProgressBar("Asking", 2) as bar:
    bar.move(1)
    bar.print("a table")
    bar.move(2)
"""


@pytest.mark.parametrize("settings, coloured", [({}, True), ({"NO_COLOR": "1"}, False)])
def test_progress_is_shown_where_someone_watches(monkeypatch, settings, coloured):
    watcher, terminal = pty.openpty()
    # narrow: what does not fit is left out, and no line wraps
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "40", **settings}
    command = [sys.executable, "-c", BAR]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=terminal, text=True, check=True)
    os.close(terminal)
    with open(watcher, "rb", buffering=0) as file:
        shown = file.read(100_000).decode()
    assert result.stdout == "a table\n"
    assert "Loading" in shown and "Asking" in shown and "1/2" in shown and "table" not in shown
    # the bar goes when it is done, whatever colours there are
    assert (
        shown.rstrip().endswith(("\x1b[2K", "\x1b[?25h"))
        and (re.search(r"\x1b\[[0-9;]*3[0-9;]*m", shown) is not None) == coloured
    )


def test_progress_is_silent_where_no_one_watches():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", BAR], env=environment, capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("a table\n", "")


def test_right_answers_are_counted():
    runs = [[{"answer": "RED"}, {"answer": "blue"}], [{"answer": "3"}, {"answer": "2"}]]
    results = [{**asked, "runs": attempts} for asked, attempts in zip(QUESTIONS, runs, strict=True)]
    for result in results:
        answers.marked(result)
        for attempt in result["runs"]:
            attempt |= {"budget": "full", "num_reserved": 8, "num_kept": 2, "ttft_ms": 1.0}
    lines = [answers.summary(results, run_idx) for run_idx in range(2)]
    assert [(line["num_correct"], line["num_marked"]) for line in lines] == [(1, 2), (1, 2)]
    assert lines[0]["compression_ratio"] == 4


def _write_what_is_refused(folder: Path) -> None:
    """A picture that unpacks to gigabytes, a format of photographs, a pipe, and checkpoints that are none."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    end = struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + end)
    (folder / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    config = official_config(flash=False)
    state = official_state(config, flash=False)
    write_checkpoint(folder / "base", config, state)
    impossible = official_config(flash=False, text={"num_attention_heads": 0, "head_dim": None})
    write_checkpoint(folder / "impossible", impossible, state)
    write_checkpoint(folder / "quantised", config | {"quantization_config": {"quant_method": "awq"}}, state)
    (folder / "gguf").mkdir()
    (folder / "gguf" / "config.json").write_text(json.dumps(config))
    (folder / "gguf" / "model.gguf").write_bytes(b"GGUF")
    (folder / "full").mkdir()
    (folder / "full" / "config.json").write_text("{}")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "--image", "nope.png"], "'nope.png' is no existing file"),
        (["run", "--image", "pages.json"], "no image could be read"),
        (["run", "--model", "./nope"], "'./nope' is neither a folder nor"),
        (["run", "--model", "."], "No config.json of a model can be read from ."),
        (["run", "--model", "owner/name"], "No config.json of a model can be read from owner/name"),
        (["run", "--budget", "half"], "got 'half'"),
        (["estimate", "llava-7"], "none of the shapes llava-1.5-7b, "),
        (["estimate", "--shape", "llava-7"], "none of the shapes llava-1.5-7b, "),
        (["estimate", "vico-8b", "--shape", "vico-8b"], "MODEL_OR_SHAPE or `--shape`, not both"),
        (["estimate", "--gpu", "b200"], "`--gpu` must be one of h100, a100, l4, rtx4090, cpu, got 'b200'"),
        (["estimate", "--gpu", "l4", "--peak-flops", "1e12"], "not both"),
        (["estimate", "--peak-flops", "1e12"], "belong together"),
        (["estimate", "--peak-flops", "nan", "--bandwidth", "1"], "`--peak-flops` must be a number above 0"),
        (["estimate", "--image-size", "0x5"], "got '0x5'"),
        (["bench", "--random-weights", "llava-1.5-7b"], "does not compress, so that there is nothing to measure"),
        (["bench", "--random-weights", "nope"], "'nope' is no shape. Give one of avg-llava-7b, "),
        (["bench", "--random-weights", "vico-8b", "--model", "."], "`--random-weights` brings model"),
        (["bench", "--budget", "0.5", "--budget", "half"], "got 'half'"),
        (["run", "--budget", "1.5"], "got '1.5'"),
        (["run", "--budget", "0"], "at least 1 without (256), got '0'"),
        (["run", "--budget", "nan"], "got 'nan'"),
        (["run", "--all", "--model", "."], "`--all` or `--model`"),
        (["run", "--budget", "3"], "smallest admissible count is"),
        (["run", "--save", "kept.txt"], "'.txt' is none"),
        (["run", "--save", "kept"], "it has no ending"),
        # a format that can only be read, and one without colours
        (["run", "--save", "kept.psd"], "`--save` needs the name of a picture in a format that Pillow writes"),
        (["run", "--save", "kept.xbm"], "`--save` needs the name of a picture in a format that Pillow writes"),
        (["run", "--save", "/proc/kept.png"], "`--save`: /proc/kept.png cannot be written"),
        (["run", "--save", "folder.png"], "is there already and no ordinary file"),
        (["run", "--save", "pipe.png"], "is there already and no ordinary file"),
        (["run", "--image", "bomb.png"], "decompression bomb"),
        (["bench", "--image", "bomb.png"], "decompression bomb"),
        (["run", "--image", "photo.heic"], "'photo.heic' is HEIC, a format that is not read here"),
        (["run", "--image", "pipe.png"], "pipe.png"),
        (["run", "--budget", "150%"], "got '150%'"),
        (["run", "--budget", "0%"], "got '0%'"),
        (["run", "--budget", "%"], "got '%'"),
        (["run", "--device", "cpu:3"], "`--device` 'cpu:3' is not available here. Available: cpu"),
        (["run", "--device", "meta"], "`--device` 'meta' is not available here"),
        (["run", "--device", ""], "`--device` '' is not available here"),
        (["convert", "base", "full", "--method", "vico"], "Choose another one, or pass `--overwrite` to replace it"),
        (["convert", "base", "out", "--max-shard-size", "big"], "`--max-shard-size` must be bytes or like '2GB'"),
        (["export", "model", "out", "--max-shard-size", "big"], "`--max-shard-size` must be bytes or like '2GB'"),
        (["push", "model", "a/b", "--max-shard-size", "big"], "`--max-shard-size` must be bytes or like '2GB'"),
        (["convert", "base", "out", "--dtype", "int8"], "`--dtype` must be a floating dtype"),
        (["convert", "base", "out"], "fits several methods. Give `--method`"),
        (
            ["convert", "impossible", "out", "--method", "vico", "--image-token-id", "5"],
            "cannot be those of a model (",
        ),
        (["convert", "gguf", "out", "--method", "vico"], "model.gguf (GGUF)"),
        (["convert", "quantised", "out", "--method", "vico"], "is quantised (`quant_method` 'awq' in config.json)"),
        (["export", "impossible", "out"], "`model` must be one of hf_vtc, got model type 'internvl_chat'"),
        (["run", "--save", "nowhere/kept.png"], "does not exist"),
        (["run", "--device", "cudo"], "`--device` 'cudo' is not available here. Available: cpu"),
        (["run", "--dtype", "int8"], "`--dtype` must be one of"),
        (["estimate", "--image-size", "448"], "`--image-size` must be height x width"),
        (["estimate", "--budget", "auto"], "router decides from the pixels"),
        (["bench", "--image", "nope.png"], "'nope.png' is no existing file"),
        (["convert", "nope", "out"], "nope"),
        (["export", "nope", "out"], "'nope' is neither a folder nor"),
        (["export", "owner/name", "out"], "No config.json of a model can be read from owner/name"),
    ],
)
def test_refusals_are_one_line(shipped, folder, arguments, message):
    _write_what_is_refused(shipped)
    (shipped / "model").symlink_to(folder)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not (shipped / "out").exists() and not (shipped / "vtc_run.png").exists()
    assert [path.name for path in (shipped / "full").iterdir()] == ["config.json"]


def test_settings_that_fail_at_work_are_one_line(shipped, folder, monkeypatch):
    shutil.copytree(folder, "odd")
    (shipped / "odd" / "generation_config.json").write_text('{"no_repeat_ngram_size": "a"}')
    arguments = ("run", "--model", "odd", "--image", "a.png")
    result = invoke(*arguments)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "Error: odd does not work as a model (TypeError" in result.stderr
    assert isinstance(invoke(*arguments, "--debug").exception.__cause__, TypeError)
    # the same failure of a host that nobody has proven yet is told as such
    monkeypatch.setattr("transformers.__version__", "99.0.0")
    assert "transformers 99.0.0 is newer than" in invoke(*arguments).stderr


def test_messages_of_python_are_told_in_the_words_of_a_command():
    said = {
        "pass `overwrite=True`": "pass `--overwrite`",
        "or `check=False`": "or `--no-check`",
        "`private=True`, but": "`--private`, but",
        "`private=False`": "`--public`",
        "`max_shard_size` must": "`--max-shard-size` must",
        "`repo_id` must": "`REPO` must",
        "by `hf_vtc.convert.load_official`": "by `hf-vtc convert`",
        "`image_token`, `config.json` and `model`": "`image_token`, `config.json` and `model`",
    }
    for message, expected in said.items():
        spoken = [in_words_of(command, message) for command in (export, push, convert)]
        assert expected in spoken, (message, spoken)


def test_debug_shows_where_an_error_comes_from(shipped):
    result = invoke("run", "--budget", "half", "--debug")
    assert isinstance(result.exception, ValueError) and "got 'half'" in str(result.exception)


def test_unknown_device_is_refused(shipped):
    missing = "cuda" if not torch.cuda.is_available() else "xpu"
    result = invoke("run", "--device", missing)
    assert result.exit_code == 2 and f"`--device` {missing!r} is not available here" in result.stderr


def test_other_models_are_refused(shipped):
    factories.uncompressed(factories.tiny_model("vico")).save_pretrained(shipped / "stock")
    result = invoke("run", "--model", shipped / "stock")
    assert result.exit_code == 2 and "is no model of hf_vtc" in result.stderr and "hf-vtc convert" in result.stderr


@pytest.mark.parametrize("name, remedy", [("SHIPPED_MODELS", "--model"), ("SHIPPED_PAGES", "--image")])
def test_missing_shipped_files_are_explained(shipped, monkeypatch, name, remedy):
    monkeypatch.setattr(package, name, shipped / "absent")
    result = invoke("run")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1 and str(shipped / "absent") in result.stderr and remedy in result.stderr


def test_estimate_of_the_shipped_model(shipped):
    content = json.loads(output_of("estimate", "--json", "--image-size", "32x64", "--text-tokens", 5))
    assert (content["model_type"], content["num_tiles"], content["num_reserved"]) == ("vtc_vico", 3, 48)
    assert (content["image_size"], content["num_text_tokens"], content["num_kept"]) == ([32, 64], 5, 24)
    # its processor cuts into at most 4 tiles and a thumbnail
    assert json.loads(output_of("estimate", "--json", "--image-size", "64x96"))["num_tiles"] == 5
    assert "ideal speed-up" in output_of("estimate", "--num-tiles", 7)


def test_estimate_of_other_models(shipped):
    factories.uncompressed(factories.tiny_model("vico")).config.save_pretrained(shipped / "stock")
    assert json.loads(output_of("estimate", "stock", "--json", "--num-tiles", 1))["num_reserved"] == 16
    config = json.loads((shipped / "stock" / "config.json").read_text(encoding="utf-8"))
    official = {"model_type": "internvl_chat", "vision_config": config["vision_config"], "downsample_ratio": 0.5}
    (shipped / "official").mkdir()
    text = json.dumps({**official, "llm_config": config["text_config"]})
    (shipped / "official" / "config.json").write_text(text, encoding="utf-8")
    content = json.loads(output_of("estimate", "official", "--json", "--num-tiles", 2, "--budget", 0.25))
    assert (content["num_reserved"], content["num_kept"]) == (32, 8)


def test_bench_measures_one_page(shipped):
    content = json.loads(output_of("bench", "--json", "--repeats", 2, "--warmup", 0, "--batch-size", 3))
    (report,) = content["reports"]
    assert (report["batch_size"], report["num_tiles"], report["num_reserved"]) == (3, 9, [48] * 3)
    assert len(report["measured"]["seconds"]) == 2
    text = " ".join(output_of("bench", "--repeats", 1, "--warmup", 0).split())
    assert all(word in text for word in ("eta = oracle / measured", "phi, the share", "Oracle: the same tower"))


def test_bench_takes_several_images(shipped):
    arguments = ("--image", "a.png", "--image", "b.png", "--repeats", 1, "--warmup", 0)
    assert json.loads(output_of("bench", "--json", *arguments))["reports"][0]["num_reserved"] == [48, 16]


def test_bench_takes_several_budgets_and_batches(shipped):
    options = (
        "--budget",
        0.5,
        "--budget",
        "full",
        "--batch-size",
        1,
        "--batch-size",
        2,
        "--repeats",
        1,
        "--warmup",
        0,
    )
    reports = json.loads(output_of("bench", "--json", *options))["reports"]
    assert [(report["batch_size"], report["vtc_budget"]) for report in reports] == [
        (1, 0.5),
        (1, "full"),
        (2, 0.5),
        (2, "full"),
    ]
    text = " ".join(output_of("bench", *options).split())
    assert "24 of 48" in text and "96 of 96" in text
    assert all(word in text for word in ("eta: oracle / ours", "phi: share of the possible gain", "Oracle: the same"))


@pytest.fixture
def small_shapes(monkeypatch):
    """Tiny shapes in the places of those of 100 M parameters."""
    tiny = {}
    for name, (record, _) in shapes.shapes_of_methods().items():
        fields = dict(factories.TINY[record.name].config)
        vision, text = fields.pop("vision_config"), fields.pop("text_config")
        fields.pop("image_token_id", None)
        tiling = {
            key: value
            for key, value in factories.TINY[record.name].processor.items()
            if key in TilingSettings.__dataclass_fields__
        }
        if name.endswith("-100m"):
            tiny[name] = record, Shape(vision, text, (64, 96), fields, tiling)
    monkeypatch.setattr(shapes, "shapes_of_methods", lambda: tiny)
    monkeypatch.setattr(gain, "shapes_of_methods", lambda: tiny)
    return tiny


@pytest.mark.parametrize("method", factories.METHODS)
def test_bench_of_random_weights(small_shapes, method):
    name = f"{method.replace('_', '-')}-100m"
    if name not in small_shapes:
        pytest.skip(f"the record of {method} names no shape")
    content = json.loads(output_of("bench", "--random-weights", name, "--json", "--repeats", 1, "--warmup", 0))
    assert content["source"] == name
    (report,) = content["reports"]
    assert report["num_text_tokens"] == 64
    assert report["num_kept"] <= report["num_reserved"] and report["num_reserved"][0] > 0


def test_run_measures_a_gain(shipped, small_shapes):
    arguments = ("run", "--gain", "--image", "b.png", "--max-new-tokens", 1)
    content = json.loads(output_of(*arguments, "--json"))["gain"]
    assert content["shape"] == "vico-100m" and content["num_kept"] < content["num_reserved"]
    assert len(content["full_seconds"]) == len(content["kept_seconds"]) == 7
    ratios = [full / kept for full, kept in zip(content["full_seconds"], content["kept_seconds"])]
    assert content["speedup"] == statistics.median(ratios)
    text = " ".join(output_of(*arguments).split())
    assert "What compression gains on this machine" in text and "Its weights are random" in text
    assert f"{content['num_reserved']} visual tokens" in text and "times faster" in text
    assert json.loads(output_of("run", "--json", "--max-new-tokens", 1))["gain"] is None


def test_gain_on_a_slow_machine_is_one_round(small_shapes):
    result = gain.measure_gain("vico-100m", torch.device("cpu"), torch.float32, max_seconds=0.0)
    assert len(result.full_seconds) == len(result.kept_seconds) == 1


def test_run_says_why_there_is_no_gain(shipped, small_shapes, model_cards):
    # an image has one count of visual tokens
    arguments = ("--gain", "--image", "b.png", "--max-new-tokens", 1, "--model", model_cards / "convllava-tiny")
    content = json.loads(output_of("run", "--json", *arguments))
    assert content["gain"] is None and "an image has one count of visual tokens" in content["notes"][-1]
    compared = json.loads(output_of("run", "--json", "--all", "--gain", "--max-new-tokens", 1))
    assert compared["gain"] is None and "hf-vtc run --model FOLDER" in compared["notes"][-1]


def test_run_says_what_its_model_reads(shipped, folder, tmp_path):
    note = "reads drawn forms only"
    arguments = ("--image", "b.png", "--max-new-tokens", 1)
    text = output_of("run", *arguments)
    assert note in text and "hf-vtc convert OpenGVLab/" in text
    # not of pages that come with it, and not of a model of one's own
    assert note not in output_of("run", "--max-new-tokens", 1)
    shutil.copytree(folder, tmp_path / "own")
    assert note not in output_of("run", *arguments, "--model", tmp_path / "own")


# every shape can be estimated, and is of the size that its name says
@pytest.mark.parametrize("name", shapes.shape_names())
def test_estimate_of_shapes(name):
    content = json.loads(output_of("estimate", name, "--json"))
    assert content == json.loads(output_of("estimate", "--shape", name, "--json"))
    assert content["num_reserved"] >= 576 and content["ttft_seconds"] > 0
    config, _ = shapes.config_of_shape(name)
    billions = costs.decoder_of(config).params / 1e9
    told = float(re.search(r"-(\d+(?:\.\d+)?)[bm]$", name)[1]) / (1000 if name.endswith("m") else 1)
    # a name counts embeddings and tower too, which weigh more the smaller a model is
    assert 0.4 * told <= billions <= 1.05 * told


@pytest.mark.parametrize("gpu, words", [("h100", "NVIDIA H100 SXM"), ("l4", "NVIDIA L4"), ("rtx4090", "RTX 4090")])
def test_estimate_names_its_hardware(gpu, words):
    assert words in output_of("estimate", "vico-1b", "--gpu", gpu)
    assert words in json.loads(output_of("estimate", "vico-1b", "--gpu", gpu, "--json"))["hardware"]["name"]


def test_estimate_offers_the_hardware_that_is_known():
    assert CARD_NAMES == HARDWARE_NAMES


def test_estimate_of_other_hardware():
    slow = ("--peak-flops", 1e12, "--bandwidth", 1e11)
    content = json.loads(output_of("estimate", "vico-1b", "--json", *slow))
    assert (content["hardware"]["peak_flops"], content["hardware"]["bandwidth"]) == (1e12, 1e11)
    fast = json.loads(output_of("estimate", "vico-1b", "--json", "--gpu", "a100"))
    assert content["ttft_seconds"] > fast["ttft_seconds"]
    assert "1 TFLOP/s, 100 GB/s" in output_of("estimate", "vico-1b", *slow)


def test_estimate_prints_what_its_page_shows(monkeypatch):
    page = (ROOT / "docs" / "estimate.md").read_text(encoding="utf-8")
    command = re.search(r"```bash\nhf-vtc (estimate .*)\n```", page)[1]
    (shown,) = re.findall(r"```text\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.setenv("COLUMNS", "100")
    assert [line.rstrip() for line in output_of(*command.split()).splitlines()] == [
        line.rstrip() for line in shown.splitlines()
    ]
    # the table of hardware is that of the code
    rows = dict(re.findall(r"\| `(\w+)`[^|]*\| ([^|]+) \|", page))
    assert {name: card.name for name, card in CARDS.items()}.items() <= rows.items()


def test_estimate_measures_this_cpu():
    hardware = json.loads(output_of("estimate", "vico-1b", "--json", "--gpu", "cpu"))["hardware"]
    assert "this machine's CPU" in hardware["name"] and hardware["bytes_per_value"] == 4
    # any machine of this century
    assert 1e8 < hardware["peak_flops"] < 1e15 and 1e8 < hardware["bandwidth"] < 1e13


def test_estimate_of_a_folder_with_a_config_alone(shipped, folder):
    (shipped / "alone").mkdir()
    shutil.copy(folder / "config.json", shipped / "alone")
    assert json.loads(output_of("estimate", "alone", "--json", "--num-tiles", 2))["num_reserved"] == 32


def test_estimate_prefers_a_folder_to_a_shape(shipped, folder):
    shutil.copytree(folder, shipped / "vico-8b")
    assert json.loads(output_of("estimate", "vico-8b", "--json", "--num-tiles", 1))["num_reserved"] == 16
    assert json.loads(output_of("estimate", "--shape", "vico-8b", "--json", "--num-tiles", 1))["num_reserved"] == 256


def test_convert_writes_a_model(shipped):
    base = factories.uncompressed(factories.tiny_model("vico"))
    base.save_pretrained("base")
    factories.tiny_tokenizer().save_pretrained("base")
    assert "initialised" in output_of("convert", "base", "out", "--method", "vico", "--dtype", "bfloat16", "--no-code")
    config = json.loads((shipped / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "vtc_vico" and not list((shipped / "out").glob("*.py"))
    again = invoke("convert", "base", "out")
    assert again.exit_code == 2 and "overwrite" in again.stderr
    output_of("convert", "base", "out", "--method", "vico", "--overwrite")
    assert (shipped / "out" / "modeling_vico.py").is_file()


def test_export_writes_a_folder_with_code(shipped, folder):
    assert "not checked" in output_of("export", folder, "out", "--no-check")
    assert (shipped / "out" / "modeling_vico.py").is_file()


@pytest.mark.parametrize("flag, check", [([], True), (["--check"], True), (["--no-check"], False)])
def test_export_checks_unless_told_otherwise(shipped, folder, monkeypatch, flag, check):
    calls = []
    monkeypatch.setattr(hf_vtc.hub, "export", lambda *args, **kwargs: calls.append((args, kwargs)) or args[1])
    output_of("export", folder, "out", "--overwrite", *flag)
    card = {"base_model": None, "license": None, "max_shard_size": "5GB"}
    assert calls == [((str(folder), Path("out")), {"check": check, "overwrite": True, **card})]


def test_convert_hands_its_options_on(shipped, monkeypatch):
    calls = []

    class Report:
        def summary(self):
            return "done"

    monkeypatch.setattr(hf_vtc.convert, "convert", lambda *args, **kwargs: calls.append((args, kwargs)) or Report())
    options = ("--image-token-id", 7, "--max-shard-size", "5MB", "--vision-tower", "owner/tower")
    assert output_of("convert", "a", "b", *options) == "done\n"
    expected = {
        "image_token_id": 7,
        "dtype": None,
        "max_shard_size": "5MB",
        "overwrite": False,
        "save_code": True,
        "vision_tower": "owner/tower",
    }
    assert calls == [(("a", Path("b"), None), expected)]
