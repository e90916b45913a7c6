"""Folders that hold chunked stores, local or at ``gs://``, ``s3://`` and ``http(s)://``, and errors in one line."""

import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import tensorstore as ts

from emjax.data import ome
from emjax.errors import UserError, nearest


@functools.cache
def context() -> ts.Context:
    """One context per process: it bounds the cache of shard indices and gives up on a dead server within seconds."""
    return ts.Context(
        {
            "cache_pool": {"total_bytes_limit": 64 << 20},
            "http_request_retries": {"max_retries": 5, "initial_delay": "100ms", "max_delay": "2s"},
        }
    )


def reason(error: BaseException) -> str:
    """The message of a TensorStore, HDF5 or system error, without the specifications that TensorStore appends."""
    if isinstance(error, OSError) and error.strerror and error.args[1:2] != ("",):
        return error.strerror
    driver = re.search(r"errno = (\d+), error message", str(error))
    if driver:
        return os.strerror(int(driver[1]))
    text = re.split(r" \[(?:tensorstore_spec|source locations|http_response_code|domain)=?", str(error))[0]
    return " ".join(text.split())[:300] or type(error).__name__


@contextlib.contextmanager
def one_line(doing: str) -> Iterator[None]:
    """Turn errors of TensorStore and of the system into one :class:`UserError` that starts with ``doing``."""
    try:
        yield
    except UserError:
        raise
    # NotImplementedError is what TensorStore raises for a codec or driver that it lacks.
    except (ValueError, OSError, EOFError, RuntimeError, KeyError, NotImplementedError) as error:
        raise UserError(f"{doing}: {reason(error)}") from None


# --- addresses -------------------------------------------------------------------------------------------------------


def is_remote(location: str) -> bool:
    return re.match(r"(gs|s3|https?)://", location) is not None


def join(location: str, *parts: str) -> str:
    return "/".join([location.rstrip("/")] + [part.strip("/") for part in parts if part.strip("/")])


def _machine_of(vendor: str) -> bool:
    """Whether this machine is rented from ``vendor``, where credentials come from the machine itself."""
    card = pathlib.Path("/sys/class/dmi/id/sys_vendor")
    return card.is_file() and vendor in card.read_text(errors="replace")


def _has_google_credentials() -> bool:
    default = pathlib.Path.home() / ".config" / "gcloud" / "application_default_credentials.json"
    return bool(os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")) or default.exists() or _machine_of("Google")


def _has_amazon_credentials() -> bool:
    names = ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_FULL_URI")
    stored = (pathlib.Path.home() / ".aws" / "credentials").exists()
    return any(os.environ.get(name) for name in names) or stored or _machine_of("Amazon")


def kvstore(location: str, *, anonymous: bool = False) -> dict[str, Any]:
    """TensorStore key-value store of a folder: a local path, ``gs://``, ``s3://`` or ``http(s)://``.

    ``anonymous`` reads a public ``gs://`` bucket through its https address and a public ``s3://`` bucket unsigned,
    which needs no account. ``AWS_ENDPOINT_URL`` and ``AWS_REGION`` are honoured.
    """
    scheme, _, rest = location.rpartition("://")
    if scheme == "file":
        location, scheme = rest, ""
    if not scheme:
        return {"driver": "file", "path": os.path.abspath(location) + "/"}
    host, _, path = rest.partition("/")
    path = path.rstrip("/") + "/" if path.strip("/") else ""
    if scheme == "gs":
        if anonymous:
            return {"driver": "http", "base_url": "https://storage.googleapis.com", "path": f"/{host}/{path}"}
        return {"driver": "gcs", "bucket": host, "path": path}
    if scheme == "s3":
        store: dict[str, Any] = {"driver": "s3", "bucket": host, "path": path}
        if anonymous:
            store["aws_credentials"] = {"type": "anonymous"}
        if os.environ.get("AWS_ENDPOINT_URL"):
            store["endpoint"] = os.environ["AWS_ENDPOINT_URL"]
        if os.environ.get("AWS_REGION"):
            store["aws_region"] = os.environ["AWS_REGION"]
        return store
    if scheme in ("http", "https"):
        return {"driver": "http", "base_url": f"{scheme}://{host}", "path": f"/{path}"}
    raise UserError(f"{location}: unknown scheme {scheme}://, expected gs://, s3://, http://, https:// or a local path")


class Folder:
    """A folder that holds a store: JSON documents and child folders, local or remote."""

    def __init__(self, location: str, *, write: bool = False):
        self.location = location.rstrip("/") or "/"
        self.denied = ""
        credentials = _has_google_credentials if location.startswith("gs://") else _has_amazon_credentials
        self.anonymous = not write and location.startswith(("gs://", "s3://")) and not credentials()
        self.spec = kvstore(self.location, anonymous=self.anonymous)
        with one_line(f"cannot reach {self.location}"):
            self._kv = ts.KvStore.open(self.spec, context=context()).result()

    def bytes(self, name: str) -> bytes | None:
        if self.spec["driver"] == "file" and not os.path.isfile(os.path.join(self.spec["path"], name)):
            return None
        with one_line(f"cannot read {join(self.location, name)}"):
            try:
                found = self._kv.read(name).result()
            except (ValueError, RuntimeError, OSError) as error:
                # Buckets that must not be listed deny what is not there.
                if self.spec["driver"] == "file" or not re.search(r"\b403\b|PERMISSION_DENIED", str(error)):
                    raise
                self.denied = " (access was denied)"
                return None
        return found.value if found.state == "value" else None

    def json(self, name: str) -> dict[str, Any] | None:
        """The JSON object ``name``, or None if there is none.

        Raises:
            UserError: it is not a JSON object.
        """
        raw = self.bytes(name)
        if raw is None:
            return None
        try:
            document = json.loads(raw)
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise UserError(f"{join(self.location, name)} is damaged: not a JSON object ({len(raw)} bytes)")
        return document

    def write_bytes(self, name: str, content: bytes) -> None:
        """Writes or replaces ``name`` in one atomic step."""
        with one_line(f"cannot write {join(self.location, name)}"):
            self._kv.write(name, content).result()

    def write_json(self, name: str, document: Mapping[str, Any]) -> None:
        self.write_bytes(name, json.dumps(ome.plain(document), indent=2).encode())

    def child(self, *parts: str) -> "Folder":
        return Folder(join(self.location, *parts), write=not self.anonymous)

    def parent(self) -> "Folder | None":
        scheme, mark, rest = self.location.rpartition("://")
        if "/" not in rest.rstrip("/"):
            return None
        upper = rest.rstrip("/").rpartition("/")[0]
        return Folder(f"{scheme}{mark}{upper}", write=not self.anonymous) if upper else None

    def remove(self) -> None:
        with one_line(f"cannot remove {self.location}"):
            if self.spec["driver"] == "file":
                shutil.rmtree(self.spec["path"])
            else:
                self._kv.delete_range(ts.KvStore.KeyRange()).result()


def sibling(location: str) -> str:
    """A hint at the file or folder beside ``location`` whose name is nearest."""
    folder = os.path.dirname(os.path.abspath(location))
    return nearest(os.path.basename(location), os.listdir(folder)) if os.path.isdir(folder) else ""
