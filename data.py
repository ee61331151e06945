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

import re
import sys
import tempfile
from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn.utils.rnn import pad_sequence

from common import InputError, read_json
from t5 import EOS, PAD
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
    """A tokenizer.json, or that of a model folder. InputError if it is not this T5Config's vocabulary."""
    path = Path(folder) / "tokenizer.json" if Path(folder).is_dir() else Path(folder)
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
# Plain numbers, each a file NAME.bin and its type; see Store. keys, shares: only while it is made.
COLUMNS = {"tokens": "H", "offsets": "q", "first": "q", "label": "h", "held_out": "?",
           "anchor": "?", "cluster": "i", "order": "I", "keys": "Q", "shares": "d"}


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


def template_fields(template):
    """The names of a template's texts. "{a} and {b}? <X> {a}" -> ("a", "b")"""
    return tuple(dict.fromkeys(re.findall(r"\{(\w+)\}", template)))




# --------------------------------------------------------------------------- a demonstration
def demonstrate():
    """Print a task of each variant, 3 support examples and 1 query, of a part of tiny/'s corpus, in
    64 tokens, as train.py gives them to the embedded T5."""
    from corpus import build_store
    from hub import model_folder
    from t5 import load_t5
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
