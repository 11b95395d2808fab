"""SPD, Self-Policy Distillation by capability-selective subspace projection (arXiv 2605.22675), in one file.

    python train_spd.py                        SPD, then plain self-retraining (PSR) and SSD, then the table of all
    python train_spd.py --loss full            subspace from the loss of the whole sequence
    python train_spd.py --subspace random      a random subspace of the same rank: the control the paper lacks

No teacher, no verifier, no reward: (1) calibrate: SVD of the gradients of the correctness-aligned loss gives a subspace
of keys and values; (2) generate one raw completion a training prompt with keys and values projected into it; (3) remove
the projection and fine-tune the original weights on prompt + completion. Nothing is filtered, inference is unprojected.
"""

import math
import random
import time
import zlib
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import runs
from data.arithmetic import BUDGET, DOMAINS, make_problem
from data.documents import plain_prompt
from data.tokenizer import END, encode
from evaluate import evaluate
from lora import add_lora, merge_lora
from model import GPT, generate
from runs import option
from subspace import (
    COORDINATES,
    Place,
    calibration_set,
    capability_gradients,
    choose_rank,
    make_projectors,
    place_width,
    project_kv,
    target_layers,
)

Pair = tuple[list[int], list[int]]  # prompt and completion tokens

METHODS = {  # name: (project while generating, sampling temperature)
    "spd": (True, 0.6),
    "psr": (False, 1.0),  # plain self-retraining, on samples as they come
    "ssd": (False, 0.6),  # simple self-distillation: shifted temperature (and --top-k, --top-p); else like spd
}


@dataclass(frozen=True)
class Config:
    method: str = option("spd", "what to train", choices=tuple(METHODS))
    domain: str = option("add", "domain of the training prompts", choices=tuple(DOMAINS))
    calibration_domain: tuple[str, ...] = option(
        (), "domains of the calibration set; none means the training domain", choices=tuple(DOMAINS)
    )
    calibration_size: int = option(200, "calibration examples, N_cal", "20 to 500", minimum=1)
    loss: str = option("aligned", "calibration loss: on S, or on the full sequence", "aligned", ("aligned", "full"))
    subspace: str = option("gradient", "where the subspace comes from", "gradient", ("gradient", "random"))
    layers: str = option("3", "target layers: paper, last, all, or numbers counted from 1 like 3,4", "floor(L/2) and L")
    rank: str = option("20", "rank of the projectors, of 32: a number, a share like 50%, or energy:0.99", "50%")
    project: str = option("kv", "what is projected", "kv", ("kv", "k", "v"))
    coordinate: str = option("linear", "where the projector acts", "not stated", COORDINATES)
    temperature: float = option(
        0.0, "sampling temperature of the completions; 0 takes the method's", "not stated", minimum=0
    )
    top_k: int = option(0, "truncated sampling: keep so many tokens; 0 keeps all", minimum=0)
    top_p: float = option(1.0, "truncated sampling: keep this much probability", minimum=0.01, maximum=1)
    prompts: int = option(2000, "training prompts, one completion each", minimum=1)
    rounds: int = option(1, "times to calibrate, generate and fine-tune", "1", minimum=1)
    finetune: str = option("lora", "what is trained", "lora", ("lora", "full"))
    lora_rank: int = option(8, "rank of the updates", "8", minimum=1)
    lora_alpha: float = option(8.0, "scale of the updates times their rank", "8")
    lora_dropout: float = option(0.05, "dropout before the updates", "0.05", minimum=0, maximum=1)
    completion_only: bool = option(False, "take the loss on the completion alone", "no")
    epochs: int = option(5, "passes over the completions; 0 stops at the generation", "5", minimum=0)
    batch: int = option(64, "completions an update", minimum=1)
    learning_rate: float = option(3e-3, "peak learning rate of AdamW, cosine to 0", "1e-5", minimum=0)
    weight_decay: float = option(0.01, "weight decay of AdamW", "0.01", minimum=0)
    seed: int = option(0, "seed of everything random", "42")
    base: str = option(str(runs.BASE_CHECKPOINT), "checkpoint to start from")
    out: str = option("out", "folder for runs")
    baseline: bool = option(True, "train PSR and SSD afterwards, for the table")
    eval_problems: int = option(64, "test problems a domain", minimum=1)
    eval_samples: int = option(16, "samples a test problem", minimum=1)
    resume: bool = option(False, "go on from the last checkpoint of the same command")
    device: str = option("auto", "cpu, cuda, mps or auto")
    threads: int = option(0, "CPU threads; 0 leaves it to torch", minimum=0)


