"""Synthetic neuropil with exact labels: branching neurites that fill space, imaged as an electron microscope would.

Everything is laid out in nm. Neurites are random branching walks of varied calibre, thick ones first, that avoid each
other; each voxel then belongs to the neurite whose surface it is nearest to, by a front that grows from all walks at
once, so that every label is connected. The image has dark membranes, mitochondria with cristae, synaptic vesicles and
densities, cytoplasm texture, blur and noise; a thick section is the mean over its depth, and sections may be displaced
and differ in brightness.
"""

import dataclasses
import math
import os
from typing import Any

import numba
import numpy as np
import scipy.ndimage

from emjax.data.crops import Shape, split_components
from emjax.data.volume import create_volume, save_volume
from emjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhantomConfig:
    """What to make. Lengths in nm unless said otherwise; the defaults look like isotropic FIB-SEM of fly neuropil.

    Attributes:
        shape: voxels (z, y, x).
        voxel_size: nm (z, y, x).
        seed: the phantom is a function of this configuration alone.
        density: neurites per cubic micrometre.
        radius: median radius of a neurite's trunk.
        radius_spread: standard deviation of the logarithm of the trunk radius.
        varicosity: standard deviation of the logarithm of the radius along a neurite.
        straightness: length over which a neurite forgets its direction.
        branches: per micrometre of neurite.
        wobble: standard deviation of the irregularity of surfaces.
        membrane: thickness of a membrane pair with its cleft.
        mitochondria: per cubic micrometre.
        vesicles: per cubic micrometre, in clusters.
        synapses: dark densities on membranes, per cubic micrometre.
        texture: strength of cytoplasm texture, grey range 0..1.
        blur: standard deviation of the point spread in plane, voxels.
        noise: standard deviation of the detector noise, grey range 0..1.
        section_jitter: displacement of a section against the one before, standard deviation.
        section_brightness: standard deviation of the brightness of sections, grey range 0..1.
        section_contrast: standard deviation of the relative contrast of sections.
        subsections: planes that make up one section; 0 = as many as make them about as thin as three voxels are wide.
    """

    shape: Shape = (128, 128, 128)
    voxel_size: tuple[float, float, float] = (8.0, 8.0, 8.0)
    seed: int = 0
    density: float = 80.0
    radius: float = 60.0
    radius_spread: float = 0.5
    varicosity: float = 0.3
    straightness: float = 700.0
    branches: float = 0.6
    wobble: float = 10.0
    membrane: float = 24.0
    mitochondria: float = 15.0
    vesicles: float = 250.0
    synapses: float = 4.0
    texture: float = 0.06
    blur: float = 0.6
    noise: float = 0.05
    section_jitter: float = 0.0
    section_brightness: float = 0.0
    section_contrast: float = 0.0
    subsections: int = 0

    def __post_init__(self):
        if len(self.shape) != 3 or min(self.shape) < 8:
            raise UserError(f"phantom: found shape {self.shape}, expected three sizes (z, y, x) from 8 voxels up")
        if len(self.voxel_size) != 3 or min(self.voxel_size) <= 0:
            raise UserError(f"phantom: found voxel_size {self.voxel_size}, expected three lengths in nm (z, y, x)")
        for name in ("density", "radius", "straightness", "membrane"):
            if getattr(self, name) <= 0:
                raise UserError(f"phantom: found {name} {getattr(self, name)}, expected a positive number")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and value < 0:
                raise UserError(f"phantom: found {field.name} {value}, expected 0 or more")


def sectioned(shape: Shape = (32, 256, 256), voxel_size: tuple[float, float, float] = (40.0, 4.0, 4.0), seed: int = 0):
    """Configuration of a serial-section volume: thick sections, jitter, brightness that varies."""
    return PhantomConfig(
        shape=shape,
        voxel_size=voxel_size,
        seed=seed,
        blur=0.8,
        noise=0.07,
        section_jitter=5.0,
        section_brightness=0.03,
        section_contrast=0.08,
    )


