"""Groups utterances into batches of limited size. These functions need no torch."""

from collections.abc import Iterable, Sequence


def longest_first(lengths: Sequence[float]) -> list[int]:
    """Return the indices of `lengths`, the longest first; equal lengths remain in their order."""
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def padded_batches(
    lengths: Sequence[float], budget: float, order: Iterable[int] | None = None
) -> list[list[int]]:
    """Group utterances in a given order. A batch ends where the next utterance would exceed the budget.

    Because of padding, the size of a batch is the length of its longest utterance times their number.

    Args:
        lengths: length of each utterance.
        budget: maximum size of a batch. Only a single utterance that is longer by itself may exceed it.
        order: indices of the utterances in this order; by default, that of `lengths`.

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
    """Cut a list into groups. A group ends where the next index would take the sum of sizes over the budget.

    Args:
        indices: indices into `sizes`; their order does not change.
        sizes: share of the budget that each index takes.
        budget: maximum sum of a group. An index that takes more by itself gets a group of its own.

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
