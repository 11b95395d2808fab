"""SPD, Self-Policy Distillation by capability-selective subspace projection (arXiv 2605.22675), in one file.

    python train_spd.py                        SPD, then plain self-retraining (PSR) and SSD, then the table of all
    python train_spd.py --loss full            subspace from the loss of the whole sequence
    python train_spd.py --subspace random      a random subspace of the same rank: the control the paper lacks

No teacher, no verifier, no reward:

    1. calibrate (subspace.py)      G = dL_align/dK and dL_align/dV, G = U diag(s) V^T, P = V_r V_r^T
    2. generate                     y ~ p(. | x) with K <- K P_K, V <- V P_V: one raw completion a prompt, none filtered
    3. fine-tune, unprojected       -sum_t log p(y_t | x, y_<t) over A and B of W + (alpha/r) B A (lora.py)

The paper has the loss of 3 on x as well; --help says why it is left out here. Inference is unprojected.

Generated without a projector this is SSD. What the shipped base writes is right, or it stalls:

>>> from data.tokenizer import decode
>>> base = runs.load_checkpoint(runs.BASE_CHECKPOINT)[0]
>>> for prompt, completion in self_generate(base, Config(prompts=3), round=0):
...     print(decode(prompt + completion))
<|user|>5+2+5+6+4<|assistant|>5+2=7;7+5=2;2+6=8;8+4=2;#2
<|user|>3+4+1+1+7<|assistant|>3+4=7;7+1=8;8+1=9;?8+1=9;?8+1=9;?8+1=9;?8+1=9;?8
<|user|>3+8+4+6+4<|assistant|>3+8=1;1+4=5;5+6=1;1+4=5;#5
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
from tqdm import tqdm

import parallel
import runs
from data.arithmetic import BUDGET, DOMAINS, make_problem
from data.documents import plain_prompt
from data.tokenizer import END, encode
from evaluate import evaluate
from lora import add_lora, merge_lora
from model import GPT, generate
from pretrain import next_token_loss
from runs import option
from subspace import (
    COORDINATES,
    LOSSES,
    calibrate,
    calibration_set,
    choose_rank,
    place_width,
    project_kv,
    target_layers,
)

Pair = tuple[list[int], list[int]]  # prompt and completion tokens

METHODS = {  # name: (project while generating, sampling temperature)
    "spd": (True, 0.0),
    "psr": (False, 1.0),  # plain self-retraining, on samples as they come
    "ssd": (False, 0.0),  # simple self-distillation: shifted temperature (and --top-k, --top-p); else like spd
}


@dataclass(frozen=True)
class Config:
    method: str = option("spd", "what to train", choices=tuple(METHODS))
    domain: str = option("add", "domain of the training prompts", choices=tuple(DOMAINS))
    calibration_domain: tuple[str, ...] = option(
        (), "domains of the calibration set; none means the training domain", choices=tuple(DOMAINS)
    )
    calibration_size: int = option(500, "calibration examples, N_cal", "20 to 500", minimum=1)
    loss: str = option("aligned", "calibration loss: on results, on whole steps, or on everything", "aligned", LOSSES)
    subspace: str = option("gradient", "where the subspace comes from", "gradient", ("gradient", "random"))
    layers: str = option("3", "target layers: paper, last, all, or numbers counted from 1 like 3,4", "floor(L/2) and L")
    rank: str = option("50%", "rank of the projectors: a number, a share like 50%, or energy:0.99", "50%")
    project: str = option("kv", "what is projected", "kv", ("kv", "k", "v"))
    coordinate: str = option("linear", "where the projector acts", "not stated", COORDINATES)
    temperature: float = option(
        -1.0, "sampling temperature of the completions, 0 is greedy; -1 takes the method's", "not stated", minimum=-1
    )
    top_k: int = option(0, "truncated sampling: keep so many tokens; 0 keeps all", minimum=0)
    top_p: float = option(1.0, "truncated sampling: keep this much probability", minimum=0.01, maximum=1)
    prompts: int = option(2000, "training prompts, one completion each", minimum=1)
    rounds: int = option(1, "times to calibrate, generate and fine-tune", "1", minimum=1)
    finetune: str = option("lora", "what is trained", "lora", ("lora", "full"))
    lora_rank: int = option(8, "rank of the updates", "8", minimum=1)
    lora_alpha: float = option(8.0, "scale of the updates times their rank", "8")
    lora_dropout: float = option(0.05, "dropout before the updates", "0.05", minimum=0, maximum=1)
    completion_only: bool = option(True, "take the loss on the completion alone, as the pretraining did", "no")
    epochs: int = option(5, "passes over the completions; 0 stops at the generation", "5", minimum=0)
    batch: int = option(64, "completions an update", minimum=1)
    learning_rate: float = option(3e-3, "peak learning rate of AdamW, cosine to 0", "1e-5", minimum=0)
    weight_decay: float = option(0.01, "weight decay of AdamW", "0.01", minimum=0)
    seed: int = option(0, "seed of everything random", "42")
    base: str = option("data/base.pt", "checkpoint to start from")
    out: str = option("out", "folder for runs")
    baseline: bool = option(True, "train PSR and SSD afterwards, for the table")
    eval_problems: int = option(64, "test problems a domain", minimum=1)
    eval_samples: int = option(16, "samples a test problem", minimum=1)
    resume: bool = option(False, "go on from the last checkpoint of the same command")
    device: str = option("auto", "cpu, cuda, mps or auto")
    bf16: bool = option(False, "bfloat16 autocast while fine-tuning, for GPUs")
    compile: bool = option(False, "torch.compile the blocks, for GPUs")
    threads: int = option(0, "CPU threads; 0 leaves it to torch", minimum=0)


def self_generate(model: GPT, config: Config, round: int) -> list[Pair]:
    """Step 2: one raw completion a training prompt, nothing filtered -> (prompt, completion) tokens."""
    rng = random.Random(f"prompts {config.seed} {round}")
    prompts = [encode(plain_prompt(make_problem(config.domain, rng))) for _ in range(config.prompts)]
    prompts = parallel.share(prompts)
    generator = runs.torch_generator("completion", config.seed, round, *([parallel.RANK] if parallel.RANK else []))
    completions = generate(
        model, prompts, BUDGET, END, 1, sampling_temperature(config), config.top_k, config.top_p, generator
    )
    return parallel.gather(list(zip(prompts, completions, strict=True)))


def finetune(model: GPT, state: dict, config: Config, folder: Path, save: Callable[[], None]) -> None:
    """Step 3: fine-tune the unprojected weights on state["pairs"], from state["epoch"] on; every epoch is saved."""
    key, device = f"{config.seed} {len(state['rounds'])}", model.device.type
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
    if config.compile:  # not before: what is compiled would not notice the hooks of the projection
        model.compile_blocks()
    model.train()
    for epoch in range(state["epoch"], config.epochs):
        torch.manual_seed(zlib.crc32(f"{key} {epoch}".encode()))  # of dropout
        order = random.Random(f"order {key} {epoch}").sample(state["pairs"], len(state["pairs"]))
        title = f"{config.method}: fine-tune, epoch {epoch + 1} of {config.epochs}"
        progress = tqdm(range(updates), desc=title, disable=not parallel.FIRST, dynamic_ncols=True)
        for update in progress:
            done = (epoch * updates + update) / (config.epochs * updates)
            optimizer.param_groups[0]["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
            pairs = order[update * config.batch : (update + 1) * config.batch]
            if len(pairs) < parallel.WORLD:
                continue  # a rest too small to share
            with torch.autocast(device, torch.bfloat16, enabled=config.bf16):
                loss = next_token_loss(model, parallel.share(pairs), config.completion_only)
            whole_loss = parallel.total(loss)
            if not whole_loss.isfinite():
                if parallel.FIRST:
                    runs.write_json(folder / "bad_batch.json", pairs)
                where = f"the loss is {whole_loss.item()} in epoch {epoch + 1}; its batch is in {folder}/bad_batch.json"
                raise runs.UserError(f"{where}, try a lower --learning-rate")
            optimizer.zero_grad()
            loss.backward()
            parallel.sum_gradients(trained)
            optimizer.step()
            state["losses"].append(whole_loss.item())
            progress.set_postfix(loss=f"{loss.item():.3f}")
        state |= {"epoch": epoch + 1, "optimizer": optimizer.state_dict(), "trained": [p.detach() for p in trained]}
        save()
    model.eval()
    if config.finetune == "lora":
        merge_lora(model)


def train(config: Config, before: dict | None = None) -> dict:
    """One run: evaluate the base, then calibrate, generate and fine-tune, evaluate again."""
    started, device = time.time(), parallel.start(runs.pick_device(config.device))
    model = runs.load_checkpoint(config.base)[0].to(device).eval()
    choose_rank(config.rank, torch.ones(place_width(model, config.coordinate)))  # a bad one is told before any work
    target_layers(config.layers, model.config.n_layer)
    folder = runs.make_folder(Path(config.out) / runs.run_name(config))
    if results := runs.finished(folder, config):
        return results
    projected, temperature = METHODS[config.method][0], sampling_temperature(config)
    examples = calibration_set(config.calibration_domain or (config.domain,), config.calibration_size, config.seed)
    subspace_flags = (config.layers, config.rank, config.project, config.loss, config.coordinate, config.subspace)
    sampling = {"temperature": temperature, "top_k": config.top_k, "top_p": config.top_p}
    scale = {"problems": config.eval_problems, "samples": config.eval_samples, "seed": config.seed}
    if temperature == 0:  # one sample says all: as many problems instead
        sampling |= {"problems": config.eval_problems * config.eval_samples, "samples": 1}
    state_file, state = folder / "state.pt", {"rounds": [], "pairs": None, "epoch": 0, "losses": [], "seconds": 0.0}
    if config.resume and state_file.exists():
        model, state = runs.load_checkpoint(state_file)
        runs.same_config(state["settings"], config, state_file)
        model = model.to(device).eval()
    spent = state["seconds"]
    state.setdefault("settings", asdict(config))
    domains = tuple(DOMAINS) if config.epochs and parallel.FIRST else ()  # without fine-tuning no before and after
    home = (config.domain,) if parallel.FIRST else ()
    if "before" not in state:
        state["before"] = before or evaluate(model, domains, **scale)
    if "own" not in state:  # the base's own generation, at the temperature of this method
        state["own"] = evaluate(model, home, **scale | sampling)

    def save(start: GPT) -> None:
        state["seconds"] = spent + time.time() - started
        if parallel.FIRST:
            runs.save_checkpoint(state_file, start, **state)

    while len(state["rounds"]) < config.rounds:
        if state["pairs"] is None:
            projectors = calibrate(model, examples, *subspace_flags, config.seed) if projected else {}
            with project_kv(model, projectors, config.coordinate):
                state["generation"] = evaluate(model, home, **scale | sampling)
                state["pairs"] = self_generate(model, config, len(state["rounds"]))
        save_round = partial(save, deepcopy(model))  # with the weights this round began with
        save_round()
        finetune(model, state, config, folder, save_round)
        state["rounds"].append({"generation": state["generation"], "losses": state["losses"]})
        state |= {"pairs": None, "epoch": 0, "losses": []}

    if not parallel.FIRST:
        return {}
    after = evaluate(model, domains, **scale)
    results = {
        **runs.about(folder, config, spent + time.time() - started),
        "before": state["before"],
        "own_generation": state["own"],
        "rounds": [{**entry, "losses": entry["losses"][:1] + entry["losses"][-1:]} for entry in state["rounds"]],
        "after": after,
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
    return METHODS[config.method][1] if config.temperature < 0 else config.temperature


def main() -> None:
    config = runs.parse_config(Config, __doc__)
    if config.threads:
        torch.set_num_threads(config.threads)
    results = [train(config)]
    if config.baseline:
        for method in METHODS:
            if method != config.method:
                results.append(train(replace(config, method=method, temperature=-1.0), results[0].get("before")))
    rows = []
    for result in results if parallel.FIRST else ():
        stages = {"base": result["before"], "base, at its temperature": result["own_generation"]}
        stages |= {"with its projection": result["rounds"][0]["generation"], "trained": result["after"]}
        for stage, scores in [(stage, scores) for stage, scores in stages.items() if scores]:
            cells = [f"{100 * scores[domain]['mean']:.1f}" if domain in scores else "" for domain in DOMAINS]
            rows.append([result["name"], stage, *cells])
    if rows:
        print(runs.markdown_table(["run", f"mean@{config.eval_samples}, %", *DOMAINS], rows))


if __name__ == "__main__":
    runs.run_script(main, "Stopped. The same command with --resume goes on from the last checkpoint.")
