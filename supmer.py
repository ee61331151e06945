"""SUPMER: a soft prompt and a gradient regularizer, meta-learned with exact second-order MAML.

Pan et al., "Self-supervised Meta-Prompt Learning with Meta-Gradient Regularization for Few-shot
Generalization", arXiv 2303.12314. The whole method (Alg. 1), and the function that does each line:

    theta = rows of T5's embeddings, phi such that psi is the identity      init_prompt,
    s = -1                                                                  init_regularizer
    in each step:
        b = (m^((1+s)/2) - 1) / (m - 1)                                     curriculum       Eq. 10
        for each of n tasks (D_s, D_q), with a partner task's D_q':         data.meta_task
            lambda ~ Beta(b alpha, alpha)                                   draw_lambda
            g      = grad L(D_s; theta)                                     prompt_gradient  Eq. 1
            theta' = theta - a1 psi(g; phi)                                 inner_step       Eq. 5-6
            v      = grad L((1 - lambda) D_q + lambda D_q'; theta')         prompt_gradient  Eq. 4
            s_i    = cos(v, psi(g))                                         cosine
            d theta_i = v - a1 Hess L(D_s; theta) (dpsi/dg)^T v             meta_gradient    Eq. 8
            d phi_i   =   - a1 (dpsi/dphi)^T v + lambda_reg dL_reg/dphi     meta_gradient    Eq. 20
        Adam steps along the means over the tasks; s = mean of the s_i      meta_step

T5 is frozen: every gradient is with respect to theta or phi only. No term of the second-order
meta-gradient is dropped (unless first_order asks for that), and memory is bounded by one
micro-batch, because the Hessian is only ever multiplied with a vector, piece by piece.

    python supmer.py    # the second-order gradient of a toy T5 beside its finite difference, and
                        # the first-order one, along three directions of theta; seconds

P prompt tokens, d model width, B rows of a micro-batch, T text positions, S = P + T, V inserted
vectors, K label words, n examples of a set or tasks of a step. H encoder states (B, S, d), or the
gate's one mean of them (d,); Y the labels, one-hot (B, K). theta (P, d), phi and their gradients
are float32; float64 passes through untouched, for proofs.

From data.py come plain tuples: Examples, a set's texts as lists of token ids with their labels and
the label words; Batch, rows of them as padded tensors: ids, mask (B, T), slots (B, V), vectors
(B, V, d), targets (B, K), made by collate; Task, a support and a query set. Ranks are the processes
that share the work, SOLO is one alone.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import grad_and_value, vjp

from common import InputError, SOLO, knob
from data import collate
from t5 import PAD, decode, embed_tokens, encode, next_token_logits


@dataclass(frozen=True)
class Method:
    """The method's numbers, with the paper's values; train.py's command line is made from them."""
    inner_rate: float = knob(0.1, "a1, inner rate on the raw gradient (Table 6)")
    relative_step: float = knob(
        0.0, "if > 0, a1 is such that |a1 psi(g)| is this share of |theta| (ours; the paper: 0)",
        zero=True)
    prompt_rate: float = knob(0.1, "b1, Adam's rate for theta (Table 6)", zero=True)
    regularizer_rate: float = knob(1e-4, "b2, Adam's rate for phi (Table 6)", zero=True)
    regularizer_eps: float = knob(
        1e-15, "Adam's epsilon for phi (ours: dA ~ a1 v g lies far below the usual 1e-8)")
    gate_weight: float = knob(1.0, "lambda, the weight of L_reg (Table 6)", zero=True)
    curve: float = knob(2.0, "m of the curriculum (Table 6)")
    alpha: float = knob(1.0, "of lambda's Beta distribution (the released code)")
    clip: float = knob(1.0, "largest norm of theta's and of phi's gradient (the released code)")
    steps: int = knob(100_000, "meta steps; both rates fall linearly to 0 over them (Table 6)")
    first_order: bool = knob(False, "drop theta's Hessian term (what the released code computes)")
    augmentation: bool = knob(True, "mix a partner task into the query sets (Alg. 2); without it "
                                    "there is no L_reg, which would close the gate (ours)")
    curriculum: bool = knob(True, "lambda follows b (Eq. 10); without it ~ Beta(alpha, alpha)")
    regularizer: bool = knob(True, "learn phi; without it psi stays the identity")
    exact_cosine: bool = knob(
        False, "s from q = grad L_query(theta), one pass more, instead of v (Alg. 1, lines 13, 15)")
    words_only: bool = knob(
        False, "loss over the label words, not the whole vocabulary (LM-BFF, PERFECT)")
    micro_tokens: int = knob(
        2048, "encoder positions (prompt, text and padding) that are computed together, or one "
        "example: memory and speed, not the result (ours)")
    keep_graphs: int = knob(
        0, "micro-batches of a support set whose graphs are kept for the Hessian, not made again: "
        "memory and speed, not the result (ours); see keep_gib", zero=True)


