"""Six exercises on SUPMER (arXiv 2303.12314). Write your solutions into the functions' bodies.

    python exercises.py    # for each one: right, off by how much, or not done yet; seconds

Checks compare with finite differences or another formula, on a random T5 in float64. The status is
0 when all six are right. Read supmer.py first; tests/test_exercises.py has the solutions.

theta (P, d) is the prompt; support_loss and query_loss: theta -> loss; psi: gradient (P, d) ->
(P, d). All are differentiable any number of times.
"""

import sys

import numpy as np
import torch
import torch.nn.functional as F

from data import Examples, Task
from supmer import Method, init_affine, regularize, set_loss
from t5 import T5, T5Config, expected_shapes


def first_order(support_loss, query_loss, psi, theta, rate):
    """1. The first-order meta-gradient for theta -> (P, d), without meta_gradient().

    Section 3.4, Eq. 6 and 3: one inner step, then the query loss's gradient, as if the step did not
    depend on theta. Hint: torch.func.grad twice, never nested. Where do you take the second one?
    """
    raise NotImplementedError


def hessian_vector(loss, theta, u):
    """2. The product of the loss's Hessian at theta with u (P, d) -> (P, d), forward over reverse.

    Appendix A.1 (H in Eq. 12 and 13); supmer.second_derivative() has it reverse over reverse. Hint:
    the Hessian is the gradient's derivative, and torch.func.jvp pushes one direction through any
    function. No matrix of (P d)^2 numbers is needed, and no finite step.
    """
    raise NotImplementedError


def which_first(documents, words, mask, end, n, seed):
    """3. Another task variant: does the first sentence stand before the second? -> data.Examples.

    Section 3.2, A.2 (Eq. 17). documents: lists of sentences in order, each a list of token ids.
    Make n examples [*s1, mask, *s2, end], s1 and s2 of ONE document, any that has such; label 0
    (yes) if s1 stands before s2, else 1; as many of each, in random order; words as given, no
    slots, vectors (n, 0, 0). All is drawn from seed. Hint: which pairs have no right answer?
    """
    raise NotImplementedError


def row_steps(P, d):
    """4. Another regularizer: its own learned step length for each row of the prompt -> phi, psi.

    Section 3.4, in place of Eq. 5. phi: {name: float64 tensor} at the start, P numbers in all;
    psi(phi, g, pooled) (P, d): row p of g (P, d) times row p's step. It starts as the identity, so
    that training begins as plain MAML, and must be able to learn. Hint: Adam gives phi any numbers,
    but a step must stay above 0. To train with it, make it an entry of supmer.REGULARIZERS.
    """
    raise NotImplementedError


def lambda_as_printed(b, alpha, seed, step, i):
    """5. Eq. 10 reversed, as it is printed: lambda ~ Beta(alpha, b alpha) -> lambda, its mean.

    Section 3.5 and Alg. 2; supmer.draw_lambda() does what was meant. Equal arguments give equal
    draws. The mean is the distribution's, not the draws': where does it go as b grows from 0 to 1,
    and is that a curriculum? Hint: what is the limit at b -> 0, where numpy raises?
    """
    raise NotImplementedError


def two_steps(support_loss, query_loss, psi, theta, rate):
    """6. The exact meta-gradient for theta through two inner steps on one support set -> (P, d).

    Section 3.4: Eq. 8 with Eq. 6 applied twice. Go back from the query loss's gradient v with
    hessian_vector() and torch.func.vjp, so that no graph is kept of both steps. Hint: transpose the
    product of dtheta''/dtheta' and dtheta'/dtheta. At which points are their Hessians and psi's?
    """
    raise NotImplementedError


# -------------------------------------------------------------------------------------- the checks