@dataclasses.dataclass(frozen=True)
class Phantom:
    """A synthetic volume, all arrays (z, y, x).

    ``raw`` uint8; ``labels`` uint32, neurites, every one connected (26 neighbours), all voxels labelled;
    ``mitochondria`` uint32 ids, 0 = none.
    """

    raw: np.ndarray
    labels: np.ndarray
    mitochondria: np.ndarray


@numba.njit(nogil=True, cache=True)
def _claim_path(owner, occupied, start, end, own):
    # Voxels from start to end, one axis at a time so that the path is 6-connected; False if someone else's is met.
    for check in range(2):
        z, y, x = start[0], start[1], start[2]
        for axis in range(3):
            while (z, y, x)[axis] != end[axis]:
                step = 1 if end[axis] > start[axis] else -1
                if axis == 0:
                    z += step
                elif axis == 1:
                    y += step
                else:
                    x += step
                if check == 0:
                    if (owner[z, y, x] != 0 and owner[z, y, x] != own) or (
                        occupied[z, y, x] != 0 and occupied[z, y, x] != own
                    ):
                        return False
                else:
                    owner[z, y, x] = own
    return True


@numba.njit(nogil=True, cache=True)
def _stamp(occupied, centre, radius, voxel, own):
    low = np.empty(3, np.int64)
    high = np.empty(3, np.int64)
    for axis in range(3):
        low[axis] = max(0, math.ceil((centre[axis] - radius) / voxel[axis]))
        high[axis] = min(occupied.shape[axis] - 1, math.floor((centre[axis] + radius) / voxel[axis]))
    for z in range(low[0], high[0] + 1):
        for y in range(low[1], high[1] + 1):
            for x in range(low[2], high[2] + 1):
                d = (z * voxel[0] - centre[0]) ** 2 + (y * voxel[1] - centre[1]) ** 2 + (x * voxel[2] - centre[2]) ** 2
                if d <= radius * radius and occupied[z, y, x] == 0:
                    occupied[z, y, x] = own


# Vectors of three are handled number by number below: array expressions take Numba seconds to compile.


@numba.njit(nogil=True, cache=True)
def _turn(rng, heading, strength):
    """Add normal random numbers times ``strength`` to a direction, in place, and bring it to length 1."""
    squares = 0.0
    for axis in range(3):
        heading[axis] += strength * rng.standard_normal()
        squares += heading[axis] ** 2
    length = max(math.sqrt(squares), 1e-9)
    for axis in range(3):
        heading[axis] /= length


