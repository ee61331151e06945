"""Text -> sentences -> tokens -> clusters: builds the store that data.py draws from.

    store = build_store("cache", ["text/"], tokenizer, t5, clusters=250, seed=0, model=folder)

An interrupted build resumes: after the last whole corpus file, or after the last whole CHUNK of
cluster assignments. The same corpus, model and options give the same bytes, on any number of ranks.
"""

import gzip
import hashlib
import json
import os
import re
import shutil
import tarfile
from array import array
from collections import Counter
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import (InputError, SOLO, one_process, read_json, reading, remove_torn, rng,
                    whole_file)
from data import COLUMNS, FORMATS, MAX_TOKENS, column, open_store, padded, tokenize
from kmeans import kmeans, nearest
from t5 import embed_tokens, encode, model_fingerprint

LONGEST = 1 << 24           # bytes of a document or line that are held at a time
RULES = 2                   # a new number, where the rules below change, makes stores anew
SHORT = 4                   # tokens; see join_short
SAMPLE = 256                # sentences per centroid that K-means sees
SLICE = 1 << 13             # sentences, of whole documents, that are tokenized together
CHUNK = 1 << 14             # sentences that are sorted by length together, and saved together
BATCH_TOKENS = {"cpu": 1 << 9, "cuda": 1 << 17}     # embedded together; a CPU's cache likes few
TEXT = ("tokens", "offsets", "first", "label", "keys", "shares")    # columns that grow with the text


# ----------------------------------------------------------------- corpus files, documents
def corpus_files(paths):
    """Files and folders -> corpus files; of a folder, sorted, those whose ends READERS knows.
    Raises InputError for a path without any."""
    files = []
    for path in map(Path, paths):
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found = [file for file in inside if file.is_file() and file.name.endswith(tuple(READERS))]
        if not found:
            raise InputError(f"{path}: no text found; give files, or folders of files, that end in "
                             f"{', '.join(READERS)} (of parquet, pandas makes .jsonl)")
        files += found
    return files


def documents(path, counts=None):
    """Yield the documents of one corpus file as lists of paragraphs.

    .txt: blank lines part documents, one paragraph each. .jsonl(.gz), .json.gz (C4's): a document a
    line, with `paragraphs` (a list) or `text` (a paragraph a line). .tar(.xz): OpenWebText's, .txt
    documents, or .xz files that each are a tar of them. Nothing is unpacked to the disk.
    a file "It rained.\\nWe left.\\n\\nThe sun rose." -> ["It rained. We left."], ["The sun rose."]
    counts: a Counter, receives "bytes", "broken UTF-8", lines that U+FFFD had to mend, and "long
    documents parted", texts that LONGEST made two or more of.
    Raises InputError for damage, and for a line that is not a document.
    """
    counts = Counter() if counts is None else counts
    read = next(READERS[end] for end in READERS if path.name.endswith(end))
    with reading(path, "readable text"), open(path, "rb") as file:
        for paragraphs in read(file, path, counts):
            raw = [p.encode("utf-8", "replace") for p in paragraphs]    # JSON's lone surrogates
            counts["bytes"] += sum(map(len, raw))
            yield [p.decode() for p in raw]


def _decode(raw, counts):
    text = raw.decode("utf-8-sig", errors="replace")
    counts["broken UTF-8"] += "\0" in text or "\ufffd" in text and "\ufffd".encode() not in raw
    return text.replace("\0", "\ufffd")


def _read_txt(file, path, counts):
    if file.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError("UTF-16; give UTF-8")
    lines, size = [], 0
    while raw := file.readline(LONGEST):
        line = _decode(raw, counts).strip()
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
        with reading(f"{path}, line {number}", "a document", remedy="mend or drop it"):
            if len(raw) == LONGEST:
                raise ValueError(f"{LONGEST:,} bytes or more; give a document a line")
            line = _decode(raw, counts)
            if not line.strip():
                continue
            record = json.loads(line)
            paragraphs = record.get("paragraphs")
            if paragraphs is None:
                paragraphs = record["text"].split("\n")
            if not isinstance(paragraphs, list) or not all(isinstance(p, str) for p in paragraphs):
                raise TypeError("`paragraphs` must be a list of texts")
        yield paragraphs


