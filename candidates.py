"""What --task and --prompt of eval.py name: Plans, and Candidates.

    movie, all, dg              tasks of tasks.py, or groups of them; with --template your own file
    a run's folder, a prompt's file, a folder of PEFT's or the authors'     load_prompt
    newest                      the SUPMER run that finished last       newest_run
    supmer, ppt, no-mgr, ...    a run that train.py makes when needed   pretrained_run
    random, vocab, ft, ...      a method of baselines.py
"""

import shlex
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

from baselines import ABLATIONS, BASELINES, METHODS, ft_memory, given_prompt
from common import GIB, TINY, InputError, read_json, reading
from download import find, find_task
from hub import last_name, model_folder
from own import own_task, refuse_unread
from prompts import load_prompt
from released import RELEASED, released_folder
from studies import STUDY_RUN
from supmer import REGULARIZERS
from t5 import model_fingerprint
from tasks import GROUPS, TASKS, LabeledTask

SHIPPED = {"shipped": TINY / "prompt.safetensors", "shipped-ppt": TINY / "ppt.safetensors"}
# What train.py makes.
PRETRAINED = {**{name: "--method" for name in METHODS}, **dict.fromkeys(ABLATIONS, "--ablation")}
NAMES = (*SHIPPED, "released", *(name for name, one in BASELINES.items() if one.start),
         *PRETRAINED)
# What "newest" is without a finished run of one's own.
FALLBACK = {"tiny": "shipped", "t5-base": "released", "flan-t5-xl": "released"}
TRAIN = Path(__file__).with_name("train.py")


# ------------------------------------------------------------------------------------------ tasks

class Plan(NamedTuple):
    """What is tuned on one task and tested on one or several."""
    name: str
    shots: int
    task: LabeledTask
    targets: dict[str, LabeledTask]     # their test sets
    folder: str = "."


def plans(settings):
    """The tasks to run -> [Plan], {task that cannot be run: why}. Training files are fetched; a
    test file is only looked for. Raises InputError if no task can be run."""
    folder, own, found, not_run = settings.data[0], bool(settings.template), {}, {}
    if not own:
        refuse_unread(settings, "max_tokens")
    unknown = {*settings.task} - {*TASKS, *GROUPS}
    if unknown:
        raise InputError(f"no task {', '.join(unknown)}: give {', '.join([*TASKS, *GROUPS])}")
    lacking = not own and folder != "data" and not Path(folder).is_dir()
    if lacking or len(settings.data) > 1 + own:
        raise InputError(f"--data {folder}: give a folder that exists; for a task of your own a "
                         "file, at most a second file to test on, and --template, see --help")
    if own:
        task = own_task(folder, settings, settings.template, test=settings.data[-1],
                        max_tokens=settings.max_tokens)
        found[Path(folder).stem] = task, {Path(folder).stem: task}
    for group in () if own else settings.task:
        for name in GROUPS.get(group, (group,)):
            plan, tuned_on = ("dg", "airlines") if group == "dg" else (name, name)
            try:
                task = find_task(TASKS[tuned_on], folder)
                target = task if name == tuned_on else TASKS[name]
                if not (find(target.test, folder) or target.urls):      # now, not after hours
                    raise InputError(f"{target.test} is not in {folder}: put it there")
                found.setdefault(plan, (task, {}))[1][name] = target
            except InputError as error:
                not_run[name] = str(error)
                print(f"{name}: not run; {error}")
    if not found:
        raise InputError("no task can be run; {}: {}".format(*[*not_run.items()][0]))
    return [Plan(name, shots, *what, "." if own else folder) for shots in settings.shots
            for name, what in found.items()], not_run


# ---------------------------------------------------------------------------------------- prompts

class Candidate(NamedTuple):
    """What is compared: a way to use the few examples, and where it starts."""
    name: str
    baseline: str               # a name of BASELINES
    starts: list[Callable]      # for each seed t5 -> parameters to start from, {name: tensor}
    psi: Callable | None        # a learned prompt's regularizer (g, H) -> g; None for the others
    about: dict                 # a learned prompt's file and its metadata


def candidates(opened, config, settings):
    """Yield the Candidates of --prompt in groups: all that are ready, then each that train.py has
    to make first; if that fails, it is not run. opened: {name: Candidate, or why it is not run}."""
    ready = [name for name in settings.prompt if name not in PRETRAINED]
    made = [name for name in settings.prompt if name in PRETRAINED]
    for names in (ready, *([name] for name in made)):
        for name in names:
            try:
                opened[name] = opened.get(name) or open_candidate(name, config, settings)
            except InputError as error:
                opened[name] = str(error)
                print(f"{name}: not run; {error}")
        yield [opened[name] for name in names if isinstance(opened[name], Candidate)]


