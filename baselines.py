"""Every method that SUPMER is compared with (appendix B, C), on the same T5, data and protocol.

`python baselines.py` prints how many parameters each method tunes on t5-base.

What learns from a downstream task's few examples:
    prompt          P vectors in front of the text, all else frozen     Lester et al. 2021
    prefix-tuning   keys and values in every layer, made by an MLP      Li & Liang 2021
    p-tuning-v2     keys and values in every layer, directly            Liu et al. 2022
    ft              every weight of T5                                  (full fine-tuning)
    zero-shot, few-shot    nothing: instructions, demonstrations in the input
Where the prompt starts, if not at random: it is meta-trained or pre-trained on other data,
    ppt, unified-ppt       by the plain loss on the same meta tasks     Gu et al. 2022
    metapt                 by MAML on labeled sentiment data            Huang et al. 2022
    supmer without a part of it: the ablations of Table 4
Each is a set of train.py's options, which train.parse sets; the first two also take another step,
ppt_step.
Letters: P prompt or prefix tokens, d model width, h heads, k d_kv, m the MLP's width.
"""

import math
import string
from bisect import bisect_right
from functools import partial
from itertools import accumulate, chain, zip_longest
from typing import Callable, NamedTuple

import torch

from common import InputError, rng
from data import FORMATS, PAPER_VARIANTS, VARIANTS
from ranks import SOLO
from supmer import descend, first_derivative, init_prompt, loss_shares, prompt_gradient
from t5 import T5, count_weights, expected_shapes, linear, rms_norm
from tasks import task_examples
from templates import MASK, compile_template, fill_template, template_fields, tokenize

PREFIX_LENGTH = 20          # of both prefix methods; the paper gives none (ours)
PREFIX_WIDTH = 512          # m, the reparametrizing MLP's hidden width (Li & Liang, 4.3)
ORDERS = 4                  # of the demonstrations: accuracy depends on their order
CONTEXT = 512               # tokens of an input with demonstrations: T5's own (Table 6)


# --------------------------------------------------------------------- what a method consists of

def pose(tokenizer, name, task, rows, shown, seed):
    """A task's rows as the model reads them -> [Examples]: in the task's template. Instructions use
    its name and `shown`, the training sample; few-shot has an Examples for each order of it."""
    return [task_examples(tokenizer, task, rows)]


class Baseline(NamedTuple):
    """A way to use a task's few examples. Its parameters are {name: float32 tensor}."""
    start: Callable | None      # (t5, seed, length) -> parameters at the start; None: given ones
    model: Callable             # (t5, what is kept) -> T5, theta (P, d): the tuned model
    rates: tuple = ()           # AdamW's, one is chosen on validation; (): nothing is tuned
    length: int = 0             # P, where it is not a setting
    pose: Callable = pose       # how the model reads a task's rows
    fold: Callable = lambda t5, parameters: parameters      # -> what is kept after tuning


def without_prompt(t5, kept):
    """The frozen T5 and a soft prompt of no vectors (0, d)."""
    none = t5.weights["shared.weight"][:0].detach()
    return t5, none.to(torch.promote_types(none.dtype, torch.float32))


def tuning_gradient(t5, baseline, parameters, examples, method):
    """Gradient of the mean loss over n Examples with respect to every parameter (Eq. 1).

    -> {name: tensor} like parameters, the mean encoder state (d,). For a prompt it equals
    supmer.prompt_gradient. No gradient of anything else is computed.
    """
    def tuned(parameters):
        return baseline.model(t5, baseline.fold(t5, parameters))

    _, theta = tuned(parameters)
    total, pooled = {name: torch.zeros_like(x) for name, x in parameters.items()}, 0.0
    for share in loss_shares(theta, examples, method):
        part, pooled_part, _ = first_derivative(lambda x: share(*tuned(x)), parameters)
        for name, x in part.items():
            total[name] += x
        pooled = pooled + pooled_part
    return total, pooled