def toy_world(P, d):
    """Always the same random T5 in float64, theta (P, d), task, partner; normal(*shape) draws more.
    """
    generator = torch.Generator().manual_seed(0)
    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    def examples():
        texts = torch.randint(8, 39, (4, 5), generator=generator).tolist()
        return Examples([[*ids, 39, 1] for ids in texts], [[]] * 4, torch.zeros(4, 0, d),
                        torch.arange(4) % 2, [[39, 5], [39, 6]])
    config = T5Config(d_model=d, d_kv=4, d_ff=12, num_layers=1, num_decoder_layers=1, num_heads=2,
                      vocab_size=40, gated=True, tied=False, scaled=False)
    t5 = T5(config, {name: 0.3 * normal(*shape) + ("layer_norm" in name)
                     for name, shape in expected_shapes(config).items()})
    task, partner = (Task("toy", (), examples(), examples()) for _ in range(2))
    return t5, normal(P, d), task, partner, normal


def toy():
    """support_loss, query_loss, psi and theta, of toy_world()."""
    t5, theta, task, _, normal = toy_world(P=2, d=4)
    phi = {name: x.to(theta) + 0.5 * normal(*x.shape) for name, x in init_affine(2, 4).items()}
    pooled = normal(4)

    def loss(examples):
        return lambda theta: set_loss(t5, theta, examples, Method())[0]
    return loss(task.support), loss(task.query), lambda g: regularize(phi, g, pooled), theta


def off(found, wanted):
    """max|found - wanted| / max|wanted|; ValueError for another shape."""
    found, wanted = (torch.as_tensor(x, dtype=torch.float64) for x in (found, wanted))
    if found.shape != wanted.shape:
        raise ValueError(f"the shape is {tuple(found.shape)}, not {tuple(wanted.shape)}")
    return float((found - wanted).abs().max() / wanted.abs().max())


def slopes(function, x, step=1e-3):
    """The gradient of function: x -> number, from its values: Richardson's central differences."""
    def change(u):
        return (function(x + u) - function(x - u)) / (2 * step)
    entries = step * torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
    return torch.stack([(8 * change(u) - change(2 * u)) / 6 for u in entries]).view_as(x)


def check_first_order(solve):
    """Against the query loss's slope when theta' alone is moved."""
    support, query, psi, theta = toy()
    adapted = theta - 5 * psi(slopes(support, theta))
    return off(solve(support, query, psi, theta, 5.0), slopes(query, adapted))


def check_hessian_vector(solve):
    """Against the slope of <gradient, u> in a T5, and, to 1e-12, a Hessian that is known."""
    loss, _, _, theta = toy()
    u, M = theta.flip(0), torch.sin(torch.arange(6, dtype=theta.dtype)).view(3, 2)
    wanted = slopes(lambda x: (torch.func.grad(loss)(x) * u).sum(), theta)
    known = -M.T @ (torch.sin(M @ theta) * (M @ u))
    return np.max([off(solve(loss, theta, u), wanted),
                   1e6 * off(solve(lambda x: torch.sin(M @ x).sum(), theta, u), known)])


def check_which_first(solve):
    """The share of examples whose sentences or label are wrong; ValueError for a broken rule."""
    documents = [[[100 * i + j] * (1 + j % 3) for j in range(i)] for i in range(8)]
    place = {tuple(s): (i, j) for i in range(8) for j, s in enumerate(documents[i])}
    documents[5][3] = documents[5][0]           # this sentence stands before and behind 1 and 2
    words, wrong, used = [[9, 2], [9, 3]], 0, set()
    first, again, other = (solve(documents, words, 9, 1, 1001, seed) for seed in (0, 0, 1))
    labels = first.labels.tolist()
    for ids, label in zip(first.ids, labels, strict=True):
        cut = ids.index(9)
        (i, j), (k, m) = (place.get(tuple(s), (s, 0)) for s in (ids[:cut], ids[cut + 1:-1]))
        wrong += (ids[-1] != 1 or i != k or j == m or label != int(j > m)
                  or i == 5 and {j, m} in ({0, 1}, {0, 2}))
        used.add(str(i))
    rules = {"drawn from the seed": (first.ids == again.ids != other.ids
                                     and labels == again.labels.tolist()),
             "as many of each label": len(labels) == 1001 and sum(labels) in (500, 501),
             "labels in random order": 400 < sum(a != b for a, b in zip(labels, labels[1:])) < 600,
             "of all documents": used >= set("234567"),
             "words, slots, vectors": (first.words, first.slots, first.vectors.shape) == (
                 words, [[]] * 1001, (1001, 0, 0))}
    if not all(rules.values()):
        raise ValueError(f"not {', '.join(rule for rule, kept in rules.items() if not kept)}")
    return wrong / 1001


