"""The table of all steps of the pipelines. No other module lists them.

The command line, the Kubeflow components, the pipelines, the cluster profiles, the image builder and the
documentation read this table. A new step needs one row here, one module in `components/`, and a place in a
pipeline: see docs/how-to/extending.md.

This module imports only Python's standard library, because `images/build.py` reads it before anything is
installed.
"""

from dataclasses import dataclass, field

TRAINING = "slam-asr"
PUBLISHING = "slam-asr-publish"
"""Trains like `TRAINING`, and then publishes the model."""
EVALUATION = "slam-asr-evaluate"
SWEEP = "slam-asr-sweep"
EVERY_PIPELINE = (TRAINING, PUBLISHING, EVALUATION, SWEEP)


@dataclass(frozen=True)
class Step:
    """One step of a pipeline."""

    name: str
    """Name in Kubeflow and on the command line, with dashes."""
    summary: str
    """What the step does, in half a line."""
    output: str
    """The Kubeflow output that points to the step's result; empty if it has none."""
    pipelines: tuple[str, ...]
    """The pipelines that always contain the step."""
    function: str = ""
    """`module:function` that the step runs. Empty if it has no command of its own."""
    image: str = ""
    """The step in whose image this one runs. Empty if it has an image of its own."""
    torch: str = "none"
    """The build of torch in the step's own image: `cuda`, `cpu` or `none`. Steps with `cuda` get the GPUs."""
    processes: str = ""
    """The recipe key with the number of its processes on one machine; each gets a GPU if the machine has any.

    Empty if it runs in one process.
    """
    settings_of: str = ""
    """The step whose settings in the cluster profile also apply to this one. Empty if it has its own."""
    positionals: str = ""
    """The parameters that its command takes by position, in capitals. If empty, it takes the recipe."""
    options: dict[str, str] = field(default_factory=dict)
    """The options of its command when it runs alone, with `--only`. Empty if it cannot run alone.

    A name in braces is a placeholder. The name of an earlier step stands for the folder of that step's newest
    result; with a star, it stands for the folders of all its work shards. The other placeholders are

    - `recipe`, `corpus` and `store`: those of the run,
    - `which`: the recipe's `decoding.checkpoint`,
    - `features`: the result of extract-features; the option is left out if the recipe caches no features,
    - `model`: the model that the user names, else the result of convert-checkpoint.

    `--output` is a folder in the store, named after the step, unless it is given here.
    """

    @property
    def module(self) -> str:
        """The module of its Kubeflow component."""
        name = self.name.replace("-", "_")
        folder = self.image.replace("-", "_") or name
        return f"components.{folder}.{name if self.image else 'component'}"


STEPS = {
    step.name: step
    for step in (
        Step(
            "open-registry",
            "check that the model registry answers",
            output="registry",
            pipelines=(PUBLISHING,),
            image="publish",
            settings_of="score",
        ),
        Step(
            "open-model",
            "check a model and copy it to the store",
            output="opened",
            pipelines=(EVALUATION,),
            image="convert-checkpoint",
            settings_of="convert-checkpoint",
        ),
        Step(
            "plan-sweep",
            "read the variations of a sweep and check each recipe",
            output="planned",
            pipelines=(SWEEP,),
            image="build-manifest",
            settings_of="score",
        ),
        Step(
            "build-manifest",
            "check a corpus and write its manifests",
            output="manifests",
            pipelines=EVERY_PIPELINE,
            function="slam_asr.stages.build_manifest:build_manifest",
            options={"recipe": "{recipe}", "corpus": "{corpus}"},
        ),
        Step(
            "extract-features",
            "run the speech encoder once and cache its outputs",
            output="features",
            pipelines=EVERY_PIPELINE,
            processes="features.processes",
            function="slam_asr.stages.extract_features:extract_features",
            torch="cuda",
            options={"recipe": "{recipe}", "manifests": "{build-manifest}", "output": "{store}/features"},
        ),
        Step(
            "vary-recipe",
            "apply one variation of a sweep to the recipe",
            output="varied",
            pipelines=(SWEEP,),
            image="build-manifest",
            settings_of="score",
        ),
        Step(
            "train",
            "train the projector",
            output="checkpoint",
            pipelines=(TRAINING, PUBLISHING, SWEEP),
            processes="training.processes",
            function="slam_asr.stages.train:train",
            torch="cuda",
            options={
                "recipe": "{recipe}",
                "train-manifest": "{build-manifest}/train.jsonl",
                "dev-manifest": "{build-manifest}/dev.jsonl",
                "feature-store": "{features}",
            },
        ),
        Step(
            "convert-checkpoint",
            "turn a checkpoint into a model folder",
            output="model",
            pipelines=(TRAINING, PUBLISHING, SWEEP),
            function="slam_asr.stages.convert_checkpoint:convert_checkpoint",
            torch="cpu",
            options={"checkpoint": "{train}", "which": "{which}"},
        ),
        Step(
            "decode",
            "transcribe the test sets",
            output="hypotheses",
            pipelines=EVERY_PIPELINE,
            processes="decoding.processes",
            function="slam_asr.stages.decode:decode",
            torch="cuda",
            options={
                "recipe": "{recipe}",
                "model": "{model}",
                "manifests": "{build-manifest}/test.jsonl",
                "feature-store": "{features}",
            },
        ),
        Step(
            "score",
            "compute word error rates and write the report",
            output="scores",
            pipelines=EVERY_PIPELINE,
            function="slam_asr.stages.score:score",
            image="decode",
            options={"recipe": "{recipe}", "model": "{model}", "parts": "{decode*}"},
        ),
        Step(
            "publish",
            "register the model in a model registry, if it is good enough",
            output="publication",
            pipelines=(PUBLISHING,),
            function="slam_asr.stages.publish:publish",
            settings_of="score",
            positionals="MODEL",
            options={"recipe": "{recipe}", "model": "{model}", "report": "{score}"},
        ),
        Step(
            "compare-runs",
            "show several decodings on one page, with their training curves",
            output="comparison",
            pipelines=(SWEEP,),
            function="slam_asr.stages.compare_runs:compare_runs",
            image="decode",
            settings_of="score",
        ),
        # The exit task of every pipeline whose cluster profile requests notices.
        Step(
            "notify",
            "send a message that the run has ended",
            output="",
            pipelines=(),
            image="build-manifest",
            settings_of="score",
        ),
    )
}
"""All steps by name, in the order in which they run."""

OWN_IMAGE = tuple(name for name, step in STEPS.items() if not step.image)
"""Steps that have an image of their own."""

IMAGES = {name: STEPS[name].torch for name in OWN_IMAGE} | {"serve": "cuda"}
"""All images: those of the steps, and that of the server, which is in no pipeline. The values are the builds
of torch in them, as in `Step.torch`."""


def outputs_of(pipeline: str) -> dict[str, str]:
    """Return the steps of a pipeline in their order, each with the output that points to its result."""
    return {name: step.output for name, step in STEPS.items() if pipeline in step.pipelines}