@numba.njit(nogil=True, cache=True)
def _grow_walks(rng, shape, voxel, radii, varicosity, straightness, branches, most_nodes):
    """Centre lines. Nodes: position (nm), radius, label, branch; ``seed`` grid: node + 1 of each voxel on a line."""
    owner = np.zeros(shape, np.int32)
    occupied = np.zeros(shape, np.int32)
    nodes = np.empty((most_nodes, 3), np.float64)
    node_radius = np.empty(most_nodes, np.float64)
    node_label = np.empty(most_nodes, np.int32)
    node_branch = np.empty(most_nodes, np.int32)
    seed = np.zeros(shape, np.int32)
    count = 0
    branch = 0
    step = 0.5 * min(voxel[0], voxel[1], voxel[2])
    # Waiting walks: position (z below 0: the neurite's start, not found yet), direction, radius, label. The thickest
    # goes first, so that a line always keeps clear of bodies thicker than its own and is never swallowed by one.
    waiting = np.empty((2 * radii.size + 4096, 8))
    waits = 0
    position = np.empty(3)
    target = np.empty(3)
    heading = np.empty(3)
    here = np.empty(3, np.int64)
    there = np.empty(3, np.int64)
    at = np.empty(3, np.int64)
    starts = np.empty((radii.size + 1, 3))
    for number in range(radii.size):
        for axis in range(3):
            heading[axis] = 0.0
        _turn(rng, heading, 1.0)
        starts[number + 1, 0] = -1.0
        for way in range(2):
            for axis in range(3):
                waiting[waits, axis] = -1.0
                waiting[waits, 3 + axis] = heading[axis] if way == 0 else -heading[axis]
            waiting[waits, 6] = radii[number]
            waiting[waits, 7] = number + 1
            waits += 1
    while waits > 0:
        pick = 0
        for i in range(1, waits):
            if waiting[i, 6] > waiting[pick, 6]:
                pick = i
        for axis in range(3):
            position[axis] = waiting[pick, axis]
            heading[axis] = waiting[pick, 3 + axis]
        base = waiting[pick, 6]
        own = int(waiting[pick, 7])
        waits -= 1
        for i in range(pick, waits):
            for j in range(8):
                waiting[i, j] = waiting[i + 1, j]
        if position[0] < 0:
            if starts[own, 0] < 0:
                found = False
                for _ in range(30):
                    for axis in range(3):
                        position[axis] = rng.random() * (shape[axis] - 1) * voxel[axis]
                        here[axis] = round(position[axis] / voxel[axis])
                    if occupied[here[0], here[1], here[2]] == 0 and owner[here[0], here[1], here[2]] == 0:
                        found = True
                        break
                if not found:
                    starts[own, 0] = 1e9
                    continue
                for axis in range(3):
                    starts[own, axis] = position[axis]
                owner[here[0], here[1], here[2]] = own
            elif starts[own, 0] == 1e9:
                continue
            for axis in range(3):
                position[axis] = starts[own, axis]
        first = count
        branch += 1
        swelling = 0.0
        left = -5000.0 * math.log(1.0 - rng.random())
        since_node = 1e9
        for axis in range(3):
            here[axis] = round(position[axis] / voxel[axis])
        radius = base
        while left > 0 and count < most_nodes:
            if since_node >= max(step, 0.2 * radius):
                for axis in range(3):
                    nodes[count, axis] = position[axis]
                node_radius[count] = radius
                node_label[count] = own
                node_branch[count] = branch
                count += 1
                since_node = 0.0
            if seed[here[0], here[1], here[2]] == 0:
                seed[here[0], here[1], here[2]] = count
            _turn(rng, heading, math.sqrt(step / straightness))
            moved = False
            for attempt in range(12):
                inside = True
                for axis in range(3):
                    target[axis] = position[axis] + step * heading[axis]
                    there[axis] = round(target[axis] / voxel[axis])
                    if target[axis] < 0 or target[axis] > (shape[axis] - 1) * voxel[axis]:
                        inside = False
                if not inside:
                    break
                if _claim_path(owner, occupied, here, there, own):
                    moved = True
                    break
                _turn(rng, heading, 0.25 + 0.1 * attempt)
            if not moved:
                break
            for axis in range(3):
                at[axis] = here[axis]
            for axis in range(3):
                while at[axis] != there[axis]:
                    at[axis] += 1 if there[axis] > at[axis] else -1
                    if seed[at[0], at[1], at[2]] == 0:
                        seed[at[0], at[1], at[2]] = count
            for axis in range(3):
                here[axis] = there[axis]
                position[axis] = target[axis]
            left -= step
            since_node += step
            swelling += -swelling * step / 250.0 + varicosity * math.sqrt(2 * step / 250.0) * rng.standard_normal()
            radius = max(base * math.exp(swelling), 20.0)
            if rng.random() < branches * step / 1000.0 and waits < waiting.shape[0]:
                for axis in range(3):
                    waiting[waits, axis] = position[axis]
                    target[axis] = heading[axis]
                _turn(rng, target, 0.9)
                for axis in range(3):
                    waiting[waits, 3 + axis] = target[axis]
                waiting[waits, 6] = max(base * (0.4 + 0.4 * rng.random()), 25.0)
                waiting[waits, 7] = own
                waits += 1
        for i in range(first, count):
            _stamp(occupied, nodes[i], node_radius[i], voxel, own)
    return nodes[:count], node_radius[:count], node_label[:count], node_branch[:count], seed


