"""`hf_vtc.hub.push` against an HTTP endpoint that stores what it is sent, and what strangers load from there."""

import json
from pathlib import Path

import factories
import pytest
import torch
from hub_server import TOKEN, HubServer
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from PIL import Image
from safetensors.torch import load_file

from hf_vtc import hub

pytestmark = [pytest.mark.window, pytest.mark.slow]

PUSH = """
import json
import sys
import factories
import torch
from hf_vtc import hub

urls = {}
for method in factories.METHODS:
    model, processor = factories.tiny_model(method), factories.tiny_processor(method)
    first = hub.push(model, processor, f"someone/{method}-tiny", check=False, license="mit", max_shard_size="100KB")
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    second = hub.push(model, processor, f"someone/{method}-tiny", check=False, commit_message="Louder")
    urls[method] = first, second
branch = hub.push(model, processor, "bare", private=True, revision="candidate", check=False)
print(json.dumps([urls, branch]))
"""

# what a stranger does: no hf_vtc, code from the repository, pinned to a commit
LOAD = """
import json
import sys
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

repositories, outputs = json.loads(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
results = {}
for name, revision in repositories:
    options = {"revision": revision, "trust_remote_code": True}
    processor = AutoProcessor.from_pretrained(name, **options)
    model = AutoModelForImageTextToText.from_pretrained(name, **options)
    for part in (processor, model, model.config):
        assert type(part).__module__.startswith("transformers_modules."), type(part)
    pixels = bytes(index * index // 97 % 256 for index in range(40 * 60 * 3))
    text = f"{processor.image_token} What is shown?"
    inputs = processor(images=[Image.frombytes("RGB", (60, 40), pixels)], text=[text], return_tensors="pt")
    with torch.no_grad():
        results[f"{name} {revision}"] = model(**inputs, vtc_budget="auto").logits.contiguous()
assert sys.modules["hf_vtc"] is None
save_file(results, outputs)
"""


