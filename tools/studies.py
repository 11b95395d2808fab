"""The studies as data: which script runs with which flags, from which bases, with which seeds.

A study's `flags` are those of every run; a variant's flags come after them, and the last one counts.
"""

from dataclasses import dataclass

BASES = (30, 31, 32, 33, 34)  # pretraining seeds, results/bases/seed<N>.pt; all settings were chosen on seeds 0 to 14
SEEDS = (0, 1, 2)


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
QUOTES = {"span mask": "--mask span"} | {
    f"span mask, {kind} quotes": f"--mask span --control {kind}-quotes" for kind in ("random", "other")
}
UNMARKED = "--calibration-domain mix add sub mul long"
FULL, RANDOM = "--loss full", "--subspace random"  # another draw with every seed
KEYS, HALF, COLD, GREEDY = "--project kv", "--rank 50%", "--calibration-temperature 1", "--temperature 0"
KEEP98 = "--rank keep98%"
KINDS = {"aligned": "", "full": FULL, "random": RANDOM}  # values of layers floor(L/2) and L
SUBSPACES = KINDS | {
    "aligned, on results alone": "--loss results",
    "aligned, calibrated at temperature 1": COLD,
    "aligned, calibrated without the mark": UNMARKED,
    "full, calibrated without the mark": f"{FULL} {UNMARKED}",
}
SUBSPACES |= {"aligned, keeping 98 %": KEEP98, "aligned, half rank": HALF, "random, half rank": f"{RANDOM} {HALF}"}
SUBSPACES |= {f"{name}, keys too, half rank": f"{flags} {KEYS} {HALF}".strip() for name, flags in KINDS.items()}

SMOLLM2 = ("smollm2",)  # the folder that `python -m tools.smollm2 smollm2` makes
TESTS = "--eval-problems 400 --eval-samples 1 --eval-temperature 0"
REAL = "--task gym:chain_sum:max_digits=1:seed=4,products:seed=4 --shots 2"  # the best of 18 prompts
REAL += " --max-response 40 --learning-rate 5e-4"
REAL += f" {TESTS}"
CHAINS = "--task steps --shots 4 --learning-rate 5e-4 --eval-problems 200 --eval-samples 1 --eval-temperature 0"
FASTER = "--learning-rate 1e-3"  # the best of four for both; ROSD does as well at 5e-4
ORACLE = "--reflector oracle"
TAUGHT = "--reflector out/reflects/model --reflect-shots 0"  # as tools/teach_reflection.py makes it
RULE = "--layers 6 --project k --rank 50% --loss results --calibration-temperature 1 --temperature 0"

