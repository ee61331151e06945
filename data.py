"""From raw text to tasks: documents -> sentences -> token store -> clusters -> meta tasks (SUPMER,
arXiv 2303.12314, section 3.2 and A.2), and labeled few-shot data (section 4.1).

    tokenizer = load_tokenizer(folder, t5.config)
    store = build_store("cache", ["text/"], tokenizer, t5, clusters=250, seed=0, model=folder)
    index = TaskIndex(store, tokenizer)
    task = meta_task(index, seed=0, step=7, i=2, stream=1)    # the same for the same numbers
    batch = collate(task.support, range(32))

`python data.py` prints a small task of each variant as text; seconds; needs the model in tiny/.

A sentence is a number i; its tokens are tokens[offsets[i]:offsets[i + 1]] of a memory-mapped file.
A source is put together from token ids, never by tokenizing a joined string: no text can merge
with the mask, or be taken for it.

Letters: n sentences or examples, K clusters or label words, d d_model, B batch, T tokens,
V vectors that stand in place of tokens.
"""

import csv
import fcntl
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import re
import shutil
import string
import sys
import tarfile
import tempfile
import zipfile
import zlib
from array import array
from bisect import bisect_right
from collections import Counter
from contextlib import ExitStack
from http.client import HTTPException
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

import numpy as np
import torch
from huggingface_hub import (_CACHED_NO_EXIST, HfApi, hf_hub_download, logging,
                             try_to_load_from_cache)
from huggingface_hub.errors import (EntryNotFoundError, HFValidationError, HTTPError,
                                    LocalEntryNotFoundError, RepositoryNotFoundError,
                                    RevisionNotFoundError)
from tokenizers import Tokenizer
from torch import distributed
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from kmeans import kmeans, nearest
from t5 import (EOS, INDEX, PAD, SINGLE, InputError, check_file, embed_tokens, encode, load_t5,
                read_config, read_json, shard_names, weight_files)

TINY = Path(__file__).resolve().parent / "tiny"
MASK, UNK = "<extra_id_0>", 2       # <X> of the templates; the id that holds a vector's place
MAX_TOKENS = 412                    # of text; with 100 prompt vectors T5's 512 (Table 6)
FORMATS = ("sp", "mc", "ss")        # sentence pair, multi choice, single sentence: Eq. 17-19
CHOICE = "{0} ? A. {1} B. {2} C. {3} D. {4} . Answer: <X>"
TEMPLATES = {"sp": "{0} <X> . {1}", "mc": CHOICE, "ss": CHOICE}     # ss: vectors in {1}..{4}
WORDS = {"sp-next": ("yes", "no", "maybe"), "sp-cluster": ("yes", "no"),
         "mc-next": "ABCD", "mc-cluster": "ABCD", "ss-cluster": "ABCD"}
VARIANTS = tuple(WORDS)
# What stands beside the anchor. sp: one sentence, by label; mc: the right one, then the wrong ones.
RELATIONS = {"sp-next": ("next", "far", "near"), "sp-cluster": ("same", "other"),
             "mc-next": ("next", "near", "far", "far"),
             "mc-cluster": ("same", "other", "other", "other"), "ss-cluster": ()}


