"""Run by the tests: what anonymous memory a conversion takes, on standard output, as a multiple of the largest weight.

Arguments: the recipe, the checkpoint and the output, of a small model first, for what the libraries take once, then of the one that is measured.
"""

import sys
from pathlib import Path

from safetensors import safe_open

from slam_asr.conversion.convert import convert_checkpoint
from slam_asr.recipe import load_recipe
from tests.memory import peak_of_anonymous_memory


def main() -> None:
    to = sys.argv[1]
    for recipe, checkpoint, output in (sys.argv[2:5], sys.argv[5:8]):
        with peak_of_anonymous_memory() as peak:
            convert_checkpoint(checkpoint, output, to=to, recipe=load_recipe(recipe), verify=False)
    [file] = Path(output).rglob("model.safetensors")
    with safe_open(file, "pt") as written:
        largest = max(written.get_tensor(name).numel() * 4 for name in written.keys())  # noqa: SIM118 - not a dictionary
    print(peak[0] / largest)


if __name__ == "__main__":
    main()
