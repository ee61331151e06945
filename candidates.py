"""What eval.py is asked for: --task -> Plans to tune and test; --prompt -> Candidates compared."""

from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

from baselines import BASELINES, ft_memory, given_prompt
from common import GIB, InputError, TINY, read_json, reading
from hub import RELEASED, model_folder, released_folder
from prompts import load_prompt
from studies import PRETRAINED, pretrained_run
from supmer import REGULARIZERS
from t5 import model_fingerprint
from tasks import GROUPS, LabeledTask, TASKS, find, locate, own_task


# What "newest" is without a finished run of one's own.
FALLBACK = {"tiny": "shipped", "t5-base": "released", "flan-t5-xl": "released"}
NAMES = ("shipped", "released", *(name for name, one in BASELINES.items() if one.start),
         *PRETRAINED)


class Plan(NamedTuple):
    """What is tuned on one task and tested on one or several."""
    name: str
    shots: int
    task: LabeledTask
    targets: dict[str, LabeledTask]     # their test sets
    folder: str = "."


class Candidate(NamedTuple):
    """What is compared: a way to use the few examples, and where it starts."""
    name: str
    baseline: str               # a name of BASELINES
    starts: list[Callable]      # for each seed t5 -> parameters to start from, {name: tensor}
    psi: Callable | None        # a learned prompt's regularizer (g, H) -> g; None for the others
    about: dict                 # a learned prompt's file and its metadata


def plans(settings):
    """The tasks to run -> [Plan], {task that is not run: why}. Training files are fetched; a test
    file is only looked for. Raises InputError for a task that is asked for by its own name."""
    if settings.template:
        name, path = Path(settings.data[0]).stem, settings.data[0]
        task = own_task(path, settings.template, settings.words, test=settings.data[-1])
        return [Plan(name, shots, task, {name: task}) for shots in settings.shots], {}
    folder, found, absent = settings.data[0], {}, {}
    for group in settings.task:
        for name in GROUPS.get(group, (group,)):
            tuned_on = "airlines" if group == "dg" else name
            try:
                locate(TASKS[tuned_on], "train", folder)
                if not (find(TASKS[name].test, folder) or TASKS[name].urls):
                    raise InputError(f"{TASKS[name].test} is not in {folder}: put it there, or "
                                     "give --data FOLDER that has it")
            except InputError as error:
                if group not in GROUPS or name == tuned_on == "airlines":
                    raise
                absent[name] = str(error)
                print(f"{name}: not run; {error}")
                continue
            plan = "dg" if group == "dg" else name
            found.setdefault(plan, (TASKS[tuned_on], {}))[1][name] = TASKS[name]
    if not found:
        raise InputError("none of these tasks can be run, see above")
    return [Plan(name, shots, *what, folder) for shots in settings.shots
            for name, what in found.items()], absent


def own_words(settings):
    """--words as a tuple."""
    return tuple(word.strip() for word in settings.words.split(","))


def candidates(opened, config, settings):
    """Yield the Candidates of --prompt in order. What train.py has to make is made at its turn; if
    that fails in a study, it is not run. opened: {name: Candidate, or why it is not run}."""
    for name in settings.prompt:
        if name not in opened:
            try:
                opened[name] = open_candidate(name, config, settings)
            except InputError as error:
                if not settings.study:
                    raise
                opened[name] = str(error)
                print(f"{name}: not run; {error}")
        if isinstance(opened[name], Candidate):
            yield opened[name]


def open_candidate(name, config, settings):
    """A name of --prompt -> Candidate. Raises InputError unless a learned prompt is of this model
    and of this length."""
    if name in BASELINES and BASELINES[name].start:
        length = BASELINES[name].length or settings.prompt_length
        starts = [partial(BASELINES[name].start, seed=seed, length=length)
                  for seed in settings.seeds]
        if name == "ft":
            size = ft_memory(config) / GIB
            print(f"ft: {size:.2f} GiB in each process beside the frozen weights and a step's "
                  f"activations; {size / 6:.2f} GiB on the disk for each rate and seed")
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
    print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in sorted(about.items())
                                  if key != "model_sha256"))
    return Candidate(name, baseline, starts, psi, about)


def belongs(about, config, model):
    """Whether a prompt's metadata is of this model. PEFT's says nothing that could be checked."""
    if about["regularizer"] == "released":
        return RELEASED.get((config.d_model, config.d_ff)) == about["model"]
    unknown = about["regularizer"] == "none" and "model_sha256" not in about
    return unknown or about.get("model_sha256") == model_fingerprint(model_folder(model))


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