@pytest.fixture(scope="module")
def server():
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="module")
def online(run_python, server, tmp_path_factory):
    """`run_python` in a process whose Hub is the server of this test."""

    def run(script, *arguments, token=TOKEN, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_ENDPOINT", server.url)
            patch.setenv("HF_HUB_OFFLINE", "0")
            patch.setenv("HF_HUB_DISABLE_XET", "1")
            patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
            patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
            patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf_home")))
            patch.setenv("no_proxy", "127.0.0.1")
            for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN"):
                patch.delenv(name, raising=False)
            if token is not None:
                patch.setenv("HF_TOKEN", token)
            return run_python(script, *arguments, **options)

    return run


@pytest.fixture(scope="module")
def pushed(online):
    """Addresses of the two commits of each method, and of the one on a branch."""
    return json.loads(online(PUSH, installed=True).splitlines()[-1])


def commit_of(url: str) -> str:
    return url.rpartition("/")[2]


def logits_of(method: str, factor: float) -> torch.Tensor:
    """What `LOAD` computes, by the installed classes; `factor` scales the head."""
    model, processor = factories.tiny_model(method), factories.tiny_processor(method)
    pixels = bytes(index * index // 97 % 256 for index in range(40 * 60 * 3))
    text = f"{processor.image_token} What is shown?"
    inputs = processor(images=[Image.frombytes("RGB", (60, 40), pixels)], text=[text], return_tensors="pt")
    with torch.no_grad():
        model.lm_head.weight.mul_(factor)
        return model(**inputs, vtc_budget="auto").logits


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_each_push_is_one_commit(server, pushed):
    urls, _ = pushed
    assert set(urls) == set(factories.METHODS)
    for method, (first, second) in urls.items():
        repository = server.repositories[f"someone/{method}-tiny"]
        assert repository.messages == [("main", "Upload model, processor and code"), ("main", "Louder")]
        assert list(repository.commits)[1:] == [commit_of(first), commit_of(second)]
        assert first.startswith(f"{server.url}/someone/{method}-tiny/tree/")
        assert not repository.private


def test_what_was_uploaded_is_whole(server, pushed, method):
    first, second = map(commit_of, pushed[0][method])
    commits = server.repositories[f"someone/{method}-tiny"].commits
    index = json.loads(commits[first]["model.safetensors.index.json"])
    assert set(index["weight_map"].values()) == {name for name in commits[first] if name.endswith(".safetensors")}
    # the shards of the first upload are gone, and nothing else is
    assert {name for name in commits[second] if "safetensors" in name} == {"model.safetensors"}
    assert {".gitattributes", "README.md", "config.json", f"modeling_{method}.py"} <= commits[second].keys()
    assert "license: mit" in commits[first]["README.md"].decode()
    assert f'path = "someone/{method}-tiny"' in commits[second]["README.md"].decode()


def test_a_bare_name_goes_to_a_branch_of_a_private_repository(server, pushed):
    repository = server.repositories["tester/bare"]
    assert repository.private
    assert repository.messages == [("candidate", "Upload model, processor and code")]
    assert repository.branches["candidate"] == commit_of(pushed[1])
    assert "config.json" not in repository.commits[repository.branches["main"]]


def test_strangers_load_each_commit_without_the_package(server, pushed, online, tmp_path, one_thread):
    wanted, expected = [], {}
    for method, (first, second) in pushed[0].items():
        name = f"someone/{method}-tiny"
        wanted += [(name, commit_of(first)), (name, "main")]
        # a commit stays what it was, whatever came later
        expected |= {f"{name} {commit_of(first)}": (method, 1), f"{name} main": (method, 2)}
        assert server.repositories[name].branches["main"] == commit_of(second)
    online(LOAD, json.dumps(wanted), tmp_path / "logits.safetensors", token=None)
    logits = load_file(tmp_path / "logits.safetensors")
    for name, (method, factor) in expected.items():
        assert torch.equal(logits[name], logits_of(method, factor)), name
    assert not server.unknown


@pytest.fixture
def here(server, monkeypatch):
    """Lets this process talk to the server: its own settings were read when huggingface_hub was imported."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub, "HfApi", lambda token: HfApi(server.url, token=token))
    return server


def test_a_private_repository_is_for_its_owner(here, pushed, tmp_path):
    file = {"repo_id": "tester/bare", "filename": "config.json", "revision": "candidate", "cache_dir": tmp_path}
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download(**file, endpoint=here.url, token=False)
    content = json.loads(Path(hf_hub_download(**file, endpoint=here.url, token=TOKEN)).read_text())
    assert content["model_type"] == "vtc_llavolta"


@pytest.mark.parametrize(
    "fault, status",
    [
        pytest.param(("PUT", "^/lfs/"), 403, id="weights"),
        pytest.param(("POST", "/commit/main$"), 412, id="commit"),
    ],
)
def test_a_push_that_fails_leaves_the_branch_as_it_was(here, pushed, monkeypatch, fault, status):
    repository = here.repositories["someone/vico-tiny"]
    before = dict(repository.branches), list(repository.commits)
    monkeypatch.setattr(here, "faults", [(*fault, status)])
    # weights that the server does not know yet
    model, processor = factories.tiny_model("vico", seed=status), factories.tiny_processor("vico")
    with pytest.raises((HfHubHTTPError, RuntimeError)) as error:
        hub.push(model, processor, "someone/vico-tiny", token=TOKEN, check=False)
    cause = error.value if isinstance(error.value, HfHubHTTPError) else error.value.__cause__
    assert cause.response.status_code == status
    assert (dict(repository.branches), list(repository.commits)) == before


def test_a_push_with_a_wrong_token_makes_nothing(here):
    model, processor = factories.tiny_model("vico"), factories.tiny_processor("vico")
    with pytest.raises(HfHubHTTPError) as error:
        hub.push(model, processor, "someone/new", token="hf_of_nobody", check=False)
    assert error.value.response.status_code == 401
    assert "someone/new" not in here.repositories
