"""Files, arguments and output are UTF-8 in every locale."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROMPT = "Transcris ce qui est dit en français, 请转写。"
FOLDERS = ("slam_asr", "pipelines", "components", "images", "demo", "docs", "requirements", "benchmarks")


def without_encoding(tree: ast.AST) -> Iterator[str]:
    """Yield calls that open text without an encoding. Ruff's PLW1514 misses objects of unknown types."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        keywords = {keyword.arg for keyword in node.keywords}
        if (name in ("read_text", "write_text") or (name in ("run", "Popen") and "text" in keywords)) and (
            "encoding" not in keywords and not (name == "read_text" and node.args)
        ):
            yield f"line {node.lineno}: {ast.unparse(node)[:60]}"


def test_every_call_that_reads_or_writes_text_names_its_encoding():
    found = [
        f"{file.relative_to(ROOT)}, {call}"
        for folder in FOLDERS
        for file in sorted((ROOT / folder).rglob("*.py"))
        for text in [file.read_text(encoding="utf-8")]
        if any(name in text for name in ("read_text(", "write_text(", "text=True"))
        for call in without_encoding(ast.parse(text))
    ]
    assert not found
    assert len(list(without_encoding(ast.parse("x.read_text()\nx.write_text(y)\nrun(z, text=True)")))) == 3


@pytest.fixture(scope="module", params=[("en_US", "ISO-8859-1"), ("zh_CN", "GBK")], ids=lambda pair: pair[1])
def environment(request, tmp_path_factory) -> dict[str, str]:
    """Compile a locale that is not UTF-8; return an environment with it."""
    folder = tmp_path_factory.mktemp("locales")
    name = "{}.{}".format(*request.param)
    subprocess.run(["localedef", "-i", request.param[0], "-f", request.param[1], folder / name], check=True)
    unset = ("LANG", "LC_CTYPE", "PYTHONUTF8", "PYTHONIOENCODING", "SLAM_ASR_WARM")
    return {name: value for name, value in os.environ.items() if name not in unset} | {
        "LOCPATH": str(folder),
        "LC_ALL": name,
        "PYTHONPATH": str(ROOT),
    }


def output_of(folder: Path, environment: dict[str, str], program: str, *arguments: str) -> bytes:
    (folder / "program.py").write_text(program, encoding="utf-8")
    command = [sys.executable, folder / "program.py", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout


FILES = """
import sys
from pathlib import Path
assert sys.getfilesystemencoding() != "utf-8" and not sys.flags.utf8_mode
from slam_asr.artifacts.stage_record import Outcome, read_record, run_stage
from slam_asr.config.recipe import dump_recipe, load_recipe
from slam_asr.progress import log_line
from slam_asr.runtime.environment import prepare_environment
from slam_asr.storage import write_atomically
prepare_environment()
folder = Path(sys.argv[1])
recipe = load_recipe(str(folder / "given.yaml"))
def work(folder):
    write_atomically(folder / "recipe.yaml", dump_recipe(recipe))
    return Outcome(recipe.llm.prompt)
record = run_stage("a-stage", str(folder / "out"), {"prompt": recipe.llm.prompt}, work)
assert read_record(folder / "out").summary == recipe.llm.prompt
assert load_recipe(str(folder / "out" / "recipe.yaml")) == recipe
log_line(recipe.llm.prompt + " ☃")
"""


@pytest.mark.real_input("B20-locale")
def test_files_are_utf8_under_any_locale(environment, tmp_path):
    (tmp_path / "given.yaml").write_text(f'llm: {{prompt: "{PROMPT}"}}', encoding="utf-8")
    output_of(tmp_path, environment | {"PYTHONUTF8": "0"}, FILES, str(tmp_path))
    assert f'"summary": "{PROMPT}"' in (tmp_path / "out" / "stage.json").read_text(encoding="utf-8")
    assert f"prompt: {PROMPT}\n" in (tmp_path / "out" / "recipe.yaml").read_text(encoding="utf-8")


ARGUMENTS = """
import sys
from slam_asr.runtime.environment import prepare_environment
prepare_environment()
print(*sys.argv[1:], "☃")
open(sys.argv[2], "w").close()
"""


def test_arguments_and_output_are_utf8_under_any_locale(environment, tmp_path):
    file = tmp_path / "père 文"
    assert (
        output_of(tmp_path, environment, ARGUMENTS, PROMPT, str(file)).decode("utf-8")
        == f"{PROMPT} {file} ☃\n"
    )
    assert file.is_file()


@pytest.mark.slow
@pytest.mark.cold
def test_the_command_line_is_utf8_under_any_locale(environment):
    command = [sys.executable, "-m", "slam_asr", "compare", PROMPT, "b"]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.decode("utf-8").startswith(f"slam-asr: error: {PROMPT} contains no hypotheses")
