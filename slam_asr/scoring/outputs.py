"""What recognisers wrote, ours or anyone's, in the forms it comes in."""

from collections.abc import Sequence
from pathlib import Path

from slam_asr.errors import UserError
from slam_asr.scoring.wer import Hypothesis, read_hypotheses
from slam_asr.storage import exists, fetch, join

PREDICTED, SPOKEN = "_pred", "_gt"


def read_output(place: str, hypotheses: str) -> list[Hypothesis]:
    """The utterances of a recogniser's output.

    Args:
        place: a folder that decode or score wrote; its hypotheses; or SLAM-LLM's `…_pred`, with its `…_gt` beside it, in lines of key, tab,
            text. Local or s3://.
        hypotheses: name of the file in such a folder.

    Raises:
        UserError: nothing is there, or it is not in one of these forms.
    """
    if place.endswith(PREDICTED):
        return _read_pair(place)
    inside = join(place, hypotheses)
    if not exists(place) and not exists(inside):
        raise UserError(
            f"There are no hypotheses at {place}: name a folder that decode or score wrote, a hypotheses.jsonl, or SLAM-LLM's …{PREDICTED} file."
        )
    return read_hypotheses(fetch(inside if exists(inside) else place))


def _read_pair(place: str) -> list[Hypothesis]:
    references = place.removesuffix(PREDICTED) + SPOKEN
    for file in (place, references):
        if not exists(file):
            raise UserError(
                f"There is no {file}: SLAM-LLM's decoding writes {PREDICTED} and {SPOKEN} side by side; both are needed."
            )
    written, spoken = _read_lines(fetch(place)), _read_lines(fetch(references))
    _refuse_one_sided(place, sorted(written.keys() - spoken.keys()), "no reference")
    _refuse_one_sided(references, sorted(spoken.keys() - written.keys()), "no hypothesis")
    return [Hypothesis(key, spoken[key], written[key]) for key in spoken]


def _read_lines(path: Path) -> dict[str, str]:
    texts: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        key, tab, text = line.partition("\t")
        if not tab or key in texts:
            what = "has no tab between key and text" if not tab else f"names {key} a second time"
            raise UserError(
                f"{path}, line {number} {what}: lines of key, tab, text are expected, one an utterance."
            )
        texts[key] = text
    return texts


def _refuse_one_sided(file: str, keys: Sequence[str], lack: str) -> None:
    if keys:
        raise UserError(
            f"{file} holds {len(keys)} utterances that have {lack}, first {keys[0]}: both files must name the same ones."
        )
