"""Pretrain the base: an "instruct" model in miniature that plays student, teacher and reflector.

    python pretrain.py                 rebuilds data/base.pt, the checkpoint that ships with this repository
    python pretrain.py --check-only    only measures the accuracies of the checkpoint at --out
    python pretrain.py --world gaps --start data/base.pt --steps 1000 --out data/gaps.pt
                                       teaches it a second world, the one in which localization matters

    torchrun --standalone --nproc_per_node=2 pretrain.py    the same in two processes

Next-token loss on the responses of four kinds of documents (data/documents.py). Muon trains the matrices, with
which it needs far fewer updates than AdamW; AdamW trains the embedding and the norms.
"""

import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import parallel
import runs
from data.arithmetic import BUDGET, GAP, golden_solution, true_steps, verify
from data.documents import WORLDS, World, hint_prompt, sample_document, solution_prompt
from data.tokenizer import END, VOCAB_SIZE, decode, encode
from evaluate import held_out_problems
from model import GPT, GPTConfig, generate
from reflect import choose_peers, reflect, sample_rollouts
from runs import option

Document = tuple[list[int], list[int]]  # prompt and response tokens


@dataclass(frozen=True)
class Config:
    world: str = option("plain", "which documents: those of a world of data/documents.py", choices=tuple(WORLDS))
    start: str = option("", "checkpoint to start from, with its shape; without one the weights are random")
    steps: int = option(2000, "updates", minimum=1)
    batch: int = option(64, "documents an update", minimum=1)
    muon_rate: float = option(0.02, "peak learning rate of Muon", minimum=0)
    adamw_rate: float = option(1e-2, "peak learning rate of AdamW", minimum=0)
    weight_decay: float = option(0.1, "weight decay of the matrices", minimum=0)
    layers: int = option(4, "layers", minimum=2)
    width: int = option(64, "residual width", minimum=8)
    heads: int = option(4, "query heads", minimum=1)
    kv_heads: int = option(2, "key/value heads", minimum=1)
    head_dim: int = option(16, "width of a head", minimum=2)
    seed: int = option(0, "seed of the weights and the documents")
    out: str = option(str(runs.BASE_CHECKPOINT), "where the checkpoint goes")
    check_only: bool = option(False, "train nothing, measure the checkpoint at --out")
    device: str = option("auto", "cpu, cuda, mps or auto")
    threads: int = option(0, "CPU threads; 0 leaves it to torch", minimum=0)


def batches(size: int, rng: random.Random, world: World = WORLDS["plain"]) -> Iterator[list[Document]]:
    """Batches of documents of similar length: sorting a pool of 8 batches takes the padding from 55 to 13 %."""
    while True:
        pool = []
        for prompt, response in (sample_document(rng, world) for _ in range(8 * size)):
            cut_off = len(response) == BUDGET and response[-2] != "#"
            pool.append((encode(prompt), encode(response) + [END] * (not cut_off)))
        pool.sort(key=lambda document: len(document[0]) + len(document[1]))
        chunks = [pool[start : start + size] for start in range(0, len(pool), size)]
        rng.shuffle(chunks)
        yield from chunks


