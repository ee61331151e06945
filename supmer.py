"""SUPMER: a soft prompt and a gradient regularizer, meta-learned with exact second-order MAML.

Pan et al., "Self-supervised Meta-Prompt Learning with Meta-Gradient Regularization for Few-shot
Generalization", arXiv 2303.12314. The whole method (Alg. 1), and the function that does each line:

    theta = rows of T5's embeddings, phi such that psi is the identity      init_prompt,
    s = -1                                                                  init_state
    in each step:
        b = (m^((1+s)/2) - 1) / (m - 1)                                     curriculum       Eq. 10
        for each of n tasks (D_s, D_q), with a partner task's D_q':         Run.batch, meta_task
            lambda ~ Beta(b alpha, alpha)                                   draw_lambda
            g      = grad L(D_s; theta)                                     prompt_gradient  Eq. 1
            theta' = theta - a1 psi(g; phi)                                 inner_step       Eq. 5-6
            v      = grad L((1 - lambda) D_q + lambda D_q'; theta')         prompt_gradient  Eq. 4
            s_i    = cos(v, psi(g))                                         cosine
            d theta_i = v - a1 Hess L(D_s; theta) (dpsi/dg)^T v             meta_gradient    Eq. 8
            d phi_i   =   - a1 (dpsi/dphi)^T v + lambda_reg dL_reg/dphi     meta_gradient    Eq. 20
        Adam steps along the means over the tasks; s = mean of the s_i      meta_step

This is for a constant a1. With relative_step > 0 it depends on theta and g, and is differentiated.

T5 is frozen. meta_loss() defines a task's loss; meta_gradient() computes its gradient in the memory
of one micro-batch, without dropping a term. `python supmer.py` compares it with finite differences.

P prompt tokens, d model width, B rows of a micro-batch, T text positions, S = P + T, V inserted
vectors, K label words, n examples of a set or tasks of a step. H encoder states (B, S, d), pooled
their mean over a support set (d,), Y one-hot labels (B, K). theta (P, d), phi and their gradients
are float32, or float64 for proofs. Examples, Batch and Task are data.py's.
"""

from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import grad_and_value, vjp

from common import InputError, rng
from data import collate
from ranks import SOLO
from settings import knob
from t5 import PAD, decode, embed_tokens, encode, next_token_logits

REGULARIZERS = {}       # {name: Regularizer}, filled below, and by released.py


@dataclass(frozen=True)
class Method:
    """The method's numbers, with the paper's values; train.py's command line is made from them."""
    inner_rate: float = knob(0.1, "a1, inner rate (Table 6); not used if relative_step is above 0")
    relative_step: float = knob(
        0.0, "if > 0, a1 makes |a1 psi(g)| this share of |theta| (ours; 0: off)", zero=True)
    prompt_rate: float = knob(0.1, "b1, Adam's rate for theta (Table 6)", zero=True)
    regularizer_rate: float = knob(1e-4, "b2, Adam's rate for phi (Table 6)", zero=True)
    regularizer_eps: float = knob(
        1e-15, "Adam's epsilon for phi (ours: dA ~ a1 v g lies far below the usual 1e-8)")
    gate_weight: float = knob(1.0, "lambda_reg, the weight of L_reg (Table 6)", zero=True)
    curve: float = knob(2.0, "m of the curriculum (Table 6)")
    alpha: float = knob(1.0, "of lambda's Beta distribution (the released code)")
    clip: float = knob(1.0, "largest norm of theta's and of phi's gradient (the released code)")
    steps: int = knob(100_000, "meta steps; both rates fall linearly to 0 over them (Table 6)",
                      first=True)
    first_order: bool = knob(False, "theta's gradient is v alone (as in the released code)")
    augmentation: bool = knob(True, "mix a partner task into the query sets (Alg. 2); without it "
                                    "there is no L_reg: alone it would close the gate (ours)")
    curriculum: bool = knob(True, "lambda follows b (Eq. 10); without it ~ Beta(alpha, alpha)")
    regularizer: str = knob("affine", "the form of psi (Eq. 5); none: the identity, no phi",
                            choices=REGULARIZERS)
    exact_cosine: bool = knob(
        False, "s from q = grad L_query(theta), one pass more, instead of v (Alg. 1, lines 13, 15)")
    words_only: bool = knob(
        False, "train on the loss over the label words, not the vocabulary (LM-BFF, PERFECT)")
    micro_tokens: int = knob(
        2048, "encoder positions, with padding, that are computed together: memory and speed, not "
        "the result (ours); not given: 512 on a CPU, except for tiny")
    keep_graphs: int = knob(
        0, "micro-batches whose graphs are kept for the Hessian: memory and speed, not the result "
        "(ours); not given: all, if half of the memory holds them", zero=True)


