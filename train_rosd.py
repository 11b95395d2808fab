"""ROSD, Reflective On-policy Self-Distillation (arXiv 2605.28014), and everything it is compared with, in one loop.

    python train_rosd.py                                   ROSD, then SDPO from the same base, then the table of both
    python train_rosd.py --method grpo --no-baseline       any other method by itself
    python train_rosd.py --mask whole                      ROSD without localization (--mask oracle: a perfect one)
    python train_rosd.py --context peer                    ROSD without reflection

One step: the student samples G rollouts a problem; the verifier scores them; the frozen base, as reflector, quotes each
wrong rollout's first error and says what belongs there; the frozen base, as teacher, reads that idea and the student's
own tokens; from the error on, the student is drawn to the teacher's distribution:

    L = sum_t m_t D( pi_S(. | x, y_<t) || stopgrad pi_T(. | x, e, y_<t) ) / sum_t m_t        m_t = 1 from t = k on

Every baseline but GRPO changes what the teacher holds in the place of e, or where the mask begins, and nothing else:

>>> [teaching(Config(**flags)) for flags in ({}, {"method": "sdpo"}, {"mask": "whole"}, {"context": "peer"})]
[('reflection', 'quote'), ('peer', 'whole'), ('reflection', 'whole'), ('peer', 'quote')]

Simplified against the released code, in plain sight: rollouts from the training weights themselves (so one update a
batch is exactly on-policy), synthetic problems without end instead of a data set, and no reward model. Several
processes or GPUs share the prompts under `torchrun --standalone --nproc_per_node=N train_rosd.py` (parallel.py).
"""

import random
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

import losses
import parallel
import runs
from data.arithmetic import DOMAINS, GAPS, golden_solution, make_problem
from data.documents import plain_prompt
from data.tokenizer import END, encode, pieces
from evaluate import all_domains, comparison, evaluate
from model import GPT, response_logprobs
from reflect import (
    Reflection,
    Rollout,
    choose_peers,
    error_mask,
    locate,
    reflect,
    sample_rollouts,
    teacher_prompt,
    true_position,
)
from runs import option
from subspace import calibrate, calibration_set, project_kv

METHODS = {  # name: (what the teacher holds, where the mask begins)
    "rosd": ("reflection", "quote"),
    "sdpo": ("peer", "whole"),  # OPSD in the setting of RL: a correct peer's solution
    "opsd": ("gold", "whole"),  # OPSD in the setting of SFT: the data set's golden solution
    "grpo": ("none", "whole"),  # no teacher: group-relative advantage
}


@dataclass(frozen=True)
class Config:
    method: str = option("rosd", "what to train; sets --context and --mask", choices=tuple(METHODS))
    context: str = option(
        "",
        "what the teacher holds, where it differs from the method's",
        choices=("", "reflection", "peer", "gold", "both"),
    )
    mask: str = option(
        "", "where the loss begins, where it differs from the method's", choices=("", "quote", "whole", "oracle")
    )
    peer: str = option(
        "shortest", "which correct rollout of the group is y*", "shortest; released code: first", ("shortest", "first")
    )
    domain: str = option(
        "add",
        "domain to train on, all others are out of domain; gap needs --base data/gaps.pt",
        choices=(*DOMAINS, *GAPS),
    )
    steps: int = option(40, "updates", minimum=1)
    batch: int = option(32, "problems a step", "32", minimum=1)
    group: int = option(8, "rollouts a problem, G", "8", minimum=2)
    temperature: float = option(1.0, "sampling temperature of the rollouts", "1", minimum=0)
    reflect_temperature: float = option(0.0, "temperature of the reflector; 0 is greedy", "not stated", minimum=0)
    alpha: float = option(
        0.5, "divergence: 0 forward KL, 0.5 Jensen-Shannon, 1 reverse KL", "0.5", minimum=0, maximum=1
    )
    top_k: int = option(
        100, "tokens compared besides one tail bucket; the vocabulary here is smaller", "100", minimum=1
    )
    clip_low: float = option(0.2, "GRPO: lower clip of the ratio", "0.2", minimum=0, maximum=1)
    clip_high: float = option(0.28, "GRPO: upper clip of the ratio", "0.28", minimum=0)
    ratio_clip: float = option(2.0, "upper clip of the token importance ratio", "2.0", minimum=1)
    updates: int = option(1, "updates a batch", "1", minimum=1)
    spoil: float = option(
        0.0, "share of the wrong rollouts whose reflection is spoiled: a random line as quote and idea", "0", minimum=0
    )
    project: str = option(
        "none", "beyond the papers: SPD's projection while one of these runs", "none", ("none", "rollouts", "teacher")
    )
    project_layers: str = option("3", "layers of that projection, as train_spd.py takes them")
    project_rank: str = option("50%", "rank of that projection, as train_spd.py takes it")
    ema: float = option(
        0.0, "rate at which the teacher follows the student; 0 keeps it frozen", "0.0", minimum=0, maximum=1
    )
    learning_rate: float = option(1e-3, "peak learning rate of AdamW", "1e-5", minimum=0)
    warmup: int = option(5, "steps of linear warm-up", "10", minimum=0)
    grad_clip: float = option(1.0, "largest gradient norm", "1.0", minimum=1e-9)
    seed: int = option(0, "seed of everything random but the evaluation, which is the same for all")
    base: str = option("data/base.pt", "checkpoint to start from; also teacher and reflector")
    out: str = option("out", "folder for runs")
    baseline: bool = option(True, "train SDPO afterwards, for the table")
    eval_problems: int = option(64, "test problems a domain", minimum=1)
    eval_samples: int = option(16, "samples a test problem", "16", minimum=1)
    eval_every: int = option(
        0, "steps between short tests in every domain, for learning curves; 0 tests never", minimum=0
    )
    resume: bool = option(False, "go on from the last checkpoint of the same command")
    device: str = option("auto", "cpu, cuda, mps or auto")
    bf16: bool = option(False, "bfloat16 autocast in student and teacher, for GPUs")
    compile: bool = option(False, "torch.compile the blocks of student and teacher, for GPUs")
    threads: int = option(0, "CPU threads; 0 leaves it to torch", minimum=0)


