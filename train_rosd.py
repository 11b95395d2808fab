"""ROSD, Reflective On-policy Self-Distillation (arXiv 2605.28014), and everything it is compared with, in one loop.

    python train_rosd.py                                   ROSD and SDPO from the same base, then the table of both
    python train_rosd.py --method grpo --no-baseline       any other method by itself
    python train_rosd.py --mask whole                      ROSD without localization; --context peer: y* in place of e
    python train_rosd.py --preset released                 the settings of the released code, where they differ

One step: the student samples G rollouts a problem; the verifier scores them; the reflector quotes each wrong rollout's
first error and says what belongs there; the teacher reads that idea and the student's own tokens; from the error on,
the student is drawn to the teacher's distribution (a correct rollout is taught whole; if no quote is found, k = 0):

    L = sum_t m_t min(rho_t, 2) D( pi_S(. | x, y_<t) || stopgrad pi_T(. | x, e, y_<t) ) / sum_t m_t    m_t = 1 from k on

Reflector and teacher are the base itself, frozen; with --finetune lora they are the student's own weights, its adapters
off. Every other method but GRPO changes what the teacher holds in the place of e, or where the mask applies:

>>> [(c.context, c.mask) for c in map(settle, (Config(), Config(method="sdpo"), Config(mask="whole")))]
[('reflection', 'suffix'), ('peer', 'whole'), ('reflection', 'whole')]

Simplified compared with the released code: rollouts come from the training weights, and there is no reward model.
"""

import dataclasses
import math
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

import losses
import reflect
from data import Task
from errors import UserError
from evaluate import comparison, evaluate_run, quick_test
from harness import parallel
from harness.cli import option, parse_config, run_script
from harness.run import Run, RunConfig, compile_blocks, find_task, run_name
from lora import adapters_off, make_trainable, merge_lora
from model import GPT, response_hidden
from reflect import Reflection, Rollout

# ---------------------------------------------------------------------------------------------- settings

METHODS = {  # what the teacher holds, and which tokens the loss is on
    "rosd": {"context": "reflection", "mask": "suffix"},
    "sdpo": {"context": "peer", "mask": "whole"},  # OPSD with a peer's correct solution, as in RL
    "opsd": {"context": "gold", "mask": "whole"},  # OPSD with the golden solution, as in SFT
    "grpo": {"context": "reward", "mask": "whole"},
}
NAMES = {  # for the closing table
    "rosd": "ROSD, corrected from its first error on",
    "sdpo": "SDPO, imitates a peer's correct solution",
    "opsd": "OPSD, imitates the golden solution",
    "grpo": "GRPO, rewarded for right answers",
}
# Where the paper is silent (the help says "not stated"), PAPER has what we chose.
PAPER = {"peer": "shortest", "reflector": "base", "told_answer": False, "solved": "keep", "malformed": "drop"}
PAPER |= {"ema": 0.0, "minibatches": 1, "learning_rate": 1e-3}  # the rate is ours: the model is small
RELEASED = {  # where the released code differs
    "rosd": {"peer": "first", "reflector": "student", "told_answer": True, "solved": "drop", "malformed": "peer"},
    "sdpo": {"peer": "first", "solved": "drop", "ema": 0.05},
    "opsd": {"solved": "drop"},
    "grpo": {"minibatches": 4, "learning_rate": 1e-4},  # a tenth of ROSD's; the clip acts from the second minibatch on
}


