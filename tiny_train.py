"""Training of the embedded T5: a start that already works, an optimizer, and the loop.

    parameters = train(pool, tokenizer, Path("state.pt"), Path("tiny/tasks"), steps=1620)

Used by tiny.py. The start does most of the work. Token embeddings are fitted by ridge regression,
so that a sentence's mean embedding is the teacher's vector of it; and each attention head begins
with a role (`initial_weights`), so that options can be matched with a query from the first step on.

Letters: V vocabulary, d d_model, S its leading dimensions, which carry the meaning, n sentences,
B batch, T tokens, L decoder inputs, P prompt vectors.
"""

import csv

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import atomic_write
from kmeans import kmeans
from t5 import T5, InputError, decode, embed_tokens, encode, expected_shapes, next_token_logits
from tiny_lessons import CLUSTERS, CONFIG, MASK, OPPOSITES, SEED, D, Lessons, V

S = 192
# The dimensions after the meaning: 1 everywhere; log frequency; is an option's letter or <X>; the
# letter that this piece stands under; the letters it votes for; the rest, by which pieces differ.
ONE, FREQUENCY, LETTER, MINE, VOTE, REST = S, S + 1, S + 2, S + 7, S + 12, S + 17
RECLUSTER = (0.2, 0.45, 0.7, 0.88)      # shares of the steps after which clusters are made anew
RATES = {"lm_head.weight": 0.003, "shared.weight": 0.0015}      # Adam's; the others':
RATE, MUON_RATE = 0.002, 0.002          # three times as much destroys what the start knows


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
    pieces (V, S-1), and their sentiment (V,).

    Meaning: a sentence's mean piece is the teacher's vector of it, in its first S-1 principal
    directions. Sentiment: a review sentence's mean piece is the sign of the review's rating.
    """
    taught, words = torch.from_numpy(pool.taught), torch.from_numpy(pool.vocabulary)
    share = torch.from_numpy(pool.counts / pool.counts.sum()).float()
    start = words * (1e-3 / (1e-3 + share) + 0.3)[:, None] * 1.7    # rare pieces mean more
    meaning = ridge([pool.ids(row) for row in range(len(pool.rows))], taught, start, 0.06)
    basis = torch.linalg.svd(taught[::3], full_matrices=False)[2][:S - 1]           # (S-1, 384)
    bags, signs = [], []
    for document, begin, end in pool.reviews:
        for row in range(begin, end):
            bags.append(pool.tokens[pool.offsets[row]:pool.offsets[row + 1]])
            signs.append([1.0 if pool.rating[document] > 5 else -1.0])
    signs = torch.tensor(signs)
    sentiment = ridge(bags, signs - signs.mean(), torch.zeros(V, 1), 3.0)[:, 0]
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
        if "layer_norm" in name or "relative" in name:
            p[name] = torch.ones(shape) if "layer_norm" in name else torch.zeros(shape)
        else:
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
    share = torch.from_numpy(pool.counts / pool.counts.sum()).float()
    logs = (share + 1e-6).log()
    logs = (logs - logs.mean()) / logs.std()
    table, head = torch.zeros(V, D), torch.randn(V, D, generator=rng) * 0.1
    table[:, :S] = torch.cat([2.5 * meaning, 3 * sentiment[:, None]], 1)
    table[:, :S] -= share @ table[:, :S]                        # the average text means nothing
    table[:, ONE], table[:, FREQUENCY] = 8, logs
    table[:, REST:] = 0.4 * torch.randn(V, D - REST, generator=rng)
    marks = [pool.pieces.index(f"▁{letter}") for letter in "ABCD"] + [MASK]
    sentinels = torch.randn(100, D - REST, generator=rng)
    table[V - 100:, REST:] = 8 * F.normalize(sentinels, dim=1)
    for i, mark in enumerate(marks):
        table[mark, :S], table[mark, LETTER + i] = 0, 12
    seen = torch.from_numpy(pool.counts > 30)[:, None]
    head[:, :S] = torch.cat([8 * F.normalize(direction, dim=1) * seen, sentiment[:, None]], 1)
    head[:, ONE] = logs * 0.5
    for low, high in OPPOSITES[:7]:
        head[pool.pieces.index("▁" + low), S - 1] = -2
        head[pool.pieces.index("▁" + high), S - 1] = 2
    for i in range(4):
        head[marks[i], VOTE + i] = 4
    head[pool.pieces.index("▁yes"), VOTE + 4] = 2       # s1 votes for <X>, if s2 is like it
    head[pool.pieces.index("▁no"), VOTE + 4] = -2
    return table, head


def rows_of(head):
    """The rows of a projection that belong to one attention head."""
    return slice(CONFIG.d_kv * head, CONFIG.d_kv * (head + 1))


def give_roles(p, name, block):
    """Set one attention's projections, in place, as `initial_weights` says; blocks -2 and -1 are
    the decoder's."""
    q, k, v, o = (p[f"{name}.{part}.weight"] for part in "qkvo")
    last = rows_of(3)

    def compare(head, first, stop, scale):
        rows = slice(rows_of(head).start, rows_of(head).start + stop - first)
        q[rows_of(head)] = 0
        q[rows, first:stop] = scale * torch.eye(stop - first)
        k[rows_of(head)] = q[rows_of(head)]

    def copy(head, source, target, scale):
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
            q[rows.start], k[rows.start] = 0, 0
            q[rows.start, ONE], k[rows.start, FREQUENCY] = 0.5, -1
    if block == 0:
        q[rows_of(0)], k[rows_of(0)] = 0, 0
        q[0, ONE], k[0, LETTER:LETTER + 5] = 0.9, 1.2
        copy(0, LETTER, MINE, 0.5)
    if block >= 0:
        compare(3, 0, 64, 1.5)
    if block == 1:
        q[last.stop - 1], k[last.stop - 1] = 0, 0
        q[last.stop - 1, ONE], k[last.stop - 1, MINE:MINE + 5] = 1.25, 1.5
        copy(3, MINE, VOTE, 1)
    if block == -2:
        compare(3, REST, D, 1.1)
    if block == -1:
        q[last], k[last] = 0, 0
        q[last.start, ONE], k[last.start, MINE:MINE + 5] = 0.7, -1.4
        copy(3, VOTE, VOTE, 2)