@numba.njit(nogil=True, cache=True)
def _displaced_positions(shape, voxel, coarse, spacing):
    """Positions of voxels in nm, made irregular by ``coarse`` (3, ...), which lies every ``spacing`` nm."""
    out = np.empty(shape + (3,), np.float32)
    for z in range(shape[0]):
        for y in range(shape[1]):
            for x in range(shape[2]):
                p = (z * voxel[0], y * voxel[1], x * voxel[2])
                a, b, c = p[0] / spacing, p[1] / spacing, p[2] / spacing
                i, j, k = int(a), int(b), int(c)
                fa, fb, fc = a - i, b - j, c - k
                for axis in range(3):
                    value = 0.0
                    for corner in range(8):
                        di, dj, dk = corner >> 2, (corner >> 1) & 1, corner & 1
                        weight = (fa if di else 1 - fa) * (fb if dj else 1 - fb) * (fc if dk else 1 - fc)
                        value += weight * coarse[axis, i + di, j + dj, k + dk]
                    out[z, y, x, axis] = p[axis] + value
    return out


@numba.njit(nogil=True, cache=True)
def _distance(position, node, radius):
    d0, d1, d2 = position[0] - node[0], position[1] - node[1], position[2] - node[2]
    return math.sqrt(d0 * d0 + d1 * d1 + d2 * d2) - radius


@numba.njit(nogil=True, cache=True)
def _fill(seed, positions, nodes, node_radius, node_label, node_branch, lowest, width, buckets):
    """Labels of all voxels by growth from the seeds, nearest surface first: buckets of ``width`` from ``lowest`` up."""
    shape = seed.shape
    labels = np.zeros(shape, np.int32)
    site = np.full(shape, -1, np.int32)
    best = np.full(shape, np.float32(1e30), np.float32)
    head = np.full(buckets, -1)
    capacity = seed.size + 1024
    entry_voxel = np.empty(capacity, np.int64)
    entry_site = np.empty(capacity, np.int32)
    entry_next = np.empty(capacity, np.int64)
    spare = -1
    used = 0
    plane, row = shape[1] * shape[2], shape[2]
    for z in range(shape[0]):
        for y in range(shape[1]):
            for x in range(shape[2]):
                if seed[z, y, x] > 0:
                    s = seed[z, y, x] - 1
                    labels[z, y, x] = node_label[s]
                    site[z, y, x] = s
    # A line's own voxels are claimed at once (labels are set); their surroundings enter the queue.
    current = 0
    for pass_ in range(2):
        if pass_ == 0:
            source_count = seed.size
        else:
            source_count = 0
        index = 0
        while True:
            if pass_ == 0:
                if index >= source_count:
                    break
                voxel = index
                index += 1
                z, y, x = voxel // plane, (voxel % plane) // row, voxel % row
                s = site[z, y, x]
                if s < 0:
                    continue
            else:
                while current < buckets and head[current] < 0:
                    current += 1
                if current >= buckets:
                    break
                entry = head[current]
                head[current] = entry_next[entry]
                voxel = entry_voxel[entry]
                s = entry_site[entry]
                entry_next[entry] = spare
                spare = entry
                z, y, x = voxel // plane, (voxel % plane) // row, voxel % row
                if labels[z, y, x] != 0:
                    continue
                labels[z, y, x] = node_label[s]
                site[z, y, x] = s
            for neighbour in range(6):
                nz = z + (1 if neighbour == 0 else -1 if neighbour == 1 else 0)
                ny = y + (1 if neighbour == 2 else -1 if neighbour == 3 else 0)
                nx = x + (1 if neighbour == 4 else -1 if neighbour == 5 else 0)
                if nz < 0 or ny < 0 or nx < 0 or nz >= shape[0] or ny >= shape[1] or nx >= shape[2]:
                    continue
                if labels[nz, ny, nx] != 0:
                    continue
                t = s
                cost = _distance(positions[nz, ny, nx], nodes[t], node_radius[t])
                # The nearest node of a neighbour is this node or one further along the line.
                for direction in (-1, 1):
                    while True:
                        u = t + direction
                        if u < 0 or u >= nodes.shape[0] or node_branch[u] != node_branch[t]:
                            break
                        other = _distance(positions[nz, ny, nx], nodes[u], node_radius[u])
                        if other >= cost:
                            break
                        t, cost = u, other
                if cost >= best[nz, ny, nx]:
                    continue
                best[nz, ny, nx] = cost
                bucket = min(max(int((cost - lowest) / width), current), buckets - 1)
                if spare >= 0:
                    entry = spare
                    spare = entry_next[entry]
                else:
                    if used == capacity:
                        more = capacity // 2
                        entry_voxel = np.concatenate((entry_voxel, np.empty(more, np.int64)))
                        entry_site = np.concatenate((entry_site, np.empty(more, np.int32)))
                        entry_next = np.concatenate((entry_next, np.empty(more, np.int64)))
                        capacity += more
                    entry = used
                    used += 1
                entry_voxel[entry] = nz * plane + ny * row + nx
                entry_site[entry] = t
                entry_next[entry] = head[bucket]
                head[bucket] = entry
    return labels


