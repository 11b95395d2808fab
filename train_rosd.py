"""ROSD, Reflective On-policy Self-Distillation (arXiv 2605.28014), and everything it is compared with, in one loop.

    python train_rosd.py                                   ROSD and SDPO from the same base, then the table of both
    python train_rosd.py --method grpo --no-baseline       any other method by itself
    python train_rosd.py --mask whole                      ROSD without localization; --context peer: y* in place of e
    python train_rosd.py --preset released                 the released code's choices within a step (RELEASED)

One step: the student samples G rollouts a problem; the verifier scores them; the reflector quotes each wrong rollout's
first error and says what belongs there; the teacher reads that idea and the student's own tokens; from the error on,
the student is drawn to the teacher's distribution (a correct rollout is taught whole; if no quote is found, k = 0):

    L = sum_t m_t min(rho_t, 2) D( pi_S(. | x, y_<t) || stopgrad pi_T(. | x, e, y_<t) ) / sum_t m_t    m_t = 1 from k on

Every other method is a line of METHODS. SDPO and OPSD change what the teacher reads in the place of e, and the mask:

>>> [(c.context, c.mask) for c in (configure(), configure("sdpo"), configure(mask="whole"))]
[('reflection', 'suffix'), ('peer', 'whole'), ('reflection', 'whole')]

Simplified compared with the released code: no separate inference engine, so rho = 1 at the first update.
"""

import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from controls import ControlsConfig, oracle_reflections, spoil
from errors import UserError
from evaluate import comparison, evaluate_run, quick_test
from harness.cli import option, parse_config, run_script
from harness.device import train_all
from harness.run import Run, RunConfig, changed_settings, find_task
from lessons import CONTEXTS, Lesson, as_tensors, by_length, pairs_to_learn_from, split, statistics, teacher_prompt
from lora import merge_lora, trainable_copy
from losses import clipped_surrogate, divergence, importance_ratio, token_logprobs, top_k_with_tail
from model import GPT, response_logprobs
from reflect import MASKS, Reflection, locate, read_reflector, sample_rollouts, write_reflections

# ---------------------------------------------------------------------------------------------- losses


def rosd_loss(student: GPT, teacher: GPT, lessons: list[Lesson], config: "Config") -> Tensor:
    """The numerator of L, sum_t m_t min(rho_t, 2) D(pi_S || stopgrad pi_T); `train` divides by sum_t m_t."""
    y, m, logp_sampling = as_tensors(lessons, student.device)  # (B, T) each; m_t is 1 for start <= t < end
    log_S = response_logprobs(student, [lesson.x for lesson in lessons], [lesson.y for lesson in lessons])  # (B, T, V)
    with torch.no_grad():
        log_T = response_logprobs(teacher, [lesson.x_T for lesson in lessons], [lesson.y for lesson in lessons])
    D = divergence(*top_k_with_tail(log_S, log_T, config.top_k), config.alpha)  # (B, T)
    rho = importance_ratio(token_logprobs(log_S, y), logp_sampling).detach()  # (B, T), a constant weight
    return (m * rho.clamp(max=config.ratio_clip) * D).sum()


def grpo_loss(student: GPT, _teacher: GPT, lessons: list[Lesson], config: "Config") -> Tensor:
    """sum_t -min(rho_t A, clip(rho_t, 1 - 0.2, 1 + 0.28) A); there is no teacher."""
    y, m, logp_sampling = as_tensors(lessons, student.device)  # (B, T) each
    log_S = response_logprobs(student, [lesson.x for lesson in lessons], [lesson.y for lesson in lessons])  # (B, T, V)
    rho = importance_ratio(token_logprobs(log_S, y), logp_sampling)  # (B, T)
    A = torch.tensor([[lesson.advantage] for lesson in lessons], device=y.device)  # (B, 1)
    return (m * clipped_surrogate(rho, A)).sum()


# ---------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Method:
    title: str  # for the closing table
    context: str  # what the teacher reads besides the problem
    mask: str  # the tokens that the loss is on
    loss: Callable[[GPT, GPT, list[Lesson], "Config"], Tensor] = rosd_loss

    def __post_init__(self) -> None:
        if self.context not in CONTEXTS or self.mask not in MASKS:
            raise ValueError(f"{self.title}: there is no context {self.context!r} or no mask {self.mask!r}")


