"""From a folder or a Hub id to a folder: downloads only what a checkpoint needs, and resumes after a break."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm.auto import tqdm

from bagel.checkpoint.errors import CheckpointError
from bagel.checkpoint.files import (
    AUTOENCODER_NAMES,
    OFFICIAL,
    UNITS_FIELD,
    WEIGHT_NAMES,
    find_autoencoder,
    has_tokenizer,
    instead_of_file,
    quoted,
    refuse_pickle,
    weight_files,
)
from bagel.checkpoint.measure import measure
from bagel.checkpoint.sources import open_source

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SMALL_FILES = ("*.json", "merges.txt", "*.model", "SHA256SUMS")
INDEX = ".safetensors.index.json"

RESUMABLE_BYTES = (64 * 2**20, 50 * 10**9)
"""Files of this size are fetched by ranges into the cache, so that a later process goes on where one was ended.

The Hub's client resumes within one process only. Larger files than the Hub serves over plain HTTP are left to it.
"""


def resolve_source(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    progress: bool = True,
    alone: bool = True,
    weights: str | None = None,
) -> Path:
    """Return the folder of a checkpoint, fetching it from the Hub if `source` is no folder but a Hub id.

    Only the needed files are fetched: the JSON and tokenizer files, one set of weights and the autoencoder. The
    client's own settings hold (`HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE`); where the Hub cannot be
    asked what it has, a whole copy that is already in its cache is used.

    Args:
        source: an existing folder, or an id such as `ByteDance-Seed/BAGEL-7B-MoT`.
        revision: branch, tag or commit on the Hub.
        token: Hub token; None takes the one of the client's login.
        progress: show progress bars on a terminal.
        alone: a cached copy is whole only with tokenizer and autoencoder; False where another folder supplies them.
        weights: which file of weights, or which index, where a repository has several.

    Raises:
        CheckpointError: no folder and no Hub id, an unknown or closed repository, no network.
        TypeError: a source that is neither a path nor an id.
    """
    if not isinstance(source, str | Path):
        raise TypeError(
            f"the source must be the path of a folder or a Hub id (such as {OFFICIAL}), got "
            f"{type(source).__name__} {source!r}"
        )
    place = Path(source).expanduser()
    if str(source) and place.is_dir():
        return place
    if place.is_file():
        raise CheckpointError(f"{place} is a file; {instead_of_file(place)}")
    if isinstance(source, Path) or not HUB_ID.fullmatch(source):
        raise CheckpointError(
            f"{str(source)!r} is neither an existing folder nor a Hub id (such as {OFFICIAL}); check its spelling"
        )
    return _fetch(source, revision=revision, token=token, progress=progress, alone=alone, weights=weights)


def needed_files(names: Sequence[str], *, weights: str | None = None, units: bool = False) -> list[str]:
    """Return which of a repository's files a checkpoint needs, each once.

    Args:
        names: all its files.
        weights: the file of weights, or the index, where there are several.
        units: the weights are DFloat11 units, each in a file of its own: all of them are needed.

    Raises:
        CheckpointError: there are no weights among them, only such as cannot be read, or a choice to be made.
    """
    small = [
        name
        for name in names
        if "/" not in name
        and any(fnmatch.fnmatchcase(name, pattern) for pattern in SMALL_FILES)
        and not name.endswith(INDEX)
    ]
    chosen = _units(names) if units and weights is None else _weights(names, weights)
    autoencoder = [name for name in AUTOENCODER_NAMES if name in names][:1]
    return [*small, *chosen, *autoencoder]


def _weights(names: Sequence[str], asked: str | None) -> list[str]:
    if asked is not None and asked not in names:
        raise CheckpointError(f"no {asked} among its files: it has {quoted(weight_files(names)) or 'no weights'}")
    if asked is not None:
        refuse_pickle(Path(asked))
        return _shards(names, asked) if asked.endswith(INDEX) else [asked]
    known = next((name for name in WEIGHT_NAMES if name in names), None)
    index = next((name for name in sorted(names) if name.endswith(INDEX) and "/" not in name), None)
    if known or index:
        return [known] if known else _shards(names, index or "")
    there = weight_files(names)
    if len(there) > 1:
        raise CheckpointError(f"several files of weights ({quoted(there)}): name one with weights=...")
    for name in () if there else names:
        refuse_pickle(Path(name))
    if not there:
        raise CheckpointError(f"no weights among its files: wanted one of {', '.join(WEIGHT_NAMES)} or shards")
    return there


def _units(names: Sequence[str]) -> list[str]:
    return [name for name in weight_files(names) if name.endswith(".safetensors")]


def _shards(names: Sequence[str], index: str) -> list[str]:
    stem = index.removesuffix(INDEX)
    return [index, *(name for name in names if fnmatch.fnmatchcase(name, f"{stem}-*-of-*.safetensors"))]


def _fetch(
    repo_id: str,
    *,
    revision: str | None,
    token: str | bool | None,
    progress: bool,
    alone: bool,
    weights: str | None,
) -> Path:
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    by_hand = (
        f"to fetch it by hand where it can be reached: hf download {repo_id} --local-dir FOLDER, "
        "then name that FOLDER instead"
    )
    bar = None if progress else _SilentBar
    listed = False
    try:
        info = hub.HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True)
        listed = True
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        units = "config.json" in sizes and _has_units(repo_id, info.sha, token)
        files = needed_files(list(sizes), weights=weights, units=units)
        for name in files:
            if RESUMABLE_BYTES[0] <= sizes[name] <= RESUMABLE_BYTES[1]:
                _fetch_by_ranges(repo_id, name, revision=info.sha, token=token, bar=bar)
        return Path(
            hub.snapshot_download(repo_id, revision=revision, token=token, allow_patterns=files, tqdm_class=bar)
        )
    except CheckpointError as error:
        raise CheckpointError(f"{repo_id}: {error}") from error
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repo_id} is gated: accept its terms at {constants.ENDPOINT}/{repo_id}, then pass token=... or run "
            f"`hf auth login`; {by_hand}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repo_id} has no revision {revision!r}; name a branch, tag or commit of it") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repo_id} is neither an existing folder nor a repository at {constants.ENDPOINT} that this token may "
            f"read; check its spelling, or pass token=... if it is private; {by_hand}"
        ) from error
    except Exception as error:  # the client lets errors of several HTTP libraries through
        cached = None if listed else _cached(repo_id, revision, alone=alone, weights=weights)
        if cached is not None:
            return cached
        reason = (str(error) or type(error).__name__).partition("\n")[0]
        raise CheckpointError(
            f"{repo_id} could not be fetched from {constants.ENDPOINT} ({reason}); what has arrived is kept, so try "
            f"again when the network is back; {by_hand}"
        ) from error


def _has_units(repo_id: str, revision: str | None, token: str | bool | None) -> bool:
    """Whether a repository's configuration says that its weights are DFloat11 units; one that is no JSON does not."""
    import huggingface_hub as hub

    path = hub.hf_hub_download(repo_id, "config.json", revision=revision, token=token)
    try:
        return UNITS_FIELD in json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, TypeError, RecursionError):
        return False


