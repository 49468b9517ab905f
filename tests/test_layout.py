"""The rules of the package's layout, read from its source: who imports whom, and what may travel beside weights."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_vtc"
MODELS = PACKAGE / "models"

SOURCES = sorted(PACKAGE.rglob("*.py"))
MODEL_SOURCES = sorted(MODELS.glob("*.py"))

# a part of the package imports parts of its own rank or below, never above; `models` imports itself alone
RANK = {
    "fit": 5,
    "demo": 5,
    "hub": 4,
    "vllm": 4,
    "evaluation": 4,
    "trainers": 3,
    "convert": 3,
    "lora": 3,
    "data": 3,
    "plot": 3,
    "report": 3,
    "methods": 2,
    "__init__": 2,
    "files": 1,
    "auto": 1,
    "models": 1,
    "ops": 0,
    "version": 0,
}
# the standard library needs no permission; these are what remote code may ask of its host
THIRD_PARTY_OF_MODELS = {"torch", "transformers", "numpy", "PIL"}
ROLES = ("configuration", "modeling", "image_processing", "processing")


def relative_name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def part_of(file: Path) -> str:
    """First path component inside of the package, without its suffix."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(file: Path) -> list[str]:
    """Absolute dotted names of all that a file of the package imports, wherever the statement stands."""
    package = ["hf_vtc", *file.relative_to(PACKAGE).parent.parts]
    names = []
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *node.module.split(".")] if node.module else base
            names += [".".join([*base, alias.name]) for alias in node.names]
    return names


def foreign_imports_of(file: Path) -> list[str]:
    """Modules that a file imports by their absolute name."""
    names = []
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module)
    return names


def relative_imports_of(file: Path) -> list[ast.ImportFrom]:
    return [node for node in ast.walk(tree_of(file)) if isinstance(node, ast.ImportFrom) and node.level]


def test_the_layout_is_found():
    assert len(MODEL_SOURCES) > 5
    assert {"models", "auto", "hub"} <= {part_of(file) for file in SOURCES}


@pytest.mark.parametrize("file", SOURCES, ids=relative_name)
def test_imports_follow_the_arrow(file):
    part = part_of(file)
    assert part in RANK, f"{part!r} has no place in the import order: give it a rank."
    imported = {name.split(".")[1] for name in imports_of(file) if name.startswith("hf_vtc.")}
    # what else is taken from the package itself, such as its version, is no part of it
    too_high = {name for name in imported & RANK.keys() if RANK[name] > RANK[part]}
    assert not too_high, f"{part} must not import {too_high}."


@pytest.mark.parametrize("file", SOURCES, ids=relative_name)
def test_the_package_imports_neither_examples_nor_tests(file):
    assert not {name.split(".")[0] for name in imports_of(file)} & {"examples", "tests"}


@pytest.mark.parametrize("file", MODEL_SOURCES, ids=relative_name)
def test_models_import_siblings_by_one_dot(file):
    # the loader of remote code fails on `from ..x` and `from .a.b`, and overlooks `from . import a`
    for node in relative_imports_of(file):
        assert node.level == 1 and node.module and "." not in node.module, f"line {node.lineno}"
        assert (MODELS / f"{node.module}.py").is_file(), f"line {node.lineno}"


@pytest.mark.parametrize("file", MODEL_SOURCES, ids=relative_name)
def test_models_do_not_import_the_installed_package(file):
    # not even inside `try`: it would register the installed classes in the middle of a remote load
    assert not [name for name in foreign_imports_of(file) if name.split(".")[0] == "hf_vtc"]
    # a dotted name makes `find_spec` import the parent, which does the same
    calls = [node for node in ast.walk(tree_of(file)) if isinstance(node, ast.Call)]
    texts = [arg.value for call in calls for arg in call.args if isinstance(arg, ast.Constant)]
    assert not [text for text in texts if isinstance(text, str) and re.fullmatch(r"hf_vtc(\.\w+)+", text)]


@pytest.mark.parametrize("file", MODEL_SOURCES, ids=relative_name)
def test_models_need_no_other_third_party_package(file):
    foreign = {name.split(".")[0] for name in foreign_imports_of(file)} - sys.stdlib_module_names
    assert foreign <= THIRD_PARTY_OF_MODELS