@numba.njit(nogil=True, cache=True)
def _border(labels):
    """True where a 6-neighbour has another label."""
    out = np.zeros(labels.shape, np.bool_)
    depth, height, width = labels.shape
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                own = labels[z, y, x]
                if z + 1 < depth and labels[z + 1, y, x] != own:
                    out[z, y, x] = True
                    out[z + 1, y, x] = True
                if y + 1 < height and labels[z, y + 1, x] != own:
                    out[z, y, x] = True
                    out[z, y + 1, x] = True
                if x + 1 < width and labels[z, y, x + 1] != own:
                    out[z, y, x] = True
                    out[z, y, x + 1] = True
    return out


@numba.njit(nogil=True, cache=True, fastmath={"nnan", "ninf", "nsz", "arcp"})
def _near_distance(mask, voxel, most):
    """Distance in nm to the nearest True of ``mask``, exact up to ``most`` and ``most`` beyond; float32."""
    depth, height, width = mask.shape
    far = np.float32(most * most)
    along_x = np.empty(mask.shape, np.float32)
    for z in range(depth):
        for y in range(height):
            line = along_x[z, y]
            gap = np.float32(most)
            for x in range(width):
                gap = np.float32(0) if mask[z, y, x] else gap + np.float32(voxel[2])
                line[x] = gap
            gap = np.float32(most)
            for x in range(width - 1, -1, -1):
                gap = np.float32(0) if mask[z, y, x] else gap + np.float32(voxel[2])
                nearest = min(gap, line[x])
                line[x] = min(nearest * nearest, far)
    in_plane = np.empty(mask.shape, np.float32)
    reach = int(most / voxel[1])
    for z in range(depth):
        for y in range(height):
            out = in_plane[z, y]
            out[:] = far
            for other in range(max(0, y - reach), min(height, y + reach + 1)):
                gap = np.float32(((y - other) * voxel[1]) ** 2)
                line = along_x[z, other]
                for x in range(width):
                    out[x] = min(out[x], line[x] + gap)
    result = along_x
    reach = int(most / voxel[0])
    for z in range(depth):
        for y in range(height):
            out = result[z, y]
            out[:] = far
            for other in range(max(0, z - reach), min(depth, z + reach + 1)):
                gap = np.float32(((z - other) * voxel[0]) ** 2)
                line = in_plane[other, y]
                for x in range(width):
                    out[x] = min(out[x], line[x] + gap)
            for x in range(width):
                out[x] = math.sqrt(out[x])
    return result


@numba.njit(nogil=True, cache=True)
def _add_mitochondria(rng, count, nodes, node_radius, node_label, node_branch, labels, depth_nm, voxel):
    """Ids of mitochondria: capsules along thick stretches of neurites, well below the membrane."""
    out = np.zeros(labels.shape, np.int32)
    made = 0
    if nodes.shape[0] == 0:
        return out
    for _ in range(40 * count):
        if made >= count:
            break
        centre = int(rng.random() * nodes.shape[0])
        if node_radius[centre] < 60.0:
            continue
        thickness = min(node_radius[centre] * (0.55 + 0.3 * rng.random()), 60.0 + 140.0 * rng.random())
        length = 100.0 + rng.exponential(300.0)
        made += 1
        for direction in (-1, 1):
            at = centre
            walked = 0.0
            while walked < length:
                taper = math.sqrt(max(1.0 - (walked / length) ** 2, 0.0))
                radius = min(thickness * (0.35 + 0.65 * taper), node_radius[at] * 0.8)
                _stamp_inside(out, nodes[at], radius, voxel, made, labels, node_label[at], depth_nm, 22.0)
                after = at + direction
                if after < 0 or after >= nodes.shape[0] or node_branch[after] != node_branch[at]:
                    break
                walked += _distance(nodes[after], nodes[at], 0.0)
                at = after
    return out


