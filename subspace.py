"""Capability-selective subspaces of keys and values: where correctness lives, found by SVD, and projection into it.

On a calibration set of labelled (q, y) the aligned loss looks only at the positions S on which being right depends:

    L_align = -1/|S| sum_{t in S} log p(z_t | z_<t)

Its gradients at a layer's keys and values, at *all* M tokens of all examples, are stacked to G_K, G_V (M, d):

    G = U diag(s) V^T      V_r = the first r right singular vectors      P = V_r V_r^T

and while the model generates, K <- K P_K and V <- V P_V. The idea: gradient rows of K come from the queries that matter
for correctness, rows of V from what later layers read for it, so that projection keeps those and blunts the rest.

>>> G = torch.tensor([[3.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
>>> s, V = principal_directions(G)
>>> [round(x, 3) for x in s.tolist()], (projector(V, 1).round(decimals=3) + 0.0).tolist()
([4.243, 1.0], [[1.0, 0.0], [0.0, 0.0]])

`python subspace.py` prints every layer's spectrum, and how many of 200 answers are right with and without projection.
"""

import math
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from data import Task
from errors import UserError
from evaluate import golden_likelihoods
from harness.progress import inner_bar
from model import GPT

Site = tuple[int, str]  # (layer counted from 0, "k" or "v")
COORDINATES = ("linear", "head", "norm", "rope")
LOSSES = ("steps", "results", "full")  # which positions S has
TEMPERATURE, RANK = 10.0, "keep95%"  # chosen on bases that no study uses, see results/selectivity.md


@dataclass(frozen=True)
class Example:
    """A labelled calibration example."""

    prompt: list[int]
    solution: list[int]
    S: list[int]  # positions in the solution on which being right depends


def calibration_set(task: Task, domains: tuple[str, ...], size: int, loss: str, seed: int) -> list[Example]:
    """Training problems of the domains in turn, with golden solutions and the positions S of one of LOSSES."""
    rng = random.Random(f"calibration {seed}")
    examples = []
    for i in range(size):
        problem = task.problem(domains[i % len(domains)], rng)
        solution = [*task.encode(problem.solution), task.end()]
        S = task.decisive(task.pieces(solution), loss)
        if not S:
            raise UserError(f"the solution {problem.solution!r} has no position that decides; give another --loss")
        examples.append(Example(task.encode(task.prompt(problem)), solution, S))
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


def target_sites(config: Any, model: GPT) -> list[Site]:
    """Keys, values or both (config.project) of the target layers."""
    return [(layer, kind) for layer in target_layers(config.layers, model.config.n_layer) for kind in config.project]


def choose_rank(spec: str, d: int) -> int:
    """A rank between 1 and d, from a number like '16' or a share of d like '50%'."""
    parsed = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", spec)
    rank = (round(d * float(parsed[1]) / 100) if parsed[2] else float(parsed[1])) if parsed else 0.0
    if not parsed or rank != int(rank) or rank > d or float(parsed[1]) == 0:
        raise UserError(f"rank {spec!r}: give a number from 1 to {d}, a share of {d} like 50%, or keep95%")
    return max(1, int(rank))


