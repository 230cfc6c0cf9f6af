"""A result on the Hugging Face hub, in one commit: nobody finds half of it."""

from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loftq.checkpoint.assemble import ADAPTER
from loftq.checkpoint.manifest import MANIFEST
from loftq.errors import StorageError, UsageError, option, quoted
from loftq.formats.belongings import REPLACED_WEIGHTS
from loftq.formats.remote import reason
from loftq.sources.checkpoint import HUB_ID


def prepare(name: str, private: bool) -> str:
    """Make the repository, if it is not there: whoever may not is told so before hours of work. Returns its full name.

    Args:
        private: of a new one; that of an old one is not changed.
    """
    if not HUB_ID.fullmatch(name):
        raise UsageError(f"{option('push_to_hub')} {quoted(name)}: no name of the hub; wanted ORG/NAME")
    import huggingface_hub

    with _asking(name):
        return huggingface_hub.HfApi().create_repo(name, private=private or None, exist_ok=True).repo_id


def push(directory: Path, manifest: Mapping[str, Any], name: str) -> None:
    """Commit the files of a result, and take weights of an earlier one away. What the hub has already is not sent."""
    import huggingface_hub

    ours = [*manifest["files"], MANIFEST]
    with _asking(name):
        api = huggingface_hub.HfApi()
        stale = [n for n in api.list_repo_files(name) if n not in ours and _is_replaced(n)]
        added = [huggingface_hub.CommitOperationAdd(n, str(directory / n)) for n in ours]
        removed = [huggingface_hub.CommitOperationDelete(n) for n in stale]
        api.create_commit(name, [*added, *removed], commit_message="LoftQ checkpoint")


def _is_replaced(name: str) -> bool:
    return bool(REPLACED_WEIGHTS.fullmatch(name)) or name.startswith(f"{ADAPTER}/")


@contextmanager
def _asking(name: str):
    """Requests to the hub; the many ways in which it says no become one line."""
    try:
        yield
    except Exception as e:
        cure = "check network and `hf auth login`, then run the same command again: what is made is kept"
        raise StorageError(f"{option('push_to_hub')} {quoted(name)}: {reason(e)}; {cure}") from e
