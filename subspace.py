"""Capability-selective subspaces of keys and values: where correctness lives, found by SVD, and projection into it.

On a calibration set of labelled (q, y) the aligned loss looks only at the positions S on which being right depends:

    L_align = -1/|S| sum_{t in S} log p(z_t | z_<t)

Its gradients at a layer's keys and values, at *all* token positions of all examples, are stacked to G_K, G_V (M, d):

    G = U diag(s) V^T      V_r = the first r right singular vectors      P = V_r V_r^T

and while the model generates, K <- K P_K and V <- V P_V. The idea: gradient rows of K come from the queries that matter
for correctness, rows of V from what later layers read for it, so that projection keeps those and blunts the rest.

>>> G = torch.tensor([[3.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
>>> singular_values, V = principal_directions(G)
>>> [round(s, 3) for s in singular_values.tolist()], (projector(V, 1).round(decimals=3) + 0.0).tolist()
([4.243, 1.0], [[1.0, 0.0], [0.0, 0.0]])

`python subspace.py` prints the spectrum of every layer of the base model and one prompt answered with and without.
"""

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import runs
from data.arithmetic import BUDGET, DOMAINS, golden_solution, make_problem, verify
from data.documents import plain_prompt
from data.tokenizer import END, decode, encode, pieces
from model import GPT, generate
from runs import option

Place = tuple[int, str]  # (layer counted from 0, "k" or "v")
COORDINATES = ("linear", "head", "norm", "rope")
LOSSES = ("aligned", "steps", "full")


@dataclass(frozen=True)
class Example:
    """A labelled calibration example: prompt and solution tokens."""

    prompt: list[int]
    solution: list[int]


def correctness_positions(tokens: list[str], rule: str = "aligned") -> list[int]:
    """S of a solution: "aligned" takes the result of every step and the final answer, what follows '=' or '#'.

    "steps" is wider, every digit and operator; "full" takes everything, the ablation of the paper.

    >>> [correctness_positions(list("3+8=1;#1"), rule) for rule in ("aligned", "steps", "full")]
    [[4, 7], [0, 1, 2, 4, 7], [0, 1, 2, 3, 4, 5, 6, 7]]
    """
    if rule == "aligned":
        return [i for i in range(1, len(tokens)) if tokens[i - 1] in ("=", "#")]
    return [i for i, token in enumerate(tokens) if rule == "full" or token in [*"0123456789+-*"]]


def calibration_set(domains: tuple[str, ...], size: int, seed: int) -> list[Example]:
    """Training problems of the domains in turn, each with its golden solution."""
    rng = random.Random(f"calibration {seed}")
    examples = []
    for i in range(size):
        problem = make_problem(domains[i % len(domains)], rng)
        examples.append(Example(encode(plain_prompt(problem)), [*encode(golden_solution(problem)), END]))
    return examples


