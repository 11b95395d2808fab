"""The other tools: pictures, memory, the benchmark, and what is measured on real weights."""

import itertools
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROWS, Letters, tiny_gpt, write_lines

from data import Task, load_task
from data.answers import final_answer
from data.sources import WordProblem
from data.steps import solve
from data.working import first_mistake
from harness import files
from model import GPT, response_logprobs
from reflect import Rollout, parse_reflection
from tools import bench, memory, plots, real_audit, real_spd, selectivity, stats, teach_reflection
from tools.plots import line

# ---------------------------------------------------------------------------------------------- pictures


def test_pictures_are_drawn_from_the_results_with_text_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "curves.json").write_bytes((stats.RESULTS / "curves.json").read_bytes())
    monkeypatch.setattr(stats, "RESULTS", tmp_path)
    plots.PICTURES["curves"]()
    assert ">wrong rollouts alone" in files.read_text(tmp_path / "curves.svg")


def test_selectivity_is_drawn_over_rank_as_a_share_of_the_bases_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(stats, "RESULTS", tmp_path)
    rows, lines = [], []
    for base in (0, 1):
        plain = {"base": base, "draw": 0, "right": -1.0, "step": -2.0, "check": 0.8, "mark": 1.0}
        rows.append(plain | {"where": "", "rank": 100, "subspace": "none"})
        names = ("aligned", "full", "random", "aligned, on results alone")
        for where, name, rank in itertools.product(selectivity.SITES, names, (16, 50)):
            left = 0.4 if where == selectivity.ALL_LAYERS else 0.6 if base or rank == 50 else 0.2
            rows.append(plain | {"where": where, "rank": rank, "subspace": name, "check": left})
    files.write_json(tmp_path / "selectivity.json", {"bases": {}, "rows": rows})
    monkeypatch.setattr(plots, "line", lambda axis, points, *more: lines.append(points) or line(axis, points, *more))
    plots.PICTURES["selectivity"]()
    assert lines[0] == {rank: {(0, 0): 1.0, (1, 0): 1.0} for rank in (16, 50)} and len(lines) == 3 * 4
    most = pytest.approx(0.75)
    assert lines[8] == {16: {(0, 0): 0.25, (1, 0): most}, 50: {(0, 0): most, (1, 0): most}}
    drawn = files.read_text(tmp_path / "selectivity.svg")
    for text in ("whole steps", "the habit of checking", "random, ten draws", "% of the base's own"):
        assert f">{text}<" in drawn
    plots.PICTURES["selectivity-all"]()
    assert len(lines) == 24 and lines[20] == {rank: {(0, 0): 0.5, (1, 0): 0.5} for rank in (16, 50)}
    assert ">What survives a projection of values at all layers<" in files.read_text(tmp_path / "selectivity-all.svg")


def test_curves_start_at_the_base_and_count_updates_and_rollouts() -> None:
    scores = {"mix": {"mean": 0.5}, "add": {"mean": 0.1}, "sub": {"mean": 0.3}}
    curve = {"accuracy": [0.4, 0.6], "away": [None, 0.7]}
    run = {"base": 0, "seed": 0, "domain": "mix", "before": scores, "updates": 8, "rollouts": 512, "curve": curve}
    assert plots.curve([run], "away") == {0: {(0, 0): pytest.approx(0.2)}, 2: {(0, 0): 0.7}}
    assert list(plots.curve([run], "away", "updates")) == [0, 8]
    assert list(plots.curve([run], "away", "rollouts")) == [0, 512]
    assert plots.curve([run], "accuracy") == {0: {(0, 0): 0.4}, 1: {(0, 0): 0.6}}  # of rollouts before an update


# ---------------------------------------------------------------------------------------------- memory


def test_full_training_takes_18_bytes_a_weight_and_low_rank_updates_little_more_than_two() -> None:
    P = 596_049_920 / 2**30  # weights of Qwen3-0.6B, as its safetensors hold them
    full, lora = (memory.gigabytes("Qwen3-0.6B", finetune, memory.Config()) for finetune in ("full", "lora"))
    assert sum(full[part] for part in ("weights", "gradients", "AdamW")) == pytest.approx(18 * P)
    assert 2 * P < sum(lora[part] for part in ("weights", "gradients", "AdamW")) < 2.1 * P


def test_the_documents_memory_table_is_what_the_tool_prints(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["memory"])
    memory.main()
    assert capsys.readouterr().out in files.read_text(files.ROOT / "docs" / "real_models.md")


# ---------------------------------------------------------------------------------------------- real weights


@pytest.mark.parametrize("method", ["grpo", "sdpo"])
def test_the_benchmark_teaches_every_rollout_over_its_full_length(
    method: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "SHOTS", 1)  # the folder's model reads 2,048 tokens
    batches = []
    monkeypatch.setattr(bench, "update", lambda *given: batches.append(given[4]))
    bench.our_step(method, str(folder))
    for batch in batches:
        assert [(x.start, x.end) for x in batch] == [(0, bench.NEW)] * bench.BATCH * bench.GROUP