# ----------------------------------------------------------------------------- losses
def plain_t5(p):
    """Parameters -> the T5 they stand for.

    T5 scales neither attention nor an untied head, training does: the factors are folded into the
    weights here, in every step as in the export. (to_teacher is no part of the T5.)
    """
    weights = {name: value for name, value in p.items() if name != "to_teacher"}
    for name in weights:
        if name.endswith("Attention.q.weight"):
            weights[name] = p[name] * CONFIG.d_kv ** -0.5
    weights["lm_head.weight"] = p["lm_head.weight"] * 2 * D ** -0.5
    return T5(CONFIG, weights)


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
        best = (logits.topk(5).indices == target[:, None]).any(1)
        return F.cross_entropy(logits, target), float(best.float().mean())
    logits, words = next_token_logits(t5, y[:, 1]), lesson.get("words")
    loss = F.cross_entropy(logits, target)
    if words is None:
        return loss, float((logits.argmax(1) == target).float().mean())
    places = (torch.tensor(words) == target[:, None]).long().argmax(1)
    loss = loss + F.cross_entropy(logits[:, words], places)     # over the label words alone as well
    return loss, float((logits[:, words].argmax(1) == places).float().mean())


# ----------------------------------------------------------------------------- the optimizer
class Optimizer:
    """Muon (Jordan 2024: momentum, orthogonalized) for the blocks' matrices but the decoder's self-
    attention, which has two positions; Adam for all else."""

    def __init__(self, p):
        self.muon = [n for n in p if "block" in n and p[n].ndim == 2 and "bias" not in n
                     and not (n.startswith("decoder") and ".SelfAttention" in n)]
        self.moments = {n: torch.zeros(1 if n in self.muon else 2, *p[n].shape) for n in p}
        self.steps = 0

    @torch.no_grad()
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
        X = X / (torch.linalg.matrix_norm(X)[:, None, None] + 1e-12)
        for _ in range(4):                          # Newton-Schulz: all singular values towards 1
            A = X @ X.mT
            X = 3.4445 * X + (2.0315 * A @ A - 4.775 * A) @ X
        for name, x in zip(names, X):
            p[name].sub_(x if p[name].shape == x.shape else x.T, alpha=MUON_RATE * scale)


@torch.no_grad()
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
@torch.no_grad()
def encode_rows(t5, lessons, rows):
    """The student's mean states, without prompt and </s>, of n of the pool's rows -> (n, d)."""
    states, pool = torch.zeros(len(rows), D), lessons.pool
    order = np.argsort(pool.length[rows], kind="stable")
    for start in range(0, len(order), 128):
        some = order[start:start + 128]
        lesson = lessons.lesson([pool.ids(row) for row in rows[some]], [0] * len(some))
        lengths = torch.from_numpy(pool.length[rows[some]])
        states[some] = mean_states(read_lesson(t5, lesson)[0], 0, lengths)
    return states


def recluster(t5, lessons, step):
    """Cluster 12,000 sentences by the student's present states: the anchor tasks are of these."""
    pool = lessons.pool
    rng = np.random.default_rng((SEED, 5, step))
    rows = np.sort(rng.choice(pool.usable, 12000, replace=False))
    states = encode_rows(t5, lessons, rows)
    found = kmeans(states, CLUSTERS, (SEED, 6, step), 15)
    assignments = np.full(len(pool.rows), CLUSTERS)
    assignments[rows], pool.states[rows] = found.assignments.numpy(), states.numpy()
    pool.centroids = found.centroids.numpy()
    pool.set_clusters(assignments)


