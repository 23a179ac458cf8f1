"""Networks on the Hugging Face hub. Its client is imported when it is first needed."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from netfission.utils.errors import first_line, invalid
from netfission.utils.hub import is_in_reach, quick_when_offline


def download(
    name: str, files: Sequence[str], *, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """Download files of a repository into the hub's cache, and return their folder.

    Args:
        name: name of the repository, `OWNER/NAME`.
        files: names of the files; those that the repository lacks are passed over.
        revision: branch, tag or commit; default the main branch.
        token: token of the hub; default the one kept by `hf auth login`.

    Raises:
        ValueError: there is no such repository.
        ConnectionError: the hub cannot be reached, and the repository is not in the cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    expected = "a folder, or the name of a repository on the hub"
    try:
        with quick_when_offline():
            return Path(snapshot_download(name, allow_patterns=list(files), revision=revision, token=token))
    except HFValidationError as error:
        raise invalid("name", expected, name) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise invalid("name", expected, found=f"{name!r}, found in neither ({first_line(error)})") from error
    except (ConnectionError, FileNotFoundError) as error:
        raise ConnectionError(
            f"{name} is not a folder, the hub cannot be reached, and its cache does not hold it; name the "
            "folder of a run, or connect to a network once"
        ) from error


def upload(
    write: Callable[[Path], object],
    repo_id: str,
    *,
    commit_message: str,
    private: bool | None,
    token: str | None,
    branch: str | None,
    create_pr: bool | None,
) -> str:
    """Upload a folder as one commit, and make the repository if it does not exist.

    Args:
        write: writes the files into an empty folder.
        repo_id: see `netfission.Classifier.push_to_hub`, like all that follow.

    Returns:
        The address of the commit.

    Raises:
        ValueError: the hub refuses it.
        ConnectionError: the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not is_in_reach():
        raise ConnectionError(f"{repo_id} cannot be pushed to, as the hub cannot be reached")
    try:
        api = HfApi(token=token)
        repository = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / repository
            write(path)
            return api.upload_folder(
                repo_id=repository,
                repo_type="model",
                folder_path=path,
                commit_message=commit_message,
                revision=branch,
                create_pr=create_pr,
            )
    except (HFValidationError, HfHubHTTPError) as error:
        expected = "the name of a repository that you may write to"
        raise invalid("repo_id", expected, found=f"{repo_id!r} ({first_line(error)})") from error
