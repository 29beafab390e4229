"""Each input of users that once gave a wrong result is named by the test that verifies the right result."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
INPUTS = TESTS.parents[1] / "shared" / "cases"


def test_each_input_of_users_is_named_by_a_test():
    names = sorted(folder.name for folder in INPUTS.glob("B*") if folder.is_dir())
    if not names:
        pytest.skip("needs the inputs in ../shared/cases, which are not in this repository")
    texts = [file.read_text(encoding="utf-8") for file in TESTS.rglob("test_*.py")]
    marks = "".join(line for text in texts for line in text.splitlines() if "mark.real_input(" in line)
    assert [name for name in names if f'"{name}' not in marks] == []