def calibrate(model: GPT, config: Config) -> dict[Place, torch.Tensor]:
    """Phase 1: the projectors P_K, P_V of every target layer."""
    examples = calibration_set(config.calibration_domain or (config.domain,), config.calibration_size, config.seed)
    layers = target_layers(config.layers, model.config.n_layer)
    places = [(layer, kind) for layer in layers for kind in config.project]
    gradients = capability_gradients(model, examples, places, config.loss, config.coordinate)
    return make_projectors(
        gradients, config.rank, config.coordinate, model.config.n_kv_head, config.subspace, config.seed
    )


def self_generate(model: GPT, config: Config, round: int) -> list[Pair]:
    """Phase 2: one raw completion a training prompt, nothing filtered -> (prompt, completion) tokens."""
    rng = random.Random(f"prompts {config.seed} {round}")
    prompts = [encode(plain_prompt(make_problem(config.domain, rng))) for _ in range(config.prompts)]
    generator = runs.torch_generator("completion", config.seed, round)
    completions = generate(
        model, prompts, BUDGET, END, 1, sampling_temperature(config), config.top_k, config.top_p, generator
    )
    return list(zip(prompts, completions, strict=True))


def next_token_loss(model: GPT, pairs: list[Pair], completion_only: bool) -> torch.Tensor:
    """Mean next-token loss over prompt + completion, or over the completion alone."""
    width = max(len(prompt) + len(completion) for prompt, completion in pairs)
    tokens = torch.full((len(pairs), width), END)  # (B, T)
    targets = torch.full((len(pairs), width), -100)
    for i, (prompt, completion) in enumerate(pairs):
        row = torch.tensor(prompt + completion)
        first = len(prompt) if completion_only else 0
        tokens[i, : len(row)] = row
        targets[i, first : len(row)] = row[first:]
    logits = model(tokens[:, :-1].to(model.device))  # (B, T - 1, V)
    return F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten().to(model.device), ignore_index=-100)