@numba.njit(nogil=True, cache=True)
def _stamp_inside(out, centre, radius, voxel, own, labels, label, depth_nm, least_depth):
    low = np.empty(3, np.int64)
    high = np.empty(3, np.int64)
    for axis in range(3):
        low[axis] = max(0, math.ceil((centre[axis] - radius) / voxel[axis]))
        high[axis] = min(out.shape[axis] - 1, math.floor((centre[axis] + radius) / voxel[axis]))
    for z in range(low[0], high[0] + 1):
        for y in range(low[1], high[1] + 1):
            for x in range(low[2], high[2] + 1):
                d = (z * voxel[0] - centre[0]) ** 2 + (y * voxel[1] - centre[1]) ** 2 + (x * voxel[2] - centre[2]) ** 2
                if d <= radius * radius and labels[z, y, x] == label and depth_nm[z, y, x] >= least_depth:
                    out[z, y, x] = own


@numba.njit(nogil=True, cache=True)
def _add_vesicles(rng, count, grey, labels, depth_nm, mitochondria, voxel):
    """Vesicles of about 40 nm in clusters: a dark ring around a light core, added to ``grey`` in place."""
    depth, height, width = labels.shape
    made = 0
    cluster = np.empty(3)
    centre = np.empty(3)
    left_in_cluster = 0
    for _ in range(30 * count + 100):
        if made >= count:
            break
        if left_in_cluster == 0:
            z, y, x = int(rng.random() * depth), int(rng.random() * height), int(rng.random() * width)
            if depth_nm[z, y, x] < 40.0 or mitochondria[z, y, x] != 0:
                continue
            cluster[0], cluster[1], cluster[2] = z * voxel[0], y * voxel[1], x * voxel[2]
            home = labels[z, y, x]
            left_in_cluster = 60
        left_in_cluster -= 1
        for axis in range(3):
            centre[axis] = cluster[axis] + rng.standard_normal() * 90.0
        z, y, x = (
            round(centre[0] / voxel[0]),
            round(centre[1] / voxel[1]),
            round(centre[2] / voxel[2]),
        )
        if z < 0 or y < 0 or x < 0 or z >= depth or y >= height or x >= width:
            continue
        if labels[z, y, x] != home or depth_nm[z, y, x] < 24.0 or mitochondria[z, y, x] != 0:
            continue
        made += 1
        radius = 17.0 + 4.0 * rng.random()
        reach = radius + 10.0
        for iz in range(
            max(0, int((centre[0] - reach) / voxel[0])), min(depth, int((centre[0] + reach) / voxel[0]) + 2)
        ):
            for iy in range(
                max(0, int((centre[1] - reach) / voxel[1])), min(height, int((centre[1] + reach) / voxel[1]) + 2)
            ):
                for ix in range(
                    max(0, int((centre[2] - reach) / voxel[2])), min(width, int((centre[2] + reach) / voxel[2]) + 2)
                ):
                    d = math.sqrt(
                        (iz * voxel[0] - centre[0]) ** 2
                        + (iy * voxel[1] - centre[1]) ** 2
                        + (ix * voxel[2] - centre[2]) ** 2
                    )
                    ring = math.exp(-(((d - radius) / 6.0) ** 2))
                    core = math.exp(-((d / (0.6 * radius)) ** 2))
                    grey[iz, iy, ix] += -0.25 * ring + 0.08 * core