def meta_loss(t5, theta, phi, task, partner, lam, b, method):
    """A task's loss. torch.func.grad of it by theta and by phi IS the meta-gradient (Eq. 8, 20).

    task, partner: Tasks with the same label words. By choice the gate's input is a constant, as in
    Eq. 13; with first_order the inner step is constant in theta.
    """
    start = theta.detach() if method.first_order else theta
    support_loss = partial(set_loss, t5, examples=task.support, method=method)
    g, (_, pooled) = grad_and_value(support_loss, has_aux=True)(start)              # Eq. 1
    adapted = theta + inner_step(start, phi, g, pooled, method) - start             # Eq. 6
    query_loss, _ = set_loss(t5, adapted, task.query, method, partner.query, lam)   # Eq. 4
    penalty = REGULARIZERS[method.regularizer].penalty(phi, pooled, b)              # Eq. 20
    return query_loss + method.gate_weight * method.augmentation * penalty


def set_loss(t5, theta, examples, method, partner=None, lam=0.0):
    """The mean loss over a set (Eq. 1), and the mean encoder state (d,), all rows at once."""
    rows = range(len(examples.ids))
    batch = collate(examples, rows, theta.device)
    other = collate(partner, rows, theta.device) if lam else None
    return loss_share(t5, theta, batch, other, lam, examples.words, len(rows), method)


# -------------------------------------------------------------- the prompted model and its loss

def encode_with_prompt(t5, theta, batch):
    """Encode [theta ; text]: theta (P, d), a Batch of B rows -> H (B, S, d), mask (B, S).
    In the batch's slots a vector (a cluster's centroid) replaces a token's embedding."""
    text = embed_tokens(t5, batch.ids).to(theta.dtype)                             # (B, T, d)
    slots = batch.slots[:, :, None].expand(-1, -1, text.shape[-1])                 # (B, V, d)
    text = text.scatter(1, slots, batch.vectors.to(text.dtype))
    x = torch.cat([theta.expand(len(text), -1, -1), text], dim=1)                  # (B, P + T, d)
    mask = F.pad(batch.mask, (len(theta), 0), value=True)                          # (B, P + T)
    return encode(t5, x, mask), mask


def word_log_probs(t5, H, mask, words, words_only=False):
    """log p(<X> = word | theta, x) of each label word: H (B, S, d), mask (B, S) -> (B, K).

    words: K decoder targets [<extra_id_0>, piece, ...]. The decoder reads, after <pad>, the R
    prefixes that a piece follows, all in one call. A word's pieces add their log-probabilities;
    the distribution is over the full vocabulary, with words_only over the K words.
    """
    prefixes = list(dict.fromkeys(tuple(word[:n]) for word in words for n in range(1, len(word))))
    longest = max(map(len, prefixes))
    # not torch.tensor(): it detaches in place, which a dispatch mode inside torch.func refuses
    ids = torch.LongTensor([[PAD, *read, *[PAD] * (longest - len(read))] for read in prefixes])
    y = decode(t5, ids.to(H.device).expand(len(H), -1, -1), H, mask)               # (B, R, L, d)
    y = torch.stack([y[:, i, len(read)] for i, read in enumerate(prefixes)], 1)    # (B, R, d)
    log_p = torch.log_softmax(next_token_logits(t5, y), dim=-1)            # (B, R, vocabulary)
    scores = [sum(log_p[:, prefixes.index(tuple(word[:n])), word[n]] for n in range(1, len(word)))
              for word in words]
    scores = torch.stack(scores, dim=1)                                            # (B, K)
    return torch.log_softmax(scores, dim=-1) if words_only else scores