class Header(tarfile.TarInfo):
    """A member's header. A damaged one is not the archive's end, and one that is read whole, such
    as a long name, is short."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        """As TarInfo's; raises ReadError."""
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
    known = False
    with tarfile.open(fileobj=file, mode="r|*", tarinfo=Header) as archive:
        for member in filter(tarfile.TarInfo.isfile, archive):
            content, name = archive.extractfile(member), f"{where}, {member.name}"
            known |= member.name.endswith((".xz", ".txt"))
            if member.name.endswith(".xz"):
                with reading(name, "a tar of text"):
                    yield from _read_tar(content, name, counts)
            elif member.name.endswith(".txt"):
                for part, raw in enumerate(iter(lambda: content.read(LONGEST), b"")):
                    counts["long documents parted"] += part > 0
                    yield _decode(raw, counts).split("\n")
    if not known:
        raise ValueError("no .txt inside, and no .xz tar of .txt")


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".jsonl.gz": _read_jsonl,
           ".json.gz": _read_jsonl, ".tar": _read_tar, ".tar.xz": _read_tar}


# ------------------------------------------------------------------------------ sentences
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


# ------------------------------------------------------------------- the store on the disk
class Document(NamedTuple):
    """What becomes a document of a store."""
    share: float            # its hash_share
    sentences: list[str]
    label: int | None = None            # in a labeled set, where the text is one sentence


def build_store(cache, paths, tokenizer, t5, clusters, seed, *, model, max_bytes=None,
                one_per_format=False, embed=None, progress=lambda stage, done, total: None,
                ranks=SOLO):
    """Text files -> Store: sentences, K-means clusters of their embeddings (section 3.2, Eq. 16).

    clusters: K; one clustering serves all formats, or one_per_format makes one of seed, seed + 1,
    ... for each. max_bytes: text read at most; the document that reaches it is the last. Some 5 %
    of the documents are held out, and K-means sees a sample of the others. The rest: build_from.
    """
    def read(path, counts):
        if max_bytes is None or counts["bytes"] < max_bytes:
            for paragraphs in documents(path, counts):
                sentences = [s for text in paragraphs for s in split_sentences(text)]
                yield Document(hash_share(paragraphs), sentences)
                if max_bytes is not None and counts["bytes"] >= max_bytes:
                    return
    files = corpus_files(paths)
    inside = chain.from_iterable(Path(path).rglob("*") for path in paths)
    unread = sorted(file.name for file in {*filter(Path.is_file, inside)} - {*files})
    if unread:
        progress(f"not read, {len(unread)} other file(s): {', '.join(unread)}", 0, None)
    options = {"clusters": clusters, "seed": seed, "max_bytes": max_bytes,
               "one_per_format": one_per_format}
    return build_from(cache, files, read, options, tokenizer, t5, model, embed, progress, ranks)


