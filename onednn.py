"""The product of a frozen float32 weight on a CPU, by oneDNN: equal to F.linear up to rounding.

F.linear calls MKL, which is slower on some AMD processors; bench.py prints both rates. No packed
copies of the weight are kept. Small weights lose more to autograd.Function than they gain.
"""

import torch
import torch.nn.functional as F

# With AVX2 alone oneDNN is slower than MKL where the weight is transposed, as in the gradient:
# 32-64 against 65-80 GFLOP/s, a fifth of a step.
ONEDNN = (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
          and torch.backends.cpu.get_cpu_capability() == "AVX512")
SMALL = 2 ** 18     # numbers of a weight


def linear(x, weight):
    """x (..., in) times weight (out, in) of the same dtype -> (..., out)."""
    if ONEDNN and weight.is_cpu and weight.dtype == torch.float32 and weight.numel() > SMALL \
            and not weight.requires_grad:
        return Linear.apply(x, weight)
    return F.linear(x, weight)


class Linear(torch.autograd.Function):
    """F.linear with a weight that asks for no gradient; torch.func differentiates it twice."""

    @staticmethod
    def forward(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.weight = inputs[1]

    @staticmethod
    def backward(ctx, g):
        return Linear.apply(g, ctx.weight.T), None

    @staticmethod
    def jvp(ctx, x_tangent, _):
        return Linear.apply(x_tangent, ctx.weight)
