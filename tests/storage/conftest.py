"""Large objects that are small."""

import pytest

PIECE = 100_000


@pytest.fixture
def small_pieces(monkeypatch) -> int:
    """The size of a piece of a transfer, in bytes: so small that a megabyte has many."""
    from moto.s3 import models

    from slam_asr.storage import objects, pieces

    monkeypatch.setattr(models, "S3_UPLOAD_PART_MIN_SIZE", 1)
    monkeypatch.setattr(pieces, "PART_BYTES", PIECE)
    monkeypatch.setattr(objects, "_STREAM_BYTES", PIECE)
    return PIECE
