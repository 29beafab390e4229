"""The stage `extract-features`: runs every utterance of the manifests through the frozen encoder, once."""

from slam_asr.artifacts.stage_record import FINGERPRINT, Outcome, Record, run_stage
from slam_asr.artifacts.utterances import manifest_files
from slam_asr.config.recipe import Recipe
from slam_asr.features.extraction import STAGE, Extraction
from slam_asr.runtime.work_split import parse_work_shard
from slam_asr.storage import join


def extract_features(recipe: Recipe, manifests: list[str], output: str, work_shard: str = "1/1") -> Record:
    """Encode every utterance once and save the result in a feature store.

    Features that the feature store already has, from any manifest, are not computed again. If the recipe
    trains the encoder too, or has `features.cache: none`, nothing is saved.

    Args:
        recipe: names the encoder, which of its frames to save, and their dtype.
        manifests: manifests (JSON lines), or folders that build-manifest wrote.
        output: the feature store, a folder or s3://bucket/prefix; many recipes and manifests can share one.
        work_shard: i/n: do only the i-th of n equal parts of the work. If n machines do one part each, they
            fill the feature store together.

    Returns:
        The stage's record. Its folder is in the feature store, and can be given wherever a feature store is
        expected.

    Raises:
        UserError: a manifest, the encoder or an audio file cannot be used.
    """
    # Imported here, because transformers takes seconds to load and `--help` does without it.
    from slam_asr.models.encoders.registry import describe_encoder

    shard = parse_work_shard(work_shard)
    files = manifest_files(manifests)
    spec = describe_encoder(recipe.encoder)
    if not recipe.caches_features:
        why = "the encoder is trained too" if recipe.encoder.tuning != "frozen" else "features: none"
        nothing = Outcome(f"nothing to cache: {why}", {"utterances": 0})
        folder = join(output, "uncached", FINGERPRINT)
        return run_stage(STAGE, folder, {"why": why, "part": str(shard)}, lambda _: nothing)
    spec.require_weights()
    extraction = Extraction(recipe, spec, files, output, shard)
    inputs = {
        "audio": [audio.digest() for audio in extraction.audio],
        "fingerprint": extraction.fingerprint,
        "shard_megabytes": recipe.features.shard_megabytes,
        "part": str(shard),
    }
    # The features are outside the record's own folder: a record alone does not prove that they still exist.
    folder = join(extraction.namespace.root, "runs", FINGERPRINT)
    return run_stage(STAGE, folder, inputs, lambda _: extraction.run(), intact=extraction.is_intact)
