"""Untrusted input cannot exhaust memory or time, leave its folder, or become code or markup.

docs/how-to/security.md lists the tests of each kind of input. This file has those that fit nowhere else.
"""

import ast
import re
from pathlib import Path

import pytest
import yaml

from pipelines.cluster import load_cluster
from pipelines.compile import compile_command, recipe_parameters, require_no_templates
from pipelines.kubeflow.submit import submit
from slam_asr.config.recipe import load_recipe
from slam_asr.config.variations import read_variations
from slam_asr.errors import UserError
from slam_asr.pages.render import render
from slam_asr.storage import fetch

ROOT = Path(__file__).parents[1]
CODE = ("slam_asr", "components", "pipelines")
LAUGHS = "".join(f"- &l{n} [{', '.join([f'*l{n - 1}'] * 10) if n else 'ha, ha'}]\n" for n in range(12))
"""YAML of about 650 bytes that expands to more than 2 · 10¹¹ values (the "billion laughs")."""


def sentence(call, *arguments) -> str:
    with pytest.raises(UserError) as raised:
        call(*arguments)
    assert "\n" not in raised.value.args[0] and len(str(raised.value)) < 1000
    return str(raised.value)


@pytest.mark.parametrize("key", ["training.deepspeed", "unknown"])
def test_aliases_in_yaml_do_not_exhaust_memory(key, tmp_path):
    sections = key.split(".")
    indented = "".join("  " * len(sections) + line + "\n" for line in LAUGHS.splitlines())
    text = "".join("  " * depth + f"{name}:\n" for depth, name in enumerate(sections)) + indented
    assert len(text) < 1000
    assert "refers to its own parts" in sentence(load_recipe, "\n" + text)
    file = tmp_path / "given.yaml"
    file.write_text(text, encoding="utf-8")
    for load in (load_recipe, read_variations, load_cluster):
        assert "refers to its own parts" in sentence(load, str(file))


def test_an_anchor_may_be_used_again():
    recipe = load_recipe("\nllm: {training_prompts: &p [one, two], lora: {targets: *p}}")
    assert recipe.llm.lora.targets == recipe.llm.training_prompts == ["one", "two"]


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system [id]", "!!python/name:os.system", "!include /etc/passwd"]
)
def test_yaml_names_no_code(tag):
    assert "not valid YAML" in sentence(load_recipe, f"\nname: {tag}")


@pytest.mark.parametrize(
    "overrides",
    [
        {"llm.prompt": "{{workflow.serviceAccountName}}"},
        {"name": "{{=sprig.env('HOME')}}"},
        {"data.audio_root": "s3://bucket/{{inputs.parameters.runtime-config}}"},
    ],
)
def test_argos_templates_in_a_recipe_are_refused(overrides):
    recipe = load_recipe("demo", overrides)
    for source in ("demo", "mine.yaml"):  # passed by name with overrides, and as text
        assert "Argo takes for a template" in sentence(
            require_no_templates, recipe_parameters(source, recipe)
        )
    require_no_templates(recipe_parameters("mine.yaml", load_recipe("demo")))


def test_argos_templates_are_refused_before_anything_is_compiled_or_submitted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpus = ["--corpus", "s3://bucket/{{pod.name}}", "--store", "s3://bucket/s"]
    assert "The parameter corpus contains '{{pod.name}}'" in sentence(compile_command, corpus)
    assert "The parameter corpus contains '{{pod.name}}'" in sentence(submit, ["demo", *corpus])
    assert list(tmp_path.iterdir()) == []


SHELLS = re.compile(r"os\.(system|popen)|subprocess\.get(status)?output|pty\.spawn")


def test_no_value_reaches_a_shell():
    """A step's parameters are arguments of its program, and no program starts another through a shell."""
    for file in sorted((ROOT / "tests" / "pipelines" / "golden").rglob("*.yaml")):
        pipeline = next(yaml.safe_load_all(file.read_text(encoding="utf-8")))
        for executor in pipeline["deploymentSpec"]["executors"].values():
            if "container" in executor:
                assert not [word for word in executor["container"]["command"] if "{{$" in word]
                assert executor["container"]["args"][:2] == ["--executor_input", "{{$}}"]
    for file in (file for folder in CODE for file in sorted((ROOT / folder).rglob("*.py"))):
        for call in (n for n in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(n, ast.Call)):
            assert not SHELLS.fullmatch(ast.unparse(call.func)), f"{file}:{call.lineno}"
            assert "shell" not in [keyword.arg for keyword in call.keywords], f"{file}:{call.lineno}"


def patterns() -> list[str | bytes]:
    """Return the regular expressions that are literals in the code of this project."""
    found = []
    for file in sorted([*(ROOT / "slam_asr").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")]):
        text = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "re." in text else ():
            calls_re = isinstance(node, ast.Call) and ast.unparse(node.func).startswith("re.")
            if calls_re and node.args and isinstance(node.args[0], ast.Constant):
                found.append(node.args[0].value)
    return sorted(set(found), key=repr)


@pytest.mark.timeout(120)
def test_no_regular_expression_takes_forever():
    """With an expression whose time grows faster than the square of the text's length, this would not end."""
    hostile = [
        f"{start}{part * 300}\n"
        for start in ("", "s3://", "<")
        for part in ("a", " ", "a ", "1.", "[(", "://@")
    ]
    expressions = patterns()
    assert len(expressions) > 30
    for expression in expressions:
        for text in hostile:
            re.search(expression, text if isinstance(expression, str) else text.encode(), re.DOTALL)


def test_values_in_pages_are_never_markup():
    """Templates escape all values, and mark only constants as safe."""
    files = [*(ROOT / "slam_asr" / "pages").glob("*.html")]
    assert len(files) >= 5
    for file in files:
        marked = re.findall(r"\{\{([^}]*)\|\s*safe", file.read_text(encoding="utf-8"))
        assert all(re.fullmatch(r' \{("\w+": "[^"<>]+"(\|safe)?,? ?)+', value) for value in marked), (
            file,
            marked,
        )
    page = render("facts.html", facts=[("<b>", "<script>alert(1)</script>")])
    assert "<script" not in page and "<b>" not in page


@pytest.mark.parametrize("name", ["..", ".", "x/.."])
def test_an_object_with_the_name_of_a_folder_is_a_file(bucket, name):
    bucket.put_object(Key=f"audio/{name}", Body=b"content")
    assert fetch(f"s3://bucket/audio/{name}").read_bytes() == b"content"
