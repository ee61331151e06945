"""Examples, and the meta tasks that a store's text makes (section 3.2, A.2, Eq. 17-19).

    store = build_store(cache, ["text/"], ...)     # of corpus.py, which says what it holds
    index = TaskIndex(store, tokenizer)
    task = meta_task(index, seed=0, step=7, i=2)    # a pure function of its arguments
    batch = collate(task.support, range(32))

`python data.py` prints a small task of each variant as text. It takes seconds and needs tiny/.

Letters: n sentences or examples, K clusters or label words, d d_model, B batch, T tokens,
V vectors that stand in place of tokens.
"""

from itertools import chain, zip_longest
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import common
from common import InputError
from t5 import PAD
from templates import (MAX_TOKENS, compile_template, decoder_targets, fill_template,
                       template_fields)


# ------------------------------------------------------------------ the kinds of meta task
class Variant(NamedTuple):
    """A kind of meta task. An entry of VARIANTS says all that is special about it."""
    format: str                 # its clustering in the store, and its group in Table 4
    template: str               # {0} is the anchor; {1}, {2}, ... stand beside it; <X> is the mask
    words: tuple[str, ...]      # the label words
    beside: tuple = ()          # by label: relations (see Draw.related) of {1}, {2}, ... to {0}
    choice: bool = False        # the first of `beside` is the right one: to the label's place
    ways: int = 1               # clusters of a task; above 1, label k has the k-th one's anchors
    centroids: bool = False     # the centroids of the clusters stand in {1}, {2}, ...
    paper: bool = True          # one of the paper's five, which are the default

    @property
    def followed(self):
        """Whether each anchor needs a next sentence, in a document of 4 sentences or more."""
        return not {"next", "near"}.isdisjoint(chain(*self.beside))

    @property
    def others(self):
        """The most sentences of other clusters that stand beside an anchor."""
        return max((relations.count("other") for relations in self.beside), default=0)


PAIR = "{0} <X> . {1}"
YES_NO = ("yes", "no")
CHOICE = "{0} ? A. {1} B. {2} C. {3} D. {4} . Answer: <X>"
LETTERS = ("A", "B", "C", "D")
VARIANTS = {        # the five of section 3.2 and A.2; an anchor is of the task's cluster
    "sp-next": Variant("sp", PAIR, (*YES_NO, "maybe"), (("next",), ("far",), ("near",))),
    "sp-cluster": Variant("sp", PAIR, YES_NO, (("same",), ("other",))),
    "mc-next": Variant("mc", CHOICE, LETTERS, (("next", "near", "far", "far"),) * 4, choice=True),
    "mc-cluster": Variant("mc", CHOICE, LETTERS, (("same", "other", "other", "other"),) * 4,
                          choice=True),
    "ss-cluster": Variant("ss", CHOICE, LETTERS, ways=4, centroids=True),
    # Hidden classes (ours, after CACTUs): only the support set says which cluster is "yes".
    "hidden": Variant("ss", "{0} <X> .", YES_NO, ways=2, paper=False),
}
PAPER_VARIANTS = tuple(name for name, entry in VARIANTS.items() if entry.paper)
FORMATS = tuple(dict.fromkeys(entry.format for entry in VARIANTS.values()))     # sp, mc, ss


# ------------------------------------------------------------------ what the model reads
class Examples(NamedTuple):
    """n classification examples with the same label words, as the encoder will read them."""
    ids: list[list[int]]      # <extra_id_0> exactly once, </s> last
    slots: list[list[int]]    # the V positions in ids where a vector stands in place of a token
    vectors: torch.Tensor     # (n, V, d) float32; (n, 0, d) or (n, 0, 0) without vectors
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
    one_hot = torch.eye(len(examples.words))
    targets = one_hot[examples.labels[rows]]                                        # (B, K)
    batch = Batch(ids, mask, slots, examples.vectors[rows], targets)
    return Batch(*(x.to(device) for x in batch))


def padded(sentences):
    """Token ids of B sentences -> ids (B, T) long, mask (B, T) bool, false at padding."""
    rows = [torch.from_numpy(np.array(ids, dtype=np.int64)) for ids in sentences]
    ids = pad_sequence(rows, batch_first=True, padding_value=PAD)
    return ids, torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])


# ----------------------------------------------------------------------------- meta tasks
class Task(NamedTuple):
    """A meta task tau with support set D^s and query set D^q (section 3.2)."""
    variant: str
    clusters: tuple[int, ...]       # of its anchors: as many as the variant's ways
    support: Examples
    query: Examples


class Pool(NamedTuple):
    """One split's anchors, cluster by cluster, in each first those that are followed."""
    order: np.ndarray       # mapped; cluster c has order[start[c]:start[c + 1]]
    start: np.ndarray       # (K + 1,)
    followed: np.ndarray    # (K,) how many have a next sentence, in a document of 4 or more

    def counts(self, entry):
        """How many anchors of each cluster can serve a Variant: (K,)."""
        sizes = np.diff(self.start)
        counts = self.followed if entry.followed else sizes
        return np.where(len(self.order) - sizes >= entry.others, counts, 0)


