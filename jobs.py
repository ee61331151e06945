"""Independent work of eval.py, shared by processes; what is finished is kept and found again.

A Job needs nothing but the frozen T5 and its arguments. Its result is one file in runs/eval/tuned,
whose name ends in a hash of all that the result depends on: equal jobs are done once, and a stopped
evaluation resumes. Each process computes with one thread, so that no sum depends on their number.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save

from common import InputError, bar, pick_device, reading, remove_torn, whole_file

TUNED = Path("runs/eval/tuned")
WORKER = {}     # in a worker process: its T5


class Job(NamedTuple):
    """Work that needs nothing but the T5 and its arguments. Equal jobs have equal paths."""
    path: Path
    function: Callable      # (t5, **arguments) -> {name: tensor}, {name: value for JSON}
    arguments: dict


def make_job(made_of, name, function, **arguments):
    """A Job. made_of: what all results depend on, such as the model and the code."""
    def content(x):
        if isinstance(x, partial):
            return [x.func.__name__, x.args, x.keywords]
        x = x.detach().cpu().contiguous()
        return [str(x.dtype), list(x.shape), hashlib.sha256(x.numpy().tobytes()).hexdigest()]
    whole = json.dumps([made_of, function.__name__, arguments], sort_keys=True, default=content)
    key = hashlib.sha256(whole.encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.-]+", "_", name)
    return Job(TUNED / f"{name}-{key}.safetensors", function, arguments)


def read_result(path, tensors=True):
    """A Job's file -> {name: tensor}, {name: value}; tensors=False leaves the tensors, which may be
    a whole model, in the file. Raises InputError if the file is not a result."""
    with reading(path, "a result of eval.py", remedy=f"give one from {TUNED}, or delete it"):
        with safe_open(path, framework="pt") as file:
            names = file.keys() if tensors else ()
            return ({name: file.get_tensor(name) for name in names},
                    json.loads(file.metadata()["result"]))


def finish(job, t5=None):
    """Do a job and write its result. t5: None for a worker process's own."""
    remove_torn(TUNED, job.path.name)
    tensors, values = job.function(t5 or WORKER["t5"], **job.arguments)
    with whole_file(job.path) as file:
        file.write(save(tensors, {"result": json.dumps(values)}))


def begin_worker(load, devices, begun):
    """Load the T5 in a new process. A worker ends with its parent, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is for the parent
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    with begun.get_lock():
        device = devices[begun.value % len(devices)]
        begun.value += 1
    WORKER["t5"] = load(device=pick_device(device))


@contextlib.contextmanager
def workers(load, name, count):
    """-> a T5, and work(jobs, title), which finishes jobs in `count` processes; one is this one.
    load: device -> T5. name: of --device; for auto all GPUs. count: 0: one for each GPU or core.

    No multiprocessing.Pool: it waits forever for a worker that died, and a Ctrl-C leaves its queue
    full. Raises InputError for a worker that died."""
    TUNED.mkdir(parents=True, exist_ok=True)
    gpus = range(torch.cuda.device_count() if name == "auto" else 0)
    devices = [f"cuda:{i}" for i in gpus] or [str(pick_device(name))]
    threads, spawn, pool = torch.get_num_threads(), multiprocessing.get_context("spawn"), None
    count = count or (threads if devices == ["cpu"] else len(devices))
    t5 = load(device=torch.device(devices[0] if count == 1 else "cpu"))

    def work(jobs, title):
        todo = {job.path: job for job in jobs if not job.path.is_file()}.values()
        done = pool.map(finish, todo) if pool else (finish(job, t5) for job in todo)
        for _ in bar(done, total=len(todo), desc=title, unit="job"):
            pass

    try:
        torch.set_num_threads(1)
        if count > 1:
            begun = spawn.Value("q", 0)
            pool = ProcessPoolExecutor(count, spawn, begin_worker, (load, devices, begun))
        yield t5, work
    except BrokenProcessPool:
        raise InputError("a process ended before its work was done, for lack of memory? Try fewer "
                         f"--jobs than {count}; what is finished is kept") from None
    finally:
        torch.set_num_threads(threads)
        if pool:
            for child in multiprocessing.active_children():
                child.terminate()
            pool.shutdown(cancel_futures=True)
