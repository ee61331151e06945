"""What the embedded T5 is taught: a pool of sentences, and lessons (batches) drawn from it.

    pool = Pool(path, tokenizer, sentences, teach)
    lesson = Lessons(pool, tokenizer, parameters).mc_cluster(np.random.default_rng(0), hard=0.5)

Used by tiny_train.py. Letters: V vocabulary, d d_model, n taught sentences, B batch, T tokens.
"""

import numpy as np
import torch
import torch.nn.functional as F

from kmeans import kmeans
from t5 import EOS, T5Config

CONFIG = T5Config(d_model=256, d_kv=64, d_ff=512, num_layers=3, num_decoder_layers=2, num_heads=4,
                  vocab_size=8500, gated=False, tied=False, scaled=False, num_buckets=32,
                  max_distance=128, eps=1e-6)
D, V = CONFIG.d_model, CONFIG.vocab_size
MASK = V - 1                            # <extra_id_0>; <extra_id_j> is MASK - j
SOURCES = ("corpus", "imdb", "novels", "factual", "trivia")
TAUGHT = (15000, 27000, 8000, 4000, 6000)       # sentences of each that the teacher embeds
CLUSTERS, LONGEST, SEED = 250, 40, 0            # K-means; pieces of a sentence that are read
OPPOSITES = (("terrible", "great"), ("bad", "good"), ("negative", "positive"),
             ("awful", "wonderful"), ("worst", "best"), ("boring", "fun"), ("poor", "excellent"),
             ("no", "yes"), ("No", "Yes"), ("stupid", "beautiful"), ("weak", "strong"),
             ("hate", "love"))
GRADES = ("terrible", "bad", "okay", "good", "great")
TEMPLATES = ("{} It was <X> ?", "{} It was <X> .", "{} <X> .", "{} <X> :", "{} This is <X> .",
             "{} It is about <X> .", "<X> : {}", "{} It is <X> .", "A <X> one . {}",
             "{} All in all , it was <X> .", "{} <X> ?", "{} Answer: <X> .")


def taught_rows(document, source, held):
    """Whole documents, drawn until TAUGHT sentences of each source are there -> rows, rising."""
    rows = []
    for number, wanted in enumerate(TAUGHT):
        chosen = np.flatnonzero((source == number) & ~held)
        chosen = chosen[np.random.default_rng((SEED, 2, number)).permutation(len(chosen))]
        total = np.cumsum(np.bincount(document, minlength=len(source))[chosen])
        last = np.searchsorted(total, wanted) + 1
        rows.append(np.flatnonzero(np.isin(document, chosen[:last])))
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
        vectors = teach([sentences[row] for row in self.rows], "sentences")
        self.taught = F.normalize(torch.from_numpy(vectors - vectors.mean(0)), dim=1).numpy()
        self._learn_words(tokenizer, teach)
        self._learn_places(source, held)
        self.states, self.centroids = np.zeros((len(self.rows), D), np.float32), None
        start = kmeans(torch.from_numpy(self.taught), CLUSTERS, (SEED, 3), 12)
        self.set_clusters(start.assignments.numpy())

    def _learn_words(self, tokenizer, teach):
        """The vocabulary's counts and, by the teacher, its meaning; `words`: the frequent ones."""
        self.pieces = [tokenizer.id_to_token(i) for i in range(V)]
        self.counts = np.bincount(self.tokens, minlength=V)
        self.words = np.array([i for i, piece in enumerate(self.pieces) if self.counts[i] > 30
                               and piece[0] == "▁" and piece[1:].isalpha() and len(piece) > 3])
        texts = [piece.replace("▁", " ").strip() or "." for piece in self.pieces]
        vocabulary = teach(texts, "vocabulary")
        self.vocabulary = vocabulary - vocabulary[self.words].mean(0)               # (V, 384)
        words = torch.from_numpy(self.vocabulary[self.words])
        self.directions = F.normalize(words, dim=1).numpy()                         # (words, 384)
        self.usual = (self.taught[::20] @ self.directions.T).mean(0)    # each word's mean cosine

    def _learn_places(self, source, held):
        """Who is whose neighbour in which document, and where the rated reviews are."""
        self.owner = self.document[self.rows]
        self.source = source[self.owner]
        self.first = np.searchsorted(self.owner, self.owner)
        self.last = np.searchsorted(self.owner, self.owner, "right")
        adjacent = np.append(self.rows[1:], 0) == self.rows + 1
        within = np.arange(len(self.rows)) + 1 < self.last
        self.followed = np.flatnonzero(within & adjacent & (self.last - self.first > 3))
        self.length = np.minimum(np.diff(self.offsets)[self.rows], LONGEST)
        self.usable = np.flatnonzero(self.length > 4)
        rated = np.flatnonzero((self.rating != 0) & ~held)
        ends = [np.searchsorted(self.document, rated, side) for side in ("left", "right")]
        self.reviews = np.stack([rated, *ends], 1)              # document, its first row, the end

    def set_clusters(self, assignments):
        """Remember each sentence's cluster (n,), CLUSTERS for none, and who is in each."""
        self.cluster, self.order = assignments, np.argsort(assignments, kind="stable")
        self.start = np.searchsorted(assignments[self.order], np.arange(CLUSTERS + 1))
        self.anchors = self.usable[assignments[self.usable] < CLUSTERS]

    def first_states(self, table):
        """Before training the encoder is nearly the identity: a sentence's state is about the
        mean of its pieces' normalized embeddings. table (V, d)."""
        table = F.normalize(table, dim=1).numpy() * D ** 0.5
        for row in range(len(self.rows)):
            self.states[row] = table[self.ids(row)].mean(0)

    def ids(self, row, cap=LONGEST):
        """The first pieces of a taught sentence, at most cap."""
        start = self.offsets[self.rows[row]]
        return self.tokens[start:min(start + cap, self.offsets[self.rows[row] + 1])].tolist()

    def members(self, cluster):
        """The rows of a cluster."""
        return self.order[self.start[cluster]:self.start[cluster + 1]]

    def alike(self, rng, count):
        """count rows of similar length, for little padding."""
        rows = rng.choice(len(self.rows), 3 * count, replace=False)
        rows = rows[np.argsort(self.length[rows], kind="stable")]
        return rows[count * rng.integers(3):][:count]