@dataclass(frozen=True)
class Config(RunConfig):
    method: str = option("rosd", "what to train", choices=tuple(METHODS))
    preset: str = option("paper", "settings where paper and released code differ", choices=("paper", "released"))
    context: str | None = option(
        None, "what the teacher holds; unset: the method's", "reflection", ("reflection", "peer", "gold", "both")
    )
    mask: str | None = option(
        None, "tokens the loss is on: all, from the quote on, the quote, from the true error on; unset: the method's",
        "suffix (abstract: span)", ("whole", "suffix", "span", "oracle"),
    )  # fmt: skip
    peer: str | None = option(None, "the correct rollout y*; unset: the preset's", "shortest", ("shortest", "first"))
    reflector: str | None = option(
        None, "who reflects: the base, the current student, or an oracle that knows the truth; unset: the preset's",
        "base", ("base", "student", "oracle"),
    )  # fmt: skip
    told_answer: bool | None = option(None, "tell the reflector the right answer; unset: the preset's", "not stated")
    solved: str | None = option(None, "groups without a wrong rollout; unset: the preset's", "keep", ("keep", "drop"))
    malformed: str | None = option(
        None, "reflections without an idea, if e is all the teacher holds: drop, or give it y*; unset: the preset's",
        "not stated", ("drop", "peer"),
    )  # fmt: skip
    ema: float | None = option(
        None, "EMA rate of the teacher, 0 frozen; unset: the preset's", "0.0", minimum=0, maximum=1
    )
    finetune: str = option("full", "train all weights, or low-rank adapters without dropout", None, ("full", "lora"))
    minibatches: int | None = option(None, "parts of a batch, an update each; unset: the preset's", "1", minimum=1)
    updates: int = option(1, "passes over a batch's minibatches", "1", minimum=1)
    learning_rate: float | None = option(None, "peak rate of AdamW; unset: the preset's", "1e-5", minimum=0)
    warmup: int = option(5, "steps of linear warm-up", "10", minimum=0)
    grad_clip: float = option(1.0, "largest gradient norm", "1.0", minimum=1e-9)
    steps: int = option(30, "training steps", minimum=1)
    batch: int = option(32, "problems a step", "32", minimum=1)
    group: int = option(8, "rollouts a problem, G", "8", minimum=2)
    micro_batch: int = option(64, "rollouts per backward pass; the gradient stays the same", minimum=1)
    temperature: float = option(1.0, "sampling temperature of the rollouts", "1", minimum=0)
    reflect_temperature: float = option(0.0, "temperature of the reflector; 0 is greedy", "not stated", minimum=0)
    alpha: float = option(0.5, "divergence: 0 forward KL, 0.5 Jensen-Shannon, 1 reverse", "0.5", minimum=0, maximum=1)
    top_k: int = option(100, "likeliest tokens of the student to compare; the rest is one bucket", "100", minimum=1)
    ratio_clip: float = option(2.0, "upper clip of the token importance ratio", "2.0", minimum=1)
    clip_low: float = option(0.2, "GRPO: lower clip of the ratio", "0.2", minimum=0, maximum=1)
    clip_high: float = option(0.28, "GRPO: upper clip of the ratio", "0.28", minimum=0)
    learn_from: str = option("all", "which rollouts teach: all, right or wrong ones", "all", ("all", "right", "wrong"))
    spoil_idea: float = option(0.0, "share of the reflections whose idea misleads", "0", minimum=0, maximum=1)
    spoil_kind: str = option("false", "how: a false result, or an idea of another problem", None, ("false", "other"))
    spoil_quote: float = option(0.0, "share of the reflections that quote a random place", "0", minimum=0, maximum=1)
    eval_every: int = option(0, "steps between short tests, for learning curves; 0 tests never", minimum=0)


def settle(config: Config) -> Config:
    """The same settings with nothing left open: what no flag gives comes from the method, then from the preset.

    >>> settle(Config(method="sdpo", preset="released")).ema, settle(Config(method="sdpo", ema=0.1)).ema
    (0.05, 0.1)
    """
    preset = PAPER | (RELEASED.get(config.method, {}) if config.preset == "released" else {}) | METHODS[config.method]
    config = dataclasses.replace(config, **{name: v for name, v in preset.items() if getattr(config, name) is None})
    if config.finetune == "lora" and config.ema:
        raise UserError("--finetune lora has no teacher's weights for --ema to move; give --ema 0 or --finetune full")
    return config


# ---------------------------------------------------------------------------------------------- lessons


@dataclass(frozen=True)
class Lesson:
    """A rollout the student learns from: what the teacher reads before it, and which of its tokens the loss is on."""

    rollout: Rollout
    teacher_prompt: str
    start: int  # k
    end: int
    advantage: float = 0.0  # of GRPO
    times: int = 1  # how many equal ones it stands for