def target_layers(spec: str, n_layer: int) -> list[int]:
    """Layers counted from 0: 'paper' is {floor(L/2), L} counted from 1; or 'last', 'all', or numbers like '3,4'."""
    named = {"paper": [n_layer // 2 - 1, n_layer - 1], "last": [n_layer - 1], "all": list(range(n_layer))}
    if spec in named:
        return sorted(set(named[spec]))
    numbers = spec.split(",")
    if not all(number.isdecimal() and 1 <= int(number) <= n_layer for number in numbers):
        raise runs.UserError(f"layers {spec!r}: give paper, last, all, or numbers from 1 to {n_layer} like 1,2")
    return sorted({int(number) - 1 for number in numbers})


def place_width(model: GPT, coordinate: str) -> int:
    """d: the dimensions a projector acts in, of one head or of all heads flattened."""
    return model.config.head_dim * (1 if coordinate == "head" else model.config.n_kv_head)


def hook_module(model: GPT, place: Place, coordinate: str) -> nn.Module:
    """The module whose output is projected at a place; values have no norm and no rotation, so theirs never changes."""
    layer, kind = place
    attention = model.blocks[layer].attn
    if kind == "v":
        return attention.v_proj
    return {"linear": attention.k_proj, "head": attention.k_proj, "norm": attention.k_norm, "rope": attention.k_rope}[
        coordinate
    ]


def aligned_loss(logits: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
    """Sum over examples of L_align: logits (B, T, V), tokens and weights (B, T), weights 1/|S| on S and else 0."""
    logp = logits[:, :-1].log_softmax(dim=-1).gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)  # (B, T - 1)
    return -(logp * weights[:, 1:]).sum()


def capability_gradients(
    model: GPT,
    examples: list[Example],
    places: list[Place],
    loss: str = "aligned",
    coordinate: str = "linear",
    batch: int = 64,
) -> dict[Place, Tensor]:
    """dL/dK_t and dL/dV_t at all positions of all examples, stacked: place -> (M, d).

    One backward a batch: each example's loss is a mean over its own S and examples do not see one another, so the
    gradient of their sum holds each one's own. loss is the rule of `correctness_positions`.
    """
    rows: dict[Place, list[Tensor]] = {place: [] for place in places}
    for start in range(0, len(examples), batch):
        chunk = examples[start : start + batch]
        lengths = torch.tensor([len(e.prompt) + len(e.solution) for e in chunk])
        tokens = torch.zeros(len(chunk), int(lengths.max()), dtype=torch.long)  # (B, T)
        weights = torch.zeros(tokens.shape)
        for i, example in enumerate(chunk):
            tokens[i, : lengths[i]] = torch.tensor(example.prompt + example.solution)
            S = correctness_positions(pieces(example.solution), loss)
            weights[i, [len(example.prompt) + t for t in S]] = 1 / len(S)
        outputs: dict[Place, Tensor] = {}
        hooks = [
            hook_module(model, place, coordinate).register_forward_hook(
                lambda module, inputs, output, place=place, outputs=outputs: outputs.update({place: output})
            )
            for place in places
        ]
        try:
            logits = model(tokens.to(model.device))
        finally:
            for hook in hooks:
                hook.remove()
        total = aligned_loss(logits, tokens.to(model.device), weights.to(model.device))
        gradients = torch.autograd.grad(total, [outputs[place] for place in places])
        real = torch.arange(tokens.size(1)) < lengths[:, None]  # (B, T)
        for place, gradient in zip(places, gradients, strict=True):
            rows[place].append(gradient.reshape(*tokens.shape, -1).cpu()[real])  # (tokens of the batch, d)
    return {place: torch.cat(parts) for place, parts in rows.items()}


def principal_directions(G: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values (d,), falling, and right singular vectors as the columns of V (d, d), of G (M, d).

    Where M is much larger than d they come from the Gram matrix G^T G = V diag(s^2) V^T, in float64.
    """
    G = G.double()
    if G.size(0) > 4 * G.size(1):
        squares, V = torch.linalg.eigh(G.T @ G)
        return squares.clamp(min=0).sqrt().flip(0).float(), V.flip(1).float()
    _, singular_values, Vt = torch.linalg.svd(G, full_matrices=True)
    padded = torch.zeros(G.size(1), dtype=G.dtype)
    padded[: len(singular_values)] = singular_values
    return padded.float(), Vt.T.float()


def choose_rank(spec: str, singular_values: Tensor) -> int:
    """Rank from a number ('16'), a fraction of d ('50%') or the energy sum s_i^2 to retain ('energy:0.99')."""
    d = len(singular_values)
    form = re.fullmatch(r"energy:(0?\.\d+|1(?:\.0*)?)|(\d+(?:\.\d+)?)%|([1-9]\d*)", spec)
    if form is None:
        raise runs.UserError(f"rank {spec!r}: give a number like 16, a share like 50%, or an energy like energy:0.99")
    if form[1]:
        energy = singular_values.square().cumsum(0) / singular_values.square().sum()
        return min(d, int((energy < float(form[1])).sum()) + 1)
    if form[3] and int(form[3]) > d:
        raise runs.UserError(f"rank {spec}: what is projected has only {d} dimensions, give at most {d}")
    return max(1, min(d, round(d * float(form[2]) / 100))) if form[2] else int(form[3])


def projector(V: Tensor, rank: int) -> Tensor:
    """P = V_r V_r^T, the orthogonal projector onto the first r columns of V (d, d) -> (d, d)."""
    return V[:, :rank] @ V[:, :rank].T


def make_projectors(
    gradients: dict[Place, Tensor],
    rank: str,
    coordinate: str = "linear",
    n_head: int = 1,
    source: str = "gradient",
    seed: int = 0,
) -> dict[Place, Tensor]:
    """One projector a place, or one per head; source 'random' draws a subspace of the same rank instead."""
    generator = torch.Generator().manual_seed(seed)
    projectors = {}
    for place, G in gradients.items():
        blocks = []
        for part in G.chunk(n_head if coordinate == "head" else 1, dim=1):
            singular_values, V = principal_directions(part)
            r = choose_rank(rank, singular_values)
            if source == "random":
                V = torch.linalg.qr(torch.randn(V.shape, generator=generator)).Q
            blocks.append(projector(V, r))
        projectors[place] = torch.block_diag(*blocks)
    return projectors


def calibrate(
    model: GPT,
    examples: list[Example],
    layers: str,
    rank: str,
    project: str = "kv",
    loss: str = "aligned",
    coordinate: str = "linear",
    source: str = "gradient",
    seed: int = 0,
) -> dict[Place, Tensor]:
    """SPD's phase 1 in one call: the projectors P_K, P_V of every target layer."""
    places = [(layer, kind) for layer in target_layers(layers, model.config.n_layer) for kind in project]
    gradients = capability_gradients(model.requires_grad_(True), examples, places, loss, coordinate)
    return make_projectors(gradients, rank, coordinate, model.config.n_kv_head, source, seed)


@contextmanager
def project_kv(model: GPT, projectors: dict[Place, Tensor], coordinate: str = "linear") -> Iterator[None]:
    """Within this context K <- K P_K and V <- V P_V at the projectors' places; the model is always restored."""
    hooks = []
    for place, P in projectors.items():

        def project(module: nn.Module, inputs: tuple, output: Tensor, P: Tensor = P) -> Tensor:
            return (output.flatten(2) @ P.to(output)).view_as(output)

        hooks.append(hook_module(model, place, coordinate).register_forward_hook(project))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def fold(model: GPT, projectors: dict[Place, Tensor]) -> None:
    """Write linear-coordinate projectors into the weights, in place: (W x)^T P = (P W x)^T, so W' = P W."""
    for place, P in projectors.items():
        weight = hook_module(model, place, "linear").weight
        weight.copy_(P.to(weight) @ weight)


@dataclass(frozen=True)
class Config:
    domain: str = option("add", "domain of the calibration set and the prompt", choices=tuple(DOMAINS))
    calibration_size: int = option(500, "calibration examples, N_cal", "20 to 500", minimum=1)
    loss: str = option("aligned", "calibration loss: on results, on whole steps, or on everything", "aligned", LOSSES)
    layers: str = option("3", "projected layers: paper, last, all, or numbers from 1 like 3,4", "floor(L/2) and L")
    rank: str = option("50%", "rank: a number, a share like 50%, or energy:0.99", "50%")
    coordinate: str = option("linear", "where the projector acts", "not stated", COORDINATES)
    temperature: float = option(1.0, "sampling temperature of the answers", minimum=0)
    seed: int = option(0, "seed of calibration set, prompt and sampling")
    base: str = option("data/base.pt", "checkpoint of the model")
    html: str = option("", "write spectra, projected-away shares and answers to this web page, e.g. out/spd.html")


def place_name(place: Place) -> str:
    return f"layer {place[0] + 1} {place[1].upper()}"


def main() -> None:
    import xray  # which imports this module in turn

    config = runs.parse_config(Config, "Singular-value spectra, and one prompt with and without projection.")
    model, _ = runs.load_checkpoint(config.base)
    examples = calibration_set((config.domain,), config.calibration_size, config.seed)
    n_layer, chosen = model.config.n_layer, target_layers(config.layers, model.config.n_layer)
    places = [(layer, kind) for layer in range(n_layer) for kind in "kv"]
    gradients = capability_gradients(model, examples, places, config.loss, config.coordinate)
    rows, spectra = [], {}
    for place, G in gradients.items():
        singular_values, _ = principal_directions(G)
        energy = singular_values.square().cumsum(0) / singular_values.square().sum()
        r = choose_rank(config.rank, singular_values)
        spectra[place] = singular_values, r
        relative = (singular_values / singular_values[0]).tolist()
        bars = "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * s))] for s in relative)
        mark = "projected" if place[0] in chosen else ""
        rows.append([place_name(place), bars, f"{r} of {len(relative)}", f"{energy[r - 1]:.1%}", mark])
    print(runs.markdown_table(["place", "singular values s_i / s_1", "r", "energy kept", ""], rows))

    problem = make_problem(config.domain, random.Random(f"prompt {config.seed}"), test=True)
    kept = {place: G for place, G in gradients.items() if place[0] in chosen}
    projectors = make_projectors(kept, config.rank, config.coordinate, model.config.n_kv_head, seed=config.seed)
    print(f"\nproblem   {problem}\nsolution  {golden_solution(problem)}")
    answers = {}
    for name, active in (("without", {}), ("with", projectors)):
        with project_kv(model, active, config.coordinate):
            generator = runs.torch_generator("demo", config.seed)
            prompt = [encode(plain_prompt(problem))]
            written = generate(model, prompt, BUDGET, END, 4, config.temperature, generator=generator)
        answers[name] = [decode(tokens) for tokens in written]
        for answer in answers[name]:
            print(f"{name:8s}  {answer}  {'right' if verify(problem, answer).correct else 'wrong'}")
    if config.html:
        runs.make_folder(Path(config.html).resolve().parent)
        runs.write_text(
            Path(config.html), xray.subspace_page(model, problem, spectra, projectors, answers, config.coordinate)
        )
        print(f"\n-> {config.html}")


if __name__ == "__main__":
    runs.run_script(main)
