"""Groups utterances into batches of limited size. These functions need no torch."""

from collections.abc import Iterable, Sequence


def longest_first(lengths: Sequence[float]) -> list[int]:
    """Return the indices of lengths, the longest first; equal lengths remain in their order."""
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def batches_of(
    lengths: Sequence[float], budget: float, order: Iterable[int] | None = None
) -> list[list[int]]:
    """Group utterances into batches that are as full as the budget allows.

    Args:
        lengths: size of each utterance.
        budget: maximum size of a batch. Because of padding, every utterance counts as much as the longest one
            of its batch. Only a single utterance that is longer by itself may exceed the budget.
        order: the indices in the order in which they are grouped; by default, that of `lengths`.

    Returns:
        The utterances' indices in each batch.
    """
    batches: list[list[int]] = []
    longest = 0.0
    for index in range(len(lengths)) if order is None else order:
        # A longer utterance also increases the padding of all others in its batch.
        longest = max(longest, lengths[index])
        if not batches or longest * (len(batches[-1]) + 1) > budget:
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return batches


def cut_at_budget(indices: Iterable[int], sizes: Sequence[float], budget: float) -> list[list[int]]:
    """Cut a list into groups that are as full as the budget allows. The last group gets the remainder.

    Args:
        indices: indices into `sizes`; their order does not change.
        sizes: share of the budget that each index takes.
        budget: maximum sum of a group. A single index that takes more gets a group of its own.

    Returns:
        The groups, in the order of `indices`.
    """
    groups: list[list[int]] = []
    size = 0.0
    for index in indices:
        if not groups or size + sizes[index] > budget:
            groups.append([])
            size = 0.0
        groups[-1].append(index)
        size += sizes[index]
    return groups
