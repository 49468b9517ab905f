"""One folder, one commit: what is on the Hub is the whole of the new model or the whole of the old one."""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.errors import RepositoryNotFoundError

# What loading reads beside the new files, if an earlier upload left it there: other shards, an adapter that was
# merged since, a tokenizer of another kind.
_READ_BY_LOADERS = (
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model-?????-of-?????.bin",
    "pytorch_model.bin.index.json",
    "adapter_config.json",
    "adapter_model.*",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.*",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
)


def full_name(api: HfApi, repo_id: str) -> str:
    """`repo_id` with its owner: a bare name belongs to who holds the token.

    Raises:
        ValueError: it is no name of a repository.
        huggingface_hub.errors.LocalTokenNotFoundError, HfHubHTTPError: there is no token, or the Hub refuses it.
    """
    parts = repo_id.split("/")
    if len(parts) > 2 or not all(parts):
        raise ValueError(f"`repo_id` must be 'name' or 'owner/name', got {repo_id!r}.")
    return repo_id if len(parts) == 2 else f"{api.whoami()['name']}/{repo_id}"


def require_writable(api: HfApi, repo_id: str, private: bool | None) -> None:
    """Find out, without changing anything, that an upload would be refused.

    Args:
        api (`HfApi`): with the token to use.
        repo_id (`str`): `"owner/name"`.
        private (`bool`, *optional*): as in `upload`.

    Raises:
        ValueError: the token is for reading, or for writing elsewhere, the owner is somebody else, or `private` is
            True and the repository is public.
        huggingface_hub.errors.LocalTokenNotFoundError, HfHubHTTPError: there is no token, or the Hub refuses it.
    """
    user, owner = api.whoami(), repo_id.split("/")[0]
    token = user.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise ValueError(
            f"The access token of {user['name']} is for reading, so that nothing can be uploaded to {repo_id}. Make "
            "one that writes: https://huggingface.co/settings/tokens"
        )
    owners = [user["name"], *(org["name"] for org in user.get("orgs", ()) if org.get("roleInOrg") != "read")]
    if owner not in owners:
        raise ValueError(
            f"The access token is that of {user['name']}, who may not write to {owner!r}. Give a repository of "
            f"{', '.join(owners)}, or another token."
        )
    _require_scope(token, user["name"], owner, repo_id)
    try:
        _require_private(api.model_info(repo_id), private)
    except RepositoryNotFoundError:
        # it will be made
        return


def _require_scope(token: dict[str, Any], user: str, owner: str, repo_id: str) -> None:
    """Raise for a fine-grained token that may write to other places alone.

    Its scopes are a user, an organisation or one repository each, with permissions such as `repo.write`.
    """
    scopes = (token.get("fineGrained") or {}).get("scoped")
    if token.get("role") != "fineGrained" or scopes is None:
        return
    writable = [
        scope.get("entity", {}).get("name")
        for scope in scopes
        if not {"repo.write", "repo.content.write"}.isdisjoint(scope.get("permissions", ()))
    ]
    # where the Hub does not say which repository, the upload will tell
    if {owner, repo_id, None}.isdisjoint(writable):
        raise ValueError(
            f"The access token of {user} is fine-grained and may write to {', '.join(writable) or 'no repository'}, "
            f"but not to {repo_id}. Let it write to repositories of {owner}: https://huggingface.co/settings/tokens"
        )


def _require_private(found: ModelInfo, private: bool | None) -> None:
    if private and not found.private:
        raise ValueError(
            f"`private=True`, but {found.id} is there already and public. Make it private in its settings on the Hub, "
            "or push to another name."
        )


def upload(
    api: HfApi, folder: Path, repo_id: str, private: bool | None, revision: str | None, commit_message: str
) -> str:
    """Create the repository and the branch if needed, and commit a folder to it.

    Args:
        api (`HfApi`): with the token to use.
        folder (`Path`): what the branch is to hold.
        repo_id (`str`): `"owner/name"`.
        private (`bool`, *optional*): visibility of a new repository. True also refuses to write to a public one.
        revision (`str`, *optional*): branch, made from the main branch if it does not exist.
        commit_message (`str`): first line of the commit.

    Returns:
        Address of the repository's files at the new commit.

    Raises:
        ValueError: `private` is True and the repository is public.
        huggingface_hub.errors.HfHubHTTPError: the network or the rights forbid it, or somebody else has committed to
            the branch meanwhile. The branch is then as it was; a repository that was made for it stays, empty.
    """
    repository = api.create_repo(repo_id, private=private, exist_ok=True)
    before = api.model_info(repo_id)
    _require_private(before, private)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = api.model_info(repo_id, revision=revision)
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }
    present = [sibling.rfilename for sibling in before.siblings]
    # not `upload_folder`, which may split what takes long into several commits
    commit = api.create_commit(
        repo_id,
        operations=[
            *(CommitOperationDelete(name) for name in present if name not in files and _is_read_by_loaders(name)),
            *(CommitOperationAdd(name, path) for name, path in files.items()),
        ],
        commit_message=commit_message,
        revision=revision,
        parent_commit=before.sha,
    )
    return f"{repository}/tree/{commit.oid}"


def _is_read_by_loaders(name: str) -> bool:
    # in the top folder only: a pattern's star must not reach into others
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in _READ_BY_LOADERS)