class TaskIndex:
    """What drawing a task needs, made once: a task costs the same whatever the corpus.

    support, query: the sets' sizes. variants: the names that meta_task draws from. recast: {name:
    Variant} in place of VARIANTS' (Unified-PPT). mixing: training tasks will have partners of other
    clusters. A cluster is usable for a variant if support + query of its anchors can serve. Raises
    InputError if a variant has too few usable ones in a split: see check_clusters.
    """

    def __init__(self, store, tokenizer, *, support=32, query=32, variants=PAPER_VARIANTS,
                 max_tokens=MAX_TOKENS, recast={}, mixing=False):
        self.store = store
        self.sizes = (support, query)
        self.max_tokens = max_tokens
        self.variants = tuple(variants)
        entries = VARIANTS | recast
        self.table = {name: entries[name] for name in variants}
        self.parts = {name: compile_template(tokenizer, entry.template)
                      for name, entry in self.table.items()}
        self.words = {name: decoder_targets(tokenizer, entry.words)
                      for name, entry in self.table.items()}
        self.first = np.append(store.first, len(store.anchor))          # (documents + 1,)
        held_out = store.held_out[store.first]
        half = 2 * store.centroids.shape[1]                 # of the groups; training's come first
        self.documents = {}
        self.pools = {}
        self.usable = {}
        counts = {}
        for split, chosen, groups in (("train", ~held_out, slice(half + 1)),
                                      ("validation", held_out, slice(half, None))):
            rows = np.flatnonzero(chosen)
            lengths = np.diff(self.first)[rows]
            self.documents[split] = rows, np.append(0, np.cumsum(lengths))
            for form, order, bounds in zip(FORMATS, store.order, store.bounds):
                ends = bounds[groups]
                begin = ends[0]
                sizes = np.diff(ends)
                self.pools[split, form] = Pool(order[begin:ends[-1]], ends[::2] - begin, sizes[::2])
            for name, entry in self.table.items():
                found = self.pools[split, entry.format].counts(entry)
                self.usable[split, name] = np.flatnonzero(found >= support + query)
                ways = max(entry.ways, 1 + (mixing and split == "train"))
                counts[f"{name}: {split} sentences"] = found, ways
        least = [1 + mixing]
        for entry in self.table.values():
            least += [entry.ways, 1 + (entry.others > 0)]
        check_clusters("--clusters", support + query, max(least), counts)


def check_clusters(option, wanted, least, found):
    """Raise InputError unless there are `least` clusters, and each of found, {what: (counts (K,),
    ways)}, has `ways` clusters of `wanted`. The message has the largest number of clusters that
    fits: sizes are taken to be inverse to it. Else it says that none does, and what is missing."""
    largest = {what: np.sort(counts)[::-1][:ways] for what, (counts, ways) in found.items()}
    K = len(next(iter(found.values()))[0])
    if K < least:
        raise InputError(f"these tasks are of {least} clusters: give {option} {least} or more")
    if min(sizes[-1] for sizes in largest.values()) >= wanted:
        return
    fits = {what: np.count_nonzero(counts) * largest[what][-1] / wanted
            for what, (counts, _) in found.items()}
    what = min(fits, key=fits.get)
    times = f"{least / fits[what]:.1f} times as much" if fits[what] else "more"
    advice = f"{option} {int(fits[what])} is the largest number that fits"
    if fits[what] < least:
        advice = (f"no {option} fits, it must be {least} or more: give {times} text, or a smaller "
                  "--support and --query")
    sizes = ", ".join(map(str, largest[what]))
    raise InputError(f"{what}: {len(largest[what])} cluster(s) must have {wanted}, the largest "
                     f"have {sizes}: {advice}")


def meta_task(index, seed, step, i, *, variant=None, split="train", stream="task", avoid=()):
    """Task i of a step, a pure function of its arguments (section 3.2, A.2; Eq. 17-19).

    variant: None draws one of the index's. stream: of common.STREAMS. avoid: of a partner
    (train.Run.batch), its task's `clusters`, to get others (the index needs mixing). All sentences
    are of the split. Labels are balanced in each set, and the sets share no anchor. VARIANTS says
    what the sources are and what a label means.
    """
    rng = common.rng(seed, step, i, stream)
    drawn = index.variants[rng.integers(len(index.variants))]       # also if it is given
    name = variant or drawn
    ways = index.table[name].ways
    usable = index.usable[split, name]
    clusters = tuple(avoid)
    while clusters == tuple(avoid):         # () without a task to avoid
        clusters = tuple(rng.choice(usable, ways, replace=False).tolist())
    draw = Draw(index, rng, name, split, clusters)
    support, query = (draw.examples(n) for n in index.sizes)
    return Task(name, clusters, support, query)


