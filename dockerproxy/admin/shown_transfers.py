"""The downloads under way, as a viewer may see them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from itertools import groupby
from typing import Any

from attrs import frozen

from dockerproxy.admin.layer_places import UNKNOWN_PLACE, BlobKey, LayerPlace
from dockerproxy.admin.viewer import Viewer, label_of, private_name
from dockerproxy.cache.board import BoardRow
from dockerproxy.oci.docker_hub import shown_name

MAX_TRANSFERS = 200
"""Downloads that one answer names."""


@frozen
class BlobTransfer:
    """A download of a blob. Each process that reads the file has one of the `rows`, the oldest of which is first."""

    rows: tuple[BoardRow, ...]

    @property
    def id(self) -> str:
        """A text that identifies the download while it lasts, and says nothing about it."""
        return self.rows[0].id

    @property
    def done(self) -> int:
        """The bytes that have arrived."""
        return max(row.done for row in self.rows)

    @property
    def blobs(self) -> list[BlobKey]:
        """The blob, as each of the repositories has it that a process downloads it for."""
        return list(dict.fromkeys((row.repository, row.digest) for row in self.rows))

    def show(
        self,
        viewer: Viewer,
        labels: Collection[str],
        is_public: Callable[[str], bool],
        place_of: Callable[[BlobKey], LayerPlace],
        rate: int | None = None,
    ) -> dict[str, Any]:
        """Return the download as a JSON value, at `rate` bytes a second.

        `labels` are the names of registries that everybody may see. `is_public` returns whether the public may read a
        repository, given its key, and `place_of` the place of a blob.
        """
        label = label_of(self.rows[0].repository, labels)
        # A repository may be public, and this content of it private, unless an image that has it is public.
        public = [
            row
            for row in self.rows
            if is_public(row.repository) and (not row.private or place_of((row.repository, row.digest)).is_public)
        ]
        # The clients of the others are not counted for a viewer that sees some of the rows.
        rows = self.rows if viewer.is_admin or not public else public
        named, place = None, UNKNOWN_PLACE
        if viewer.is_admin or public:
            named = shown_name(rows[0].repository)
            place = place_of((rows[0].repository, rows[0].digest)).seen_by(is_admin=viewer.is_admin)
        return {
            "id": self.id,
            "registry": label,
            "repository": named,
            "name": named or private_name(label),
            "digest": None if named is None else str(rows[0].digest),
            "size": next((row.size for row in rows if row.size is not None), None),
            "done": self.done,
            "rate": rate,
            "readers": sum(row.readers for row in rows),
            "started": rows[0].started,
            "private": not public,
            "tag": place.tag,
            "layer": place.layer,
            "layers": place.layers,
            "platform": place.platform,
        }


def blob_transfers(rows: Iterable[BoardRow]) -> list[BlobTransfer]:
    """Return the downloads that `rows` are about, the oldest first, at most `MAX_TRANSFERS`."""
    by_file = groupby(sorted(rows, key=lambda row: (*_file_of(row), row.started, row.id)), key=_file_of)
    transfers = [BlobTransfer(tuple(same)) for _, same in by_file]
    return sorted(transfers, key=lambda transfer: (transfer.rows[0].started, transfer.id))[:MAX_TRANSFERS]


def _file_of(row: BoardRow) -> tuple[str, str]:
    return row.repository.partition("/")[0], str(row.digest)
