"""SUPMER: a soft prompt and a gradient regularizer, meta-learned with exact second-order MAML.

Pan et al., "Self-supervised Meta-Prompt Learning with Meta-Gradient Regularization for Few-shot
Generalization", arXiv 2303.12314. The whole method (Alg. 1), and the function here that does each line:

    theta = rows of T5's embedding table, phi = "psi is the identity", s = -1    init_prompt, init_regularizer
    in each step:
        b = (m^((1+s)/2) - 1) / (m - 1)                                          curriculum        Eq. 10
        for each of n tasks (D_s, D_q), with a partner task (., D_q'):           data.meta_task
            lambda ~ Beta(b alpha, alpha)                                        draw_lambda
            g      = grad L(D_s; theta)                                          prompt_gradient   Eq. 1
            theta' = theta - a1 psi(g; phi)                                      inner_step        Eq. 5, 6
            v      = grad L((1-lambda) D_q + lambda D_q'; theta')                query_gradient    Eq. 4
            s_i    = cos(v, psi(g))                                              cosine
            d theta_i = v - a1 Hess L(D_s; theta) (dpsi/dg)^T v                  meta_gradient     Eq. 3, 8
            d phi_i   =   - a1 (dpsi/dphi)^T v + lambda_reg dL_reg/dphi          meta_gradient     Eq. 7, 20
        theta, phi = Adam steps along the means over the tasks; s = mean s_i     meta_step

The T5 is frozen, so every gradient is with respect to theta or phi only. All of it is exact: no term of the
second-order meta-gradient is dropped (unless first_order asks for that), and memory stays bounded by one
micro-batch, because the Hessian is only ever multiplied with a vector, micro-batch by micro-batch.

Letters: P prompt tokens, d model width, B rows of a micro-batch, T text positions, S = P + T, K label words,
n examples of a set. theta (P, d) and every gradient of it are float32; float64 passes through for proofs.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.func import grad, grad_and_value, vjp

from data import atomic_write, collate
from t5 import PAD, InputError, decode, embed_tokens, encode, next_token_logits


REGULARIZER = "affine"  # the form of psi, named in every file that holds a phi


@dataclass(frozen=True)
class Method:
    """The method's numbers: the paper's, Table 6 unless another source is named. train.py's options are these."""
    inner_rate: float = 0.1            # a1, on the raw gradient
    relative_step: float = 0.0         # if > 0: a1 is such that |a1 psi(g)| = relative_step |theta|
    prompt_rate: float = 0.1           # b1, Adam on theta
    regularizer_rate: float = 1e-4     # b2, Adam on phi
    regularizer_eps: float = 1e-15     # Adam's epsilon for phi: dA ~ a1 v g lies far below the usual 1e-8
    gate_weight: float = 1.0           # lambda_reg of Eq. 20
    curve: float = 2.0                 # m of Eq. 10
    alpha: float = 1.0                 # of the Beta distribution; absent from Table 6, the released code's
    clip: float = 1.0                  # largest gradient norm, theta and phi each; the released code's
    max_steps: int = 100_000           # the rates fall linearly to 0 over these
    first_order: bool = False          # drop the Hessian: what the released code computes
    exact_cosine: bool = False         # s from grad L(D_q; theta), one pass more, instead of v
    words_only: bool = False           # loss over the task's label words instead of the whole vocabulary
    micro_batch: int = 8               # examples encoded together: memory and speed, never the result


# --------------------------------------------------------------------- the prompted model and its loss (Eq. 1)

def encode_with_prompt(t5, theta, batch):
    """Encode [theta ; text] for each row: theta (P, d), a Batch of B rows -> H (B, S, d), mask (B, S).

    Where the batch has slots, a vector (a cluster's centroid) stands in place of the token's embedding.
    """
    text = embed_tokens(t5, batch.ids).to(theta.dtype)                            # (B, T, d)
    slots = batch.slots[:, :, None].expand(-1, -1, text.shape[-1])                # (B, V, d)
    text = text.scatter(1, slots, batch.vectors.to(text.dtype))
    rows, length = batch.ids.shape[0], theta.shape[0]
    x = torch.cat([theta.expand(rows, -1, -1), text], dim=1)                      # (B, P + T, d)
    mask = torch.cat([batch.mask.new_ones(rows, length), batch.mask], dim=1)
    return encode(t5, x, mask), mask


