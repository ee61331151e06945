"""Text -> sentences -> tokens -> clusters: the store that data.py draws from.

    store = build_store("cache", ["text/"], tokenizer, t5, clusters=250, seed=0, model=folder)

store.py says what it holds. An interrupted build resumes: after the last whole corpus file, or
after the last whole CHUNK of cluster assignments. The same corpus, model and options give the same
bytes, on any number of ranks.
"""

import hashlib
import json
import os
import shutil
from array import array
from collections import Counter
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import (InputError, one_process, read_json, remove_torn, rng, text_sha256,
                    whole_file)
from data import FORMATS, padded
from documents import (SHAPES, corpus_files, documents, ends_fingerprint, shape_of,
                       unread_files)
from kmeans import kmeans, nearest
from ranks import SOLO
from sentences import split_sentences
from store import TEXT, column, open_store
from t5 import embed_tokens, encode, model_fingerprint
from templates import MAX_TOKENS, tokenize

RULES = 5                   # a new number, where sentences or documents change, makes stores anew
SHORT = 4                   # tokens; see join_short
SAMPLE = 256                # sentences per centroid that K-means sees
SLICE = 1 << 13             # sentences, of whole documents, that are tokenized together
CHUNK = 1 << 14             # sentences that are sorted by length together, and saved together
BATCH_TOKENS = {"cpu": 1 << 9, "cuda": 1 << 17}     # embedded together; a CPU's cache likes few


# ------------------------------------------------------------------------ text becomes a store
class Document(NamedTuple):
    """What becomes a document of a store."""
    share: float            # its hash_share
    sentences: list[str]
    label: int | None = None            # in a labeled set, where the text is one sentence


def build_store(cache, paths, tokenizer, t5, clusters, seed, *, model, max_bytes=None, shape="",
                field="", followed=0, one_per_format=False, embed=None,
                progress=lambda stage, done, total: None, ranks=SOLO):
    """Text files -> Store: sentences, K-means clusters of their embeddings (section 3.2, Eq. 16).

    clusters: K; one clustering serves all formats, or one_per_format makes one of seed, seed + 1,
    ... for each. max_bytes: text read at most; the document that reaches it is the last. shape,
    field: see documents(). Some 5 % of the documents are held out, and K-means sees a sample of the
    others. followed: see _choose. The rest: build_from.
    """
    def read(path, counts):
        texts = documents(path, counts, shape, field)
        while max_bytes is None or counts["bytes"] < max_bytes:
            if (paragraphs := next(texts, None)) is None:
                return
            sentences = [s for text in paragraphs for s in split_sentences(text)]
            yield Document(hash_share(paragraphs), sentences)
    files = corpus_files(paths)
    if unread := unread_files(paths, files):
        progress(f"not read, {len(unread)} other file(s): {', '.join(unread)}", 0, None)
    options = {"clusters": clusters, "seed": seed, "max_bytes": max_bytes,
               "one_per_format": one_per_format, "field": field,
               "documents": ", ".join(sorted({shape_of(path, shape) for path in files}))}
    return build_from(cache, files, read, options, tokenizer, t5, model, embed, progress, ranks,
                      followed)


def build_from(cache, files, read, options, tokenizer, t5, model, embed, progress, ranks,
               followed=0):
    """Find or make the store of the Documents that read(path, counts) yields of each file.

    A store is a folder in cache, named by a hash of what it is made of (of a file: its size, first
    and last megabyte); meta.json is its last file. While another process makes it, wait. model: the
    folder of tokenizer and t5, to be fingerprinted. embed(ids (B, T), mask (B, T)) -> (B, d) may
    replace t5's embedding. progress(stage, done, total or None) is called now and then. All ranks
    must see cache: the first one writes, all embed. Memory: SAMPLE * K embeddings, and 30 bytes a
    sentence. Raises InputError for too little text.
    """
    made_of = {"corpus": ends_fingerprint(files),
               "model": model_fingerprint(model),
               "tokenizer": text_sha256(tokenizer.to_str()).hexdigest(),
               "options": options,
               "rules": RULES}
    name = text_sha256(json.dumps(made_of)).hexdigest()[:16]
    if len(set(ranks.gather(name))) > 1:
        raise InputError("the ranks have different corpora, models or options: give all the same")
    writes = ranks.rank == 0
    folder = Path(cache, name)
    folder.mkdir(parents=True, exist_ok=True)
    waiting = partial(progress, "waiting for the process that makes the same store", 0, None)
    with one_process(folder, waiting) if writes else nullcontext():
        if not ranks.gather((folder / "meta.json").exists())[0]:
            if writes:
                _prepare(folder, files, read, options, tokenizer, progress, followed)
            ranks.gather(None)
            _cluster(folder, options, t5, embed, progress, ranks)
            if writes:
                _finish(folder, made_of, options, progress)
    ranks.gather(None)
    return open_store(folder, made_of)