def pool(H, mask):
    """Each row's mean of H over its prompt and non-padding text: (B, S, d), (B, S) -> (B, d)."""
    return (H * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)


def loss_share(t5, theta, batch, other, lam, words, n, method):
    """What a Batch of B rows adds to the mean loss of its set of n examples (Eq. 1).

    other: the partner task's Batch to mix() in, or None. -> the rows' sum of -sum_k Y_k log p_k,
    divided by n; their sum of pool(H), unmixed, divided by n (d,), a constant as in Eq. 13.
    """
    H, mask = encode_with_prompt(t5, theta, batch)
    Y = batch.targets.to(H.dtype)
    pooled = pool(H, mask).sum(0).detach() / n
    if other is not None:
        H_other, mask_other = encode_with_prompt(t5, theta, other)
        H, mask, Y = mix(H, mask, Y, H_other, mask_other, other.targets.to(H.dtype), lam)
    return -(Y * word_log_probs(t5, H, mask, words, method.words_only)).sum() / n, pooled


def micro_batches(examples, theta, method, partner=None):
    """Examples of similar length -> (rows, their Batch, the partner's same rows' or None), of at
    most method.micro_tokens positions, theta's and padding included, or one example."""
    both = zip(examples.ids, (partner or examples).ids, strict=True)
    lengths = [len(theta) + max(len(ids), len(other)) for ids, other in both]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    while order:
        n = 1                   # lengths rise: the last example of a batch sets its width
        while n < len(order) and (n + 1) * lengths[order[n]] <= method.micro_tokens:
            n += 1
        rows, order = order[:n], order[n:]
        other = collate(partner, rows, theta.device) if partner else None
        yield rows, collate(examples, rows, theta.device), other


def loss_shares(theta, examples, method, partner=None, lam=0.0):
    """The mean loss over n Examples as functions (t5, theta) -> loss_share(), one a micro-batch.
    """
    for _, batch, other in micro_batches(examples, theta, method, partner if lam else None):
        yield partial(loss_share, batch=batch, other=other, lam=lam, words=examples.words,
                      n=len(examples.ids), method=method)


# ------------------------------------------------------- gradients, one micro-batch at a time

def first_derivative(function, theta):
    """function: theta -> (scalar, more). -> its gradient, more, the scalar. In half the
    memory of grad_and_value, which keeps what a second derivative would need."""
    value, pull_back, more = vjp(function, theta, has_aux=True)
    gradient, = pull_back(torch.ones_like(value), retain_graph=False, create_graph=False)
    return gradient, more, value


def second_derivative(function, theta):
    """-> what first_derivative gives; u -> Hess u, shaped like theta, to be called once:
    the derivative of <gradient, u>, reverse over reverse, whose graph is kept."""
    twice = grad_and_value(function, has_aux=True)
    gradient, pull_back, (value, more) = vjp(twice, theta, has_aux=True)
    product = partial(pull_back, retain_graph=False, create_graph=False)
    return (gradient, more, value), lambda u: product(u)[0]


def add_up(parts):
    """The sums of (gradient (P, d), pooled (d,), loss) over micro-batches, in float64, so that
    the order of the micro-batches does not show."""
    return [sum(x.double() for x in column).to(column[0]) for column in zip(*parts)]


def prompt_gradient(t5, theta, examples, method, partner=None, lam=0.0):
    """The gradient of the mean loss over Examples, mixed with a partner's if lambda > 0 (Eq. 1, 4).
    -> gradient (P, d), the mean encoder state (d,), unmixed, the loss."""
    shares = loss_shares(theta, examples, method, partner, lam)
    return add_up(first_derivative(partial(share, t5), theta) for share in shares)


