"""`hf_vtc.hub`: folders that carry their code, the proof that they work, and the commit that publishes them.

One file, since its tests share exported folders and one imitation of the Hub.
"""

import json
import re
from pathlib import Path

import factories
import pytest
import torch
from huggingface_hub import CommitOperationAdd, ModelCard, ModelInfo, RepoUrl
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_vtc import hub
from hf_vtc.auto import REMOTE_CODE_FROM_FOLDER

needs_remote_code_from_folder = pytest.mark.skipif(
    not REMOTE_CODE_FROM_FOLDER, reason="remote code from a local folder needs transformers >= 5.11"
)

CARD = """---
license: mit
base_model: somebody/something
tags:
- mine
---

# Ours

Kept as it is: ünïcode, `code` and all.
"""


@pytest.fixture
def parts(request):
    """Model and processor: of every method for a test that asks for `method`, else of one."""
    method = request.getfixturevalue("method") if "method" in request.fixturenames else "vico"
    return factories.tiny_model(method), factories.tiny_processor(method)


@pytest.fixture
def exported(parts, tmp_path):
    return hub.export(*parts, tmp_path / "exported", check=False)


@pytest.mark.window
def test_export_writes_a_complete_folder(method, parts, tmp_path):
    folder = hub.export(*parts, tmp_path / "new" / "tiny", check=False)
    assert folder == tmp_path / "new" / "tiny"
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "tokenizer_config.json"} <= names
    assert {f"configuration_{method}.py", f"modeling_{method}.py", "processing_vtc.py"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForVision2Seq"} <= set(auto_map)
    # nothing but the folder is left, and the folder does not say where it was made
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tiny"]
    for file in folder.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


@pytest.mark.window
def test_export_carries_every_file_that_its_code_imports(exported):
    for file in exported.glob("*.py"):
        for name in re.findall(r"^\s*from \.(\w+) import", file.read_text(encoding="utf-8"), flags=re.MULTILINE):
            assert (exported / f"{name}.py").is_file(), f"{file.name} imports {name}"


def assert_proven(model, processor, folder: Path) -> None:
    """Export with its proof, which would raise, and read the weights back."""
    weights = AutoModelForImageTextToText.from_pretrained(hub.export(model, processor, folder)).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@needs_remote_code_from_folder
def test_export_proves_what_it_writes(parts, tmp_path):
    assert_proven(*parts, tmp_path / "tiny")


@pytest.mark.slow
@needs_remote_code_from_folder
def test_export_proves_every_method(method, parts, tmp_path):
    """In a process each; that remote code of all methods computes the same, `test_remote.py` shows in fewer."""
    assert_proven(*parts, tmp_path / "tiny")


@pytest.mark.window
def test_export_takes_a_path(method, exported, tmp_path):
    (exported / "README.md").write_text(CARD, encoding="utf-8")
    folder = hub.export(exported, tmp_path / "copy", check=False)
    assert "Kept as it is: ünïcode, `code` and all." in (folder / "README.md").read_text(encoding="utf-8")
    original = AutoModelForImageTextToText.from_pretrained(exported).state_dict()
    copied = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, copied[name]) for name, value in original.items())
    assert (folder / f"modeling_{method}.py").is_file()
    assert AutoProcessor.from_pretrained(folder).image_token


def test_export_replaces_a_model_folder_only_if_told(parts, exported):
    stale = exported / "model-00001-of-00002.safetensors"
    stale.write_text("from the last time")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        hub.export(*parts, exported, check=False)
    assert stale.is_file()
    hub.export(*parts, exported, check=False, overwrite=True)
    assert not stale.exists()
    assert (exported / "config.json").is_file()


