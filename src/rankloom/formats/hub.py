"""Pushing a saved folder to the Hugging Face Hub, only when asked."""

from __future__ import annotations

from pathlib import Path

from rankloom.errors import RankloomError, StateError


def check(repo: str) -> None:
    """Refuse a bad repository name or an offline session, before anything is written."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise StateError(f"push_to={repo!r}: {error}") from error
    if constants.HF_HUB_OFFLINE:
        raise StateError(f"push_to={repo!r}: HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or push later")


def push(folder: Path, repo: str) -> str:
    """Upload the folder to the (new, private, or existing) repository; returns its address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        url = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Adapter saved by Rankloom")
    except (HfHubHTTPError, OSError) as error:
        raise RankloomError(f"{folder} is saved, but pushing it to {repo!r} failed: {error}") from error
    return str(url)