# -------------------------------------------------------------- the prompted model and its loss

def encode_with_prompt(t5, theta, batch):
    """Encode [theta ; text]: theta (P, d), a Batch of B rows -> H (B, S, d), mask (B, S).
    In the batch's slots a vector (a cluster's centroid) stands in place of a token."""
    text = embed_tokens(t5, batch.ids).to(theta.dtype)                             # (B, T, d)
    slots = batch.slots[:, :, None].expand(-1, -1, text.shape[-1])                 # (B, V, d)
    text = text.scatter(1, slots, batch.vectors.to(text.dtype))
    x = torch.cat([theta.expand(len(text), -1, -1), text], dim=1)                  # (B, P + T, d)
    mask = F.pad(batch.mask, (len(theta), 0), value=True)                          # (B, P + T)
    return encode(t5, x, mask), mask


def word_log_probs(t5, H, mask, words, words_only=False):
    """log p(<X> = word | theta, x) of each label word: H (B, S, d), mask (B, S) -> (B, K).

    words: K decoder targets [<extra_id_0>, piece, ...], which the decoder reads after <pad>; a word
    of several pieces has the sum of their log-probabilities. The distribution is over the full
    vocabulary; words_only renormalizes it over the K words.
    """
    def after(prefix):                                                             # (B, vocabulary)
        ids = torch.LongTensor([[PAD, *prefix]]).to(H.device).expand(len(H), -1)   # (B, L)
        return torch.log_softmax(next_token_logits(t5, decode(t5, ids, H, mask)[:, -1]), dim=-1)
    first = after(words[0][:1])
    scores = torch.stack([first[:, word[1]] + sum(after(word[:end])[:, word[end]]
                                                  for end in range(2, len(word)))
                          for word in words], dim=1)                               # (B, K)
    return torch.log_softmax(scores, dim=-1) if words_only else scores


def gate_input(H, mask):
    """Each row's mean of H over its prompt and non-padding text: (B, S, d), (B, S) -> (B, d)."""
    weight = mask.to(H.dtype)[:, :, None]                                          # (B, S, 1)
    return (H * weight).sum(1) / weight.sum(1)


def loss_share(t5, theta, batch, other, lam, words, n, method):
    """What B of a set's n examples contribute to its mean loss (Eq. 1) and to the gate's input.

    other: the partner task's Batch to mix() in, or None. -> the rows' sum of
    -sum_k Y_k log p_k, divided by n; their sum of gate_input, divided by n (d,), detached: psi is
    differentiated through g and phi only, as in the paper's derivation (Eq. 13).
    """
    H, mask = encode_with_prompt(t5, theta, batch)
    features, Y = gate_input(H, mask).sum(0).detach() / n, batch.targets.to(H.dtype)
    if other is not None:
        H_other, mask_other = encode_with_prompt(t5, theta, other)
        H, mask, Y = mix(H, mask, Y, H_other, mask_other, other.targets.to(H.dtype), lam)
    return -(Y * word_log_probs(t5, H, mask, words, method.words_only)).sum() / n, features


def micro_batches(examples, theta, method, partner=None):
    """Batches of examples of similar length -> (rows, batch, partner's or None).
    Each has at most method.micro_tokens positions, theta's (P, d) and padding included, or is one
    example. Row r of the partner stays with row r of the examples, whatever the sorting."""
    both = zip(examples.ids, (partner or examples).ids, strict=True)
    lengths = [len(theta) + max(len(ids), len(other)) for ids, other in both]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    while order:
        n = 1                   # lengths rise: the last example of a batch sets its width
        while n < len(order) and (n + 1) * lengths[order[n]] <= method.micro_tokens:
            n += 1
        rows, order = order[:n], order[n:]
        yield (rows, collate(examples, rows, theta.device),
               partner and collate(partner, rows, theta.device))


