"""What is fetched: models, corpora, data sets, the authors' prompts."""

import io
import os
import shutil
import tarfile
import zipfile
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

from huggingface_hub import HfApi, _CACHED_NO_EXIST, hf_hub_download, logging, try_to_load_from_cache
from huggingface_hub.errors import (EntryNotFoundError, HFValidationError, HTTPError, LocalEntryNotFoundError,
    RepositoryNotFoundError, RevisionNotFoundError)
from tqdm import tqdm

import common
from common import DAMAGE, Header, InputError, TINY, atomic_write, sweep
from t5 import INDEX, SINGLE, check_file, read_config, shard_names


def archive_member(path, file):
    """A task's file out of a tar or zip, as bytes. Nothing is unpacked: no name in an archive can
    make anything be written. InputError for damage, and for names that lead outside.
    original/SST-2/dev.tsv of members original/GLUE-SST-2/dev.tsv, original/SST-2/dev.tsv -> the
    latter; the other one (QQP-clean for QQP) only if it is alone."""
    *_, folder, name = file.split("/")
    try:
        zipped = path.suffix == ".zip"
        with zipfile.ZipFile(path) if zipped else tarfile.open(path, tarinfo=Header) as archive:
            names = archive.namelist() if zipped else archive.getnames()
            for member in names:
                if ".." in member.split("/") or member.startswith("/"):
                    raise InputError(f"{path} has {member!r}, which leads outside: do not use it")
            found = [(parts[-2] != folder, member) for member in names
                     if (parts := ("", *member.split("/")))[-1] == name and folder in parts[-2]]
            if not found:
                raise InputError(f"{path} has no {folder}/{name}: fetch it again")
            member = min(found)[1]
            if not (zipped or archive.getmember(member).isfile()):
                raise InputError(f"{path}: {member} is a link, a folder or a device: do not use it")
            with (archive.open if zipped else archive.extractfile)(member) as part:
                content = part.read(LARGEST + 1)
            if len(content) > LARGEST:
                raise InputError(f"{path}: {member} is too large for a task: do not use it")
            return content
    except (*DAMAGE, OSError, RuntimeError, UnicodeError) as error:
        reason = _reason(error).rstrip(":")
        raise InputError(f"{path} is damaged or incomplete ({reason}): delete it, fetch it again"
                         ) from None


# --------------------------------------------------------------------------- what is fetched
# Short name -> hub id, @ the commit that was main's when it was looked up in what others cite. The
# v1.1 and LM-adapted ones are not pinned; two of them are known to have safetensors in a pull
# request only, for the others the hub is asked.
MODELS = {
    "t5-small": "google-t5/t5-small@df1b051c49625cf57a3d0d8d3863ed4d13564fe4",
    "t5-base": "google-t5/t5-base@a9723ea7f1b39c1eae772870f3b547bf6ef7e6c1",
    "t5-large": "google-t5/t5-large@150ebc2c4b72291e770f58e6057481c8d2ed331a",
    "t5-3b": "google-t5/t5-3b@bed96aab9ee46012a5046386105ee5fd0ac572f0",
    "flan-t5-small": "google/flan-t5-small@0fc9ddf78a1e988dac52e2dac162b0ede4fd74ab",
    "flan-t5-base": "google/flan-t5-base@7bcac572ce56db69c1ea7c8af255c5d7c9672fc2",
    "flan-t5-large": "google/flan-t5-large@0613663d0d48ea86ba8cb3d7a44f0f65dc596a2a",
    "flan-t5-xl": "google/flan-t5-xl@7d6315df2c2fb742f0f5b556879d730926ca9001",
    "flan-t5-xxl": "google/flan-t5-xxl@ae7c9136adc7555eeccc78cdd960dfd60fb346ce",
    **{f"t5-v1_1-{size}": f"google/t5-v1_1-{size}" for size in "small base large xl xxl".split()},
    **{f"t5-{size}-lm-adapt": f"google/t5-{size}-lm-adapt"
       for size in "small base large xl xxl".split()},
    "t5-v1_1-base": "google/t5-v1_1-base@refs/pr/1",
    "t5-base-lm-adapt": "google/t5-base-lm-adapt@refs/pr/2",
}
OFFICIAL_ROWS = 32128               # embeddings of every official T5: 32,100 pieces, padded


class Corpus(NamedTuple):
    """A corpus of the hub, in files of about the same size."""
    source: dict
    file: str           # a file's name, with a place for its number
    files: int
    archive: int        # bytes of a file
    text: int           # bytes of text in it, put low


CORPORA = {
    "openwebtext": Corpus({"repo_id": "Skylion007/openwebtext", "repo_type": "dataset",
                           "revision": "f3808c30e817981b845ec549c43e82bb467d8144"},  # still tars
                          "subsets/urlsf_subset{:02}.tar", 21, 630_000_000, 1_700_000_000),
    "c4": Corpus({"repo_id": "allenai/c4", "repo_type": "dataset"},
                 "en/c4-train.{:05}-of-01024.json.gz", 1024, 320_000_000, 600_000_000),
}
RELEASED = {(768, 3072): "t5base", (2048, 5120): "flant5xl"}    # d_model, d_ff: the authors' name
RELEASED_URL = ("https://raw.githubusercontent.com/beepkh/SUPMER/"
                "adaddb3144183a823247fdba80102b0c9185e871/pretrain_prompt/")


