"""Pretrain the base: an "instruct" model in miniature that plays student, teacher and reflector.

    python pretrain.py                                   writes out/base.pt, made as data/base.pt was
    python pretrain.py --check-only --out data/base.pt   measures a checkpoint: the hint audit, and accuracies

Next-token loss on the responses of five kinds of documents (data/documents.py). Muon trains the matrices, in far fewer
updates than AdamW; AdamW trains the embedding, the norms and the first layer's values. Muon spreads a matrix over its
full rank. So the base settles at the end: AdamW alone, with weight decay, leaves room to spare, as in large models,
and makes a step indifferent to what it does not depend on.
"""

import itertools
import math
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer, _muon
from torch.optim.lr_scheduler import LambdaLR

import subspace
from data.arithmetic import Arithmetic, Exams
from data.chains import CHECK_MARK, STEP, right_by_luck, true_steps
from data.documents import confirmation, sample_document
from data.tokenizer import END, VOCAB_SIZE, encode
from errors import UserError
from evaluate import golden_likelihoods
from harness import files
from harness.cli import markdown_table, option, parse_config, run_script
from harness.device import pick_device, slow_in_bfloat16, use_threads
from harness.progress import progress_bar
from harness.run import seeded
from losses import Document, next_token_loss
from model import GPT, GPTConfig, response_logprobs
from reflect import Pair, pair_with_peers, sample_rollouts, token_at, write_reflections


@dataclass(frozen=True)
class Config:
    steps: int = option(3000, "updates, the first half on short problems", minimum=1)
    batch: int = option(64, "documents an update", minimum=1)
    muon_rate: float = option(0.02, "peak learning rate of Muon", minimum=0)
    adamw_rate: float = option(1e-2, "peak learning rate of AdamW", minimum=0)
    weight_decay: float = option(0.1, "weight decay of the matrices", minimum=0)
    value_decay: float = option(0.2, "weight decay of the first layer's values, which AdamW trains", minimum=0)
    settle: int = option(600, "further updates by AdamW alone, which make room for SPD's projection", minimum=0)
    settle_decay: float = option(5.0, "their weight decay of values and outputs of layers 2, 4, ...", minimum=0)
    mlp_decay: float = option(1.5, "their weight decay of the MLPs", minimum=0)
    layers: int = option(4, "layers", minimum=2, maximum=100)
    window: int = option(4, "layers 1, 3, ... see only this many last tokens; 0: all tokens, as the others", minimum=0)
    width: int = option(64, "residual width, a multiple of 8; of four heads", minimum=8, maximum=4096)
    seed: int = option(0, "seed of the weights and the documents", minimum=0)
    out: str = option("out/base.pt", "where the checkpoint goes")
    check_only: bool = option(False, "train nothing, measure the checkpoint at --out")
    device: str = option("auto", "cpu, cuda, mps or auto")


def batches(size: int, rng: random.Random, short: int = 0) -> Iterator[list[Document]]:
    """Batches of documents of similar length: sorting a pool of 8 batches takes the padding from 55 to 13 %.

    The first `short` batches are about problems of one or two operations. There a model learns to copy a hint and to
    compare two digits, for less than half of the time; four of seven bases did not learn one of them without.
    """
    for made in itertools.count(step=8):
        pool = []
        for prompt, response in (sample_document(rng, made < short) for _ in range(8 * size)):
            ended = response[-2:-1] == "#" or response.endswith(">")  # else it was cut off
            pool.append((encode(prompt), encode(response) + [END] * ended))
        pool.sort(key=lambda document: len(document[0]) + len(document[1]))
        chunks = [pool[start : start + size] for start in range(0, len(pool), size)]
        rng.shuffle(chunks)
        yield from chunks


def schedule(step: int, steps: int, warmup: int = 20) -> float:
    """Share of the peak learning rate: linear warm-up, flat, then linear to almost 0 over the last 60 %."""
    return min((step + 1) / warmup, 1.0, 0.01 + (steps - step) / (0.6 * steps))


