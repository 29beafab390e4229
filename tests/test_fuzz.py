"""Any input gives a correct result or an error of one sentence, never a traceback.

The examples are the same in every run; `make soak` draws many others.
"""

import unicodedata

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from slam_asr.artifacts.writing_systems import characters_of, comparable, normalise_any_language
from slam_asr.config.recipe import Recipe, load_recipe, recipe_keys
from slam_asr.corpora.splits import normalise
from slam_asr.errors import UserError
from slam_asr.storage import is_s3, join, parent_of, resolve
from slam_asr.storage.address import split_uri
from tests.random_inputs import examples, within_a_second

KEYS = sorted(
    {key.partition(".")[0] for key in recipe_keys()} | {key.rpartition(".")[2] for key in recipe_keys()}
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.dates()
    | st.sampled_from(["s3://", "s3://bucket/x", "none", "whisper", "1e-4", "{}", "\x00", ""])
    | st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | SCALARS, inner, max_size=3)
    ),
    max_leaves=6,
)


def one_line(error: UserError) -> bool:
    return "\n" not in str(error) and len(str(error)) < 3000


@examples(15)
@example({"\n": None})
@given(st.dictionaries(st.sampled_from(recipe_keys()) | st.text(max_size=5), VALUES, max_size=3))
def test_a_recipe_of_any_values_is_loaded_or_refused_in_one_sentence(overrides):
    nested: dict[object, object] = {}
    for key, value in overrides.items():
        section, _, name = key.rpartition(".")
        inner = nested.setdefault(section, {}) if section else nested
        if isinstance(inner, dict):
            inner[name] = value
    for load in (
        lambda: load_recipe("\n" + yaml.safe_dump(nested, allow_unicode=True)),
        lambda: load_recipe("demo", overrides),
    ):
        try:
            with within_a_second():
                assert isinstance(load(), Recipe)
        except UserError as error:
            assert one_line(error), str(error)


@examples(25)
@given(st.text(alphabet="a:-{}[]&*!|>#'\"%@`,. 02\n\t\x00é\u2028", max_size=40))
def test_any_text_is_a_recipe_or_is_refused_in_one_sentence(text):
    try:
        with within_a_second():
            assert isinstance(load_recipe("\n" + text), Recipe)
    except UserError as error:
        assert one_line(error), str(error)


@pytest.mark.parametrize(
    "text", ["llm: 2024-13-45", "name: " + "9" * 5000, "[" * 1500, "a: &a [*a]", "? [a]\n: b"]
)
def test_yaml_that_python_cannot_read_is_refused_in_one_sentence(text):
    with pytest.raises(UserError) as raised:
        load_recipe("\n" + text)
    assert one_line(raised.value)


@examples(80)
@given(st.text(max_size=20), st.sampled_from(["lower", "upper", "as-is", "any"]))
def test_normalising_again_changes_nothing_and_no_text_with_letters_becomes_empty(text, form):
    def once(text: str) -> str:
        return normalise_any_language(text) if form == "any" else normalise(text, form)

    normal = once(text)
    assert once(normal) == normal and unicodedata.is_normalized("NFC", normal)
    assert normal == " ".join(normal.split())
    if any(c.isalpha() for c in text):
        assert normal
    # The two Unicode forms of a text give the same result.
    assert once(unicodedata.normalize("NFD", text)) == once(unicodedata.normalize("NFC", text))
    assert characters_of(comparable(text), all_unspaced=True) == comparable(text).replace(" ", "")


@examples(80)
@given(
    st.text(alphabet="s3:/ab.@%~- \n\u00e9\udc80", max_size=12),
    st.sampled_from(["s3:", "s3://", "s3://bucket/", ""]),
)
def test_an_address_stays_in_its_bucket_or_is_refused_in_one_sentence(text, start):
    address = start + text
    try:
        if not is_s3(address):
            assert not address.startswith("s3:/")
            return
        bucket, key = split_uri(address)
    except UserError as error:
        assert one_line(error), str(error)
        return
    assert bucket and "/" not in bucket and len(key.encode()) <= 1024
    for other in (join(address, "x"), parent_of(address), resolve("../../x", address)):
        assert split_uri(other)[0] == bucket
