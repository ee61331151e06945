"""The authors' released prompts, of github.com/beepkh/SUPMER, and their form of psi."""

from pathlib import Path

import torch
import torch.nn.functional as F

from common import InputError, reading
from download import download
from supmer import REGULARIZERS, Regularizer

RELEASED = {(768, 3072): "t5base", (2048, 5120): "flant5xl"}    # d_model, d_ff: the authors' name
RELEASED_URL = ("https://raw.githubusercontent.com/beepkh/SUPMER/"
                "adaddb3144183a823247fdba80102b0c9185e871/pretrain_prompt/")


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


def read_released(folder, d):
    """The authors' prompt_*.pt and gradient_edit_*.pt for a T5 of width d."""
    name = {width: name for (width, _), name in RELEASED.items()}.get(d)
    if not name:
        raise ValueError("the authors released prompts of widths 768 and 2048")
    read = []
    for file in (f"prompt_{name}.pt", f"gradient_edit_{name}.pt"):
        with reading(folder / file, "a file of github.com/beepkh/SUPMER"):
            read.append(torch.load(folder / file, map_location="cpu", weights_only=True))
    theta, phi = read
    unused = ("grad_mean", "grad_std", "grad_s", "k")       # buffers: psi never uses them
    tensors = {f"phi.{key}": x for key, x in phi.items() if key not in unused}
    return {"theta": theta, **tensors}, {"model": name, "regularizer": "released"}


def init_released(P, d):
    """phi of the authors' released regularizer: names and shapes of their file, all 0."""
    r = min(1920, d)
    shapes = {"layers.0.u": (d, r), "layers.0.v": (r, d), "layers.0.bias": (d,),
              "layers.1.u": (d, r), "layers.1.v": (r, d), "layers.1.bias": (d,),
              "linear_1.weight": (24, d), "linear_1.bias": (24,),
              "linear_2.weight": (1, 24), "linear_2.bias": (1,)}
    return {f"mlp.{name}": torch.zeros(shape) for name, shape in shapes.items()}


def regularize_released(phi, g, pooled):
    """psi as released: (1 - z) h(g) + z g, ONE gate z for all, h of two factored ReLU layers, whose
    rows get the length of g's. Their mean state counts padding, ours does not: an approximation."""
    hidden = F.relu(phi["mlp.linear_1.weight"] @ pooled + phi["mlp.linear_1.bias"])          # (24,)
    z = torch.sigmoid(phi["mlp.linear_2.weight"] @ hidden + phi["mlp.linear_2.bias"])   # (1,)
    h = g
    for i in (0, 1):
        u, v, bias = (phi[f"mlp.layers.{i}.{name}"] for name in ("u", "v", "bias"))
        h = F.relu(h @ v.T @ u.T + bias)                                                # (P, d)
    of_g, of_h = (x.norm(dim=-1, keepdim=True) + 1e-8 for x in (g, h))                  # (P, 1)
    return (1 - z) * h / of_h * of_g + z * g


REGULARIZERS["released"] = Regularizer(init_released, regularize_released)
