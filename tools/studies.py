"""The studies as data: which script runs with which flags, from which bases, with which seeds.

A study's `flags` are those of every run; a variant's flags come after them, and the last one counts. {aligned} among
them is the best site of this subspace on the base of the run (`best_site`), and {aligned|unmarked} is the better
site of two. They are chosen from results/spd-mechanism.json, which tools/mechanism.py writes.
"""

import itertools
import re
from dataclasses import dataclass

import numpy as np

from tools.stats import read_results

BASES = (10, 11, 12, 13, 14)  # pretraining seeds of results/bases/seed<N>.pt; everything was chosen on seeds 0 to 4
SEEDS = (0,)
CALIBRATION = dict.fromkeys(("aligned", "unmarked", "full", "random"), ("exam",))  # subspace -> domains
CALIBRATION["unmarked"] = ("mix", "add", "sub", "mul", "long")  # the same problems without the mark


@dataclass(frozen=True)
class Study:
    variants: dict[str, str]  # name -> flags
    flags: str = "--domain mix"
    bases: tuple[int | str, ...] = BASES  # a string is a Hugging Face folder
    seeds: tuple[int, ...] = SEEDS
    curve: tuple[str, ...] = ("accuracy",)  # columns of metrics.jsonl to keep; home and away are the short tests'
    reference: str = "first"  # what variants are compared with: the first of their training domain, or the base
    script: str = "train_rosd.py"


METHODS = {"ROSD": "", "SDPO": "--method sdpo", "OPSD": "--method opsd", "GRPO": "--method grpo"}
THREE = {name: METHODS[name] for name in ("ROSD", "SDPO", "GRPO")}
RELEASED = {f"{name} as released": f"{flags} --preset released".strip() for name, flags in METHODS.items()}
WRONG = "--learn-from wrong"
CURVE = ("accuracy", "solved")
GENERATION = "--domain exam --epochs 0 --prompts 1"  # of SPD: only what the base writes, before any training
TEXTS = {  # what the base writes under projection, at the best site of each base
    f"{name}{title}": f"{flags} {temperature}".strip()
    for title, temperature in ((", greedy", ""), (", T = 1", "--temperature 1"))
    for name, flags in (
        ("aligned", "{aligned|unmarked}"),
        ("full", "{aligned|unmarked} --loss full"),
        ("random", "{aligned|unmarked} --subspace random"),
        ("random at its best site", "{random} --subspace random"),
        ("aligned, calibrated on exam", "{aligned}"),
        ("aligned, calibrated without the mark", "{unmarked}"),
    )
}

SMOLLM2 = ("smollm2",)  # the folder that `python -m tools.smollm2 smollm2` makes
REAL = "--task gym:chain_sum:max_digits=1:seed=4,products:seed=4 --shots 2"  # the best of 18 prompts
REAL += " --max-response 40 --learning-rate 5e-4"
REAL += " --eval-problems 400 --eval-samples 1 --eval-temperature 0"
RULE = "--layers 6 --project k --rank 50%"  # the site that tools/real_spd.py chooses for these sums

