"""Pushes an adapter to the Hub: the files of one format, and a model card."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_plugins.hub.client import errors_told, hub
from lora_plugins.hub.model_card import CardContent, model_card


def push(
    write: Callable[[Path], CardContent],
    repository: str,
    *,
    revision: str | None,
    private: bool | None,
    message: str,
    replaces: Sequence[str],
) -> str:
    """Pushes an adapter, in one commit; returns the address of the commit.

    Args:
        write: Writes the files of the adapter into a folder, and returns what the model card says of them.
        repository: `owner/name`; it is made if it does not exist.
        revision: The branch; None for the main one.
        private: Whether a new repository is private; None for the owner's default.
        message: The message of the commit.
        replaces: Names, as shell patterns, of files of a former adapter, which go where they are not written anew.

    Raises:
        ConfigError: If huggingface_hub is missing.
        AdapterFileError: If the repository cannot be made or written.
    """
    client = hub()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        content = write(folder)
        (folder / "README.md").write_text(model_card(content), encoding="utf-8")
        with errors_told(f"Pushing to {repository!r}"):
            api = client.HfApi()
            api.create_repo(repository, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                revision=revision,
                commit_message=message,
                delete_patterns=[*replaces] or None,  # with which the client lists what there is
            )
    return str(commit.commit_url)
