"""SPD, Self-Policy Distillation by capability-selective subspace projection (arXiv 2605.22675), in one file.

    python train_spd.py                        SPD, then plain self-retraining (PSR) and SSD, then the table of all
    python train_spd.py --loss full            subspace from the loss of the whole sequence
    python train_spd.py --subspace random      a random subspace of equal rank: the control that the paper lacks

No teacher, no verifier, no reward:

    1. calibrate (subspace.py)      G = dL_align/dK and dL_align/dV, G = U diag(s) V^T, P = V_r V_r^T
    2. generate                     y ~ p(. | x) with V <- V P_V: a raw completion per prompt, none filtered
    3. fine-tune, unprojected       -sum_t log p(y_t | x, y_<t) over A and B of W + (alpha/r) B A (lora.py)

Inference is unprojected. Four choices are ours (docs/deviations.md). Keys are left alone: a small model's have no
room; --project kv projects both. The rank is the smallest that keeps the steps of golden solutions. The
calibration loss has a temperature, because this base is so sure of what it copies that log p has no gradient there. The
loss of 3 is not on x, because the pretraining was on responses alone; --no-completion-only follows the paper.
"""

import math
import sys
import zlib
from dataclasses import dataclass
from functools import partial

import torch

import subspace
from evaluate import accuracy_of_text, elsewhere, evaluate_run
from harness.cli import markdown_table, option, parse_config, run_script
from harness.device import train_all
from harness.progress import inner_bar
from harness.run import Run, RunConfig, changed_settings
from lora import merge_lora, trainable_copy
from losses import next_token_loss
from sampling import generate
from subspace import COORDINATES, LOSSES, RANK, TEMPERATURE

METHODS = {  # the sampling temperature of the completions
    "spd": 1.0,
    "psr": 1.0,  # plain self-retraining: SPD without projection
    "ssd": 0.6,  # simple self-distillation: sharper samples, unprojected; --temperature, --top-k and --top-p vary them
}


@dataclass(frozen=True)
class SubspaceConfig:
    """the subspace"""

    calibration_domain: tuple[str, ...] = option((), "domains of the calibration set; none means the training domain")
    calibration_size: int = option(500, "calibration examples, N_cal", "20 to 500", minimum=1)
    loss: str = option("steps", "S, the positions of the calibration loss: steps, their results, or all", None, LOSSES)
    calibration_temperature: float = option(
        TEMPERATURE, "of the calibration's softmax; at 1 the gradient vanishes where p = 1", "1", minimum=1e-3
    )
    subspace: str = option("gradient", "where the subspace comes from", "gradient", ("gradient", "random"))
    layers: str = option(
        "paper", "target layers: paper, last, all, or numbers counted from 1 like 3,4", "floor(L/2) and L"
    )
    rank: str = option(RANK, "rank of the projectors: a number, 50%, or the smallest that keeps steps: keep95%", "50%")
    project: str = option("v", "what is projected", "kv", ("kv", "k", "v"))
    coordinate: str = option(
        "linear",
        "where P acts: all heads of K and V together, each head, after K's norm, after RoPE",
        None,
        COORDINATES,
    )


@dataclass(frozen=True)
class Config(SubspaceConfig, RunConfig):
    """training"""

    task: str = option("exams", "the problems: exams, arithmetic, steps, gym:NAME[,NAME] or FILE.jsonl")
    method: str = option("spd", "what to train", choices=tuple(METHODS))
    temperature: float = option(1.0, "temperature of the completions; 0: greedy", None, minimum=1e-3, or_zero=True)
    top_k: int = option(0, "truncated sampling: keep so many tokens; 0 keeps all", minimum=0)
    top_p: float = option(1.0, "truncated sampling: keep this much probability", minimum=0.01, maximum=1)
    prompts: int = option(500, "training prompts, one completion each", minimum=1)
    completion_only: bool = option(True, "take the loss on the completion alone, as the pretraining did", "no")
    epochs: int = option(5, "passes over the completions; 0 stops at the generation", "5", minimum=0)
    batch: int = option(64, "completions an update", minimum=1)
    learning_rate: float = option(1e-3, "peak learning rate of AdamW, cosine to 0", "1e-5", minimum=0)
    finetune: str = option("lora", "what is trained", "lora", ("lora", "full"))
    lora_dropout: float = 0.05  # as in the paper
    weight_decay: float = 0.01  # as in the paper


def defaults_of(method: str, **_: object) -> dict[str, object]:
    """The defaults that depend on the method."""
    return {"temperature": METHODS.get(method)}


