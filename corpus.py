"""Text -> sentences -> token store -> clusters: the store that data.py draws from."""

import gzip
import hashlib
import json
import os
import re
import shutil
import tarfile
from array import array
from collections import Counter
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch

from common import DAMAGE, Header, InputError, SOLO, atomic_write, fingerprint, lock, read_json
from data import COLUMNS, FORMATS, MAX_TOKENS, _column, open_store, padded, tokenize
from kmeans import kmeans, nearest
from t5 import embed_tokens, encode, model_fingerprint


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


# --------------------------------------------------------------------------- the store on disk
SHORT = 4                   # tokens; see join_short
SAMPLE = 256                # sentences per centroid that K-means sees
SLICE = 1 << 13             # sentences, of whole documents, that are tokenized together
SAVED = 1 << 24             # tokens between saved states of the text
CHUNK = 1 << 14             # sentences that are sorted by length together, and saved together
BATCH_TOKENS = {"cpu": 1 << 9, "cuda": 1 << 17}     # embedded together; a CPU's cache likes few
TEXT = ("tokens", "offsets", "first", "label", "keys", "shares")    # what _write_text appends to


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


def _build(cache, files, read, options, tokenizer, t5, model, embed, progress, ranks):
    """Find or make the store of what read(counts) yields of files: (hash_share, [sentence], label
    or None), see build_store."""
    clusters, rows = options["clusters"], len(FORMATS) if options.get("one_per_format") else 1
    seeds = [options["seed"] + row for row in range(rows)]
    made_of = {"corpus": fingerprint(files), "model": model_fingerprint(model),
               "tokenizer": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(), "options": options}
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