def hash_share(paragraphs):
    """A document's place in [0, 1), uniform, by sha256 of its text: the same in every corpus.
    ["It rained."] -> 0.5..."""
    return int.from_bytes(text_sha256("\n".join(paragraphs)).digest()[:8]) / 2 ** 64


def hold_out(shares):
    """The documents to hold out: a hash_share below 0.05, and always the two lowest -> bool.
    Where two are below, adding or cutting other text moves no document across."""
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


def _prepare(folder, files, read, options, tokenizer, progress, followed):
    """The text and what follows from it. A corpus that cannot be a store leaves nothing behind."""
    remove_torn(folder)
    try:
        write_text(folder, files, read, tokenizer, progress)
        _choose(folder, options, progress, followed)
    except InputError:
        shutil.rmtree(folder)
        raise


def write_text(folder, files, read, tokenizer, progress):
    """Append the sentences of read(path, counts) of each file to the TEXT columns.

    After each file, read.json has the number of files, the columns' sizes and the counts: an
    interrupted build resumes there.
    """
    notes = folder / "read.json"
    done, sizes, counts = read_json(notes) if notes.exists() else (0, {}, {})
    counts = Counter(counts)
    with ExitStack() as opened:
        columns = {name: opened.enter_context(open(folder / f"{name}.bin", "ab")) for name in TEXT}
        for name, file in columns.items():
            file.truncate(sizes.get(name, 0))
        if not done:
            columns["offsets"].write(array("q", [0]))
        for number, path in enumerate(files[done:], done + 1):
            items = read(path, counts)
            while group := list(_next_documents(items)):
                for name, values in _columns(tokenizer, group, counts).items():
                    columns[name].write(values)
                progress("reading text, bytes", counts["bytes"], None)
            for name, file in columns.items():
                sizes[name] = file.seek(0, os.SEEK_END)         # writes what is buffered, too
                os.fsync(file.fileno())
            with whole_file(notes) as file:
                file.write(json.dumps([number, sizes, counts]).encode())


def _next_documents(items):
    """The next documents of an iterator that have SLICE sentences, an empty one counted as one:
    what the tokenizer gets in one call, for all cores to share."""
    sentences = 0
    while sentences < SLICE and (document := next(items, None)):
        sentences += max(1, len(document.sentences))
        yield document


def _columns(tokenizer, group, counts):
    """Documents -> what they add to the TEXT columns, {name: array}, and to the counts."""
    rows = {name: array(kind) for name, kind in TEXT.items()}
    encoded = iter(tokenize(tokenizer, chain.from_iterable(x.sentences for x in group)))
    for document in group:
        ids = list(islice(encoded, len(document.sentences)))
        kept = join_short(ids) if document.label is None else [tokens for tokens in ids if tokens]
        counts["short sentences joined"] += len(ids) - len(kept)
        if not kept:
            counts["empty documents"] += 1
            continue
        rows["first"].append(counts["sentences"])
        rows["shares"].append(document.share)
        if document.label is not None:
            rows["label"].append(document.label)
        for tokens in kept:
            counts["long sentences cut"] += len(tokens) > MAX_TOKENS
            tokens = array("H", tokens[:MAX_TOKENS])
            counts["tokens"] += len(tokens)
            rows["tokens"] += tokens
            rows["offsets"].append(counts["tokens"])
            rows["keys"].append(int.from_bytes(hashlib.blake2b(tokens, digest_size=8).digest()))
        counts["sentences"] += len(kept)
        counts["documents"] += 1
    return rows