@numba.njit(nogil=True, cache=True)
def _add_synapses(rng, count, grey, depth_nm, voxel):
    """Dark densities on membranes, about 200 nm wide, added to ``grey`` in place."""
    depth, height, width = depth_nm.shape
    made = 0
    for _ in range(200 * count + 100):
        if made >= count:
            break
        z, y, x = int(rng.random() * depth), int(rng.random() * height), int(rng.random() * width)
        if depth_nm[z, y, x] > 0.0:
            continue
        made += 1
        size = 70.0 + 60.0 * rng.random()
        rz, ry, rx = int(2 * size / voxel[0]) + 1, int(2 * size / voxel[1]) + 1, int(2 * size / voxel[2]) + 1
        for iz in range(max(0, z - rz), min(depth, z + rz + 1)):
            for iy in range(max(0, y - ry), min(height, y + ry + 1)):
                for ix in range(max(0, x - rx), min(width, x + rx + 1)):
                    d = ((iz - z) * voxel[0]) ** 2 + ((iy - y) * voxel[1]) ** 2 + ((ix - x) * voxel[2]) ** 2
                    near = math.exp(-((depth_nm[iz, iy, ix] / 20.0) ** 2))
                    grey[iz, iy, ix] -= 0.3 * near * math.exp(-d / (size * size))