METHODS = {
    "rosd": Method("ROSD, corrected from its first error on", "reflection", "suffix"),
    "sdpo": Method("SDPO, imitates a peer's correct solution", "peer", "whole"),  # OPSD as in RL
    "opsd": Method("OPSD, imitates the golden solution", "gold", "whole"),  # OPSD as in SFT
    "grpo": Method("GRPO, rewarded for right answers", "nothing", "whole", grpo_loss),
}
RELEASED = {  # where the released code differs from the defaults below, which are the paper's or ours
    "rosd": {"peer": "first", "reflector": "student", "give_answer": True, "solved": "drop", "malformed": "peer"},
    "sdpo": {"peer": "first", "solved": "drop", "ema": 0.05},
    "opsd": {"solved": "drop"},
    "grpo": {"minibatches": 4, "learning_rate": 1e-4},  # a tenth of ROSD's; the clip acts from the second minibatch on
}


@dataclass(frozen=True)
class MethodConfig:
    """the method"""

    method: str = option("rosd", "what to train", choices=tuple(METHODS))
    preset: str = option("paper", "settings where paper and released code differ", choices=("paper", "released"))
    context: str = option("reflection", "what the teacher reads besides the problem", "reflection", CONTEXTS)
    mask: str = option("suffix", "a wrong rollout's tokens in the loss", "suffix (or span)", tuple(MASKS))
    peer: str = option("shortest", "the correct rollout y*", "shortest", ("shortest", "first"))
    reflector: str = option("base", "who reflects: base, student, oracle (it knows the truth) or a checkpoint", "base")
    ema: float = option(0.0, "EMA rate of the teacher; 0 is a frozen one", "0.0", minimum=0, maximum=1)
    alpha: float = option(0.5, "divergence: 0 forward KL, 0.5 Jensen-Shannon, 1 reverse", "0.5", minimum=0, maximum=1)
    # Not flags; --preset released sets the first four.
    give_answer: bool = False  # the reflector is given the right answer; not stated in the paper
    solved: str = "keep"  # or drop groups without a wrong rollout
    malformed: str = "drop"  # a reflection without an idea; or teach with the peer's solution
    minibatches: int = 1  # parts of a batch, an update each
    top_k: int = 100  # tokens of the student that are compared; the others are one bucket
    ratio_clip: float = 2.0  # of rho
    temperature: float = 1.0  # of the rollouts; rho divides by the distribution they are sampled from
    reflect_temperature: float = 0.0  # the reflector is greedy


@dataclass(frozen=True)
class TrainingConfig(RunConfig):
    """the training"""

    steps: int = option(30, "training steps", minimum=1)
    batch: int = option(32, "problems a step", "32", minimum=1)
    group: int = option(8, "rollouts a problem, G", "8", minimum=2)
    updates: int = option(1, "passes over the rollouts of a step", "1", minimum=1)
    learning_rate: float = option(1e-3, "peak rate of AdamW", "1e-5", minimum=0)
    warmup: int = option(5, "steps of linear warm-up", "10", minimum=0)
    finetune: str = option("full", "train all weights, or low-rank adapters without dropout", None, ("full", "lora"))
    micro_batch: int = option(64, "rollouts per backward pass; the gradient stays the same", minimum=1)
    grad_clip: float = 1.0  # paper: 1.0


@dataclass(frozen=True)
class Config(MethodConfig, ControlsConfig, TrainingConfig):
    def __post_init__(self) -> None:
        if self.finetune == "lora" and self.ema:
            raise UserError("--finetune lora has no weights of the teacher for --ema to move; give --finetune full")


def defaults_of(method: str, preset: str = "paper", **_: object) -> dict[str, object]:
    """The defaults that depend on the method and the preset."""
    of_method = {name: getattr(METHODS[method], name) for name in ("context", "mask")} if method in METHODS else {}
    return of_method | (RELEASED.get(method, {}) if preset == "released" else {})


def configure(method: str = "rosd", preset: str = "paper", **settings: object) -> Config:
    return Config(**{**defaults_of(method, preset), "method": method, "preset": preset, **settings})


# ---------------------------------------------------------------------------------------------- the loop