def reflect_on(
    pairs: list[tuple[Rollout, Rollout | None]], reflector: GPT, task: Task, config: Config, step: int, run: Run
) -> list[Reflection]:
    """(e, q) ~ pi(. | x, y*, y-) for the wrong, e ~ pi(. | x, y+) for the correct ones; spoiled where that is asked."""
    rollouts = [rollout for rollout, _ in pairs]
    peers = [peer.text if peer else rollout.problem.solution for rollout, peer in pairs]  # no peer: golden
    if config.reflector == "oracle":
        texts = [task.true_reflection(rollout.problem, rollout.text) for rollout in rollouts]
    else:
        sampling = {"temperature": config.reflect_temperature, "generator": run.generator("reflect", step)}
        sampling |= {"at_once": config.eval_batch}
        with nullcontext() if config.reflector == "student" else adapters_off(reflector):
            texts = reflect.write_reflections(reflector, task, rollouts, peers, config.told_answer, **sampling)
    read = list(map(reflect.parse_reflection, texts))
    return reflect.spoil_some(read, rollouts, task, config, run.random("spoil", step))


def make_lessons(
    rollouts: list[Rollout], reflector: GPT, task: Task, config: Config, step: int, run: Run
) -> tuple[list[Lesson], dict[str, list[float]]]:
    """Turn rollouts into lessons, and compare the reflector's quotes with the verifier's true first errors."""
    logged: dict[str, list[float]] = {"quote_match": [], "quote_accuracy": [], "error_position": []}
    if config.context == "reward":
        rewards = torch.tensor([float(rollout.verdict.correct) for rollout in rollouts]).view(-1, config.group)
        advantages = losses.group_advantage(rewards).flatten().tolist()
        return [Lesson(r, "", 0, len(r.tokens), a) for r, a in zip(rollouts, advantages, strict=True) if a != 0], logged

    pairs = reflect.pair_up(rollouts, config)
    reflecting = config.context in ("reflection", "both") or config.mask in ("suffix", "span")
    nothing = [Reflection(None, None)] * len(pairs)
    reflections = reflect_on(pairs, reflector, task, config, step, run) if reflecting else nothing
    lessons = []
    for (rollout, peer), reflection in zip(pairs, reflections, strict=True):
        tokens = task.pieces(rollout.tokens)
        found, end = reflect.locate(reflection.quote, tokens), len(tokens)
        k, quote_end = found or (0, end)  # k = Locate(q, y-); not found: the whole response
        true_k = reflect.true_position(rollout, tokens)
        if reflecting and not rollout.verdict.correct:
            logged["quote_match"].append(found is not None)
            logged["quote_accuracy"] += [found is not None and k == true_k] if rollout.verdict.error else []
            logged["error_position"].append(k / end)
        mask = "whole" if rollout.verdict.correct else config.mask
        start, end = {"whole": (0, end), "suffix": (k, end), "span": (k, quote_end), "oracle": (true_k, end)}[mask]
        if held := held_by_teacher(rollout, peer, reflection, config):
            lessons.append(Lesson(rollout, task.teacher_prompt(rollout.problem, **held), start, end))
    return lessons, logged


def held_by_teacher(rollout: Rollout, peer: Rollout | None, reflection: Reflection, config: Config) -> dict[str, str]:
    """What the teacher reads besides the problem; empty where a malformed reflection leaves nothing to hold."""
    if config.context == "gold":
        return {"solution": rollout.problem.solution}
    idea = {"idea": reflection.idea} if reflection.idea is not None and config.context != "peer" else {}
    solution = {"solution": peer.text} if peer else {}
    if config.context == "reflection":
        return idea or (solution if config.malformed == "peer" else {})
    return idea | solution


# ---------------------------------------------------------------------------------------------- loss and update


def merge_equal(lessons: list[Lesson]) -> list[Lesson]:
    """Equal lessons as one that counts for all: a group often samples the same response more than once."""
    equal: dict[tuple, list[Lesson]] = {}
    for x in lessons:
        key = (x.rollout.problem, tuple(x.rollout.tokens), x.teacher_prompt, x.start, x.end, x.advantage)
        equal.setdefault(key, []).append(x)
    return [dataclasses.replace(same[0], times=len(same)) for same in equal.values()]