def _texture(rng: np.random.Generator, shape: Shape, sigma: float) -> np.ndarray:
    """Band-limited noise of unit deviation, float32."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    smooth = scipy.ndimage.gaussian_filter(noise, sigma, mode="wrap", truncate=3)
    return smooth / max(float(smooth.std()), 1e-9)


def _grid(config: PhantomConfig) -> tuple[int, int, Shape, np.ndarray]:
    """Planes per section, margin in y and x, shape and voxel size (nm) of the fine grid."""
    vz, vy, vx = config.voxel_size
    planes = config.subsections or min(max(1, round(vz / (3 * min(vy, vx)))), 8)
    margin = math.ceil(4 * config.section_jitter / min(vy, vx))
    z, y, x = config.shape
    return planes, margin, (z * planes, y + 2 * margin, x + 2 * margin), np.array([vz / planes, vy, vx])


def make_phantom(config: PhantomConfig) -> Phantom:
    """The volume of a configuration; the same configuration gives the same volume."""
    rng = np.random.default_rng(config.seed)
    planes, margin, shape, voxel = _grid(config)
    volume = float(np.prod(np.array(shape) * voxel)) / 1e9
    count = max(2, round(config.density * volume))
    radii = np.sort(config.radius * np.exp(config.radius_spread * rng.standard_normal(count)))[::-1]
    most_nodes = int(count * 40_000 / voxel.min()) + 10_000
    nodes, node_radius, node_label, node_branch, seed = _grow_walks(
        rng, shape, voxel, np.maximum(radii, 25.0), config.varicosity, config.straightness, config.branches, most_nodes
    )
    spacing = 60.0
    coarse_shape = tuple(int(n * v / spacing) + 2 for n, v in zip(shape, voxel))
    coarse = rng.standard_normal((3,) + coarse_shape) * config.wobble
    positions = _displaced_positions(shape, voxel, coarse, spacing)
    width = 0.25 * float(voxel.min())
    lowest = -float(node_radius.max()) - 8 * config.wobble
    highest = float(np.linalg.norm(np.array(shape) * voxel))
    buckets = min(int((highest - lowest) / width) + 2, 1 << 20)
    fine = _fill(seed, positions, nodes, node_radius, node_label, node_branch, lowest, width, buckets)
    del positions, seed
    depth_nm = _near_distance(_border(fine), voxel, 48.0)
    organelles = _add_mitochondria(
        rng, round(config.mitochondria * volume), nodes, node_radius, node_label, node_branch, fine, depth_nm, voxel
    )
    grey = _fine_image(rng, config, fine, depth_nm, organelles, voxel, volume)
    return _sections(rng, config, grey, fine, organelles, planes, margin)


def _fine_image(rng, config, labels, depth_nm, organelles, voxel, volume) -> np.ndarray:
    # Cytoplasm of each neurite its own shade.
    shade = (0.68 + 0.035 * rng.standard_normal(int(labels.max()) + 1)).astype(np.float32)
    grey = shade[labels]
    fine_sigma = 12.0 / voxel
    grey += np.float32(config.texture) * _texture(rng, labels.shape, np.maximum(fine_sigma, 0.5))
    grey += np.float32(0.5 * config.texture) * _texture(rng, labels.shape, np.minimum(80.0 / voxel, 12.0))
    inside = organelles > 0
    if inside.any():
        deep = _near_distance(~inside, voxel, 40.0)
        waves = _texture(rng, labels.shape, np.maximum(10.0 / voxel, 0.6))
        cristae = np.clip(waves, -1.5, 1.5) * np.float32(0.09)
        membrane = np.exp(-(((deep - 6.0) / 8.0) ** 2)) * np.float32(0.22)
        grey[inside] += (np.float32(-0.16) + cristae - membrane)[inside]
    _add_vesicles(rng, round(config.vesicles * volume), grey, labels, depth_nm, organelles, voxel)
    _add_synapses(rng, round(config.synapses * volume), grey, depth_nm, voxel)
    half = 0.5 * config.membrane
    dark = np.exp(-((depth_nm / half) ** 2)).astype(np.float32)
    # The membrane replaces what is below it, and is never quite even.
    strength = np.float32(1) + np.float32(0.12) * _texture(rng, labels.shape, np.maximum(25.0 / voxel, 0.7))
    weight = np.clip(dark * strength, 0, 1)
    return grey * (1 - weight) + np.float32(0.2) * weight


def _sections(rng, config, grey, fine, organelles, planes: int, margin: int) -> Phantom:
    depth, height, width = config.shape
    raw = np.empty(config.shape, np.uint8)
    labels = np.empty(config.shape, np.int32)
    mitochondria = np.empty(config.shape, np.uint32)
    drift = np.zeros(2)
    in_plane = np.array(config.voxel_size[1:])
    for z in range(depth):
        # A slow pull back to the middle keeps the sum of many displacements within the margin.
        drift = 0.9 * drift + rng.standard_normal(2) * config.section_jitter
        dy, dx = np.clip(np.rint(drift / in_plane), -margin, margin).astype(int) + margin
        window = np.s_[dy : dy + height, dx : dx + width]
        slab = grey[z * planes : (z + 1) * planes].mean(0)[window]
        middle = z * planes + planes // 2
        labels[z] = fine[middle][window]
        mitochondria[z] = organelles[middle][window]
        if config.blur > 0:
            slab = scipy.ndimage.gaussian_filter(slab, config.blur, mode="reflect")
        slab = slab + rng.standard_normal(slab.shape, dtype=np.float32) * np.float32(config.noise)
        contrast = 1 + config.section_contrast * rng.standard_normal()
        brightness = config.section_brightness * rng.standard_normal()
        slab = (slab - 0.5) * contrast + 0.5 + brightness
        raw[z] = np.rint(np.clip(slab, 0, 1) * 255)
    return Phantom(raw, split_components(labels).astype(np.uint32), mitochondria)


def write_phantom(path: str | os.PathLike, config: PhantomConfig, *, overwrite: bool = False) -> dict[str, str]:
    """Make a phantom and write its arrays ``raw``, ``labels`` and ``mitochondria`` into one Zarr store or HDF5 file.

    Args:
        path: ``phantom.zarr`` (OME-Zarr 0.5 images in a group) or ``phantom.h5``.
        config: what to make.
        overwrite: replace arrays that are there.

    Returns:
        The specs by which ``open_volume`` opens them.

    Raises:
        UserError: the path names another format, something is there, or it cannot be written.
    """
    place = os.fspath(path)
    if not place.endswith((".zarr", ".h5", ".hdf5")):
        raise UserError(f"{place}: a phantom is written to a .zarr store or an .h5 file")
    specs = {name: f"{place}:{name}" for name in ("raw", "labels", "mitochondria")}
    options: dict[str, Any] = {
        "voxel_size": config.voxel_size,
        "attributes": {"phantom": dataclasses.asdict(config)},
        "overwrite": overwrite,
    }
    # Opened before the work, so that a place that cannot be written is found out at once.
    with create_volume(specs["raw"], config.shape, np.uint8, **options) as out:
        phantom = make_phantom(config)
        out[...] = phantom.raw
    save_volume(specs["labels"], phantom.labels, **options)
    save_volume(specs["mitochondria"], phantom.mitochondria, **options)
    return specs
