"""Capability-selective subspaces of keys and values: where correctness lives, found by SVD, and projection into it.

On a calibration set of labelled (q, y) the aligned loss looks only at the positions S on which being right depends:

    L_align = -1/|S| sum_{t in S} log p(z_t | z_<t)

Its gradients at a layer's keys and values, at *all* M tokens of all examples, are stacked to G_K, G_V (M, d):

    G = U diag(s) V^T      V_r = the first r right singular vectors      P = V_r V_r^T

and while the model generates, K <- K P_K and V <- V P_V. The idea: gradient rows of K come from the queries that matter
for correctness, rows of V from what later layers read for it, so that projection keeps those and blunts the rest.

>>> G = torch.tensor([[3.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
>>> singular_values, V = principal_directions(G)
>>> [round(s, 3) for s in singular_values.tolist()], (projector(V, 1).round(decimals=3) + 0.0).tolist()
([4.243, 1.0], [[1.0, 0.0], [0.0, 0.0]])

`python subspace.py` prints every layer's spectrum, and how many of 200 answers are right with and without projection.
"""

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from data import Task
from errors import UserError
from evaluate import answer
from harness.cli import markdown_table, option, parse_config, run_script
from harness.run import TaskConfig, open_task_and_base, seeded
from losses import CHUNK
from model import GPT

Place = tuple[int, str]  # (layer counted from 0, "k" or "v")
COORDINATES = ("linear", "head", "norm", "rope")
LOSSES = ("aligned", "steps", "full")


@dataclass(frozen=True)
class SubspaceConfig:
    """Step 1: which subspace, and where it acts; layers, rank and project default to what suits data/base.pt best."""

    calibration_domain: tuple[str, ...] = option((), "domains of the calibration set; none means the training domain")
    calibration_size: int = option(500, "calibration examples, N_cal", "20 to 500", minimum=1)
    loss: str = option("aligned", "calibration loss: on results, on whole steps, or on everything", "aligned", LOSSES)
    subspace: str = option("gradient", "where the subspace comes from", "gradient", ("gradient", "random"))
    layers: str = option("1", "target layers: paper, last, all, or numbers counted from 1 like 3,4", "floor(L/2) and L")
    rank: str = option("35%", "rank of the projectors: a number, a share like 50%, or energy:0.99", "50%")
    project: str = option("k", "what is projected", "kv", ("kv", "k", "v"))
    coordinate: str = option(
        "linear",
        "P acts on all heads of K and V, on each, after K's norm, or after RoPE",
        "not stated",
        COORDINATES,
    )


@dataclass(frozen=True)
class Example:
    """A labelled calibration example."""

    prompt: list[int]
    solution: list[int]
    S: list[int]  # positions in the solution on which being right depends


def calibration_set(task: Task, domains: tuple[str, ...], config: SubspaceConfig, seed: int) -> list[Example]:
    """Training problems of the domains in turn, each with its golden solution."""
    rng = random.Random(f"calibration {seed}")
    examples = []
    for i in range(config.calibration_size):
        problem = task.problem(domains[i % len(domains)], rng)
        solution = [*task.encode(problem.solution), task.end()]
        S = task.decisive(task.pieces(solution), config.loss)
        if not S:
            raise UserError(f"the solution {problem.solution!r} has no position that decides; give another --loss")
        examples.append(Example(task.encode(task.student_prompt(problem)), solution, S))
    return examples


