import argparse
import json
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import pytest
import tensorstore as ts

from emjax.data.pyramid import write_pyramid
from emjax.data.volume import save_volume
from emjax.errors import UserError
from emjax.view import __main__ as view
from emjax.view import neuroglancer
from emjax.view.report import curve_svg
from emjax.view.server import Server, Shown, parse_chunk


def state_of(link):
    return json.loads(urllib.parse.unquote(link.partition("#!")[2]))


def test_links_hold_the_state():
    layers = [
        neuroglancer.layer("raw", "precomputed://http://127.0.0.1:9000/raw", "image"),
        neuroglancer.layer("seg", "zarr://gs://bucket/seg.zarr", "segmentation", segments=[3, 5]),
        neuroglancer.layer("aff", "zarr://x", "affinities", visible=False),
    ]
    state = neuroglancer.state(layers, (40, 4, 8), (1, 2, 3), (30, 500, 500))
    found = state_of(neuroglancer.link(state, "https://example.org/ng/"))
    assert found == json.loads(json.dumps(state))
    assert found["dimensions"] == {"x": [8e-9, "m"], "y": [4e-9, "m"], "z": [4e-8, "m"]}
    assert found["position"] == [3, 2, 1]
    assert found["layers"][1]["segments"] == ["3", "5"]
    assert found["layers"][2]["visible"] is False
    assert "emitRGB" in found["layers"][2]["shader"]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64, np.float32])
def test_served_volumes_read_back_as_precomputed(dtype):
    rng = np.random.default_rng(0)
    volume = rng.integers(0, 200, (70, 40, 90)).astype(dtype)
    kind = "segmentation" if np.dtype(dtype).itemsize >= 4 and dtype != np.float32 else "image"
    with Server([Shown("v1", volume, (40, 4, 8), (80, 40, 0), kind)]) as server:
        store = {"driver": "http", "base_url": server.address, "path": "/v1/"}
        found = ts.open({"driver": "neuroglancer_precomputed", "kvstore": store}, read=True).result()
        assert found.domain.origin[:3] == (0, 10, 2)
        np.testing.assert_array_equal(found.read().result()[..., 0].transpose(2, 1, 0), volume)


def test_affinities_are_served_as_channels():
    volume = np.random.default_rng(0).integers(0, 255, (3, 10, 20, 30), dtype=np.uint8)
    with Server([Shown("aff", volume, (1, 1, 1), kind="affinities")]) as server:
        store = {"driver": "http", "base_url": server.address, "path": "/aff/"}
        found = ts.open({"driver": "neuroglancer_precomputed", "kvstore": store}, read=True).result()
        np.testing.assert_array_equal(found.read().result().transpose(3, 2, 1, 0), volume)


def request(address, **headers):
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers)) as answer:
        return answer.status, answer.read(), dict(answer.headers)


def test_files_ranges_and_nothing_else(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "data").write_bytes(bytes(range(100)))
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "store" / "link").symlink_to(tmp_path / "secret")
    with Server([Shown("a", np.zeros((2, 2, 2), np.uint8), (1, 1, 1), folder=str(tmp_path / "store"))]) as server:
        base = f"{server.address}/files/a"
        status, body, headers = request(f"{base}/data")
        assert (status, body) == (200, bytes(range(100)))
        assert headers["Access-Control-Allow-Origin"] == "*"
        status, body, headers = request(f"{base}/data", Range="bytes=10-19")
        assert (status, body, headers["Content-Range"]) == (206, bytes(range(10, 20)), "bytes 10-19/100")
        assert request(f"{base}/data", Range="bytes=-5")[1] == bytes(range(95, 100))
        assert request(f"{base}/data", Range="bytes=90-")[1] == bytes(range(90, 100))
        for path in (
            "/files/a/../secret",
            "/files/a/%2e%2e/secret",
            "/files/a/..%2fsecret",
            "/files/a/link",
            "/files/b/data",
        ):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                request(server.address + path)
        for path in ("/a/s0/0-3_0-2_0-2", "/a/s0/1-1_0-2_0-2", "/a/s7/0-2_0-2_0-2", "/a/nothing"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                request(server.address + path)
        assert server.address.startswith("http://127.0.0.1:")


def test_chunk_names():
    shown = Shown("a", np.zeros((4, 5, 6), np.uint8), (1, 1, 1), (0, 0, 10))
    assert parse_chunk("10-16_0-5_0-4", shown, 0) == (slice(0, 4), slice(0, 5), slice(0, 6))
    assert parse_chunk("0-6_0-5_0-4", shown, 0) is None
    assert parse_chunk("x", shown, 0) is None


def options(**changes):
    return argparse.Namespace(**{"voxel_size": None, "segmentation": None, "image": None, **changes})


def test_kinds_names_and_levels(tmp_path, capsys):
    labels = np.random.default_rng(0).integers(0, 9, (40, 140, 150)).astype(np.uint32)
    save_volume(tmp_path / "seg.zarr", labels, voxel_size=(8, 8, 8))
    write_pyramid(str(tmp_path / "seg.zarr"))
    shown = view.show("seg", str(tmp_path / "seg.zarr"), options())
    assert shown.kind == "segmentation"
    assert len(shown.scales) > 1
    assert shown.info()["scales"][1]["resolution"] == [16, 16, 16]
    assert shown.folder == str(tmp_path / "seg.zarr")
    assert view.named("a=x.h5:raw") == ("a", "x.h5:raw")
    assert view.named("/data/x.h5:raw") == ("x_h5_raw", "/data/x.h5:raw")
    assert view.named("/data/seg.zarr/") == ("seg_zarr", "/data/seg.zarr/")
    with pytest.raises(UserError, match="called"):
        view.main([str(tmp_path / "seg.zarr"), str(tmp_path / "seg.zarr")])
    np.save(tmp_path / "bare.npy", labels)
    with pytest.raises(UserError, match="--voxel-size"):
        view.main([str(tmp_path / "bare.npy")])
    capsys.readouterr()


def test_the_command_prints_links_and_serves(tmp_path):
    save_volume(tmp_path / "raw.zarr", np.zeros((8, 8, 8), np.uint8), voxel_size=(8, 8, 8))
    process = subprocess.Popen(
        [sys.executable, "-m", "emjax.view", f"raw={tmp_path}/raw.zarr"], stdout=subprocess.PIPE, text=True
    )
    try:
        lines = []
        for line in process.stdout:
            lines.append(line.strip())
            if line.startswith("serving"):
                break
        link = next(line for line in lines if line.startswith("https://neuroglancer-demo.appspot.com/#!"))
        source = state_of(link)["layers"][0]["source"].removeprefix("precomputed://")
        assert source.startswith("http://127.0.0.1:")
        assert json.loads(request(f"{source}/info")[1])["scales"][0]["size"] == [8, 8, 8]
        process.send_signal(2)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_curves_are_drawn_to_scale():
    curve = [{"threshold": t, "voi_split": 3 * (1 - t), "voi_merge": 2 * t, "voi_sum": 3 - t} for t in (0.1, 0.5, 0.9)]
    drawn = curve_svg(curve, 0.5)
    assert drawn.count("<polyline") == 3
    assert "threshold 0.5: sum 2.5000 bits" in drawn
    assert 'class="marked"' in drawn
    assert curve_svg(curve[:1], None) == ""