def word_log_probs(t5, H, mask, words, words_only=False):
    """log p(<X> = word | theta, x) of each label word: H (B, S, d), mask (B, S) -> (B, K).

    words: K decoder targets [<extra_id_0>, piece, ...]. The decoder reads <pad> and then the target; a word of
    several pieces is scored by the sum of their log-probabilities. The distribution is over the full vocabulary;
    words_only renormalizes over the K words.
    """
    def after(prefix):                                                            # log p(. | prefix), (B, vocabulary)
        ids = torch.tensor([[PAD, *prefix]], device=H.device).expand(H.shape[0], -1)
        return torch.log_softmax(next_token_logits(t5, decode(t5, ids, H, mask)[:, -1]), dim=-1)

    sentinel = words[0][:1]
    scores = after(sentinel)[:, [word[1] for word in words]]                      # (B, K)
    for k, word in enumerate(words):
        for end in range(2, len(word)):
            more = after(word[:end])[:, word[end]]
            scores = scores + F.one_hot(torch.tensor(k, device=H.device), len(words)) * more[:, None]
    return torch.log_softmax(scores, dim=-1) if words_only else scores


def cross_entropy(log_probs, targets):
    """-sum_k Y_k log p_k of each example: log_probs (B, K), targets Y (B, K), one-hot or mixed -> (B,). Eq. 1."""
    return -(targets * log_probs).sum(-1)


def gate_input(H, mask):
    """Each example's mean of H over its prompt and non-padding text positions: (B, S, d), (B, S) -> (B, d)."""
    weight = mask.to(H.dtype)[:, :, None]
    return (H * weight).sum(1) / weight.sum(1)


def micro_batches(examples, method, device, partner=None):
    """Split n examples into Batches of similar length -> pairs (batch, partner's batch or None).

    Row r of the partner stays with row r of the examples, whatever the sorting.
    """
    lengths = [max(len(ids), len(other)) for ids, other in zip(examples.ids, (partner or examples).ids, strict=True)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), method.micro_batch):
        rows = order[start:start + method.micro_batch]
        yield collate(examples, rows, device), (collate(partner, rows, device) if partner else None)


def prompt_gradient(t5, theta, examples, method):
    """g = grad_theta L, the mean loss over n examples (Eq. 1) -> g (P, d), the gate's H (d,), the loss.

    H, the mean of gate_input over the examples, is detached: psi is differentiated through g and phi only (Eq. 13).
    """
    n = len(examples.ids)

    def loss(theta, batch):
        H, mask = encode_with_prompt(t5, theta, batch)
        losses = cross_entropy(word_log_probs(t5, H, mask, examples.words, method.words_only), batch.targets)
        return losses.sum() / n, gate_input(H, mask).sum(0).detach() / n

    g, H, total = torch.zeros_like(theta), 0.0, 0.0
    for batch, _ in micro_batches(examples, method, theta.device):
        part, (value, features) = grad_and_value(loss, has_aux=True)(theta, batch)
        g, H, total = g + part, H + features, total + value
    return g, H, total


def hessian_vector_product(t5, theta, examples, u, method):
    """Hess_theta L(examples; theta) u -> (P, d): the gradient of <grad L, u>, reverse over reverse, recomputed
    for one micro-batch at a time, so that memory does not grow with the number of examples."""
    n = len(examples.ids)

    def loss(theta, batch):
        H, mask = encode_with_prompt(t5, theta, batch)
        return cross_entropy(word_log_probs(t5, H, mask, examples.words, method.words_only), batch.targets).sum() / n

    product = torch.zeros_like(theta)
    for batch, _ in micro_batches(examples, method, theta.device):
        product = product + grad(lambda theta: (grad(loss)(theta, batch) * u).sum())(theta)
    return product


# --------------------------------------------------------------- curriculum task augmentation (Eq. 4, Eq. 10)

def curriculum(s, curve):
    """b in [0, 1] from the last step's mean cosine s in [-1, 1]: (m^((1+s)/2) - 1) / (m - 1), Eq. 10.

    >>> [curriculum(s, 3.0) for s in (-1.0, 1.0)], curriculum(0.0, 1.0)
    ([0.0, 1.0], 0.5)
    """
    x = (1 + s) / 2
    return x if curve == 1 else (curve ** x - 1) / (curve - 1)


def draw_lambda(b, alpha, seed, step, i):
    """Task i's mixing ratio: Beta(b alpha, alpha) with mean b / (1 + b), and 0 at b = 0 (no mixing yet).

    The paper's Eq. 10 prints the two parameters the other way round, which would start with the strongest mixing.
    """
    return float(np.random.default_rng((seed, step, i)).beta(b * alpha, alpha)) if b > 0 else 0.0