def lesson_loss(student: GPT, teacher: GPT, lessons: list[Lesson], task: Task, config: Config, count: Tensor) -> Tensor:
    """The loss of these lessons, as their part of a batch with `count` unmasked tokens."""
    device, responses = student.device, [lesson.rollout.tokens for lesson in lessons]
    prompts = [task.encode(task.student_prompt(lesson.rollout.problem)) for lesson in lessons]
    hidden = response_hidden(student, prompts, responses)  # (B, T, n_embd)
    m = reflect.error_mask([x.start for x in lessons], [x.end for x in lessons], list(map(len, responses)))  # (B, T)
    weight = (m * torch.tensor([[x.times] for x in lessons])).to(device)  # m_t, times how often the lesson occurs
    y = losses.pad(responses).to(device)  # (B, T)
    old_logp = losses.pad([lesson.rollout.logprobs for lesson in lessons]).to(device)  # (B, T), when y was sampled
    if config.context == "reward":  # GRPO's target is the advantage, (B, T)
        target = torch.tensor([[lesson.advantage] for lesson in lessons], device=device).expand(weight.shape)
    else:  # all others: the teacher's hidden states, from which token_loss computes pi_T, (B, T, n_embd)
        with torch.no_grad(), adapters_off(teacher):
            target = response_hidden(teacher, [task.encode(lesson.teacher_prompt) for lesson in lessons], responses)

    def token_loss(hidden: Tensor, y: Tensor, old_logp: Tensor, target: Tensor) -> Tensor:
        """min(rho_t, 2) D(pi_S || stopgrad pi_T), or GRPO's surrogate, at all positions or at a chunk of them."""
        log_S = student.logits(hidden).float().log_softmax(dim=-1)  # (..., V)
        logp = log_S.gather(-1, y.unsqueeze(-1)).squeeze(-1)  # (...)
        ratio = losses.importance_ratio(logp, old_logp)  # (...)
        if config.context == "reward":
            return losses.clipped_surrogate(ratio, target, config.clip_low, config.clip_high)
        with torch.no_grad():
            log_T = teacher.logits(target).float().log_softmax(dim=-1)  # (..., V); this layer has no adapter
        D = losses.divergence(*losses.top_k_with_tail(log_S, log_T, config.top_k), config.alpha)  # (...)
        return D * ratio.detach().clamp(max=config.ratio_clip)

    values = losses.in_chunks(token_loss, weight, student.config.vocab_size, hidden, y, old_logp, target)  # (B, T)
    return losses.masked_mean(values, weight, count)