@pytest.mark.parametrize("file", [f for f in MODEL_SOURCES if f.name.startswith("configuration_")], ids=relative_name)
def test_configurations_do_not_import_torch(file):
    assert "torch" not in {name.split(".")[0] for name in foreign_imports_of(file)}


@pytest.mark.parametrize("file", MODEL_SOURCES, ids=relative_name)
def test_models_have_no_text_that_the_loader_takes_for_an_import(file):
    # the loader searches the text with a regular expression, so it reads docstrings too
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            starts = [line.lstrip() for line in node.value.splitlines()]
            assert not [line for line in starts if line.startswith(("from .", "import ."))], f"line {node.lineno}"


def test_models_is_one_flat_folder_of_unique_names():
    assert not [folder for folder in MODELS.iterdir() if folder.is_dir() and folder.name != "__pycache__"]
    # the files end up flat beside weights, among files of other origin
    for file in MODEL_SOURCES:
        if file.name != "__init__.py":
            assert file.stem.endswith("_vtc") or file.stem.split("_")[0] in ROLES, file.name


def test_names_of_model_files_stand_for_one_file():
    others = {file.name for file in SOURCES if part_of(file) != "models"}
    assert not [file.name for file in MODEL_SOURCES if file.name != "__init__.py" and file.name in others]


def test_methods_do_not_import_each_other():
    methods = {file.stem.removeprefix("configuration_") for file in MODELS.glob("configuration_*.py")} - {"vtc"}
    assert methods
    for method in methods:
        for file in MODELS.glob(f"*_{method}.py"):
            for node in relative_imports_of(file):
                assert node.module.endswith(("_vtc", f"_{method}")), f"{file.name}, line {node.lineno}"
    for file in MODELS.glob("*_vtc.py"):
        for node in relative_imports_of(file):
            assert node.module.endswith("_vtc"), f"{file.name}, line {node.lineno}"


def test_every_method_is_a_pair_of_files_and_a_record():
    from hf_vtc.methods import RECORDS

    names = {file.stem.removeprefix("configuration_") for file in MODELS.glob("configuration_*.py")} - {"vtc"}
    assert {record.name for record in RECORDS.values()} == names
    for name in names:
        assert (MODELS / f"modeling_{name}.py").is_file()
        assert (PACKAGE / "methods" / f"{name}.py").is_file()


def strings_of(tree: ast.AST) -> list[str]:
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


OUTSIDE_OF_METHODS = [
    *(file for file in SOURCES if part_of(file) not in ("models", "methods")),
    *sorted((ROOT / "hf_vtc_cli").glob("*.py")),
    *sorted((ROOT / "examples").rglob("*.py")),
]


@pytest.mark.parametrize("file", OUTSIDE_OF_METHODS, ids=relative_name)
def test_only_records_tell_methods_apart(file):
    names = {file.stem.removeprefix("configuration_") for file in MODELS.glob("configuration_*.py")}
    tree = tree_of(file)
    # the beginning of a `model_type`, or a whole one, of which a comparison or a table would be made
    assert not {"vtc_", *(f"vtc_{name}" for name in names)} & set(strings_of(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            assert not names & set(strings_of(node)), f"line {node.lineno}"


@pytest.mark.parametrize("file", [f for f in SOURCES if f != PACKAGE / "methods" / "record.py"], ids=relative_name)
def test_auto_classes_are_registered_in_one_place(file):
    calls = [node for node in ast.walk(tree_of(file)) if isinstance(node, ast.Call)]
    methods = [call.func for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "register"]
    owners = {ast.unparse(method.value) for method in methods}
    # the delegating class of auto.py hands on what its callers register
    allowed = {"AutoModelForImageTextToText"} if part_of(file) == "auto" else set()
    assert {owner for owner in owners if owner.startswith("Auto")} <= allowed


@pytest.mark.parametrize("file", sorted((ROOT / "hf_vtc_cli").glob("*.py")), ids=relative_name)
def test_commands_load_the_package_inside_of_their_functions(file):
    # these are what they load then
    if file.name not in ("answers.py", "host_serving.py"):
        tops = [node for node in tree_of(file).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name for node in tops]
        assert not {name.split(".")[0] for name in names} & {"hf_vtc", "torch", "transformers", "answers"}


@pytest.mark.parametrize("file", SOURCES, ids=relative_name)
def test_no_print_outside_the_command_line(file):
    calls = [node for node in ast.walk(tree_of(file)) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
