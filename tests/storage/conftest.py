"""Fixtures for tests of object storage."""

import pytest

PIECE = 100_000


@pytest.fixture
def small_pieces(monkeypatch) -> int:
    """Make the pieces of a transfer small, so that a megabyte has many; return their size in bytes."""
    from moto.s3 import models

    from slam_asr.storage import objects, pieces

    monkeypatch.setattr(models, "S3_UPLOAD_PART_MIN_SIZE", 1)
    monkeypatch.setattr(pieces, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(objects, "_STREAM_BYTES", PIECE)
    return PIECE
