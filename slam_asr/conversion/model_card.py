"""The model card of a folder for transformers, composed from the recipe, the training and a report."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from slam_asr.conversion.sources import Content
from slam_asr.errors import InputError
from slam_asr.storage import exists, fetch, join

CARD = "README.md"
NUMBERS_FILE = "wer.json"
"""The file of a report that contains its numbers for other programs to read; `score` writes it."""
LICENCES = {
    "openai/whisper-": "MIT",
    "facebook/hubert-": "Apache-2.0",
    "facebook/wav2vec2-": "Apache-2.0",
    "HuggingFaceTB/SmolLM2-": "Apache-2.0",
    "TinyLlama/": "Apache-2.0",
    "lmsys/vicuna-": "Llama 2 Community License",
    "meta-llama/Llama-2-": "Llama 2 Community License",
}
"""Licences of base models, by the beginning of their names."""
_AUTHOR = "for its author to choose; write it here"
_MATCHING_FACTS = ("recipe", "encoder", "llm", "steps", "seconds")
"""Facts of a training that must be equal in report and model. The duration in seconds, with one decimal,
distinguishes trainings of the same recipe."""


@dataclass(frozen=True)
class Report:
    """The numbers that `score` computed for a model."""

    file: Path
    numbers: dict[str, Any]


def read_report(place: str) -> Report:
    """Read a report's numbers.

    Args:
        place: local or s3:// folder that `score` wrote.

    Raises:
        InputError: the folder has no report, or it is damaged.
    """
    address = join(place, NUMBERS_FILE)
    if not exists(address):
        raise InputError(f"{place} holds no {NUMBERS_FILE}: name a folder that score wrote.")
    file = fetch(address)
    try:
        numbers = json.loads(file.read_text(encoding="utf-8"))
        if numbers["all"]["rate"] is not None and isinstance(numbers["training"], dict):
            return Report(file, numbers)
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{address} is not a report's numbers: run score again.")


def require_own_report(report: Report, training: dict[str, Any], where: str) -> None:
    """Require that a report was computed for a model.

    Args:
        report: the report.
        training: the facts of the model's training.
        where: the model, for error messages.

    Raises:
        InputError: the report is that of another training.
    """
    other = report.numbers["training"]
    for fact in _MATCHING_FACTS:
        if fact in training and fact in other and training[fact] != other[fact]:
            raise InputError(
                f"{report.file} is the report of another model than {where} ({fact}: {other[fact]} "
                f"instead of {training[fact]}): name the report of this model."
            )


def model_card(content: Content, use: str, report: Report | None, ctc_weight: float = 0.0) -> str:
    """Return the model card, in Markdown with front matter as on the model hub.

    Args:
        content: the checkpoint. If it is a model folder with a card of its own, that card's front matter and
            text are included.
        use: section on how the model is used.
        report: the measured error rates.
        ctc_weight: CTC's share of the scores when this folder decodes; 0 if it decodes with the LLM alone.
    """
    own = Path(content.where) / CARD
    front, text = _divide(own.read_text(encoding="utf-8")) if own.is_file() else ({}, "")
    recipe = content.recipe
    bases = [recipe.encoder.name, recipe.llm.name]
    front |= {
        "library_name": "transformers",
        "pipeline_tag": "automatic-speech-recognition",
        "tags": ["slam-asr"],
        # The hub links these names, so paths and s3:// addresses are left out.
        "base_model": [name for name in bases if not name.startswith(("/", ".", "s3:"))],
    }
    ctc = recipe.decoding.ctc_weight
    # The hub shows the rates in `model-index` as those of this folder. If it decodes without CTC, rates that
    # were measured with CTC are left out.
    if ctc != ctc_weight:
        front.pop("model-index", None)
    elif report:
        front["model-index"] = _model_index(recipe.name, report.numbers)
    sections = [use]
    if ctc != ctc_weight:
        sections.append(
            "## Without CTC\n\nThis folder decodes with the LLM alone. slam-asr adds CTC's scores to the "
            f"LLM's (`decoding.ctc_weight: {ctc}`), and the error rates in this card were measured in that "
            "way unless it says otherwise. Without CTC there are more errors."
        )
    if report:
        sections.append(_rates(report.numbers))
    elif not text:
        sections.append("## Word error rate\n\nNot measured yet: `slam-asr score` measures it.")
    sections += [_data(content), _licences(bases, front)]
    head = text.strip() or _description(content)
    yaml_text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return f"---\n{yaml_text}---\n" + "\n\n".join([head, *sections]) + "\n"


def _divide(card: str) -> tuple[dict[str, Any], str]:
    """Divide a card into its front matter and its text."""
    try:
        # Two divisions only: the text may have horizontal rules, which are written in the same way.
        _, front, text = card.split("---\n", 2)
        values = yaml.safe_load(front)
    except (ValueError, yaml.YAMLError):
        return {}, card
    return (values, text) if isinstance(values, dict) else ({}, card)


def _description(content: Content) -> str:
    recipe = content.recipe
    projector = recipe.projector
    rows = {
        "encoder": f"`{recipe.encoder.name}`, {recipe.encoder.tuning}",
        "LLM": f"`{recipe.llm.name}`, tuning: {recipe.llm.tuning}",
        "projector": f"{projector.kind}, downsampling {projector.downsampling}, width {projector.hidden}",
        "prompt": f"`{json.dumps(recipe.llm.prompt, ensure_ascii=False)}`",
        "transcripts": f"`data.text: {recipe.data.text}`",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"# {recipe.name}\n\nA speech recogniser: a speech encoder, a trained projector and an LLM.\n\n"
        f"| part | |\n| --- | --- |\n{table}"
    )


def usage(names: dict[str, str | None], ctc_weight: float = 0.0) -> str:
    """Return the section on how a folder with code of its own is used.

    Args:
        names: names of encoder and LLM; None for a model that the folder contains.
        ctc_weight: CTC's share of the scores when this folder decodes.
    """
    outside = [f"`{name}`" for name in names.values() if name]
    loaded = f"It loads {' and '.join(outside)} too. " if outside else ""
    ctc = (
        f"`generate` adds CTC's scores to the LLM's, with a share of {ctc_weight} (`ctc_weight` in "
        "config.json).\n`generate(…, ctc_weight=0.0)` decodes with the LLM alone; in the pipeline, it is an "
        "entry of `generate_kwargs`.\n\n"
        if ctc_weight
        else ""
    )
    return f"""## Use with transformers