@dataclass(frozen=True)
class Lesson:
    """A rollout the student learns from: what the teacher reads before it, and where the mask begins."""

    rollout: Rollout
    teacher_prompt: str
    start: int  # k
    advantage: float  # of GRPO; unused by the others


def make_lessons(
    rollouts: list[Rollout], reflector: GPT, config: Config, step: int
) -> tuple[list[Lesson], list[tuple[bool, bool, float]]]:
    """Turn rollouts into lessons, and compare the reflector's quotes with the verifier's true first errors.

    Of every wrong rollout reflected on: was the quote found, is it at the first error, where (0 to 1) does it lie.
    """
    context, mask = teaching(config)
    if context == "none":
        rewards = torch.tensor([float(rollout.verdict.correct) for rollout in rollouts]).view(-1, config.group)
        advantages = losses.group_advantage(rewards).flatten().tolist()
        return [Lesson(r, "", 0, a) for r, a in zip(rollouts, advantages, strict=True) if a != 0], []

    peers = choose_peers(rollouts, config.group, config.peer)
    if context != "gold":  # a group without a correct rollout has no peer to learn from
        rollouts, peers = [r for r, p in zip(rollouts, peers, strict=True) if p], [p for p in peers if p]
    reflections = [Reflection(None, None)] * len(rollouts)
    reflecting = bool(rollouts) and (context in ("reflection", "both") or mask == "quote")
    if reflecting:
        generator = runs.torch_generator("reflect", config.seed, step)
        peer_texts = [p.text if p else golden_solution(r.problem) for r, p in zip(rollouts, peers, strict=True)]
        reflections = reflect(reflector, rollouts, peer_texts, config.reflect_temperature, generator)
    rng = random.Random(f"spoil {config.seed} {step}")
    for i, rollout in enumerate(rollouts):
        if not rollout.verdict.correct and rng.random() < config.spoil:
            line = rng.choice([line for line in rollout.text.split(";") if line] or ["#"])
            reflections[i] = Reflection(line, line)

    lessons, quotes = [], []
    for rollout, peer, reflection in zip(rollouts, peers, reflections, strict=True):
        start = 0
        if not rollout.verdict.correct:
            found, oracle = locate(reflection.quote, pieces(rollout.tokens)), true_position(rollout)
            start = {"quote": found or 0, "whole": 0, "oracle": oracle}[mask]
            quotes.append((found is not None, found == oracle, (found or 0) / len(rollout.tokens)))
        if context in ("reflection", "both") and reflection.idea is None:
            continue  # malformed: there is nothing for the teacher to hold
        solution = golden_solution(rollout.problem) if context == "gold" else peer.text
        lessons.append(Lesson(rollout, teacher_prompt(context, rollout.problem, reflection.idea, solution), start, 0.0))
    return lessons, quotes if reflecting else []


