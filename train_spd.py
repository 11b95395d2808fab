"""SPD, Self-Policy Distillation by capability-selective subspace projection (arXiv 2605.22675), in one file.

    python train_spd.py                        SPD, then plain self-retraining (PSR) and SSD, then the table of all
    python train_spd.py --loss full            subspace from the loss of the whole sequence
    python train_spd.py --subspace random      a random subspace of the same rank: the control the paper lacks

No teacher, no verifier, no reward:

    1. calibrate (subspace.py)      G = dL_align/dK and dL_align/dV, G = U diag(s) V^T, P = V_r V_r^T
    2. generate                     y ~ p(. | x) with K <- K P_K, V <- V P_V: a raw completion per prompt, none filtered
    3. fine-tune, unprojected       -sum_t log p(y_t | x, y_<t) over A and B of W + (alpha/r) B A (lora.py)

The paper has the loss of 3 on x as well; this base was pretrained on responses alone, so that a loss on prompts would
drown the rest (--no-completion-only follows the paper). Inference is unprojected.
"""

import dataclasses
import math
import zlib
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from data import Task
from errors import UserError
from evaluate import evaluate, evaluate_run, out_of_domain
from harness import parallel
from harness.cli import markdown_table, option, parse_config, run_script
from harness.run import Run, RunConfig, compile_blocks, find_task, run_name
from lora import make_trainable, merge_lora
from losses import in_chunks, masked_mean, pad
from model import GPT, generate, response_hidden
from subspace import SubspaceConfig, calibrate, calibration_set, choose_rank, place_width, project_kv, target_layers

Pair = tuple[list[int], list[int]]  # prompt and completion tokens

# ---------------------------------------------------------------------------------------------- settings

METHODS = {  # project while generating? sampling temperature
    "spd": (True, 0.0),
    "psr": (False, 1.0),  # plain self-retraining, on samples as they come
    "ssd": (False, 0.0),  # simple self-distillation: spd unprojected; --temperature, --top-k and --top-p vary it
}


@dataclass(frozen=True)
class Config(SubspaceConfig, RunConfig):
    method: str = option("spd", "what to train", choices=tuple(METHODS))
    temperature: float | None = option(
        None, "sampling temperature of the completions, 0 is greedy; unset: the method's", "not stated", minimum=0
    )
    top_k: int = option(0, "truncated sampling: keep so many tokens; 0 keeps all", minimum=0)
    top_p: float = option(1.0, "truncated sampling: keep this much probability", minimum=0.01, maximum=1)
    prompts: int = option(2000, "training prompts, one completion each", minimum=1)
    rounds: int = option(1, "times to calibrate, generate and fine-tune", "1", minimum=1)
    finetune: str = option("lora", "what is trained", "lora", ("lora", "full"))
    lora_dropout: float = option(0.05, "dropout before the adapters", "0.05", minimum=0, maximum=0.99)
    completion_only: bool = option(True, "take the loss on the completion alone, as the pretraining did", "no")
    epochs: int = option(5, "passes over the completions; 0 stops at the generation", "5", minimum=0)
    batch: int = option(64, "completions an update", minimum=1)
    learning_rate: float = option(3e-3, "peak learning rate of AdamW, cosine to 0", "1e-5", minimum=0)
    weight_decay: float = option(0.01, "weight decay of AdamW", "0.01", minimum=0)


def settle(config: Config) -> Config:
    """The same settings; where no flag gives them, the method's temperature and, for arithmetic, the domain exam.

    There a mark makes the base check nearly every step. No result depends on the mark: projection can remove the habit.
    """
    temperature = METHODS[config.method][1] if config.temperature is None else config.temperature
    domain = config.domain or ("exam" if config.task == "arithmetic" else "")
    return dataclasses.replace(config, temperature=temperature, domain=domain)


# ---------------------------------------------------------------------------------------------- step 2: generate


def self_generate(model: GPT, task: Task, config: Config, run: Run, round: int) -> list[Pair]:
    """One raw completion a training prompt, nothing filtered -> (prompt, completion) tokens."""
    problems = task.problems(config.domain, config.prompts, run.random("prompts", round))
    prompts = parallel.share([task.encode(task.student_prompt(problem)) for problem in problems])
    sampling = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    sampling |= {"generator": run.generator("completion", round), "at_once": config.eval_batch}
    completions = generate(model, prompts, task.max_response, task.stop, **sampling)
    return parallel.gather(list(zip(prompts, completions, strict=True)))


def score_text(model: GPT, task: Task, config: Config) -> dict[str, dict]:
    """Accuracy of a model's text at the method's temperature, on test problems of the training domain."""
    problems, samples = config.eval_problems, config.eval_samples
    if config.temperature == 0:  # all samples of a problem would be the same: as many problems instead
        problems, samples = problems * samples, 1
    sampling = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    return evaluate(
        model, task, (config.domain,), problems, samples, config.seed, at_once=config.eval_batch, **sampling
    )


# ---------------------------------------------------------------------------------------------- step 3: fine-tune


def next_token_loss(model: GPT, pairs: list[Pair], completion_only: bool = True) -> Tensor:
    """Mean of -log p(y_t | x, y_<t) over all tokens of the completions, or of prompts and completions.

    With several processes, each holds a share of the pairs but divides by the token count of all: the losses add up.
    """
    if not completion_only:
        pairs = [(prompt[:1], prompt[1:] + completion) for prompt, completion in pairs]  # all but the first token
    prompts, completions = map(list, zip(*pairs, strict=True))
    y = pad(completions, -1).to(model.device)  # (B, T)

    def nll_of(hidden: Tensor, y: Tensor) -> Tensor:  # (..., n_embd), (...) -> (...)
        logp = model.logits(hidden).float().log_softmax(dim=-1)  # (..., V)
        return -logp.gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)

    hidden, mask = response_hidden(model, prompts, completions), (y >= 0).float()
    nll = in_chunks(nll_of, mask, model.config.vocab_size, hidden, y)  # (B, T)
    return masked_mean(nll, mask, parallel.total((y >= 0).sum()))