def open_candidate(name, config, settings):
    """A name of --prompt -> Candidate. Raises InputError for a prompt of another model or length.
    """
    if name in BASELINES and BASELINES[name].start:
        length = BASELINES[name].length or settings.prompt_length
        if name == "ft":
            print(f"ft: {ft_memory(config) / GIB:.2f} GiB more in each process")
        starts = [partial(BASELINES[name].start, seed=seed, length=length)
                  for seed in settings.seeds]
        return Candidate(name, name, starts, None, {})
    path = SHIPPED.get(name, Path(name))
    if name in PRETRAINED:
        path = pretrained_run(name, settings)
    elif name == "released":
        path = released_folder(config)
    theta, phi, about = load_prompt(path, config.d_model)
    if not is_of_model(about, settings.model, config):
        raise InputError(f"{path} was learned on {about.get('model')} with other weights than "
                         f"{settings.model} has now: take a prompt of this model")
    if len(theta) != settings.prompt_length:
        raise InputError(f"{path} has {len(theta)} vectors, not {settings.prompt_length}: "
                         f"--prompt-length {len(theta)}?")
    psi = phi and partial(REGULARIZERS[about["regularizer"]].psi, phi)
    baseline = "unified" if about.get("method") == "unified-ppt" else "learned"
    starts = [partial(given_prompt, theta=theta)] * len(settings.seeds)
    shown = [f"{key} {value}" for key, value in sorted(about.items()) if key != "model_sha256"]
    print(f"{name}: {path}, {', '.join(shown)}")
    return Candidate(name, baseline, starts, psi, {"file": str(path), **about})


def is_of_model(about, model, config):
    """Whether a prompt's metadata name this model, whose T5Config is given."""
    if about["regularizer"] == "released":
        return about["model"] == RELEASED.get((config.d_model, config.d_ff))
    if about["regularizer"] == "none" and "model_sha256" not in about:      # PEFT's
        return about["model"] == "" or last_name(about["model"]) == last_name(model)
    return about.get("model_sha256") == model_fingerprint(model_folder(model))


def pretrained_run(name, settings):
    """The folder of a method's or ablation's run under runs/compared, which train.py makes or
    resumes. All of a model's have the same numbers but for the method's own.

    Ctrl-C, and the end of --max-minutes, are passed on. Raises KeyboardInterrupt if the run was
    stopped, InputError if train.py refuses."""
    folder = Path("runs/compared") / f"{Path(settings.model).name}-{name}"
    if is_finished(folder):
        return folder
    argv = ["--resume", str(folder)] if folder.exists() else [
        "--model", settings.model, PRETRAINED[name], name, "--run", str(folder),
        *(STUDY_RUN if settings.model == "tiny" else ()),
        *(("--labeled", settings.labeled) if name == "metapt" else ())]
    print(f"{name} comes first: {shlex.join(['python', 'train.py', *argv])}", flush=True)
    process = subprocess.Popen([sys.executable, str(TRAIN), *argv])
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()                  # it saves its last step
        raise
    if status == 2:
        raise InputError("train.py refused, see its message above")
    if not is_finished(folder):
        raise KeyboardInterrupt
    return folder


def read_record(folder):
    """A run's method or ablation, its model's name, and when it finished: 0.0 if it has not."""
    path = folder / "run.json"
    run = read_json(path)
    with reading(path, "a run's record", remedy="move the folder away"):
        return run["name"], Path(run["model"]).name, float(run["ended"]) if run["finished"] else 0.0


def is_finished(folder):
    """Whether a folder holds a finished run."""
    return (folder / "run.json").exists() and read_record(folder)[-1] > 0


def newest_run(model):
    """The folder under runs/ of this model's SUPMER run, with all its parts, that finished last;
    without one FALLBACK's. Raises InputError for other models."""
    name, ended = Path(model).name, {}
    for path in Path("runs").glob("*/run.json"):
        method, learned_on, when = read_record(path.parent)
        if (method, learned_on) == ("supmer", name) and when:
            ended[str(path.parent)] = when
    if not ended and name not in FALLBACK:
        raise InputError(f"runs/ has no finished run of {model}: make one (python train.py), or "
                         "give --prompt RUN|released|random|vocab")
    return max(ended, key=ended.get) if ended else FALLBACK[name]
