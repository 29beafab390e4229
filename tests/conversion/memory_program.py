"""A program that the tests run: it prints the peak anonymous memory of a conversion.

It prints this as a multiple of the model's largest weight. Its arguments are the target format; recipe,
checkpoint and output of a small model; and the same three of the model that is measured. The small model is
converted first, so that the libraries have already allocated their own memory.
"""

import sys
from pathlib import Path

from safetensors import safe_open

from slam_asr.config.recipe import load_recipe
from slam_asr.stages.convert_checkpoint import convert_checkpoint
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
