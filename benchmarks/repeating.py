"""Measure how well a frozen LLM repeats a text that it gets in place of audio.

    python benchmarks/repeating.py TRANSCRIPTS --llm HuggingFaceTB/SmolLM2-135M-Instruct

TRANSCRIPTS has lines `<key> TEXT`. The text's own token embeddings replace the audio, with line breaks after
some of them, because a projector makes more positions of an utterance than its text has tokens. Prints the
share of the answer's tokens that are the LLM's first choice, by template and by line breaks per token. These
figures help to choose `llm.template` and `projector.downsampling`.
"""

import argparse
import random
from pathlib import Path

import torch

from slam_asr.config.recipe import Llm
from slam_asr.models.llm import load_llm, load_tokenizer
from slam_asr.models.prompt import AUDIO, Prompt
from slam_asr.pretrained.locate import locate_model

TEMPLATES = ("USER: {}\n ASSISTANT:", "<|im_start|>user\n{audio}\n{}<|im_end|>\n<|im_start|>assistant\n")
BREAKS = (0.0, 0.5, 0.8, 1.0, 1.8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("transcripts", type=Path)
    parser.add_argument("--llm", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--templates", nargs="+", default=TEMPLATES)
    options = parser.parse_args()
    folder = locate_model(options.llm)
    tokenizer, llm = load_tokenizer(folder), load_llm(folder, torch.float32).eval()
    lines = [
        line.split(" ", 1)[1].strip().lower()
        for line in options.transcripts.read_text(encoding="utf-8").splitlines()
        if " " in line
    ]
    texts = random.Random(0).sample([line for line in lines if 40 < len(line) < 160], options.texts)
    pause = tokenizer.encode("\n", add_special_tokens=False)[0]
    for template in options.templates:
        prompt = Prompt(tokenizer, Llm(name=options.llm, template=template))
        shares = [repeated(llm, prompt, texts, pause, breaks) for breaks in BREAKS]
        print(
            f"{template.replace(AUDIO, '…')!r:70}",
            *(f"{breaks:g}: {share:.3f}" for breaks, share in zip(BREAKS, shares, strict=True)),
            flush=True,
        )


@torch.inference_mode()
def repeated(llm: torch.nn.Module, prompt: Prompt, texts: list[str], pause: int, breaks: float) -> float:
    """Return the share of the answers' tokens that the LLM ranks first.

    Args:
        llm: the frozen LLM.
        prompt: the prompt around the text.
        texts: the texts to repeat.
        pause: the token of a line break.
        breaks: the mean number of line breaks after each token.
    """
    rng = random.Random(0)
    correct = total = 0
    for text in texts:
        audio_ids: list[int] = []
        for token in prompt.tokenizer.encode(" " + text, add_special_tokens=False):
            # `breaks` of 1.8, for example, means one line break, and a second one with a probability of 0.8.
            audio_ids += [token] + [pause] * (int(breaks) + (rng.random() < breaks % 1))
        after_audio, answer = prompt.with_answer(prompt.main, text)
        ids = [*prompt.main.before, *audio_ids, *after_audio, *answer]
        # The logits at a position are those of the next token.
        predicted = llm(torch.tensor([ids])).logits[0].argmax(-1)[len(ids) - len(answer) - 1 : -1].tolist()
        correct += sum(a == b for a, b in zip(predicted, answer, strict=True))
        total += len(answer)
    return correct / total


if __name__ == "__main__":
    main()