def update(
    student: GPT, teacher: GPT, optimizer: Optimizer, lessons: list[Lesson], task: Task, config: Config, step: int
) -> float | None:
    """All updates of a batch, then the teacher's EMA -> the mean loss; None and no change where there is no lesson."""
    optimizer.param_groups[0]["lr"] = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup))
    step_losses, trained = [], optimizer.param_groups[0]["params"]
    for i in [*range(config.minibatches)] * config.updates:
        part = lessons[i * len(lessons) // config.minibatches : (i + 1) * len(lessons) // config.minibatches]
        count = parallel.total(torch.tensor(float(sum(x.end - x.start for x in part)), device=student.device))
        if count == 0:
            continue
        optimizer.zero_grad()
        loss = torch.zeros((), device=student.device)
        part = sorted(merge_equal(part), key=lambda x: len(x.teacher_prompt) + len(x.rollout.tokens))  # less padding
        for j in range(0, len(part), config.micro_batch):
            with torch.autocast(student.device.type, torch.bfloat16, enabled=config.bf16):
                micro_loss = lesson_loss(student, teacher, part[j : j + config.micro_batch], task, config, count)
            micro_loss.backward()
            loss += micro_loss.detach()
        step_losses.append(parallel.total(loss).item())
        parallel.sum_gradients(trained)
        norm = torch.nn.utils.clip_grad_norm_(trained, config.grad_clip).item()
        if not math.isfinite(step_losses[-1] + norm):
            raise FloatingPointError(f"the loss of step {step} is {step_losses[-1]}, the norm of its gradient {norm}")
        optimizer.step()
    if not step_losses:
        return None
    if config.ema:
        for teacher_weight, student_weight in zip(teacher.parameters(), student.parameters(), strict=True):
            teacher_weight.data.lerp_(student_weight.data, config.ema)
    return sum(step_losses) / len(step_losses)


# ---------------------------------------------------------------------------------------------- the loop


def train(config: Config) -> dict:
    """One run: train, then evaluate the student and the base -> the content of results.json."""
    if settle(config).mask == "oracle" and not find_task(config).knows_first_error:
        raise UserError(f"the task {config.task} knows no true first error; give another --mask than oracle")
    with Run(settle(config), run_name(config)) as run:  # named by its flags alone
        if run.results:
            return run.results
        config, task = run.config, run.task
        torch.manual_seed(config.seed)
        student = run.base if config.finetune == "lora" else deepcopy(run.base)
        trained = make_trainable(student, config.finetune, config.lora_rank, config.lora_alpha)
        teacher = deepcopy(student).requires_grad_(False) if config.ema else run.base
        optimizer = AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
        if config.compile:
            compile_blocks(student)
            compile_blocks(teacher)
        moving = {"student": torch.nn.ParameterList(trained)} | ({"teacher": teacher} if config.ema else {})
        run.restore(**moving, optimizer=optimizer)
        for step in run.steps(config.steps):
            problems = parallel.share(task.problems(config.domain, config.batch, run.random("problems", step)))
            sampling = (config.group, run.generator("rollout", step), config.temperature)
            rollouts = reflect.sample_rollouts(student, task, problems, *sampling)
            reflector = student if config.reflector == "student" else run.base
            lessons, logged = make_lessons(rollouts, reflector, task, config, step, run)
            run.batch = lessons  # kept where the loss is not finite
            loss = update(student, teacher, optimizer, lessons, task, config, step)
            verdicts = [rollout.verdict for rollout in rollouts]
            tests = config.eval_every and (step + 1) % config.eval_every == 0
            run.log(
                loss=loss,
                accuracy=[v.correct for v in verdicts],
                **{habit: [habit in v.habits for v in verdicts] for habit in task.habits},
                unfinished=[not v.finished for v in verdicts],
                **logged,
                learned_from=len(lessons),
                **({"tested": quick_test(student, task)} if tests else {}),
            )
            run.save()
        with adapters_off(run.base):  # "before" can be measured now: the base is frozen, and its adapters are off
            before = run.of_base("before", lambda: evaluate_run(run.base, task, config))
        merge_lora(student)
        after = run.once("after", lambda: evaluate_run(student, task, config))
        return run.finish(student, before=before, after=after)


def main() -> None:
    config = parse_config(Config, __doc__)
    if config.method == "grpo" and (config.context or config.mask or config.learn_from != "all"):
        raise UserError("--method grpo has no teacher and no mask; leave out --context, --mask and --learn-from")
    sdpo = dataclasses.replace(config, method="sdpo", context=None, mask=None)
    configs = [config, sdpo] if config.baseline and config.method != "sdpo" else [config]
    list(map(settle, configs))  # flags that do not go together are reported before the first run
    results = parallel.train_all(train, configs)
    if parallel.FIRST:
        rows = {"base, before training": results[0]["before"]}
        for result in results:
            c, method = result["config"], result["config"]["method"]
            own = METHODS[method] | {"reflector": "base", "learn_from": "all"}
            changed = "".join(f", {name} {c[name]}" for name in own if c[name] != own[name])
            rows[(method.upper() + changed) if changed else NAMES.get(method, method.upper())] = result["after"]
        print(f"\n{comparison(rows, results[0]['config']['domain'], results[0]['habits'])}")
        print(f"Every figure is in {config.out}/<run>/results.json.")


if __name__ == "__main__":
    run_script(main, "Stopped. The same command with --resume goes on from the last checkpoint.")
