"""One page on a flow run of the Prefect UI, brought up to date while the flow goes on.

A new version for every update would fill the server's database (a page with pictures has 100 kB), so the
first version is written over while the flow works; the next flow run under the same key makes the next version.
"""

import logging
import re
from collections.abc import Callable
from typing import TypeVar, cast
from uuid import UUID

import httpx
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException

__all__ = ["MarkdownPage", "artifact_key"]

log = logging.getLogger("nearline.process")

T = TypeVar("T")


class MarkdownPage:
    """An artifact by key. A server that is away costs the page, not the flow; for one thread at a time.

    Parameters
    ----------
    name : of what the page is about; made into a key of lowercase letters, digits and dashes.
    """

    def __init__(self, name: str, description: str) -> None:
        self.key, self._description = artifact_key(name), description
        self._id: UUID | None = None

    def show(self, text: str, *, is_last: bool = False) -> bool:
        """Put this text on the page; whether the server took it.

        Parameters
        ----------
        is_last : if the version under way is gone, make a new one for this text.
        """
        if self._id is None:
            self._id = _tell(lambda: self._create(text))
            return self._id is not None
        page = self._id
        done = _tell(lambda: _update(page, text))
        if done is None and is_last:
            self._id = None
            return self.show(text)
        return done is not None

    def _create(self, text: str) -> UUID:
        if FlowRunContext.get() is not None:
            return cast(UUID, create_markdown_artifact(text, key=self.key, description=self._description))
        # Prefect means to forbid the call above outside of flows; what a person asks for belongs to none.
        wanted = ArtifactCreate(key=self.key, type="markdown", description=self._description, data=text)
        with get_client(sync_client=True) as client:
            return client.create_artifact(wanted).id


def artifact_key(name: str) -> str:
    """Prefect allows lowercase letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "page"


def _update(page: UUID, text: str) -> bool:
    content = ArtifactUpdate(data=text).model_dump(mode="json", exclude_unset=True)
    with get_client(sync_client=True) as client:
        # Not `update_artifact`, which also sends the whole page as an event for the server to keep.
        client.request("PATCH", "/artifacts/{id}", json=content, path_params={"id": page})
    return True


def _tell(function: Callable[[], T]) -> T | None:
    try:
        return function()
    except (httpx.HTTPError, PrefectException, OSError) as error:
        log.warning("the Prefect server did not take a page: %s", error)
        return None