# In the next two, torch.autograd.grad through the same graph is faster on a CPU core, by 1 to 8 %.
# It needs theta to require grad, a flag that every caller would have to set and clear; torch.func
# takes a plain function of theta, as the mathematics does.

def first_derivative(function, theta):
    """function: theta -> (scalar, more). -> its gradient, (the scalar, more).
    torch.func.grad_and_value(function, has_aux=True) gives the same, but always records its own
    backward pass for a next derivative. Where none is taken this needs half the memory."""
    value, pull_back, more = vjp(function, theta, has_aux=True)
    gradient, = pull_back(torch.ones_like(value), retain_graph=False, create_graph=False)
    return gradient, (value, more)


def second_derivative(function, theta):
    """As first_derivative, and the Hessian's product u -> Hess u, shaped like theta, once: the
    derivative of <gradient, u>, reverse over reverse; the graph that it needs is kept."""
    gradient, pull_back, rest = vjp(grad_and_value(function, has_aux=True), theta, has_aux=True)
    return gradient, rest, lambda u: pull_back(u, retain_graph=False, create_graph=False)[0]


def prompt_gradient(t5, theta, examples, method, partner=None, lam=0.0, ranks=SOLO):
    """The gradient of the mean loss over n Examples with respect to theta (P, d).

    With a partner and lambda > 0 its examples are mixed in, pair by pair, and the gradient
    runs through both; at lambda = 0 the partner is neither encoded nor attended to. The ranks share
    the micro-batches.
    -> gradient (P, d), the gate's H (d,) (mean of gate_input, unmixed), the loss.
    """
    return gradient_and_hessian(t5, theta, examples, replace(method, keep_graphs=0), ranks,
                                partner, lam)[:3]


def gradient_and_hessian(t5, theta, examples, method, ranks=SOLO, partner=None, lam=0.0):
    """As prompt_gradient(), and the second derivative of the same loss -> g, H, loss, hessian.

    hessian(u) is Hess_theta L u for u (P, d), to be called once. A micro-batch's graph is made
    again for it, so that memory does not grow with the number of examples, or, for the first
    method.keep_graphs ones, kept from here, which saves a pass. Both are exact, and equal.
    """
    if partner is not None and partner.words != examples.words:
        raise ValueError("only tasks with the same label words can be mixed")
    n, partner, products = len(examples.ids), partner if lam else None, []
    # In float64, so that neither the micro-batches' order nor the number of ranks shows in the sums
    sums = [torch.zeros_like(x, dtype=torch.float64) for x in (theta, theta[0], theta[0, 0])]
    for _, batch, other in ranks.share(micro_batches(examples, theta, method, partner)):
        def share(theta, batch=batch, other=other):
            return loss_share(t5, theta, batch, other, lam, examples.words, n, method)
        if len(products) < method.keep_graphs and not method.first_order:
            g, (loss, H), product = second_derivative(share, theta)
            products.append(product)
        else:
            g, (loss, H) = first_derivative(share, theta)
            products.append(lambda u, share=share: second_derivative(share, theta)[2](u))
        sums = [total + part for total, part in zip(sums, (g, H, loss))]

    def hessian(u):
        zero = torch.zeros_like(theta, dtype=torch.float64)
        return ranks.all_sum(sum((product(u) for product in products), zero))[0].to(theta.dtype)
    return *(total.to(theta.dtype) for total in ranks.all_sum(*sums)), hessian


# ------------------------------------------------------------------ curriculum task augmentation

def curriculum(s, curve):
    """b in [0, 1] from the last step's mean cosine s: (m^((1+s)/2) - 1) / (m - 1), Eq. 10.

    >>> [curriculum(s, 3.0) for s in (-1.0, 1.0)], curriculum(0.0, 1.0)
    ([0.0, 1.0], 0.5)
    """
    x = (1 + s) / 2
    return x if curve == 1 else (curve ** x - 1) / (curve - 1)


def draw_lambda(b, alpha, seed, step, i):
    """Task i's mixing ratio ~ Beta(b alpha, alpha), of mean b / (1 + b); 0 at b = 0 (Alg. 2).
    Eq. 10 prints the parameters the other way round: mixing would be strongest at first."""
    return float(np.random.default_rng((seed, step, i)).beta(b * alpha, alpha)) if b > 0 else 0.0


