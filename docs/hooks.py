"""What the site shows beside the pages of this folder: the API from docstrings, the model cards, every error message.

mkdocs runs these functions while it builds. A public name without a docstring is a warning here, which `mkdocs build
--strict` takes for an error.
"""

import ast
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
CARDS = {path.parent.name: path for path in sorted((ROOT / "model_cards").glob("*/README.md"))}
# files outside of docs/ that are pages of the site, by the address that they have there
OUTSIDE = {
    "contributing.md": ROOT / "CONTRIBUTING.md",
    "changelog.md": ROOT / "CHANGELOG.md",
    **{f"cards/{name}.md": path for name, path in CARDS.items()},
}
MESSAGES_MARK = "<!-- every error message -->"
_WITHOUT_ALL = ("auto", "lora")
# models have no `__all__` either, since they are reached through the Auto classes; these methods are called by users
_MODEL_METHODS = ("forward", "generate", "count_visual_tokens", "get_image_features")
_ERRORS = re.compile(r"(Error|Exception|OpsUnavailable|UntrustedPlace)$")
_OF_ALL_METHODS = {
    "configuration_vtc": ("VtcConfig",),
    "generation_vtc": ("VtcGenerationMixin",),
    "processing_vtc": ("VtcProcessor",),
    "image_processing_vtc": ("VtcImageProcessor",),
    "head_vtc": ("VtcForConditionalGeneration", "VtcCausalLMOutputWithPast"),
}

log = logging.getLogger("mkdocs.hooks.hf_vtc")


# ---- the API


def public_modules(package: griffe.Module) -> dict[str, list[str]]:
    """Each module that says by `__all__` what is public, with these names."""
    found = {}
    for module in [package, *(each for each in package.modules.values() if not each.name.startswith("_"))]:
        names = [str(name) for name in module.exports or [] if str(name) in module.members]
        # `hf_vtc.files` serves the package itself
        if names and module.path != "hf_vtc.files":
            found[module.path] = names
    return found


def _functions_and_classes(module: griffe.Module) -> list[str]:
    """Of a module without `__all__`: what it defines under a name that is no private one."""
    members = (member for name, member in module.members.items() if not name.startswith("_"))
    return [member.name for member in members if not member.is_alias and (member.is_function or member.is_class)]


def undocumented(package: griffe.Module) -> list[str]:
    """Public names without a docstring, and public methods of public classes without one."""
    return [path for names in public_names(package).values() for path in names if not _documented(package, path)]


def public_names(package: griffe.Module) -> dict[str, list[str]]:
    """Page of the API -> what it must document, by its path."""
    pages: dict[str, list[str]] = {}
    modules = {path: names for path, names in public_modules(package).items() if path != "hf_vtc"}
    modules |= {f"hf_vtc.{name}": _functions_and_classes(package[name]) for name in _WITHOUT_ALL}
    for module, names in modules.items():
        pages[module] = []
        for name in names:
            member = _target(package[f"{module}.{name}".removeprefix("hf_vtc.")])
            # a module is described by its own docstring, a plain value by the comment beside it
            if member.is_class or member.is_function or member.is_module:
                pages[module].append(member.path)
            if member.is_class:
                pages[module] += [
                    method.path
                    for method in member.members.values()
                    if not method.is_alias and method.is_function and not method.name.startswith("_")
                ]
    return pages


def _target(member: griffe.Object | griffe.Alias) -> griffe.Object:
    return member.final_target if member.is_alias else member


def _documented(package: griffe.Module, path: str) -> bool:
    member = _target(package[path.removeprefix("hf_vtc.")])
    if member.docstring:
        return True
    # a method may do what the method of its base says
    parent = member.parent
    bases = parent.mro() if parent is not None and parent.is_class else []
    return any(member.name in base.members and base.members[member.name].docstring for base in bases)


def api_pages(package: griffe.Module) -> dict[str, str]:
    """Address of each page of the API -> its text."""
    pages = {
        "api/auto.md": "# hf_vtc\n\n" + package.docstring.value + "\n\n"
        "`AutoModelForVision2Seq` is the class of transformers of that name where there is one, and\n"
        "`AutoModelForImageTextToText` under that name where there is none.\n\n"
        "::: hf_vtc.auto.install_vision2seq\n\n::: hf_vtc.lora\n    options: {show_root_full_path: true}\n"
    }
    for module, names in public_modules(package).items():
        if module == "hf_vtc":
            continue
        own = package[module.removeprefix("hf_vtc.")]
        pages[f"api/{module.removeprefix('hf_vtc.')}.md"] = "\n\n".join(
            [f"# {module}", own.docstring.value if own.docstring else "", *(f"::: {module}.{name}" for name in names)]
        )
    pages["api/models.md"] = _models_page(package)
    return dict(sorted(pages.items()))


