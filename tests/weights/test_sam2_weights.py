"""The converter is strict and lossless: every format, both spellings, every kind of wrong file."""

import functools
import pickle

import ml_dtypes
import numpy as np
import pytest

from emjax import convert
from emjax.errors import UserError
from emjax.models.sam2.config import SIZES, VERSIONS, sam2_config
from emjax.systems import sam2_stack
from emjax.weights.family import from_state, read_checkpoint, to_state, write_checkpoint
from emjax.weights.files import read_state_file, write_safetensors
from emjax.weights.rules import entries
from emjax.weights.sam2 import FAMILY, OFFICIAL, config_of

NEW = ("no_obj_embed_spatial", "obj_ptr_tpos_proj.weight", "obj_ptr_tpos_proj.bias")


@functools.cache
def shapes():
    return {
        name: entry.shape
        for name, entry in entries(FAMILY.network({"size": "tiny", "version": "2.1"}).shapes, OFFICIAL).items()
    }


@functools.cache
def _drawn():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes().items()}


def state() -> dict[str, np.ndarray]:
    """A tiny 2.1 with random values, under the official names."""
    return dict(_drawn())


def same(left, right):
    assert set(left) == set(right)
    assert all(np.array_equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("names", ["official", "huggingface", "emjax"])
def test_safetensors_round_trip(tmp_path, names):
    write_checkpoint(tmp_path / "a.safetensors", from_state(state(), [FAMILY], "x"), names)
    again = read_checkpoint(tmp_path / "a.safetensors", [FAMILY])
    assert again.settings == {"size": "tiny", "version": "2.1"}
    same(to_state(again, "official"), state())


def test_orbax_and_torch_round_trip(tmp_path):
    pytest.importorskip("torch")
    write_checkpoint(tmp_path / "folder", from_state(state(), [FAMILY], "x"))
    write_checkpoint(tmp_path / "back.pt", read_checkpoint(tmp_path / "folder", [FAMILY]))
    same(read_state_file(tmp_path / "back.pt")[0], state())


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("size", SIZES)
def test_every_size_and_version_through_files(tmp_path, size, version):
    network = FAMILY.network({"size": size, "version": version})
    rng = np.random.default_rng(1)
    given = {name: rng.random(entry.shape, np.float32) for name, entry in entries(network.shapes, OFFICIAL).items()}
    checkpoint = from_state(given, [FAMILY], "x")
    assert checkpoint.settings == {"size": size, "version": version}
    write_checkpoint(tmp_path / "a.safetensors", checkpoint, "huggingface")
    write_checkpoint(tmp_path / "folder", read_checkpoint(tmp_path / "a.safetensors", [FAMILY]))
    (tmp_path / "a.safetensors").unlink()
    back = read_checkpoint(tmp_path / "folder", [FAMILY])
    assert back.settings == checkpoint.settings
    write_checkpoint(tmp_path / "b.safetensors", back, "official")
    same(read_state_file(tmp_path / "b.safetensors")[0], given)


def test_a_checkpoint_of_another_size_than_asked_for(tmp_path):
    write_checkpoint(tmp_path / "a.safetensors", from_state(state(), [FAMILY], "x"))
    for wrong, message in (({"size": "large"}, "size tiny, but size=large"), ({"version": "2.0"}, "but version=2.0")):
        with pytest.raises(UserError, match=message):
            sam2_stack.network(sam2_stack.Config(checkpoint=str(tmp_path / "a.safetensors"), **wrong))


def test_version_20_lacks_three_names():
    old = {name: value for name, value in state().items() if name not in NEW}
    checkpoint = from_state(old, [FAMILY], "x")
    assert checkpoint.settings == {"size": "tiny", "version": "2.0"}
    assert config_of(checkpoint.settings) == sam2_config("tiny", "2.0")
    same(to_state(checkpoint, "official"), old)
    same(to_state(from_state(to_state(checkpoint, "huggingface"), [FAMILY], "x"), "official"), old)


def test_image_only_checkpoint_is_told():
    whole = to_state(from_state(state(), [FAMILY], "x"), "huggingface")
    memory = ("memory_", "no_object", "occlusion", "object_pointer", "temporal", "mask_downsample.", "no_memory_pos")
    image = {name: value for name, value in whole.items() if not name.startswith(memory)}
    checkpoint = from_state(image, [FAMILY], "x")
    assert checkpoint.settings["version"] == "image only"
    assert config_of(checkpoint.settings).image_only
    same(to_state(checkpoint, "huggingface"), image)


def test_transformers_names_and_shapes():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        theirs = transformers.Sam2VideoModel(transformers.Sam2VideoConfig()).state_dict()
    ours = to_state(from_state(state(), [FAMILY], "x"), "huggingface")
    assert {name: tuple(value.shape) for name, value in theirs.items()} == {name: x.shape for name, x in ours.items()}


def test_half_precision_is_widened():
    half = {name: value.astype(ml_dtypes.bfloat16) for name, value in state().items()}
    checkpoint = from_state(half, [FAMILY], "x")
    found = to_state(checkpoint, "official")
    assert all(found[name].dtype == np.float32 and np.array_equal(found[name], half[name]) for name in half)


def test_every_wrong_name_is_listed():
    wrong = state()
    wrong["no_mem_embedding"] = wrong.pop("no_mem_embed")
    wrong["mask_downsample.bias"] = np.zeros(3, np.float32)
    wrong["no_obj_ptr"] = np.full((1, 256), np.nan, np.float32)
    del wrong["obj_ptr_proj.layers.1.weight"]
    with pytest.raises(UserError) as found:
        from_state(wrong, [FAMILY], "file.pt")
    message = str(found.value)
    for part in (
        "file.pt read as sam2 tiny 2.1",
        "no_mem_embedding; did you mean 'no_mem_embed'",
        "2 missing: no_mem_embed; obj_ptr_proj.layers.1.weight",
        "mask_downsample.bias is (3,), expected (1,)",
        "no_obj_ptr has values that are not finite",
    ):
        assert part in message


def test_double_precision_that_would_lose_bits():
    wrong = state()
    wrong["no_obj_ptr"] = np.full((1, 256), 0.1)
    with pytest.raises(UserError, match="no_obj_ptr is float64 and does not fit float32"):
        from_state(wrong, [FAMILY], "x")


def test_unequal_copies_of_the_shared_matrix_are_refused():
    theirs = to_state(from_state(state(), [FAMILY], "x"), "huggingface")
    theirs["shared_image_embedding.positional_embedding"] += 1
    with pytest.raises(UserError, match="shared_image_embedding"):
        from_state(theirs, [FAMILY], "x")


def test_other_trunk_and_other_model():
    fewer = {name: value for name, value in state().items() if ".blocks.11." not in name}
    with pytest.raises(UserError, match="96 channels and 11 blocks; the published sizes are tiny"):
        from_state(fewer, [FAMILY], "x")
    with pytest.raises(UserError, match=r"is no checkpoint of sam2: it has 1 arrays such as fc.weight"):
        from_state({"fc.weight": np.zeros((2, 2))}, [FAMILY], "x")


class Code:
    def __reduce__(self):
        return print, ("executed",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    torch.save({"model": {"a": torch.zeros(1)}, "extra": Code()}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Code()))
    for name in ("evil.pt", "plain.pt"):
        with pytest.raises(UserError, match=r"could run code, so it is refused|damaged"):
            read_state_file(tmp_path / name)
    assert "executed" not in capsys.readouterr().out


def test_truncated_files(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"model": {"a": torch.zeros(100)}}, tmp_path / "a.pt")
    write_safetensors(tmp_path / "a.safetensors", {"a": np.zeros(100, np.float32)}, {})
    for name in ("a.pt", "a.safetensors"):
        data = (tmp_path / name).read_bytes()
        for keep in (len(data) // 2, 12):
            (tmp_path / name).write_bytes(data[:keep])
            with pytest.raises(UserError, match=r"truncated or damaged|neither"):
                read_state_file(tmp_path / name)


def test_not_a_checkpoint(tmp_path):
    (tmp_path / "page.pt").write_text("<!DOCTYPE html><html>not found</html>")
    with pytest.raises(UserError, match="neither a PyTorch nor a safetensors file"):
        read_state_file(tmp_path / "page.pt")
    with pytest.raises(UserError, match="is not there"):
        read_state_file(tmp_path / "none.pt")
    with pytest.raises(UserError, match=r"without model.safetensors"):
        read_state_file(tmp_path)


def test_command(tmp_path, capsys):
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    write_safetensors(source, state(), {})
    assert convert.main([str(source), str(target), "--verify", "--size", "tiny"]) == 0
    assert "sam2 (size tiny, version 2.1): 471 arrays, 38,962,754 values" in capsys.readouterr().out
    for arguments, message in (
        ([str(source), str(target)], "is there already"),
        ([str(source), str(tmp_path / "b.safetensors"), "--size", "large"], "size is tiny, but --size large"),
        ([str(source), str(tmp_path / "b.safetensors"), "--version", "2.0"], "version is 2.1"),
        ([str(source), str(tmp_path / "b.safetensors"), "--names", "kaggle"], "names 'kaggle' are not known"),
        ([str(source), str(tmp_path / "no" / "b.safetensors")], "folder .* is not there"),
        ([str(source)], "a target is missing"),
    ):
        with pytest.raises(UserError, match=message):
            convert.main(arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.safetensors", "out.safetensors"]