# ------------------------------------------------------------ prompt tuning (Lester et al. 2021)

def normal_prompt(t5, seed, length):
    """PT: theta (P, d), normal with the embedding table's standard deviation. 76,800 numbers at
    t5-base with P = 100."""
    table = t5.weights["shared.weight"].float().cpu()       # on the CPU: equal bits on all devices
    drawn = rng(seed, 0, 0, "normal prompt").standard_normal((length, table.shape[1]))
    return given_prompt(t5, table.std() * torch.from_numpy(drawn).float())


def vocabulary_prompt(t5, seed, length):
    """PT from rows of T5's embedding table (Lester et al.'s "sampled vocabulary")."""
    return {"theta": init_prompt(t5, length, seed)}


def given_prompt(t5, theta):
    """A prompt that was learned before."""
    return {"theta": theta.to(t5.weights["shared.weight"].device)}


def with_prompt(t5, kept):
    """The frozen T5 and the prompt."""
    return t5, kept["theta"]


# ------------------------- prefixes in every layer: P-Tuning-v2 (Liu et al. 2022), Prefix-Tuning

def prefix_names(t5):
    """Where t5.self_attention looks for a prefix (2, h, P, k): every block of both stacks."""
    blocks = {"encoder": t5.config.num_layers, "decoder": t5.config.num_decoder_layers}
    return [f"{stack}.block.{block}.layer.0.SelfAttention.prefix"
            for stack, count in blocks.items() for block in range(count)]


def p_tuning_v2_start(t5, seed, length):
    """P-Tuning-v2 (Liu et al. 2022): P keys and values of each layer's self-attention, directly.

    They start as each layer's keys and values of rows of the embedding table. Cross-attention gets
    none. 2 P h k numbers a layer: 737,280 at t5-base with P = 20.
    """
    c, w, parameters = t5.config, t5.weights, {}
    rows = init_prompt(t5, length, seed)
    for name in prefix_names(t5):
        layer = name.removesuffix(".SelfAttention.prefix")
        x = rms_norm(rows, w[f"{layer}.layer_norm.weight"], c.eps)                      # (P, d)
        both = torch.stack([linear(x, w[f"{layer}.SelfAttention.{part}.weight"]) for part in "kv"])
        both = both.view(2, length, c.num_heads, c.d_kv)                            # (2, P, h, k)
        parameters[name] = both.transpose(1, 2).float().contiguous()                # (2, h, P, k)
    return parameters


def with_prefix(t5, kept):
    """The frozen T5 with keys and values beside those of its own, and no soft prompt."""
    return without_prompt(t5._replace(weights=t5.weights | kept), {})


def prefix_tuning_start(t5, seed, length):
    """Prefix-Tuning (Li & Liang 2021, 4.3): an MLP makes the same keys and values,
    tanh(E W1 + b1) W2 + b2. It is tuned in their place and folded away afterwards.

    E (P, d), W1 (d, m), W2 (m, layers 2 h k): 19,320,320 numbers at t5-base with P = 20. Keys and
    values start at the size of P-Tuning-v2's.
    """
    c, m, generator = t5.config, PREFIX_WIDTH, rng(seed, 0, 0, "prefix")
    direct = p_tuning_v2_start(t5, seed, length)
    size = torch.stack([x.square().mean((1, 2, 3)).sqrt() for x in direct.values()])
    size = size.flatten().repeat_interleave(c.num_heads * c.d_kv)                   # (layers 2 h k)

    def normal(*shape):
        return torch.from_numpy(generator.standard_normal(shape)).float().to(size.device)

    return {"E": normal(length, c.d_model), "W1": normal(c.d_model, m) * c.d_model ** -0.5,
            "b1": torch.zeros(m, device=size.device),
            "W2": normal(m, len(size)) * m ** -0.5 * size / 0.63,   # tanh of a normal has RMS 0.63
            "b2": torch.zeros_like(size)}