def mix(H_i, mask_i, Y_i, H_j, mask_j, Y_j, lam):
    """(1 - lambda) i + lambda j of encoder states and labels, example by example (Eq. 4).

    H (B, S_i, d) and (B, S_j, d), masks alike, Y (B, K) -> H (B, max S, d), the union of the masks,
    Y (B, K). Both begin with P prompt positions, so prompt mixes with prompt. States at padding
    are set to zero first: what the encoder left there is arbitrary.
    """
    def widen(H, mask):
        extra = max(H_i.shape[1], H_j.shape[1]) - H.shape[1]
        return F.pad(H * mask.to(H.dtype)[:, :, None], (0, 0, 0, extra)), F.pad(mask, (0, extra))
    (H_i, mask_i), (H_j, mask_j) = widen(H_i, mask_i), widen(H_j, mask_j)
    return (1 - lam) * H_i + lam * H_j, mask_i | mask_j, (1 - lam) * Y_i + lam * Y_j


# ------------------------------------------------------------- the meta-gradient regularizer psi

def init_regularizer(d, dtype=torch.float32, device="cpu"):
    """phi at the start: A = I, a = 0, W = 0, c = 0. psi is the identity: plain MAML."""
    A, zero = torch.eye(d, dtype=dtype, device=device), torch.zeros(d, dtype=dtype, device=device)
    return {"A": A, "a": zero, "W": torch.zeros_like(A), "c": zero.clone()}


def direction_and_length(x):
    """x (..., d) -> x / |x| and |x| (..., 1) along the last axis; 0, 0 and derivative 0 for zeros.

    A harmless row is put in BEFORE dividing: `where` on the result alone still gives NaN
    derivatives. Rows are scaled by their largest entry first, a constant to the derivative that
    cancels, so that tiny gradients do not underflow.
    """
    scale = x.detach().abs().amax(-1, keepdim=True)                                # (..., 1)
    alive = scale > 0
    scale = torch.where(alive, scale, 1.0)
    safe = torch.where(alive, x / scale, 1.0)
    length = safe.norm(dim=-1, keepdim=True)
    return torch.where(alive, safe / length, 0.0), torch.where(alive, scale * length, 0.0)


def affine(phi, g):
    """h(g) = |g| (A g/|g| + a) / |A g/|g| + a| for each row of g (P, d), all by the same map."""
    direction, length = direction_and_length(g)
    turned, _ = direction_and_length(direction @ phi["A"].T + phi["a"])            # (P, d)
    return length * turned


def gate(phi, H):
    """z = sigmoid(W H + c), in (0, 1)^d, from the support set's mean encoder state H (d,)."""
    return torch.sigmoid(phi["W"] @ H + phi["c"])


def regularize(phi, g, H):
    """psi(g) = z h(g) + (1 - z) g: the support gradient g (P, d), made to generalize (Eq. 5)."""
    z = gate(phi, H)
    return z * affine(phi, g) + (1 - z) * g


def gate_loss(phi, H, b):
    """L_reg: the mean over the d gate entries of (z - b)^2 (Eq. 20; a mean, to suit every d)."""
    return (gate(phi, H) - b).square().mean()


# --------------------------------------------------------- the inner step and the meta-gradient

def inner_step(theta, phi, g, H, method):
    """theta' = theta - a1 psi(g), Eq. 6, and Eq. 2 where psi is the identity -> (P, d).
    relative_step > 0 makes a1 = relative_step |theta| / |psi(g)|, which is differentiated, too."""
    psi = regularize(phi, g, H)
    if method.relative_step > 0:
        direction, _ = direction_and_length(psi.flatten())                         # (P d,)
        _, length = direction_and_length(theta.flatten())                          # (1,)
        return theta - method.relative_step * length * direction.view_as(theta)    # (P, d)
    return theta - method.inner_rate * psi


def cosine(a, b):
    """cos(a, b) of two gradients (P, d), each as one vector (Alg. 1, line 15); 0 beside zeros."""
    (a, _), (b, _) = (direction_and_length(x.flatten()) for x in (a, b))           # (P d,)
    return (a * b).sum().clamp(-1, 1)


