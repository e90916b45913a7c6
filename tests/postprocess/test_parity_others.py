"""The parity cases of this room, run from the tests as well."""

import pytest

from parity import run_file


@pytest.mark.parametrize(
    "name", ["seeded_watershed.npz", "mutex_watershed.npz", "multicut.npz", "metrics.npz", "metrics.json"]
)
def test_oracle_file(oracles, name):
    failed = [row for row in run_file(oracles / "postprocess" / name) if not row.ok]
    assert not failed, failed