def gradient_and_hessian(t5, theta, examples, method):
    """As prompt_gradient(), and a function -> g, pooled, loss, hessian.

    hessian(u) is Hess_theta L u for u (P, d), to be called once. It makes a micro-batch's graph
    again, so that memory does not grow with n, or keeps the first method.keep_graphs ones: a pass
    less.
    """
    shares = [partial(share, t5) for share in loss_shares(theta, examples, method)]
    kept = 0 if method.first_order else method.keep_graphs
    graphs = [second_derivative(share, theta) for share in shares[:kept]]
    others = [first_derivative(share, theta) for share in shares[kept:]]
    g, pooled, loss = add_up([*(part for part, _ in graphs), *others])

    def hessian(u):
        again = (second_derivative(share, theta) for share in shares[kept:])
        return sum(product(u).double() for _, product in chain(graphs, again)).to(u.dtype)
    return g, pooled, loss, hessian


# ------------------------------------------------------------------ curriculum task augmentation

def curriculum(s, curve):
    """b in [0, 1] from the last step's mean cosine s: (m^((1+s)/2) - 1) / (m - 1), Eq. 10."""
    x = (1 + s) / 2
    return x if curve == 1 else (curve ** x - 1) / (curve - 1)


def draw_lambda(b, alpha, seed, step, i):
    """Task i's mixing ratio ~ Beta(b alpha, alpha), of mean b / (1 + b); 0 at b = 0 (Alg. 2).
    Eq. 10 prints the parameters the other way round: mixing would be strongest at first."""
    return float(np.random.default_rng((seed, step, i)).beta(b * alpha, alpha)) if b > 0 else 0.0


def mix(H_i, mask_i, Y_i, H_j, mask_j, Y_j, lam):
    """(1 - lambda) i + lambda j of encoder states and labels, example by example (Eq. 4).

    H (B, S_i, d) and (B, S_j, d), masks alike, Y (B, K) -> H (B, max S, d), the union of the masks,
    Y (B, K). States at padding are set to zero first: what the encoder left there is arbitrary.
    """
    S = max(H_i.shape[1], H_j.shape[1])

    def widen(x):
        return F.pad(x, (0, 0, 0, S - x.shape[1]))                                 # (B, S, ...)
    mask_i, mask_j = mask_i[:, :, None], mask_j[:, :, None]
    H = (1 - lam) * widen(H_i * mask_i) + lam * widen(H_j * mask_j)
    mask = widen(mask_i) | widen(mask_j)
    return H, mask.squeeze(-1), (1 - lam) * Y_i + lam * Y_j


# ------------------------------------------------------------- the meta-gradient regularizer psi

class Regularizer(NamedTuple):
    """A form of psi, as functions of phi {name: tensor} and the gate's input, pooled (d,)."""
    init: Callable          # (P, d) -> phi at the start, float32
    psi: Callable           # (phi, g, pooled) -> psi(g) (P, d), Eq. 5
    penalty: Callable = lambda phi, pooled, b: pooled.new_zeros(())     # -> L_reg, Eq. 20
    log: Callable = lambda phi, pooled: {}                              # -> {name: number}


def direction_and_length(x):
    """x (..., d) -> x / |x| and |x| (..., 1) along the last axis; 0, 0 and derivative 0 for zeros.
    A harmless row is put in BEFORE dividing: `where` on the result alone gives NaN derivatives.
    Rows are scaled by their largest entry, which cancels: tiny gradients do not underflow."""
    scale = x.detach().abs().amax(-1, keepdim=True)                                # (..., 1)
    alive = scale > 0
    scale = torch.where(alive, scale, 1.0)
    safe = torch.where(alive, x / scale, 1.0)
    length = safe.norm(dim=-1, keepdim=True)
    return torch.where(alive, safe / length, 0.0), torch.where(alive, scale * length, 0.0)


def init_affine(P, d):
    """phi at the start: A = I, a = 0, W = 0, c = 0. psi is the identity: plain MAML."""
    return {"A": torch.eye(d), "a": torch.zeros(d), "W": torch.zeros(d, d), "c": torch.zeros(d)}


def affine(phi, g):
    """h(g) = |g| (A g/|g| + a) / |A g/|g| + a| for each row of g (P, d), all by the same map."""
    direction, length = direction_and_length(g)
    turned, _ = direction_and_length(direction @ phi["A"].T + phi["a"])            # (P, d)
    return length * turned


def gate(phi, pooled):
    """z = sigmoid(W H + c), in (0, 1)^d. The paper's H is pooled (d,), the support set's mean."""
    return torch.sigmoid(phi["W"] @ pooled + phi["c"])