def _models_page(package: griffe.Module) -> str:
    models = package["models"]
    parts = ["# hf_vtc.models", "Reached through the Auto classes. What every method shares comes first."]
    for module, names in _OF_ALL_METHODS.items():
        parts += [_class_entry(f"hf_vtc.models.{module}.{name}") for name in names]
    for name in sorted(models.modules):
        if name.startswith("configuration_") and name != "configuration_vtc":
            for path in (name, name.replace("configuration", "modeling")):
                module = models.modules[path]
                names = _functions_and_classes(module)
                public = (each for each in names if each.endswith(("Config", "ForConditionalGeneration")))
                parts += [_class_entry(f"{module.path}.{each}") for each in public]
    return "\n\n".join(parts)


def _class_entry(path: str) -> str:
    return f"::: {path}\n    options: {{members: [{', '.join(_MODEL_METHODS)}]}}"


# ---- every error message


def error_messages() -> dict[str, list[str]]:
    """File -> the texts of the errors that it raises; `...` stands for what is filled in."""
    found = {}
    for folder in ("hf_vtc", "hf_vtc_cli"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            texts = list(dict.fromkeys(_messages_of(ast.parse(path.read_text(encoding="utf-8")))))
            if texts:
                found[path.relative_to(ROOT).as_posix()] = texts
    return found


def _messages_of(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        # also where an error is made in one function and raised in another
        if isinstance(node, ast.Call) and node.args and _ERRORS.search(ast.unparse(node.func)):
            text = " ".join(_text_of(node.args[0]).split())
            # a message that is made elsewhere, or by the host
            if len(re.findall(r"[a-zA-Z]{2,}", text)) > 2:
                yield text


def _text_of(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text_of(node.left) + _text_of(node.right)
    return "..."


def messages_as_markdown() -> str:
    parts = []
    for path, texts in error_messages().items():
        listed = "\n".join(f"    - {_escaped(text)}" for text in texts)
        parts.append(f'??? note "`{path}`: {len(texts)}"\n\n{listed}')
    return "\n\n".join(parts)


def _escaped(text: str) -> str:
    return re.sub(r"([*_\[\]<>|\\])", r"\\\1", text.replace("`", "'"))


# ---- what mkdocs calls


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    package = griffe.load("hf_vtc", search_paths=[ROOT])
    for path in undocumented(package):
        log.warning("%s is public and has no docstring", path)
    config.extra["api_pages"] = api_pages(package)
    config.nav += [
        {"API": list(config.extra["api_pages"])},
        {"Model cards": [f"cards/{name}.md" for name in CARDS]},
        {"Project": ["contributing.md", "changelog.md"]},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {**config.extra["api_pages"], **{page: _without_header(path) for page, path in OUTSIDE.items()}}
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    # of the repository: where the text stands there, and so where its links start
    source = OUTSIDE.get(here, ROOT / "docs" / here)
    if MESSAGES_MARK in markdown:
        markdown = markdown.replace(MESSAGES_MARK, messages_as_markdown())
    return re.sub(r"(\]\()([^)#\s]+)", lambda found: found[1] + _address(found[2], source, here), markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    # types stand in backticks in docstrings, and would show them
    return re.sub(r"<code>(`[^<]*)</code>", lambda found: f"<code>{re.sub('[`*]', '', found[1])}</code>", html)


def _address(link: str, source: Path, here: str) -> str:
    """The address on the site of a file that a text of the repository links to."""
    if ":" in link:
        return link
    target = (source.parent / link).resolve()
    pages = {path: page for page, path in OUTSIDE.items()}
    if target in pages:
        page = pages[target]
    elif target.is_relative_to(ROOT / "docs"):
        page = target.relative_to(ROOT / "docs").as_posix()
    else:
        return link
    return "../" * here.count("/") + page


def _without_header(path: Path) -> str:
    """A text without the metadata that a model card begins with."""
    return re.sub(r"\A---\n.*?\n---\n", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