def next_token_loss(model: GPT, pairs: list[Document], completion_only: bool = True) -> torch.Tensor:
    """Mean next-token loss over the completions of (prompt, completion) pairs, or over both.

    Of several processes each has a share of the pairs; the mean is over the tokens of all, and so their losses add up.
    """
    width = max(len(prompt) + len(completion) for prompt, completion in pairs)
    tokens, targets = torch.full((len(pairs), width), END), torch.full((len(pairs), width), -100)  # (B, T)
    for i, (prompt, completion) in enumerate(pairs):
        row = torch.tensor(prompt + completion)
        first = len(prompt) if completion_only else 0
        tokens[i, : len(row)] = row
        targets[i, first : len(row)] = row[first:]
    logits = model(tokens[:, :-1].to(model.device))  # (B, T - 1, V)
    targets = targets[:, 1:].flatten().to(model.device)
    count = parallel.total((targets != -100).sum())
    return F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-100, reduction="sum") / count


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz: U V^T of each matrix U S V^T of a stack (n, A, B), but for singular values of about 0.7 to 1.2."""
    tall = matrices.size(1) > matrices.size(2)
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


class Muon(torch.optim.Muon):
    """torch.optim.Muon, all matrices of one shape at once: the same numbers, three times as fast for small ones."""

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        by_shape = defaultdict(list)
        for matrix in group["params"]:
            by_shape[matrix.shape].append(matrix)
        for (rows, columns), matrices in by_shape.items():
            grads = torch.stack([matrix.grad for matrix in matrices])  # (n, rows, columns)
            momentum = self.state[matrices[0]].setdefault("momentum", torch.zeros_like(grads))
            momentum.lerp_(grads, 1 - group["momentum"])
            updates = orthogonalize(grads.lerp(momentum, group["momentum"]))
            for matrix, update in zip(matrices, updates, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def schedule(step: int, steps: int, warmup: int = 20) -> float:
    """Share of the peak learning rate: linear warm-up, flat, then linear to almost 0 over the last 60 %."""
    return min((step + 1) / warmup, 1.0, 0.01 + (steps - step) / (0.6 * steps))


def pretrain(config: Config) -> GPT:
    torch.manual_seed(config.seed)
    shape = GPTConfig(
        VOCAB_SIZE,
        n_layer=config.layers,
        n_embd=config.width,
        n_head=config.heads,
        n_kv_head=config.kv_heads,
        head_dim=config.head_dim,
        n_hidden=3 * config.width,
    )
    device = parallel.start(runs.pick_device(config.device))
    model = (runs.load_checkpoint(config.start)[0] if config.start else GPT(shape)).to(device)
    matrices = [p for block in model.blocks for p in block.parameters() if p.ndim == 2]
    others = [model.embed.weight, *(p for p in model.parameters() if p.ndim == 1)]
    optimizers = [
        Muon(matrices, lr=config.muon_rate, weight_decay=config.weight_decay),
        torch.optim.AdamW(others, lr=config.adamw_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [config.muon_rate, config.adamw_rate]
    documents = batches(config.batch, random.Random(config.seed), WORLDS[config.world])
    progress = tqdm(
        zip(range(config.steps), documents, strict=False),
        total=config.steps,
        desc="pretrain",
        disable=not parallel.FIRST,
        dynamic_ncols=True,
    )
    for step, batch in progress:
        loss = next_token_loss(model, parallel.share(batch))
        loss.backward()
        parallel.sum_gradients(model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * schedule(step, config.steps)
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{parallel.total(loss).item():.3f}")
    return model.eval()


def measure(model: GPT, domain: str = "mix", count: int = 200, seed: int = 0) -> dict[str, float]:
    """Accuracy in every part the model plays, on test problems: solutions at temperature 1, reflections greedy."""
    problems, rng = held_out_problems(domain, count, seed), random.Random(seed)
    group = 8
    rollouts = sample_rollouts(model, problems, group, runs.torch_generator("measure plain", seed))

    def accuracy(part: str, prompts: list[str]) -> float:
        generator = runs.torch_generator("measure", part, seed)
        solutions = map(decode, generate(model, [encode(p) for p in prompts], BUDGET, END, generator=generator))
        return sum(verify(p, s).correct for p, s in zip(problems, solutions, strict=True)) / count

    def hint(problem: str) -> str:  # that of a gap tells what it hides
        return true_steps(problem)[-1] if GAP in problem else rng.choice(true_steps(problem))

    peers = choose_peers(rollouts, group)
    wrong = [(r, peer.text) for r, peer in zip(rollouts, peers, strict=True) if peer and r.verdict.error]
    reflections = reflect(model, [rollout for rollout, _ in wrong], [peer for _, peer in wrong])
    exact = sum(
        reflection.quote == rollout.text[slice(*rollout.verdict.error)]
        for (rollout, _), reflection in zip(wrong, reflections, strict=True)
    )
    return {
        "plain": sum(rollout.verdict.correct for rollout in rollouts) / len(rollouts),
        "with a hint": accuracy("hint", [hint_prompt(p, hint(p)) for p in problems]),
        "with a reference": accuracy("reference", [solution_prompt(p, golden_solution(p)) for p in problems]),
        "first error quoted": exact / max(1, len(wrong)),
    }


def main() -> None:
    config = runs.parse_config(Config, __doc__)
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.check_only:
        model = runs.load_checkpoint(config.out)[0]
    else:
        if (config.start or config.world != "plain") and Path(config.out).resolve() == runs.BASE_CHECKPOINT:
            raise runs.UserError(f"that would overwrite the shipped {config.out}; give another file with --out")
        runs.make_folder(Path(config.out).resolve().parent)
        started = time.time()
        model = pretrain(config)
        if not parallel.FIRST:
            return
        runs.save_checkpoint(Path(config.out), model)
        print(
            f"{sum(p.numel() for p in model.parameters()):,} parameters, {time.time() - started:.0f} s -> {config.out}"
        )
    for domain in dict.fromkeys(WORLDS[config.world].domains):
        print(domain, {part: round(value, 3) for part, value in measure(model, domain).items()})


if __name__ == "__main__":
    runs.run_script(main)
