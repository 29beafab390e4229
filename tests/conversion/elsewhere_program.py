"""A program that the tests run: it transcribes files with an exported folder and prints the texts as JSON.

It cannot import slam_asr.
"""

import importlib.abc
import json
import sys
from pathlib import Path


class _Blocked(importlib.abc.MetaPathFinder):
    """Makes every import of slam_asr fail."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "slam_asr":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, _Blocked())

from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline  # noqa: E402


def main(folder: str, audio: str) -> None:
    files = sorted(str(file) for file in Path(audio).glob("*.wav"))
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, trust_remote_code=True)
    inputs = processor.apply_transcription_request(audio=files).to(model.device)
    answers = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    transcriber = pipeline("automatic-speech-recognition", folder, trust_remote_code=True)
    found = {
        "slam_asr": any(name.split(".")[0] == "slam_asr" for name in sys.modules),
        "model": [text.strip() for text in processor.batch_decode(answers, skip_special_tokens=True)],
        "pipeline": [transcriber(file)["text"] for file in files],
        "batched": [result["text"] for result in transcriber(files, batch_size=8)],
        "bytes": transcriber(Path(files[0]).read_bytes(), max_new_tokens=3)["text"],
    }
    try:
        pipeline("automatic-speech-recognition", folder, trust_remote_code=False)
    except ValueError as error:
        found["untrusted"] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
