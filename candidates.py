"""What eval.py compares: a name of --prompt -> where tuning starts, and with which regularizer."""

from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

from baselines import BASELINES, given_prompt
from common import InputError, TINY, read_json, reading
from hub import RELEASED, model_folder, released_folder
from prompts import load_prompt
from studies import PRETRAINED, pretrained_run
from supmer import REGULARIZERS
from t5 import model_fingerprint


class Candidate(NamedTuple):
    """What is compared: a way to use the few examples, and where it starts."""
    name: str
    baseline: str               # a name of BASELINES
    starts: list[Callable]      # for each seed t5 -> parameters to start from, {name: tensor}
    psi: Callable | None        # a learned prompt's regularizer (g, H) -> g; None for the others
    about: dict                 # a learned prompt's file and its metadata


def open_candidate(name, config, settings):
    """A name of --prompt -> Candidate. Raises InputError unless a learned prompt is of this model
    and of this length."""
    if name in BASELINES and BASELINES[name].start:
        length = BASELINES[name].length or settings.prompt_length
        starts = [partial(BASELINES[name].start, seed=seed, length=length)
                  for seed in settings.seeds]
        return Candidate(name, name, starts, None, {})
    path = Path(name)
    if name in PRETRAINED:
        path = pretrained_run(name, settings)
    elif name == "shipped":
        path = TINY
    elif name == "released":
        path = released_folder(config)
    theta, phi, about = load_prompt(path, config.d_model)
    if not belongs(about, config, settings.model):
        raise InputError(f"{path} was learned on another {about.get('model')} than "
                         f"{settings.model} is now: take a prompt of this model")
    if len(theta) != settings.prompt_length:
        raise InputError(f"{path} has {len(theta)} vectors, not {settings.prompt_length}: "
                         f"--prompt-length {len(theta)}?")
    psi = phi and partial(REGULARIZERS[about["regularizer"]].psi, phi)
    baseline = "unified" if about.get("method") == "unified-ppt" else "learned"
    starts = [partial(given_prompt, theta=theta)] * len(settings.seeds)
    about = {"file": str(path), **about}
    print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in about.items()))
    return Candidate(name, baseline, starts, psi, about)


def belongs(about, config, model):
    """Whether a prompt's metadata is of this model. PEFT's says nothing that could be checked."""
    if about["regularizer"] == "released":
        return RELEASED.get((config.d_model, config.d_ff)) == about["model"]
    unknown = about["regularizer"] == "none" and "model_sha256" not in about
    return unknown or about.get("model_sha256") == model_fingerprint(model_folder(model))


# What "newest" is without a finished run of one's own.
FALLBACK = {"tiny": "shipped", "t5-base": "released", "flan-t5-xl": "released"}


def newest_run(model):
    """The folder under runs/ of this model's SUPMER run, with all its parts, that finished last;
    without one FALLBACK's. Raises InputError for other models."""
    name, ended = Path(model).name, []
    for path in Path("runs").glob("*/run.json"):
        run = read_json(path)
        with reading(path, "a run's record", remedy="move the folder away"):
            ours = run["name"] == "supmer" and Path(run["model"]).name == name
            if run["finished"] and ours:
                ended.append((float(run["ended"]), str(path.parent)))
    if ended:
        return max(ended)[1]
    if name not in FALLBACK:
        raise InputError(f"runs/ has no finished run of {model}: make one (python train.py), or "
                         "give --prompt RUN|released|random|vocab")
    return FALLBACK[name]