class Download(NamedTuple):
    """A file of a hub repository."""
    file: str
    bytes: int
    cached: bool
    source: dict        # repo_id, revision


def model_folder(name):
    """A model's folder: "tiny" (embedded), a folder, or one of MODELS or OWNER/NAME[@REVISION] of
    the hub, whose needed files are fetched into the hub's own cache ($HF_HOME)."""
    if is_local(name):
        return TINY if name == "tiny" else Path(name)
    return [_fetch(part.file, **part.source) for part in model_downloads(name)][0].parent


def is_local(name):
    """Whether a model is a folder. InputError if "tiny" is meant and not there."""
    if name == "tiny" and not TINY.is_dir():
        raise InputError(f"{TINY} is missing: `python tiny.py` builds the embedded model")
    return name == "tiny" or Path(name).is_dir()


def model_downloads(name):
    """The files of a hub model that are wanted -> [Download], config.json first, which is fetched.

    All of one commit: either model.safetensors or its shards and their index, and the tokenizer's.
    """
    source = hub_source(name)
    config = _fetch("config.json", **source)
    commit = source | {"revision": config.parent.name}
    weights = _look_up(SINGLE, commit) or _look_up(INDEX, commit)
    if not weights:
        raise InputError(_no_safetensors(source))
    files = shard_names(_fetch(INDEX, **commit)) if weights.file == INDEX else []
    shards = [_look_up(file, commit) for file in files]
    if None in shards:
        raise InputError(f"{source['repo_id']} lacks {files[shards.index(None)]}, which its index "
                         "names: try another @REVISION")
    tokenizer = _look_up("tokenizer.json", commit)
    if not tokenizer and read_config(config.parent).vocab_size == OFFICIAL_ROWS:
        tokenizer = _look_up("tokenizer.json", hub_source("t5-base"))       # see tokenizer_file
    config = Download("config.json", config.stat().st_size, True, commit)
    return [config, weights, *shards, *filter(None, [tokenizer])]


def hub_source(name):
    """One of MODELS, or OWNER/NAME[@REVISION] -> {"repo_id": ..., and, where given, "revision"}."""
    source = dict(zip(("repo_id", "revision"), MODELS.get(name, name).split("@", 1)))
    if "/" not in source["repo_id"]:
        raise InputError(f"no model {name!r}: give tiny, {', '.join(MODELS)}, OWNER/NAME[@REVISION]"
                         " of the hub, or a folder with config.json, model.safetensors (or its "
                         "shards and index) and tokenizer.json")
    return source


def _look_up(file, source):
    """A Download, or None where the hub (the cache, when offline) has no such file."""
    if try_to_load_from_cache(filename=file, **source) is _CACHED_NO_EXIST:
        return None                         # the hub said so before: it need not be asked again
    found = _hub(file, source, dry_run=True)
    return found and Download(file, found.file_size, found.is_cached, source)


def _no_safetensors(source):
    """The first revision, of a repository without safetensors, that has them -> an error's text."""
    name = source["repo_id"]
    try:
        refs = HfApi().list_repo_refs(name, include_pull_requests=True)
        where = next((f"--model {name}@{revision}" for revision in (
            *(branch.name for branch in refs.branches), *(pull.ref for pull in refs.pull_requests))
            if any(HfApi().file_exists(name, file, revision=revision) for file in (SINGLE, INDEX))),
            "another model, or convert it")
    except FETCH_ERRORS as error:
        return (f"{name} has no safetensors in the cache, and the hub cannot be asked "
                f"({_reason(error)}): check the network, or give a folder that has them")
    return (f"{name} has no safetensors at {source.get('revision', 'main')}, and no other weights "
            f"are read: take {where}")


def model_config(name):
    """The T5Config of a model; of one on the hub only config.json is fetched."""
    return read_config(model_folder(name) if is_local(name) else
                       _fetch("config.json", **hub_source(name)).parent)


def tokenizer_file(folder):
    """tokenizer.json of a model's folder, or t5-base's, fetched: v1.1 and LM-adapted have none."""
    path = Path(folder) / "tokenizer.json"
    if path.is_file():
        return path
    if read_config(folder).vocab_size != OFFICIAL_ROWS:
        raise InputError(f"{path} is missing: put the model's tokenizer.json there")
    try:
        return _fetch("tokenizer.json", **hub_source("t5-base"))
    except InputError as error:
        raise InputError(f"{path} is missing, put t5-base's there, which serves every official T5: "
                         f"{error}") from None