def _choose(folder, options, progress, wanted):
    """Write held_out and anchor: of equal sentences the first is an anchor. Raises InputError,
    before anything is embedded, for too little text, and for less than `wanted` anchors of a split
    that another sentence follows. data.check_clusters says later whether the clusters are large
    enough."""
    keys = column(folder, "keys")
    first = column(folder, "first")
    shares = column(folder, "shares")
    held_out = np.repeat(hold_out(shares), np.diff(first, append=len(keys)))
    anchor = np.zeros(len(keys), dtype=bool)
    anchor[np.unique(keys, return_index=True)[1]] = True
    different = int((anchor & ~held_out).sum())
    shape = options.get("documents", "rows")
    found = (f"{len(first):,} document(s) by {shape}, of {len(keys) / max(1, len(first)):.1f} "
             "sentences on average")
    others = f", another one of --documents {', '.join(SHAPES)}" if shape in SHAPES else ""
    progress(found, 0, None)
    if len(first) < 4:
        raise InputError(f"{found}: 4 documents are needed, give more text{others}")
    if different < options["clusters"]:
        raise InputError(f"{found}: {different} different sentences to train on for "
                         f"{options['clusters']} clusters: give more text, or fewer --clusters (of "
                         "labeled sets: --labeled-clusters)")
    having_next = anchor & has_next(first, len(keys))
    lacking = wanted - min(int((having_next & part).sum()) for part in (held_out, ~held_out))
    if lacking > 0:
        raise InputError(f"{found}: training or held-out documents of 4 or more sentences lack "
                         f"{lacking} that have a next one: give more text{others}, a smaller "
                         "--support and --query, or only --variants that ask for clusters")
    for name, values in (("held_out", held_out), ("anchor", anchor)):
        with whole_file(folder / f"{name}.bin") as file:
            file.write(values)


# ----------------------------------------------------------------------- embeddings, clusters
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
    order = np.argsort(lengths, kind="stable")
    begin, states = 0, []
    while begin < len(rows):        # lengths rise: the last sentence of a batch sets its width
        widths = lengths[order[begin:begin + budget]]
        fitting = np.searchsorted(widths * np.arange(1, len(widths) + 1), budget, "right")
        batch = rows[order[begin:begin + max(1, fitting)]]
        states.append(embed(*padded([tokens[offsets[i]:offsets[i + 1]] for i in batch])))
        begin += len(batch)
    return torch.cat(states)[np.argsort(order)]


def embed_chunks(folder, embed, budget, progress, ranks, stage, rows, finish):
    """Yield finish(embeddings) of each CHUNK of rows, in order. The ranks share the chunks."""
    tokens = column(folder, "tokens")
    offsets = column(folder, "offsets")
    done = 0

    def counted(ids, mask):
        nonlocal done
        done += len(ids) * ranks.world
        progress(stage, min(done, len(rows)), len(rows))
        return embed(ids, mask)

    def work(chunk):
        return finish(embed_rows(tokens, offsets, counted, budget, np.array(chunk)))
    progress(stage, 0, len(rows))
    chunks = [rows[begin:begin + CHUNK] for begin in range(0, len(rows), CHUNK)]
    for begin in range(0, len(chunks), ranks.world):
        yield from ranks.map(work, chunks[begin:begin + ranks.world])