def newton_schulz(G: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Muon's update direction in float32: G (out, in) with its singular values driven to about 1."""
    a, b, c = coefficients
    X = (G.T if G.size(0) > G.size(1) else G) / G.norm().clamp(min=eps)
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if G.size(0) > G.size(1) else X


def pretrain(config: Config) -> GPT:
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    if slow_in_bfloat16(device):
        _muon._zeropower_via_newtonschulz = newton_schulz  # PyTorch's computes in bfloat16, ten times slower there
    width, layers = config.width, {"n_layer": config.layers, "window": config.window}
    heads = {"n_head": 4, "n_kv_head": 4, "head_dim": width // 4}
    model = GPT(GPTConfig(VOCAB_SIZE, n_embd=width, n_hidden=3 * width, **layers, **heads)).to(device)
    decayed = [model.blocks[0].attn.v_proj.weight]
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and not any(p is other for other in decayed)]
    others = [model.embed.weight, *(p for p in model.parameters() if p.ndim == 1)]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": config.value_decay}]
    optimizers = [
        torch.optim.Muon(matrices, lr=config.muon_rate, weight_decay=config.weight_decay),
        torch.optim.AdamW(groups, lr=config.adamw_rate, betas=(0.9, 0.95)),
    ]
    documents = batches(config.batch, random.Random(config.seed), config.steps // 2)
    return train(model, optimizers, config.steps, documents, "pretrain")


def settle(model: GPT, config: Config) -> GPT:
    """AdamW alone, with a weight decay that is strong on values and outputs of layers that see all tokens, and on MLPs.

    What these layers pass on then lies mostly in 14 to 22 of 64 directions, so that a small subspace can hold it. And a
    step becomes indifferent to the marks, on which it does not depend: otherwise its gradients hold their directions.
    """
    attention = [block.attn for block in model.blocks[1::2]]
    strong = [w for each in attention for w in (each.v_proj.weight, each.o_proj.weight)]
    medium = [w for block in model.blocks for w in block.mlp.parameters()]
    weak = [p for p in model.blocks.parameters() if p.ndim == 2 and not any(p is other for other in strong + medium)]
    others = [model.embed.weight, *(p for p in model.parameters() if p.ndim == 1)]
    decays = (others, 0.0), (weak, config.weight_decay), (medium, config.mlp_decay), (strong, config.settle_decay)
    groups = [{"params": parameters, "weight_decay": decay} for parameters, decay in decays]
    optimizer = torch.optim.AdamW(groups, lr=0.3 * config.adamw_rate, betas=(0.9, 0.95))
    documents = batches(config.batch, random.Random(f"settle {config.seed}"))
    return train(model, [optimizer], config.settle, documents, "settle")


def train(model: GPT, optimizers: list[Optimizer], count: int, documents: Iterator[list[Document]], label: str) -> GPT:
    """Make so many updates, a batch of documents each -> the model, in place."""
    rates = [LambdaLR(optimizer, lambda step: schedule(step, count)) for optimizer in optimizers]
    steps = progress_bar(range(count), label)
    for step, batch in zip(steps, documents, strict=False):
        loss = next_token_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in (*optimizers, *rates):
            each.step()
        model.zero_grad()
        if step % 20 == 0:
            if not loss.isfinite():
                raise UserError(f"the loss of step {step} is {loss.item()}; try a lower --muon-rate or --adamw-rate")
            steps.set_postfix_str(f"loss {loss.item():.3f}")
    return model.eval()


# ---------------------------------------------------------------------------------------------- measuring a base

GATES = {  # what a base must show: (lowest, highest) probability of a digit at the wrong step, and a share
    "no hint": (0.0, 0.40),
    "an irrelevant hint": (0.0, 0.48),
    "its own reflection": (0.75, 1.0),
    "the true step": (0.85, 1.0),
    "the true step with a wrong digit": (0.0, 0.25),
    "... and of that wrong digit": (0.70, 1.0),
    "first error quoted": (0.80, 1.0),
}
NEAR = [  # pairs of rows that may not be further apart
    ("an irrelevant hint", "no hint", 0.08),
    ("a check behind it, given the true step", "a check behind it, given no hint", 0.05),
]


def check_places(text: str, start: int) -> list[int]:
    """Where a step could be doubted: behind the result of every line but the checks, from `start` on."""
    lines = re.finditer(rf"(?<![^;])(?<!\{CHECK_MARK};)[^;]*=\d(?=[;{CHECK_MARK}])", text)
    return [line.end() for line in lines if line.start() >= start]


@torch.no_grad()
def audit(model: GPT, domain: str = "mix", count: int = 96, seed: int = 0) -> dict[str, float]:
    """The hint audit: how likely the right digit is at the wrong step of the base's own wrong rollouts, by hint.

    Takes the rollouts on test problems whose first error is the result of a step. Nothing is generated after a hint:
    each hint is put before the same rollout, which is read up to the wrong digit. Beside the digits stands how likely
    a check is behind the wrong step: there a teacher has no habit that the others do not have, or else a student
    learns it from the very tokens it is corrected on, and no mask helps. A peer that is right by luck has a wrong step
    itself and misleads any reflector: such pairs are left out. Empty for a model that has no group with a right and a
    wrong rollout.
    """
    task, rng = Arithmetic(), random.Random(f"audit {domain} {seed}")
    problems = task.problems(domain, count, rng, test=True)
    rollouts = sample_rollouts(model, task, problems, 8, seeded("audit", domain, seed))
    wrong = [pair for pair in pair_with_peers(rollouts, 8) if pair.peer and pair.y.verdict.error]
    lucky = sum(right_by_luck(pair.peer.text) for pair in wrong) / max(1, len(wrong))
    wrong = [pair for pair in wrong if not right_by_luck(pair.peer.text)]
    right = [y for y in rollouts if y.verdict.correct and "merged" not in y.verdict.habits]
    right = [y for y in right if not right_by_luck(y.text)][:256]
    if not wrong or not right:
        return {}
    reflections = write_reflections(model, task, wrong)
    confirmations = write_reflections(model, task, [Pair(y, None, 0.0) for y in right])

    cases = []  # tokens of a rollout, its wrong digit's position, the right and another digit, the teacher's prompts
    for reflection, (attempt, *_) in zip(reflections, wrong, strict=True):
        problem, (start, end) = attempt.problem, attempt.verdict.error
        steps, line = true_steps(problem.question), attempt.text[start:end]
        true = next((step for step in steps if STEP.fullmatch(line) and step[:-1] == line[:-1]), None)
        if true is None:
            continue
        until = ";".join(steps[: steps.index(true) + 1])
        other_step = rng.choice([step for step in steps if step != true] or ["#"])
        other_digit = rng.choice([digit for digit in "0123456789" if digit != true[-1]])
        hints = {"an irrelevant hint": other_step, "its own reflection": reflection.idea or "#", "the true step": until}
        hints["the true step with a wrong digit"] = until[:-1] + other_digit
        prompts = {"no hint": task.prompt(problem)}
        prompts |= {name: task.prompt(problem, hint) for name, hint in hints.items()}
        prompts["a reference solution"] = task.prompt(problem, solution=problem.solution)
        pieces = task.pieces(attempt.tokens)  # a tag is one token of several characters
        at, behind = token_at(end - 1, pieces), [token_at(x, pieces) for x in check_places(attempt.text, start)]
        cases.append((attempt.tokens, at, encode(true[-1])[0], encode(other_digit)[0], behind, prompts))

    if not cases:
        return {}
    tokens, at, right_digits, other_digits, behind, prompts = map(list, zip(*cases, strict=True))
    found, checks, each, check = {}, {}, range(len(cases)), encode(CHECK_MARK)[0]
    for name in prompts[0]:
        p = response_logprobs(model, [encode(of_case[name]) for of_case in prompts], tokens).exp()  # (cases, T, V)
        found[name] = p[each, at, right_digits].mean().item()
        if name == "the true step with a wrong digit":
            found["... and of that wrong digit"] = p[each, at, other_digits].mean().item()
        likely = [p[i, t, check].item() for i in each for t in behind[i]]
        checks[name] = sum(likely) / max(1, len(likely))
    found |= {f"a check behind it, given {name}": checks[name] for name in ("no hint", "the true step")}
    quoted = [q.quote == r.text[slice(*r.verdict.error)] for q, (r, *_) in zip(reflections, wrong, strict=True)]
    confirmed = [c.idea == confirmation(r.problem.question) for c, r in zip(confirmations, right, strict=True)]
    found |= {"first error quoted": sum(quoted) / len(quoted), "correct step confirmed": sum(confirmed) / len(right)}
    found |= {"peers right by luck": lucky}
    return found | {"right answers": sum(r.verdict.correct for r in rollouts) / len(rollouts)}


def missed_gates(found: dict[str, float]) -> list[str]:
    missed = [name for name, (low, high) in GATES.items() if not low <= found[name] <= high]
    for name, other, most in NEAR:
        missed += [f"{name} is not within {most} of {other}"] * (abs(found[name] - found[other]) > most)
    return missed


ROOM = {  # where a subspace of SPD's rank comes from: loss and source, gates of whole steps and of checks
    "aligned loss": ("steps", "gradient", (0.7, 1.2), (0.0, 0.7)),
    "full-sequence loss": ("full", "gradient", (0.5, 1.2), (0.7, 1.2)),
    "random": ("steps", "random", (0.0, 0.2), (0.0, 1.2)),
}


def room(model: GPT, count: int = 96, seed: int = 0) -> dict[str, tuple[float, float, float]]:
    """What SPD's projection of the values of layers floor(L/2) and L leaves of right digits, whole steps and checks.

    Shares of the unprojected probabilities, on golden solutions of nervous exam problems, by the subspace's source. The
    rank is the one that SPD would take with the aligned loss.
    """
    task, sites = Exams(), [(layer, "v") for layer in subspace.target_layers("paper", model.config.n_layer)]
    problems, found = task.problems("exam", count, random.Random(f"room {seed}")), {}
    plain, rank = golden_likelihoods(model, task, problems), subspace.RANK
    for name, (loss, source, *_) in ROOM.items():
        examples = subspace.calibration_set(task, ("exam",), 500, loss, seed)
        G = subspace.capability_gradients(model, examples, sites, temperature=subspace.TEMPERATURE)
        rank = subspace.smallest_rank(rank, model, task, ("exam",), G)  # a number from the first time on
        P = subspace.make_projectors(G, rank, source)
        with subspace.project_kv(model, P):
            left = golden_likelihoods(model, task, problems)
        right, step = (math.exp(left[each] - plain[each]) for each in ("right", "step"))
        found[name] = right, step, left["check"] / plain["check"]
    return found


def missed_room(left: dict[str, tuple[float, float, float]]) -> list[str]:
    missed = []
    for name, (_, *shares) in left.items():
        for what, share, (low, high) in zip(("steps", "checks"), shares, ROOM[name][2:], strict=True):
            missed += [f"{what} left under projection, {name}"] * (not low <= share <= high)
    return missed


def report(model: GPT) -> None:
    """Print the hint audit of every domain, whose gates are about mix, and what is left under projection."""
    task = Arithmetic()
    found = {domain: rows for domain in task.domains if (rows := audit(model, domain))}
    if "mix" not in found:
        print("No group of rollouts on mix has a right and a wrong one: there is nothing to audit.")
        return
    limits = {name: f"{low:.2f} to {high:.2f}" for name, (low, high) in GATES.items()}
    for name, other, most in NEAR:
        limits[name] = f"{limits.get(name, '')}, {most} from {other.rpartition('given ')[2]}".removeprefix(", ")
    rows = [[name, *(f"{f[name]:.2f}" for f in found.values()), limits.get(name, "")] for name in found["mix"]]
    print(markdown_table(["P(right digit) at the wrong step, given", *found, "gate for mix"], rows))
    missed, left, rows = missed_gates(found["mix"]), room(model), []
    print("All gates hold." if not missed else f"Missed: {', '.join(missed)}.")
    for name, (right, *shares) in left.items():
        cells = [f"{share:.2f} ({low} to {high})" for share, (low, high) in zip(shares, ROOM[name][2:], strict=True)]
        rows.append([name, f"{right:.2f}", *cells])
    header = ["left under projection", "right digits", "whole steps (gate)", "checks (gate)"]
    print(f"\n{markdown_table(header, rows)}")
    missed = missed_room(left)
    print("All gates hold." if not missed else f"Missed, so SPD will not help this base: {', '.join(missed)}.")


def main() -> None:
    config = parse_config(Config, __doc__)
    if config.width % 8:
        raise UserError(f"--width {config.width} does not go into four heads of even width; give a multiple of 8")
    use_threads()
    if not config.check_only:
        files.make_folder(Path(config.out).resolve().parent)
        started = time.time()
        model = pretrain(config)
        if config.settle:
            model = settle(model, config)
        files.save_checkpoint(Path(config.out), model.half())
        count = sum(p.numel() for p in model.parameters())
        print(f"{count:,} parameters, {time.time() - started:.0f} s -> {config.out}")
    report(files.load_checkpoint(config.out))


if __name__ == "__main__":
    run_script(main)
