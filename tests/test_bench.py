"""bench.py compares fairly."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import bench
import contenders
import supmer
from conftest import affine_start, needs_sklearn, needs_transformers, nudged, relative
from supmer import Method


@needs_transformers
@pytest.mark.parametrize("first_order", [False, True])
def test_benchs_transformers_compute_the_same_gradient(first_order):
    """What bench.py times is the same to 1e-5 (transformers' norms are float32), padded or not."""
    s = contenders.Sizes(**contenders.WARM, dtype="float64")
    t5, (pair,) = contenders.random_t5(s), contenders.random_pairs(s)
    theta, generator = supmer.init_prompt(t5, 2, 0).double(), torch.Generator().manual_seed(0)
    phi = nudged(affine_start(64, torch.float64), 0.1, generator)
    method = Method(inner_rate=1000.0, micro_tokens=40, gate_weight=0.0, first_order=first_order)
    ours, other = (supmer.meta_gradient(t5, theta, phi, *pair, 0.3, 0.5, one) for one in (
        method, replace(method, first_order=not first_order)))
    for padded in (0, 40):
        model = contenders.hf_model(t5)
        d_theta, d_phi = contenders.hf_meta_gradient(model, theta, phi, *pair, 0.3, method, padded)
        assert relative(ours.d_theta, d_theta) < 1e-5
        assert all(relative(ours.d_phi[name], d_phi[name]) < 1e-5 for name in ("A", "W"))
        assert relative(other.d_theta, d_theta) > 1e-3


def test_benchs_ratios_by_hand(monkeypatch):
    """Medians and shortest times are compared, peaks for memory; what fails has no ratio."""
    found = {"exact, recomputed": [(9.0, 10.0, None), (2.0, 30.0, None), (3.0, 20.0, None)],
             "first order": [(2.0, 5.0, None)], "transformers, create_graph": []}
    assert bench.summary(found["exact, recomputed"]) == (
        3.0, 2.0, pytest.approx(7 / 3), 30.0, None)
    ratios = {row[:3]: row[3] for row in bench.ratios(found, {})}
    assert ratios.pop(("exact, recomputed", "first order", "seconds")) == 1.5
    assert ratios.pop(("exact, recomputed", "first order", "shortest")) == 1.0
    assert ratios and set(ratios.values()) == {None}
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda n, context: ThreadPoolExecutor(n))
    group = {"a": (lambda s: 1 / 0, contenders.QUICK)}
    assert bench.measure_group(group, 2, 1) == ({"a": []}, {"a": "division by zero"})


@needs_transformers
@needs_sklearn
def test_each_contender_runs():
    """At the smallest sizes, beside PEFT and transformers. Every ratio is of two that run."""
    pytest.importorskip("peft", reason="peft is not installed")
    every = {name: one for group in bench.groups(contenders.QUICK).values()
             for name, one in group.items()}
    assert all({row[0], row[1]} <= every.keys() for row in bench.RATIOS)
    for contender, s in every.values():
        contender(replace(s, **contenders.WARM))()


@needs_transformers
def test_operations_hold_on_any_machine():
    """An exact step takes under twice a first-order one's, with kept graphs less than theirs."""
    counts = bench.operations(replace(contenders.QUICK, layers=1, support=2, query=2))
    first, kept, exact, theirs = (counts[name] for name in (
        "first order", bench.KEPT, bench.EXACT, bench.HF))
    assert 1.2 * first < kept < exact < 1.9 * first and kept < theirs