def build_from(cache, files, read, options, tokenizer, t5, model, embed, progress, ranks):
    """Find or make the store of the Documents that read(path, counts) yields of each file.

    A store is a folder in cache, named by all that it is made of; meta.json is its last file. While
    another process makes it, wait. model: the folder of tokenizer and t5, to be fingerprinted.
    embed(ids (B, T), mask (B, T)) -> (B, d) may replace t5's embedding. progress(stage, done, total
    or None) is called now and then. All ranks must see cache: the first one writes, all embed.
    Memory: SAMPLE * K embeddings, and 20 bytes a sentence. Raises InputError for too little text.
    """
    made_of = {"corpus": fingerprint(files), "model": model_fingerprint(model),
               "tokenizer": _sha256(tokenizer.to_str().encode()), "options": options,
               "rules": RULES}
    name = _sha256(json.dumps(made_of).encode())[:16]
    if len(set(ranks.gather(name))) > 1:
        raise InputError("the ranks have different corpora, models or options: give all the same")
    folder = Path(cache, name)
    whole, first = folder / "meta.json", ranks.rank == 0
    if not ranks.gather(whole.exists())[0]:
        folder.mkdir(parents=True, exist_ok=True)
        waiting = "waiting for the process that makes the same store"
        lock = one_process(folder, lambda: progress(waiting, 0, None)) if first else nullcontext()
        with lock:
            ranks.gather(None)
            if not ranks.gather(whole.exists())[0]:     # nor was it made while we waited
                if first:
                    _prepare(folder, files, read, options, tokenizer, progress)
                ranks.gather(None)
                _cluster(folder, options, t5, embed, progress, ranks)
                if first:
                    _finish(folder, made_of, options, progress)
    ranks.gather(None)
    return open_store(folder, made_of)


def _sha256(content):
    return hashlib.sha256(content).hexdigest()


def fingerprint(files):
    """sha256 over each file's size and its first and last megabyte."""
    whole = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            size = os.path.getsize(path)
            whole.update(b"%d " % size + file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            whole.update(file.read())
    return whole.hexdigest()


def hash_share(paragraphs):
    """A document's place in [0, 1), uniform, by sha256 of its text: the same in every corpus.
    ["It rained."] -> 0.5..."""
    digest = hashlib.sha256("\n".join(paragraphs).encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8]) / 2 ** 64


def hold_out(shares):
    """The documents to hold out: a hash_share below 0.05, and always the two lowest -> bool.
    So no other text and no limit of bytes moves a document across, while two are below."""
    chosen = shares < 0.05
    chosen[np.argsort(shares, kind="stable")[:2]] = True
    return chosen


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


def _prepare(folder, files, read, options, tokenizer, progress):
    """The text and what follows from it. A corpus that cannot be a store leaves nothing behind."""
    remove_torn(folder)
    try:
        counts = write_text(folder, files, read, tokenizer, progress)
        _choose(folder, options["clusters"], counts)
    except InputError:
        shutil.rmtree(folder)
        raise


def write_text(folder, files, read, tokenizer, progress):
    """Append the sentences of read(path, counts) of each file to the TEXT columns -> counts.

    After each file, read.json has the number of files, the columns' sizes and the counts: an
    interrupted build resumes there.
    """
    notes = folder / "read.json"
    done, sizes, counts = read_json(notes) if notes.exists() else (0, dict.fromkeys(TEXT, 0), {})
    counts = Counter(counts)
    with ExitStack() as stack:
        columns = {name: stack.enter_context(open(folder / f"{name}.bin", "ab")) for name in TEXT}
        for name, file in columns.items():
            file.truncate(sizes[name])
        if not sizes["offsets"]:
            columns["offsets"].write(array("q", [0]))
        for number, path in enumerate(files[done:], done + 1):
            items = read(path, counts)
            while group := list(_next_documents(items)):
                texts = chain.from_iterable(document.sentences for document in group)
                encoded = iter(tokenize(tokenizer, texts))
                for document in group:
                    ids = list(islice(encoded, len(document.sentences)))
                    _append(columns, document, ids, counts)
                progress("reading text, bytes", counts["bytes"], None)
            for file in columns.values():
                file.flush()
                os.fsync(file.fileno())
            sizes = {name: os.path.getsize(file.name) for name, file in columns.items()}
            with whole_file(notes) as file:
                file.write(json.dumps([number, sizes, counts]).encode())
    return counts


def _next_documents(items):
    """The next documents of an iterator that have SLICE sentences, an empty one counted as one:
    what the tokenizer gets in one call, for all cores to share."""
    sentences = 0
    while sentences < SLICE and (document := next(items, None)):
        sentences += max(1, len(document.sentences))
        yield document