class Lesson(dict):
    """A batch: ids (B, T), mask (B, T), target (B,) pieces or (B, words) shares; where there are
    some: slots (B, 4) and their vectors (B, 4, d), prompt (B, P, d), words to choose among, span of
    the sentences, inputs of the decoder (B, L), tasks whose prompts are to be tuned."""


class Lessons:
    """Draws lessons; each method takes a numpy Generator, an anchor task also a difficulty 0..1."""

    def __init__(self, pool, tokenizer, p):
        self.pool, self.tokenizer, self.p, self.tasks = pool, tokenizer, p, {}
        self.templates = [[self.encode(half.replace("<X>", "<extra_id_0>"))
                           for half in template.split("{}")] for template in TEMPLATES]
        self.opposites = [[self.encode(word)[0] for word in pair] for pair in OPPOSITES]
        self.grades = [self.encode(word)[0] for word in GRADES]
        self.answers = [self.encode(word)[0] for word in ("yes", "no", "maybe")]
        self.letters = [self.encode(letter)[0] for letter in "ABCD"]
        self.options = [self.encode(part) for part in ("? A.", "B.", "C.", "D.",
                                                       ". Answer: <extra_id_0>")]
        self.stop = self.encode(".")

    def encode(self, text):
        """Text -> ids, without </s>."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def lesson(self, sources, target, **more):
        """Lists of ids -> a padded Lesson; </s> is added."""
        ids = torch.zeros(len(sources), max(map(len, sources)) + 1, dtype=torch.long)
        for row, source in enumerate(sources):
            ids[row, :len(source) + 1] = torch.tensor([*source, EOS])
        return Lesson(ids=ids, mask=ids != 0, target=torch.as_tensor(target), **more)

    def prompt(self, rng, count, share=1 / 3):
        """In a share of the lessons random noisy vocabulary rows, for the model to live with."""
        if rng.random() > share:
            return None
        length = int(rng.integers(8, 25))
        rows = torch.from_numpy(rng.integers(0, 5000, length))
        rows = self.p["shared.weight"].detach()[rows]
        noise = torch.from_numpy(rng.normal(size=rows.shape)).float()
        return (rows + 0.3 * noise).expand(count, -1, -1)

    # ------------------------------------------------------------------ words, ratings, prompts
    def distill(self, rng, count=64):
        """Sentences: at <X> the teacher's similarity to words is to be read, from the mean state
        its vector."""
        pool, rows, bare = self.pool, self.pool.alike(rng, count), rng.random() < 0.4
        before, after = [[], []] if bare else self.templates[rng.integers(len(self.templates))]
        near = torch.from_numpy(pool.taught[rows] @ pool.directions.T - pool.usual)
        return self.lesson([before + pool.ids(row) + after for row in rows],
                           torch.softmax(near / 0.06, -1), rows=rows, bare=bare,
                           span=(len(before), torch.from_numpy(pool.length[rows])),
                           prompt=None if bare else self.prompt(rng, count))

    def review(self, rng, cap):
        """A sentence or two of a rated review, more often its last or first -> ids, rating."""
        document, start, end = self.pool.reviews[rng.integers(len(self.pool.reviews))]
        if rng.random() < 0.6:
            row = rng.integers(start, end)
        else:
            row = end - 1 if rng.random() < 0.6 else start
        stop = self.pool.offsets[min(end, row + 1 + int(rng.random() < 0.5))]
        ids = self.pool.tokens[self.pool.offsets[row]:stop][:cap].tolist()
        return ids, int(self.pool.rating[document])

    def rating(self, rng, count=56):
        """Is the review good or bad (or: how good, of five), in changing templates and words."""
        drawn = sorted((self.review(rng, 48) for _ in range(3 * count)), key=lambda r: len(r[0]))
        drawn = drawn[count * rng.integers(3):][:count]
        usual = rng.random() < 0.3
        before, after = self.templates[0 if usual else rng.integers(len(self.templates))]
        usual = rng.random() < 0.3
        pair = self.opposites[0 if usual else rng.integers(len(self.opposites))]
        if rng.random() < 0.2:
            target = [self.grades[0 if r < 3 else 1 if r < 5 else 3 if r < 9 else 4]
                      for _, r in drawn]
        else:
            target = [pair[int(r > 5)] for _, r in drawn]
        sources = [before + ids + after for ids, _ in drawn]
        return self.lesson(sources, target, prompt=self.prompt(rng, count))

    def new_task(self, rng):
        """A task with arbitrary words for ratings, sources or clusters, and its prompt to tune.
        In 6 of 10 the prompt says at first what is meant: each class's mean state and its word."""
        pool, classes, kind = self.pool, int(rng.choice([2, 2, 3, 4, 6])), rng.random()
        words = rng.choice(pool.words, classes, replace=False).tolist()
        table = self.p["shared.weight"].detach()
        prompt = table[torch.from_numpy(rng.integers(0, 5000, 20))].clone()
        if kind < 0.25:
            members, words = None, words[:2]
        else:
            if kind < 0.5:
                members = [np.flatnonzero(pool.source == source)
                           for source in rng.choice(5, min(classes, 4), replace=False)]
            else:
                large = np.flatnonzero(np.diff(pool.start) > 20)
                members = [pool.members(c) for c in rng.choice(large, classes, replace=False)]
            for j, (rows, word) in enumerate(zip(members, words) if rng.random() < 0.6 else ()):
                rows = rows[pool.cluster[rows] < CLUSTERS][:64]
                prompt[3 * j] = torch.from_numpy(pool.states[rows].mean(0))
                prompt[3 * j + 1] = table[word]
        return {"template": self.templates[rng.integers(len(self.templates))], "members": members,
                "words": words, "age": 0, "prompt": prompt,
                "moments": [torch.zeros_like(prompt), torch.zeros_like(prompt)]}

    def steer(self, rng, tasks=4, count=14):
        """Tasks that only a prompt can explain; their prompts are tuned along with the model, and
        thrown away after 60 steps each."""
        sources, target, chosen = [], [], []
        for k in rng.choice(12, tasks, replace=False):
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
                    ids = self.pool.ids(rng.choice(task["members"][label]), 32)
                sources.append(task["template"][0] + ids + task["template"][1])
                target.append(task["words"][label])
        prompts = torch.stack([task["prompt"].requires_grad_() for task in chosen])
        prompts = prompts.repeat_interleave(count, 0)                   # (tasks * count, P, d)
        return self.lesson(sources, target, tasks=chosen, prompt=prompts)

    def cloze(self, rng, count=48):
        """T5's span corruption with spans of one piece: up to 5 masks a sentence."""
        sources, inputs, target = [], [], []
        for row in self.pool.alike(rng, count):
            ids = self.pool.ids(row)
            places = np.sort(rng.choice(len(ids), max(1, len(ids) // 7), replace=False))
            places = places[np.diff(places, prepend=-2) > 1][:5]
            inputs.append([0] + [t for j, at in enumerate(places) for t in (MASK - j, ids[at])])
            target.append([-100] + [t for at in places for t in (ids[at], -100)])
            for j, at in enumerate(places):
                ids[at] = MASK - j
            sources.append(ids)
        longest = max(map(len, inputs))

        def pad(lists, value):
            return torch.tensor([x + [value] * (longest - len(x)) for x in lists])
        return self.lesson(sources, pad(target, -100), inputs=pad(inputs, 0),
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

    def sp_next(self, rng, hard):
        """`s1 <X> . s2`: does s2 follow (yes), come from another document (no), or from elsewhere
        in this one (maybe)?"""
        pool, cap, sources = self.pool, self.cap(rng, hard), []
        count = min(60, 2600 // (2 * cap + 4))
        for i in range(count):
            row = int(rng.choice(pool.followed))
            other = (row + 1, self.anchor(rng, document=pool.owner[row]), self.near(rng, row))
            other = pool.ids(other[i % 3], cap)
            sources.append(pool.ids(row)[-cap:] + [MASK] + self.stop + other)
        return self.lesson(sources, [self.answers[i % 3] for i in range(count)],
                           words=self.answers, prompt=self.prompt(rng, count))

    def sp_cluster(self, rng, hard):
        """`s1 <X> . s2`: are they of one cluster?"""
        pool, cap, sources = self.pool, self.cap(rng, hard), []
        count = min(60, 2600 // (2 * cap + 4))
        for i in range(count):
            row = self.anchor(rng)
            if i % 2:
                other = pool.ids(self.anchor(rng, pool.cluster[row]), cap)
            else:
                other = self.related(rng, row, cap, hard)
            sources.append(pool.ids(row, cap) + [MASK] + self.stop + other)
        return self.lesson(sources, [self.answers[i % 2] for i in range(count)],
                           words=self.answers[:2], prompt=self.prompt(rng, count))

    def choose(self, rng, query, right, wrong):
        """Query, right and wrong options -> source, with the right one somewhere, and its place."""
        place = int(rng.integers(4))
        order = [wrong[j] for j in rng.permutation(3)]
        order.insert(place, right)
        options = sum((mark + ids for mark, ids in zip(self.options, order)), [])
        return query + options + self.options[4], place

    def choice(self, rng, drawn, **more):
        """Pairs of source and place -> Lesson."""
        return self.lesson([source for source, _ in drawn],
                           [self.letters[place] for _, place in drawn], words=self.letters,
                           prompt=self.prompt(rng, len(drawn), 0.2), **more)

    def mc_next(self, rng, hard):
        """`s0 ? A. s1 B. s2 C. s3 D. s4 . Answer: <X>`: which follows s0?"""
        pool, cap, drawn = self.pool, self.cap(rng, hard), []
        for _ in range(min(40, 2600 // (5 * cap + 14))):
            row = int(rng.choice(pool.followed))
            home = pool.owner[row]
            first = self.near(rng, row) if rng.random() < hard else self.anchor(rng, document=home)
            wrong = [first, self.anchor(rng, document=home), self.anchor(rng, document=home)]
            drawn.append(self.choose(rng, pool.ids(row)[-cap:], pool.ids(row + 1, cap),
                                     [pool.ids(other, cap) for other in wrong]))
        return self.choice(rng, drawn)

    def mc_cluster(self, rng, hard):
        """The same: which is of s0's cluster?"""
        pool, cap, drawn = self.pool, self.cap(rng, hard), []
        for _ in range(min(40, 2600 // (5 * cap + 14))):
            row = self.anchor(rng)
            wrong = [pool.ids(self.anchor(rng, pool.cluster[row]), cap) for _ in range(3)]
            right = self.related(rng, row, cap, hard)
            drawn.append(self.choose(rng, pool.ids(row, cap), right, wrong))
        return self.choice(rng, drawn)

    def ss_cluster(self, rng, hard):
        """The same with four clusters' centroids as vectors; where it is easy, means of four
        states, s0's among them."""
        pool, cap, drawn, slots, vectors = self.pool, self.cap(rng, hard) + 8, [], [], []
        for _ in range(48):
            row = self.anchor(rng)
            wrong = [self.anchor(rng, pool.cluster[row]) for _ in range(3)]
            clusters = [pool.cluster[other] for other in wrong]
            query = pool.ids(row, cap)
            source, place = self.choose(rng, query, [2], [[2]] * 3)     # <unk> holds their places
            clusters.insert(place, pool.cluster[row])
            slots.append([len(query) + sum(map(len, self.options[:j + 1])) + j for j in range(4)])
            drawn.append((source, place))
            if pool.centroids is not None and rng.random() < hard:
                vectors.append(pool.centroids[clusters])
            else:
                few = [rng.choice(pool.members(cluster), 4) for cluster in clusters]
                few[place][0] = row
                vectors.append(np.stack([pool.states[rows].mean(0) for rows in few]))
        return self.choice(rng, drawn, slots=torch.tensor(slots),
                           vectors=torch.from_numpy(np.stack(vectors)))
