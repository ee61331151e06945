"""What other servers than the hub have: plain files, members of archives, the authors' prompts."""

import hashlib
import tarfile
import zipfile
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.request import urlopen

from common import InputError, bar, reading, whole_file

RELEASED = {(768, 3072): "t5base", (2048, 5120): "flant5xl"}    # d_model, d_ff: the authors' name
RELEASED_URL = ("https://raw.githubusercontent.com/beepkh/SUPMER/"
                "adaddb3144183a823247fdba80102b0c9185e871/pretrain_prompt/")


def download(url, path, sha256="", timeout=30):
    """Fetch a plain URL to a file, whole or not at all, with a bar -> its path.
    sha256: how its checksum begins. timeout: seconds without a byte."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = hashlib.sha256()
    with reading(url, "a file that can be fetched", HTTPException, remedy="check the network"), \
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


def released_folder(config):
    """Where the authors' meta-trained prompt for a T5 of this shape is, fetched if it is not there.
    Raises InputError for another shape than t5-base's and flan-t5-xl's."""
    name, folder = RELEASED.get((config.d_model, config.d_ff)), Path("cache/released")
    if not name:
        raise InputError("the authors released prompts for t5-base and flan-t5-xl only: take one "
                         "of these models, or --prompt RUN|random|vocab")
    for file in (f"prompt_{name}.pt", f"gradient_edit_{name}.pt"):
        if not (folder / file).exists():
            download(RELEASED_URL + file, folder / file)
    return folder