{loaded}The code in this folder needs torch and transformers, and soundfile and soxr to read audio files.
Read it before you trust it.

```python
from transformers import pipeline

transcriber = pipeline("automatic-speech-recognition", "FOLDER", trust_remote_code=True)
print(transcriber("recording.wav")["text"])
```

```python
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

processor = AutoProcessor.from_pretrained("FOLDER", trust_remote_code=True)
model = AutoModelForSpeechSeq2Seq.from_pretrained("FOLDER", trust_remote_code=True)
inputs = processor.apply_transcription_request(audio=["recording.wav"]).to(model.device)
answers = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(answers, skip_special_tokens=True))
```

{ctc}Encoder and LLM in other places: `encoder_name="…"` and `llm_name="…"`, as arguments of
`from_pretrained`."""


def _rates(numbers: dict[str, Any]) -> str:
    short = _short(numbers)
    controls = numbers.get("controls", {})
    heads = ["test set", "utterances", short, "95 % interval", *controls]
    subsets = numbers.get("subsets", {})
    names = [name for name in subsets if name]
    rows = [("all", numbers["all"], [c["all"] for c in controls.values()])]
    if len(subsets) > 1:
        rows += [(n, subsets[n], [c["subsets"].get(n, {}) for c in controls.values()]) for n in names]
    lines = [heads, ["---"] * len(heads)]
    for name, counts, others in rows:
        interval = "–".join(f"{end:.2f}" for end in counts.get("interval") or [])
        utterances = str(counts.get("utterances", ""))
        lines.append([name, utterances, _percent(counts), interval, *map(_percent, others)])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    how = f"Test subsets: {', '.join(names) or 'one'}."
    if beams := numbers.get("decoding", {}).get("beams"):
        how += f" Decoded with {beams} beam{'s' * (beams > 1)}."
    return (
        f"## {'Character' if short == 'CER' else 'Word'} error rate\n\n{how} The controls are output that "
        f"ignores the audio: a rate means little if it is close to theirs.\n\n{table}"
    )


def _short(numbers: dict[str, Any]) -> str:
    return "CER" if numbers.get("unit") == "characters" else "WER"


def _percent(counts: dict[str, Any]) -> str:
    return "" if counts.get("rate") is None else f"{counts['rate']:.2f} %"


def _model_index(name: str, numbers: dict[str, Any]) -> list[dict[str, Any]]:
    short = _short(numbers).lower()
    subsets = {n: c for n, c in numbers.get("subsets", {}).items() if n} or {"test": numbers["all"]}
    results = [
        {
            "task": {"type": "automatic-speech-recognition"},
            "dataset": {"name": subset, "type": subset},
            "metrics": [{"type": short, "value": counts["rate"]}],
        }
        for subset, counts in subsets.items()
        if counts.get("rate") is not None
    ]
    return [{"name": name, "results": results}]


def _data(content: Content) -> str:
    facts, data = content.facts, content.recipe.data
    amount = ""
    if "train_utterances" in facts and "train_hours" in facts:
        amount = f": {facts['train_utterances']:,} utterances, {facts['train_hours']:.2f} hours"
    steps = f" The training took {facts['steps']:,} steps." if "steps" in facts else ""
    subsets = ", ".join(f"`{name}`" for name in data.train)
    return f"## Training data\n\nSubsets {subsets or 'not recorded'} of the corpus{amount}.{steps}"


def _licences(bases: list[str], front: dict[str, Any]) -> str:
    def licence(name: str) -> str:
        # Only names of the hub match: a folder may hold any weights.
        found = next((text for start, text in LICENCES.items() if name.startswith(start)), None)
        return found or "not known here; see where it comes from"

    rows = {
        "projector and adapter": str(front.get("license", _AUTHOR)),
        f"encoder, `{bases[0]}`": licence(bases[0]),
        f"LLM, `{bases[1]}`": licence(bases[1]),
        "code in this folder": "Apache-2.0",
        "training data": "that of the corpus; see where it comes from",
    }
    table = "\n".join(f"| {part} | {text} |" for part, text in rows.items())
    return f"## Licences\n\n| part | licence |\n| --- | --- |\n{table}"
