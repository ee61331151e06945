"""exercises.py: each check accepts the solution and refuses typical mistakes."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import exercises

grad = torch.func.grad


def last_place(sentences, sentence):
    return len(sentences) - 1 - sentences[::-1].index(sentence)


def which_first(documents, words, mask, end, n, seed, *, place=last_place, balanced=True, shift=0,
                turned=0):
    """The right solution, or with another keyword a wrong one."""
    rng, ids = np.random.default_rng(seed), []
    pairs = [[(a, b) for i, a in enumerate(d) for b in d[i + 1:] if place(d, a) < d.index(b)]
             for d in documents]
    pairs = [p for p in pairs if p]
    labels = rng.permutation(np.arange(n) % 2) if balanced else rng.integers(2, size=n)
    for label in labels:
        k = rng.integers(len(pairs))
        a, b = pairs[k][rng.integers(len(pairs[k]))]
        b = pairs[k - shift][0][1] if shift else b
        a, b = (b, a) if label else (a, b)
        ids.append([*a, mask, *b, end])
    return data.Examples(ids, [[]] * n, torch.zeros(n, 0, 0), torch.from_numpy(labels ^ turned),
                         words)


def beta(first, second, mean):
    """A solution of the fifth exercise: the two parameters and the mean, functions of b, alpha."""
    def draw(b, alpha, *numbers):
        rng = np.random.default_rng(numbers)
        return rng.beta(first(b, alpha), second(b, alpha)) if b > 0 else 1.0, mean(b)
    return draw


def row_steps(start, step, columns=False):
    """A solution of the fourth exercise: phi's numbers at the start, the steps made of them."""
    def solve(P, d):
        shape = (1, d) if columns else (P, 1)
        return {"x": torch.full(shape, start, dtype=torch.float64)}, \
            lambda phi, g, H: step(phi["x"]) * g
    return solve


def two_steps(support, query, psi, theta, rate, second_order=True):
    first = theta - rate * psi(grad(support)(theta))
    v = grad(query)(first - rate * psi(grad(support)(first)))
    for point in (first, theta) if second_order else ():
        u, = torch.func.vjp(psi, grad(support)(point))[1](v)
        v = v - rate * RIGHT["hessian_vector"](support, point, u)
    return v


RIGHT = {
    "first_order": lambda s, q, psi, x, a: grad(q)(x - a * psi(grad(s)(x))),
    "hessian_vector": lambda loss, x, u: torch.func.jvp(grad(loss), (x,), (u,))[1],
    "which_first": which_first,
    "row_steps": row_steps(0.0, torch.exp),
    "lambda_as_printed": beta(lambda b, alpha: alpha, lambda b, alpha: b * alpha,
                              lambda b: 1 / (1 + b)),
    "two_steps": two_steps}
WRONG = {
    "first_order: the second order": lambda s, q, psi, x, a: grad(
        lambda x: q(x - a * psi(grad(s)(x))))(x),
    "first_order: psi forgotten": lambda s, q, psi, x, a: grad(q)(x - a * grad(s)(x)),
    "hessian_vector: a finite difference": lambda loss, x, u: (
        grad(loss)(x + 1e-4 * u) - grad(loss)(x - 1e-4 * u)) / 2e-4,
    "which_first: labels turned": partial(which_first, turned=1),
    "which_first: unbalanced": partial(which_first, balanced=False),
    "which_first: a sentence that comes twice": partial(which_first, place=lambda d, a: -1),
    "which_first: a sentence where it comes first": partial(which_first, place=list.index),
    "which_first: of two documents": partial(which_first, shift=1),
    "row_steps: nothing at the start": row_steps(0.0, lambda x: x),
    "row_steps: steps below 0": row_steps(1.0, lambda x: x),
    "row_steps: cannot learn": row_steps(0.0, lambda x: 1 + F.relu(x)),
    "row_steps: a step per column": row_steps(0.0, torch.exp, columns=True),
    "row_steps: one step for all": row_steps(0.0, lambda x: torch.exp(x.mean())),
    "lambda_as_printed: as it was meant": beta(
        lambda b, alpha: b * alpha, lambda b, alpha: alpha, lambda b: b / (1 + b)),
    "lambda_as_printed: alpha forgotten": beta(
        lambda b, alpha: 1.0, lambda b, alpha: b, lambda b: 1 / (1 + b)),
    "two_steps: the first order": partial(two_steps, second_order=False),
    "two_steps: one step": lambda s, q, psi, x, a: grad(
        lambda x: q(x - a * psi(grad(s)(x))))(x)}


@pytest.mark.parametrize("name", exercises.CHECKS)
def test_each_check_tells_right_from_wrong(name):
    """A solution is right by a wide margin; a mistake is off by twice what is allowed, or named."""
    check, allowed = exercises.CHECKS[name]
    assert check(RIGHT[name]) <= allowed / (1 if name == "lambda_as_printed" else 10)   # by chance
    for solve in (solve for mistake, solve in WRONG.items() if mistake.startswith(f"{name}:")):
        try:
            assert not check(solve) <= 2 * allowed
        except ValueError as broken:
            assert str(broken).startswith(("not ", "the same numbers", "the shape is"))


def test_the_exercises_as_a_student_meets_them(monkeypatch, capsys):
    """The status is 1 until all are right; a solution that raises is one line; NaN is not right."""
    assert exercises.main() == 1 and capsys.readouterr().out.count("not done yet\n") == 6
    for check, status, says in ((lambda solve: 0.0, 0, "right, off by 0"),
                                (lambda solve: math.nan, 1, "WRONG, off by nan"),
                                (lambda solve: 1 / 0, 1, "WRONG, ZeroDivisionError: division")):
        monkeypatch.setattr(exercises, "CHECKS", {"first_order": (check, 1.0)})
        assert exercises.main() == status and says in capsys.readouterr().out
