"""Draw the method in pictures; docs/tour.md shows and explains them.

    python tour.py --run runs/tiny-1    # all, into figures/tour/; RUN's log is one of them
    python tour.py --only clusters gate # some of them

They need matplotlib. They show the embedded T5, its corpus and its prompt, on held-out tasks: no
prompt was trained on their documents. world.py draws the planted world's picture.
"""

import re
import textwrap
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import corpus
import data
import measure
import supmer
import templates
from common import InputError, TINY, bar, run_script
from pictures import import_pyplot, moving_mean, save_picture
from prompts import load_prompt
from run_folder import read_log
from settings import Parser
from t5 import load_t5

FOLDER = Path(__file__).resolve().parent / "figures" / "tour"
GREY, RED, BLACK = "0.55", "C3", "black"    # start, meta-trained, exact
METHOD = supmer.Method(relative_step=0.03)


@cache
def world():
    """The embedded T5, half of its corpus as an index, the shipped prompt and the start."""
    t5 = load_t5(TINY)
    tokenizer = templates.load_tokenizer(TINY, t5.config)
    store = corpus.build_store(Path("cache"), [TINY / "corpus.jsonl.gz"], tokenizer, t5, 16, 0,
                               model=TINY, max_bytes=2_500_000)
    index = data.TaskIndex(store, tokenizer, support=16, query=16, max_tokens=64)
    theta, phi, _ = load_prompt(TINY, t5.config.d_model)
    start = supmer.init_prompt(t5, len(theta), 0)
    return SimpleNamespace(t5=t5, tokenizer=tokenizer, index=index, theta=theta, phi=phi,
                           start=start)


def held_out(number):
    """So many held-out tasks of each variant."""
    draw = partial(data.meta_task, world().index, 1, 0, split="validation", stream="validation")
    return [draw(i, variant=name) for i in range(number) for name in world().index.variants]


def query_loss(theta, task):
    """The query set's mean loss over its label words."""
    scores = measure.score(world().t5, theta, task.query, METHOD)
    return measure.measure(scores, task.query.labels)["word_loss"]


def support_gradient(theta, task):
    """g (P, d) and the gate's input (d,) of a task's support set."""
    g, pooled, _ = supmer.prompt_gradient(world().t5, theta, task.support, METHOD)
    return g, pooled


# ----------------------------------------------------------------------------------- the pictures

def clusters(figure):
    """Sentences of six clusters on the plane of their two widest directions."""
    index, t5 = world().index, world().t5
    store, pool = index.store, index.pools["train", "sp"]
    largest = np.argsort(-np.diff(pool.start))[:6]
    rows = [np.sort(pool.order[pool.start[c]:pool.start[c + 1]][:150]) for c in largest]
    points = [corpus.embed_rows(store.tokens, store.offsets, partial(corpus.embed_sentences, t5),
                                4096, part) for part in rows]
    whole = torch.cat(points)
    _, _, axes = torch.pca_lowrank(whole, 2, niter=10)
    axis = figure.subplots()
    for color, (cluster, part) in enumerate(zip(largest, points)):
        plane = (part - whole.mean(0)) @ axes
        centroid = torch.from_numpy(store.centroids[0][[cluster]])
        distance = torch.cdist(part, centroid)
        said = [store.sentence(rows[color][place]).tolist()
                for place in (distance.argmin(), distance.argmax())]
        near, far = (textwrap.shorten(text, 55) for text in world().tokenizer.decode_batch(said))
        axis.plot(*plane.T, ".", color=f"C{color}", alpha=0.5,
                  label=f"{cluster}, nearest: {near}\n{cluster}, farthest: {far}")
        axis.text(*plane.mean(0), str(cluster), weight="bold", fontsize=14, ha="center",
                  bbox={"facecolor": "white", "edgecolor": f"C{color}", "boxstyle": "circle"})
    axis.set_xlabel("first principal direction of the sentence embeddings")
    axis.set_ylabel("second")
    figure.legend(loc="outside right upper", fontsize=9, title="sentences of each cluster",
                  labelspacing=1.2, markerscale=2)


def tasks(figure):
    """One task of each format, as a reader sees it: grey support examples, a red query."""
    shown = {"sp-cluster": "sentence pair: the same cluster?", "mc-cluster": "multiple choice: "
             "which one is of its cluster?", "ss-cluster": "single sentence: which cluster?"}
    for axis, (name, title) in zip(figure.subplots(1, 3), shown.items()):
        task, line = data.meta_task(world().index, 3, 0, 0, variant=name), 0
        for part, row, color in (("support", 0, "0.93"), ("support", 1, "0.93"),
                                 ("query", 0, "mistyrose")):
            source, target = templates.examples_as_text(world().tokenizer, getattr(task, part), row,
                                                        task.clusters)
            source = source.replace("<extra_id_0>", "___").removesuffix("</s>")
            options = re.sub(r" ([ABCD] \.|Answer)(?= )", r"\n\1", source).splitlines()
            wrapped = [piece for option in options for piece in textwrap.wrap(option, 50)]
            lines = [f"{part}:", *wrapped, f"___ = {target}"]
            axis.text(0.02, line, "\n".join(lines), va="top", family="monospace", fontsize=8.2,
                      linespacing=1.2, bbox={"facecolor": color, "edgecolor": "none", "pad": 5})
            line += len(lines) + 1.5
        axis.set_title(title, loc="left")
        axis.set_ylim(36, -1)           # a line of text is a unit
        axis.axis("off")


