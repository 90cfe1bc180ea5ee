"""Publishing an exported folder on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError


def push_to_hub(folder: Path, repo: str, *, private: bool = True) -> str:
    """Upload an exported draft and return its address. The token is the one `hf auth login` keeps.

    Raises UserError with the Hub's own words when it refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="A draft from redraft")
    except (HfHubHTTPError, HFValidationError, OSError) as problem:
        raise UserError(
            f"--push-to-hub {repo}: the Hub refused ({problem}); the folder {folder} is complete "
            "and can be uploaded again"
        ) from None
    return str(address)