def start_finetuning(model: GPT, config: Config, round: int) -> tuple[GPT, torch.optim.Optimizer]:
    """A trainable copy of the model, and its optimizer."""
    torch.manual_seed(zlib.crc32(f"{config.seed} {round}".encode()))
    student = deepcopy(model)
    trained = make_trainable(student, config.finetune, config.lora_rank, config.lora_alpha, config.lora_dropout)
    if config.compile:
        compile_blocks(student)
    return student, torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)


def finetune_epoch(
    student: GPT, optimizer: torch.optim.Optimizer, pairs: list[Pair], config: Config, run: Run, round: int, epoch: int
) -> float | None:
    """One pass over the completions in random order, the learning rate on a cosine over all passes -> the mean loss.

    None, and nothing is learned, where every batch has fewer completions than there are processes.
    """
    torch.manual_seed(zlib.crc32(f"{config.seed} {round} {epoch}".encode()))  # for dropout
    order = run.random("order", round, epoch).sample(pairs, len(pairs))
    updates, seen, trained = math.ceil(len(pairs) / config.batch), [], optimizer.param_groups[0]["params"]
    student.train()
    for i in range(updates):
        done = (epoch * updates + i) / (config.epochs * updates)
        optimizer.param_groups[0]["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        run.batch = order[i * config.batch : (i + 1) * config.batch]
        if len(run.batch) < parallel.WORLD:
            continue  # too few to share
        with torch.autocast(student.device.type, torch.bfloat16, enabled=config.bf16):
            loss = next_token_loss(student, parallel.share(run.batch), config.completion_only)
        seen.append(parallel.total(loss).item())
        if not math.isfinite(seen[-1]):
            raise FloatingPointError(f"the loss is {seen[-1]} in epoch {epoch + 1}")
        optimizer.zero_grad()
        loss.backward()
        parallel.sum_gradients(trained)
        optimizer.step()
    student.eval()
    return sum(seen) / len(seen) if seen else None


# ---------------------------------------------------------------------------------------------- the loop


def train(config: Config) -> dict:
    """One run: calibrate, generate and fine-tune, measured before, between and after -> the content of results.json."""
    with Run(settle(config), run_name(config)) as run:
        if run.results:
            return run.results
        config, task, projected = run.config, run.task, METHODS[config.method][0]
        if config.batch < parallel.WORLD:
            raise UserError(f"--batch {config.batch} is too small for {parallel.WORLD} processes; start fewer")
        find_task(config, *config.calibration_domain)  # bad flags are reported before any work
        choose_rank(config.rank, torch.ones(place_width(run.base, config.coordinate)))
        target_layers(config.layers, run.base.config.n_layer)
        model = deepcopy(run.base)
        student, optimizer = start_finetuning(model, config, 0)  # for restore to load into; each round starts anew
        run.restore(model=model, student=student, optimizer=optimizer)
        examples = calibration_set(task, config.calibration_domain or (config.domain,), config, config.seed)
        for step in run.steps(max(1, config.rounds * config.epochs)):
            round, epoch = divmod(step, max(1, config.epochs))
            if epoch == 0:
                projectors = calibrate(model, examples, config, config.seed) if projected else {}
                with project_kv(model, projectors, config.coordinate):
                    run.once(f"generation {round}", lambda: score_text(model, task, config))  # noqa: B023
                    run.state["pairs"] = self_generate(model, task, config, run, round)
                student, optimizer = start_finetuning(model, config, round)
                run.parts |= {"student": student, "optimizer": optimizer}
            if config.epochs:
                run.log(loss=finetune_epoch(student, optimizer, run.state["pairs"], config, run, round, epoch))
            if epoch == config.epochs - 1:
                model = run.parts["model"] = deepcopy(student)  # a copy is not compiled: the next round's hooks fire
                merge_lora(model)
            run.save()
        after = run.once("after", lambda: evaluate_run(model, task, config)) if config.epochs else None
        before = run.of_base("before", lambda: evaluate_run(run.base, task, config)) if config.epochs else None
        settings = ("domain", "temperature", "top_k", "top_p")
        own = run.of_base("own", lambda: score_text(run.base, task, config), *settings)
        generations = [run.state[f"generation {round}"] for round in range(config.rounds if config.epochs else 1)]
        return run.finish(model, before=before, own=own, generation=generations, after=after)


def main() -> None:
    config = parse_config(Config, __doc__)
    methods = [config.method, *(m for m in METHODS if m != config.method and config.baseline)]
    others = [dataclasses.replace(config, method=method, temperature=None) for method in methods[1:]]
    results = parallel.train_all(train, [config, *others])
    if not parallel.FIRST:
        return
    home = results[0]["config"]["domain"]

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    def both(scores: dict | None) -> list[str]:
        """In percent: accuracy on the training domain, and elsewhere."""
        return [percent(scores and scores[home]["mean"]), percent(scores and out_of_domain(scores, home))]

    rows = [["base", "", "", *both(results[0]["before"])]]
    for result in results:
        written = [both(result["own"])[0], both(result["generation"][0])[0]]
        rows.append([result["config"]["method"].upper(), *written, *both(result["after"])])
    header = ["right, %", "text of the base", "text it trains on", f"after training, {home}", "elsewhere"]
    print(f"\n{markdown_table(header, rows)}\n\nEvery figure is in {config.out}/<run>/results.json.")


if __name__ == "__main__":
    run_script(main, "Stopped. The same command with --resume goes on from the last checkpoint.")