def train(config: Config) -> dict:
    """One run -> the content of its results.json."""
    if config.mask == "oracle" and not find_task(config).knows_first_error:
        raise UserError(f"the task {config.task} knows no true first error; give another --mask than oracle")
    with Run(config, configure(config.method, config.preset)) as run:  # its name lists what differs from the default
        if run.results:  # --resume found a finished run
            return run.results
        config, task, base = run.config, run.task, run.base  # the config with its domain filled in
        # One model plays three parts. The base is frozen. With LoRA the student shares its weights and trains adapters.
        torch.manual_seed(config.seed)
        student, weights = trainable_copy(base, config.finetune)
        teacher = deepcopy(base).float() if config.ema else base  # float32: bfloat16 would round small EMA steps away
        reflector = student if config.reflector == "student" else read_reflector(config.reflector, base)
        write = oracle_reflections if config.reflector == "oracle" else write_reflections
        loss_of = METHODS[config.method].loss
        reflecting = config.context in ("reflection", "both") or MASKS[config.mask].needs_quote
        optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=0.0)
        run.track(student=torch.nn.ParameterList(weights), teacher=teacher if config.ema else None, optimizer=optimizer)

        for step in run.steps(config.steps):  # those still to make; the state is saved after each
            # 1. Rollouts: y_1..y_G ~ pi_S(. | x) of every problem x, each with the verifier's verdict.
            problems = task.problems(config.domain, config.batch, run.random("problems", step))
            generator = run.generator("rollout", step)
            rollouts = sample_rollouts(student, task, problems, config.group, generator, config.temperature)

            # 2. Pairs: every rollout with y*, another, correct one of its group. A wrong one without y* drops out.
            pairs = pairs_to_learn_from(rollouts, config)

            # 3. Reflections: (e, q) ~ pi(. | x, y*, y-), and e ~ pi(. | x, y+) of the correct ones.
            # 4. Localization: k = Locate(q, y-). A span is (k, end of the quote); None: the quote is not found.
            reflections, spans, located = [Reflection()] * len(pairs), [None] * len(pairs), None
            if reflecting:
                generator = run.generator("reflect", step)
                reflections = write(reflector, task, pairs, config.give_answer, config.reflect_temperature, generator)
                located = spans = [locate(q, y.pieces) for (q, e), (y, *_) in zip(reflections, pairs, strict=True)]
            if config.control != "none":
                rng = run.random("spoil", step)
                reflections, spans = spoil(reflections, spans, pairs, config.control, config.dose, rng)

            # 5. Lessons: m_t = 1 from k on, and everywhere in a correct rollout. The teacher reads x and e.
            lessons = []
            for (y, peer, A), (_, e), span in zip(pairs, reflections, spans, strict=True):
                start, end = MASKS["whole" if y.verdict.correct else config.mask].bounds(y, span)
                text = teacher_prompt(task, y, peer, e, config)
                if text is not None:
                    x, x_T = task.encode(task.prompt(y.problem)), task.encode(text)
                    lessons.append(Lesson(x, x_T, y.tokens, y.logprobs, start, end, advantage=A))

            # 6. Update: sum_t m_t min(rho_t, 2) D(pi_S || stopgrad pi_T) / sum_t m_t, the mean over a batch's tokens.
            optimizer.param_groups[0]["lr"] = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup))
            losses = []
            for _ in range(config.updates):
                for batch in split(lessons, config.minibatches):
                    unmasked = sum(lesson.end - lesson.start for lesson in batch)  # sum_t m_t
                    optimizer.zero_grad()
                    total = 0.0
                    for part in by_length(batch, config.micro_batch):
                        loss = loss_of(student, teacher, part, config) / unmasked
                        loss.backward()
                        total += loss.item()
                    clip_grad_norm_(weights, config.grad_clip)
                    optimizer.step()
                    losses.append(total)

            # 7. Teacher: frozen, or theta_T <- (1 - ema) theta_T + ema theta_S.
            if config.ema and losses:
                for theta_T, theta_S in zip(teacher.parameters(), weights, strict=True):
                    theta_T.data.lerp_(theta_S.data, config.ema)

            log = {**statistics(rollouts, pairs, located, task, config.group), "learned_from": len(lessons)}
            run.log(
                loss=sum(losses) / len(losses) if losses else None, **log, **quick_test(student, task, config, step)
            )
        merge_lora(student)
        before = run.of_base("before", partial(evaluate_run, base, task, config))
        return run.finish(student, before=before, after=evaluate_run(student, task, config))


def main() -> None:
    parse = partial(parse_config, Config, __doc__.partition("Every other")[0], defaults=defaults_of)
    config = parse(sys.argv[1:])
    configs = [config]
    if config.baseline and config.method != "sdpo":  # SDPO with the same flags, but its own context and mask
        sdpo = [f"--{name}={getattr(METHODS['sdpo'], name)}" for name in ("context", "mask")]
        configs.append(parse([*sys.argv[1:], "--method=sdpo", "--reflector=base", *sdpo]))
    results = train_all(train, configs)
    rows = {"base, before training": results[0]["before"]}
    for c, result in zip(configs, results, strict=True):
        changed = changed_settings(c, configure(c.method, c.preset))
        rows[", ".join([c.method.upper(), *changed]) if changed else METHODS[c.method].title] = result["after"]
    print(f"\n{comparison(rows, results[0]['config']['domain'], results[0]['habits'])}")
    print("Every figure is in " + " and ".join(f"{config.out}/{r['name']}/results.json" for r in results))


if __name__ == "__main__":
    run_script(main, "Stopped. The same command with --resume goes on from the last checkpoint.")