# --------------------------------------------------------------------------- documents, sentences
def corpus_files(paths):
    """Files and folders -> corpus files; of a folder, sorted, those whose ends READERS knows."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"{path} does not exist: give files or folders of text")
        inside = sorted(filter(Path.is_file, path.rglob("*") if path.is_dir() else [path]))
        found = [file for file in inside if file.name.endswith(tuple(READERS))]
        if parquet := next((file for file in inside if file.suffix == ".parquet"), None):
            raise InputError(f"{parquet}: parquet is not read; take the corpus's .tar or .json.gz, "
                             "or with pandas read_parquet(FILE).to_json(FILE + '.jsonl', "
                             "orient='records', lines=True)")
        if not found:
            raise InputError(f"{path}: no text there; files, or folders of files, must be"
                             f" {', '.join(READERS)}")
        files += found
    return files


LONGEST = 1 << 24           # bytes of a document or line that are held at a time
# What is raised for an archive that is not whole.
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, gzip.BadGzipFile,
          zipfile.BadZipFile)


def documents(paths, max_bytes=None, counts=None):
    """Stream the documents of files and folders as lists of paragraphs, until max_bytes were read.

    .txt: blank lines part documents, one paragraph each. .jsonl(.gz), .json.gz (C4's): a document a
    line, with `paragraphs` (a list) or `text` (a paragraph a line). .tar(.xz): OpenWebText's, .txt
    documents, or .xz files that each are a tar of them. Nothing is unpacked to the disk.
    a file "It rained.\\nWe left.\\n\\nThe sun rose." -> ["It rained. We left."], ["The sun rose."]
    counts: a Counter, receives "bytes", "broken UTF-8", lines that U+FFFD had to mend, and "long
    documents parted", texts that LONGEST made two or more of.
    InputError for what is no text, for wrong JSON (file and line), and for a damaged archive.
    """
    counts = Counter() if counts is None else counts
    for path in corpus_files(paths):
        read = next(READERS[end] for end in READERS if path.name.endswith(end))
        with open(path, "rb") as file:
            for paragraphs in _undamaged(read, file, path, counts):
                if max_bytes is not None and counts["bytes"] >= max_bytes:
                    return
                raw = [p.encode("utf-8", "replace") for p in paragraphs]    # JSON's lone surrogates
                counts["bytes"] += sum(map(len, raw))
                yield [p.decode() for p in raw]


def _undamaged(read, file, where, counts):
    """read's documents of an open file; where, for errors: its path, and its name in an archive."""
    try:
        yield from read(file, where, counts)
    except DAMAGE as error:
        raise InputError(f"{where} is damaged or incomplete ({error}): fetch it again") from None


def _decode(raw, where, counts):
    text = raw.decode("utf-8-sig", errors="replace")
    even, odd = (text[i::2].count("\0") for i in (0, 1))
    if max(even, odd) > max(4, len(text) // 4, 4 * min(even, odd)):     # UTF-16's every other byte
        raise InputError(f"{where}: NUL characters; give text in UTF-8")
    counts["broken UTF-8"] += "\0" in text or "\ufffd" in text and "\ufffd".encode() not in raw
    return text.replace("\0", "\ufffd")


def _read_txt(file, path, counts):
    lines, size = [], 0
    while raw := file.readline(LONGEST):
        line = _decode(raw, path, counts).strip()
        size += len(raw)
        counts["long documents parted"] += size >= LONGEST
        if line:
            lines.append(line)
        if size >= LONGEST or lines and not line:
            yield [" ".join(lines)]
            lines = []
        size *= bool(lines)
    if lines:
        yield [" ".join(lines)]


def _read_jsonl(file, path, counts):
    file = gzip.open(file) if path.suffix == ".gz" else file
    for number, raw in enumerate(iter(lambda: file.readline(LONGEST), b""), 1):
        where = f"{path}, line {number}"
        if len(raw) == LONGEST:
            raise InputError(f"{where}: {LONGEST:,} bytes or more; give a document a line")
        line = _decode(raw, where, counts)
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON ({error}); mend or drop it") from None
        record = record if isinstance(record, dict) else {}
        text = record.get("text")
        lines = text.split("\n") if isinstance(text, str) else None
        paragraphs = record.get("paragraphs", lines)
        if not isinstance(paragraphs, list) or not all(isinstance(p, str) for p in paragraphs):
            raise InputError(f"{where}: no `text` (a string) or `paragraphs` (a list of them): "
                             "mend or drop it")
        yield paragraphs


class Header(tarfile.TarInfo):
    """A member's header: a damaged one is no archive's end, and what is read whole because it is
    no file, such as a long name, is short."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        """As TarInfo's; ReadError."""
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None
        if header.size > 1 << 20 and not header.isfile():
            raise tarfile.ReadError(f"a header of {header.size:,} bytes")
        return header


def _read_tar(file, where, counts):
    kinds = set()
    with tarfile.open(fileobj=file, mode="r|*", tarinfo=Header) as archive:
        for member in filter(tarfile.TarInfo.isfile, archive):
            content, name = archive.extractfile(member), f"{where}, {member.name}"
            kind = Path(member.name).suffix
            kinds.add(kind)
            if kind == ".xz":
                yield from _undamaged(_read_tar, content, name, counts)
            elif kind == ".txt":
                for part, raw in enumerate(iter(lambda: content.read(LONGEST), b"")):
                    counts["long documents parted"] += part > 0
                    yield _decode(raw, name, counts).split("\n")
    if kinds.isdisjoint({".txt", ".xz"}):
        raise InputError(f"{where} has no document: its files must be .txt, or .xz tars of .txt")


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".jsonl.gz": _read_jsonl,
           ".json.gz": _read_jsonl, ".tar": _read_tar, ".tar.xz": _read_tar}
# A stop: . ! ? and the quotes and brackets that close after it, a space, and what opens the next.
STOP = re.compile(
    r"""(?<![.!?…])([.!?…]+)["'”’»)\]]*\s(?=["'“‘«(\[—–-]*\s?(\w+))""")
OPENING = "\"'“‘«([—–-"
TITLES = set("""mr mrs ms dr prof st messrs mme mlle rev hon gen col maj capt lt sgt gov sen rep
    pres fr mt vs cf viz e.g i.e eg ie approx ca adj adv vi vt syn esp""".split())  # never last
NUMBERED = set("no nos vol vols p pp fig figs ch sec art ed".split())   # not last before a number
CLOSERS = set("""etc al jr sr esq inc ltd co corp bros dept est ave blvd rd jan feb mar apr jun jul
    aug sept sep oct nov dec a.m p.m ph.d m.d b.a m.a b.c a.d""".split())   # last before a STARTER
STARTERS = set("""the a an this that these those he she it we they you i his her its our their my
    your there here but and or so yet for in on at by as if when while where what who why how then
    now after before once not no yes""".split())


def split_sentences(text):
    """A paragraph of English prose -> its sentences, white space normalized; by rules.
    'Mr. J. R. Fox paid 3.14 dollars. "Why?" he said. (He left.) Yes!' ->
    ['Mr. J. R. Fox paid 3.14 dollars.', '"Why?" he said.', '(He left.)', 'Yes!']"""
    text = " ".join(text.split())
    sentences, start = [], 0
    for match in STOP.finditer(text):
        if _ends_sentence(text, start, match):
            sentences.append(text[start:match.end() - 1])
            start = match.end()
    return sentences + [text[start:]] if text[start:] else sentences


def _ends_sentence(text, start, match):
    """Does the sentence that begins at start end with this STOP?"""
    stop, following = match.groups()
    if following[0].islower() or stop != ".":
        return not following[0].islower()
    begin = max(start, text.rfind(" ", start, match.start()) + 1)
    word = text[begin:match.start()].lstrip(OPENING).lower()        # its inner stops too: u.s, e.g
    if word in TITLES or (word in NUMBERED and following[0].isdigit()):
        return False                                                # "Dr. Fox", "No. 5"
    if begin == start and word.isdigit():
        return False                                                # "1. The first point."
    initials = all(len(part) == 1 and part.isalpha() for part in word.split("."))   # j, u.s
    return following.lower() in STARTERS if initials or word in CLOSERS else True


# --------------------------------------------------------------------------- tokens and templates
class Examples(NamedTuple):
    """n classification examples with the same label words, as the encoder will read them."""
    ids: list[list[int]]      # <extra_id_0> exactly once, </s> last
    slots: list[list[int]]    # the V positions in ids where a vector stands in place of a token
    vectors: torch.Tensor     # (n, V, d) float32; (n, 0, d) or (n, 0, 0) where there are none
    labels: torch.Tensor      # (n,) long, index into words
    words: list[list[int]]    # K decoder targets [<extra_id_0>, piece, ...]


class Batch(NamedTuple):
    """Rows of Examples as padded tensors."""
    ids: torch.Tensor         # (B, T) long
    mask: torch.Tensor        # (B, T) bool, false at padding
    slots: torch.Tensor       # (B, V) long
    vectors: torch.Tensor     # (B, V, d)
    targets: torch.Tensor     # (B, K) float32, one-hot


def collate(examples, rows, device="cpu"):
    """The given rows of Examples as a Batch, padded to the longest of them.
    ids [[7, 9, 1], [8, 1]] -> ids [[7, 9, 1], [8, 1, 0]], mask [[T, T, T], [T, T, F]]"""
    rows = list(rows)
    ids, mask = padded([examples.ids[r] for r in rows])                             # (B, T)
    slots = torch.tensor([examples.slots[r] for r in rows], dtype=torch.long)       # (B, V)
    targets = torch.eye(len(examples.words))[examples.labels[rows]]                 # (B, K)
    return Batch(*(x.to(device) for x in (ids, mask, slots, examples.vectors[rows], targets)))


def padded(sentences):
    """Token ids of B sentences -> ids (B, T) long, mask (B, T) bool, false at padding."""
    ids = pad_sequence([torch.from_numpy(np.array(sentence, dtype=np.int64))
                        for sentence in sentences], batch_first=True, padding_value=PAD)
    return ids, torch.arange(ids.shape[1]) < torch.tensor([[len(s)] for s in sentences])


def load_tokenizer(folder, config):
    """The tokenizer.json of a model folder. InputError if it is not this T5Config's vocabulary."""
    path = tokenizer_file(folder)
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        tokenizer.encode("\ue000")          # one without <unk> fails when it is wanted
    except BaseException as error:  # the tokenizers package raises nothing more precise, or panics
        if isinstance(error, KeyboardInterrupt):
            raise
        raise InputError(f"{path} is not a tokenizer ({error}): fetch it again") from None
    ids = [tokenizer.token_to_id(piece) for piece in ("<pad>", "</s>", "<unk>", MASK)]
    if ids[:3] != [PAD, EOS, UNK] or ids[3] is None:
        raise InputError(f"{path}: <pad>, </s>, <unk> must be 0, 1, 2, with {MASK}: take a T5's")
    size, rows = max(tokenizer.get_vocab().values()) + 1, config.vocab_size
    if not size <= rows < min(size + 128, 2**16):   # T5 pads its rows to 128s; we store 16 bits
        raise InputError(f"{path} has {size} pieces, the model {rows} embeddings (at most 65,535):"
                         " take the tokenizer.json and the weights of one model")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenize(tokenizer, texts):
    """Texts -> token ids, no </s>. Markers written in a text (`</s>`, `<extra_id_0>`) are left out.
    ["That is good."] -> [[466, 19, 207, 5]] at T5"""
    added = tokenizer.get_added_tokens_decoder()
    markers = {id for id, token in added.items() if token.special} - {UNK}
    encoded = (e.ids for e in tokenizer.encode_batch(list(texts), add_special_tokens=False))
    return [ids if markers.isdisjoint(ids) else [id for id in ids if id not in markers]
            for ids in encoded]


def decoder_targets(tokenizer, words):
    """K label words -> what the decoder is asked for (Eq. 1); pieces are word-initial.
    ["yes"] -> [[32099, 4273]], <extra_id_0> and a piece, at T5. InputError if one is <unk>."""
    pieces = tokenize(tokenizer, words)
    for word, ids in zip(words, pieces):
        if not ids or UNK in ids:
            raise InputError(f"label word {word!r} is not in the model's vocabulary: choose "
                             "another")
    return [[tokenizer.token_to_id(MASK), *ids] for ids in pieces]


def compile_template(tokenizer, template):
    """A template as parts: ids of what is literal, names of what is not. InputError unless one <X>.
    "{text} It was <X> ?" -> ["text", [94, 47], [32099], [3, 58]] at T5"""
    if template.count("<X>") != 1:
        raise InputError(f"the template {template!r} must hold the mask <X> exactly once")
    parts = [part for part in re.split(r"(\{\w+\}|<X>)", template) if part.strip()]
    return [[tokenizer.token_to_id(MASK)] if part == "<X>" else
            part[1:-1] if part[0] == "{" else tokenize(tokenizer, [part])[0] for part in parts]


def fill_template(parts, fields, max_tokens=MAX_TOKENS):
    """Put texts into a compiled template -> (ids, slots).
    fields: name -> token ids, or None where a vector is to stand (its position goes to slots). Of a
    source too long the LONGEST texts are cut, to one length; template and mask never are.
    ["a", [5], "b"], {"a": [7, 8, 9], "b": [4]}, max_tokens 5 -> [7, 8, 5, 4, 1], []"""
    lengths = [len(fields[p]) for p in parts if isinstance(p, str) and fields[p] is not None]
    fixed = sum(1 if isinstance(p, str) else len(p) for p in parts) - len(lengths) + 1    # and </s>
    budget = max_tokens - fixed
    if budget < len(lengths):
        raise InputError(f"a template of {fixed} tokens leaves no room in {max_tokens}: "
                         "shorten it, or allow more tokens")
    caps = range(max(lengths, default=0) + 1)       # the largest cap that keeps within the budget:
    cap = bisect_right(caps, budget, key=lambda c: sum(min(n, c) for n in lengths)) - 1
    ids, slots = [], []
    for part in parts:
        if isinstance(part, str) and fields[part] is None:
            slots.append(len(ids))
            ids.append(UNK)
        else:
            ids += fields[part][:cap] if isinstance(part, str) else part
    return ids + [EOS], slots


def examples_as_text(tokenizer, examples, row, clusters=()):
    """One example, to be read: (source, target); a vector is [vector], or its cluster if given.

    ("It rained. <extra_id_0> . We left.</s>", "yes") or ("It rained. ? A. [centroid 3] B. ..", "C")
    """
    ids, slots = list(examples.ids[row]), examples.slots[row]
    names = {MASK: MASK}
    for v, slot in enumerate(slots):
        ids[slot] = tokenizer.token_to_id(f"<extra_id_{v + 1}>")    # something that decode keeps
        names[f"<extra_id_{v + 1}>"] = f"[centroid {clusters[v]}]" if clusters else "[vector]"
    text = tokenizer.decode(ids, skip_special_tokens=False)
    for marker, name in names.items():
        text = text.replace(marker, f" {name} ")
    target = tokenizer.decode(examples.words[int(examples.labels[row])][1:])
    return " ".join(text.split()).replace(" </s>", "</s>"), target


# --------------------------------------------------------------------------- several processes
class Ranks(NamedTuple):
    """The processes that share a run's work, as torchrun starts them; without it this one alone.
    All call the same methods in the same order. patient: a process group whose barrier may take
    hours; the others give up after torch.distributed's time limit, with an InputError."""
    rank: int = 0
    world: int = 1
    patient: object = None

    def share(self, items):
        """This rank's of the items: every world-th one."""
        return islice(items, self.rank, None, self.world)

    def all_sum(self, *tensors):
        """Each tensor's sum over the ranks, added up in float64."""
        if self.world == 1:
            return tensors
        total = torch.cat([x.detach().double().flatten() for x in tensors])
        self._together(distributed.all_reduce, total)
        parts = total.split([x.numel() for x in tensors])
        return [part.view(x.shape).to(x.dtype) for part, x in zip(parts, tensors)]

    def gather(self, value):
        """What each rank calls this with, in their order."""
        values = [value] * self.world
        if self.world > 1:
            self._together(distributed.all_gather_object, values, value)
        return values

    def agree(self, value):
        """Whether all call this with the same."""
        return len(set(self.gather(value))) == 1

    def wait(self):
        """Until all have come here, however long one of them works alone."""
        if self.world > 1:
            self._together(distributed.barrier, self.patient)

    def _together(self, function, *arguments):
        try:
            function(*arguments)
        except RuntimeError as error:
            raise InputError(f"rank {self.rank}: another rank ended or hangs, see what it said "
                             f"({_reason(error).split('. ')[0]})") from None


SOLO = Ranks()


# --------------------------------------------------------------------------- the store on disk
SHORT = 4                   # tokens; see join_short
SAMPLE = 256                # sentences per centroid that K-means sees
SLICE = 1 << 13             # sentences, of whole documents, that are tokenized together
SAVED = 1 << 24             # tokens between saved states of the text
CHUNK = 1 << 14             # sentences that are sorted by length together, and saved together
BATCH_TOKENS = {"cpu": 1 << 9, "cuda": 1 << 17}     # embedded together; a CPU's cache likes few
# Plain numbers, each a file NAME.bin and its type; see Store. keys, shares: only while it is made.
COLUMNS = {"tokens": "H", "offsets": "q", "first": "q", "label": "h", "held_out": "?",
           "anchor": "?", "cluster": "i", "order": "I", "keys": "Q", "shares": "d"}
TEXT = ("tokens", "offsets", "first", "label", "keys", "shares")    # what _write_text appends to
# What two and five classes are called whose labels are mere numbers.
SENTIMENT = {2: ("terrible", "great"), 5: ("terrible", "bad", "okay", "good", "great")}


class Store(NamedTuple):
    """A corpus as sentences and their clusters, in a folder; the arrays are mapped, not read."""
    folder: Path
    tokens: np.ndarray      # (all tokens) uint16
    offsets: np.ndarray     # (n + 1,) int64: where in tokens a sentence begins
    first: np.ndarray       # (documents,) int64: each one's first sentence
    held_out: np.ndarray    # (n,) bool: its document is kept for validation tasks
    anchor: np.ndarray      # (n,) bool: no earlier sentence has the same text
    cluster: np.ndarray     # (3, n) int32, a row for each of FORMATS, or one that is all three
    centroids: np.ndarray   # (3, K, d) float32
    order: np.ndarray       # (3, anchors) uint32 and
    bounds: np.ndarray      # (3, 4 K + 1) int64: see group_anchors
    label: np.ndarray       # (n,) int16 in a labeled set; else empty
    meta: dict              # "made_of": fingerprints and "options"; "counts"

    def sentence(self, i):
        """Its tokens (T,) uint16."""
        return self.tokens[self.offsets[i]:self.offsets[i + 1]]


def open_store(folder, made_of=None):
    """Open a store. InputError if it is damaged or, made_of given, was made of something else."""
    folder = Path(folder)
    try:
        meta = read_json(folder / "meta.json")
        columns = {name: _column(folder, name) for name in COLUMNS if name in Store._fields}
        columns |= {name: np.load(folder / f"{name}.npy") for name in ("centroids", "bounds")}
        n, rows = len(columns["offsets"]) - 1, len(columns["bounds"])
        sizes = {"tokens": columns["offsets"][-1], "first": meta["counts"]["documents"],
                 "held_out": n, "anchor": n, "cluster": rows * n,
                 "order": columns["bounds"][:, -1].sum()}
        if any(len(columns[name]) != size for name, size in sizes.items()) or (
                np.diff(columns["bounds"]) < 0).any():
            raise ValueError("its files do not fit together")
        other = [key for key in made_of or () if meta["made_of"][key] != made_of[key]]
    except Exception as error:      # a damaged file raises almost anything
        raise InputError(f"{folder} is not a whole store ({error}): delete it") from None
    if other:
        raise InputError(f"{folder} was built with another {', another '.join(other)}: delete it")
    columns["cluster"] = columns["cluster"].reshape(n, rows).T
    columns["order"] = columns["order"].reshape(rows, -1)
    for name in ("cluster", "order", "centroids", "bounds"):    # one clustering serves all formats
        columns[name] = np.broadcast_to(columns[name], (len(FORMATS), *columns[name].shape[1:]))
    return Store(folder, **columns, meta=meta)


def _column(folder, name):
    path = folder / f"{name}.bin"
    kind, empty = np.dtype(COLUMNS[name]), not path.stat().st_size     # nothing cannot be mapped
    return np.zeros(0, kind) if empty else np.memmap(path, kind, "r")


def build_store(cache, paths, tokenizer, t5, clusters, seed, *, model, max_bytes=None,
                one_per_format=False, embed=None, progress=lambda stage, done, total: None,
                ranks=SOLO):
    """Text files -> Store: sentences, K-means clusters of their embeddings (section 3.2, Eq. 16).

    A store is a folder in cache, named by all that it is made of; the same one is made once only.
    What is there of it after a kill is gone on with: each SAVED tokens of text, centroids, each
    CHUNK of assignments. A second process that wants it waits for the first.
    clusters: K; one clustering serves the three formats, or one_per_format has three, of seed,
    seed + 1, seed + 2. model: the folder that holds tokenizer and t5, to be fingerprinted.
    embed(ids (B, T), mask (B, T)) -> (B, d) may replace t5's embedding.
    5 % of the documents, two at least (a pair from different documents needs two), are held out;
    K-means sees a sample of the others. progress(stage, done, total or None): called now and then.
    ranks share the embedding; all must see cache. Memory: SAMPLE * K embeddings, and while it
    groups 20 bytes a sentence. InputError for too small a corpus.
    """
    def read(counts):
        return ((hash_share(text), [s for paragraph in text for s in split_sentences(paragraph)],
                 None) for text in documents(files, max_bytes, counts))
    files = corpus_files(paths)
    inside = chain.from_iterable(Path(path).rglob("*") for path in paths)
    unread = sorted(file.name for file in {*filter(Path.is_file, inside)} - {*files})
    if unread:
        progress(f"not read, {len(unread)} other file(s): {', '.join(unread)}", 0, None)
    options = {"clusters": clusters, "seed": seed, "max_bytes": max_bytes,
               "one_per_format": one_per_format}
    return _build(cache, files, read, options, tokenizer, t5, model, embed, progress, ranks)


def build_labeled(cache, path, tokenizer, t5, clusters, seed, *, model, embed=None,
                  progress=lambda stage, done, total: None, ranks=SOLO):
    """A labeled file, of `label` and `text` as read_table has them -> Store, as build_store's.
    A sentence of it is a whole text, cut at MAX_TOKENS, and a document; `label` is the place of its
    word in meta["made_of"]["options"]["words"]. The file's labels are those words, or integers of
    two or five values, which are SENTIMENT's in rising order."""
    path = Path(path)
    labels = {row[0] for _, row in read_table(path, ("label", "text")) if row and row[0]}
    numbers = all(re.fullmatch(r"\d+", label) for label in labels)
    places = sorted(labels, key=int if numbers else None)
    words = list(SENTIMENT.get(len(labels), ())) if numbers else places
    if len(words) < 2:
        raise InputError(f"{path} has the labels {', '.join(sorted(labels)[:9])}: write two "
                         "label words or more, or numbers of two or five classes of sentiment")
    task = LabeledTask("", "", words=tuple(words), labels=tuple(places))

    def read(counts):
        for label, fields in read_rows(path, task):
            counts["bytes"] += len(fields["text"].encode())
            yield hash_share([fields["text"]]), [fields["text"]], label
    options = {"words": words, "clusters": clusters, "seed": seed}
    return _build(cache, [path], read, options, tokenizer, t5, model, embed, progress, ranks)


def _build(cache, files, read, options, tokenizer, t5, model, embed, progress, ranks):
    """Find or make the store of what read(counts) yields of files: (hash_share, [sentence], label
    or None), see build_store."""
    clusters, rows = options["clusters"], len(FORMATS) if options.get("one_per_format") else 1
    seeds = [options["seed"] + row for row in range(rows)]
    made_of = {"corpus": fingerprint(files), "model": model_fingerprint(model),
               "tokenizer": fingerprint([tokenizer_file(model)]), "options": options}
    name = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    ranks.wait()
    if not ranks.agree(name):
        raise InputError("the ranks have different corpora, models or options: give all the same")
    folder, new = Path(cache, name), Path(cache, f".building-{name}")
    with ExitStack() as stack:
        if ranks.rank == 0 and not folder.exists():
            new.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(new / "lock", lambda owner: progress(
                f"waiting for process {owner}, which makes the same store", 0, None)))
            for torn in new.glob(".*.tmp"):     # a write that a kill cut off
                torn.unlink()
            if folder.exists():                 # made meanwhile
                shutil.rmtree(new, ignore_errors=True)
            elif not (new / "lock").exists():
                raise InputError("the process that was making this store gave up: see its message")
        ranks.wait()
        if not ranks.gather(folder.exists())[0]:
            if ranks.rank == 0:
                try:
                    counts = _write_text(new, read, tokenizer, progress)
                    _choose(new, clusters, counts)
                except InputError:      # it would come again: nothing here is of use
                    shutil.rmtree(new)
                    raise
            ranks.wait()
            _cluster(new, clusters, seeds, t5, embed, progress, ranks)
            if ranks.rank == 0:
                _group(new, clusters, rows, progress)
                text = json.dumps({"made_of": made_of, "counts": counts}, indent=1)
                atomic_write(new / "meta.json", lambda file: file.write(text.encode()))
                os.rename(new, folder)
    for file in ("keys.bin", "shares.bin", "read.json", "lock") if ranks.rank == 0 else ():
        (folder / file).unlink(missing_ok=True)         # an earlier process was killed before that
    ranks.wait()
    made = [folder / file for file in ("meta.json", "centroids.npy", "order.bin")]
    if ranks.world > 1 and not ranks.agree(folder.exists() and fingerprint(made)):
        raise InputError(f"{folder} is not the same for all ranks: put cache/ on a disk that they "
                         "share, or copy it to each machine")
    return open_store(folder, made_of)