def directions(figure):
    """The query loss along three directions from one prompt."""
    theta, phi, shares = world().theta, world().phi, np.linspace(0, 0.15, 11)
    curves = {"g": [], "psi(g)": [], "exact meta-gradient": []}
    for task in bar(held_out(1), desc="directions"):
        g, pooled = support_gradient(theta, task)
        exact = supmer.meta_gradient(world().t5, theta, phi, task, task, 0.0, 0.0, METHOD).d_theta
        for name, way in zip(curves, (g, supmer.regularize(phi, g, pooled), exact)):
            unit = way / way.norm() * theta.norm()
            curves[name].append([query_loss(theta - share * unit, task) for share in shares])
    axis = figure.subplots()
    for (name, losses), color, style in zip(curves.items(), (GREY, RED, BLACK), "-:-"):
        axis.plot(shares, np.mean(losses, 0), style, color=color, label=name, linewidth=2)
    axis.set_xlabel("length of the step / length of the prompt")
    axis.set_ylabel("query loss, mean of one task of each variant")
    axis.legend()


def adapted(figure):
    """Each held-out task's query loss before and after one inner step, from two prompts."""
    axis = figure.subplots()
    start_phi = supmer.init_affine(*world().start.shape)
    for label, theta, phi, color in (("start: rows of T5's table", world().start, start_phi, GREY),
                                     ("meta-trained", world().theta, world().phi, RED)):
        before, after = [], []
        for task in bar(held_out(5), desc=label):
            step = supmer.inner_step(theta, phi, *support_gradient(theta, task), METHOD)
            before.append(query_loss(theta, task))
            after.append(query_loss(step, task))
        axis.plot(before, after, "o", color=color, alpha=0.7,
                  label=f"{label}: mean {np.mean(before):.3f} to {np.mean(after):.3f}")
    axis.axline((0.5, 0.5), slope=1, color="0.8", zorder=0)
    axis.set_xlabel("query loss before the inner step")
    axis.set_ylabel("after it")
    axis.legend(loc="upper left")


def run(figure, folder):
    """s, b and each task's lambda over a run; a line is the mean of 19 steps."""
    entries = [entry for entry in read_log(folder) if "s" in entry]
    steps = [entry["step"] for entry in entries]
    panels = figure.subplots(3, 1, sharex=True)
    for axis, name in zip(panels, ("s", "b")):
        values = [entry[name] for entry in entries]
        axis.plot(steps, values, ".", color=RED, alpha=0.4)
        axis.plot(steps, moving_mean(values, 10), color=RED, linewidth=2)
    for entry in entries:
        panels[2].plot([entry["step"]] * len(entry["lambda"]), entry["lambda"], ".", color=RED,
                       alpha=0.4, markersize=4)
    for axis, label in zip(panels, ("s: cosine of support\nand query gradient",
                                    "b: how much may\nbe mixed (Eq. 10)",
                                    "lambda: the mixing\nratio of each task")):
        axis.set_ylabel(label)
    panels[2].set_xlabel("meta step")


def gate(figure):
    """What psi has learned: its gate on held-out tasks, and A."""
    d = world().theta.shape[1]
    inputs = [support_gradient(world().theta, task)[1] for task in held_out(2)]
    z = torch.cat([supmer.gate(world().phi, pooled) for pooled in inputs])
    left, right = figure.subplots(1, 2)
    left.hist(z.numpy(), 40, color=RED)
    left.axvline(0.5, color=GREY)
    left.set_xlabel("an entry of the gate z (0.5 at the start)")
    left.set_ylabel(f"entries, {len(inputs)} held-out tasks x {d}")
    changed = world().phi["A"] - torch.eye(d)
    most = changed.abs().max().item()
    image = right.imshow(changed, cmap="RdBu", vmin=-most, vmax=most)
    right.set_title(f"A - I, norm {changed.norm():.2f}")
    figure.colorbar(image, ax=right)


def second_order(figure):
    """The Hessian term's share of the meta-gradient, against the inner step's length."""
    axis, shares = figure.subplots(), np.geomspace(1e-3, 1, 10)
    prompts = {"start": (world().start, GREY), "meta-trained": (world().theta, RED)}
    for label, (theta, color) in prompts.items():
        found = []
        for share in bar(shares, desc=label):
            method = supmer.Method(relative_step=share)
            found.append([supmer.meta_gradient(world().t5, theta, world().phi, task, task, 0.0,
                                               0.0, method).log["second_order"]
                          for task in held_out(1)])
        axis.plot(shares, np.mean(found, 1), "o-", color=color, label=label)
    axis.set_xscale("log")
    axis.set_xlabel("inner step / length of the prompt (demonstration: 0.03)")
    axis.set_ylabel("|Hessian term| / |meta-gradient|")
    axis.legend()


PICTURES = {"clusters": (clusters, (11, 5)), "tasks": (tasks, (12.5, 5.6)),
            "directions": (directions, (6, 4)), "adapted": (adapted, (5.5, 5)),
            "run": (run, (7, 5.5)), "gate": (gate, (9, 3.8)),
            "second_order": (second_order, (6, 4))}


def main(argv):
    """Draw what is asked for -> exit status 0."""
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=[*PICTURES],
                        help="some of the pictures")
    parser.add_argument("--run", type=Path, help="whose log is drawn as `run`")
    given = parser.parse_args(argv)
    pyplot = import_pyplot()
    if "run" in given.only and not given.run:
        raise InputError("the picture `run` needs a run's folder: --run runs/tiny-1, "
                         f"or --only {' '.join(name for name in PICTURES if name != 'run')}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)                # of pca_lowrank
    for name in given.only:
        draw, size = PICTURES[name]
        figure = pyplot.figure(figsize=size, layout="constrained")
        draw(figure, given.run) if name == "run" else draw(figure)
        print(save_picture(figure, FOLDER / f"{name}.png", dpi=100))
    return 0


if __name__ == "__main__":
    run_script(main, "stopped; finished pictures are kept")