STUDIES = {
    "rosd": Study(METHODS | {"ROSD, whole mask": "--mask whole"}, seeds=SEEDS[:1], curve=CURVE),
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
        },
        seeds=SEEDS[:1],
        curve=CURVE,
    ),
    "ablations": Study(
        {
            "ROSD": "",
            "whole mask": "--mask whole",
            "without reflection": "--context peer",
            "half of the ideas false": "--control false-ideas --dose 0.5",
            "all ideas false": "--control false-ideas",
            "ideas of other problems": "--control other-ideas",
        },
        seeds=SEEDS[:1],
        curve=CURVE,
    ),
    "quotes": Study(QUOTES),  # the same with the loss on the quote alone
    "quotes-early": Study(QUOTES, "--domain mix --steps 10"),
    "teacher": Study(
        {"frozen": ""}
        | {f"EMA {rate}": f"--ema {rate}" for rate in (0.02, 0.05, 0.1, 0.2)}
        | {"span mask, frozen": "--mask span", "span mask, EMA 0.05": "--mask span --ema 0.05"}
    ),
    "rosd-released": Study({"ROSD": ""} | RELEASED, seeds=SEEDS[:1]),
    "facts": Study({"ROSD": "", "GRPO": "--method grpo"}, "--task facts", seeds=SEEDS[:1]),  # a fact, or a skill?
    "rosd-domains": Study(
        {
            f"{name} on {domain}": f"--domain {domain} {flags}".strip()
            for domain in ("add", "sub", "mul", "long")
            for name, flags in THREE.items()
        },
        flags="",
    ),
    "collapse": Study(
        {"ROSD": "", "GRPO": "--method grpo"},
        flags="--domain mix --steps 100 --eval-every 10",
        bases=BASES[:3],
        seeds=SEEDS[:1],
        curve=("accuracy", "home", "away", "merged", "checked", "unfinished"),
    ),
    "moonshot": Study(  # can a reflection do as well as a reward, from as many rollouts?
        {
            "GRPO": "--method grpo",
            "GRPO, 3 passes": "--method grpo --updates 3",
            "3 passes": "--updates 3",
            "span mask, 3 passes": "--mask span --updates 3",
            "span mask, 6 passes": "--mask span --updates 6",
            "span mask, 3 passes, reverse KL": "--mask span --updates 3 --alpha 1",
            "span mask, forward KL": "--mask span --alpha 0",
            "span mask, EMA 0.05, the student reflects": "--mask span --ema 0.05 --reflector student",
            "span mask, learning rate x3": "--mask span --learning-rate 0.003",
        },
        curve=(),
    ),
    "curves": Study(
        {"ROSD": "", "wrong rollouts alone": WRONG, "SDPO": "--method sdpo", "GRPO": "--method grpo"},
        flags="--domain mix --eval-every 5",
        seeds=SEEDS[:1],
        curve=("accuracy", "home", "away", "quote_match", "quote_accuracy", "error_position"),
    ),
    "evaluation": Study(THREE, flags="--domain mix --eval-temperature 0.6 --eval-top-p 0.95"),
    "spd-text": Study(  # what the base writes, before any training
        SUBSPACES | {f"{name}, greedy": f"{flags} {GREEDY}".strip() for name, flags in KINDS.items()},
        "--epochs 0 --prompts 1",
        curve=(),
        reference="base",
        script="train_spd.py",
    ),
    "spd": Study(
        {"SPD": "", "PSR": "--method psr", "SSD": "--method ssd", "SPD, full": FULL, "SPD, random": RANDOM}
        | {"SPD, keeping 98 %": KEEP98},
        "--eval-problems 256",
        curve=(),
        script="train_spd.py",
    ),
    "real-rosd": Study(  # chains: an oracle separates the method from its reflector, a mask from its place
        {
            "ROSD, an oracle reflects": ORACLE,
            "ROSD, an oracle reflects, whole mask": f"{ORACLE} --mask whole",
            "ROSD, an oracle reflects falsely": f"{ORACLE} --control false-ideas",
            "ROSD, an oracle reflects, wrong rollouts alone": f"{ORACLE} {WRONG}",
            "ROSD, an oracle reflects, correct rollouts alone": f"{ORACLE} --learn-from right",
            "ROSD, a taught reflector": TAUGHT,
            "ROSD": "",
            "SDPO": f"{METHODS['SDPO']} {FASTER}",
            "GRPO": f"{METHODS['GRPO']} {FASTER}",
        },
        f"{CHAINS} --finetune lora --steps 20 --batch 4 --group 4",
        SMOLLM2,
        curve=("accuracy", "quote_match", "quote_accuracy"),
        reference="base",
    ),
    "real-rosd-more": Study(  # what has to be right of an oracle's reflections
        {
            "ideas of other problems": f"{ORACLE} --control other-ideas",
            "span mask": f"{ORACLE} --mask span",
            "random quotes": f"{ORACLE} --control random-quotes",
            "quotes of other rollouts": f"{ORACLE} --control other-quotes",
            "wrong rollouts alone, whole mask": f"{ORACLE} {WRONG} --mask whole",
        },
        f"{CHAINS} --finetune lora --steps 20 --batch 4 --group 4",
        SMOLLM2,
        reference="base",
    ),
    "real-sums": Study(  # responses of one sentence, "The answer is 7"
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
            "SSD": "--method ssd --temperature 0",  # SPD without the projection
        },
        f"{REAL} --prompts 200 --calibration-size 100 --epochs 2 --batch 8",
        SMOLLM2,
        curve=(),
        script="train_spd.py",
    ),
}


def planned(study: Study) -> int:
    return len(study.variants) * len(study.bases) * len(study.seeds)


def flags_of(study: Study, variant: str) -> str:
    return f"{study.flags} {study.variants[variant]}".strip()