def fold_prefix(t5, parameters):
    """The MLP's output, as P-Tuning-v2's parameters."""
    E, W1, b1, W2, b2 = (parameters[name] for name in ("E", "W1", "b1", "W2", "b2"))
    names, c = prefix_names(t5), t5.config
    made = torch.tanh(E @ W1 + b1) @ W2 + b2                            # (P, layers 2 h k)
    made = made.view(len(E), len(names), 2, c.num_heads, c.d_kv)        # (P, layers, 2, h, k)
    return dict(zip(names, made.permute(1, 2, 3, 0, 4)))                            # (2, h, P, k)


# ---------------------------------------------------------------------------- full fine-tuning

def ft_start(t5, seed, length):
    """FT (C.1): every weight of T5, float32 whatever the frozen one's dtype; a tied head once."""
    parameters = {name: w.float().clone() for name, w in t5.weights.items()}
    if t5.config.tied:
        del parameters["lm_head.weight"]
    return parameters


def with_weights(t5, kept):
    """A T5 of these weights, and no soft prompt."""
    weights = {"lm_head.weight": kept["shared.weight"], **kept}
    return without_prompt(t5._replace(weights=weights), {})


def ft_memory(config):
    """Bytes that one process of FT holds beside the frozen weights and a step's activations: the
    tuned weights, a set's and a micro-batch's gradient, Adam's two moments, the best so far."""
    return 6 * 4 * count_weights(config)


# ------------------------------------------------ inputs: the template, options, instructions

LETTERS = tuple(string.ascii_uppercase)


def as_choice(template, words):
    """A template that asks for one of the words as multiple choice; its answers are LETTERS.

    "{a} <X> . {b}", ("no", "yes") -> "{a} . {b} ? A. no B. yes . Answer: <X>"
    """
    texts = " . ".join(f"{{{field}}}" for field in template_fields(template))
    options = " ".join(f"{letter}. {word}" for letter, word in zip(LETTERS, words))
    return f"{texts} ? {options} . Answer: <X>"


def pose_unified(tokenizer, name, task, rows, shown, seed):
    """pose() as multiple choice among the task's words (Unified-PPT; Gu et al. 2022, 3.3)."""
    letters = LETTERS[:len(task.words)]
    task = task._replace(template=as_choice(task.template, task.words), words=letters)
    return pose(tokenizer, name, task, rows, shown, seed)


INSTRUCTIONS = {
    **dict.fromkeys(("sst2", "mr", "movie"), "Is this opinion of a film terrible or great?"),
    **dict.fromkeys(("cr", "amazon", "books", "dvd", "electronics", "kitchen"),
                    "Is this opinion of a product terrible or great?"),
    "airlines": "Is this opinion of an airline terrible or great?",
    "restaurants": "Is this opinion of a restaurant terrible or great?",
    "nyt": "Is the feeling of this sentence from a newspaper terrible or great?",
    "tweets": "Is the feeling of this short message terrible or great?",
    "sst5": "Is this opinion of a film terrible, bad, okay, good or great?",
    "subj": "Is this sentence about a film subjective, an opinion, or objective, the plot?",
    "trec": "Does this question ask for a description, an entity, an expression, a human, a "
            "location or a number?",
    "cb": "Does the premise say that the hypothesis is true? Answer yes, no or maybe.",
    "rte": "Does the hypothesis follow from the premise? Answer yes or no.",
    "qnli": "Does the sentence answer the question? Answer Yes or No.",
    "wic": "Does the word have the same meaning in both sentences? Answer No or Yes.",
    "mrpc": "Do both sentences say the same? Answer No or Yes.",
    "qqp": "Do both questions ask the same? Answer No or Yes.",
    "source": "Where is this text from?",
}