def mix(H_i, mask_i, Y_i, H_j, mask_j, Y_j, lam):
    """(1 - lambda) i + lambda j of encoder states and labels, example by example (Eq. 4).

    H (B, S_i, d) and (B, S_j, d), masks alike, Y (B, K) -> H (B, max S, d), the union of the masks, Y (B, K). Both start
    with their P prompt positions, so prompt mixes with prompt. States at padding are set to zero first: what the
    encoder left there is arbitrary.
    """
    S = max(H_i.shape[1], H_j.shape[1])

    def widen(H, mask):
        extra = S - H.shape[1]
        return F.pad(H * mask.to(H.dtype)[:, :, None], (0, 0, 0, extra)), F.pad(mask, (0, extra))

    (H_i, mask_i), (H_j, mask_j) = widen(H_i, mask_i), widen(H_j, mask_j)
    return (1 - lam) * H_i + lam * H_j, mask_i | mask_j, (1 - lam) * Y_i + lam * Y_j


def query_gradient(t5, theta, query, partner, lam, method):
    """v = gradient of the augmented query loss at theta (the adapted prompt) -> v (P, d), the loss.

    Both tasks' queries are encoded with this theta and v differentiates through both. At lambda = 0 the partner is
    not encoded (nor attended to).
    """
    n = len(query.ids)
    if lam > 0 and query.words != partner.words:
        raise ValueError("only tasks with the same label words can be mixed")

    def loss(theta, batch, other):
        H, mask = encode_with_prompt(t5, theta, batch)
        Y = batch.targets.to(H.dtype)
        if other is not None:
            H, mask, Y = mix(H, mask, Y, *encode_with_prompt(t5, theta, other), other.targets.to(H.dtype), lam)
        return cross_entropy(word_log_probs(t5, H, mask, query.words, method.words_only), Y).sum() / n

    v, total = torch.zeros_like(theta), 0.0
    for batch, other in micro_batches(query, method, theta.device, partner if lam > 0 else None):
        part, value = grad_and_value(loss)(theta, batch, other)
        v, total = v + part, total + value
    return v, total


# ------------------------------------------------------------------- the meta-gradient regularizer psi (Eq. 5)

def init_regularizer(d, dtype=torch.float32, device="cpu"):
    """phi at the start of meta-training: A = I, a = 0, W = 0, c = 0, so that psi is the identity (plain MAML)."""
    zeros = torch.zeros(d, d, dtype=dtype, device=device)
    return {"A": torch.eye(d, dtype=dtype, device=device), "a": zeros[0].clone(), "W": zeros, "c": zeros[0].clone()}


def direction_and_length(x):
    """x (..., d) -> x / |x| and |x| (..., 1) over the last axis; a zero row has direction 0 and length 0, and gradient 0.

    A harmless row is put in BEFORE dividing: a `where` on the result alone would still give NaN gradients. Rows are first
    scaled by their largest entry (a constant to the derivative: it cancels), so that tiny gradients do not underflow.
    """
    scale = x.detach().abs().amax(-1, keepdim=True)
    alive = scale > 0
    scale = torch.where(alive, scale, torch.ones_like(scale))
    safe = torch.where(alive, x / scale, torch.ones_like(x))
    length = safe.norm(dim=-1, keepdim=True)
    return torch.where(alive, safe / length, 0.0), torch.where(alive, scale * length, 0.0)


def affine(phi, g):
    """h(g) = |g| (A g/|g| + a) / |A g/|g| + a| for each row of g (P, d): one map, shared by the rows; lengths are kept."""
    direction, length = direction_and_length(g)
    turned, _ = direction_and_length(direction @ phi["A"].T + phi["a"])
    return length * turned


def gate(phi, H):
    """z = sigmoid(W H + c), in (0, 1)^d, from the support set's mean encoder state H (d,)."""
    return torch.sigmoid(phi["W"] @ H + phi["c"])


def regularize(phi, g, H):
    """psi(g) = z h(g) + (1 - z) g, Eq. 5: the raw support gradient g (P, d), made to generalize -> (P, d)."""
    z = gate(phi, H)
    return z * affine(phi, g) + (1 - z) * g


def gate_loss(phi, H, b):
    """L_reg of one task: mean over the d gate entries of (z - b)^2 (Eq. 20; a mean, so that its weight suits every d)."""
    return (gate(phi, H) - b).square().mean()


# ---------------------------------------------------------------------------- the inner step and the meta-gradient

def inner_step(theta, phi, g, H, method):
    """theta' = theta - a1 psi(g), Eq. 6 (Eq. 2 where psi is the identity) -> (P, d).

    With relative_step, a1 = relative_step |theta| / |psi(g)|; the meta-gradient differentiates through that too.
    """
    psi = regularize(phi, g, H)
    if method.relative_step > 0:
        direction, _ = direction_and_length(psi.flatten())
        _, size = direction_and_length(theta.flatten())
        return theta - method.relative_step * size * direction.view_as(theta)
    return theta - method.inner_rate * psi


