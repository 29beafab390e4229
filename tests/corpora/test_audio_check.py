"""The check gives a result for every candidate, in their order, even if a file has disappeared meanwhile."""

from slam_asr.config.recipe import Data
from slam_asr.corpora import Candidate, Rejection, audio_check
from slam_asr.corpora.audio_check import check_all
from tests.conftest import make_tone, write_wav


def test_results_are_in_the_order_of_the_candidates(tmp_path):
    # Some files are much longer than others, so that files after them are finished first.
    sources = [
        str(write_wav(tmp_path / f"{i}.wav", make_tone(20.0 if i % 9 == 0 else 0.2))) for i in range(40)
    ]
    checked = list(
        check_all([Candidate(str(i), source, "text") for i, source in enumerate(sources)], Data(), "test")
    )
    assert [c.utterance.key for c in checked] == [str(i) for i in range(40)]


def test_a_file_that_disappeared_since_it_was_listed_is_rejected(tmp_path):
    (rejection,) = check_all([Candidate("a", str(tmp_path / "gone.wav"), "text")], Data(), "test")
    assert isinstance(rejection, Rejection)
    assert rejection.reason == "transcript without audio"


def test_a_rejected_segment_is_named_by_its_file_and_its_start(tmp_path):
    source = str(write_wav(tmp_path / "long.wav", make_tone(2.0)))
    segment = Candidate("a", source, "text", start=1.5, duration=0.05)
    (rejection,) = check_all([segment], Data(), "test")
    assert rejection.detail == (
        f"The length of the segment of {source} at 1.50 s is 0.050 s, below data.min_duration (0.1 s)."
    )


def test_no_candidates_give_no_results():
    assert list(check_all([], Data(), "test")) == []


def test_only_a_few_candidates_are_consumed_ahead_of_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr(audio_check, "usable_cores", lambda: 2)
    source, taken = str(write_wav(tmp_path / "x.wav")), []
    candidates = (taken.append(i) or Candidate(str(i), source, "text") for i in range(1000))
    next(check_all(candidates, Data(), "test"))
    assert len(taken) <= 64
