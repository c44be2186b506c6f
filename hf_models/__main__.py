"""`python -m hf_models [PATTERN]` lists the zoo (names, parameters, papers) and the tested versions of transformers."""

import sys

import transformers

from .base import TESTED_TRANSFORMERS, ZOO_VERSION
from .zoo import ZOO, count_parameters, list_models


def main(pattern: str = "*"):
    names = list_models(pattern)
    if not names:
        sys.exit(f"no model matches {pattern!r}")
    width = max(map(len, names))
    print(f"{'name':<{width}} {'parameters':>14}  paper")
    for name in names:
        print(f"{name:<{width}} {count_parameters(name):>14,}  {ZOO[name].paper}")
    print(
        f"\nhf_models {ZOO_VERSION}, tested with transformers {', '.join(TESTED_TRANSFORMERS)}; "
        f"{transformers.__version__} is installed"
    )


if __name__ == "__main__":
    main(*sys.argv[1:2])
