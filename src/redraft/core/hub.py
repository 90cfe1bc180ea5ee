"""The Hugging Face Hub: publishing an exported folder, and finding the files of a data set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .errors import UserError

PARQUET_BRANCH = "refs/convert/parquet"
"""Where the Hub keeps every data set as Parquet: config/split/number.parquet."""
OTHER_FILES = {".csv", ".tsv", ".txt", ".md", ".yaml", ".yml", ".xml", ".toml", ".xls", ".xlsx"}
"""Suffixes of files that hold no rows."""
FILES = {
    ".jsonl",
    ".json",
    ".parquet",
    ".gz",
    ".arrow",
    ".zst",
    ".bz2",
    ".xz",
    ".zip",
    *OTHER_FILES,
}
"""Suffixes of files: a name that ends so is not looked for on the Hub."""


def push_to_hub(folder: Path, repo: str, *, private: bool = True) -> str:
    """Upload an exported draft and return its address. The token is the one `hf auth login` keeps.

    Raises UserError with the Hub's own words when it refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="A draft from redraft")
    except Exception as problem:  # noqa: BLE001 - the Hub's client and its HTTP library raise many kinds
        raise UserError(
            f"--push-to-hub {repo}: the Hub refused ({problem}); the folder {folder} is complete "
            "and can be uploaded again"
        ) from None
    return str(address)


def looks_like_hub(source: str) -> bool:
    """Whether a prompts source names a data set on the Hub rather than a file."""
    name = source.split(":")[0]
    owner, slash, rest = name.partition("/")
    known = Path(name).suffix.lower() in FILES
    return (
        bool(slash and owner and rest)
        and "/" not in rest
        and owner[0] not in ".~"
        and (not known and not Path(source).exists())
    )


def dataset_files(source: str) -> Iterator[Path]:
    """The Parquet files of `owner/name[:config/split]` on the Hub, fetched one after the other.

    Config and split may be left out where there is one to choose, or one named default and train.
    Raises UserError listing the choices, or with the Hub's own words when it refuses.
    """
    from huggingface_hub import HfApi, hf_hub_download

    repo, _, choice = source.partition(":")
    config, _, split = choice.rpartition("/")
    where = {"repo_type": "dataset", "revision": PARQUET_BRANCH}
    try:
        names = HfApi().list_repo_files(repo, **where)
        files = sorted(n for n in names if n.endswith(".parquet") and n.count("/") == 2)
        config = _one_of(source, "config", config, {n.split("/")[0] for n in files}, "default")
        files = [n for n in files if n.split("/")[0] == config]
        split = _one_of(source, "split", split, {n.split("/")[1] for n in files}, "train")
        for name in files:
            if name.split("/")[1] == split:
                yield Path(hf_hub_download(repo, name, **where))
    except UserError:
        raise
    except Exception as problem:  # noqa: BLE001 - one sentence for all that a network does
        # Whatever the Hub's client and its HTTP library raise; their classes differ by version.
        raise UserError(
            f"prompts {source}: no such file, and the Hub gave no data set of that name ({problem})"
        ) from None


def _one_of(source: str, what: str, asked: str, found: set[str], usual: str) -> str:
    if asked in found:
        return asked
    if not asked and len(found) == 1:
        return found.pop()
    if not asked and usual in found:
        return usual
    raise UserError(
        f"prompts {source}: the data set has no {what} '{asked or usual}'; it has "
        f"{', '.join(sorted(found)) or 'none'}; name one as owner/name:config/split"
    )
