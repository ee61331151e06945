"""The paper's tables and figures as commands: settings of eval.py, and of the runs that it needs.

    python studies.py               # lists the studies: python eval.py --study NAME
"""

import math
from dataclasses import replace

from baselines import ABLATIONS, examples_per_step

STUDIES = {     # the Settings of eval.py
    "steps": {"task": ("cb", "mrpc"), "plot": True},                                    # Fig. 3
    "shots": {"task": ("sst5", "subj"), "shots": (4, 8, 16, 32, 64), "plot": True},     # Fig. 4
    "dg": {"task": ("dg",), "plot": True},                                              # Table 2
    "spread": {"task": ("mrpc", "cb", "subj"), "prompt": ("random", "vocab"), "plot": True,
               "seeds": tuple(range(10, 110, 10)), "same_examples": True},              # Fig. 1a
    "comparison": {"prompt": ("zero-shot", "few-shot", "random", "vocab", "prefix-tuning",
                              "p-tuning-v2", "ft", "supmer", "ppt", "unified-ppt", "metapt")},
    "ablation": {"prompt": ("supmer", *ABLATIONS)},     # Table 4, and first-order
    "evidence": {"task": ("evidence",), "rates": (0.03, 0.3), "epochs": 60, "words_only": True,
                 "dtype": "bfloat16",                   # docs/results.md
                 "prompt": ("random", "vocab", "ppt", "supmer", "metapt", "first-order",
                            "no-curriculum", "no-mgr", "no-ta")}}
QUICK = {"task": ("source",), "prompt": ("shipped", "shipped-ppt", "vocab", "random"),
         "shots": (8,), "seeds": (10, 20, 30), "rates": (0.1,), "epochs": 10,
         "validate_every": 10, "test_rows": 160}
# How a comparison pre-trains on the embedded T5: options of train.py.
STUDY_RUN = ("--bytes", "10000000", "--clusters", "16", "--support", "16", "--query", "16",
             "--examples", "23040", "--validate-every", "30", "--validation-tasks", "13")


def as_many_examples(training, method, examples=None):
    """The Method with the steps that draw so many examples, by default as many as SUPMER would
    draw in the steps that it has."""
    whole = replace(training, method="supmer"), replace(method, augmentation=True)
    examples = examples or method.steps * examples_per_step(*whole)
    return replace(method, steps=math.ceil(examples / examples_per_step(training, method)))


if __name__ == "__main__":
    for name, chosen in STUDIES.items():
        print(f"python eval.py --study {name:11} {chosen}")
