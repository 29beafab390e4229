"""The gate before publication: decides from a model's error rate whether it is good enough."""

from dataclasses import dataclass

from slam_asr.errors import InputError
from slam_asr.scoring.comparison import SIGNIFICANCE, Compared, compare_pairs, pair, probability_text
from slam_asr.scoring.outputs import read_output


@dataclass(frozen=True)
class Verdict:
    """The result of one condition of the gate for a model."""

    passed: bool
    reason: str
    """Why, as a clause without a full stop: `WER 64.99 % is above gate.max_wer 25 %`."""
    compared: Compared | None = None
    """The comparison of the model (first) with the registered version (second), if they were compared."""


def check_limit(short: str, rate: float, limit: float | None) -> Verdict:
    """Compare an error rate with `gate.max_wer`.

    Args:
        short: `WER` or `CER`.
        rate: the model's rate in percent.
        limit: highest rate that passes, in percent; None for any.
    """
    measured = f"{short} {rate:.2f} %"
    if limit is None:
        return Verdict(True, measured)
    relation = "is above" if rate > limit else "is not above"
    return Verdict(rate <= limit, f"{measured} {relation} gate.max_wer {limit:g} %")


def check_better(report: str, version: str, scores: str) -> Verdict:
    """Compare a model with a registered version, by matched pairs on the same utterances.

    If the two cannot be compared, nothing shows that the model is better, so it does not pass.

    Args:
        report: folder that score wrote for the model.
        version: name of the registered version, for `Verdict.reason`.
        scores: folder that score wrote for that version; empty if unknown.

    Raises:
        InputError: the model's own report has no hypotheses.
    """
    registered, ours = f"the registered version {version}", read_output(report)
    if not scores:
        return Verdict(False, f"{registered} does not name its scores, so there is nothing to compare with")
    try:
        pairs, left_out = pair((report, ours), (scores, read_output(scores)), common=True)
    except InputError as error:
        return Verdict(False, f"the model cannot be compared with {registered}: {str(error).rstrip('.')}")
    if any(left_out.values()):
        return Verdict(
            False,
            f"{registered} was measured on other utterances ({len(pairs)} are the same): decode both on the "
            "same test sets",
        )
    row = compare_pairs(pairs, report, seed=0)[-1]
    passed = row.p < SIGNIFICANCE and row.difference < 0
    chance = probability_text(row.p)
    return Verdict(
        passed,
        f"{row.first:.2f} % is {'' if passed else 'not '}significantly better than {row.second:.2f} % of "
        f"{registered} (p {chance if chance.startswith('<') else f'= {chance}'})",
        row,
    )
