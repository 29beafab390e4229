"""Pieces are saved parts of an incomplete shard. With them, an interruption loses only minutes of work.

A slow encoder may take an hour to fill a shard, and a cluster may end a pod at any time, with about a second
to finish. Every `PIECE_SECONDS`, the batches that were encoded since the last piece are therefore saved as a
new one. An extraction that is started again plans the same shards and the same batches, reads the saved
batches, and encodes the others. The shard then has the same bytes as without an interruption. When it is
written, its pieces are removed.
"""

from slam_asr.artifacts.feature_store.namespace import unpack
from slam_asr.features.plan import PlannedShard
from slam_asr.models.feature_dtype import QuantizedFrames
from slam_asr.storage import delete, exists, join, name_of, read_bytes, sha256_of_bytes, walk

PIECE_SECONDS = 180.0
"""Seconds between two pieces of a shard. A GPU usually fills a shard sooner, and then no piece is saved."""
_SUFFIX = ".safetensors"


def read_pieces(shard: PlannedShard) -> dict[str, QuantizedFrames]:
    """Read the features in a shard's pieces, by audio id. A damaged piece is ignored.

    Raises:
        StorageError: object storage cannot be read.
    """
    features: dict[str, QuantizedFrames] = {}
    for path in _pieces(shard):
        try:
            content = read_bytes(path)
        except Exception:
            # Another extraction of the same audio may have finished the shard and removed its pieces.
            if exists(path):
                raise
            continue
        # A piece is named by the SHA-256 of its content.
        if name_of(path) == sha256_of_bytes(content) + _SUFFIX:
            features |= unpack(content)
    return features


def remove_pieces(shard: PlannedShard) -> None:
    """Remove the pieces of a shard that is complete."""
    for path in _pieces(shard):
        delete(path)


def _pieces(shard: PlannedShard) -> list[str]:
    # Files with another suffix are temporary ones, which another process may still be writing.
    return [join(shard.pieces, f.name) for f in walk(shard.pieces) if f.name.endswith(_SUFFIX)]