def finetune(model: GPT, state: dict, config: Config, save: Callable[[], None]) -> None:
    """Phase 3: fine-tune the unprojected weights on state["pairs"], from state["epoch"] on; every epoch is saved."""
    key = f"{config.seed} {len(state['rounds'])}"
    torch.manual_seed(zlib.crc32(key.encode()))
    trained = list(model.parameters())
    if config.finetune == "lora":
        trained = add_lora(model, config.lora_rank, config.lora_alpha, config.lora_dropout)
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    if state["epoch"] > 0:
        optimizer.load_state_dict(state["optimizer"])
        for parameter, saved in zip(trained, state["trained"], strict=True):
            parameter.data.copy_(saved)
    updates = math.ceil(len(state["pairs"]) / config.batch)  # an epoch
    model.train()
    for epoch in range(state["epoch"], config.epochs):
        torch.manual_seed(zlib.crc32(f"{key} {epoch}".encode()))  # of dropout
        order = random.Random(f"order {key} {epoch}").sample(state["pairs"], len(state["pairs"]))
        progress = tqdm(range(updates), desc=f"{config.method}: fine-tune, epoch {epoch + 1} of {config.epochs}")
        for update in progress:
            done = (epoch * updates + update) / (config.epochs * updates)
            optimizer.param_groups[0]["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
            pairs = order[update * config.batch : (update + 1) * config.batch]
            loss = next_token_loss(model, pairs, config.completion_only)
            if not loss.isfinite():
                raise runs.UserError(f"the loss is {loss.item()} in epoch {epoch + 1}; try a lower --learning-rate")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            state["losses"].append(loss.item())
            progress.set_postfix(loss=f"{loss.item():.3f}")
        state |= {"epoch": epoch + 1, "optimizer": optimizer.state_dict(), "trained": [p.detach() for p in trained]}
        save()
    model.eval()
    if config.finetune == "lora":
        merge_lora(model)


def train(config: Config, before: dict | None = None) -> dict:
    """One run: evaluate the base, then calibrate, generate and fine-tune, evaluate again."""
    started, device = time.time(), runs.pick_device(config.device)
    model = runs.load_checkpoint(config.base)[0].to(device).eval()
    choose_rank(config.rank, torch.ones(place_width(model, config.coordinate)))  # a bad one is told before any work
    target_layers(config.layers, model.config.n_layer)
    folder = runs.make_folder(Path(config.out) / runs.run_name(config))
    if results := runs.finished(folder, config):
        return results
    projected, temperature = METHODS[config.method][0], sampling_temperature(config)
    sampling = {"temperature": temperature, "top_k": config.top_k, "top_p": config.top_p}
    scale = {"problems": config.eval_problems, "samples": config.eval_samples, "seed": config.seed}
    state_file, state = folder / "state.pt", {"rounds": [], "pairs": None, "epoch": 0, "losses": [], "seconds": 0.0}
    if config.resume and state_file.exists():
        model, state = runs.load_checkpoint(state_file)
        runs.same_config(state["settings"], config, state_file)
        model = model.to(device).eval()
    spent = state["seconds"]
    state.setdefault("settings", asdict(config))
    domains = tuple(DOMAINS) if config.epochs else ()  # without fine-tuning there is no before and after
    if "before" not in state:
        state["before"] = before or evaluate(model, domains, **scale)
    if "own" not in state:  # the base's own generation, at the temperature of this method
        state["own"] = evaluate(model, (config.domain,), **scale, **sampling)

    def save(start: GPT) -> None:
        state["seconds"] = spent + time.time() - started
        runs.save_checkpoint(state_file, start, **state)

    while len(state["rounds"]) < config.rounds:
        if state["pairs"] is None:
            projectors = calibrate(model, config) if projected else {}
            with project_kv(model, projectors, config.coordinate):
                state["generation"] = evaluate(model, (config.domain,), **scale, **sampling)
                state["pairs"] = self_generate(model, config, len(state["rounds"]))
        save_round = partial(save, deepcopy(model))  # with the weights this round began with
        save_round()
        finetune(model, state, config, save_round)
        state["rounds"].append({"generation": state["generation"], "losses": state["losses"]})
        state |= {"pairs": None, "epoch": 0, "losses": []}

    results = {
        "name": folder.name,
        "config": asdict(config),
        **runs.provenance(),
        "before": state["before"],
        "own_generation": state["own"],
        "rounds": [{**entry, "losses": entry["losses"][:1] + entry["losses"][-1:]} for entry in state["rounds"]],
        "after": evaluate(model, domains, **scale),
        "seconds": spent + time.time() - started,
        "peak_memory_mb": runs.peak_memory_mb(),
    }
    lines = [
        {"round": i, "update": j, "loss": x} for i, r in enumerate(state["rounds"]) for j, x in enumerate(r["losses"])
    ]
    runs.write_lines(folder / "metrics.jsonl", lines)
    runs.save_checkpoint(folder / "model.pt", model)
    runs.write_json(folder / "results.json", results)
    state_file.unlink(missing_ok=True)
    return results


def sampling_temperature(config: Config) -> float:
    return config.temperature or METHODS[config.method][1]


def main() -> None:
    config = runs.parse_config(Config, __doc__)
    if config.threads:
        torch.set_num_threads(config.threads)
    results = [train(config)]
    if config.baseline:
        for method in METHODS:
            if method != config.method:
                results.append(train(replace(config, method=method, temperature=0.0), results[0]["before"]))
    rows = []
    for result in results:
        stages = {"base": result["before"], "base, at its temperature": result["own_generation"]}
        stages |= {"with its projection": result["rounds"][0]["generation"], "trained": result["after"]}
        for stage, scores in [(stage, scores) for stage, scores in stages.items() if scores]:
            cells = [f"{100 * scores[domain]['mean']:.1f}" if domain in scores else "" for domain in DOMAINS]
            rows.append([result["name"], stage, *cells])
    print(runs.markdown_table(["run", f"mean@{config.eval_samples}, %", *DOMAINS], rows))


if __name__ == "__main__":
    runs.run_script(main, "Stopped. The same command with --resume goes on from the last checkpoint.")
