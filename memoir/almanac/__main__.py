"""`python -m memoir.almanac`: train the almanac's model again and put it in the place of the shipped one."""

from __future__ import annotations

import argparse
import json

from .edits import model_path
from .training import STEPS, train


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m memoir.almanac", description=__doc__)
    parser.add_argument("--out", default=model_path(), help="folder to write (default: the shipped model's)")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(json.dumps(train(options.out, steps=options.steps, seed=options.seed), indent=1))


if __name__ == "__main__":
    main()