STUDIES = {
    "rosd": Study(METHODS, curve=CURVE),
    "corrections": Study(  # do wrong rollouts teach, and what has to be right for it?
        {
            "wrong rollouts alone": WRONG,
            "correct rollouts alone": "--learn-from right",
            "ROSD": "",
            "wrong alone, whole mask": f"{WRONG} --mask whole",
            "wrong alone, span mask": f"{WRONG} --mask span",
            "wrong alone, true first error": f"{WRONG} --mask oracle",
            "wrong alone, random quotes": f"{WRONG} --control random-quotes",
            "wrong alone, quotes of other rollouts": f"{WRONG} --control other-quotes",
            "wrong alone, ideas false": f"{WRONG} --control false-ideas",
            "GRPO from wrong rollouts alone": f"--method grpo {WRONG}",
            "GRPO from correct rollouts alone": "--method grpo --learn-from right",
        },
        curve=CURVE,
    ),
    "ablations": Study(
        {"ROSD": ""}
        | {f"{mask} mask": f"--mask {mask}" for mask in ("whole", "span", "oracle")}
        | {"without reflection": "--context peer"}
        | {"random quotes": "--control random-quotes", "quotes of other rollouts": "--control other-quotes"}
        | {f"{dose:.0%} of the ideas false": f"--control false-ideas --dose {dose}" for dose in (0.25, 0.5)}
        | {"all ideas false": "--control false-ideas", "ideas of other problems": "--control other-ideas"},
        curve=CURVE,
    ),
    "rosd-released": Study({"ROSD": ""} | RELEASED),
    "facts": Study({"ROSD": "", "GRPO": "--method grpo"}, flags="--task facts"),  # is a fact learned, or a skill?
    "rosd-domains": Study(
        {
            f"{name} on {domain}": f"--domain {domain} {flags}".strip()
            for domain in ("add", "sub", "mul", "long")
            for name, flags in THREE.items()
        },
        flags="",
    ),
    "collapse": Study(
        {
            "suffix mask, frozen": "",
            "span mask, frozen": "--mask span",
            "suffix mask, EMA 0.03": "--ema 0.03",
            "span mask, EMA 0.05": "--mask span --ema 0.05",
            "GRPO": "--method grpo",
        },
        flags="--domain mix --steps 100 --eval-every 10",
        curve=("accuracy", "home", "away", "merged", "checked", "unfinished"),
    ),
    "moonshot": Study(  # can a reflection do as well as a reward, from as many rollouts?
        {
            "GRPO": "--method grpo",
            "GRPO, 3 passes": "--method grpo --updates 3",
            "3 passes": "--updates 3",
            "span mask, 3 passes": "--mask span --updates 3",
            "span mask, 6 passes": "--mask span --updates 6",
            "span mask, forward KL": "--mask span --alpha 0",
        },
        curve=(),
    ),
    "curves": Study(
        THREE | {"GRPO as released": RELEASED["GRPO as released"]},
        flags="--domain mix --eval-every 4",
        curve=("accuracy", "home", "away", "quote_match", "quote_accuracy", "error_position"),
    ),
    "evaluation": Study(THREE, flags="--domain mix --eval-temperature 0.6 --eval-top-p 0.95"),
    "spd": Study(
        {
            "SPD": "{aligned|unmarked}",
            "PSR": "--method psr",
            "SSD": "--method ssd",
            "SSD, T = 0.3": "--method ssd --temperature 0.3",
            "SSD, T = 0.6": "--method ssd --temperature 0.6",
            "SPD, full-sequence loss": "{aligned|unmarked} --loss full",
            "SPD, random subspace": "{aligned|unmarked} --subspace random",  # another draw with every seed
            "SPD, random subspace at its best site": "{random} --subspace random",
            "SPD, T = 1": "{aligned|unmarked} --temperature 1",  # beside PSR, which samples at the same temperature
            "SPD, calibrated on exam": "{aligned}",
            "SPD, calibrated without the mark": "{unmarked}",
        },
        flags="--domain exam",
        seeds=(0,),
        curve=(),
        script="train_spd.py",
    ),
    "spd-text": Study(TEXTS, GENERATION, curve=(), reference="base", script="train_spd.py"),
    "real-rosd": Study(  # an oracle separates the method from its reflector, false results from the method
        THREE
        | {
            "ROSD, correct rollouts alone": "--learn-from right",
            "ROSD, wrong rollouts alone": "--learn-from wrong",
            "ROSD, ideas of other problems": "--control other-ideas",
            "ROSD, an oracle reflects": "--reflector oracle",
            "ROSD, an oracle reflects, whole mask": "--reflector oracle --mask whole",
            "ROSD, an oracle reflects, correct rollouts alone": "--reflector oracle --learn-from right",
            "ROSD, an oracle reflects, wrong rollouts alone": "--reflector oracle --learn-from wrong",
            "ROSD, an oracle reflects falsely": "--reflector oracle --control false-ideas",
        },
        f"{REAL} --finetune lora --steps 20 --batch 4 --group 4",
        SMOLLM2,
    ),
    "real-spd-runs": Study(
        {
            "SPD": RULE,
            "SPD, random subspace": f"{RULE} --subspace random",  # another draw with every seed
            "SPD, full-sequence loss": f"{RULE} --loss full",
            "PSR": "--method psr",
            "SSD": "--method ssd",  # greedy: SPD without the projection
        },
        f"{REAL} --prompts 200 --calibration-size 100 --epochs 2 --batch 8",
        SMOLLM2,
        curve=(),
        script="train_spd.py",
    ),
}


def planned(study: Study) -> int:
    return len(study.variants) * len(study.bases) * len(study.seeds)


def flags_of(study: Study, variant: str, base: int | str) -> str:
    """The flags of a run, its sites filled in."""

    def site_flags(found: re.Match) -> str:
        rows = mechanism_rows()
        best = max((best_site(rows, base, name) for name in found[1].split("|")), key=lambda row: row["golden"])
        where = f"--layers {best['layers']} --project {best['project']} --rank {best['rank']}%"
        return f"{where} --calibration-domain {' '.join(CALIBRATION[best['subspace']])}"

    return re.sub(r"\{([\w|]+)\}", site_flags, f"{study.flags} {study.variants[variant]}".strip())


def mechanism_rows(content: dict | None = None) -> list[dict]:
    """The rows of results/spd-mechanism.json, whose columns are named once, or of the same content.

    `golden` is the mean log-probability of golden solutions: of their tokens at S and of the rest.
    """
    content = content or read_results("spd-mechanism", "mechanism")
    rows = [dict(zip(content["columns"], row, strict=True)) for row in content["rows"]]
    return [row | {"golden": row["rest"] + content["S"] * row["right"]} for row in rows]


def best_site(rows: list[dict], base: int | str, subspace: str) -> dict:
    """The rule of the studies: where golden solutions of training problems are likeliest under projection.

    The measures of a site (layers, keys or values, rank) are averaged over the draws of a random subspace.
    """
    found = [row for row in rows if (row["base"], row["subspace"]) == (base, subspace)]
    draws = [list(same) for _, same in itertools.groupby(sorted(found, key=site_label), site_label)]
    best = max(draws, key=lambda same: np.mean([row["golden"] for row in same]))
    names = ("base", "layers", "project", "rank", "subspace", "draw")
    return {name: x if name in names else float(np.mean([row[name] for row in best])) for name, x in best[0].items()}


def site_label(row: dict) -> str:
    return f"layer {row['layers']} {row['project']} {row['rank']}%" if row["project"] else "not projected"