class TaskGradient(NamedTuple):
    """One task's share of a step."""
    d_theta: torch.Tensor           # (P, d)
    d_phi: dict[str, torch.Tensor]  # shaped like phi
    s: torch.Tensor                 # its cosine
    log: dict[str, float]


def meta_gradient(t5, theta, phi, task, partner, lam, b, method, ranks=SOLO):
    """The gradient of L_q(theta - a1 psi(grad L_s(theta); phi)) + lambda_reg L_reg (Eq. 8, 20).

    d theta = v - a1 Hess_s(theta) (dpsi/dg)^T v          (first_order: v alone)
    d phi   =   - a1 (dpsi/dphi)^T v + lambda_reg dL_reg/dphi

    task, partner: Tasks of one variant; lam, b: floats. -> TaskGradient, the same on all ranks
    """
    g, H, support_loss, hessian = gradient_and_hessian(t5, theta, task.support, method, ranks)
    adapted, pull_back = vjp(lambda *variables: inner_step(*variables, H, method), theta, phi, g)
    mixed = (task.query, method, partner.query, lam, ranks)
    v, _, query_loss = prompt_gradient(t5, adapted, *mixed)
    d_theta, through_psi, u = pull_back(v)                          # u = -a1 (dpsi/dg)^T v
    second = torch.zeros_like(v) if method.first_order else hessian(u)
    d_theta = v if method.first_order else d_theta + second
    through_gate, gate_error = grad_and_value(gate_loss)(phi, H, b)
    gate_weight = method.gate_weight * method.augmentation
    d_phi = {name: through_psi[name] + gate_weight * through_gate[name] for name in phi}
    q = prompt_gradient(t5, theta, *mixed)[0] if method.exact_cosine else v
    meta_norm, gate_norm = (torch.sqrt(sum(x.square().sum() for x in part.values()))
                            for part in (through_psi, through_gate))
    log = {"support_loss": support_loss, "query_loss": query_loss, "gate_loss": gate_error,
           "step_size": (adapted - theta).norm() / theta.norm(),
           "second_order": second.norm() / d_theta.norm().clamp_min(1e-37),     # 0 beside 0
           "gate_mean": gate(phi, H).mean(),
           "phi_gradient_meta": meta_norm, "phi_gradient_gate": gate_weight * gate_norm}
    return TaskGradient(d_theta, d_phi, cosine(q, regularize(phi, g, H)),
                        {name: float(value) for name, value in log.items()})


# ---------------------------------------------------------------------- meta-training's state

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
    table, rng = t5.weights["shared.weight"], np.random.default_rng((seed, 0, 0, 9))
    rows = min(5000, len(table))
    ids = rng.choice(rows, length, replace=length > rows)
    return embed_tokens(t5, torch.from_numpy(ids).to(table.device)).float()


def init_state(theta, phi, method):
    """A MetaState at step 0, with fresh optimizers."""
    return MetaState(theta, phi, torch.optim.Adam([theta], method.prompt_rate),
                     torch.optim.Adam(list(phi.values()), method.regularizer_rate,
                                      eps=method.regularizer_eps))


def meta_step(t5, state, pairs, method, seed, ranks=SOLO):
    """One step of Alg. 1 over n pairs (task, partner), Eq. 3 and 7: it alone changes the state.

    The ranks share each set's micro-batches and add up g, v and Hess u, of which all else follows:
    each has the whole meta-gradient and takes the same step.
    -> a dict for the log: s, b, the lambdas, and means over the tasks. Raises InputError, with the
    state as it was, when a loss or a gradient is not finite.
    """
    b, n, parts = curriculum(state.s, method.curve), len(pairs), []
    lams = [draw_lambda(b if method.curriculum else 1.0, method.alpha, seed, state.step, i)
            if method.augmentation else 0.0 for i in range(n)]
    for (task, partner), lam in zip(pairs, lams):
        part = meta_gradient(t5, state.theta, state.phi, task, partner, lam, b, method, ranks)
        if not (all(x.isfinite().all() for x in (part.d_theta, *part.d_phi.values()))
                and all(map(math.isfinite, part.log.values()))):
            raise InputError(f"step {state.step}: loss or gradient of a {task.variant} task is not "
                             f"finite: {part.log}; try a smaller inner_rate or prompt_rate")
        parts.append(part)
    state.theta.grad = sum(part.d_theta for part in parts) / n
    for name, value in state.phi.items():
        value.grad = sum(part.d_phi[name] for part in parts) / n
    identity = torch.eye(state.theta.shape[1]).to(state.theta)
    log = {"s": float(sum(part.s for part in parts) / n), "b": b, "lambda": lams,
           "theta_gradient": float(state.theta.grad.norm()),
           "A_minus_I": float((state.phi["A"] - identity).norm()),
           **{name: sum(part.log[name] for part in parts) / n for name in parts[0].log}}
    learned = ((state.theta_adam, method.prompt_rate), (state.phi_adam, method.regularizer_rate))
    for optimizer, rate in learned if method.regularizer else learned[:1]:
        group = optimizer.param_groups[0]
        torch.nn.utils.clip_grad_norm_(group["params"], method.clip)
        group["lr"] = rate * (1 - state.step / method.steps)    # linear decay, no warm-up
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    state.s, state.step = log["s"], state.step + 1
    return log