@pytest.mark.parametrize("may_end", [False, True], ids=["all full", "to their ends"])
def test_both_sides_of_the_benchmark_write_as_many_tokens_as_they_are_timed_for(
    may_end: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "SHOTS", 1)  # the folder's model reads 2,048 tokens
    monkeypatch.setattr(bench, "LONGEST", 96)
    monkeypatch.setattr(bench, "rollout_time", lambda run, stop: (run(0), stop))
    (ours, stop), (theirs, _) = (run(may_end, str(folder)) for run in (bench.our_rollouts, bench.their_rollouts))
    assert len(ours) == len(theirs) == bench.BATCH * bench.GROUP
    if not may_end:
        assert {len(response) for response in ours + theirs} == {bench.NEW}
    for response in ours if may_end else []:
        assert len(response) == bench.LONGEST or response[-1] in stop


def test_rollouts_that_end_are_timed_per_thousand_tokens_up_to_their_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def run(step: int) -> list[list[int]]:
        clock[0] += 1
        return [[5, 5, 5, 9, 0, 0], [5] * 6]  # the first ends with its stop token, 9: 10 tokens in 1 s

    assert bench.rollout_time(run, (9,)) == pytest.approx(100)


REFLECTION = "<error_quote>= 77</error_quote><explanation>It is {answer}.</explanation>"


@pytest.fixture(scope="module")
def eggs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Task:
    return load_task(str(write_lines(tmp_path_factory.mktemp("data") / "eggs.jsonl", ROWS)), folder)