def regularize(phi, g, pooled):
    """psi(g) = z h(g) + (1 - z) g: the support gradient g (P, d), made to generalize (Eq. 5)."""
    z = gate(phi, pooled)
    return z * affine(phi, g) + (1 - z) * g


def gate_loss(phi, pooled, b):
    """L_reg: the mean over the d gate entries of (z - b)^2 (Eq. 20; a mean, to suit every d)."""
    return (gate(phi, pooled) - b).square().mean()


def affine_log(phi, pooled):
    """How far phi is from its start: |A - I|, and the gate's mean."""
    identity = torch.eye(len(pooled)).to(pooled)
    return {"gate_mean": gate(phi, pooled).mean(), "A_minus_I": (phi["A"] - identity).norm()}


REGULARIZERS["affine"] = Regularizer(init_affine, regularize, gate_loss, affine_log)
REGULARIZERS["none"] = Regularizer(lambda P, d: {}, lambda phi, g, pooled: g)


# --------------------------------------------------------- the inner step and the meta-gradient

def inner_step(theta, phi, g, pooled, method):
    """theta' = theta - a1 psi(g), Eq. 6, and Eq. 2 where psi is the identity -> (P, d).
    relative_step > 0 makes a1 = relative_step |theta| / |psi(g)|, which is differentiated, too."""
    psi = REGULARIZERS[method.regularizer].psi(phi, g, pooled)
    if method.relative_step > 0:
        direction, _ = direction_and_length(psi.flatten())                         # (P d,)
        _, length = direction_and_length(theta.flatten())                          # (1,)
        return theta - method.relative_step * length * direction.view_as(theta)    # (P, d)
    return theta - method.inner_rate * psi


def cosine(a, b):
    """cos(a, b) of two gradients (P, d), each as one vector (Alg. 1, line 15); 0 beside zeros."""
    a, _ = direction_and_length(a.flatten())                                       # (P d,)
    b, _ = direction_and_length(b.flatten())
    return (a * b).sum().clamp(-1, 1)


class TaskGradient(NamedTuple):
    """One task's share of a step."""
    d_theta: torch.Tensor           # (P, d)
    d_phi: dict[str, torch.Tensor]  # shaped like phi
    s: torch.Tensor                 # its cosine
    log: dict[str, float]


def meta_gradient(t5, theta, phi, task, partner, lam, b, method):
    """The gradient of meta_loss(), in the memory of one micro-batch (Eq. 8, 20).

    d theta = v - a1 Hess_s(theta) (dpsi/dg)^T v          (first_order: v alone)
    d phi   =   - a1 (dpsi/dphi)^T v + lambda_reg dL_reg/dphi

    task, partner: Tasks of one variant; lam, b: floats. -> TaskGradient
    """
    regularizer = REGULARIZERS[method.regularizer]
    g, pooled, support_loss, hessian = gradient_and_hessian(t5, theta, task.support, method)
    step = partial(inner_step, pooled=pooled, method=method)
    adapted, pull_back = vjp(step, theta, phi, g)
    query = partial(prompt_gradient, t5, examples=task.query, method=method,
                    partner=partner.query, lam=lam)
    v, _, query_loss = query(adapted)
    d_theta, through_psi, u = pull_back(v)                          # u = -a1 (dpsi/dg)^T v
    second = torch.zeros_like(v) if method.first_order else hessian(u)
    d_theta = v if method.first_order else d_theta + second
    through_gate, penalty = grad_and_value(regularizer.penalty)(phi, pooled, b)
    weight = method.gate_weight * method.augmentation
    d_phi = {name: through_psi[name] + weight * through_gate[name] for name in phi}
    q = query(theta)[0] if method.exact_cosine else v
    s = cosine(q, regularizer.psi(phi, g, pooled))
    log = {"support_loss": support_loss, "query_loss": query_loss, "gate_loss": penalty,
           "step_size": (adapted - theta).norm() / theta.norm(),
           "second_order": second.norm() / d_theta.norm().clamp_min(1e-37),     # 0 beside 0
           "phi_gradient_meta": whole_norm(through_psi),
           "phi_gradient_gate": weight * whole_norm(through_gate),
           **regularizer.log(phi, pooled)}
    return TaskGradient(d_theta.cpu(), {name: x.cpu() for name, x in d_phi.items()}, s.cpu(),
                        {name: float(value) for name, value in log.items()})


