"""The planted world: a language made by hand, in which a newcomer sees what meta-learning does.

    python world.py                                                 # one seed, a table: 3 minutes
    python world.py --seeds 0 1 2 3 4 --plot figures/world.png      # a mean over five, resumable

PLANTED: it was built for SUPMER to gain in, and says nothing about text. MAML has its sinusoids,
prompt tuning has this world: it is small, and every right answer is known.
- The language: an attribute is + or -, and has three words for either. A sentence says four of the
  24 attributes. A micro T5 is trained here, then frozen. It reads a prompt as a QUESTION, and
  answers yes or no. A question is a weighted sum of attributes' directions, spread over P rows.
- A task: "is attribute a +?", or "-?". Nobody states it: a prompt has to find it in 16 examples.
- The SHORTCUT: one of four styles goes with the label in every support set and few-shot sample, but
  not in query and test sets. So whoever compares the two can learn to distrust styles.
Shapes: P prompt rows, d model width, A attributes, n examples, m tasks that are tuned together.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from baselines import normal_prompt, ppt_step
from common import bar, read_json, rng, run_script, whole_file
from data import Batch, Examples, Task, collate
from report import standard_error
from settings import from_settings, knob, settings_parser
from supmer import (Method, encode_with_prompt, init_prompt, init_state,
                    loss_share, meta_step, regularize, word_log_probs)
from t5 import EOS, T5, T5Config, embed_tokens, encode, expected_shapes

P, D, A, SYNONYMS, LENGTH = 4, 64, 24, 3, 4
STYLES, META, VALIDATION, TEST = range(4), range(4, 16), range(16, 18), range(18, 24)
MASK, YES, NO, FIRST = 3, 4, 5, 6       # token ids; the attributes' words begin at FIRST
WORDS = [[MASK, YES], [MASK, NO]]       # label 0 is yes
SHAPE = T5Config(d_model=D, d_kv=16, d_ff=128, num_layers=2, num_decoder_layers=1, num_heads=4,
                 vocab_size=FIRST + 2 * A * SYNONYMS, gated=True, tied=False, scaled=False)
STEPS, RATES = (0, 1, 2, 5, 10, 20), (0.1, 0.3, 1.0)    # AdamW's; rates in units of the words' RMS
T5_STEPS, TASKS, EXAMPLES, TEST_ROWS, FOLDER = 250, 2, 16, 40, Path("runs/world")


@dataclass(frozen=True)
class Settings:
    """What can be changed, beside the numbers of Method."""
    seeds: tuple = knob((0,), "each makes a world, prompts and tasks anew", zero=True, first=True)
    only: tuple = knob(("",), "only rows that begin so, such as 'shortcut: PPT'", first=True)
    plot: str = knob("", "draw accuracy over steps into this PNG file", first=True)
    drift: float = knob(0.5, "share of query and test rows whose style is wrong", zero=True)


WORLD = {name: (value, "") for name, value in {     # Method's values here, in --help as tiny's
    "steps": 150, "relative_step": 0.3, "prompt_rate": 0.05, "regularizer_rate": 1e-2,
    "augmentation": False, "words_only": True, "keep_graphs": 1, "micro_tokens": 4096}.items()}


def sentences(generator, n, length, given):
    """n sentences, the mask and </s> -> ids (n, length + 2), values (n, A): +1, -1, 0 if not said.
    given: {attribute: values (n,)} that every sentence holds; all else is drawn."""
    value, order = generator.choice([-1, 1], (n, A)), generator.random((n, A))
    for attribute, wanted in given.items():
        value[:, attribute] = wanted
        order[:, attribute] -= 1                                        # among the first ones
    said = generator.permuted(order.argsort(1)[:, :length], axis=1)                 # (n, length)
    plus = np.take_along_axis(value, said, 1) > 0
    ids = FIRST + (2 * said + plus) * SYNONYMS + generator.integers(SYNONYMS, size=said.shape)
    values = value * (order.argsort(1).argsort(1) < length)
    return np.concatenate([ids, np.tile([MASK, EOS], (n, 1))], 1), values


def questions(generator, n, length, names):
    """A batch for the T5 -> prompts (n, P, d), ids, and p(yes) = sigmoid(4 sum of weight value).
    9 of 10 ask for what the sentence says, half of them for a second attribute, too."""
    ids, values = sentences(generator, n, length, {})
    ranking = generator.random((n, A)) - (values != 0) * (generator.random((n, 1)) < 0.9)
    weights = np.zeros((n, A))
    for attribute, share in ((ranking.argmin(1), 1.0), (generator.integers(A, size=n), 0.5)):
        size = generator.choice([-1, 1], n) * generator.uniform(0.2, 1, n)
        weights[np.arange(n), attribute] += size * (generator.random(n) < share)
    shares = generator.dirichlet(np.ones(P), n) * P     # of the rows: T5 answers wherever it stands
    noise = generator.standard_normal((n, P, D)) * generator.uniform(0, 0.3, (n, 1, 1))
    prompts = shares[:, :, None] * (weights @ names)[:, None] + noise
    yes = 1 / (1 + np.exp(-4 * (weights * values).sum(1)))
    return torch.from_numpy(prompts).float(), torch.from_numpy(ids), torch.from_numpy(yes).float()


def train_t5(seed, steps, n=128, rate=3e-3):
    """The micro T5 after `steps` batches of n questions, and the attributes' directions (A, d),
    orthogonal, of RMS 1. A word begins near plus or minus its attribute's direction."""
    generator, weights = rng(seed, 0, 0, "world T5"), {}

    def normal(*shape):
        return torch.from_numpy(generator.standard_normal(shape)).float()
    for name, shape in expected_shapes(SHAPE).items():
        fan_in = 1 if name == "shared.weight" else shape[-1] * (SHAPE.d_kv if ".q." in name else 1)
        weights[name] = fan_in ** -0.5 * normal(*shape)             # T5 does not scale its scores
        if "norm" in name or "relative" in name:
            weights[name] = torch.full(shape, float("norm" in name))
    names = torch.linalg.qr(normal(D, D))[0][:A] * D ** 0.5
    words = torch.tensor([[[-1.0]], [[1.0]]]) * names[:, None, None]
    weights["shared.weight"][FIRST:] = (words + 0.3 * normal(A, 2, SYNONYMS, D)).flatten(0, 2)
    t5 = T5(SHAPE, {name: x.requires_grad_() for name, x in weights.items()})
    adam = torch.optim.Adam(weights.values())
    for step in bar(range(steps), desc="training the micro T5"):
        length = min(LENGTH, 2 + 12 * step // steps)                # sentences grow
        prompts, ids, yes = questions(rng(seed, step + 1, 0, "world T5"), n, length, names.numpy())
        x = torch.cat([prompts, embed_tokens(t5, ids)], 1)
        mask = torch.ones(x.shape[:2], dtype=torch.bool)
        scores = word_log_probs(t5, encode(t5, x, mask), mask, WORDS)               # (n, 2)
        (-(yes * scores[:, 0] + (1 - yes) * scores[:, 1]).mean()).backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        adam.param_groups[0]["lr"] = rate * min(1, (step + 1) / 50) * (1 - step / steps)
        adam.step()
        adam.zero_grad()
    return T5(SHAPE, {name: x.detach() for name, x in weights.items()}), names


def example_set(generator, n, question, style=None, drift=0.0):
    """n Examples of a question (attribute, sign), as many of each label, in random order. The style
    is + for yes and - for no, but reversed in a share `drift` of each label's rows."""
    row = generator.permutation(n)
    yes = 1 - 2 * (row % 2)                                                         # +1, -1
    given = {question[0]: question[1] * yes}
    if style is not None:
        given[style] = np.where(row // 2 < (1 - drift) * n / 2, yes, -yes)
    ids, _ = sentences(generator, n, LENGTH, given)
    return Examples(ids.tolist(), [[]] * n, torch.zeros(n, 0, D), torch.from_numpy(row % 2), WORDS)


def planted_task(generator, drift, question=None, rows=EXAMPLES):
    """A Task: its support set, and a query or test set of `rows` rows, in which the style drifts.
    drift None: no style, no shortcut. Without a question one about META is drawn."""
    question = question or (int(generator.choice(META)), int(generator.choice([-1, 1])))
    style = None if drift is None else int(generator.choice(STYLES))
    support = example_set(generator, EXAMPLES, question, style)
    return Task("planted", (), support, example_set(generator, rows, question, style, drift or 0.0))


def meta_train(t5, theta, drift, method, seed, take_step=meta_step, queries=False):
    """theta and phi after method.steps. PPT (take_step=ppt_step) sees the same examples; queries:
    other tasks' query sets stand in for the support sets."""
    state = init_state(theta.clone(), method)
    for step in bar(range(method.steps), desc="meta-training"):
        tasks = [planted_task(rng(seed, step, i, "world task"), drift) for i in range(2 * TASKS)]
        pairs = [*zip(tasks[:TASKS], tasks[TASKS:])]
        if queries:
            pairs = [(task._replace(support=other.query), other) for task, other in pairs]
        take_step(t5, state, pairs, method, seed)
    return state.theta.detach(), {name: x.detach() for name, x in state.phi.items()}


def tuning_tasks(seed, attributes, drift):
    """m tasks, one for each attribute and sign -> their few-shot samples and test sets, each as one
    Batch whose tensors have a first axis of m."""
    tasks = [planted_task(rng(seed, a, i, "world tuning"), drift, (a, sign), TEST_ROWS)
             for a in attributes for i, sign in enumerate((-1, 1))]
    sets = [[collate(part, range(len(part.ids))) for part in task[2:]] for task in tasks]
    return [Batch(*map(torch.stack, zip(*some))) for some in zip(*sets)]


def tune(t5, start, phi, method, samples, tests, rate, steps=STEPS):
    """Test accuracy in % after each number of steps from start (P, d), on m tasks -> (steps, m).
    As eval.tune, without clipping or decay: psi, if phi is given, then AdamW."""
    m, n = samples.ids.shape[:2]
    theta, unit = start.repeat(m, 1, 1), t5.weights["shared.weight"].square().mean().sqrt()
    adam = torch.optim.AdamW([theta.requires_grad_()], rate * float(unit), weight_decay=0.0)
    loss = partial(loss_share, t5, other=None, lam=0.0, words=WORDS, n=n, method=method)

    @torch.no_grad()
    def accuracy(theta, batch):
        scores = word_log_probs(t5, *encode_with_prompt(t5, theta, batch), WORDS)
        return 100 * (scores.argmax(-1) == batch.targets.argmax(-1)).float().mean()
    curve = [torch.vmap(accuracy)(theta, tests).tolist()]
    for step in range(1, steps[-1] + 1):
        losses, pooled = torch.vmap(loss)(theta, samples)
        theta.grad, = torch.autograd.grad(losses.sum(), theta)      # of each task's own loss
        theta.grad = torch.vmap(partial(regularize, phi))(theta.grad, pooled) if phi else theta.grad
        adam.step()
        curve += [torch.vmap(accuracy)(theta, tests).tolist()] if step in steps else []
    return np.array(curve)


PPT = {"regularizer": "none", "prompt_rate": 0.15}     # its rate falls faster: as long a way in all
LEARNED = {     # name: changes to Method, and how meta_train is called
    "MAML and psi": ({}, {}),
    "MAML without psi": ({"regularizer": "none"}, {}),
    "first order and psi": ({"first_order": True}, {}),
    "PPT, same examples": (PPT, {"take_step": ppt_step}),
    "PPT, query sets alone": (PPT, {"take_step": ppt_step, "queries": True})}
OFF = ", psi off in tuning"       # of the first one, in a row of its own
WORLDS = {"shortcut": (*LEARNED, "random", "vocabulary", "small random"),
          "no shortcut": ("MAML and psi", "PPT, same examples", "random", "small random")}


def run_seed(seed, settings, method):
    """{"world: method": {rate, accuracy (STEPS, m)}} of a seed; the rate is that of the best mean
    accuracy on VALIDATION, 1 to 10 steps. What FOLDER holds of the seed is not made again."""
    about = json.dumps([seed, settings.drift, asdict(method)])
    path = FOLDER / f"{hashlib.sha256(about.encode()).hexdigest()[:10]}-{seed}.json"
    FOLDER.mkdir(parents=True, exist_ok=True)
    found = read_json(path) if path.exists() else {}
    rows = [f"{world}: {name}" for world, methods in WORLDS.items() for name in methods]
    missing = [row for row in rows if row not in found and row.startswith(settings.only)]
    t5, names = train_t5(seed, T5_STEPS) if missing else (None, None)
    for row in bar(missing, desc=f"seed {seed}"):
        world, name = row.split(": ")
        planted = settings.drift if world == "shortcut" else None
        normal = normal_prompt(t5, seed, P)["theta"]
        theta = {"random": normal, "vocabulary": init_prompt(t5, P, seed)}.get(name, 0.3 * normal)
        validation, test = (tuning_tasks(seed, some, planted) for some in (VALIDATION, TEST))
        phi = {}
        if name in LEARNED:
            changes, how = LEARNED[name]
            theta, phi = meta_train(t5, theta, planted, replace(method, **changes), seed, **how)
        for title, psi in [(row, phi), (row + OFF, {})][:2 if name == "MAML and psi" else 1]:
            curve = partial(tune, t5, theta, psi, method)
            best = {curve(*validation, rate, STEPS[:-1])[1:].mean(): rate for rate in RATES[::-1]}
            rate = best[max(best)]
            found[title] = {"rate": rate, "accuracy": curve(*test, rate).tolist()}
        if phi:
            stretch = torch.einsum("ni,ij,nj->n", names, phi["A"], names) / D      # |names| = D^0.5
            found[row]["A"] = stretch.tolist()
        with whole_file(path) as file:
            file.write(json.dumps(found).encode())
    return {row: entry for row, entry in found.items() if row.startswith(settings.only)}


def points(results, key):
    """Mean accuracy after each of STEPS, standard errors over seeds (of one: over its tasks)."""
    curves = np.array([found[key]["accuracy"] for found in results])            # (seeds, STEPS, m)
    curves = curves.mean(2) if len(curves) > 1 else curves[0].T
    return curves.mean(0), standard_error(curves)


def print_table(results):
    """All results in Markdown; A along unit directions d: the mean d^T A d, 1 at the start."""
    heads = ["% after AdamW steps", "rates", *map(str, STEPS), "A along styles, TEST"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for key, entry in results[0].items():
        rates = sorted({str(found[key]["rate"]) for found in results})
        cells = [f"{mean:.1f} ± {error:.1f}" for mean, error in zip(*points(results, key))]
        stretch = [found[key].get("A", [np.nan] * A) for found in results]          # (seeds, A)
        along = [np.mean(stretch, 0)[some].mean() for some in (STYLES, TEST)]
        cells.append("{:.2f}, {:.2f}".format(*along).replace("nan, nan", ""))
        print("|", " | ".join([key, ", ".join(rates), *cells]), "|")


def draw(results, path):
    """Accuracy over AdamW steps as a PNG, a panel for each world."""
    from pictures import COLORS, import_pyplot, name_lines, save_picture
    picture, axes = import_pyplot().subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    for axis, world in zip(axes, WORLDS):
        ends = {}
        for key in filter(lambda key: key.startswith(world), results[0]):
            (means, errors), name = points(results, key), key.partition(": ")[2]
            axis.errorbar(range(len(STEPS)), means, errors, capsize=2, color=COLORS[name],
                          linewidth=3 if name == "MAML and psi" else 1.5)
            ends[name] = len(STEPS) - 1, means[-1], COLORS[name]
        name_lines(axis, ends, gap=3)
        axis.set_xticks(range(len(STEPS)), STEPS)
        axis.set(title=world, xlabel="AdamW steps", ylabel="test accuracy in %", ylim=(40, 101))
    save_picture(picture, path, dpi=100)


def main(argv):
    """The command line."""
    given = vars(settings_parser(__doc__, (Settings, Method), WORLD).parse_args(argv))
    settings = from_settings(Settings, given)
    method = from_settings(Method, {name: value for name, (value, _) in WORLD.items()} | given)
    torch.set_num_threads(1)                                # the tensors are small
    results = [run_seed(seed, settings, method) for seed in settings.seeds]
    print_table(results)
    if settings.plot:
        draw(results, settings.plot)


if __name__ == "__main__":
    run_script(main, "stopped: the same command continues")