def _append(columns, document, ids, counts):
    """Append a document, of sentences `ids`, to the TEXT columns."""
    def write(name, *values):
        columns[name].write(array(COLUMNS[name], values))
    kept = join_short(ids) if document.label is None else [tokens for tokens in ids if tokens]
    counts["short sentences joined"] += len(ids) - len(kept)
    if not kept:
        counts["empty documents"] += 1
        return
    write("first", counts["sentences"])
    write("shares", document.share)
    if document.label is not None:
        write("label", document.label)
    for tokens in kept:
        counts["long sentences cut"] += len(tokens) > MAX_TOKENS
        tokens = array("H", tokens[:MAX_TOKENS])
        counts["tokens"] += len(tokens)
        columns["tokens"].write(tokens)
        write("offsets", counts["tokens"])
        write("keys", int.from_bytes(hashlib.blake2b(tokens, digest_size=8).digest()))
    counts["sentences"] += len(kept)
    counts["documents"] += 1


def _choose(folder, clusters, counts):
    """Write held_out and anchor: of equal sentences the first is an anchor."""
    keys, first, shares = (column(folder, name) for name in ("keys", "first", "shares"))
    chosen, anchor = hold_out(shares), np.zeros(len(keys), dtype=bool)
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
        with whole_file(folder / f"{name}.bin") as file:
            file.write(values)


def embed_sentences(t5, ids, mask):
    """ids, mask (B, T) -> (B, d): the mean over a sentence's tokens of the encoder's last states.
    Without prompt and </s>; the paper does not say."""
    device = t5.weights["shared.weight"].device
    ids, mask = ids.to(device), mask.to(device)[..., None]                          # (B, T, 1)
    with torch.no_grad():
        H = encode(t5, embed_tokens(t5, ids), mask[..., 0])                         # (B, T, d)
        return torch.where(mask, H, 0).sum(1) / mask.sum(1)                         # (B, d)


def embed_rows(tokens, offsets, embed, budget, rows):
    """Sentences `rows` -> (len(rows), d). They are embedded sorted by length, in padded batches of
    at most `budget` tokens, or one sentence."""
    lengths = offsets[rows + 1] - offsets[rows]
    order, begin, states = np.argsort(lengths, kind="stable"), 0, []
    while begin < len(rows):        # lengths rise: the last sentence of a batch sets its width
        widths = lengths[order[begin:begin + budget]]
        fitting = np.searchsorted(widths * np.arange(1, len(widths) + 1), budget, "right")
        batch = rows[order[begin:begin + max(1, fitting)]]
        states.append(embed(*padded([tokens[offsets[i]:offsets[i + 1]] for i in batch])))
        begin += len(batch)
    return torch.cat(states)[np.argsort(order)]


def by_chunks(work, rows, ranks):
    """Yield work(part) of each CHUNK of rows, in order. The ranks share the chunks."""
    for begin in range(0, len(rows), CHUNK * ranks.world):
        group = rows[begin:begin + CHUNK * ranks.world]
        yield from ranks.map(work, [group[i:i + CHUNK] for i in range(0, len(group), CHUNK)])