def configure(method: str = "spd", **settings: object) -> Config:
    return Config(**defaults_of(method) | {"method": method} | settings)


def train(config: Config) -> dict:
    """One run -> the content of its results.json."""
    with Run(config, configure(config.method)) as run:
        if run.results:
            return run.results
        config, task, base, seed = run.config, run.task, run.base, config.seed
        sampling = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
        # 1. Calibrate: G = dL_align/dK and dL_align/dV, G = U diag(s) V^T, P = V_r V_r^T.
        P, rank = {}, ""
        if config.method == "spd":
            domains, sites = config.calibration_domain or (config.domain,), subspace.target_sites(config, base)
            examples = subspace.calibration_set(task, domains, config.calibration_size, config.loss, seed)
            G = subspace.capability_gradients(base, examples, sites, config.coordinate, config.calibration_temperature)
            rank = subspace.smallest_rank(config.rank, base, task, domains, G, config.coordinate)
            P = subspace.make_projectors(G, rank, config.subspace, subspace.heads(config, base), seed)

        # 2. Generate: one raw completion a prompt with V <- V P_V (and K <- K P_K). None is filtered.
        problems = task.problems(config.domain, config.prompts, run.random("prompts"))
        prompts = [task.encode(task.prompt(problem)) for problem in problems]
        with subspace.project_kv(base, P, config.coordinate):
            accuracy = run.cached("text", lambda: accuracy_of_text(base, task, config, **sampling))
            generator = run.generator("completion")
            write = partial(generate, base, prompts, task.max_response, task.stop, generator=generator, **sampling)
            pairs = list(zip(prompts, run.cached("completions", write), strict=True))

        # 3. Fine-tune the original weights, unprojected: -sum_t log p(y_t | x, y_<t).
        torch.manual_seed(zlib.crc32(str(seed).encode()))
        student, weights = trainable_copy(base, config.finetune, dropout=config.lora_dropout)
        optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=config.weight_decay)
        run.track(student=torch.nn.ParameterList(weights), optimizer=optimizer)
        for epoch in run.steps(config.epochs):
            torch.manual_seed(zlib.crc32(f"{seed} {epoch}".encode()))  # for dropout
            order, losses = run.random("order", epoch).sample(pairs, len(pairs)), []
            updates = math.ceil(len(pairs) / config.batch)
            student.train()
            for i in inner_bar(range(updates), f"epoch {epoch + 1}"):
                progress = (epoch + i / updates) / config.epochs
                optimizer.param_groups[0]["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
                loss = next_token_loss(student, order[i * config.batch :][: config.batch], config.completion_only)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            student.eval()
            run.log(loss=sum(losses) / len(losses))
        merge_lora(student)
        write = partial(accuracy_of_text, base, task, config, **sampling)
        base_text = run.of_base("text", write, "domain", "temperature", "top_k", "top_p")
        before = run.of_base("before", partial(evaluate_run, base, task, config)) if config.epochs else None
        after = evaluate_run(student, task, config) if config.epochs else None
        return run.finish(student, before=before, base_text=base_text, generation=[accuracy], after=after, rank=rank)


def main() -> None:
    parse = partial(parse_config, Config, __doc__, defaults=defaults_of)
    config = parse(sys.argv[1:])
    configs = [config]
    for method in [m for m in METHODS if m != config.method] if config.baseline else []:
        configs.append(parse([*sys.argv[1:], f"--method={method}", f"--temperature={METHODS[method]}"]))
    results = train_all(train, configs)
    home = results[0]["config"]["domain"]
    others = elsewhere(results[0]["before"] or {}, home)

    def percent(scores: dict | None) -> list[str]:
        values = (scores[home]["mean"], *elsewhere(scores, home).values()) if scores else ()
        return [f"{100 * value:.1f}" for value in values] or ["-"] * (1 + len(others))

    rows = [["base", "", "", *percent(results[0]["before"])]]
    for c, result in zip(configs, results, strict=True):
        name = ", ".join([c.method.upper(), *changed_settings(c, configure(c.method))])
        texts = percent(result["base_text"])[0], percent(result["generation"][0])[0]
        rows.append([name, *texts, *percent(result["after"])])
    header = ["right, %", "text of the base", "text it trains on", f"after training, {home}", *others]
    print(f"\n{markdown_table(header, rows)}")
    print("text: what the base writes for the method, before any training, without and with projection")
    print("Every figure is in " + " and ".join(f"{config.out}/{r['name']}/results.json" for r in results))


if __name__ == "__main__":
    run_script(main, "Stopped. The same command with --resume goes on from the last checkpoint.")