def smallest_rank(
    spec: str,
    model: GPT,
    task: Task,
    domains: tuple[str, ...],
    gradients: dict[Site, Tensor],
    coordinate: str = "linear",
) -> str:
    """The smallest rank under which golden steps keep a share of their probability, if spec is like keep95%; else spec.

    Calibration problems decide, not what is tested: the steps of 100 golden solutions of training problems.
    """
    parsed = re.fullmatch(r"keep(\d+(?:\.\d+)?)%", spec)
    if not parsed:
        return spec
    share = float(parsed[1]) / 100
    if not 0 < share < 1:
        raise UserError(f"rank {spec!r}: give a share above 0 and below 100, like keep95%")
    rng = random.Random("rank")
    problems = [task.problem(domains[i % len(domains)], rng) for i in range(100)]
    blocks, d = model.config.n_kv_head if coordinate == "head" else 1, min(G.size(1) for G in gradients.values())
    principal = {site: principal_directions(G) for site, G in gradients.items()}
    condensed = {site: s[:, None] * V.T for site, (s, V) in principal.items()}  # the same V, in fewer rows
    plain = golden_likelihoods(model, task, problems)["step"]
    step = max(1, d // 64)  # at most 64 ranks are tried
    for rank in inner_bar(range(step, d // blocks, step), "rank"):
        with project_kv(model, make_projectors(condensed, str(rank), blocks=blocks), coordinate):
            if golden_likelihoods(model, task, problems)["step"] >= plain + math.log(share):
                return str(rank)
    return str(d // blocks)


def site_name(site: Site) -> str:
    return f"layer {site[0] + 1} {site[1].upper()}"


def heads(config: Any, model: GPT) -> int:
    """How many projectors a site has: one for each head with --coordinate head, or one for all of them."""
    return model.config.n_kv_head if config.coordinate == "head" else 1


# ---------------------------------------------------------------------------------------------- hooks


def site_module(model: GPT, site: Site, coordinate: str) -> nn.Module:
    """The module whose output is projected at a site; values have no norm and no rotation, so theirs never changes."""
    layer, kind = site
    attention = model.blocks[layer].attn
    if kind == "v":
        return attention.v_proj
    return {"norm": attention.k_norm, "rope": attention.k_out}.get(coordinate, attention.k_proj)


@contextmanager
def hooked(
    model: GPT, sites: list[Site], coordinate: str, act: Callable[[Site, Tensor], Tensor | None]
) -> Iterator[None]:
    """Within this context `act` sees the keys and values of every forward pass, and may replace them."""

    def hook(site: Site, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        return act(site, output)

    handles = [site_module(model, site, coordinate).register_forward_hook(partial(hook, site)) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---------------------------------------------------------------------------------------------- gradients, SVD


def aligned_loss(logits: Tensor, tokens: Tensor, weights: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum of L_align over the examples: logits (B, T, V), tokens and weights (B, T); a weight is 1/|S| on S, else 0.

    --loss results and --loss full are the same sum with another S. The gradient of log p at the logits is one-hot - p.
    It vanishes where the model is sure. A temperature above 1 takes p from softmax(logits / temperature) instead.
    """
    logp = (logits[:, :-1] / temperature).log_softmax(dim=-1)  # (B, T - 1, V)
    logp = logp.gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)  # (B, T - 1)
    return -(logp * weights[:, 1:]).sum()


def capability_gradients(
    model: GPT,
    examples: list[Example],
    sites: list[Site],
    coordinate: str = "linear",
    temperature: float = 1.0,
    batch: int = 64,
) -> dict[Site, Tensor]:
    """dL/dK_t and dL/dV_t at all positions of all examples, stacked: site -> G (M, d).

    One backward pass per batch: no example attends to another, so each row of the gradient of the summed losses
    depends on its own example's loss alone. A batch is smaller where its logits would exceed 2^25 numbers.
    """
    rows: dict[Site, list[Tensor]] = {site: [] for site in sites}
    longest = max(len(example.prompt) + len(example.solution) for example in examples)
    batch = max(1, min(batch, 2**25 // (longest * model.config.vocab_size)))
    for start in inner_bar(range(0, len(examples), batch), "calibration"):
        chunk = examples[start : start + batch]
        lengths = torch.tensor([len(e.prompt) + len(e.solution) for e in chunk])
        tokens = torch.zeros(len(chunk), int(lengths.max()), dtype=torch.long)  # (B, T)
        weights = torch.zeros(tokens.shape)  # 1/|S| on S
        for i, example in enumerate(chunk):
            tokens[i, : lengths[i]] = torch.tensor(example.prompt + example.solution)
            weights[i, [len(example.prompt) + t for t in example.S]] = 1 / len(example.S)
        outputs: dict[Site, Tensor] = {}

        def keep(site: Site, output: Tensor, outputs: dict = outputs) -> Tensor:
            outputs[site] = output if output.requires_grad else output.requires_grad_()  # the base is frozen
            return outputs[site]

        with hooked(model, sites, coordinate, keep):
            logits = model(tokens.to(model.device))
        loss = aligned_loss(logits, tokens.to(model.device), weights.to(model.device), temperature)
        gradients = torch.autograd.grad(loss, [outputs[site] for site in sites])
        real = torch.arange(tokens.size(1)) < lengths[:, None]  # (B, T), no padding
        for site, gradient in zip(sites, gradients, strict=True):
            rows[site].append(gradient.reshape(*tokens.shape, -1).cpu()[real])  # (tokens of the batch, d)
    return {site: torch.cat(parts) for site, parts in rows.items()}


def principal_directions(G: Tensor) -> tuple[Tensor, Tensor]:
    """G = U diag(s) V^T: G (M, d) -> singular values s (min(M, d),), falling, and V (d, min(M, d)), in float64."""
    _, s, Vt = torch.linalg.svd(G.double(), full_matrices=False)
    return s, Vt.T


def projector(V: Tensor, rank: int) -> Tensor:
    """P = V_r V_r^T, the orthogonal projector onto the first r columns of V (d, ...) -> (d, d), float32."""
    return (V[:, :rank] @ V[:, :rank].T).float()


def make_projectors(
    gradients: dict[Site, Tensor], rank: str = "50%", source: str = "gradient", blocks: int = 1, seed: int = 0
) -> dict[Site, Tensor]:
    """site -> P (d, d) from G (M, d); with several blocks it is block-diagonal, one block a head.

    source 'random' takes a random subspace of equal rank.

    UserError where the gradients span fewer directions than the rank asks for: the others would be arbitrary.
    """
    generator = torch.Generator().manual_seed(seed)
    projectors = {}
    for site, G in gradients.items():
        P = []
        for G_head in G.chunk(blocks, dim=1):  # (M, d / blocks)
            d = G_head.size(1)
            r = choose_rank(rank, d)
            if source == "random":
                V = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
            else:
                s, V = principal_directions(G_head)
                spanned = int((s > 1e-6 * s[0]).sum())
                if spanned < r:
                    what = f"the gradients at {site_name(site)} span {spanned} of the {r} directions of --rank {rank}"
                    raise UserError(f"{what}; give a lower rank or a larger --calibration-size")
            P.append(projector(V, r))
        projectors[site] = torch.block_diag(*P)
    return projectors


# ---------------------------------------------------------------------------------------------- projection


@contextmanager
def project_kv(model: GPT, projectors: dict[Site, Tensor], coordinate: str = "linear") -> Iterator[None]:
    """Within this context K <- K P_K and V <- V P_V at the projectors' sites; the model is always restored."""

    def project(site: Site, output: Tensor) -> Tensor:
        return (output.flatten(2) @ projectors[site].to(output)).view_as(output)

    with hooked(model, list(projectors), coordinate, project):
        yield


@torch.no_grad()
def fold(model: GPT, projectors: dict[Site, Tensor]) -> None:
    """Linear-coordinate projectors written into the weights, in place: P (W x + b), so W' = P W and b' = P b.

    No script needs it. It shows that inference under projection costs nothing.
    """
    for site, P in projectors.items():
        linear = site_module(model, site, "linear")
        linear.weight.copy_(P.to(linear.weight) @ linear.weight)
        if linear.bias is not None:
            linear.bias.copy_(P.to(linear.bias) @ linear.bias)


# ---------------------------------------------------------------------------------------------- worked example


def bars(s: Tensor) -> str:
    """One bar per singular value: its share of the first."""
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * share))] for share in (s / s[0].clamp(min=1e-30)).tolist())


def main() -> None:
    from evaluate import answer
    from harness.cli import markdown_table, option, parse_config
    from harness.run import TaskConfig, open_task_and_base, seeded
    from train_spd import SubspaceConfig

    @dataclass(frozen=True)
    class Config(SubspaceConfig, TaskConfig):
        task: str = option("exams", "the problems: exams, arithmetic, steps, gym:NAME[,NAME] or FILE.jsonl")
        domain: str = option("exam", "domain of the calibration set and the prompts")
        temperature: float = option(1.0, "sampling temperature of the answers; 0 is greedy", minimum=1e-3, or_zero=True)

    c = parse_config(Config, "Singular-value spectra, and prompts answered with and without projection.")
    task, model = open_task_and_base(c, c.domain, *c.calibration_domain)
    targets, rows = target_sites(c, model), []
    examples = calibration_set(task, c.calibration_domain or (c.domain,), c.calibration_size, c.loss, c.seed)
    sites = [(layer, kind) for layer in range(model.config.n_layer) for kind in "kv"]
    gradients = capability_gradients(model, examples, sites, c.coordinate, c.calibration_temperature)
    chosen = {site: gradients[site] for site in targets}
    rank = smallest_rank(c.rank, model, task, c.calibration_domain or (c.domain,), chosen, c.coordinate)
    for site, G in gradients.items():
        s, r = principal_directions(G)[0], choose_rank(rank, G.size(1))
        kept = f"{s[:r].square().sum() / s.square().sum():.1%}"
        mark = "projected" if site in targets else ""
        rows.append([site_name(site), bars(s), f"{r} of {len(s)}", kept, mark])
    print(markdown_table(["site", "singular values s_i / s_1", "r", "energy kept", ""], rows))

    P = make_projectors(chosen, rank, c.subspace, heads(c, model), c.seed)
    problems = task.problems(c.domain, 200, random.Random(f"prompt {c.seed}"), test=True)
    for name, active in (("without", {}), ("with", P)):
        with project_kv(model, active, c.coordinate):
            sampling = {"temperature": c.temperature, "generator": seeded("demo", c.seed)}
            answers, verdicts = answer(model, task, problems, **sampling)
        right = sum(verdict.correct for verdict in verdicts)
        print(f"\n{name} projection: {right} of {len(problems)} answers are right; the first three are")
        for problem, text, verdict in list(zip(problems, answers, verdicts, strict=True))[:3]:
            print(f"  {problem.question:12s} {text}  {'right' if verdict.correct else 'wrong'}")


if __name__ == "__main__":
    from harness.cli import run_script

    run_script(main)