def demonstrations(tokenizer, task, shown, seed):
    """The training sample as solved examples, token ids without </s>, labels taking turns.
    Row(1, {"text": "A fine film."}) -> the ids of `A fine film. It was great ?`"""
    mask = [tokenizer.token_to_id(MASK)]
    parts, names = compile_template(tokenizer, task.template), template_fields(task.template)
    by_label = {}
    for i in rng(seed, 0, 0, "demonstrations").permutation(len(shown)):
        row = shown[i]
        word, *texts = tokenize(tokenizer, [task.words[row.label], *(row.fields[n] for n in names)])
        solved = [word if part == mask else part for part in parts]
        ids, _ = fill_template(solved, dict(zip(names, texts)), task.max_tokens)
        by_label.setdefault(row.label, []).append(ids[:-1])
    turns = zip_longest(*by_label.values())
    return [ids for turn in turns for ids in turn if ids is not None]


def pose_instructed(tokenizer, name, task, rows, shown, seed, orders=0):
    """Zero-shot and few-shot inference (B): the instruction, for few-shot as many demonstrations as
    fit into CONTEXT tokens, and the row in its template -> [Examples], one for each order.

    All orders show a row the same demonstrations. Raises InputError for a task without instruction.
    """
    if name not in INSTRUCTIONS:
        raise InputError(f"{name} has no instruction: leave zero-shot and few-shot away")
    instruction, = tokenize(tokenizer, [INSTRUCTIONS[name]])
    examples = task_examples(tokenizer, task, rows)
    solved = demonstrations(tokenizer, task, shown, seed) if orders else []
    lengths = list(accumulate(map(len, solved)))            # of the first 1, 2, ... demonstrations
    posed = []
    for order in range(max(orders, 1)):
        ranking = rng(seed, order, 0, "order").permutation(len(solved))
        sources = []
        for row in examples.ids:
            fits = bisect_right(lengths, CONTEXT - len(instruction) - len(row))
            before = chain.from_iterable(solved[i] for i in ranking if i < fits)
            sources.append([*instruction, *before, *row])
        posed.append(examples._replace(ids=sources))
    return posed


PROMPT = Baseline(None, with_prompt, (0.1, 0.2, 0.3))                   # C.1
PREFIX = Baseline(p_tuning_v2_start, with_prefix, (3e-3, 1e-2, 3e-2), PREFIX_LENGTH)
ZERO_SHOT = Baseline(lambda t5, seed, length: {}, without_prompt, pose=pose_instructed)
BASELINES = {       # the prefix methods' rates are ours, the paper gives none
    "learned": PROMPT,                                  # begins with a given_prompt
    "unified": PROMPT._replace(pose=pose_unified),
    "random": PROMPT._replace(start=normal_prompt),
    "vocab": PROMPT._replace(start=vocabulary_prompt),
    "prefix-tuning": PREFIX._replace(start=prefix_tuning_start, rates=(1e-4, 3e-4, 1e-3),
                                     fold=fold_prefix),
    "p-tuning-v2": PREFIX,
    "ft": Baseline(ft_start, with_weights, (1e-5, 2e-5, 3e-5)),         # C.1
    "zero-shot": ZERO_SHOT,
    "few-shot": ZERO_SHOT._replace(pose=partial(pose_instructed, orders=ORDERS)),
}


# -------------------------------------------------- pre-training: PPT, Unified-PPT, MetaPT

