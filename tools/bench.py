"""Speed and memory of a training step on real weights, beside TRL's trainers and a loop like that of the RLHF book.

    python -m tools.bench --real FOLDER      the table (needs `pip install trl peft`)

Each contestant runs in a process of its own, in turns, on the CPU. All have the same weights in bfloat16, adapters of
rank 8 on the attention, problems, groups, number of new tokens, and one update per step. Every response is as long as
allowed, but for the row of rollouts that end where the model ends them. Every other rollout counts as right, so that
every method has something to learn from. Nobody checkpoints the blocks' activations, which costs memory and saves
time. On a CPU, TRL's GRPO also scores the tokens of the prompts. The book's loop is re-created from its
settings: a group at a time, the student itself as teacher, reverse KL over the 20 likeliest tokens, four rollouts at
once in the update. Peak memory is that of the process, with the libraries that it imports.
"""

import dataclasses
import importlib
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from tempfile import TemporaryDirectory
from typing import Any

import torch

from data import Verdict
from data.requests import problem_request
from data.sources import WordProblem
from data.words import Words
from errors import UserError
from harness import files
from harness.cli import markdown_table, option, parse_config, run_script
from harness.run import find_task, peak_memory_mb, seeded
from lessons import Lesson, pairs_to_learn_from, teacher_prompt
from lora import TARGETS, trainable_copy
from model import pad
from reflect import sample_rollouts
from sampling import sample
from tools.memory import update
from train_rosd import configure

TASK, SHOTS = "steps", 4  # whose prompts share their worked examples: 230 of 250 tokens
BATCH, GROUP, NEW, RATE = 4, 4, 48, 1e-4  # problems, rollouts each, their tokens
LONGEST, STEPS = 160, 2  # tokens of a rollout that may end by itself; steps that are timed, after one that is not
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
SAMPLING |= {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}


@dataclass(frozen=True)
class Config:
    real: str = option("", "folder of a Hugging Face model")
    repeats: int = option(5, "repetitions; the best one counts", minimum=1)


def bench_task(folder: str, may_end: bool = False) -> Words:
    """The task, with responses that may end by themselves, or only when they are full."""
    task = find_task(configure(task=TASK, shots=SHOTS, base=folder, max_response=LONGEST if may_end else NEW))
    task.stop = task.stop if may_end else (-1,)
    return task


def draw(task: Words, step: int) -> list[WordProblem]:
    return task.problems(task.domains[0], BATCH, random.Random(step))


def prompts_of(task: Words, step: int) -> list[list[int]]:
    return [task.encode(task.prompt(problem)) for problem in draw(task, step)]


def messages(task: Words, problem: WordProblem) -> list[dict[str, str]]:
    """The prompt as turns of a chat: those of the worked examples, then the problem."""
    turns = []
    for other in task.others(problem, task.shots):
        turns += [("user", problem_request(other.question, task.ending)), ("assistant", other.solution)]
    turns.append(("user", problem_request(problem.question, task.ending)))
    return [{"role": role, "content": text} for role, text in turns]


def best_step(run: Callable[[int], object]) -> float:
    """Seconds of the best step after the first."""
    seconds = []
    for step in range(1 + STEPS):
        began = time.perf_counter()
        run(step)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def rollout_time(run: Callable[[int], list[list[int]]], stop: tuple[int, ...]) -> float:
    """Seconds of the best step; where responses may end, seconds per 1,000 tokens, over three times as many steps."""
    if stop == (-1,):
        return best_step(run)
    run(0)
    began = time.perf_counter()
    written = [response for step in range(3 * STEPS) for response in run(step)]
    seconds = time.perf_counter() - began
    lengths = [next((i + 1 for i, token in enumerate(y) if token in stop), len(y)) for y in written]
    return 1000 * seconds / sum(lengths)


def our_rollouts(may_end: bool, folder: str) -> float:
    task, model = bench_task(folder, may_end), files.load_checkpoint(folder).bfloat16()

    def run(step: int) -> list[list[int]]:
        return sample(model, prompts_of(task, step), task.max_response, task.stop, GROUP, generator=seeded(step))[0]

    return rollout_time(run, task.stop)


def our_step(method: str, folder: str) -> float:
    task, base = bench_task(folder), files.load_checkpoint(folder).bfloat16().requires_grad_(False)
    config = configure(method, finetune="lora", group=GROUP)
    student, weights = trainable_copy(base, "lora")
    optimizer = torch.optim.AdamW(weights, lr=RATE)

    def run(step: int) -> None:
        rollouts = sample_rollouts(student, task, draw(task, step), GROUP, seeded(step))
        rollouts = [dataclasses.replace(y, verdict=Verdict(i % 2 == 1, True, None)) for i, y in enumerate(rollouts)]
        lessons = []
        for y, peer, A in pairs_to_learn_from(rollouts, config):
            prompts = task.prompt(y.problem), teacher_prompt(task, y, peer, None, config)
            lessons.append(Lesson(*map(task.encode, prompts), y.tokens, y.logprobs, 0, len(y.tokens), A))
        update(student, base, weights, optimizer, lessons, config)

    return best_step(run)