def draw(lessons, step, progress):
    """The two lessons of a step, by name: a function of the step (but for the tuned prompts)."""
    rng = np.random.default_rng((SEED, step, 7))
    hard = 0.95 * float(np.clip((progress - 0.05) / 0.5, 0, 1))
    general = str(rng.choice(["distill", "rating", "steer", "cloze"], p=[0.3, 0.3, 0.25, 0.15]))
    anchor = str(rng.choice(["sp_next", "sp_cluster", "mc_next", "mc_cluster", "ss_cluster"],
                            p=[0.12, 0.26, 0.14, 0.24, 0.24]))
    return {general: getattr(lessons, general)(rng), anchor: getattr(lessons, anchor)(rng, hard)}


def fit_teacher_map(t5, lessons):
    """(d, 384): from the student's first mean states to the teacher's vectors, by ridge."""
    pool = lessons.pool
    rows = np.random.default_rng((SEED, 8)).choice(len(pool.rows), 3000, replace=False)
    h = encode_rows(t5, lessons, rows)
    h = h - h.mean(0)
    taught = torch.from_numpy(pool.taught[rows])
    return torch.linalg.solve(h.T @ h + 30 * torch.eye(D), h.T @ taught)


def step_once(p, optimizer, lessons, step, progress):
    """One optimizer step on two lessons -> loss, {lesson: figure}. InputError if not finite."""
    t5, losses, figures, tasks = plain_t5(p), [], {}, []
    for name, lesson in draw(lessons, step, progress).items():
        loss, figures[name] = lesson_loss(t5, lesson, lessons.pool, p["to_teacher"])
        losses.append(loss)
        tasks += lesson.get("tasks", [])
    total = sum(losses)
    if not total.isfinite():
        raise InputError(f"the loss is {float(total)} at step {step}: lower RATES, start again")
    grads = torch.autograd.grad(total, [*p.values(), *(task["prompt"] for task in tasks)],
                                allow_unused=True)
    named = {n: torch.zeros_like(v) if g is None else g for (n, v), g in zip(p.items(), grads)}
    optimizer.step(p, named, min(1, (step + 1) / 20, (1 - progress) / 0.6 + 0.02))
    tune_prompts(tasks, grads[len(p):])
    return float(total), figures


def train(pool, tokenizer, state, tasks, steps):
    """Train, from the file state if it is there -> parameters. Clusters and throw-away prompts are
    not in that file: after an interruption they are made anew."""
    p = initial_weights(pool, fit_embeddings(pool))
    pool.first_states(p["shared.weight"])
    lessons, begin, smooth = Lessons(pool, tokenizer, p), 0, {}
    p["to_teacher"] = fit_teacher_map(plain_t5(p), lessons)
    optimizer = Optimizer(p)
    if state.exists():
        saved = torch.load(state, weights_only=True)
        begin = optimizer.steps = saved["step"]
        optimizer.moments = saved["moments"]
        for name in p:
            p[name].copy_(saved["p"][name])
        recluster(plain_t5(p), lessons, begin)
    for value in p.values():
        value.requires_grad_()

    def frozen():
        return plain_t5({name: value.detach() for name, value in p.items()})
    tqdm.write(f"step {begin}: {gates(frozen(), lessons, tasks)}")
    bar = tqdm(range(begin, steps), "training", initial=begin, total=steps)
    for step in bar:
        if step in [int(steps * share) for share in RECLUSTER]:
            recluster(frozen(), lessons, step)
        loss, figures = step_once(p, optimizer, lessons, step, step / steps)
        for name, figure in figures.items():
            smooth[name] = smooth.get(name, figure) * 0.95 + figure * 0.05
        bar.set_postfix_str(f"loss {loss:.2f}")
        if (step + 1) % 100 == 0 or step + 1 == steps:
            told = " ".join(f"{name} {figure:.3f}" for name, figure in sorted(smooth.items()))
            tqdm.write(f"step {step + 1}: {told}")
            saved = {"step": step + 1, "p": {name: value.detach() for name, value in p.items()},
                     "moments": optimizer.moments}
            atomic_write(state, lambda file: torch.save(saved, file))
        if (step + 1) % 300 == 0 or step + 1 == steps:
            tqdm.write(f"step {step + 1}: {gates(frozen(), lessons, tasks)}")
    return {name: value.detach() for name, value in p.items()}


@torch.no_grad()
def gates(t5, lessons, tasks):
    """Zero-shot accuracy of `text It was <X> ?`, terrible or great, on 200 rows of the dev part of
    each sentiment task, none ever trained on -> "movie 79.5 ..." in %."""
    told = []
    for path in sorted(tasks.glob("*/dev.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))[:200]
        sources = [lessons.encode(text)[:64] + lessons.templates[0][1] for _, text in rows]
        lesson = lessons.lesson(sources, [int(label) for label, _ in rows])
        logits = next_token_logits(t5, read_lesson(t5, lesson)[1][:, 1])[:, lessons.opposites[0]]
        correct = (logits.argmax(1) == lesson["target"]).float().mean()
        told.append(f"{path.parent.name} {100 * float(correct):.1f}")
    return " ".join(told)
