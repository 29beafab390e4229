"""The command `slam-asr compare A B`: finds which of two recognisers is better.

It also tests whether the difference is significant, so that chance is not taken for progress.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict

from slam_asr.progress import log_line
from slam_asr.scoring.comparison import Compared, compare_pairs, pair, probability_text
from slam_asr.scoring.outputs import read_output
from slam_asr.storage import write_bytes


def compare(
    first: str, second: str, output: str | None = None, common: bool = False, seed: int = 0
) -> list[Compared]:
    """Compare the word error rates of two recognisers on the same utterances, by matched pairs.

    If the references do not separate words, as in Chinese, the character error rates are compared.

    Args:
        first: output of the first recogniser: the folder that decode or score wrote, the hypotheses.jsonl in
            it, or SLAM-LLM's `…_pred` with its `…_gt` next to it.
        second: output of the second recogniser, in any of the same forms.
        output: a JSON file to write the numbers to, local or s3://.
        common: compare only the utterances that both outputs have, and count the others. By default, an
            utterance that only one output has is an error.
        seed: seed of the two random computations: the bootstrap of the 95 % interval, and the randomisation
            test that gives p.

    Returns:
        One comparison per test subset, if the utterances come from several subsets, and finally one over all
        utterances. Subsets whose references contain no words are left out.

    Raises:
        InputError: an output is missing or damaged; an utterance is in only one of them (unless `common`), is
            in one twice, or has different references in the two; or no reference contains a word.
    """
    outputs = [(path, read_output(path)) for path in (first, second)]
    pairs, left_out = pair(outputs[0], outputs[1], common)
    rows = compare_pairs(pairs, first, seed)
    _print(rows, first, second, left_out)
    if output:
        numbers = {
            "first": first,
            "second": second,
            "unit": "percent",
            "left_out": left_out,
            "compared": [asdict(row) for row in rows],
        }
        write_bytes(output, json.dumps(numbers, indent=2, ensure_ascii=False) + "\n")
    return rows


def _print(rows: Sequence[Compared], first: str, second: str, left_out: dict[str, int]) -> None:
    log_line(f"first:  {first}")
    log_line(f"second: {second}")
    if rows[-1].unit == "characters":
        log_line("rates:  character error rates, because the references do not separate words")
    for path, count in left_out.items():
        if count:
            log_line(f"left out: {count} utterances that only {path} has")
    table = [("subset", "utterances", "first", "second", "difference", "95 % interval", "p", "")]
    for r in rows:
        rates = (f"{r.first:.2f} %", f"{r.second:.2f} %", f"{r.difference:+.2f}")
        interval = "–" if r.low is None else f"{r.low:+.2f} to {r.high:+.2f}"
        table.append((r.subset, str(r.utterances), *rates, interval, probability_text(r.p), r.verdict))
    # The verdict, which ends each line, is not padded.
    widths = [max(map(len, column)) for column in zip(*table, strict=True)][:-1]
    for *cells, verdict in table:
        padded = [f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)]
        log_line("  ".join([*padded, verdict]))
