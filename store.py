"""A corpus on the disk: its sentences as token ids, and their clusters. data.py draws from it.

Sentence i has the tokens tokens[offsets[i]:offsets[i + 1]]. corpus.py makes a store.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import InputError, read_json, reading
from data import FORMATS

# Plain numbers: the file NAME.bin and its type. The first ones grow with the text.
TEXT = {"tokens": "H", "offsets": "q", "first": "q", "label": "h", "keys": "Q", "shares": "d"}
COLUMNS = TEXT | {"held_out": "?", "anchor": "?", "cluster": "i", "order": "I"}


class Store(NamedTuple):
    """A corpus as sentences and their clusters, in a folder; the arrays are mapped, not read."""
    folder: Path
    tokens: np.ndarray      # (all tokens) uint16
    offsets: np.ndarray     # (n + 1,) int64: where in tokens a sentence begins
    first: np.ndarray       # (documents,) int64: each one's first sentence
    held_out: np.ndarray    # (n,) bool: its document is kept for validation tasks
    anchor: np.ndarray      # (n,) bool: no earlier sentence has the same text
    cluster: np.ndarray     # (formats, n) int32; one clustering may stand for all FORMATS
    centroids: np.ndarray   # (formats, K, d) float32
    order: np.ndarray       # (formats, anchors) uint32 and
    bounds: np.ndarray      # (formats, 4 K + 1) int64: see group_anchors
    label: np.ndarray       # (n,) int16 in a labeled set; else empty
    meta: dict              # "made_of": fingerprints, "options"; "counts"; "files": their sizes

    def sentence(self, i):
        """Its tokens (T,) uint16."""
        return self.tokens[self.offsets[i]:self.offsets[i + 1]]


def column(folder, name):
    """One of a store's COLUMNS, mapped."""
    path, kind = folder / f"{name}.bin", np.dtype(COLUMNS[name])
    if path.stat().st_size == 0:        # nothing cannot be mapped
        return np.zeros(0, kind)
    return np.memmap(path, kind, "r")


def open_store(folder, made_of=None):
    """Open a store. Raises InputError if it is damaged or was made of other things than made_of."""
    folder = Path(folder)
    with reading(folder, "a whole store", "delete it"):
        meta = read_json(folder / "meta.json", remedy="delete the store")
        if any((folder / name).stat().st_size != size for name, size in meta["files"].items()):
            raise ValueError("its files do not fit together")
        other = [key for key in made_of or () if meta["made_of"][key] != made_of[key]]
        if other:
            raise InputError(f"{folder} was built with another {', another '.join(other)}: "
                             "delete it")
        columns = {name: column(folder, name) for name in COLUMNS if name in Store._fields}
        columns |= {name: np.load(folder / f"{name}.npy") for name in ("centroids", "bounds")}
        rows = len(columns["bounds"])
        columns["cluster"] = columns["cluster"].reshape(-1, rows).T
        columns["order"] = columns["order"].reshape(rows, -1)
        for name in ("cluster", "order", "centroids", "bounds"):    # one clustering serves all
            every = len(FORMATS), *columns[name].shape[1:]
            columns[name] = np.broadcast_to(columns[name], every)
    return Store(folder, **columns, meta=meta)