def test_the_audit_measures_and_tabulates_every_hint(eggs: Task, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rollouts(_: GPT, task: Task, problems: list, group: int, __: object) -> list[Rollout]:
        texts = [(p, text) for p in problems for text in [f"a + b = {p.answer}"] * (group - 1) + ["a + b = 77"]]
        written = [(p, task.encode(text), text) for p, text in texts]
        return [Rollout(p, y, [], text, task.pieces(y), task.verify(p, text)) for p, y, text in written]

    def greedy(_: GPT, task: Task, length: int, prompts: list[str]) -> list[str]:
        return [REFLECTION.format(answer=7) if length == task.max_reflection else "I say 7" for _ in prompts]

    monkeypatch.setattr(real_audit, "sample_rollouts", rollouts)
    monkeypatch.setattr(real_audit, "greedy", greedy)
    found = real_audit.audit(GPT.from_pretrained(folder), eggs, real_audit.Config(problems=12, grid=4))
    assert found["wrong"] == found["with an idea"] == found["problems"] and found["right"] == 0.75
    assert all(way["quote found"][0] == way["an idea"][0] == 1 for way in found["reflections"].values())
    assert {row: 0 <= by["P after the mark"][0] <= 1 for row, by in found["hints"].items()}.keys() == {
        "no hint", "an irrelevant hint", "its own reflection", "the true result", "a wrong result",
        "... and that wrong result", "a reference solution",
    }  # fmt: skip
    assert found["hints"]["no hint"]["greedy"][2:] == [0, 0]
    assert "| no hint" in real_audit.tables(json.loads(json.dumps(found)))


FIRST, MIDDLE = "8 + 5 = 14\n14 - 2 = 12\nThe answer is 12", "8 + 5 = 13\n13 + 2 = 15\n15 - 0 = 15\nThe answer is 15"
LAST, ANSWER = "8 + 5 = 13\n13 - 2 = 12\nThe answer is 12", "8 + 5 = 13\n13 - 2 = 11\nThe answer is 12"


@pytest.mark.parametrize(
    ("text", "at", "kept"),
    [
        (FIRST, "first", FIRST[:-2]),
        (MIDDLE, "middle", MIDDLE[:-2]),
        (LAST, "last", LAST[:-2]),
        (ANSWER, "last", None),  # the error is the answer itself
        ("8 + 5 = 14", "first", None),
    ],
)
def test_an_error_has_its_place_in_the_chain_and_an_answer_behind_it(text: str, at: str, kept: str | None) -> None:
    mistake = first_mistake([(8,), (5,), (-2,)], text, final_answer(text, "11"), ended=True)
    assert mistake and real_audit.place(text, mistake) == at
    assert real_audit.before_answer(text, mistake) == kept


def test_the_audit_of_steps_measures_the_right_step_at_the_error_and_the_truth_of_quotes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, model, seen = load_task("steps", folder, max_response=48), GPT.from_pretrained(folder), []
    sums = WordProblem(
        "What is 8 + 5 - 2?", solve([(8,), (5,), (-2,)]), "11", "sums", 0, {"terms": [(8,), (5,), (-2,)]}
    )
    wrong = []
    for text in (FIRST, LAST, FIRST, ANSWER):
        y = task.encode(text)
        wrong.append((Rollout(sums, y, [], text, task.pieces(y), task.verify(sums, text)), "Begin with 8."))
    real = real_audit.probability
    monkeypatch.setattr(real_audit, "greedy", lambda _, task, length, prompts: ["The answer is 11"] * len(prompts))
    monkeypatch.setattr(real_audit, "probability", lambda *given: seen.append(given[3:]) or real(*given))
    found = real_audit.step_hints(model, task, wrong, random.Random(0))
    assert seen[0] == (["8 + 5 = ", "8 + 5 = 13\n13 - 2 = ", "8 + 5 = ", ANSWER[:-2]], ["13", "11", "13", "11"])
    assert seen[1][1] == ["11"] * 3 and seen[2][1] == ["12"] * 3  # the answers behind the errors
    assert set(found["the true step"]) >= {"first (2)", "last (2)", "its own answer behind it", "greedy"}
    assert found["no hint"]["greedy"][0] == 1
    true = [(y, task.true_reflection(y.problem, y.text)) for y, _ in wrong]
    assert list(real_audit.truth(task, true).values()) == [[1, 0], [1, 0]]
    assert real_audit.truth(task, wrong)["quote of the first error"][0] == 0


def test_a_probability_is_that_of_the_whole_answer(eggs: Task, folder: Path) -> None:
    model = GPT.from_pretrained(folder)
    one = real_audit.probability(model, eggs, ["ask"] * 10, ["= "] * 10, list("0123456789"))
    two = real_audit.probability(model, eggs, ["ask"] * 100, ["= "] * 100, [f"{n:02}" for n in range(100)])
    assert all(p > 0 for p in one + two) and sum(one) + sum(two) < 1  # what is left begins otherwise or is longer


def test_the_tables_of_the_audits_page_are_those_of_its_json() -> None:
    page = files.read_text(stats.RESULTS / "real-audit.md")
    for task, found in files.read_json(stats.RESULTS / "real-audit.json").items():
        assert task in page and real_audit.tables(found) in page


def test_golden_solutions_are_weighed_with_their_end() -> None:
    task, model = Letters(), tiny_gpt(Letters())
    (problem,) = problems = [task.problem("one", random.Random(0))]
    y = [*task.encode(problem.solution), task.end()]
    logp = response_logprobs(model, [task.encode(task.prompt(problem))], [y])[0]
    expected = sum(logp[t, token].item() for t, token in enumerate(y))
    assert real_spd.golden_logp(model, task, problems) == pytest.approx(expected)


def test_spd_on_real_weights_takes_the_best_site(monkeypatch: pytest.MonkeyPatch) -> None:
    task, model, seen = Letters(), tiny_gpt(Letters()), []
    monkeypatch.setattr(real_spd, "golden_logp", lambda *_: seen.append(0) or -abs(len(seen) - 5))
    gradients = {"aligned": real_spd.condensed_gradients(model, task, ("one",), 12, "results")}
    config = real_spd.Config(every=1, ranks=("25%", "50%"), search=3)
    best = real_spd.best_site(model, task, gradients, "random", config)
    assert len(seen) == (model.config.n_layer + 1) * 3 * 2 and str(best) == "layer 1 kv 25%"


def test_equal_problems_count_once_and_differences_are_paired_by_problem() -> None:
    config = real_spd.Config(problems=100)
    assert len(real_spd.right_answers(tiny_gpt(Letters()), Letters(), config)) == 8  # 4 letters, 2 numbers
    rows = {"base": {"site": "", "right": "0011"}, "aligned": {"site": "layer 1 k 50%", "right": "1111"}}
    assert "| 100.0    | +50.0 ± 91.9 |" in real_spd.table({"tasks": {"sums": rows}})


# ---------------------------------------------------------------------------------------------- a start on reflections


def test_a_start_on_reflections_teaches_true_ones_and_leaves_a_folder_that_loads(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: list = []
    real = teach_reflection.next_token_loss
    monkeypatch.setattr(teach_reflection, "next_token_loss", lambda *x: taught.append(x[1]) or real(*x))
    flags = {"base": folder, "out": tmp_path, "steps": 2, "batch": 3, "max-response": 48, "device": "cpu"}
    monkeypatch.setattr(sys, "argv", ["teach", *(str(x) for name, x in flags.items() for x in (f"--{name}", x))])
    teach_reflection.main()
    task, model = load_task("steps", folder), files.load_checkpoint(tmp_path / "model")
    base = files.load_checkpoint(folder)
    assert any((a != b).any() for a, b in zip(model.parameters(), base.parameters(), strict=True))
    for documents in taught:
        for (prompt, reflection), right in zip(documents, (True, False, False), strict=True):
            request, written = task.decode(prompt), task.decode(reflection)
            assert ("A right solution:" not in request) == right and reflection[-1] == task.end()
            if not right:
                *walk, last = written.split("\n")
                quote, idea = parse_reflection(last)
                assert walk[-1] == f"{quote} | {idea} | different" and f"\n{quote}\n" in request
                assert all(line.endswith("| same") for line in walk[:-1])
