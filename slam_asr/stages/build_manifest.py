"""The stage `build-manifest`: checks a corpus and writes manifests of its usable utterances.

Every audio file is decoded once here, so that no later stage finds a damaged one after hours of work.
Utterances that cannot be used are rejected with a reason; if there are too many of them, the stage fails.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from slam_asr.artifacts.stage_record import FINGERPRINT, Record, run_stage
from slam_asr.config.recipe import Recipe
from slam_asr.corpora import CorpusReader
from slam_asr.corpora.detection import open_corpus
from slam_asr.corpora.manifests import STAGE, write_manifests
from slam_asr.corpora.places import is_folder
from slam_asr.corpora.splits import choose_subsets
from slam_asr.errors import ConfigurationError
from slam_asr.storage import is_s3, local_path, parent_of


def build_manifest(recipe: Recipe, corpus: str, output: str, overwrite: bool = False) -> Record:
    """Check every utterance of a corpus and write the manifests for training, validation and test.

    Writes train.jsonl, dev.jsonl, test.jsonl, rejected.jsonl (rejected utterances with reasons),
    statistics.json, statistics.html and recipe.yaml. Audio unpacked from archives or tables is written to
    audio/.

    Args:
        recipe: the recipe; its `data` section decides subsets, limits on the duration, and the form of
            transcripts.
        corpus: a folder, a file or an s3:// prefix: LibriSpeech (a tree or its archives), a table, JSON
            lines, Kaldi's lists, Lhotse's cuts, a Hugging Face dataset, or audio files with a text file for
            each.
        output: the folder to write to; `{fingerprint}` in it is replaced by a digest of the inputs.
        overwrite: replace the results of other inputs in that folder.

    Raises:
        InputError: the corpus does not exist, is of an unknown kind or has no audio or no transcripts; an
            utterance is in two splits, too many utterances are rejected, or a split has none left.
        ConfigurationError: no subset is for train or test, a subset matches the patterns of two splits,
            `data.kind` or `data.text` does not fit the corpus, or `output` holds files that would be
            replaced.
    """
    reader = open_corpus(corpus, recipe.data)
    if FINGERPRINT not in output and _is_corpus_folder(output, reader.root):
        raise ConfigurationError(
            f"{output} is the corpus's own folder, whose files would be replaced: choose another --output."
        )
    subsets = choose_subsets(reader, recipe.data)
    inputs = {"corpus": reader.root, "listing": _listing(reader, subsets), "data": asdict(recipe.data)}
    return run_stage(
        STAGE, output, inputs, lambda folder: write_manifests(folder, reader, subsets, recipe), overwrite
    )


def _is_corpus_folder(output: str, root: str) -> bool:
    folder = root if is_folder(root) else parent_of(root)
    if is_s3(output) or is_s3(folder):
        return output.rstrip("/") == folder.rstrip("/")
    return local_path(output).resolve() == Path(folder).resolve()


def _listing(reader: CorpusReader, subsets: dict[str, list[str]]) -> str:
    """Return a digest of the names, sizes and modification times of the subsets' files."""
    listing = hashlib.sha256()
    for subset in sorted(subset for names in subsets.values() for subset in names):
        for line in ([subset], *reader.stamps(subset)):
            listing.update(json.dumps(line).encode() + b"\n")
    return listing.hexdigest()