def _cluster(folder, options, t5, embed, progress, ranks):
    """Write centroids.npy (clusterings, K, d) and append to cluster (n, clusterings)."""
    tokens, offsets, held_out, anchor = (column(folder, name) for name in (
        "tokens", "offsets", "held_out", "anchor"))
    device = t5.weights["shared.weight"].device if t5 else torch.device("cpu")
    embed = embed or partial(embed_sentences, t5)
    path, K = folder / "centroids.npy", options["clusters"]
    seeds = range(options["seed"],
                  options["seed"] + (len(FORMATS) if options.get("one_per_format") else 1))

    def embedder(stage, done, total):
        def counted(ids, mask):
            nonlocal done
            done += len(ids) * ranks.world
            progress(stage, min(done, total), total)
            return embed(ids, mask)
        progress(stage, done, total)
        return partial(embed_rows, tokens, offsets, counted, BATCH_TOKENS[device.type])

    if not ranks.gather(path.exists())[0]:
        training = np.flatnonzero(anchor & ~held_out)
        size = min(len(training), SAMPLE * K)
        sample = rng(seeds[0], 0, 0, "k-means sample").choice(training, size, replace=False)
        embedded = embedder("embedding a sample", 0, size)
        points = torch.cat(list(by_chunks(lambda part: embedded(part).cpu(), sample, ranks)))
        if not points.isfinite().all():
            raise InputError("sentence embeddings are not finite: the model's weights are damaged")
        if ranks.rank == 0:
            _fit(path, points.to(device), K, seeds, progress)
        ranks.gather(None)
    n, row = len(anchor), 4 * len(seeds)                    # bytes
    with open(folder / "cluster.bin", "ab") as file:        # only rank 0 writes
        done = ranks.gather(min(file.tell() // row // CHUNK * CHUNK, n))[0]
        centroids, embedded = np.load(path), embedder("assigning clusters", done, n)
        if ranks.rank == 0:
            file.truncate(row * done)
        for found in by_chunks(lambda part: _assign(embedded(np.array(part)), centroids),
                               range(done, n), ranks):
            if ranks.rank == 0:
                file.write(found)
                file.flush()
                os.fsync(file.fileno())


def _fit(path, points, K, seeds, progress):
    """Write the centroids of one K-means for each seed."""
    progress("K-means", 0, len(points))
    fitted = torch.stack([kmeans(points, K, seed).centroids for seed in seeds])
    with whole_file(path) as file:
        np.save(file, fitted.float().cpu().numpy())


def _assign(H, centroids):
    """Embeddings (B, d), centroids (clusterings, K, d) -> the nearest ones, (B, clusterings)."""
    found = [nearest(H, c)[0] for c in torch.from_numpy(centroids).to(H)]
    return torch.stack(found, 1).int().cpu().numpy()


def _finish(folder, made_of, options, progress):
    """Write order and bounds for each clustering, and meta.json."""
    first, held_out, anchor, cluster = (column(folder, name) for name in (
        "first", "held_out", "anchor", "cluster"))
    progress("grouping", 0, None)
    grouped = [group_anchors(row, held_out, anchor, first, options["clusters"])
               for row in cluster.reshape(len(anchor), -1).T]
    with whole_file(folder / "order.bin") as file:
        file.writelines(order for order, _ in grouped)
    with whole_file(folder / "bounds.npy") as file:
        np.save(file, np.stack([bounds for _, bounds in grouped]))
    counts = Counter(read_json(folder / "read.json")[2])
    counts["documents held out"] = int(held_out[first].sum())
    for name in ("keys.bin", "shares.bin", "read.json"):
        (folder / name).unlink(missing_ok=True)
    files = {path.name: path.stat().st_size for path in sorted(folder.glob("*.[bn]*"))}
    with whole_file(folder / "meta.json") as file:
        file.write(json.dumps({"made_of": made_of, "counts": counts, "files": files}).encode())


def group_anchors(cluster, held_out, anchor, first, K):
    """A store's columns, one clustering -> order (anchors,) uint32, bounds (4 K + 1,) int64.

    order[bounds[k]:bounds[k + 1]] are the anchors, in rising order, of group k: the training ones
    of cluster 0 that are followed (by a sentence, in a document of 4 or more), its others, those of
    cluster 1, ...; from 2 K on the held-out ones.
    """
    ends = np.append(first[1:], len(anchor))
    followed = np.repeat(ends - first >= 4, ends - first)
    followed[ends - 1] = False
    group = 2 * (held_out * np.int32(K) + cluster) + ~followed
    group[~anchor] = 4 * K                  # the last one, which is left away
    order = np.argsort(group, kind="stable")[:anchor.sum()].astype(np.uint32)
    return order, np.cumsum([0, *np.bincount(group, minlength=4 * K)[:4 * K]])
