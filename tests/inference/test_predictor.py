import functools
import itertools

import jax
import numpy as np
import pytest
from inference import tiny_systems

from emjax.data.volume import open_volume, save_volume
from emjax.errors import UserError
from emjax.inference.blocks import plan_grid
from emjax.inference.predictor import (
    BlockPredictor,
    Job,
    Network,
    Window,
    create_outputs,
    flip_sets,
    read_reflected,
)
from emjax.systems.protocol import Block


def image_of(shape=(17, 33, 29), seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def whole_prediction(image, seed=0):
    """The affinities of the whole volume at once, with the border mirrored by one voxel."""
    config, collections = tiny_systems.load(seed)
    padded = np.pad(image, 1, mode="reflect")
    network = Network(config, collections, padded.shape, 1, devices=jax.local_devices()[:1])
    found = np.asarray(network(padded[None])["affinities"][0])
    return np.rint(np.moveaxis(found[1:-1, 1:-1, 1:-1], -1, 0) * 255)


def predicted(tmp_path, image, step=None, batch=1, devices=1, flips="", name="out", **changes):
    config, collections = tiny_systems.load(**changes)
    source = tmp_path / "image.zarr"
    if not source.exists():
        save_volume(source, image, voxel_size=(40, 4, 4))
    plan = tiny_systems.block(config)
    grid = plan_grid(image.shape, plan, 16, 1 << 30, (4, 8, 8), step)
    job = Job(
        key=name,
        load=functools.partial(tiny_systems.load, **changes),
        input=(str(source), {}),
        output=str(tmp_path / f"{name}.zarr"),
        region=tuple(slice(0, n) for n in image.shape),
        plan=plan,
        grid=grid,
        flips=flips,
    )
    outputs = tiny_systems.outputs(config)
    create_outputs(job, outputs, open_volume(str(source)), False, {})
    network = Network(config, collections, plan.size, batch, flip_sets(flips), jax.local_devices()[:devices])
    predictor = BlockPredictor(job, network=network)
    for index in grid.indices():
        predictor(index)
    return open_volume(job.output, allow_incomplete=True)[...]


def test_blocks_equal_the_whole_volume(tmp_path):
    image = image_of()
    # The halo covers the field of view: only rounding may differ.
    found = predicted(tmp_path, image, step=(6, 20, 10))
    assert np.abs(found - whole_prediction(image)).max() <= 1
    assert (found != whole_prediction(image)).mean() < 1e-3


@pytest.mark.parametrize("blending", ["linear", "gaussian"])
def test_blended_blocks_equal_the_whole_volume(tmp_path, blending):
    image = image_of()
    plan = Block(size=(8, 12, 12), stride=(3, 5, 4), halo=(1, 1, 1), blending=blending)
    found = predicted(tmp_path, image, step=(6, 20, 12), plan=plan)
    assert np.abs(found - whole_prediction(image)).max() <= 1


def test_result_does_not_depend_on_batch_devices_or_written_blocks(tmp_path):
    image = image_of()
    first = predicted(tmp_path, image, step=(6, 10, 10), batch=1, name="a")
    for number, (step, batch, devices) in enumerate([((12, 40, 20), 3, 1), ((6, 20, 40), 8, 8), (None, 5, 2)]):
        other = predicted(tmp_path, image, step=step, batch=batch, devices=devices, name=f"b{number}")
        np.testing.assert_array_equal(first, other)


def test_flips_average_the_flipped_predictions(tmp_path):
    image = image_of((8, 12, 12))
    plan = Block(size=(8, 12, 12), stride=(8, 12, 12))
    found = predicted(tmp_path, image, flips="yx", plan=plan)
    config, collections = tiny_systems.load(plan=plan)
    network = Network(config, collections, plan.size, 1, devices=jax.local_devices()[:1])
    mean = np.zeros((8, 12, 12, 3))
    for axes in [(), (1,), (2,), (1, 2)]:
        turned = network(np.flip(image, axes)[None].copy())
        mean += np.asarray(tiny_systems.flip_back(config, turned, axes)["affinities"][0]) / 4
    assert np.abs(found - np.rint(np.moveaxis(mean, -1, 0) * 255)).max() <= 1


def test_flip_sets():
    assert flip_sets("") == ((),)
    assert flip_sets("xy") == ((), (1,), (2,), (1, 2))
    assert len(flip_sets("zyx")) == 8
    with pytest.raises(UserError, match="zyx"):
        flip_sets("q")


def test_instances_get_numbers_of_their_block(tmp_path):
    image = image_of()
    found = predicted(tmp_path, image, kind="instances")
    found = found.reshape(image.shape)
    np.testing.assert_array_equal(found > 0, image > 127)
    owners = np.unique(found[found > 0] >> np.uint64(20))
    assert len(owners) == 3 * 4 * 3
    assert set(np.unique(found[found > 0] & np.uint64(2**20 - 1))) == {1}


def test_two_outputs_are_two_images(tmp_path):
    image = image_of((8, 12, 12))
    with pytest.raises(UserError):
        predicted(tmp_path, image, kind="two")
    names = ("affinities", "foreground")
    both = {name: open_volume(f"{tmp_path}/out.zarr:{name}", allow_incomplete=True) for name in names}
    np.testing.assert_array_equal(both["affinities"][0], both["foreground"][...].reshape(image.shape))


def test_reading_over_the_border_mirrors():
    volume = image_of((4, 5, 6))
    for low, high in itertools.product((-9, -1, 0, 2), (3, 4, 8, 13)):
        box = (slice(low, high),) * 3
        index = [np.pad(np.arange(n), (9, 12), mode="reflect")[low + 9 : high + 9] for n in volume.shape]
        np.testing.assert_array_equal(read_reflected(volume, box), volume[np.ix_(*index)])
    assert (read_reflected(volume[:1], (slice(-2, 3), slice(0, 5), slice(0, 6))) == volume[0]).all()


def test_window_maps_grey_values():
    window = Window(100.0, 300.0)
    np.testing.assert_allclose(window(np.array([0, 100, 200, 300, 999], np.uint16)), [0, 0, 0.5, 1, 1])