def shuffled(rng, items):
    """Yield the items in random order; a few cost the same however many there are."""
    seen = set()
    while len(seen) < len(items):
        j = int(rng.integers(len(items)))
        if j not in seen:
            seen.add(j)
            yield int(items[j])


def balanced(rng, K, n):
    """n labels of K classes in random order, as many of each or one more: 32 of 3: 11, 11, 10."""
    extra = rng.permutation(K)[:n % K]
    return rng.permutation(np.append(np.repeat(np.arange(K), n // K), extra))


def outside(rng, low, high, size):
    """A random one of 0..size - 1 that is not in low..high - 1."""
    j = int(rng.integers(size - (high - low)))
    return j if j < low else j + int(high - low)


class Draw:
    """One task as it is drawn: each anchor serves once, and waits if it cannot serve a label."""

    def __init__(self, index, rng, name, split, clusters):
        self.index = index
        self.rng = rng
        self.name = name
        self.split = split
        self.entry = index.table[name]
        self.clusters = clusters
        self.pool = index.pools[split, self.entry.format]
        counts = self.pool.counts(self.entry)
        self.anchors = []               # of each cluster those that can serve
        for c in clusters:
            begin = self.pool.start[c]
            self.anchors.append(shuffled(rng, self.pool.order[begin:begin + counts[c]]))

    def examples(self, n):
        """One set of the task: n Examples with balanced labels."""
        index, entry = self.index, self.entry
        labels = balanced(self.rng, len(entry.words), n)
        shown = list(self.clusters) if entry.centroids else []
        centroids = index.store.centroids[FORMATS.index(entry.format)][shown]           # (V, d)
        places = sorted(template_fields(entry.template))        # {0}, {1}, ...
        ids, slots = [], []
        for label in labels:
            texts = [index.store.sentence(s).tolist() for s in self.sentences(label)]
            texts += [None] * len(shown)                # where vectors will stand
            fields = dict(zip_longest(places, texts, fillvalue=[]))
            source, places_of_vectors = fill_template(
                index.parts[self.name], fields, index.max_tokens)
            ids.append(source)
            slots.append(places_of_vectors)
        vectors = torch.from_numpy(centroids).expand(n, *centroids.shape)               # (n, V, d)
        return Examples(ids, slots, vectors, torch.from_numpy(labels), index.words[self.name])

    def sentences(self, label):
        """An example's sentences. An anchor that cannot serve this label waits for another one."""
        which = label if self.entry.ways > 1 else 0
        waiting = []
        for anchor in self.anchors[which]:
            if found := self.beside(self.clusters[which], anchor, label):
                if waiting:
                    self.anchors[which] = chain(self.anchors[which], waiting)
                return found
            waiting.append(anchor)
        raise InputError(f"{self.name}: cluster {self.clusters[which]} has too few different "
                         f"sentences in {self.split}: give more text")

    def beside(self, cluster, anchor, label):
        """The anchor and what stands beside it, no two alike, or None if none were found."""
        sentence = self.index.store.sentence
        chosen, texts = [anchor], {sentence(anchor).tobytes()}
        for relation in self.entry.beside[label] if self.entry.beside else ():
            for _ in range(20):
                new = self.related(cluster, anchor, relation)
                text = sentence(new).tobytes()
                if text not in texts:
                    break
            else:                   # rare: all that can stand beside the anchor reads like it
                return None
            chosen.append(new)
            texts.add(text)
        if self.entry.choice:       # the right one to its place among the wrong ones
            right, *others = chosen[1:]
            places = self.rng.permutation(others).tolist()
            places.insert(label, right)
            chosen = [anchor, *places]
        return chosen

    def related(self, cluster, anchor, relation):
        """A random sentence of the split in a relation to an anchor of the cluster: next (it
        follows), near (in its document, not adjacent), far (in another), same, other (cluster)."""
        index = self.index
        rng = self.rng
        order = self.pool.order
        if relation == "next":
            return anchor + 1
        low, high = self.pool.start[cluster:cluster + 2]
        if relation == "same":
            return int(order[rng.integers(low, high)])
        if relation == "other":
            return int(order[outside(rng, low, high, len(order))])
        document = np.searchsorted(index.first, anchor, "right") - 1        # in memory
        first, end = index.first[document:document + 2]
        if relation == "near":
            low = max(anchor - 1, first) - first
            high = min(anchor + 2, end) - first
            return int(first) + outside(rng, low, high, end - first)
        rows, start = index.documents[self.split]                           # far
        k = np.searchsorted(rows, document)
        j = outside(rng, start[k], start[k + 1], start[-1])
        k = np.searchsorted(start, j, "right") - 1
        return int(index.first[rows[k]] + j - start[k])


if __name__ == "__main__":
    import show
    show.main(show.meta_tasks)