def corpus_count(name, max_bytes):
    """How many of a corpus's files hold max_bytes of text."""
    return min(CORPORA[name].files, -(-max_bytes // CORPORA[name].text))


def fetch_corpus(name, max_bytes):
    """Fetch as many files of one of CORPORA as hold max_bytes of text -> paths, for documents()."""
    corpus = CORPORA[name]
    return [_fetch(corpus.file.format(number), **corpus.source)
            for number in range(corpus_count(name, max_bytes))]
if "HF_HUB_VERBOSITY" not in os.environ:    # it tells of each of its tries, we of their failure
    logging.set_verbosity_error()


# What the hub's client raises: no network (OSError or its HTTP library's own), a name or revision
# that is not there or not allowed, no room on the disk.
LARGEST = 1 << 27          # bytes of a member of an archive
FETCH_ERRORS = (OSError, EntryNotFoundError, HFValidationError, HTTPError)
REASONS = {LocalEntryNotFoundError: "the hub was not reached, and it is not in the cache",
           RepositoryNotFoundError: "the hub has no such repository, or it is private",
           RevisionNotFoundError: "the repository has no such revision"}


def _fetch(file, **source):
    """A file of the hub -> its path in the cache. There nothing is left that is not what its name
    says (a web page under its name), nor the part that a killed download leaves."""
    path = Path(_hub(file, source))
    blob = path.resolve()
    for part in blob.parent.glob(f"{blob.name}.*.incomplete"):
        part.unlink(missing_ok=True)
    try:
        check_file(path)
    except InputError as error:
        for wrong in {path, blob}:
            wrong.unlink()
        raise InputError(f"{error} (it was taken out of the hub's cache)") from None
    return path


def _reason(error):
    first_line = str(error).strip().split("\n")[0]
    return next((REASONS[kind] for kind in REASONS if isinstance(error, kind)), first_line)


def _hub(file, source, **how):
    """hf_hub_download's answer; None where a dry run finds no such file. InputError for all else
    that its client raises: no network, a name or revision that is none, no room on the disk."""
    try:
        return hf_hub_download(filename=file, **source, **how)
    except FETCH_ERRORS as error:
        if how and isinstance(error, EntryNotFoundError):
            return None
        where = "@".join(filter(None, (source["repo_id"], source.get("revision"))))
        option = "corpus" if "repo_type" in source else "model"
        raise InputError(f"{file} of {where} was not fetched ({_reason(error)}): check name, "
                         "revision and network, or put its files into a folder and give "
                         f"--{option} FOLDER") from None


def download(url):
    """What an address has, as bytes, with a bar. InputError if it is not had whole."""
    content = io.BytesIO()
    try:
        with urlopen(url, timeout=60) as answer:
            total = int(answer.headers.get("Content-Length") or 0)
            with tqdm.wrapattr(answer, "read", total or None, desc=url.rpartition("/")[2],
                               disable=None) as body:
                shutil.copyfileobj(body, content)
    except (OSError, HTTPException) as error:
        raise InputError(f"{url}: {error}") from None
    if content.tell() < total:
        raise InputError(f"{url} stopped at {content.tell():,} of {total:,} bytes")
    return content.getvalue()


def keep(path, content):
    """Write what was downloaded, whole or not at all -> path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    atomic_write(path, lambda file: file.write(content))
    return path


def released_folder(config):
    """Where the authors' meta-trained prompt for a T5 of this shape is, fetched if it is not there.
    InputError for another shape than t5-base's and flan-t5-xl's."""
    name = RELEASED.get((config.d_model, config.d_ff))
    if not name:
        raise InputError("the authors released prompts for t5-base and flan-t5-xl only: take one "
                         "of these models, or --prompt RUN|random|vocab")
    folder = Path("cache") / "released"
    for path in (folder / f"{kind}_{name}.pt" for kind in ("prompt", "gradient_edit")):
        if not path.exists():
            try:
                keep(path, download(RELEASED_URL + path.name))
            except InputError as error:
                raise InputError(f"{error}: check the network, or put {path.name} from the folder "
                                 f"pretrain_prompt of github.com/beepkh/SUPMER into {folder}"
                                 ) from None
    return folder


# ---------------------------------------------------------------------------- what it learns from

def corpus_paths(training):
    """The corpus option's files and folders; what is on the hub is fetched."""
    return [path for name in training.corpus for path in (
        fetch_corpus(name, training.bytes) if name in CORPORA else
        [common.TINY / "corpus.jsonl.gz" if name == "embedded" else Path(name)])]


def fetch_list(name):
    """What will be fetched for a model -> lines to print; none for a folder."""
    if is_local(name):
        return []
    parts = model_downloads(name)
    source = parts[0].source
    pinned = "" if source["revision"] in MODELS.get(name, name) else ", not pinned"
    size = sum(part.bytes for part in parts if not part.cached) / 1e6
    return [f"download: {size:,.0f} MB of {source['repo_id']} at {source['revision']}{pinned}: " +
            ", ".join(part.file + f" of {part.source['repo_id']}" * (
                part.source["repo_id"] != source["repo_id"]) + " (cached)" * part.cached
                for part in parts)]
