"""The stage `convert-checkpoint`: a DeepSpeed checkpoint becomes a model folder."""

from pathlib import Path

from slam_asr.errors import UserError
from slam_asr.recipe import load_recipe
from slam_asr.stage import Outcome, Record, require_record, run_stage
from slam_asr.storage import sha256_of_file


def convert_checkpoint(checkpoint: str, output: str, overwrite: bool = False) -> Record:
    """Turn the checkpoint of a training into projector.safetensors and config.json.

    Args:
        checkpoint: folder that train wrote.
        output: folder of the model; {fingerprint} in it becomes a digest of the inputs.
        overwrite: replace a model made from another checkpoint.

    Returns:
        The stage's record; its folder holds projector.safetensors and config.json.

    Raises:
        UserError: no training there, or a checkpoint that is incomplete or damaged.
    """
    trained = require_record(checkpoint, "train")
    from slam_asr.training.checkpoint import latest

    source = latest(Path(trained.folder) / "checkpoints")
    inputs = {"training": trained.inputs, "files": {f.name: sha256_of_file(f) for f in sorted(source.iterdir())}}

    def work(folder: Path) -> Outcome:
        import torch

        from slam_asr.conversion.model import ModelConfig, read_projector, write_model
        from slam_asr.conversion.zero import fp32_weights

        prefix = "projector."
        weights = {n.removeprefix(prefix): t for n, t in fp32_weights(source).items() if n.startswith(prefix)}
        if not weights:
            raise UserError(f"{source} holds no projector: it is not a checkpoint of slam-asr train.")
        for name, tensor in weights.items():
            if not torch.isfinite(tensor).all():
                raise UserError(f"{source}: {name} holds values that are not finite; the training diverged. Take an earlier one.")
        recipe = (Path(trained.folder) / "recipe.yaml").read_text()
        downsampling = load_recipe(recipe).projector.downsampling
        facts = trained.facts
        config = ModelConfig(
            recipe=recipe, encoder=facts["encoder_fingerprint"], llm_sha256=facts["llm_sha256"],
            encoder_width=weights["linear1.weight"].shape[1] // downsampling,
            llm_width=weights["linear2.weight"].shape[0],
            training={k: v for k, v in facts.items() if k not in ("encoder_fingerprint", "llm_sha256")},
        )
        write_model(folder, weights, config)
        # Read back as decoding will: what is published is known to load.
        size = sum(p.numel() for p in read_projector(folder, config).parameters())
        megabytes = sum(f.stat().st_size for f in folder.glob("projector.*")) / 1e6
        return Outcome(f"projector of {size:,} parameters, {megabytes:.1f} MB", {"parameters": size})

    return run_stage("convert-checkpoint", output, inputs, work, overwrite)

