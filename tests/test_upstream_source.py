"""The fetcher of transformers' own tests, on archives made here: no network."""

import io
import tarfile

import pytest
import upstream_source
from upstream_source import FILES, cache_folder, download, extract, fetch


def archive_with(path, entries):
    """A source distribution; an entry is its content, or the target of a symbolic link as `(target,)`."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in entries.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                member.type, member.linkname = tarfile.SYMTYPE, content[0]
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def complete(version="9.9.9", **others):
    return {f"transformers-{version}/tests/{name}": name.encode() for name in FILES} | others


def test_extract_takes_the_wanted_files_only(tmp_path):
    others = {
        "transformers-9.9.9/setup.py": b"",
        "transformers-9.9.9/tests/test_other.py": b"",
        "../outside.py": b"",
        "transformers-9.9.9/tests/../../../outside.py": b"",
        "/tmp/outside.py": b"",
    }
    archive = archive_with(tmp_path / "transformers-9.9.9.tar.gz", complete() | others)
    folder = tmp_path / "cache" / "folder"
    extract(archive, "9.9.9", folder)
    assert sorted(file.name for file in folder.iterdir()) == sorted(("__init__.py", *FILES))
    assert all((folder / name).read_bytes() == name.encode() for name in FILES)
    assert sorted(file.name for file in tmp_path.rglob("*.py")) == sorted(("__init__.py", *FILES))


@pytest.mark.parametrize("content", (("../../../secret",), None))
def test_extract_wants_plain_files(tmp_path, content):
    entries = complete()
    name = f"transformers-9.9.9/tests/{FILES[0]}"
    if content is None:
        del entries[name]
    else:
        entries[name] = content
    archive = archive_with(tmp_path / "transformers-9.9.9.tar.gz", entries)
    with pytest.raises(FileNotFoundError, match=FILES[0]):
        extract(archive, "9.9.9", tmp_path / "folder")


def test_fetch_downloads_once(tmp_path, monkeypatch):
    calls = []

    def fake_download(version, folder):
        calls.append(version)
        return archive_with(folder / f"transformers-{version}.tar.gz", complete(version))

    monkeypatch.setattr(upstream_source, "download", fake_download)
    folder = fetch("9.9.9", tmp_path / "cache")
    assert folder == tmp_path / "cache" / "transformers-9.9.9" == fetch("9.9.9", tmp_path / "cache")
    (folder / FILES[0]).unlink()
    fetch("9.9.9", tmp_path / "cache")
    fetch("9.9.8", tmp_path / "cache")
    assert calls == ["9.9.9", "9.9.9", "9.9.8"]
    # nothing but the two versions
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_fetch_leaves_nothing_behind_when_it_fails(tmp_path, monkeypatch):
    def empty(version, folder):
        return archive_with(folder / f"transformers-{version}.tar.gz", {})

    monkeypatch.setattr(upstream_source, "download", empty)
    with pytest.raises(FileNotFoundError):
        fetch("9.9.9", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_download_says_what_pip_said(tmp_path, monkeypatch):
    # no index at all, so that this test needs no network
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(FileNotFoundError, match="No matching distribution found for transformers==9.9.9"):
        download("9.9.9", tmp_path)


def test_load_or_skip_skips_with_the_reason(tmp_path, monkeypatch):
    def refuse(version, folder):
        raise FileNotFoundError("no network")

    monkeypatch.setattr(upstream_source, "download", refuse)
    monkeypatch.setenv("HF_VTC_UPSTREAM_TESTS", str(tmp_path))
    monkeypatch.setattr(upstream_source, "PACKAGE", "nothing_of_this_is_loaded")
    pytest.importorskip("parameterized")
    with pytest.raises(pytest.skip.Exception, match="no network"):
        upstream_source.load_or_skip("test_modeling_common")


def test_cache_folder_is_outside_of_the_repository(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_VTC_UPSTREAM_TESTS", raising=False)
    assert not cache_folder().is_relative_to(upstream_source.PICTURE.parents[2])
    monkeypatch.setenv("HF_VTC_UPSTREAM_TESTS", str(tmp_path))
    assert cache_folder() == tmp_path
