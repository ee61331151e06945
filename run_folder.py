"""A run's folder, as train.py writes it.

    run.json            its settings, what it is made of, the command, whether it is finished
    log.jsonl           a line a step and a validation; equal runs differ in "time" only
    state.pt            with run.json, what it resumes from, bit by bit: a batch is a pure function
                        of (seed, step), and the state holds all else that a step depends on
    prompt.safetensors  theta and phi at the lowest validation loss, see prompts.py
"""

import io
import json
import math
import platform
import shlex
import time
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path

import torch

from baselines import name_of
from common import InputError, fingerprint, read_json, reading, whole_file
from settings import from_settings

# run.json has their hash.
METHOD_FILES = ("supmer.py", "t5.py", "onednn.py", "data.py", "templates.py", "baselines.py",
                "released.py", "ranks.py", "common.py")


def check_free(folder):
    """Raise InputError if a new run cannot have this folder."""
    if folder.is_file() or (folder / "run.json").exists():
        raise InputError(f"{folder} exists: name another --run, or give --resume {folder}")


def next_free(model, name):
    """The first runs/<model>[-<method>]-<number> that holds no run."""
    stem, number = Path(model).name + (f"-{name}" if name != "supmer" else ""), 1
    while Path(f"runs/{stem}-{number}/run.json").exists():
        number += 1
    return Path(f"runs/{stem}-{number}")


def new_run(argv, training, method, made_of, processes=1):
    """run.json's values when a run begins."""
    used = ("torch", "numpy", "tokenizers", "safetensors")
    return {"model": training.model, "name": name_of(training, method),
            "training": asdict(training), "method": asdict(method),
            "made_of": made_of, "code": method_hash(),
            "command": shlex.join(["python", "train.py", *argv]),
            "processes": processes, "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version()} | {x: version(x) for x in used},
            "finished": False, "ended": None}


def write_run(folder, values):
    """Write run.json."""
    with whole_file(folder / "run.json") as file:
        file.write((json.dumps(values, indent=1) + "\n").encode())


def end_run(folder):
    """Write down that a run is finished."""
    values = read_json(folder / "run.json")
    write_run(folder, values | {"finished": True, "ended": time.time()})


def method_hash():
    """The fingerprint of the files that define a step's result."""
    return fingerprint([Path(__file__).with_name(name) for name in METHOD_FILES])


def own_settings(folder, *classes):
    """An unfinished run's settings, of each class. Raises InputError for another version's run."""
    path = folder / "run.json"
    run = read_json(path)
    with reading(path, "a run of this version of train.py", "start a new run"):
        if run["finished"]:
            raise InputError(f"{folder} is finished: start a new run")
        values = run["training"] | run["method"]        # KeyError if one is missing
        return [from_settings(cls, {x.name: values[x.name] for x in fields(cls)})
                for cls in classes]


def check_origin(folder, made_of):
    """Raise InputError if the run was made of other data, model, tokenizer or store options than
    made_of. Warn if the method's code has changed since the run began."""
    path = folder / "run.json"
    run = read_json(path)
    with reading(path, "a run of train.py", remedy="start a new run"):
        other = [key for key in made_of if run["made_of"].get(key) != made_of[key]]
        changed = run["code"] != method_hash()
    if other:
        raise InputError(f"{folder} was made with another {' and '.join(other)} than is there now: "
                         "start a new run, or put back what it was made with")
    if changed:
        print(f"warning: {', '.join(METHOD_FILES)} are not those that began {folder}: its steps "
              "from here on may differ from an unbroken run's")


def save_state(folder, state, best, kept):
    """Write a MetaState, the lowest validation loss and its step as state.pt."""
    payload = io.BytesIO()          # torch.save on a full disk hides the OSError
    torch.save({"theta": state.theta, "phi": state.phi, "s": state.s, "step": state.step,
                "theta_adam": state.theta_adam.state_dict(),
                "phi_adam": state.phi_adam.state_dict(), "best": best, "kept": kept}, payload)
    with whole_file(folder / "state.pt") as file:
        file.write(payload.getbuffer())


def load_state(folder, state):
    """Fill a fresh MetaState from state.pt -> the lowest validation loss, and its step.
    Raises InputError for the file of another run, or a damaged one."""
    path = folder / "state.pt"
    with reading(path, "the state of this run", remedy="start a new run"), torch.no_grad():
        saved = torch.load(path, map_location="cpu", weights_only=True)
        state.theta.copy_(saved["theta"])
        for name, x in state.phi.items():
            x.copy_(saved["phi"][name])
        state.theta_adam.load_state_dict(saved["theta_adam"])
        state.phi_adam.load_state_dict(saved["phi_adam"])
        state.s, state.step = saved["s"], saved["step"]
        return saved["best"], saved["kept"]


def read_log(folder, last_step=math.inf):
    """The lines of log.jsonl up to a step, without a torn last one -> [{name: value}]."""
    path = folder / "log.jsonl"
    with reading(path, "the log of a run", remedy="start a new run"):
        whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
        entries = [json.loads(line) for line in whole.splitlines()]
        return [entry for entry in entries if entry["step"] <= last_step]


def open_log(folder, last_step):
    """log.jsonl, to append to. Lines after last_step are dropped: those steps come again."""
    kept = read_log(folder, last_step) if last_step >= 0 else []
    with whole_file(folder / "log.jsonl") as file:
        file.writelines(json.dumps(entry).encode() + b"\n" for entry in kept)
    return open(folder / "log.jsonl", "a", encoding="utf-8")