def hash_share(paragraphs):
    """A document's place in [0, 1), uniform, by sha256 of its text: the same in every corpus.
    ["It rained."] -> 0.5..."""
    digest = hashlib.sha256("\n".join(paragraphs).encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8]) / 2 ** 64


def hold_out(shares):
    """The documents to hold out, 5 % but two at least, those of the lowest hash_share -> bool."""
    chosen = np.zeros(len(shares), dtype=bool)
    chosen[np.argsort(shares, kind="stable")[:max(2, round(0.05 * len(shares)))]] = True
    return chosen


def _choose(folder, clusters, counts):
    """Choose held-out documents and, of equal sentences, the first as an anchor: writes held_out
    and anchor."""
    keys, first, shares = (_column(folder, name) for name in ("keys", "first", "shares"))
    chosen, anchor = hold_out(shares), np.zeros(len(keys), dtype=bool)
    counts["documents held out"] = int(chosen.sum())
    for part in range(16):          # a sixteenth of the keys at a time, to be sorted
        rows = np.flatnonzero(keys % 16 == part)
        anchor[rows[np.unique(keys[rows], return_index=True)[1]]] = True
    held_out = np.repeat(chosen, np.diff(first, append=len(keys)))
    different = int((anchor & ~held_out).sum())
    if different < clusters or len(first) < 4:
        raise InputError(f"the corpus has {len(keys)} sentences in {len(first)} documents, of them "
                         f"{different} different ones to train on; {clusters} clusters and 4 "
                         "documents are wanted: give more text, or fewer clusters")
    for name, values in (("held_out", held_out), ("anchor", anchor)):
        atomic_write(folder / f"{name}.bin", lambda file: file.write(values))