# -------------------------------------------------------------------------------------- measuring

@torch.no_grad()
def score(t5, theta, examples, method):
    """log p of every label word for n examples, in their order -> (n, K)."""
    scores = theta.new_empty(len(examples.ids), len(examples.words))
    for rows, batch, _ in micro_batches(examples, theta, method):
        H, mask = encode_with_prompt(t5, theta, batch)
        scores[rows] = word_log_probs(t5, H, mask, examples.words).to(scores)
    return scores


def measure(scores, labels):
    """Log-probabilities (n, K), labels (n,) -> the loss over the full vocabulary, that over
    the label words, and how often the likeliest word is right."""
    labels = labels.to(scores.device)
    return {"loss": float(F.nll_loss(scores, labels)),
            "word_loss": float(F.cross_entropy(scores, labels)),
            "correct": int((scores.argmax(-1) == labels).sum())}


def validate_task(t5, theta, phi, task, method):
    """measure() the query set before and after an inner step; step_size: |a1 psi(g)| / |theta|."""
    g, H, _ = prompt_gradient(t5, theta, task.support, method)
    adapted = inner_step(theta, phi, g, H, method)
    return {"before": measure(score(t5, theta, task.query, method), task.query.labels),
            "after": measure(score(t5, adapted, task.query, method), task.query.labels),
            "step_size": float((adapted - theta).norm() / theta.norm())}


if __name__ == "__main__":
    from data import Examples, Task
    from t5 import T5, T5Config, expected_shapes
    seeded, d, method, lam = torch.Generator().manual_seed(0), 8, Method(inner_rate=20.0), 0.3

    def normal(*shape):
        return torch.randn(shape, generator=seeded, dtype=torch.float64)

    def examples(n=4):
        ids = [[*row, 39, 1] for row in torch.randint(8, 39, (n, 5), generator=seeded).tolist()]
        labels, words = torch.arange(n) % 2, [[39, 5], [39, 6]]
        return Examples(ids, [[]] * n, torch.zeros(n, 0, d), labels, words)

    config = T5Config(d_model=d, d_kv=4, d_ff=12, num_layers=1, num_decoder_layers=1, num_heads=2,
                      vocab_size=40, gated=True, tied=False, scaled=False)
    toy = T5(config, {name: 0.3 * normal(*shape) + ("layer_norm" in name)
                      for name, shape in expected_shapes(config).items()})
    theta, phi = normal(3, d), {name: value + 0.3 * normal(*value.shape)
                                for name, value in init_regularizer(d, torch.float64).items()}
    task, partner = (Task("toy", (), examples(), examples()) for _ in range(2))
    exact = meta_gradient(toy, theta, phi, task, partner, lam, 0.0, method).d_theta
    _, H, _ = prompt_gradient(toy, theta, task.support, method)

    def query(theta):       # after an inner step: v, _, loss
        g, _, _ = prompt_gradient(toy, theta, task.support, method)
        return prompt_gradient(toy, inner_step(theta, phi, g, H, method), task.query, method,
                               partner.query, lam)

    print("the query loss after an inner step, its derivative in random directions of theta:")
    print("second order   finite difference     first order")
    for u in (normal(3, d) for _ in range(3)):
        slope = (query(theta + 1e-5 * u)[2] - query(theta - 1e-5 * u)[2]) / 2e-5
        print(f"{(exact * u).sum():+.9f} {slope:+19.9f} {(query(theta)[0] * u).sum():+15.9f}")
