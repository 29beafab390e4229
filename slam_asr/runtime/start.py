"""Runs a module in a process that ends with its parent: `python -m slam_asr.runtime.start MODULE ARGUMENTS`.

The module's own imports may take ten seconds or more, so `die_with_parent` is called before them. Otherwise,
a stage that is killed during these imports, for example because memory runs out, would leave processes that
continue to hold memory.
"""

import runpy
import sys

from slam_asr.runtime.worker import die_with_parent


def main() -> None:
    """Run the module that the first argument names, as `python -m` does."""
    die_with_parent()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