def ppt_step(t5, state, pairs, method, seed, ranks=SOLO):
    """PPT (Gu et al. 2022): one step of the plain loss on the tasks that SUPMER would adapt to.

    Called as supmer.meta_step, it ignores partners, phi and seed. The batch is all examples of the
    tasks, 256 with the paper's sizes. Adam's rate in step t, from 1 on, is prompt_rate / sqrt(t)
    ("inverse square root", C.2), without Gu et al.'s weight decay.
    -> a dict for the log. Raises InputError, with the state as it was, if a number is not finite.
    """
    def gradient(examples):
        part, _, loss = prompt_gradient(t5, state.theta, examples, method)
        return part.cpu(), loss.cpu()

    sets = [examples for task, _ in pairs for examples in (task.support, task.query)]
    n = sum(len(examples.ids) for examples in sets)
    g, loss = 0.0, 0.0
    for examples, (part, part_loss) in zip(sets, ranks.map(gradient, sets)):
        share = len(examples.ids) / n
        g, loss = g + share * part, loss + share * part_loss
    loss = float(loss)
    if not (math.isfinite(loss) and g.isfinite().all()):
        raise InputError(f"step {state.step}: the loss is {loss} or its gradient not finite; try a "
                         "smaller prompt_rate")
    state.theta.grad = g.to(state.theta)
    log = {"query_loss": loss, "theta_gradient": float(g.norm())}
    descend(state.theta_adam, method.prompt_rate / math.sqrt(state.step + 1), method.clip)
    state.step += 1
    return log


# Unified-PPT's meta tasks: all of them multiple choice, so that a pair's words become options.
UNIFIED = {name: entry._replace(template=as_choice(entry.template, entry.words),
                                words=LETTERS[:len(entry.words)])
           for name, entry in VARIANTS.items() if entry.words != LETTERS[:len(entry.words)]}


# ----------------------------------------------------- what is learned before, as train.py's knobs

PLAIN = ("ppt", "unified-ppt")          # take ppt_step, the others supmer.meta_step
METHODS = {
    "supmer": {},
    "ppt": {"regularizer": "none"},
    "unified-ppt": {"regularizer": "none"},
    "metapt": {"inner_rate": 0.08, "prompt_rate": 0.025, "patience": 6, "regularizer": "none",
               "augmentation": False, "labeled_share": 1.0},     # C.2
}
ABLATIONS = {   # Table 4, the released code's order (ours); train.parse puts them above the rest
    **{f"only-{form}": {"variants": tuple(x for x in PAPER_VARIANTS if VARIANTS[x].format == form)}
       for form in FORMATS},
    "no-ta": {"augmentation": False}, "no-curriculum": {"curriculum": False},
    "no-mgr": {"regularizer": "none"}, "first-order": {"first_order": True},
}


def name_of(training, method):
    """What a train.Training and a Method make: their method or, of SUPMER, an ablation, or
    "variant" where more than one part is left out."""
    if training.method != "supmer":
        return training.method
    chosen = vars(training) | vars(method)
    left_out = [name for name, preset in ABLATIONS.items() if preset.items() <= chosen.items()]
    if len(left_out) > 1:
        return "variant"
    return left_out[0] if left_out else "supmer"


def mixes(training, method):
    """Whether a partner task is mixed in."""
    return method.augmentation and training.method not in PLAIN


def examples_per_step(training, method):
    """Examples that a step draws: n (support + query), and the partners' n query if tasks mix."""
    queries = 2 if mixes(training, method) else 1
    return training.tasks * (training.support + queries * training.query)


def parameters_at(config, length):
    """{method: how many numbers it tunes} on a T5Config, prompts of `length` vectors."""
    made = {name: torch.empty(shape) for name, shape in expected_shapes(config).items()}
    t5 = T5(config, {"lm_head.weight": made["shared.weight"], **made})     # mostly never touched
    counts = {}
    for name, baseline in BASELINES.items():
        if baseline.start is ft_start:
            counts[name] = count_weights(config)
        elif baseline.start and baseline.rates:
            start = baseline.start(t5, 0, baseline.length or length)
            counts[name] = sum(x.numel() for x in start.values())
    return counts


if __name__ == "__main__":
    from shapes import model_shape      # it knows the hub, which nothing else here needs
    for name, number in parameters_at(model_shape("t5-base"), 100).items():
        print(f"{name:14} {number:>12,} tunable parameters at t5-base")