def their_model(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def with_adapters(folder: str) -> Any:
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(r=8, lora_alpha=8, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    return get_peft_model(their_model(folder), adapters)


def their_rollouts(may_end: bool, folder: str) -> float:
    task, model, settings = bench_task(folder, may_end), their_model(folder), SAMPLING
    if may_end:
        settings = SAMPLING | {"max_new_tokens": LONGEST, "min_new_tokens": None, "eos_token_id": list(task.stop)}

    def run(step: int) -> list[list[int]]:
        ids = pad([prompt[::-1] for prompt in prompts_of(task, step)], -1).flip(1)  # padded on the left
        given = {"attention_mask": (ids >= 0).long(), "num_return_sequences": GROUP}
        return model.generate(ids.clamp(min=0), **given, **settings)[:, ids.size(1) :].tolist()

    return rollout_time(run, task.stop)


def trl_step(method: str, folder: str) -> float:
    from datasets import Dataset
    from transformers import TrainerCallback

    trl, kind = importlib.import_module("trl" if method == "grpo" else "trl.experimental.sdpo"), {}
    if method == "sdpo":
        kind = {"distillation_mode": "topk_logits", "distillation_topk": 100, "distillation_add_tail": True}
        kind |= {"distillation_alpha": 0.5, "teacher_model_kind": "base"}
    Settings, Trainer = (getattr(trl, method.upper() + name) for name in ("Config", "Trainer"))
    task, seconds = bench_task(folder), []
    problems = [problem for step in range(1 + STEPS) for problem in draw(task, step)]
    requests = [messages(task, problem) for problem in problems]

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seconds.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds[-1] += time.perf_counter()

    def every_other(completions: list, **_: Any) -> list[float]:
        return [float(i % 2) for i in range(len(completions))]

    with TemporaryDirectory() as out:
        kind |= {"per_device_train_batch_size": BATCH * GROUP, "num_generations": GROUP, "max_completion_length": NEW}
        kind |= {"generation_kwargs": {"min_new_tokens": NEW}, "gradient_checkpointing": False, "bf16": False}
        silent = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        settings = Settings(output_dir=out, max_steps=1 + STEPS, learning_rate=RATE, **kind, **silent)
        rows = Dataset.from_dict({"prompt": requests})
        Trainer(with_adapters(folder), every_other, settings, rows, callbacks=[Clock()]).train()
    return min(seconds[1:])


def book_step(folder: str) -> float:
    task, model = bench_task(folder), with_adapters(folder)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=RATE)

    def logits_of(prompt: list[int], y: torch.Tensor) -> torch.Tensor:
        ids = torch.cat((torch.tensor([prompt] * len(y)), y), dim=1)
        return model(ids, use_cache=False, logits_to_keep=NEW + 1).logits[:, :-1]  # (4, NEW, V)

    def with_tail(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        kept = (logits.gather(-1, index) - logits.logsumexp(dim=-1, keepdim=True)).float()
        rest = kept.logsumexp(dim=-1, keepdim=True).clamp(max=-1e-7)
        return torch.cat((kept, torch.log(-torch.expm1(rest))), dim=-1)

    def run(step: int) -> None:
        optimizer.zero_grad()
        for problem in draw(task, step):
            x = task.encode(task.prompt(problem))
            with torch.no_grad():
                ids = torch.tensor([x])
                written = model.generate(input_ids=ids, num_return_sequences=GROUP, **SAMPLING)[:, len(x) :]
            x_T = task.encode(task.prompt(problem, solution=task.decode(written[1].tolist())))
            for y in written.split(4):
                student = logits_of(x, y)
                index = student.topk(20, dim=-1).indices
                with torch.no_grad():
                    q = with_tail(logits_of(x_T, y), index)
                p = with_tail(student, index)
                ((p.exp() * (p - q)).sum() / (BATCH * written.numel())).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return best_step(run)


CONTESTS: dict[str, dict[str, Callable[[str], float]]] = {  # the first is ours
    "rollouts, all full": {"ours": partial(our_rollouts, False), "transformers": partial(their_rollouts, False)},
    "rollouts, to their ends": {"ours": partial(our_rollouts, True), "transformers": partial(their_rollouts, True)},
    "GRPO step": {"ours": partial(our_step, "grpo"), "TRL": partial(trl_step, "grpo")},
    "SDPO step": {"ours": partial(our_step, "sdpo"), "TRL": partial(trl_step, "sdpo"), "RLHF book": book_step},
}


def contestant(contest: str, name: str, folder: str) -> tuple[float, float]:
    """Seconds, and the peak memory of this process in MB."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}  # nothing is fetched, and nothing reported
    return CONTESTS[contest][name](folder), peak_memory_mb() or float("nan")


def compare(folder: str, repeats: int) -> str:
    """The best step of each contestant over `repeats` processes, and the largest peak."""
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for _ in range(repeats):
        for key in ((contest, name) for contest, names in CONTESTS.items() for name in names):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                try:
                    seconds, peak = process.submit(contestant, *key, folder).result()
                except ImportError as error:
                    raise UserError(f"{key[1]} needs {error.name}; pip install trl peft") from error
            before = best.get(key, (float("inf"), 0))
            best[key] = min(before[0], seconds), max(before[1], peak)
    rows = []
    for (contest, name), (seconds, peak) in best.items():
        ratio = seconds / best[contest, "ours"][0]
        unit = "s / 1,000 tokens" if "ends" in contest else "s"
        rows.append([contest, name, f"{seconds:.2f} {unit}", f"{peak:,.0f} MB", f"{ratio:.2f}x"])
    return markdown_table([f"{BATCH} x {GROUP} rollouts", "", "best time", "peak memory", "this / ours"], rows)


def main() -> None:
    config = parse_config(Config, __doc__)
    if not config.real:
        raise UserError("give the folder of a Hugging Face model with --real")
    print(compare(config.real, config.repeats))


if __name__ == "__main__":
    run_script(main)