def lesson_loss(
    student: GPT,
    teacher: GPT,
    lessons: list[Lesson],
    sampled: torch.Tensor | None,
    config: Config,
    count: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a batch, and its log pi_S(y_t) (B, T); `sampled` is the latter as it was before any update.

    count is the number of unmasked tokens of all processes, where there are several.
    """
    responses = [lesson.rollout.tokens for lesson in lessons]
    prompts = [encode(plain_prompt(lesson.rollout.problem)) for lesson in lessons]
    student_logp = response_logprobs(student, prompts, responses)  # (B, T, V)
    device = student_logp.device
    T = student_logp.size(1)
    tokens = torch.tensor([response + [END] * (T - len(response)) for response in responses], device=device)  # (B, T)
    mask = error_mask([lesson.start for lesson in lessons], [len(response) for response in responses]).to(device)  # m_t
    token_logp = student_logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)  # (B, T)
    ratio = losses.importance_ratio(token_logp, token_logp if sampled is None else sampled)  # (B, T)

    if teaching(config)[0] == "none":  # GRPO
        advantage = torch.tensor([lesson.advantage for lesson in lessons], device=device).unsqueeze(-1)  # (B, 1)
        values = losses.clipped_surrogate(ratio, advantage, config.clip_low, config.clip_high)
    else:  # sum_t m_t D( pi_S(.|x, y_<t) || stopgrad pi_T(.|x, e, y_<t) )
        with torch.no_grad():
            teacher_logp = response_logprobs(teacher, [encode(lesson.teacher_prompt) for lesson in lessons], responses)
        values = losses.divergence(*losses.top_k_with_tail(student_logp, teacher_logp, config.top_k), config.alpha)
        values = values * ratio.detach().clamp(max=config.ratio_clip)
    return losses.masked_mean(values, mask, count), token_logp.detach()


def teaching(config: Config) -> tuple[str, str]:
    """(context, mask): those of the method, unless a flag says otherwise."""
    context, mask = METHODS[config.method]
    return config.context or context, config.mask or mask


def update(
    student: GPT, teacher: GPT, optimizer: torch.optim.Optimizer, lessons: list[Lesson], config: Config, step: int
) -> float:
    """Warm-up, loss, clipped gradient, AdamW; `updates` times on the same batch -> the last loss."""
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup))
    count = torch.tensor(float(sum(len(lesson.rollout.tokens) - lesson.start for lesson in lessons)))
    count = parallel.total(count.to(student.device))
    sampled, loss = None, torch.zeros((), device=student.device)
    if count == 0:
        return 0.0
    for _ in range(config.updates):
        optimizer.zero_grad()
        if lessons:
            with torch.autocast(student.device.type, torch.bfloat16, enabled=config.bf16):
                loss, token_logp = lesson_loss(student, teacher, lessons, sampled, config, count)
            loss.backward()
            sampled = token_logp if sampled is None else sampled
        whole_loss = parallel.total(loss)
        if not whole_loss.isfinite():
            raise FloatingPointError(f"the loss of step {step} is {whole_loss.item()}")
        parallel.sum_gradients(student.parameters())
        torch.nn.utils.clip_grad_norm_(student.parameters(), config.grad_clip)
        optimizer.step()
    for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        ours.lerp_(theirs.detach(), config.ema)  # ema = 0 leaves the teacher as it is
    return whole_loss.item()


def train(config: Config, before: dict | None = None) -> dict:
    """One run: evaluate the base, train, evaluate again; everything it leaves behind lies in its folder."""
    started, device = time.time(), parallel.start(runs.pick_device(config.device))
    base = runs.load_checkpoint(config.base)[0].to(device).requires_grad_(False)  # the reflector
    folder = runs.make_folder(Path(config.out) / runs.run_name(config))
    if results := runs.finished(folder, config):
        return results
    student, teacher = deepcopy(base).requires_grad_(True), deepcopy(base)
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.learning_rate, weight_decay=0.0)
    if config.compile:
        student.compile_blocks()
        teacher.compile_blocks()
    projectors = {}
    if config.project != "none":
        examples = calibration_set((config.domain,), 200, config.seed)
        projectors = calibrate(deepcopy(base), examples, config.project_layers, config.project_rank)
    domains = all_domains(config.domain)
    scale = {"problems": config.eval_problems, "samples": config.eval_samples}
    state_file, history, seconds = folder / "state.pt", [], 0.0
    if config.resume and state_file.exists():
        saved, state = runs.load_checkpoint(state_file)
        runs.same_config(state["settings"], config, state_file)
        student.load_state_dict(saved.state_dict())
        teacher.load_state_dict(state["teacher"])
        optimizer.load_state_dict(state["optimizer"])
        history, before, seconds = state["history"], state["before"], state["seconds"]
    before = before or evaluate(student, domains if parallel.FIRST else (), **scale)

    steps = range(len(history), config.steps)
    bar = {"desc": folder.name, "disable": not parallel.FIRST, "dynamic_ncols": True}
    progress = tqdm(steps, initial=len(history), total=config.steps, **bar)
    for step in progress:
        began = time.time()
        rng = random.Random(f"problems {config.seed} {step}")
        problems = parallel.share([make_problem(config.domain, rng) for _ in range(config.batch)])
        generator = runs.torch_generator("rollout", config.seed, step, *([parallel.RANK] if parallel.RANK else []))
        with project_kv(student, projectors if config.project == "rollouts" else {}):
            rollouts = sample_rollouts(student, problems, config.group, generator, config.temperature)
        lessons, quotes = make_lessons(rollouts, base, config, step)
        try:
            with project_kv(teacher, projectors if config.project == "teacher" else {}):
                loss = update(student, teacher, optimizer, lessons, config, step)
        except FloatingPointError as error:
            batch = parallel.gather([asdict(lesson) for lesson in lessons])
            if parallel.FIRST:
                runs.write_json(folder / "bad_batch.json", batch)
            raise runs.UserError(
                f"{error}; its batch is in {folder}/bad_batch.json, try a lower --learning-rate"
            ) from error
        verdicts, quotes = parallel.gather([r.verdict for r in rollouts]), parallel.gather(quotes)
        share = {
            "accuracy": sum(v.correct for v in verdicts) / len(verdicts),
            "shortcut": sum(v.shortcut for v in verdicts) / len(verdicts),
            "unfinished": sum(not v.finished for v in verdicts) / len(verdicts),
        }
        found = [sum(column) / len(quotes) for column in zip(*quotes, strict=True)]
        found = dict(zip(("quote_match", "quote_accuracy", "error_position"), found, strict=False))
        history.append({"step": step, "loss": loss, **share, **found, "learned_from": len(parallel.gather(lessons))})
        if not parallel.FIRST:
            continue
        if config.eval_every and (step + 1) % config.eval_every == 0:
            quick = evaluate(student, domains, problems=32, samples=4, seed=1)
            history[-1]["tested"] = {domain: scores["mean"] for domain, scores in quick.items()}
        extra = {"settings": asdict(config), "teacher": teacher.state_dict(), "optimizer": optimizer.state_dict()}
        spent = seconds + time.time() - started
        runs.save_checkpoint(state_file, student, history=history, before=before, seconds=spent, **extra)
        runs.write_lines(folder / "metrics.jsonl", history)
        speed = sum(len(rollout.tokens) for rollout in rollouts) / (time.time() - began)
        shown = {"loss": f"{loss:.4f}"} | {name: f"{value:.0%}" for name, value in (share | found).items()}
        progress.set_postfix(shown | {"tok/s": f"{speed:.0f}"})

    if not parallel.FIRST:
        return {}
    after = evaluate(student, domains, **scale)
    results = {**runs.about(folder, config, seconds + time.time() - started), "before": before, "after": after}
    runs.save_checkpoint(folder / "model.pt", student)
    runs.write_json(folder / "results.json", results)
    state_file.unlink(missing_ok=True)
    return results


def main() -> None:
    config = runs.parse_config(Config, __doc__)
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.method == "grpo" and (config.context or config.mask):
        raise runs.UserError("--method grpo has no teacher and no mask; leave out --context and --mask")
    runs.check_world(config.base, config.domain)
    if config.compile and config.project != "none":
        raise runs.UserError("what --compile makes would not notice the hooks of --project; leave one of them out")
    results = [train(config)]
    if config.baseline and config.method != "sdpo":
        baseline = replace(config, method="sdpo", context="", mask="")
        results.append(train(baseline, before=results[0].get("before")))
    if not parallel.FIRST:
        return
    print(f"\n{comparison(results)}\n\nEvery figure is in {config.out}/<run>/results.json.")


if __name__ == "__main__":
    runs.run_script(main, "Stopped. The same command with --resume goes on from the last checkpoint.")
