"""The pages of README.md and docs: generated tables, links, navigation, and the site that is built of them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from docs_blocks import PAGES, is_path_of_repository

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

LINKED = [*PAGES, ROOT / "CHANGELOG.md", *sorted(ROOT.glob("model_cards/*/README.md"))]

# shares that the papers claim: ViCO, AVG-LLaVA, VisToG (two), LLaVolta
PAPERS = {"100", "85.3", "98.1", "27", "16"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def links_of(text: str) -> list[str]:
    """Targets of links and pictures outside of code."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"(`+).+?\1", "", text)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors_of(path: Path) -> set[str]:
    """What headings are called in links, on GitHub and on the site alike."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_lead_somewhere(page):
    broken = []
    for link in links_of(page.read_text(encoding="utf-8")):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or anchor and anchor not in anchors_of(target):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_are_there(page):
    text = page.read_text(encoding="utf-8")
    named = {word for span in re.findall(r"`([^`\n]+)`", text) for word in span.split("::")[0].split()}
    assert not [word for word in named if is_path_of_repository(word) and not (ROOT / word).exists()]


def test_tables_are_those_of_the_cards_and_of_estimate():
    import report_results

    for page in report_results.PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert "<!-- table: " in text
        assert report_results.with_tables(page, text) == text, "run python examples/report_results.py"


def test_shares_in_the_prose_are_those_of_the_cards_or_of_a_paper():
    """What is written by hand about measurements must not outlive them."""
    cards = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("model_cards/*/README.md"))
    measured = {float(share) for share in re.findall(r"(\d+(?:\.\d+)?) ?%", cards)}
    for name in ("README.md", "docs/choose.md", "docs/measured.md"):
        text = re.sub(r"<!-- table: .*?<!-- end of table -->", "", (ROOT / name).read_text(), flags=re.DOTALL)
        for share in re.findall(r"(\d+(?:\.\d+)?) %", text):
            places = len(share.partition(".")[2])
            assert share in PAPERS or any(f"{each:.{places}f}" == share for each in measured), f"{name}: {share} %"


def test_pictures_are_small():
    """They are in every clone."""
    pictures = [path for path in (ROOT / "docs" / "images").iterdir() if path.is_file()]
    assert pictures and not [path.name for path in pictures if path.stat().st_size > 200_000]


def test_troubleshooting_quotes_messages_that_exist():
    hooks = hooks_of_the_site()
    texts = [text for found in hooks.error_messages().values() for text in found]
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    _, *sections = page.split("\n| message begins or holds")
    assert len(sections) >= 5
    for section in sections:
        for row in re.findall(r"^\| (.+?) \| ", section, flags=re.MULTILINE):
            for quoted in (each[1].strip() for each in re.findall(r"(`+)(.+?)\1", row)):
                assert any(quoted in text for text in texts), f"no message holds {quoted!r}"


def hooks_of_the_site():
    pytest.importorskip("mkdocs", reason="needs the extra `docs`")
    sys.path.insert(0, str(ROOT / "docs"))
    import hooks

    return hooks


def test_every_page_is_in_the_navigation_and_the_other_way_round():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"^ *- (?:[^:#\n]+: )?([\w/]+\.md)$", text.split("\nnav:\n")[1], flags=re.MULTILINE)
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(pages)


def test_every_public_name_has_a_docstring():
    griffe = pytest.importorskip("griffe", reason="needs the extra `docs`")
    hooks = hooks_of_the_site()
    package = griffe.load("hf_vtc", search_paths=[ROOT])
    assert hooks.undocumented(package) == []
    names = {path for page in hooks.public_names(package).values() for path in page}
    assert {
        "hf_vtc.data.records.load_records",
        "hf_vtc.report.analytic.estimate",
        "hf_vtc.hub.push",
        "hf_vtc.lora.default_lora_config",
    } <= names


def build(root: Path, site: Path) -> subprocess.CompletedProcess:
    pytest.importorskip("mkdocs", reason="needs the extra `docs`")
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=root,
        # a notice of the theme about its own future
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_needs_no_network(tmp_path):
    result = build(ROOT, tmp_path / "site")
    assert result.returncode == 0 and not re.search("^WARNING", result.stderr, re.MULTILINE), result.stderr[-4000:]
    pages = {path: path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "quickstart.html", "404.html"} <= {path.name for path in pages}
    loaded = r"""<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=["']?(https?:)?//"""
    assert not [path.name for path, text in pages.items() if re.search(loaded, text)]
    assert "allows ... visual tokens for image" in pages[tmp_path / "site" / "troubleshooting.html"]


@pytest.mark.slow
def test_a_broken_link_a_page_outside_of_the_navigation_and_a_missing_docstring_fail(tmp_path):
    for name in ("docs", "hf_vtc", "hf_vtc_cli", "model_cards"):
        unused = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.so")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=unused)
    for name in ("mkdocs.yml", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "docs" / "extra.md").write_text("# Extra\n\n[broken](no_such.md), [anchor](limits.md#no-such)\n")
    plot = tmp_path / "hf_vtc" / "plot" / "__init__.py"
    source = plot.read_text().replace('"overlay", "stack"]', '"overlay", "stack", "bare"]')
    plot.write_text(source + "\n\ndef bare(): ...\n")
    result = build(tmp_path, tmp_path / "site")
    assert result.returncode == 1
    for warning in ("hf_vtc.plot.bare is public", "'no_such.md'", "no-such", "extra.md"):
        assert re.search(rf"(WARNING|- ).*{re.escape(warning)}", result.stderr), result.stderr[-4000:]