def join_short(sentences):
    """Join a document's sentences of fewer than SHORT tokens to the next, at its end to the last.

    "Yes." or "I." says too little to be embedded, but dropping it would make false neighbours.
    [[7, 5], [1, 2, 3, 4], [6, 7, 8, 9], [3]] -> [[7, 5, 1, 2, 3, 4], [6, 7, 8, 9, 3]]; [[3]] -> []
    """
    joined, waiting = [], []
    for ids in sentences:
        waiting = waiting + ids
        if len(waiting) >= SHORT:
            joined.append(waiting)
            waiting = []
    return joined[:-1] + [joined[-1] + waiting] if joined else []


def _write_text(folder, read, tokenizer, progress):
    """Append the sentences of what read(counts) yields to the TEXT columns -> counts.
    After each SAVED tokens read.json says what they hold of how many documents: the next call reads
    those again, for it must, but does not tokenize them."""
    path, counts = folder / "read.json", Counter()
    try:
        whole, done, sizes, kept = read_json(path) if path.exists() else (False, 0, {}, {})
    except (ValueError, TypeError) as error:        # InputError, too
        raise InputError(f"{path} is damaged ({error}), so all is dropped that there was of this "
                         "store: start again") from None
    with ExitStack() as stack:
        columns = {name: stack.enter_context(open(folder / f"{name}.bin", "ab")) for name in TEXT}
        for name, file in columns.items():
            if file.tell() < sizes.get(name, 0):
                raise InputError(f"{file.name} has lost what it held, so all is dropped that there "
                                 "was of this store: start again")
            file.truncate(sizes.get(name, 0))
        if not sizes:
            columns["offsets"].write(array("q", [0]))

        def save(whole):
            for file in columns.values():
                file.flush()
                os.fsync(file.fileno())
            sizes = {name: os.path.getsize(file.name) for name, file in columns.items()}
            state = json.dumps([whole, done, sizes, counts]).encode()
            atomic_write(path, lambda file: file.write(state))

        def tell():
            progress("reading text, bytes", counts["bytes"], None)
        items = iter(()) if whole else read(counts)
        for _ in islice(items, done):
            tell()
        counts.clear()
        counts.update(kept)     # the saved counts, not those of the documents just read again
        tell()
        while group := list(_next_documents(items)):
            encoded = iter(tokenize(tokenizer, chain.from_iterable(texts for _, texts, _ in group)))
            for share, texts, label in group:
                sentences = list(islice(encoded, len(texts)))
                for name, values in _document(share, sentences, label, counts):
                    columns[name].write(array(COLUMNS[name], values))
            done += len(group)
            tell()
            if counts["tokens"] - kept.get("tokens", 0) >= SAVED:
                kept = dict(counts)
                save(False)
        save(True)
    return counts


def _next_documents(items):
    """The next documents of an iterator that have SLICE sentences, an empty one counted as one:
    what the tokenizer gets in one call, for all cores to share."""
    sentences = 0
    while sentences < SLICE and (item := next(items, None)):
        sentences += max(1, len(item[1]))
        yield item


def _document(share, sentences, label, counts):
    """What a document appends to the TEXT columns -> pairs: name, values; counts go on."""
    joined = join_short(sentences) if label is None else list(filter(None, sentences))
    counts["short sentences joined"] += len(sentences) - len(joined)
    if not joined:
        counts["empty documents"] += 1
        return
    counts["long sentences cut"] += sum(len(ids) > MAX_TOKENS for ids in joined)
    joined = [array("H", ids[:MAX_TOKENS]) for ids in joined]
    yield "first", [counts["sentences"]]
    yield "shares", [share]
    for tokens in joined:
        counts["tokens"] += len(tokens)
        yield "tokens", tokens
        yield "offsets", [counts["tokens"]]
        yield "keys", [int.from_bytes(hashlib.blake2b(tokens, digest_size=8).digest())]
    if label is not None:
        yield "label", [label]
    counts["sentences"] += len(joined)
    counts["documents"] += 1


def embed_sentences(t5, ids, mask):
    """ids, mask (B, T) -> (B, d): the mean over a sentence's tokens of the encoder's last states.
    Without prompt and </s>; the paper does not say."""
    device = t5.weights["shared.weight"].device
    ids, mask = ids.to(device), mask.to(device)[..., None]                          # (B, T, 1)
    with torch.no_grad():
        H = encode(t5, embed_tokens(t5, ids), mask[..., 0])                         # (B, T, d)
        return torch.where(mask, H, 0).sum(1) / mask.sum(1)                         # (B, d)


def _embedded(tokens, offsets, rows, embed, budget, ranks=SOLO):
    """Embed the sentences `rows`, sorted by length -> pairs: their positions in rows, (B, d). The
    ranks take the batches in turn: each is the same, to the bit, however many they are."""
    def batches():
        for begin in range(0, len(rows), CHUNK):
            part = rows[begin:begin + CHUNK]
            lengths = offsets[part + 1] - offsets[part]
            order = np.argsort(lengths, kind="stable")
            while len(order):       # lengths rise: the last sentence of a batch sets its width
                padded = lengths[order[:budget]] * np.arange(1, len(order[:budget]) + 1)
                size = max(1, np.searchsorted(padded, budget, "right"))
                yield begin + order[:size]
                order = order[size:]
    for batch in ranks.share(batches()):
        yield batch, embed(*padded([tokens[offsets[i]:offsets[i + 1]] for i in rows[batch]]))