def cosine(a, b):
    """cos(a, b) of two (P, d) gradients, each as one flat vector; 0 if one of them is zero. Alg. 1 line 15."""
    (a, _), (b, _) = direction_and_length(a.flatten()), direction_and_length(b.flatten())
    return (a * b).sum().clamp(-1, 1)


class TaskGradient(NamedTuple):
    """One task's share of the step: d_theta (P, d), d_phi (like phi), s_i, and numbers for the log."""
    d_theta: torch.Tensor
    d_phi: dict[str, torch.Tensor]
    s: torch.Tensor
    log: dict[str, float]


def meta_gradient(t5, theta, phi, task, partner, lam, b, method):
    """The exact gradient of one task's meta-loss L_q(theta - a1 psi(g(theta); phi)) + lambda_reg L_reg (Eq. 8, 20).

    d theta = v - a1 Hess_s(theta) (dpsi/dg)^T v          (first_order: d theta = v)
    d phi   =   - a1 (dpsi/dphi)^T v + lambda_reg dL_reg/dphi

    theta (P, d); phi from init_regularizer; task and partner: Tasks of one variant; lam, b floats. -> TaskGradient.
    """
    g, H, support_loss = prompt_gradient(t5, theta, task.support, method)
    adapted, pull_back = vjp(lambda theta, phi, g: inner_step(theta, phi, g, H, method), theta, phi, g)
    v, query_loss = query_gradient(t5, adapted, task.query, partner.query, lam, method)
    d_theta, through_psi, u = pull_back(v)                                         # u = -a1 (dpsi/dg)^T v
    if method.first_order:
        d_theta, second = v, torch.zeros_like(v)
    else:
        second = hessian_vector_product(t5, theta, task.support, u, method)
        d_theta = d_theta + second
    through_gate, reg = grad_and_value(gate_loss)(phi, H, b)
    d_phi = {name: through_psi[name] + method.gate_weight * through_gate[name] for name in phi}
    q = query_gradient(t5, theta, task.query, partner.query, lam, method)[0] if method.exact_cosine else v
    s = cosine(q, regularize(phi, g, H))
    log = {"support_loss": support_loss, "query_loss": query_loss, "regularizer_loss": reg,
           "step_size": (adapted - theta).norm() / theta.norm(), "second_order": second.norm() / d_theta.norm(),
           "gate_mean": gate(phi, H).mean(), "phi_gradient_meta": _norm(through_psi),
           "phi_gradient_gate": method.gate_weight * _norm(through_gate)}
    return TaskGradient(d_theta, d_phi, s, {name: float(value) for name, value in log.items()})


def _norm(tensors):
    return torch.sqrt(sum(x.square().sum() for x in tensors.values()))


# ------------------------------------------------------------------------------------------- meta-training's state

@dataclass
class MetaState:
    """All that a step changes: theta, phi, their Adam states, the curriculum's s and the number of steps done."""
    theta: torch.Tensor
    phi: dict[str, torch.Tensor]
    theta_adam: torch.optim.Adam
    phi_adam: torch.optim.Adam
    s: float = -1.0
    step: int = 0


def init_prompt(t5, length, seed, rows=5000):
    """theta at the start: `length` rows of T5's embedding table, drawn from its first `rows` ids -> (P, d) float32."""
    table = t5.weights["shared.weight"]
    ids = np.random.default_rng((seed, 0, 0, 9)).choice(min(rows, len(table)), length, replace=length > len(table))
    return embed_tokens(t5, torch.from_numpy(ids).to(table.device)).float()


def init_state(theta, phi, method):
    """A MetaState at step 0, with fresh optimizers."""
    return MetaState(theta, phi, torch.optim.Adam([theta], method.prompt_rate),
                     torch.optim.Adam(list(phi.values()), method.regularizer_rate, eps=method.regularizer_eps))


