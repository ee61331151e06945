"""Where a task's files are; downloads from other servers than the hub: files, archives' members."""

import hashlib
import tarfile
import zipfile
from pathlib import Path, PurePosixPath
from urllib.request import urlopen

from common import TINY, InputError, bar, reading, whole_file
from hub import fetch_file

FETCHED = Path("cache/data")
HUB = "the hub"                 # in place of a URL: the file's name is OWNER/NAME/FILE there


def locate(task, split, folder=TINY):
    """The path of a task's "train" or "test" file: in the folder, in tiny/ or in cache/data, where
    it is fetched. A file that is there is not opened, nor hashed: the test file stays sealed.
    Raises InputError, with where to put what, if the file cannot be fetched."""
    file = getattr(task, split)
    sha256 = dict(zip(("train", "test"), task.sha256)).get(split, "")
    path, tried = find(file, folder), []
    for url in task.urls if path is None else ():
        if url.endswith((".tar", ".zip", file.rpartition("/")[2], HUB)):
            try:
                return fetch(url, file, sha256, folder)
            except InputError as error:
                tried.append(str(error))
    if path is None:
        raise InputError("; ".join([f"{file} is not in {folder}: put it there, or give --data "
                                    "FOLDER that has it", *tried]))
    return path


def on_hub(task):
    """A task as it is written on the hub, where rows may be split in another way."""
    repository, test, columns, labels = task.hub
    return task._replace(train=f"{repository}/train.jsonl", test=f"{repository}/{test}.jsonl",
                         columns=columns, labels=tuple(labels), incomplete="left", urls=(HUB,),
                         sha256=(), hub=())


def find_task(task, folder):
    """A task, or what it is on_hub(): the form whose training file is in the folder, or else the
    first that can be fetched. Both files are of one form. Raises InputError if there is none."""
    forms = [task, on_hub(task)] if task.hub else [task]
    there, tried = [form for form in forms if find(form.train, folder)], []
    for form in there or forms:
        try:
            locate(form, "train", folder)
            return form
        except InputError as error:
            tried.append(str(error))
    raise InputError("; ".join(tried))


def find(name, folder):
    """The path of a file in the folder, in tiny/ or in cache/data; None if it is in none."""
    places = (place / name for place in (Path(folder), TINY, FETCHED))
    return next(filter(Path.is_file, places), None)


def fetch(url, file, sha256, folder):
    """Fetch a task's file from the hub, from a URL, or from the archive there -> its path in
    cache/data."""
    path, name = FETCHED / file, url.rpartition("/")[2]
    if url == HUB:
        repository, _, name = file.rpartition("/")
        source = {"repo_id": repository, "repo_type": "dataset"}
        content = fetch_file(name, source, "data").read_bytes()
    elif name.endswith((".tar", ".zip")):
        archive = find(name, folder) or download(url, FETCHED / name)
        content = archive_member(archive, file)
    else:
        return download(url, path, sha256)
    if not hashlib.sha256(content).hexdigest().startswith(sha256):
        raise InputError(f"{file} of {archive} has another checksum: delete it, fetch it again")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as out:
        out.write(content)
    return path


def download(url, path, sha256="", timeout=30):
    """Fetch a plain URL to a file, whole or not at all, with a bar -> its path.
    sha256: how its checksum begins. timeout: seconds without a byte."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = hashlib.sha256()
    with reading(url, "a file that can be fetched", "check the network"), \
            urlopen(url, timeout=timeout) as answer, whole_file(path) as file:
        size = int(answer.headers["Content-Length"] or 0)
        with bar(total=size or None, desc=path.name, unit="B", unit_scale=True) as shown:
            while part := answer.read(1 << 20):
                whole.update(part)
                file.write(part)
                shown.update(len(part))
        if file.tell() < size or not whole.hexdigest().startswith(sha256):
            raise ValueError(f"{file.tell():,} of {size:,} bytes, sha256 {whole.hexdigest()}")
    return path


def archive_member(path, file, largest=1 << 27):
    """A task's file out of a .tar or .zip, as bytes. Nothing is unpacked. Raises InputError for
    damage, and for names that lead outside.
    CB/val.jsonl of members CB-old/val.jsonl, CB/val.jsonl -> the latter; the former if alone."""
    *_, folder, name = file.split("/")
    zipped = path.suffix == ".zip"
    with reading(path, f"a whole archive with {folder}/{name}", remedy="delete it, fetch it again"):
        with zipfile.ZipFile(path) if zipped else tarfile.open(path, "r:") as archive:
            members = archive.namelist() if zipped else archive.getnames()
            if any(".." in member.split("/") or member.startswith("/") for member in members):
                raise ValueError("a member's name leads outside")
            found = [member for member in members if PurePosixPath(member).name == name and
                     folder in PurePosixPath(member).parent.name]
            member = min(found, key=len, default=f"{folder}/{name}")
            with archive.open(member) if zipped else archive.extractfile(member) as part:
                content = part.read(largest + 1)
        if len(content) > largest:
            raise ValueError(f"{member} is too large for a task")
    return content