def _cluster(folder, clusters, seeds, t5, embed, progress, ranks):
    """Fit K-means on a sample of training sentences, one for each seed, and assign all: writes
    centroids.npy, shared (seeds, K, d), and cluster, (n, seeds), of which what is there is kept."""
    tokens, offsets, held_out, anchor = (_column(folder, name) for name in (
        "tokens", "offsets", "held_out", "anchor"))
    n, path = len(anchor), folder / "centroids.npy"
    embed = embed or (lambda ids, mask: embed_sentences(t5, ids, mask))
    budget = BATCH_TOKENS[t5.weights["shared.weight"].device.type if t5 else "cpu"]

    def embedded(stage, rows, done, total):
        progress(stage, done, total)
        for positions, H in _embedded(tokens, offsets, rows, embed, budget, ranks):
            yield positions, H
            done += len(H) * ranks.world
            progress(stage, min(done, total), total)
    if not ranks.gather(path.exists())[0]:
        training = np.flatnonzero(anchor & ~held_out)
        size = min(len(training), SAMPLE * clusters)
        sample = np.random.default_rng((seeds[0], 0, 0, 2)).choice(training, size, replace=False)
        _, H = next(_embedded(tokens, offsets, sample[:1], embed, budget))      # d, where it is
        points = H.new_zeros(size, H.shape[1])
        for positions, H in embedded("embedding a sample", sample, 0, size):
            points[torch.from_numpy(positions).to(H.device)] = H
        points = torch.cat([ranks.all_sum(part)[0] for part in points.split(CHUNK)])
        if not points.isfinite().all():
            raise InputError("sentence embeddings are not finite: the model's weights are damaged")
        if ranks.rank == 0:
            progress("K-means", 0, size)
            fitted = torch.stack([kmeans(points, clusters, seed).centroids for seed in seeds])
            atomic_write(path, lambda file: np.save(file, fitted.float().cpu().numpy()))
            progress("K-means", size, size)
        ranks.wait()
    try:
        centroids = torch.from_numpy(np.load(path))
    except Exception as error:      # a damaged file raises almost anything
        raise InputError(f"{path} is damaged ({error}): delete {folder}") from None
    with open(folder / "cluster.bin", "ab") as file:        # only rank 0 writes
        row = 4 * len(seeds)                        # bytes
        done = ranks.gather(min(file.tell() // row // CHUNK * CHUNK, n))[0]
        if ranks.rank == 0:
            file.truncate(row * done)
        while done < n:
            rows = np.arange(done, min(done + CHUNK * ranks.world, n))
            found = torch.zeros(len(rows), len(seeds), dtype=torch.int64)
            for positions, H in embedded("assigning clusters", rows, done, n):
                for column, c in enumerate(centroids.to(H)):
                    found[positions, column] = nearest(H, c)[0].cpu()
            found = ranks.all_sum(found)[0].int().numpy()
            done += len(found)
            if ranks.rank == 0:
                file.write(found)
                file.flush()
                os.fsync(file.fileno())


def _group(folder, clusters, rows, progress):
    """Writes order and bounds for each of the `rows` clusterings."""
    first, held_out, anchor, cluster = (_column(folder, name) for name in (
        "first", "held_out", "anchor", "cluster"))
    progress("grouping", 0, None)
    orders, bounds = zip(*(group_anchors(row, held_out, anchor, first, clusters)
                           for row in cluster.reshape(-1, rows).T))
    atomic_write(folder / "order.bin", lambda file: file.writelines(orders))
    atomic_write(folder / "bounds.npy", lambda file: np.save(file, np.stack(bounds)))
    progress("grouping", len(anchor), len(anchor))


def group_anchors(cluster, held_out, anchor, first, K):
    """A store's columns, one clustering -> order (anchors,) uint32, bounds (4 K + 1,) int64.
    order[bounds[k]:bounds[k + 1]] are the anchors, in rising order, of group k: the training ones
    of cluster 0 that next-sentence variants can use (one follows in the document, and that has 4 or
    more), its others, those of cluster 1, ...; from 2 K on the held-out ones."""
    ends = np.append(first[1:], len(anchor))
    followed = np.repeat(ends - first >= 4, ends - first)
    followed[ends - 1] = False
    group = 2 * (held_out * np.int32(K) + cluster) + ~followed
    group[~anchor] = 4 * K                  # the last one, which is left away
    order = np.argsort(group, kind="stable")[:anchor.sum()].astype(np.uint32)
    return order, np.cumsum([0, *np.bincount(group, minlength=4 * K)[:4 * K]])


# --------------------------------------------------------------------------- meta tasks
class Task(NamedTuple):
    """An anchor meta task tau with support set D^s and query set D^q (section 3.2)."""
    variant: str
    clusters: tuple[int, ...]       # of its anchors: one, or in ss four in the options' order
    support: Examples
    query: Examples


class Pool(NamedTuple):
    """One split's anchors by cluster, in each first those that next-sentence variants can use."""
    order: np.ndarray               # mapped; cluster c has order[start[c]:start[c + 1]]
    start: np.ndarray               # (K + 1,)
    count: dict[str, np.ndarray]    # "next", "cluster" -> (K,) how many of a cluster are usable


class TaskIndex:
    """What drawing a task needs, made once, so that a task costs the same whatever the corpus.

    support, query: the sets' sizes; variants: those that meta_task draws from; max_tokens: the
    longest source; recast: {variant: (template, words)} to put in place of its own (Unified-PPT);
    mixing: training tasks will have partners of other clusters. A cluster is usable with support +
    query anchors: sentences of different text, for next-sentence variants not the last of their
    document, and that of 4 or more. InputError, with what each cluster lacks, unless a variant has
    a usable one (ss: four; training ones of mixing: two) in training and held-out documents.
    """

    def __init__(self, store, tokenizer, *, support=32, query=32, variants=VARIANTS,
                 max_tokens=MAX_TOKENS, recast={}, mixing=False):
        self.store, self.sizes, self.max_tokens = store, (support, query), max_tokens
        self.variants = tuple(variants)
        cast = {v: (TEMPLATES[v[:2]], WORDS[v]) for v in VARIANTS} | recast
        self.parts = {v: compile_template(tokenizer, template) for v, (template, _) in cast.items()}
        self.words = {v: decoder_targets(tokenizer, words) for v, (_, words) in cast.items()}
        if any(len(word) != 2 for words in self.words.values() for word in words):
            raise InputError("yes, no, maybe, A, B, C, D must be a piece each: take T5's tokenizer")
        self.first = np.append(store.first, len(store.anchor))
        if self.first[0] or (np.diff(self.first) < 1).any():
            raise InputError(f"{store.folder} is damaged: delete it")
        held_out, K = store.held_out[store.first], store.centroids.shape[1]
        self.documents, self.pools, self.usable = {}, {}, {}
        for half, split, chosen in ((0, "train", ~held_out), (1, "validation", held_out)):
            rows = np.flatnonzero(chosen)
            lengths = self.first[rows + 1] - self.first[rows]
            self.documents[split] = rows, np.concatenate([[0], np.cumsum(lengths)])
            for order, bounds, form in zip(store.order, store.bounds, FORMATS):
                bounds = bounds[2 * K * half:2 * K * (half + 1) + 1]
                sizes = np.diff(bounds)
                self.pools[split, form] = Pool(
                    order[bounds[0]:bounds[-1]], bounds[::2] - bounds[0],
                    {"next": sizes[::2], "cluster": sizes[::2] + sizes[1::2]})
            for variant in self.variants:
                pool, kind = self.pools[split, variant[:2]], variant[3:]
                lacking = np.maximum(sum(self.sizes) - pool.count[kind], 0)
                self.usable[split, variant] = _usable(
                    f"{variant}: {split} sentences", lacking, f"{sum(self.sizes)} usable ones",
                    4 if variant[:2] == "ss" else 1 + (mixing and split == "train"))
                if kind == "cluster" and len(pool.order) - pool.count[kind].max() < 3:
                    raise InputError(f"one cluster holds all {split} sentences: ask for more "
                                     "clusters")


def _usable(what, lacking, wanted, least):
    """The clusters that lack nothing. InputError, with what each one lacks, if they are fewer than
    least."""
    usable = np.flatnonzero(lacking == 0)
    if len(usable) < least:
        remedy = "fewer clusters" if len(lacking) >= least else f"{least} clusters or more"
        raise InputError(f"{what}: at least {least} cluster(s) must have {wanted}, each one lacks "
                         f"{', '.join(map(str, lacking))}: give more data, or ask for {remedy}")
    return usable


def meta_task(index, seed, step, i, *, variant=None, split="train", stream, avoid=()):
    """Task i of a step, a pure function of its arguments (section 3.2, A.2; Eq. 17-19).

    variant None draws one of the index's. stream, from 1: keeps uses of one (seed, step, i) apart.
    avoid: the `clusters` of another task, which this one, its partner in Eq. 4, is not to have too.
    All sentences are of the split. Anchors (s1 of a pair, s0 of a choice) are of ONE cluster, in ss
    of four; labels are balanced in each set; the sets share no anchor. Sources -> targets:
    sp-next     s1 <X> . s2                                  yes: adjacent, no: another document,
                                                             maybe: its document, not adjacent
    sp-cluster  the same                                     yes: same cluster, no: another
    mc-next     s0 ? A. s1 B. s2 C. s3 D. s4 . Answer: <X>   the letter of the sentence after s0
    mc-cluster  the same                                     the letter of the one of s0's cluster
    ss-cluster  the same, s1..s4 four centroids, as vectors  the letter of s0's
    """
    rng = np.random.default_rng((seed, step, i, stream))
    drawn = index.variants[rng.integers(len(index.variants))]
    variant = variant or drawn
    form, kind, ways = variant[:2], variant[3:], 4 if variant[:2] == "ss" else 1
    pool, clusters = index.pools[split, form], tuple(avoid)
    usable = index.usable[split, variant]
    if ways == 1 and usable.tolist() == list(avoid):
        raise InputError(f"{variant}: one usable {split} cluster, mixing needs two: give more text")
    while clusters == tuple(avoid):
        clusters = tuple(rng.choice(usable, ways, replace=False).tolist())
    anchors = [_shuffled(rng, pool.order[pool.start[c]:][:pool.count[kind][c]]) for c in clusters]
    sets = [_examples(index, rng, variant, split, clusters, anchors, n) for n in index.sizes]
    return Task(variant, clusters, *sets)


def _shuffled(rng, items):
    """Yield the items in random order; a few cost the same however many there are."""
    seen = set()
    while len(seen) < len(items):
        j = int(rng.integers(len(items)))
        if j not in seen:
            seen.add(j)
            yield int(items[j])


def _outside(rng, low, high, size):
    """A random one of 0..size - 1 that is not in low..high - 1."""
    j = int(rng.integers(size - (high - low)))
    return j if j < low else j + int(high - low)


def _balanced(rng, K, n):
    """n labels of K classes in random order, as many of each or one more: 32 of 3: 11, 11, 10."""
    extra = rng.permutation(K)[:n % K]
    return rng.permutation(np.append(np.repeat(np.arange(K), n // K), extra))


def _examples(index, rng, variant, split, clusters, anchors, n):
    """One set of a task. anchors: for each cluster an iterator over its anchors not yet used."""
    form, K = variant[:2], len(WORDS[variant])
    options = list(clusters) if form == "ss" else []
    vectors = torch.from_numpy(index.store.centroids[FORMATS.index(form)][options])     # (V, d)
    labels, filled = _balanced(rng, K, n), []
    for label in labels:
        which = label if form == "ss" else 0
        tries = (_sentences(index, rng, variant, split, clusters[which], anchor, label)
                 for anchor in anchors[which])
        chosen = next(filter(None, tries), None)
        if chosen is None:
            raise InputError(f"{variant}: cluster {clusters[which]} has too few different sentences"
                             f" in {split}: give more text")
        texts = [index.store.sentence(s).tolist() for s in chosen] + [None] * len(options)
        filled.append(fill_template(index.parts[variant], dict(zip("01234", texts)),
                                    index.max_tokens))
    ids, slots = map(list, zip(*filled))
    vectors = vectors.expand(n, *vectors.shape)                                         # (n, V, d)
    return Examples(ids, slots, vectors, torch.from_numpy(labels), index.words[variant])


def _sentences(index, rng, variant, split, cluster, anchor, label):
    """An example's sentences in the template's order, no two alike; None where none were found."""
    form, relations = variant[:2], RELATIONS[variant]
    chosen, texts = [anchor], {index.store.sentence(anchor).tobytes()}
    for relation in [relations[label]] if form == "sp" else relations:
        drawn = (_related(index, rng, split, form, cluster, anchor, relation) for _ in range(20))
        new = next((s for s in drawn if index.store.sentence(s).tobytes() not in texts), None)
        if new is None:         # rare: all that stands around the anchor reads like it
            return None
        chosen.append(new)
        texts.add(index.store.sentence(new).tobytes())
    if form == "mc":            # the right one to its place among the wrong ones
        wrong = rng.permutation(chosen[2:]).tolist()
        chosen = [anchor, *wrong[:label], chosen[1], *wrong[label:]]
    return chosen


def _related(index, rng, split, form, cluster, anchor, relation):
    """A random sentence of the split, in one of RELATIONS to an anchor of the cluster."""
    if relation == "next":
        return anchor + 1
    if relation in ("same", "other"):       # of its cluster, of another
        pool = index.pools[split, form]
        low, high = pool.start[cluster:cluster + 2]
        return int(pool.order[rng.integers(low, high) if relation == "same" else
                              _outside(rng, low, high, len(pool.order))])
    document = np.searchsorted(index.first, anchor, "right") - 1    # in memory
    first, end = index.first[document:document + 2]
    if relation == "near":                  # of its document, not adjacent
        low, high = max(anchor - 1, first), min(anchor + 2, end)
        return int(first) + _outside(rng, low - first, high - first, end - first)
    rows, start = index.documents[split]    # "far": of another document of the split
    k = np.searchsorted(rows, document)
    j = _outside(rng, start[k], start[k + 1], start[-1])
    k = np.searchsorted(start, j, "right") - 1
    return int(index.first[rows[k]] + j - start[k])


# --------------------------------------------------------------------------- labeled tasks
class Row(NamedTuple):
    label: int
    fields: dict[str, str]      # by their names in the template


class LabeledTask(NamedTuple):
    """A few-shot task: where its rows are, and how the prompted model reads them."""
    train: str                  # inside the data folder; a name's end tells its format, see ROWS
    test: str
    template: str = "{text} It was <X> ?"
    words: tuple[str, ...] = ("terrible", "great")      # in label order
    max_tokens: int = 128       # of a source, template and all (C.1)
    sizes: tuple[int, int] = (0, 0)     # rows of train and test in the paper (Table 5, A.5); 0: any
    labels: tuple[str, ...] = ()        # as the file writes them, unless 0, 1, ... or the words
    columns: tuple[str, ...] = ()       # as the file calls label and fields, unless by their names
    incomplete: str = "refused"         # rows without a text: refused, kept (but a last one), left
    bare: str = ""              # the field that loses its final punctuation


def few_shot(rows, shots, seed, classes=2):
    """Sample `shots` rows a label for training, as many for validation (section 4.1) -> both lists.

    Ordered by sha256 of seed and row: the same on every machine. No text comes twice. A class of
    fewer than 2 * shots texts gives half to each; InputError for fewer than two texts in a class.
    rows [Row(0, a), Row(1, b), Row(0, c), Row(1, d)], shots 1 -> [Row(0, c), Row(1, b)],
    [Row(0, a), Row(1, d)]
    """
    def key(row):
        parts = (str(seed), str(row.label), *row.fields.values())
        return hashlib.sha256("\t".join(parts).encode()).digest()
    first = {tuple(row.fields.values()): row for row in sorted(rows, key=key, reverse=True)}
    train, validation = [], []
    for label in range(classes):
        members = sorted((row for row in first.values() if row.label == label), key=key)
        half = min(shots, len(members) // 2)
        if not half:
            raise InputError(f"label {label} has {len(members)} different texts, 2 are the least:"
                             " give more labeled rows")
        train += members[:half]
        validation += members[half:2 * half]
    return train, validation


def task_examples(tokenizer, task, rows):
    """Labeled rows as Examples; long texts are cut, never the template or the mask.
    Row(1, {"text": "A fine film."}) -> `A fine film. It was <extra_id_0> ?</s>`, target `great`"""
    parts = compile_template(tokenizer, task.template)
    names = template_fields(task.template)
    texts = zip(*(tokenize(tokenizer, [row.fields[name] for row in rows]) for name in names))
    ids = [fill_template(parts, dict(zip(names, text)), task.max_tokens)[0] for text in texts]
    return Examples(ids, [[] for _ in rows], torch.empty(len(rows), 0, 0), torch.tensor(
        [row.label for row in rows]), decoder_targets(tokenizer, task.words))


class LabeledIndex:
    """What drawing a meta task from labeled sets needs (Table 3: labeled data as meta tasks).
    stores: {name: build_labeled's}. A cluster is usable if it has ceil(support / K) +
    ceil(query / K) different texts of each label. InputError, with what each cluster lacks, unless
    each set has a usable one in training (mixing: two, see TaskIndex) and in held-out texts."""

    def __init__(self, stores, tokenizer, *, support=32, query=32, max_tokens=MAX_TOKENS,
                 mixing=False):
        self.stores, self.sizes, self.max_tokens = stores, (support, query), max_tokens
        self.variants, self.words, self.rows, self.usable = tuple(stores), {}, {}, {}
        self.parts = compile_template(tokenizer, LabeledTask("", "").template)
        for name, store in stores.items():
            words = store.meta["made_of"]["options"]["words"]
            self.words[name] = decoder_targets(tokenizer, words)
            K, need = len(words), sum(-(-size // len(words)) for size in self.sizes)
            clusters = store.centroids.shape[1]
            for split, inside in (("train", ~store.held_out), ("validation", store.held_out)):
                rows = np.flatnonzero(inside & store.anchor)
                group = store.cluster[0][rows] * K + store.label[rows]
                counts = np.bincount(group, minlength=clusters * K)
                self.rows[split, name] = np.split(rows[np.argsort(group, kind="stable")],
                                                  np.cumsum(counts)[:-1])
                lacking = np.maximum(need - counts, 0).reshape(clusters, K).sum(1)
                self.usable[split, name] = _usable(
                    f"{name}: {split} texts", lacking, f"{need} of each label",
                    1 + (mixing and split == "train"))


def labeled_task(index, seed, step, i, *, variant=None, split="train", stream, avoid=()):
    """As meta_task, of a LabeledIndex: one cluster of one labeled set, which is the variant.
    Labels are balanced in each set, no text is in both.
    `A fine film. It was <extra_id_0> ?</s>` -> `great`"""
    rng = np.random.default_rng((seed, step, i, stream))
    drawn = index.variants[rng.integers(len(index.variants))]
    variant = variant or drawn
    store, words = index.stores[variant], index.words[variant]
    usable = np.setdiff1d(index.usable[split, variant], avoid)
    if not len(usable):
        raise InputError(f"{variant}: one usable {split} cluster, mixing needs two: give more rows")
    cluster, K = int(rng.choice(usable)), len(words)
    texts = [_shuffled(rng, rows)
             for rows in index.rows[split, variant][cluster * K:(cluster + 1) * K]]
    sets = []
    for n in index.sizes:
        labels = _balanced(rng, K, n)
        rows = [next(texts[label]) for label in labels]
        ids = [fill_template(index.parts, {"text": store.sentence(r).tolist()}, index.max_tokens)[0]
               for r in rows]
        sets.append(Examples(ids, [[]] * n, torch.empty(n, 0, 0), torch.from_numpy(labels), words))
    return Task(variant, (cluster,), *sets)


# --------------------------------------------------------------------------- data sets
ENTAILMENT = '" {hypothesis} " ? <X> , " {premise} "'
SAME = "Do {a} and {b} have the same meaning? <X> ."
# Templates and words as the authors released them; test sets as the paper's (of GLUE: dev; of
# SuperGLUE: val). The six domains' `test` is their whole pool.
TASKS = {
    "sst2": LabeledTask("original/SST-2/train.tsv", "original/SST-2/dev.tsv", sizes=(6920, 872),
                        columns=("label", "sentence")),
    "sst5": LabeledTask("original/sst-5/train.csv", "original/sst-5/test.csv", sizes=(8544, 2210),
                        words=("terrible", "bad", "okay", "good", "great")),
    "mr": LabeledTask("original/mr/train.csv", "original/mr/test.csv", sizes=(8662, 2000)),
    "cr": LabeledTask("original/cr/train.csv", "original/cr/test.csv", sizes=(1774, 2000),
                      max_tokens=256, incomplete="kept"),
    "subj": LabeledTask("original/subj/train.csv", "original/subj/test.csv",
                        "{text} This is <X> .", ("subjective", "objective"), 256, (8000, 2000)),
    "trec": LabeledTask("original/trec/train.csv", "original/trec/test.csv", "{text} <X> :",
                        ("description", "entity", "expression", "human", "location", "number"),
                        sizes=(5452, 500)),
    "cb": LabeledTask("superglue/CB/train.jsonl", "superglue/CB/val.jsonl", ENTAILMENT,
                      ("yes", "no", "maybe"), 256, (250, 56),
                      ("entailment", "contradiction", "neutral"), bare="hypothesis"),
    "rte": LabeledTask("original/RTE/train.tsv", "original/RTE/dev.tsv", ENTAILMENT, ("yes", "no"),
                       256, (2490, 277), ("entailment", "not_entailment"),
                       ("label", "sentence2", "sentence1"), bare="hypothesis"),
    "qnli": LabeledTask("original/QNLI/train.tsv", "original/QNLI/dev.tsv",
                        "{sentence} . Question: {question} ? Answer: <X> .", ("Yes", "No"),
                        sizes=(104743, 5463), labels=("entailment", "not_entailment")),
    "wic": LabeledTask("superglue/WiC/train.jsonl", "superglue/WiC/val.jsonl",
                       '" {sentence1} " / " {sentence2} " Similar sense of "{word}"? <X> .',
                       ("No", "Yes"), 256, (5428, 638), ("False", "True")),
    "mrpc": LabeledTask("original/MRPC/train.tsv", "original/MRPC/dev.tsv", SAME, ("No", "Yes"),
                        sizes=(3668, 408), columns=("Quality", "#1 String", "#2 String")),
    "qqp": LabeledTask("original/QQP/train.tsv", "original/QQP/dev.tsv", SAME, ("No", "Yes"),
                       sizes=(363846, 40430), columns=("is_duplicate", "question1", "question2"),
                       incomplete="left"),
    **{name: LabeledTask(f"domain/{folder}/train", f"domain/{folder}/test", max_tokens=256,
                         sizes=(0, 2000))
       for name, folder in (("airlines", "airline"), ("books", "books"), ("dvd", "dvd"),
                            ("electronics", "electronics"), ("kitchen", "kitchen"))},
    "restaurants": LabeledTask("domain/restaurants/yelp_labelled.txt",
                               "domain/restaurants/yelp_labelled.txt", max_tokens=256,
                               sizes=(0, 2000)),
    **{name: LabeledTask(f"tasks/{name}/train.csv", f"tasks/{name}/test.csv")     # inside tiny/
       for name in ("movie", "amazon", "nyt", "tweets")},
}
GROUPS = {"all": tuple(TASKS)[:12], "dg": tuple(TASKS)[12:18],      # Tables 1 and 2
          "evidence": ("movie", "amazon", "nyt", "tweets", "subj", "sst2", "cr", "mr", "trec",
                       "mrpc", "airlines")}


def load_train(task, folder=TINY, say=lambda line: None):
    """A LabeledTask's training split -> [Row]. What was odd is said: say(line).
    a line `1,"It works, and well."` of a .csv -> Row(1, {"text": "It works, and well."})"""
    return read_rows(locate(task.train, folder), task, task.sizes[0], say)


def load_test(task, folder=TINY, say=lambda line: None):
    """Its test split. Apart from load_train, so that tuning can be shown never to open the file."""
    return read_rows(locate(task.test, folder), task, task.sizes[1], say)


def read_rows(path, task, size=0, say=lambda line: None):
    """Labeled rows of a file. InputError (file, line) for what is not a task's row.
    RTE's `0 TAB A dog ran. TAB It moved. TAB entailment` under its header ->
    Row(0, {"hypothesis": "It moved", "premise": "A dog ran."})"""
    fields, rows, left = template_fields(task.template), [], 0
    known = {label: k for k, label in enumerate(task.labels or task.words)}
    known |= {} if task.labels else {str(k): k for k in range(len(task.words))}
    for where, values in read_table(path, task.columns or ("label", *fields)):
        label, *texts = values or [""]
        whole = values is not None and all(text.strip() for text in texts)
        if not whole and task.incomplete == "left":
            left += 1
            continue
        if label not in known or not (whole or values and task.incomplete == "kept"):
            raise InputError(f"{where}: {values or 'too few or too many columns'}; a row is a label"
                             f" ({', '.join(known)}) and {', '.join(fields)}, without a header in "
                             "this order: mend or drop it")
        rows.append(make_row(task, known[label], texts))
    if task.incomplete == "kept":
        blank = [not any(map(str.strip, row.fields.values())) for row in rows]
        if blank and blank.pop():
            rows.pop()
            say(f"{path}: the last row, which has no text, is left out")
        say(f"{path}: {sum(blank)} rows without text are kept")
    if left:
        say(f"{path}: {left:,} rows with missing texts are left out")
    if not rows:
        raise InputError(f"{path} has no rows: fetch it again")
    if size not in (0, len(rows)):
        say(f"{path}: {len(rows):,} rows, the paper has {size:,}")
    return rows


def load_texts(path, task):
    """Rows without labels, to be predicted: the template's texts only -> [Row], all of label 0.
    a line `What a joy.` of a .txt -> Row(0, {"text": "What a joy."})"""
    fields, rows, path = template_fields(task.template), [], Path(path)
    for where, texts in read_table(path, fields):
        if not texts or not all(text.strip() for text in texts):
            raise InputError(f"{where}: not the texts {', '.join(fields)}: mend or drop it")
        rows.append(make_row(task, 0, texts))
    if not rows:
        raise InputError(f"{path} has no texts: give some")
    return rows


def make_row(task, label, texts):
    """A Row of the template's texts, in its order; one of them may lose its final punctuation."""
    fields = dict(zip(template_fields(task.template), texts))
    if task.bare:
        fields[task.bare] = fields[task.bare].rstrip(string.punctuation)
    return Row(label, fields)


def template_fields(template):
    """The names of a template's texts. "{a} and {b}? <X> {a}" -> ("a", "b")"""
    return tuple(dict.fromkeys(re.findall(r"\{(\w+)\}", template)))


def read_table(path, columns):
    """The columns of a file's rows -> (file and line, [a text of each column]; None if ragged).
    A .csv `text,label`, `ok,1`; columns ("label", "text") -> ("my.csv, line 2", ["1", "ok"])
    InputError for what cannot be read as its name's end says."""
    read = ROWS.get(path.suffix)
    if not read:
        raise InputError(f"{path}: give {', '.join(filter(None, ROWS))}")
    try:
        for line, values in read(path, columns):
            yield f"{path}, line {line}", values
    except FileNotFoundError:
        raise InputError(f"{path} is missing: name the folder that it is in") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} must be UTF-8 and well quoted: {error}") from None


def _csv_rows(path, columns):
    """Under a header with the columns' names, or without one, in their order."""
    tabs = path.suffix == ".tsv"                                # there quotes mean nothing
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, strict=True, delimiter="\t" if tabs else ",",
                           quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL)
        first = next(lines, [])
        header = set(columns) <= set(first)
        places = [first.index(name) for name in columns] if header else range(len(columns))
        width = len(first) if header else len(columns)
        for line in lines if header or not first else chain([first], lines):
            yield lines.line_num, [line[i] for i in places] if len(line) == width else None


def _jsonl_rows(path, columns):
    """A JSON object a line; labels may be true, false and numbers, as Python writes them."""
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                values = [record[name] for name in columns]
                if not all(isinstance(value, str | int) for value in values):
                    values = None
                "".join(map(str, values)).encode()  # half a pair of surrogates is no text
            except (ValueError, TypeError, KeyError, RecursionError):
                values = None
            yield number, values and list(map(str, values))


def _txt_rows(path, columns):
    """UCI's text TAB label; without a label a line is a text."""
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            values = line.rstrip("\r\n").rsplit("\t", len(columns) - 1)[::-1]
            yield number, values if len(values) == len(columns) else None


class Plain(pickle._Unpickler):
    """Reads lists, texts and numbers only: nothing that a file names is looked up, or run. The one
    in C, and a bytearray, would take as much memory as a file claims to need."""

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items()
                if code != pickle.BYTEARRAY8[0]}

    def find_class(self, module, name):
        """Refuse."""
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, code that is not run here")


def _pickle_rows(path, columns):
    """PERL's (texts, labels)."""
    content = io.BytesIO(path.read_bytes())
    try:
        texts, labels = Plain(content).load()
        rows = list(zip(labels, texts, strict=True))
        if not all(type(label) is int and type(text) is str for label, text in rows):
            raise ValueError("not texts and numbers")
        "".join(texts).encode()         # half a pair of surrogates is no text
    except Exception as error:      # a damaged pickle raises almost anything
        raise InputError(f"{path} is no pickle of (texts, labels): {error}; fetch it again"
                         ) from None
    yield from ((number, [str(label), text]) for number, (label, text) in enumerate(rows, 1))


ROWS = {".csv": _csv_rows, ".tsv": _csv_rows, ".jsonl": _jsonl_rows, ".txt": _txt_rows,
        "": _pickle_rows}


FETCHED = Path("cache/data")
LMBFF = "https://nlp.cs.princeton.edu/projects/lm-bff/datasets.tar"
GLUE = "https://dl.fbaipublicfiles.com/glue/data/"
SUPERGLUE = "https://dl.fbaipublicfiles.com/glue/superglue/data/v2/"
PERL = "https://raw.githubusercontent.com/eyalbd2/PERL/"
# By how a task's file begins: what has it, tried in turn. GLUE's own SST-2 is another, of 67,349.
SOURCES = {
    "original/QNLI/": (LMBFF, GLUE + "QNLIv2.zip"),
    "original/QQP/": (LMBFF, GLUE + "QQP-clean.zip"),
    "original/RTE/": (LMBFF, GLUE + "RTE.zip"), "original/": (LMBFF,),
    "superglue/CB/": (SUPERGLUE + "CB.zip",), "superglue/WiC/": (SUPERGLUE + "WiC.zip",),
    "domain/airline/train": (PERL + "03fb83d677be7a51d0a83973024b2624c2b39f77/data/airline/train",),
    **{f"domain/{name}/test": (f"{PERL}{commit}/{folder}{name}/test",) for name, commit, folder in (
        ("airline", "3f4995487e820bff574232d27ac5c95c91e3aae1", "5-fold_data/"),
        ("books", "3f4995487e820bff574232d27ac5c95c91e3aae1", "5-fold_data/"),
        ("dvd", "95db6bc374e80ae575f3faa9d4f84a8cea682e5e", ""),
        ("electronics", "7e97408fa9eaa25bed2d2d3f16b7a76b3534962c", "data/"),
        ("kitchen", "7e97408fa9eaa25bed2d2d3f16b7a76b3534962c", "data/"))},
}
# The first half of the sha256 of a task's train and test file, of those that were at hand.
CHECKSUMS = {file: start for task, starts in {
    "sst2": ("0e2eb9cad237f8bc597742bdc136d338", "628b5f860a1584f172b9c7b032331553"),
    "sst5": ("8801a7029ccdf549a2900d0ce7662cc4", "3efa2c4190831c212fe618e3a35567df"),
    "mr": ("c1e2cc34d7d271f274c0e8ef24241716", "11884f83ada1fbec5ece0190e06598e5"),
    "cr": ("0eb8e119ee76f8cca33cfee9fee1ed88", "7fab6959f8ce0d761bdbb0fef247d8a8"),
    "subj": ("d281041f21d4d0336d9cd336a5490dd4", "33ce3835e915977e590e6b27b5051402"),
    "cb": ("32017480d3a10508646e3efd64502c63", "c6125587e9601560cb16ea223c33964c"),
    "rte": ("41e3a9b063433392343fad9e962cf2f5", "80230dfa1347282e7b532b06a1004a76"),
    "mrpc": ("69abcedee3cf738c6ce58d772e43e1b7", "9e8f284788040f7c9ecde2e1b3c07237"),
    "airlines": ("b08470f5d334d3b90e2e0773bb7f8546", "d85588256f052153598b2f731c028df5"),
    "books": ("", "e139c133cae66c6cf38c33cc40554f02"),
    "electronics": ("", "adf96b0275ac369e74894c1c7584878b"),
}.items() for file, start in zip(TASKS[task][:2], starts)}


def locate(file, folder=TINY):
    """The path of a task's file: in the folder, in tiny/, or fetched before into cache/data; else
    it is taken out of its archive, which lies there or is downloaded.
    InputError, with where to put what, if it cannot be had."""
    def have(name):
        places = (place / name for place in (Path(folder), TINY, FETCHED))
        return next(filter(Path.is_file, places), None)
    if found := have(file):
        return found
    tried = []
    for url in next((urls for start, urls in SOURCES.items() if file.startswith(start)), ()):
        name = url.rpartition("/")[2]
        try:
            if not name.endswith((".tar", ".zip")):
                where, content = url, download(url)
            else:
                where = have(name) or keep(FETCHED / name, download(url))
                content = archive_member(where, file)
            if not hashlib.sha256(content).hexdigest().startswith(CHECKSUMS.get(file, "")):
                raise InputError(f"{file} of {where} has another checksum than it should")
            return keep(FETCHED / file, content)
        except InputError as error:
            tried.append(str(error))
    raise InputError("; ".join([f"{file} is not in {folder}: put it there, or give --data FOLDER "
                                "that has it", *tried]))


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
                content = part.read(8 * LONGEST + 1)
            if len(content) > 8 * LONGEST:
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


# --------------------------------------------------------------------------- files
def atomic_write(path, write):
    """Make a file whole or not at all: write(binary file) fills a temporary one, then renamed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)        # now the new name is on the disk, too
    os.close(folder)


def sweep(folder):
    """Remove what atomic_write left in a folder when its process was killed."""
    for torn in folder.glob(".*.tmp"):
        try:
            os.kill(int(torn.name.split(".")[-2]), 0)
        except ProcessLookupError:
            torn.unlink(missing_ok=True)
        except (PermissionError, ValueError):       # of another user, who is at work; not ours
            pass


def lock(path, busy):
    """Make path this process's own, until the file returned is closed or the process dies: then the
    kernel gives it free. If another has it busy(its id) is called; unless that raises, wait."""
    file = open(path, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        busy(file.read())
        fcntl.flock(file, fcntl.LOCK_EX)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def fingerprint(files):
    """sha256 over the files' contents, in this order."""
    whole = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def model_fingerprint(folder):
    """sha256 of a model folder's config.json and weights: what a prompt or a store belongs to."""
    return fingerprint([Path(folder) / "config.json", *weight_files(folder)])


# --------------------------------------------------------------------------- a demonstration
def demonstrate():
    """Print a task of each variant, 3 support examples and 1 query, of a part of tiny/'s corpus, in
    64 tokens, as train.py gives them to the embedded T5."""
    folder = model_folder("tiny")
    t5 = load_t5(folder)
    tokenizer = load_tokenizer(folder, t5.config)
    with tempfile.TemporaryDirectory() as new:
        store = build_store(Path(new) / "store", [folder / "corpus.jsonl.gz"], tokenizer, t5,
                            clusters=5, seed=0, model=folder, max_bytes=200_000)
        index = TaskIndex(store, tokenizer, support=3, query=1, max_tokens=64)
        for variant in VARIANTS:
            task = meta_task(index, 3, 0, 0, variant=variant, stream=1)
            names = task.clusters if variant == "ss-cluster" else ()
            print(f"{variant}, anchors of cluster {task.clusters}")
            for name, examples in (("support", task.support), ("query", task.query)):
                for row in range(len(examples.ids)):
                    source, target = examples_as_text(tokenizer, examples, row, names)
                    print(f"  {name}: {source} -> {target}")


if __name__ == "__main__":
    try:
        demonstrate()
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
