"""Speed and memory on real weights, beside transformers, TRL and the RLHF book's loop (tools/peers.py).

python -m tools.bench --real FOLDER    the table (needs `pip install trl peft`)
"""

from dataclasses import dataclass

import torch

from harness.cli import option, parse_config, run_script
from harness.errors import UserError
from tools import peers


@dataclass(frozen=True)
class Config:
    repeats: int = option(5, "repetitions; the best one counts", minimum=1)
    real: str = option("", "folder of a Hugging Face model")
    threads: int = option(0, "CPU threads; 0 leaves it to torch", minimum=0)


def main() -> None:
    config = parse_config(Config, __doc__)
    if not config.real:
        raise UserError("give the folder of a Hugging Face model with --real")
    print(peers.compare(config.real, config.threads or torch.get_num_threads(), config.repeats))


if __name__ == "__main__":
    run_script(main)
