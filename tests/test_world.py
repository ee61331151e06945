"""The planted world: what is planted is there, and tuning many tasks at once changes nothing."""

import numpy as np
import pytest
import torch

import world
from conftest import nudged
from measure import score
from supmer import Method, init_affine, prompt_gradient, regularize
from common import rng
from world import A, EXAMPLES, FIRST, META, P, STYLES, SYNONYMS, TEST

METHOD = Method(words_only=True)


def values(examples):
    """What each sentence says, read back from its word ids: (n, A) of +1, -1 and 0."""
    found = np.zeros((len(examples.ids), A))
    for row, ids in zip(found, examples.ids):
        for word in ids[:-2]:
            attribute, plus = divmod((word - FIRST) // SYNONYMS, 2)
            row[attribute] = 2 * plus - 1
    return found


@pytest.mark.parametrize("drift, follows", [(0.0, 1.0), (0.25, 0.75), (1.0, 0.0)])
def test_a_style_follows_the_label_in_support_sets_and_drifts_in_query_sets(drift, follows):
    """One style has the label's sign in a support set, one attribute is the question in both."""
    for i in range(20):
        task = world.planted_task(np.random.default_rng(i), drift)
        yes = [1 - 2 * part.labels.numpy() for part in (task.support, task.query)]
        support, query = (values(part) * y[:, None] for part, y in zip(task[2:], yes))
        style = [s for s in STYLES if (support[:, s] == 1).all()]
        question = [a for a in META if (abs(support[:, a]) == 1).all()
                    and abs(support[:, a].sum()) == abs(query[:, a].sum()) == EXAMPLES]
        assert len(style) == len(question) == 1 and [y.sum() for y in yes] == [0, 0]
        assert (query[:, style[0]] == 1).mean() == follows
    free = world.planted_task(np.random.default_rng(0), None)
    assert not any((values(free.support)[:, s] != 0).all() for s in STYLES)


def test_every_input_is_a_pure_function_of_seed_and_step():
    """Tasks, tests and the T5: the same numbers give the same, others give others."""
    def inputs(seed):
        seen = []
        world.meta_train(None, torch.ones(P, world.D), 0.5, Method(steps=2), seed,
                         lambda _, state, pairs, *__: seen.append(str(pairs)))
        tests = world.tuning_tasks(seed, TEST, 0.5)
        head = world.train_t5(seed, 2)[0].weights["lm_head.weight"]
        return *seen, tests[1].ids.tolist(), head.tolist()
    first, again, other = map(inputs, (0, 0, 1))
    assert first == again and first[0] != first[1]
    assert all(a != b for a, b in zip(first, other))


def test_tuning_all_tasks_at_once_equals_one_after_the_other():
    """By supmer's gradient, psi and AdamW, on unseen attributes whose exact prompt T5 answers."""
    t5, names = world.train_t5(0, 100, n=64)
    assert set(TEST).isdisjoint(META)
    generator, right = torch.Generator().manual_seed(0), []
    for attribute in TEST:
        examples = world.example_set(np.random.default_rng(attribute), 100, (attribute, -1))
        exact = -names[attribute].expand(P, -1)
        right.append(score(t5, exact, examples, METHOD).argmax(1) == examples.labels)
    assert torch.cat(right).float().mean() > 0.9
    t5.weights["shared.weight"] *= 0.3                  # a unit of rates that is not nearly 1
    start = 0.3 * torch.randn(P, world.D, generator=generator)
    phi = nudged(init_affine(P, world.D), 0.1, generator)
    together = world.tune(t5, start, phi, METHOD, *world.tuning_tasks(0, TEST, 0.5), 0.3, (0, 1, 2))
    unit = float(t5.weights["shared.weight"].square().mean().sqrt())
    for i, sign in enumerate((-1, 1)):                              # the first attribute's tasks
        task = world.planted_task(rng(0, TEST[0], i, "world tuning"), 0.5, (TEST[0], sign), 40)
        theta, alone = start.clone(), []
        adam = torch.optim.AdamW([theta], 0.3 * unit, weight_decay=0.0)
        for _ in range(3):
            right = score(t5, theta, task.query, METHOD).argmax(1) == task.query.labels
            alone.append(100 * float(right.float().mean()))
            g, pooled, _ = prompt_gradient(t5, theta, task.support, METHOD)
            theta.grad = regularize(phi, g, pooled)
            adam.step()
        assert together[:, i] == pytest.approx(alone, abs=2.6)      # a row of 40
        assert len({*alone}) > 1