def _cached(repo_id: str, revision: str | None, *, alone: bool, weights: str | None) -> Path | None:
    """Return the folder of a copy in the client's cache if it holds all that loading needs."""
    import huggingface_hub as hub

    named = () if weights is None else (weights,)
    names = (*named, *WEIGHT_NAMES, f"model{INDEX}", "llm_config.json", "config.json")
    found = (hub.try_to_load_from_cache(repo_id, name, revision=revision) for name in names)
    folder = next((Path(file).parent for file in found if isinstance(file, str)), None)
    if folder is None:
        return None
    try:
        has_gen = measure(open_source(folder, weights).shapes).has_gen_glue
    except CheckpointError:
        return None
    whole = not alone or (has_tokenizer(folder) and (not has_gen or find_autoencoder(folder) is not None))
    return folder if whole else None


class _SilentBar(tqdm):
    """A progress bar that shows nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("name", None)
        super().__init__(*args, **{**kwargs, "disable": True})


def _fetch_by_ranges(
    repo_id: str, name: str, *, revision: str | None, token: str | bool | None, bar: type[tqdm] | None
) -> None:
    """Put one large file into the client's cache, going on from the bytes that an earlier process left there."""
    import huggingface_hub as hub
    from huggingface_hub import constants
    from huggingface_hub.file_download import http_get, repo_folder_name
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    if isinstance(hub.try_to_load_from_cache(repo_id, name, revision=revision), str):
        return
    url = hub.hf_hub_url(repo_id, name, revision=revision)
    meta = hub.get_hf_file_metadata(url, token=token)
    if meta.size is None or meta.etag is None or not re.fullmatch(r"[\w-]+", meta.etag):
        return  # no name to keep it under: the client fetches it in one piece
    blob = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model") / "blobs" / meta.etag
    part = blob.with_name(f"{meta.etag}.part")
    blob.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(blob.with_name(f"{meta.etag}.part.lock")):
        if blob.exists():
            return
        with part.open("ab") as file:
            if file.tell() > meta.size:
                file.truncate(0)
            http_get(
                url,
                file,
                resume_size=file.tell(),
                headers=build_hf_headers(token=token),
                expected_size=meta.size,
                displayed_filename=PurePosixPath(name).name,
                tqdm_class=bar,
            )
        _check_digest(part, meta.etag)
        os.replace(part, blob)


def _check_digest(part: Path, etag: str) -> None:
    # Large files carry their SHA-256 as ETag; others have a git hash, and were checked by size.
    if not re.fullmatch(r"[0-9a-f]{64}", etag):
        return
    with part.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != etag:
        part.unlink()
        raise CheckpointError(f"a file arrived damaged (SHA-256 {digest}, wanted {etag}); fetch it again")