def test_export_onto_its_own_source(exported):
    before = AutoModelForImageTextToText.from_pretrained(exported).state_dict()
    before = {name: value.clone() for name, value in before.items()}
    hub.export(exported, exported, check=False, overwrite=True)
    after = AutoModelForImageTextToText.from_pretrained(exported).state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_export_does_not_replace_a_folder_of_other_things(parts, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(FileExistsError, match="config.json"):
        hub.export(*parts, tmp_path / "photos", check=False, overwrite=True)
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"


@pytest.mark.parametrize("there_before", [False, True])
def test_export_that_fails_changes_nothing(parts, tmp_path, monkeypatch, there_before):
    model, processor = parts
    folder = tmp_path / "tiny"
    if there_before:
        hub.export(model, processor, folder, check=False)
        (folder / "README.md").write_text("before")

    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(type(processor), "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        hub.export(model, processor, folder, check=False, overwrite=True)
    assert folder.exists() == there_before
    assert not there_before or (folder / "README.md").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"] * there_before


def test_export_refuses_what_is_no_model_of_ours(parts, tmp_path):
    model, processor = parts
    with pytest.raises(ValueError, match="merge_and_unload"):
        hub.export(torch.nn.Linear(1, 1), processor, tmp_path / "x")
    with pytest.raises(ValueError, match="from_base"):
        hub.export(model.get_decoder(), processor, tmp_path / "x")
    with pytest.raises(ValueError, match="processor"):
        hub.export(model, None, tmp_path / "x")
    with pytest.raises(ValueError, match="destination"):
        hub.export(model, processor)
    assert not (tmp_path / "x").exists()


def test_card_is_written_with_the_metadata_of_the_hub(method, exported):
    card = ModelCard.load(exported / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-text-to-text"
    assert {"vtc", "vision-token-compression", "custom_code", method} <= set(card.data.tags)
    assert f"vtc_{method}" in card.text


@pytest.mark.parametrize("form", ["text", "path", "card"])
def test_card_that_is_given_is_kept(parts, tmp_path, form):
    (tmp_path / "card.md").write_text(CARD, encoding="utf-8")
    card = {"text": CARD, "path": tmp_path / "card.md", "card": ModelCard(CARD)}[form]
    folder = hub.export(*parts, tmp_path / "tiny", card=card, check=False)
    written = ModelCard.load(folder / "README.md")
    assert written.text == ModelCard(CARD).text
    assert written.data.license == "mit"
    assert written.data.base_model == "somebody/something"
    assert written.data.pipeline_tag == "image-text-to-text"
    assert written.data.tags[0] == "mine" and "custom_code" in written.data.tags


@pytest.mark.parametrize("given", [False, True])
def test_card_says_where_the_weights_come_from(parts, tmp_path, given):
    card = CARD if given else None
    hub.export(*parts, tmp_path / "tiny", card=card, base_model="them/their-7b", license="llama2", check=False)
    written = ModelCard.load(tmp_path / "tiny" / "README.md")
    assert written.data.base_model == "them/their-7b" and written.data.license == "llama2"
    if not given:
        assert "Weights: `llama2`" in written.text and "Apache-2.0" in written.text
        assert "(https://huggingface.co/them/their-7b)" in written.text


def test_card_that_knows_no_licence_says_so(exported):
    card = ModelCard.load(exported / "README.md")
    assert card.data.license is None and card.data.base_model is None
    assert "Weights: not stated here" in card.text


def test_card_has_the_token_table_of_estimate(method, parts, exported):
    from hf_vtc.report import default_budget, estimate

    model, processor = parts
    text = ModelCard.load(exported / "README.md").text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| \d+ x \d+ ", line)]
    assert len(rows) == 3
    for size, reserved, kept, *_, speedup in rows:
        image_size = tuple(map(int, size.split(" x ")))
        costs = estimate(
            model.config,
            image_size,
            vtc_budget=default_budget(model.config),
            image_processor=processor.image_processor,
        )
        assert (reserved, kept) == (f"{costs.num_reserved:,}", f"{costs.num_kept:,}")
        assert speedup == f"{costs.ttft_speedup:.2f}"
    # the prompt that the table is about has as many placeholders
    counted = processor._get_num_multimodal_tokens(image_sizes=[image_size])["num_image_tokens"]
    assert counted == [costs.num_reserved]


@pytest.mark.window
def test_export_in_shards(parts, tmp_path):
    model, _ = parts
    folder = hub.export(*parts, tmp_path / "tiny", max_shard_size="100KB", check=False)
    assert not (folder / "model.safetensors").exists()
    shards = sorted(folder.glob("model-*.safetensors"))
    largest = max(tensor.nbytes for tensor in model.state_dict().values())
    assert len(shards) > 2 and all(file.stat().st_size < max(largest, 10**5) + 10**4 for file in shards)
    weights = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_export_runs_no_code_of_a_pickled_checkpoint(exported, tmp_path):
    (exported / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Trap(tmp_path / "sprung")}, exported / "pytorch_model.bin")
    with pytest.raises(Exception, match="weights_only|Weights only"):
        hub.export(exported, tmp_path / "copy", check=False)
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "copy").exists()


@needs_remote_code_from_folder
def test_check_finds_code_that_computes_something_else(exported):
    reference = json.loads((exported / "config.json").read_text())["auto_map"]["AutoModelForImageTextToText"]
    module, head = reference.split(".")
    with (exported / f"{module}.py").open("a", encoding="utf-8") as file:
        file.write(
            f"\n\n_forward = {head}.forward\n\n\n"
            "def _changed(self, *args, **kwargs):\n"
            "    output = _forward(self, *args, **kwargs)\n"
            "    output.logits = output.logits + 1\n"
            "    return output\n\n\n"
            f"{head}.forward = _changed\n"
        )
    with pytest.raises(RuntimeError, match="different 'logits of budget auto'"):
        hub.check(exported)


@needs_remote_code_from_folder
def test_check_shows_why_the_clean_process_failed(exported):
    (exported / "packing_vtc.py").write_text("import a_package_that_nobody_has\n")
    with pytest.raises(RuntimeError, match="a_package_that_nobody_has"):
        hub.check(exported)


@needs_remote_code_from_folder
@pytest.mark.parametrize("key", ["AutoModel", "AutoModelForVision2Seq"])
def test_check_names_a_missing_auto_class(exported, key):
    values = json.loads((exported / "config.json").read_text())
    del values["auto_map"][key]
    (exported / "config.json").write_text(json.dumps(values))
    with pytest.raises(RuntimeError, match=f"lacks .*{key}"):
        hub.check(exported)


@needs_remote_code_from_folder
def test_check_names_a_missing_file(method, exported):
    (exported / f"modeling_{method}.py").unlink()
    with pytest.raises(RuntimeError, match=f"modeling_{method}.py"):
        hub.check(exported)


@needs_remote_code_from_folder
def test_check_finds_missing_weights(exported):
    from safetensors.torch import load_file, save_file

    weights = load_file(exported / "model.safetensors")
    dropped = sorted(weights)[-1]
    del weights[dropped]
    save_file(weights, exported / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=re.escape(dropped)):
        hub.check(exported)


@pytest.mark.skipif(REMOTE_CODE_FROM_FOLDER, reason="this transformers loads remote code from a local folder")
def test_check_says_which_transformers_it_needs(exported):
    with pytest.raises(RuntimeError, match="5.11"):
        hub.check(exported)


class FakeHub:
    """Stands in for the network side of `HfApi` and remembers what it was asked.

    Args:
        files (`tuple[str, ...]`): what the repository holds already.
        private (`bool`): visibility of the repository.
    """

    def __init__(self, monkeypatch, files=(".gitattributes",), private=False):
        self.calls = []
        self.files, self.private = files, private
        self.added, self.deleted, self.card = {}, set(), None
        for name in ("whoami", "create_repo", "model_info", "create_branch", "create_commit"):
            monkeypatch.setattr(hub.HfApi, name, self.method(name))

    def method(self, name):
        def call(api, *args, **kwargs):
            self.calls.append((name, args, kwargs, api.token))
            return getattr(self, name)(*args, **kwargs)

        return call

    def named(self, name):
        """Arguments of the calls of one method."""
        return [(args, kwargs) for called, args, kwargs, _ in self.calls if called == name]

    def whoami(self):
        return {"name": "me", "orgs": [{"name": "someone", "roleInOrg": "write"}]}

    def create_repo(self, repo_id, **kwargs):
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_branch(self, repo_id, **kwargs):
        return None

    def model_info(self, repo_id, revision=None):
        siblings = [{"rfilename": name} for name in self.files]
        return ModelInfo(id=repo_id, sha=f"head of {revision}", private=self.private, siblings=siblings)

    def create_commit(self, repo_id, *, operations, **kwargs):
        operations = list(operations)
        added = [operation for operation in operations if isinstance(operation, CommitOperationAdd)]
        # read now: the folder is temporary
        files = {operation.path_in_repo: Path(operation.path_or_fileobj) for operation in added}
        self.added = {name: path.stat().st_size for name, path in files.items()}
        self.card = files["README.md"].read_text(encoding="utf-8")
        self.deleted = {operation.path_in_repo for operation in operations} - self.added.keys()
        return type("Commit", (), {"oid": "abc123"})


def test_push_makes_one_commit(method, parts, monkeypatch):
    fake = FakeHub(monkeypatch, private=True)
    url = hub.push(*parts, "someone/tiny", private=True, commit_message="First", token="secret", check=False)
    assert url == "https://huggingface.co/someone/tiny/tree/abc123"
    assert [name for name, *_ in fake.calls] == ["whoami", "model_info", "create_repo", "model_info", "create_commit"]
    assert {token for *_, token in fake.calls} == {"secret"}
    ((created, create_options),) = fake.named("create_repo")
    assert created == ("someone/tiny",) and create_options["private"] is True and create_options["exist_ok"] is True
    (((repo_id,), options),) = fake.named("create_commit")
    assert repo_id == "someone/tiny" and options["commit_message"] == "First"
    # what was looked at is what is replaced, or nothing is
    assert options["parent_commit"] == "head of None"
    assert {"config.json", "model.safetensors", "README.md", f"modeling_{method}.py"} <= fake.added.keys()
    assert all(fake.added.values()) and not fake.deleted


def test_push_to_a_branch_from_a_path(exported, monkeypatch):
    fake = FakeHub(monkeypatch)
    hub.push(exported, "someone/tiny", revision="candidate", check=False)
    assert fake.named("create_branch") == [(("someone/tiny",), {"branch": "candidate", "exist_ok": True})]
    ((_, options),) = fake.named("create_commit")
    assert options["revision"] == "candidate" and options["parent_commit"] == "head of candidate"


def test_push_asks_whose_a_bare_name_is(parts, monkeypatch):
    fake = FakeHub(monkeypatch)
    hub.push(*parts, "tiny", check=False)
    assert fake.named("create_commit")[0][0] == ("me/tiny",)
    assert 'path = "me/tiny"' in fake.card


def test_push_removes_what_loading_would_read_beside_the_new_files(parts, monkeypatch):
    kept = ("results/model.safetensors", "plot.png", "LICENSE", "model.fp16.safetensors", "notes.json")
    stale = (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.json",
        "vocab.json",
    )
    fake = FakeHub(monkeypatch, files=(*kept, *stale, "config.json", "model.safetensors"))
    hub.push(*parts, "someone/tiny", check=False)
    assert fake.deleted == set(stale)


def test_push_replaces_a_single_file_by_shards(parts, monkeypatch):
    fake = FakeHub(monkeypatch, files=("model.safetensors",))
    hub.push(*parts, "someone/tiny", max_shard_size="100KB", check=False)
    # loading prefers the single file, which would be the old weights
    assert fake.deleted == {"model.safetensors"}
    assert "model.safetensors.index.json" in fake.added
    assert len([name for name in fake.added if name.startswith("model-0")]) > 2


def test_push_of_what_is_private_spares_a_public_repository(parts, monkeypatch):
    fake = FakeHub(monkeypatch, private=False)
    with pytest.raises(ValueError, match="already and public"):
        hub.push(*parts, "someone/tiny", private=True, revision="hidden", check=False)
    assert not fake.named("create_commit") and not fake.named("create_branch")


@pytest.mark.parametrize("name", ["a/b/c", "", "/tiny", "someone/"])
def test_push_refuses_what_is_no_name_before_it_does_anything(parts, monkeypatch, name):
    fake = FakeHub(monkeypatch)
    monkeypatch.setattr(hub, "export", lambda *args, **kwargs: pytest.fail("exported"))
    with pytest.raises(ValueError, match="owner/name"):
        hub.push(*parts, name)
    assert fake.calls == []


@needs_remote_code_from_folder
def test_push_uploads_nothing_that_fails_the_check(parts, monkeypatch):
    fake = FakeHub(monkeypatch)

    def fail(folder):
        raise RuntimeError("differs")

    monkeypatch.setattr(hub.proof, "check", fail)
    with pytest.raises(RuntimeError, match="differs"):
        hub.push(*parts, "someone/tiny")
    # it has asked whether it may, and changed nothing
    assert [name for name, *_ in fake.calls] == ["whoami", "model_info"]


class Refuses(FakeHub):
    """A Hub that says who asks, and lets tests fail that get any further."""

    def __init__(self, monkeypatch, user, **options):
        self.user = user
        super().__init__(monkeypatch, **options)
        monkeypatch.setattr(hub.source.AutoModelForImageTextToText, "from_pretrained", self.too_late)
        monkeypatch.setattr(hub, "export", self.too_late)

    def whoami(self):
        return self.user

    def too_late(self, *args, **kwargs):
        pytest.fail("loaded or proven before it was known that nothing can be uploaded")

    create_repo = create_branch = create_commit = too_late


READER = {"name": "me", "orgs": [], "auth": {"accessToken": {"role": "read"}}}


def fine_grained(*scopes):
    """Who asks with a token of these (kind, name, permission), as the Hub describes it."""
    scoped = [
        {"entity": {"_id": "1", "type": kind, "name": name}, "permissions": ["repo.content.read", permission]}
        for kind, name, permission in scopes
    ]
    token = {"role": "fineGrained", "fineGrained": {"global": ["discussion.write"], "scoped": scoped}}
    return {"name": "me", "orgs": [{"name": "us", "roleInOrg": "write"}], "auth": {"accessToken": token}}


@pytest.mark.parametrize(
    "user, options, message",
    [
        (READER, {}, "of me is for reading"),
        (
            {"name": "somebody", "orgs": []},
            {},
            "of somebody, who may not write to 'me'. Give a repository of somebody",
        ),
        ({"name": "x", "orgs": [{"name": "me", "roleInOrg": "read"}]}, {}, "who may not write to 'me'"),
        ({"name": "me", "orgs": []}, {"private": True}, "already and public"),
        (fine_grained(), {}, "may write to no repository, but not to me/tiny. Let it write to repositories of me"),
        (fine_grained(("user", "me", "inference.serverless.write")), {}, "may write to no repository"),
        (
            fine_grained(("org", "us", "repo.write"), ("model", "me/other", "repo.write")),
            {},
            "may write to us, me/other",
        ),
    ],
)
def test_push_finds_out_before_it_loads_that_it_cannot_upload(exported, monkeypatch, user, options, message):
    Refuses(monkeypatch, user)
    with pytest.raises(ValueError, match=message):
        hub.push(exported, "me/tiny", **options)


@pytest.mark.parametrize(
    "scope",
    [("user", "me", "repo.write"), ("model", "me/tiny", "repo.content.write"), ("model", None, "repo.write")],
)
def test_a_fine_grained_token_may_be_enough(monkeypatch, scope):
    fake = FakeHub(monkeypatch)
    monkeypatch.setattr(fake, "whoami", lambda: fine_grained(scope))
    hub.require_writable(hub.HfApi(), "me/tiny", None)
    assert [name for name, *_ in fake.calls] == ["whoami", "model_info"]


def test_push_leaves_no_temporary_folder(parts, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    FakeHub(monkeypatch)
    hub.push(*parts, "someone/tiny", check=False)
    assert not list(tmp_path.iterdir())