def target_layers(spec: str, n_layer: int) -> list[int]:
    """Layers counted from 0: 'paper' is {floor(L/2), L} counted from 1; or 'last', 'all', or numbers like '3,4'."""
    named = {"paper": [max(n_layer // 2, 1) - 1, n_layer - 1], "last": [n_layer - 1], "all": list(range(n_layer))}
    if spec in named:
        return sorted(set(named[spec]))
    numbers = spec.split(",")
    if not all(number.isdecimal() and 1 <= int(number) <= n_layer for number in numbers):
        raise UserError(f"layers {spec!r}: give paper, last, all, or numbers from 1 to {n_layer} like 1,2")
    return sorted({int(number) - 1 for number in numbers})


def place_width(model: GPT, coordinate: str) -> int:
    """d: the dimensions a projector acts in, of one head or of all heads flattened."""
    return model.config.head_dim * (1 if coordinate == "head" else model.config.n_kv_head)


def place_name(place: Place) -> str:
    return f"layer {place[0] + 1} {place[1].upper()}"


# ---------------------------------------------------------------------------------------------- hooks


def hook_module(model: GPT, place: Place, coordinate: str) -> nn.Module:
    """The module whose output is projected at a place; values have no norm and no rotation, so theirs never changes."""
    layer, kind = place
    attention = model.blocks[layer].attn
    if kind == "v":
        return attention.v_proj
    return {"norm": attention.k_norm, "rope": attention.k_out}.get(coordinate, attention.k_proj)


@contextmanager
def hooked(
    model: GPT, places: list[Place], coordinate: str, act: Callable[[Place, Tensor], Tensor | None]
) -> Iterator[None]:
    """Within this context `act` sees the keys and values of every forward pass, and may replace them.

    RuntimeError where the model ran and a hook did not fire, as in compiled blocks.
    """
    fired: set[Place | str] = set()

    def see(place: Place, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        fired.add(place)
        return act(place, output)

    handles = [hook_module(model, place, coordinate).register_forward_hook(partial(see, place)) for place in places]
    handles.append(model.embed.register_forward_hook(lambda *_: fired.add("model")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if "model" in fired and (silent := [place_name(place) for place in places if place not in fired]):
        raise RuntimeError(f"the model ran, but its hooks at {', '.join(silent)} did not fire; is it compiled?")


def aligned_loss(logits: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
    """Sum over examples of L_align: logits (B, T, V), tokens and weights (B, T), weights 1/|S| on S and else 0.

    --loss steps and --loss full are the same sum with another S.
    """
    logp = logits[:, :-1].log_softmax(dim=-1).gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)  # (B, T - 1)
    return -(logp * weights[:, 1:]).sum()


def capability_gradients(
    model: GPT, examples: list[Example], places: list[Place], coordinate: str = "linear", batch: int = 64
) -> dict[Place, Tensor]:
    """dL/dK_t and dL/dV_t at all positions of all examples, stacked: place -> (M, d).

    One backward pass per batch: no example attends to another, so each row of the gradient of the summed losses
    depends on its own example's loss alone. A batch is smaller where its logits would exceed losses.CHUNK. Turns on
    the model's gradients.
    """
    model.requires_grad_(True)
    rows: dict[Place, list[Tensor]] = {place: [] for place in places}
    longest = max(len(example.prompt) + len(example.solution) for example in examples)
    batch = max(1, min(batch, CHUNK // (longest * model.config.vocab_size)))
    for start in range(0, len(examples), batch):
        chunk = examples[start : start + batch]
        lengths = torch.tensor([len(e.prompt) + len(e.solution) for e in chunk])
        tokens = torch.zeros(len(chunk), int(lengths.max()), dtype=torch.long)  # (B, T)
        weights = torch.zeros(tokens.shape)  # 1/|S| on S
        for i, example in enumerate(chunk):
            tokens[i, : lengths[i]] = torch.tensor(example.prompt + example.solution)
            weights[i, [len(example.prompt) + t for t in example.S]] = 1 / len(example.S)
        outputs: dict[Place, Tensor] = {}
        with hooked(model, places, coordinate, outputs.__setitem__):  # which returns None: nothing is replaced
            logits = model(tokens.to(model.device))
        loss = aligned_loss(logits, tokens.to(model.device), weights.to(model.device))
        gradients = torch.autograd.grad(loss, [outputs[place] for place in places])
        real = torch.arange(tokens.size(1)) < lengths[:, None]  # (B, T)
        for place, gradient in zip(places, gradients, strict=True):
            rows[place].append(gradient.reshape(*tokens.shape, -1).cpu()[real])  # (tokens of the batch, d)
    return {place: torch.cat(parts) for place, parts in rows.items()}


def principal_directions(G: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values (d,), falling, and right singular vectors as the columns of V (d, d), of G (M, d).

    Where M is much larger than d they come from the Gram matrix G^T G = V diag(s^2) V^T, in float64.
    """
    G = G.double()
    if not G.isfinite().all():
        raise UserError("the calibration gradients hold a number that is not finite; give another --base")
    if G.size(0) > 4 * G.size(1):
        squares, V = torch.linalg.eigh(G.T @ G)
        return squares.clamp(min=0).sqrt().flip(0).float(), V.flip(1).float()
    _, singular_values, Vt = torch.linalg.svd(G, full_matrices=True)
    padded = torch.zeros(G.size(1), dtype=G.dtype)
    padded[: len(singular_values)] = singular_values
    return padded.float(), Vt.T.float()


def condense(G: Tensor) -> Tensor:
    """d rows with the singular values and right singular vectors of all rows of G: (M, d) -> (d, d)."""
    singular_values, V = principal_directions(G)
    return singular_values[:, None] * V.T


def choose_rank(spec: str, singular_values: Tensor) -> int:
    """Rank from a number ('16'), a fraction of d ('50%') or the energy sum s_i^2 to retain ('energy:0.99')."""
    d = len(singular_values)
    form = re.fullmatch(r"energy:(0?\.\d+|1(?:\.0*)?)|(\d+(?:\.\d+)?)%|([1-9]\d*)", spec)
    if form is None:
        raise UserError(f"rank {spec!r}: give a number like 16, a share like 50%, or an energy like energy:0.99")
    if form[1]:
        energy = singular_values.square().cumsum(0) / singular_values.square().sum()
        return min(d, int((energy < float(form[1])).sum()) + 1)
    if form[3] and int(form[3]) > d:
        raise UserError(f"rank {spec}: what is projected has only {d} dimensions, give at most {d}")
    return max(1, min(d, round(d * float(form[2]) / 100))) if form[2] else int(form[3])


def projector(V: Tensor, rank: int) -> Tensor:
    """P = V_r V_r^T, the orthogonal projector onto the first r columns of V (d, d) -> (d, d)."""
    return V[:, :rank] @ V[:, :rank].T


def make_projectors(
    gradients: dict[Place, Tensor], config: SubspaceConfig, n_kv_head: int, seed: int = 0
) -> dict[Place, Tensor]:
    """One projector per place, or one per head; with subspace 'random', a random subspace of the same rank instead.

    UserError where the gradients span fewer directions than the rank asks for: the others would be arbitrary.
    """
    generator = torch.Generator().manual_seed(seed)
    projectors = {}
    for place, G in gradients.items():
        blocks = []
        for part in G.chunk(n_kv_head if config.coordinate == "head" else 1, dim=1):
            singular_values, V = principal_directions(part)
            r = choose_rank(config.rank, singular_values)
            spanned = int((singular_values > 1e-6 * singular_values[0]).sum())
            if config.subspace == "random":
                V = torch.linalg.qr(torch.randn(V.shape, generator=generator)).Q
            elif spanned < r:
                where = f"the gradients at {place_name(place)} span {spanned} of the {r} directions of --rank"
                raise UserError(f"{where} {config.rank}; give a lower rank or a larger --calibration-size")
            blocks.append(projector(V, r))
        projectors[place] = torch.block_diag(*blocks)
    return projectors


def calibrate(model: GPT, examples: list[Example], config: SubspaceConfig, seed: int = 0) -> dict[Place, Tensor]:
    """SPD's step 1 in one call: the projectors P_K, P_V of every target layer."""
    places = [(layer, kind) for layer in target_layers(config.layers, model.config.n_layer) for kind in config.project]
    gradients = capability_gradients(model, examples, places, config.coordinate)
    return make_projectors(gradients, config, model.config.n_kv_head, seed)


@contextmanager
def project_kv(model: GPT, projectors: dict[Place, Tensor], coordinate: str = "linear") -> Iterator[None]:
    """Within this context K <- K P_K and V <- V P_V at the projectors' places; the model is always restored."""

    def project(place: Place, output: Tensor) -> Tensor:
        return (output.flatten(2) @ projectors[place].to(output)).view_as(output)

    with hooked(model, list(projectors), coordinate, project):
        yield


@torch.no_grad()
def fold(model: GPT, projectors: dict[Place, Tensor]) -> None:
    """Linear-coordinate projectors written into the weights, in place: P (W x + b), so W' = P W and b' = P b.

    No script needs it. It shows that inference under projection costs nothing.
    """
    for place, P in projectors.items():
        linear = hook_module(model, place, "linear")
        linear.weight.copy_(P.to(linear.weight) @ linear.weight)
        if linear.bias is not None:
            linear.bias.copy_(P.to(linear.bias) @ linear.bias)


# ---------------------------------------------------------------------------------------------- worked example


@dataclass(frozen=True)
class Config(SubspaceConfig, TaskConfig):
    domain: str = option("exam", "domain of the calibration set and the prompts")
    temperature: float = option(1.0, "sampling temperature of the answers; 0 is greedy", minimum=0)


def spectra(model: GPT, examples: list[Example], config: Config) -> dict[Place, tuple[Tensor, int]]:
    """place -> singular values (d,), of all heads together, and the rank chosen, of every layer."""
    places = [(layer, kind) for layer in range(model.config.n_layer) for kind in "kv"]
    found = {}
    for place, G in capability_gradients(model, examples, places, config.coordinate).items():
        singular_values, _ = principal_directions(G)
        found[place] = singular_values, choose_rank(config.rank, singular_values)
    return found


def bars(singular_values: Tensor) -> str:
    """One bar per value: its share of the first."""
    shares = singular_values / singular_values[0].clamp(min=1e-30)
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * share))] for share in shares.tolist())


def main() -> None:
    config = parse_config(Config, "Singular-value spectra, and prompts answered with and without projection.")
    task, model = open_task_and_base(config, config.domain, *config.calibration_domain)
    choose_rank(config.rank, torch.ones(place_width(model, config.coordinate)))  # a bad one is told at once
    chosen, rows = target_layers(config.layers, model.config.n_layer), []
    examples = calibration_set(task, config.calibration_domain or (config.domain,), config, config.seed)
    for place, (s, r) in spectra(model, examples, config).items():
        kept = f"{s[:r].square().sum() / s.square().sum():.1%}"
        mark = "projected" if place[0] in chosen and place[1] in config.project else ""
        rows.append([place_name(place), bars(s), f"{r} of {len(s)}", kept, mark])
    print(markdown_table(["place", "singular values s_i / s_1", "r", "energy kept", ""], rows))

    projectors = calibrate(model, examples, config, config.seed)
    problems = task.problems(config.domain, 200, random.Random(f"prompt {config.seed}"), test=True)
    for name, active in (("without", {}), ("with", projectors)):
        with project_kv(model, active, config.coordinate):
            sampling = {"temperature": config.temperature, "generator": seeded("demo", config.seed)}
            answers, verdicts = answer(model, task, problems, **sampling)
        right = sum(verdict.correct for verdict in verdicts)
        print(f"\n{name} projection: {right} of {len(problems)} answers are right; the first three are")
        for problem, text, verdict in list(zip(problems, answers, verdicts, strict=True))[:3]:
            print(f"  {problem.question:12s} {text}  {'right' if verdict.correct else 'wrong'}")


if __name__ == "__main__":
    run_script(main)
