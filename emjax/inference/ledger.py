"""The ledger of a run: which blocks of which plan are done. It is the truth about a run, whatever ran it.

Beside the data (``OUT.zarr/.ledger``, local or in a bucket) lie ``plan.json`` and, for each stage and plan, one small
marker per finished block, written last, each in one atomic write. A block without a marker is not done, however much of
it was written; markers of another plan are in another folder and count for nothing.
"""

import dataclasses
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping
from typing import Any

import tensorstore as ts

from emjax.data.folder import Folder, context, one_line
from emjax.errors import UserError

FOLDER = ".ledger"
MOST_ATTEMPTS = 3


def content_hash(content: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that stand for JSON-able content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a stage stands: numbers of blocks, and sums over the finished ones."""

    total: int
    done: int
    failed: int
    voxels: int
    seconds: float
    first: float
    last: float
    hosts: tuple[str, ...]


class Ledger:
    """Markers of one stage of one plan."""

    def __init__(self, location: str, stage: str, plan_hash: str):
        self.location, self.stage, self.plan_hash = location, stage, plan_hash
        self._open()

    def _open(self) -> None:
        self.folder = Folder(f"{self.location}/{FOLDER}/{self.stage}/{self.plan_hash}", write=True)
        with one_line(f"cannot reach {self.folder.location}"):
            self._kv = ts.KvStore.open(self.folder.spec, context=context()).result()

    def __getstate__(self) -> dict[str, Any]:
        return {"location": self.location, "stage": self.stage, "plan_hash": self.plan_hash}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _names(self, kind: str) -> set[str]:
        with one_line(f"cannot list {self.folder.location}"):
            keys = self._kv.list(ts.KvStore.KeyRange(f"{kind}/", f"{kind}0")).result()
        return {key.decode().removeprefix(f"{kind}/").removesuffix(".json") for key in keys if key.endswith(b".json")}

    def done(self) -> set[str]:
        """Names of the finished blocks."""
        return self._names("done")

    def failed(self) -> set[str]:
        """Names of blocks that failed and have not been done since."""
        return self._names("failed") - self.done()

    def mark_done(self, name: str, **facts: Any) -> None:
        """Records a finished block; the block's voxels must be on disk already."""
        self.folder.write_json(f"done/{name}.json", {"host": socket.gethostname(), "time": time.time(), **facts})

    def mark_failed(self, name: str, error: str) -> int:
        """Records a failed attempt and returns how many there were."""
        attempts = int((self.folder.json(f"failed/{name}.json") or {}).get("attempts", 0)) + 1
        facts = {"attempts": attempts, "error": error, "host": socket.gethostname(), "time": time.time()}
        self.folder.write_json(f"failed/{name}.json", facts)
        return attempts

    def forgive(self) -> None:
        """Forgets failed attempts, so that a new run tries these blocks again."""
        with one_line(f"cannot write {self.folder.location}"):
            self._kv.delete_range(ts.KvStore.KeyRange("failed/", "failed0")).result()

    def failure(self, name: str) -> dict[str, Any]:
        """What was recorded about a failed block."""
        return self.folder.json(f"failed/{name}.json") or {}

    def facts(self, name: str) -> dict[str, Any]:
        """What was recorded about a finished block."""
        return self.folder.json(f"done/{name}.json") or {}

    def progress(self, total: int) -> Progress:
        """Sums over the markers of this stage."""
        done = self.done()
        facts = [self.facts(name) for name in sorted(done)]
        times = [float(fact.get("time", 0)) for fact in facts]
        starts = [stamp - float(fact.get("seconds", 0)) for fact, stamp in zip(facts, times)]
        return Progress(
            total=total,
            done=len(done),
            failed=len(self.failed()),
            voxels=sum(int(fact.get("voxels", 0)) for fact in facts),
            seconds=sum(float(fact.get("seconds", 0)) for fact in facts),
            first=min(starts, default=0.0),
            last=max(times, default=0.0),
            hosts=tuple(sorted({str(fact.get("host", "?")) for fact in facts})),
        )


def _plan_folder(location: str) -> Folder:
    return Folder(f"{location.rstrip('/')}/{FOLDER}", write=True)


def read_plan(location: str) -> dict[str, Any] | None:
    """The plan that an output was begun with, or None."""
    if "://" not in location and not os.path.isdir(os.path.join(location, FOLDER)):
        return None
    return _plan_folder(location).json("plan.json")


def write_plan(location: str, plan: Mapping[str, Any]) -> None:
    """Records the plan of an output; the last thing that is done before blocks are."""
    _plan_folder(location).write_json("plan.json", {**plan, "hash": content_hash(plan["content"])})


def check_same_plan(location: str, stored: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Refuses to go on with an output that was begun with another plan.

    Raises:
        UserError: names what differs.
    """
    if stored.get("hash") == content_hash(content):
        return
    old = stored.get("content", {})
    plain = json.loads(json.dumps(content, default=str))
    differing = [key for key in sorted({*old, *plain}) if old.get(key) != plain.get(key)]
    shown = ", ".join(f"{key} (was {_short(old.get(key))}, now {_short(plain.get(key))})" for key in differing[:3])
    raise UserError(
        f"{location} was begun with another plan: {shown or 'its record is damaged'}; give the same arguments to go "
        "on, or --overwrite to begin anew"
    )


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 60 else f"{text[:40]}…"


def file_generation(paths: Iterable[str]) -> list[list[Any]]:
    """Sizes and times of change of local files, by which a changed input is recognised."""
    found = []
    for path in paths:
        if os.path.isfile(path):
            stat = os.stat(path)
            found.append([os.path.basename(path), stat.st_size, stat.st_mtime_ns])
    return found