def _cluster(folder, options, t5, embed, progress, ranks):
    """Write centroids.npy (clusterings, K, d) and append to cluster (n, clusterings)."""
    held_out = column(folder, "held_out")
    anchor = column(folder, "anchor")
    device = t5.weights["shared.weight"].device if t5 else torch.device("cpu")
    chunks = partial(embed_chunks, folder, embed or partial(embed_sentences, t5),
                     BATCH_TOKENS[device.type], progress, ranks)
    path, K, seed = folder / "centroids.npy", options["clusters"], options["seed"]
    clusterings = len(FORMATS) if options.get("one_per_format") else 1
    seeds = range(seed, seed + clusterings)
    if not ranks.gather(path.exists())[0]:
        training = np.flatnonzero(anchor & ~held_out)
        size = min(len(training), SAMPLE * K)
        sample = rng(seed, 0, 0, "k-means sample").choice(training, size, replace=False)
        points = torch.cat(list(chunks("embedding a sample", sample, torch.Tensor.cpu)))
        if ranks.rank == 0:
            progress("K-means", 0, len(points))
            try:
                fitted = [kmeans(points.to(device), K, s).centroids.float().cpu() for s in seeds]
            except ValueError as error:
                raise InputError(f"the sentences' embeddings make no clusters, {error}: the "
                                 "model's weights are damaged, or too large for --dtype") from None
            with whole_file(path) as file:
                np.save(file, torch.stack(fitted).numpy())
        ranks.gather(None)
    n = len(anchor)
    row = 4 * clusterings               # bytes
    centroids = np.load(path)
    with open(folder / "cluster.bin", "ab") as file:                    # only rank 0 writes
        done = ranks.gather(min(file.tell() // row // CHUNK * CHUNK, n))[0]
        if ranks.rank == 0:
            file.truncate(row * done)
        for found in chunks("assigning clusters", range(done, n), partial(_assign, centroids)):
            if ranks.rank == 0:
                file.write(found)
                file.flush()
                os.fsync(file.fileno())


def _assign(centroids, H):
    """Centroids (clusterings, K, d), embeddings (B, d) -> the nearest ones, (B, clusterings)."""
    found = [nearest(H, c)[0] for c in torch.from_numpy(centroids).to(H)]
    return torch.stack(found, 1).int().cpu().numpy()


def _finish(folder, made_of, options, progress):
    """Write order and bounds for each clustering, and meta.json."""
    first = column(folder, "first")
    held_out = column(folder, "held_out")
    anchor = column(folder, "anchor")
    cluster = column(folder, "cluster")
    progress("grouping", 0, None)
    grouped = [group_anchors(row, held_out, anchor, first, options["clusters"])
               for row in cluster.reshape(len(anchor), -1).T]
    with whole_file(folder / "order.bin") as file:
        file.writelines(order for order, _ in grouped)
    with whole_file(folder / "bounds.npy") as file:
        np.save(file, np.stack([bounds for _, bounds in grouped]))
    counts = read_json(folder / "read.json")[2]
    counts["documents held out"] = int(held_out[first].sum())
    for name in ("keys.bin", "shares.bin", "read.json"):
        (folder / name).unlink(missing_ok=True)
    files = {path.name: path.stat().st_size for path in sorted(folder.glob("*.[bn]*"))}
    with whole_file(folder / "meta.json") as file:
        file.write(json.dumps({"made_of": made_of, "counts": counts, "files": files}).encode())


def has_next(first, n):
    """Which of n sentences another one follows, in a document of 4 or more: (n,) bool."""
    ends = np.append(first[1:], n)
    found = np.repeat(ends - first >= 4, ends - first)
    found[ends - 1] = False
    return found


def group_anchors(cluster, held_out, anchor, first, K):
    """A store's columns, one clustering -> order (anchors,) uint32, bounds (4 K + 1,) int64.

    order[bounds[k]:bounds[k + 1]] are the anchors, in rising order, of group k: the training ones
    of cluster 0 that are followed, its others, those of cluster 1, ...; from 2 K on the held-out
    ones.
    """
    group = 2 * (held_out * np.int32(K) + cluster) + ~has_next(first, len(anchor))
    group[~anchor] = 4 * K                  # the last one, which is left away
    order = np.argsort(group, kind="stable")[:anchor.sum()].astype(np.uint32)
    return order, np.cumsum([0, *np.bincount(group, minlength=4 * K)[:4 * K]])
