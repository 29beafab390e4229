"""Masks and dropout of features."""

import pytest
import torch

from slam_asr.config.sections import Masks
from slam_asr.models.augmentation import Augmentation, draw_mask


@pytest.mark.parametrize(
    ("size", "share", "longest"), [(500, 0.1, 25), (512, 0.05, 64), (40, 0.5, 200), (7, 0.1, 1)]
)
def test_masks_cover_the_given_share_in_spans_of_at_most_the_given_length(size, share, longest):
    torch.manual_seed(1)
    masks = torch.stack([draw_mask(size, share, longest) for _ in range(2000)])
    covered = masks.float().mean().item()
    # Overlaps cover less. Of n spans that are placed at random, the covered share is about 1 - (1 - s/n)^n.
    assert 0.75 * share < covered < 1.05 * share
    if longest < 65:  # longer spans than this meet each other in most masks
        runs = [run for mask in masks.tolist() for run in "".join("01"[x] for x in mask).split("0") if run]
        single = sum(len(run) <= longest for run in runs) / len(runs)
        assert single > 0.9
    # Every element is covered now and then, including the first and the last.
    assert masks.any(0).all()


def test_a_short_utterance_can_be_masked():
    for size in range(4):
        assert draw_mask(size, 0.9, 25).shape == (size,)


def test_frames_and_channels_are_hidden_as_wholes_and_other_values_are_unchanged():
    torch.manual_seed(2)
    augment = Augmentation(masks=Masks(time_share=0.3, time_length=4, channel_share=0.3, channel_length=3))
    features = torch.rand(60, 24) + 1.0
    (masked,) = augment([features])
    frames, channels = (masked == 0).all(1), (masked == 0).all(0)
    assert 0 < frames.sum() < 60 and 0 < channels.sum() < 24
    hidden = frames[:, None] | channels
    assert torch.equal(masked, features.masked_fill(hidden, 0.0))
    assert features.all()  # the caller's tensor, which may be a view of the feature store, is unchanged


def test_utterances_of_a_batch_have_masks_of_their_own():
    torch.manual_seed(3)
    augment = Augmentation(masks=Masks(time_share=0.3, time_length=4))
    first, second = augment([torch.ones(60, 2)] * 2)
    assert not torch.equal(first, second)


def test_features_are_unchanged_in_evaluation_and_without_settings():
    utterances = [torch.ones(60, 24)]
    active = Augmentation(0.5, Masks(time_share=0.5, channel_share=0.5))
    assert active.eval()(utterances)[0] is utterances[0]
    state = torch.get_rng_state()
    assert Augmentation()(utterances)[0] is utterances[0]
    # No random number is drawn, so that runs of recipes without these settings remain as they were.
    assert torch.equal(torch.get_rng_state(), state)