def whole_norm(tensors):
    """The norm of {name: tensor} as one vector; 0 for none."""
    return sum((x.square().sum() for x in tensors.values()), torch.tensor(0.0)).sqrt()


# ------------------------------------------------------------------------ a step of meta-training

@dataclass
class MetaState:
    """All that a step changes, and all that the next one depends on beside (seed, step)."""
    theta: torch.Tensor
    phi: dict[str, torch.Tensor]
    theta_adam: torch.optim.Adam
    phi_adam: torch.optim.Adam
    s: float = -1.0         # the last step's mean cosine
    step: int = 0           # steps done


def init_prompt(t5, length, seed):
    """theta at the start: rows of T5's embedding table, of its first 5000 ids -> (P, d) float32."""
    table = t5.weights["shared.weight"]
    rows = min(5000, len(table))
    ids = rng(seed, 0, 0, "prompt").choice(rows, length, replace=length > rows)
    return embed_tokens(t5, torch.from_numpy(ids).to(table.device)).float()


def init_state(theta, method):
    """A MetaState at step 0, with fresh optimizers."""
    start = REGULARIZERS[method.regularizer].init(*theta.shape)
    phi = {name: x.to(theta) for name, x in start.items()}
    phi_adam = torch.optim.Adam([{"params": [*phi.values()]}], method.regularizer_rate,
                                eps=method.regularizer_eps)
    return MetaState(theta, phi, torch.optim.Adam([theta], method.prompt_rate), phi_adam)


def meta_step(t5, state, pairs, method, seed, ranks=SOLO):
    """One step of Alg. 1 over n pairs (task, partner), Eq. 3 and 7: it alone changes the state.

    The ranks share the tasks; each adds up all TaskGradients in the tasks' order. -> a dict for the
    log: s, b, the lambdas, means over the tasks. Raises InputError, with the state as it was, for
    a loss or gradient that is not finite.
    """
    n = len(pairs)
    b = curriculum(state.s, method.curve)
    mixing = (b if method.curriculum else 1.0) * method.augmentation
    lams = [draw_lambda(mixing, method.alpha, seed, state.step, i) for i in range(n)]

    def task_gradient(drawn):
        return meta_gradient(t5, state.theta, state.phi, *drawn, b, method)
    parts = ranks.map(task_gradient, [(*pair, lam) for pair, lam in zip(pairs, lams)])
    for part, (task, _) in zip(parts, pairs):
        numbers = (part.d_theta, *part.d_phi.values(), torch.tensor([*part.log.values()]))
        if not all(x.isfinite().all() for x in numbers):
            raise InputError(f"step {state.step}: loss or gradient of a {task.variant} task is not "
                             f"finite: {part.log}; try a smaller --inner-rate or --prompt-rate")
    state.theta.grad = (sum(part.d_theta for part in parts) / n).to(state.theta)
    for name, value in state.phi.items():
        value.grad = (sum(part.d_phi[name] for part in parts) / n).to(value)
    log = {"s": float(sum(part.s for part in parts) / n), "b": b, "lambda": lams,
           "theta_gradient": float(state.theta.grad.norm())}
    log |= {name: sum(part.log[name] for part in parts) / n for name in parts[0].log}
    left = 1 - state.step / method.steps                        # linear decay, no warm-up
    descend(state.theta_adam, method.prompt_rate * left, method.clip)
    descend(state.phi_adam, method.regularizer_rate * left, method.clip)
    state.s = log["s"]
    state.step += 1
    return log


def descend(adam, rate, clip):
    """Clip the gradient's norm and take one step of Adam."""
    group, = adam.param_groups
    torch.nn.utils.clip_grad_norm_(group["params"], clip)
    group["lr"] = rate
    adam.step()
    adam.zero_grad(set_to_none=True)


if __name__ == "__main__":
    import show
    show.main(show.meta_gradient)
