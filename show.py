"""Print the meta-gradient, T5, K-means and the meta tasks at work.

    python show.py      # what supmer.py, t5.py, kmeans.py and data.py print; seconds
"""

import tempfile

import torch

import corpus
import data
import supmer
import t5 as T
import templates
from common import TINY, run_script
from exercises import toy_world
from kmeans import kmeans


def meta_gradient():
    """A toy T5's meta-gradient beside its finite difference."""
    t5, theta, *tasks, normal = toy_world(P=3, d=8)
    phi = {name: x.to(theta) for name, x in supmer.init_affine(3, 8).items()}
    phi["A"] += 0.3 * normal(8, 8)
    exact = supmer.Method(inner_rate=20.0)
    first_order = supmer.Method(inner_rate=20.0, first_order=True)

    def loss(theta):
        return supmer.meta_loss(t5, theta, phi, *tasks, 0.3, 0.0, exact)
    print("a task's loss after an inner step, its derivative along random directions of theta:")
    print("second order   finite difference     first order")
    for u in normal(3, 3, 8):
        second, first = (
            (supmer.meta_gradient(t5, theta, phi, *tasks, 0.3, 0.0, method).d_theta * u).sum()
            for method in (exact, first_order))
        difference = (loss(theta + 1e-5 * u) - loss(theta - 1e-5 * u)) / 2e-5
        print(f"{second:+.9f} {difference:+19.9f} {first:+15.9f}")


def filled_blanks():
    """The model in tiny/ fills two blanks: the five likeliest words."""
    t5 = T.load_t5(TINY)
    tokenizer = templates.load_tokenizer(TINY, t5.config)
    target = torch.tensor([[T.PAD, tokenizer.token_to_id(templates.MASK)]])
    for text in ("I loved this film. It was <extra_id_0>.", "It is boring. It was <extra_id_0>."):
        ids = torch.tensor([tokenizer.encode(text).ids])                            # (1, S)
        mask = torch.ones_like(ids, dtype=torch.bool)
        memory = T.encode(t5, T.embed_tokens(t5, ids), mask)
        logits = T.next_token_logits(t5, T.decode(t5, target, memory, mask))        # (1, 2, V)
        p, best = torch.softmax(logits[0, 1], dim=-1).topk(5)
        print(text, *(f"{tokenizer.decode([i])} {share:.2f}" for share, i in zip(p, best.tolist())))


def inertia():
    """Five planted clusters: the inertia per point after each update."""
    centres = torch.tensor([[0., 0.], [4., 4.], [-4., 4.], [4., -4.], [-4., -4.]])
    planted = centres.repeat(2000, 1)
    cloud = planted + torch.randn(planted.shape, generator=torch.Generator().manual_seed(0))
    for number, value in enumerate(kmeans(cloud, 5, seed=0).inertia):
        print(f"after {number} updates: inertia per point {value / len(cloud):.6f}")


def meta_tasks():
    """A small task of each variant as text: three support examples and one query."""
    t5 = T.load_t5(TINY)
    tokenizer = templates.load_tokenizer(TINY, t5.config)
    with tempfile.TemporaryDirectory() as cache:
        store = corpus.build_store(cache, [TINY / "corpus.jsonl.gz"], tokenizer, t5, clusters=5,
                                   seed=0, model=TINY, max_bytes=200_000)
        index = data.TaskIndex(store, tokenizer, support=3, query=1, max_tokens=64)
        for variant in index.variants:
            task = data.meta_task(index, 3, 0, 0, variant=variant)
            print(f"{variant}, anchors of cluster {task.clusters}")
            for name, row in (("support", 0), ("support", 1), ("support", 2), ("query", 0)):
                source, target = templates.examples_as_text(tokenizer, getattr(task, name), row,
                                                            task.clusters)
                print(f"  {name}: {source} -> {target}")


def main(*concepts):
    """Print these functions' concepts."""
    def show(arguments):
        for concept in concepts:
            concept()
    run_script(show, "stopped")


if __name__ == "__main__":
    main(meta_gradient, filled_blanks, inertia, meta_tasks)