def meta_step(t5, state, tasks, method, seed):
    """One step of Alg. 1 over a batch of n (task, partner) pairs; changes the state in place, the only function that does.

    -> the step's log: means over the tasks of TaskGradient.log, and s, b, lambda. Raises InputError when a loss or
    gradient is not finite; the state is then as before.
    """
    b = curriculum(state.s, method.curve)
    lams = [draw_lambda(b, method.alpha, seed, state.step, i) for i in range(len(tasks))]
    parts = []
    for (task, partner), lam in zip(tasks, lams, strict=True):
        part = meta_gradient(t5, state.theta, state.phi, task, partner, lam, b, method)
        tensors = [part.d_theta, *part.d_phi.values()]
        if not (all(map(math.isfinite, part.log.values())) and all(bool(x.isfinite().all()) for x in tensors)):
            raise InputError(f"step {state.step}: the loss or its gradient is not finite in a {task.variant} task "
                             f"({part.log}); try a smaller inner_rate, relative_step or prompt_rate")
        parts.append(part)
    n, left = len(parts), 1 - state.step / method.max_steps
    state.theta.grad = sum(part.d_theta for part in parts) / n
    for name, value in state.phi.items():
        value.grad = sum(part.d_phi[name] for part in parts) / n
    log = {"s": float(sum(part.s for part in parts) / n), "b": b, "lambda": lams,
           "theta_gradient": float(state.theta.grad.norm()),
           **{name: sum(part.log[name] for part in parts) / n for name in parts[0].log},
           "A_minus_I": float((state.phi["A"] - torch.eye(len(state.phi["A"]), device=state.theta.device)).norm())}
    for optimizer, rate in ((state.theta_adam, method.prompt_rate), (state.phi_adam, method.regularizer_rate)):
        group = optimizer.param_groups[0]
        torch.nn.utils.clip_grad_norm_(group["params"], method.clip)
        group["lr"] = rate * left                                                 # linear decay to 0, no warm-up
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    state.s, state.step = log["s"], state.step + 1
    return log


# ------------------------------------------------------------------------------------------------------- measuring

@torch.no_grad()
def score(t5, theta, examples, method):
    """log p of every label word for n examples, in their order -> (n, K)."""
    scores = torch.empty(len(examples.ids), len(examples.words), dtype=torch.promote_types(theta.dtype, torch.float32))
    order = sorted(range(len(examples.ids)), key=lambda row: len(examples.ids[row]))
    for start in range(0, len(order), method.micro_batch):
        rows = order[start:start + method.micro_batch]
        H, mask = encode_with_prompt(t5, theta, collate(examples, rows, theta.device))
        scores[rows] = word_log_probs(t5, H, mask, examples.words).to(scores)
    return scores


def measure(scores, labels):
    """scores (n, K), labels (n,) -> loss over the full vocabulary, loss over the label words, and number correct."""
    labels = labels.to(scores.device)
    return {"loss": float(F.nll_loss(scores, labels)),
            "word_loss": float(F.cross_entropy(scores, labels)),
            "correct": int((scores.argmax(-1) == labels).sum())}


def validate_task(t5, theta, phi, task, method):
    """The query set before and after one inner step on the support set: measure() of each, and |a1 psi(g)| / |theta|."""
    g, H, _ = prompt_gradient(t5, theta, task.support, method)
    adapted = inner_step(theta, phi, g, H, method)
    return {"before": measure(score(t5, theta, task.query, method), task.query.labels),
            "after": measure(score(t5, adapted, task.query, method), task.query.labels),
            "step_size": float((adapted - theta).norm() / theta.norm())}


# -------------------------------------------------------------------------------------- theta and phi on the disk

def save_prompt(path, theta, phi, metadata):
    """Write theta and phi as one safetensors file with string metadata (model, data, step, seed), atomically."""
    tensors = {"theta": theta, **{f"phi.{name}": value for name, value in phi.items()}}
    payload = save({name: x.detach().cpu().contiguous() for name, x in tensors.items()},
                   {**metadata, "regularizer": REGULARIZER})
    atomic_write(path, lambda file: file.write(payload))


def load_prompt(path, d):
    """Read save_prompt's file -> theta (P, d), phi, metadata. Raises InputError unless all of it fits a T5 of width d."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as a prompt ({error}); give the prompt.safetensors of a run") from None
    if metadata.get("regularizer") != REGULARIZER:
        raise InputError(f"{path}: regularizer form {metadata.get('regularizer')!r} is not known; this is no prompt of ours")
    expected = {f"phi.{name}": value.shape for name, value in init_regularizer(d).items()}
    shapes = {name: x.shape for name, x in tensors.items()}
    theta = tensors.pop("theta", torch.empty(0))
    if {name: shapes[name] for name in tensors} != expected or theta.dim() != 2 or theta.shape[1] != d or not len(theta):
        raise InputError(f"{path} holds {({name: list(shape) for name, shape in shapes.items()})}: "
                         f"not a prompt and regularizer for a T5 of width {d}")
    if not all(x.isfinite().all() for x in (theta, *tensors.values())):
        raise InputError(f"{path} has values that are not finite: the run that wrote it went wrong, use another")
    return theta, {name.removeprefix("phi."): value for name, value in tensors.items()}, metadata
