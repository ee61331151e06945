"""What the Hugging Face hub has: models, corpora, data sets.

The hub's client keeps its own cache ($HF_HOME), resumes, and under HF_HUB_OFFLINE=1 asks nobody.
"""

from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path, PurePath

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import DryRunError, EntryNotFoundError, HFValidationError, HTTPError

from common import TINY, InputError, first_line
from t5 import INDEX, SINGLE, read_config, weight_files

# Short name -> hub id, @ the commit that others cite, or a pull request with safetensors.
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
    **{name: f"google/{name}" for size in ("small", "base", "large", "xl", "xxl")
       for name in (f"t5-v1_1-{size}", f"t5-{size}-lm-adapt")},
    "t5-v1_1-base": "google/t5-v1_1-base@refs/pr/1",
    "t5-base-lm-adapt": "google/t5-base-lm-adapt@refs/pr/2",
}
OFFICIAL_ROWS = 32128       # embeddings of every official T5: 32,100 pieces, padded
WHOLE = ["config.json", "tokenizer.json", SINGLE]       # what a model consists of
SHARDS = [INDEX, "model-*-of-*.safetensors"]            # in place of SINGLE
# A file's name, with a place for its number; their number; bytes of a file; of text in it, put low.
Corpus = namedtuple("Corpus", "source file files archive text")
CORPORA = {
    "openwebtext": Corpus({"repo_id": "Skylion007/openwebtext", "repo_type": "dataset",
                           "revision": "f3808c30e817981b845ec549c43e82bb467d8144"},  # still tars
                          "subsets/urlsf_subset{:02}.tar", 21, 630_000_000, 1_700_000_000),
    "c4": Corpus({"repo_id": "allenai/c4", "repo_type": "dataset"},
                 "en/c4-train.{:05}-of-01024.json.gz", 1024, 320_000_000, 600_000_000),
}


def hub_source(name):
    """One of MODELS, or OWNER/NAME[@REVISION] -> {"repo_id": ..., and, where given, "revision"};
    {} for tiny and for a folder."""
    if name == "tiny" or Path(name).is_dir():
        return {}
    source = dict(zip(("repo_id", "revision"), MODELS.get(name, name).split("@", 1)))
    if "/" not in source["repo_id"]:
        raise InputError(f"no model {name!r}: give tiny, {', '.join(MODELS)}, OWNER/NAME[@REVISION]"
                         " of the hub, or a folder")
    return source


def last_name(model):
    """What a model is called, wherever it is. google-t5/t5-base@main, x/t5-base/ -> t5-base"""
    return PurePath(MODELS.get(model, model).partition("@")[0]).name


@contextmanager
def asking(source, option):
    """Turn whatever the hub's client raises inside the block into one InputError."""
    try:
        yield
    except (OSError, EntryNotFoundError, HFValidationError, HTTPError) as error:
        raise InputError(f"{source['repo_id']} was not fetched ({type(error).__name__}: "
                         f"{first_line(error)}): check name, revision and network, or put the "
                         f"files into a folder and give --{option} FOLDER") from None


def fetch_file(file, source, option="model"):
    """One file of a hub repository -> its path in the hub's cache."""
    with asking(source, option):
        return Path(hf_hub_download(filename=file, **source))


def model_folder(name):
    """The folder of a model: "tiny" (embedded), a folder, or one of MODELS or OWNER/NAME[@REVISION]
    of the hub, of which the single file of weights is fetched or else its shards."""
    source = hub_source(name)
    if not source:
        return TINY if name == "tiny" else Path(name)
    with asking(source, "model"):
        folder = Path(snapshot_download(**source, allow_patterns=WHOLE))
        if not (folder / SINGLE).is_file():
            folder = Path(snapshot_download(**source, allow_patterns=WHOLE + SHARDS))
    weight_files(folder, source["repo_id"])             # now, not after other downloads
    return folder


def model_config(name):
    """The T5Config of a model; of one on the hub only config.json is fetched."""
    source = hub_source(name)
    return read_config(fetch_file("config.json", source).parent if source else model_folder(name))


def tokenizer_file(folder):
    """tokenizer.json of a model's folder, or t5-base's, fetched: v1.1 and LM-adapted have none."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file() and read_config(folder).vocab_size != OFFICIAL_ROWS:
        raise InputError(f"{path} is missing: put the model's tokenizer.json there")
    return path if path.is_file() else fetch_file("tokenizer.json", hub_source("t5-base"))


def fetch_list(name):
    """What a model's download consists of -> lines to print; none for a folder."""
    source = hub_source(name)
    if not source:
        return []
    with asking(source, "model"):
        try:
            files = snapshot_download(**source, allow_patterns=WHOLE + SHARDS, dry_run=True)
        except DryRunError:
            return [f"download: the hub does not answer for {name}: its cache must have it"]
    if any(file.filename == SINGLE for file in files):
        files = [file for file in files if file.filename in WHOLE]
    commit = "".join({file.commit_hash for file in files})
    pinned = "" if source.get("revision") == commit else ", not pinned"
    size = sum(file.file_size for file in files if file.will_download) / 1e6
    names = ", ".join(sorted(file.filename for file in files))
    return [f"download: {size:,.0f} MB of {source['repo_id']} at {commit}{pinned}: {names}"]


def corpus_count(name, max_bytes):
    """How many of a corpus's files hold max_bytes of text."""
    return min(CORPORA[name].files, -(-max_bytes // CORPORA[name].text))


def corpus_paths(training):
    """The corpus option's files and folders. Of CORPORA as many files are fetched as hold
    training.bytes of text."""
    paths = []
    for name in training.corpus:
        if name in CORPORA:
            corpus, count = CORPORA[name], corpus_count(name, training.bytes)
            paths += [fetch_file(corpus.file.format(number), corpus.source, "corpus")
                      for number in range(count)]
        else:
            paths.append(TINY / "corpus.jsonl.gz" if name == "embedded" else Path(name))
    return paths