def check_row_steps(solve):
    """Identity at the start, dL/dphi in proportion to <v_p, g_p>, directions kept for any phi."""
    support, query, _, theta = toy()
    (phi, psi), g, pooled = solve(*theta.shape), torch.func.grad(support)(theta), theta[0]
    v = torch.func.grad(query)(theta - g)
    learned = torch.func.grad(lambda phi: query(theta - psi(phi, g, pooled)))(phi)
    found = F.normalize(torch.cat([x.flatten() for x in learned.values()]), dim=0)
    wanted = F.normalize((v * g).sum(1), dim=0)
    errors = [off(psi(phi, g, pooled), g), min(off(found, wanted), off(-found, wanted))]
    for size in (-3, 3):
        moved = psi({name: x + size * torch.linspace(0.5, 1, x.numel(), dtype=x.dtype).view_as(x)
                     for name, x in phi.items()}, g, pooled)
        errors.append(off(F.normalize(moved, dim=1), F.normalize(g, dim=1)))
    return np.max(errors)


def check_lambda_as_printed(solve):
    """Against a Beta made of two Gammas: means and mean squares, in standard errors."""
    rng, n, errors = np.random.default_rng(0), 20_000, []
    for b, alpha in ((0.0, 1.0), (0.1, 1.0), (0.5, 9.0), (1.0, 0.5)):
        X, Y = rng.gamma(alpha, size=n), rng.gamma(b * alpha or 1e-9, size=n)
        reference, draws = X / (X + Y), [solve(b, alpha, 0, step, 1) for step in range(2000)]
        lam, mean = np.array(draws).T
        if draws[:9] != [solve(b, alpha, 0, step, 1) for step in range(9)] or np.ptp(mean) > 1e-9:
            raise ValueError("the same numbers do not give the same draw and mean")
        for a, c in ((lam, reference), (lam ** 2, reference ** 2), (mean, reference)):
            error = np.sqrt(a.var() / len(a) + c.var() / n) + 1e-9
            errors.append(abs(a.mean() - c.mean()) / error)
    return np.max(errors)


def check_two_steps(solve):
    """Against the query loss's slope, both steps being made again for each value of theta."""
    support, query, psi, theta = toy()

    def adapted(theta):
        for _ in range(2):
            theta = theta - 5 * psi(torch.func.grad(support)(theta))
        return query(theta)
    return off(solve(support, query, psi, theta, 5.0), slopes(adapted, theta))


CHECKS = {"first_order": (check_first_order, 1e-6), "hessian_vector": (check_hessian_vector, 1e-6),
          "which_first": (check_which_first, 0.0), "row_steps": (check_row_steps, 1e-9),
          "lambda_as_printed": (check_lambda_as_printed, 4.0), "two_steps": (check_two_steps, 1e-6)}


def main():
    """Print how each exercise stands -> 0 if all are right, else 1."""
    right = 0
    for name, (check, allowed) in CHECKS.items():
        try:
            error = check(globals()[name])
        except NotImplementedError:
            says = "not done yet"
        except Exception as error:      # a solution may raise anything
            says = f"WRONG, {type(error).__name__}: {error}"
        else:
            right += error <= allowed                           # NaN is not
            verdict = "right" if error <= allowed else "WRONG"
            says = f"{verdict}, off by {error:.1e}; {allowed:.1e} is allowed"
        print(f"{name:20}{says}")
    return int(right < len(CHECKS))


if __name__ == "__main__":
    sys.exit(main())
