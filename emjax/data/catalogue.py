"""Known public data sets: where they are, what they hold, how they are licensed, and how their files are laid out.

Addresses come from the public documentation of the data sets and were not opened; they can move. Licences are given
where the documentation read for this list states them. Nothing is fetched but boxes of volumes that are made to be
streamed (``precomputed://``); files are downloaded and unpacked by the user, then converted (``emjax.prepare``).
"""

import dataclasses

from emjax.errors import UserError, nearest

Triple = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Member:
    """One volume of a data set.

    Attributes:
        name: of the volume; the output is called after it.
        image, labels: names of volumes relative to the source folder, the first that is there counts; ``{stem}`` in
            ``labels`` stands for the image's name without suffix. Streamed members have one absolute address.
        split: "train", "val", "test", or "" where the data set has no such parts.
        image_z: sections of the image that belong to this member.
        labels_as: "ids", or "white" for colour images in which white is the object.
        transforms: dataset in the labels' HDF5 file that maps stored ids (supervoxels) to bodies.
        each: ``image`` is a pattern, and every file it matches is a member of its own.
        image_axes, labels_axes: stored order where the files do not say.
    """

    name: str
    image: tuple[str, ...]
    labels: tuple[str, ...] = ()
    split: str = ""
    image_z: tuple[int, int] | None = None
    labels_as: str = "ids"
    transforms: str | None = None
    each: bool = False
    image_axes: str | None = None
    labels_axes: str | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """A public data set.

    Attributes:
        name: on the command line.
        title: tissue, method, size.
        urls: where it is.
        voxel_size: nm, zyx; None if it varies and the files say.
        axes: stored order of the files, "zyx" if nothing else is said.
        licence: terms, in short.
        citation: what to cite.
        access: what has to be done before or beside downloading.
        members: its volumes.
        streamed: members are read over the network, box by box.
    """

    name: str
    title: str
    urls: tuple[str, ...]
    voxel_size: Triple | None
    licence: str
    citation: str
    access: str = "open"
    axes: str = "zyx"
    members: tuple[Member, ...] = ()
    streamed: bool = False


def _streamed(
    name: str, title: str, voxel_size: Triple, licence: str, citation: str, access: str = "open", **volumes: str
) -> Entry:
    members = tuple(Member(kind, (f"precomputed://{address}",)) for kind, address in volumes.items())
    return Entry(
        name, title, tuple(volumes.values()), voxel_size, licence, citation, access, "xyz", members, streamed=True
    )


_EMBL = "https://oc.embl.de/index.php/s"
_HF = "https://huggingface.co/datasets"
_KASTHURI = "Kasthuri et al. 2015, Cell 162:648"
_TAKEMURA = "Takemura et al. 2015, PNAS 112:13711"
_WEI = "Wei et al. 2020, MICCAI, doi:10.1007/978-3-030-59722-1_7"
_CASSER = "Casser et al. 2018, arXiv:1812.06024"
_SHERIDAN = "Sheridan et al. 2023, Nat. Methods 20:295 (copies); see the original publication of the volume too"

CATALOGUE: tuple[Entry, ...] = (
    Entry(
        "snemi3d",
        "mouse cortex, ssSEM, 100 x 1024 x 1024 (AC4 train, first 100 sections of AC3 test)",
        (
            "https://zenodo.org/records/7142003/files/snemi.zip",
            f"{_HF.removesuffix('/datasets')}/pytc/tutorial/resolve/main/neuron_snemi/snemi.zip",
            f"{_EMBL}/43iMotlXPyAB39z/download",
            f"{_EMBL}/aRhphk35H23De2s/download",
        ),
        (30, 6, 6),
        "open; see the challenge page https://snemi3d.grand-challenge.org",
        _KASTHURI,
        members=(
            Member(
                "train",
                ("train-input.tif", "image/train-input.tif", "train_input.h5:main", "snemi_train.h5:volumes/raw"),
                (
                    "train-labels.tif",
                    "seg/train-labels.tif",
                    "train_labels.h5:main",
                    "snemi_train.h5:volumes/labels/neuron_ids",
                ),
                "train",
            ),
            Member(
                "test",
                ("test-input.tif", "image/test-input.tif", "test_input.h5:main", "snemi_test.h5:volumes/raw"),
                ("test-labels.h5:main", "test-labels.tif"),
                "test",
            ),
        ),
    ),
    Entry(
        "ac3ac4",
        "mouse cortex, ssSEM, AC4 100 and AC3 256 sections of 1024 x 1024, all labelled",
        (
            "https://github.com/chenhang98/AGQ/releases/tag/dataset",
            "https://software.rc.fas.harvard.edu/lichtman/vast/",
        ),
        (30, 6, 6),
        "open",
        _KASTHURI,
        members=(
            Member("AC4", ("AC4_inputs.h5",), ("AC4_labels.h5",), "train"),
            Member("AC3", ("AC3_inputs.h5",), ("AC3_labels.h5",), "test"),
        ),
    ),
    Entry(
        "cremi",
        "adult fruit-fly brain, ssTEM, samples A, B, C of 125 x 1250 x 1250",
        tuple(f"https://cremi.org/static/data/sample_{s}_20160501.hdf" for s in "ABC")
        + tuple(f"https://cremi.org/static/data/sample_{s}_padded_20160501.hdf" for s in "ABC")
        + tuple(f"https://cremi.org/static/data/sample_{s}%2B_20160601.hdf" for s in "ABC"),
        (40, 4, 4),
        "open",
        "Funke et al. 2016, https://cremi.org",
        "the certificate of cremi.org has expired at times: compare checksums rather than switch TLS off",
        members=tuple(
            Member(f"{s}{kind}", (f"sample_{s}{file}.hdf:volumes/raw",), (f"sample_{s}{file}.hdf:{ids}",), "train")
            for ids in ("volumes/labels/neuron_ids",)
            for kind, file in (("", "_20160501"), ("_padded", "_padded_20160501"))
            for s in "ABC"
        )
        + tuple(Member(f"{s}+", (f"sample_{s}+_20160601.hdf:volumes/raw",), (), "test") for s in "ABC"),
    ),
    Entry(
        "fib25",
        "fruit-fly medulla, FIB-SEM, training_sample2 250^3 and validation_sample 520^3",
        tuple(
            f"https://storage.googleapis.com/ffn-flyem-fib25/{sample}/{file}.h5"
            for sample in ("training_sample2", "validation_sample")
            for file in ("grayscale_maps", "groundtruth")
        ),
        (8, 8, 8),
        "CC-BY",
        _TAKEMURA,
        "the viewer says 8 nm, the samples 10 nm; --voxel-size 10,10,10 takes the other",
        members=tuple(
            Member(
                sample,
                (f"{sample}/grayscale_maps.h5:raw",),
                (f"{sample}/groundtruth.h5:stack",),
                split,
                transforms="transforms",
            )
            for sample, split in (("training_sample2", "train"), ("validation_sample", "val"))
        ),
    ),
    Entry(
        "fib25_lsd",
        "fruit-fly medulla, FIB-SEM, four training cubes as Zarr",
        tuple(
            f"s3://open-neurodata/funke/fib25/training/{name}.zarr"
            for name in ("trvol-250-1", "trvol-250-2", "tstvol-520-1", "tstvol-520-2")
        ),
        (8, 8, 8),
        "CC-BY",
        f"{_TAKEMURA}; {_SHERIDAN}",
        members=tuple(
            Member(name, (f"{name}.zarr:volumes/raw",), (f"{name}.zarr:volumes/labels/neuron_ids",), "train")
            for name in ("trvol-250-1", "trvol-250-2", "tstvol-520-1", "tstvol-520-2")
        ),
    ),
    Entry(
        "zebrafinch_lsd",
        "songbird area X (j0126), SBEM, 33 labelled cubes of 150 to 256 voxels a side, as Zarr",
        ("s3://open-neurodata/funke/zebrafinch/training/",),
        (20, 9, 9),
        "open",
        f"Kornfeld et al. 2017, bioRxiv 203711; {_SHERIDAN}",
        members=(
            Member("{stem}", ("gt_z*.zarr:volumes/raw",), ("{path}:volumes/labels/neuron_ids",), "train", each=True),
        ),
    ),
    Entry(
        "hemibrain_lsd",
        "fruit-fly central brain, FIB-SEM, eight labelled cubes, as Zarr",
        ("s3://open-neurodata/funke/hemi/training/",),
        (8, 8, 8),
        "open",
        f"Scheffer et al. 2020, eLife 9:e57443; {_SHERIDAN}",
        members=(Member("{stem}", ("*.zarr:volumes/raw",), ("{path}:volumes/labels/neuron_ids",), "train", each=True),),
    ),
    Entry(
        "emneuron",
        "16 labelled EM sources with neurons (SegNeuron's training and validation sets)",
        (f"{_HF}/yanchaoz/EMNeuron",),
        None,
        "per source, see the data set card",
        "Zhang et al. 2024, MICCAI (SegNeuron)",
        "gated: log in, accept, unpack labeled.rar and valid.rar; --voxel-size per source (table in the card)",
        members=(
            Member("{stem}", ("labeled/*/*.tif",), ("{folder}/{stem}_MaskIns.tif",), "train", each=True),
            Member(
                "{parents}", ("valid/*/*/raw.tif",), ("{folder}/label.tif", "{folder}/label_0.tif"), "val", each=True
            ),
        ),
    ),
    *(
        Entry(
            f"mitoem_{letter.lower()}",
            f"{tissue} cortex, SBEM, 1000 x 4096 x 4096, mitochondria in sections 0 to 499",
            (
                f"{_HF}/pytc/EM30/resolve/main/EM30-{letter}-im.zip",
                f"{_HF}/pytc/MitoEM/resolve/main/EM30-{letter}-mito-train-val-v2.zip",
            ),
            (30, 8, 8),
            "MIT on the hub",
            _WEI,
            "unpack both into one folder",
            members=(
                Member("train", ("im",), ("mito-train-v2", "mito_train"), "train", image_z=(0, 400)),
                Member("val", ("im",), ("mito-val-v2", "mito_val"), "val", image_z=(400, 500)),
                Member("test", ("im",), (), "test", image_z=(500, 1000)),
            ),
        )
        for letter, tissue in (("R", "rat"), ("H", "human"))
    ),
    Entry(
        "lucchi",
        "mouse hippocampus CA1, FIB-SEM, two volumes of 165 x 768 x 1024, mitochondria",
        ("https://www.epfl.ch/labs/cvlab/data/data-em/",),
        (5, 5, 5),
        "research use",
        "Lucchi et al. 2013, CVPR",
        members=(
            Member("train", ("training.tif",), ("training_groundtruth.tif",), "train"),
            Member("test", ("testing.tif",), ("testing_groundtruth.tif",), "test"),
        ),
    ),
    Entry(
        "lucchi_pp",
        "Lucchi's volumes, mitochondria annotated anew",
        ("http://www.casser.io/files/lucchi_pp.zip", f"{_HF}/pytc/tutorial/resolve/main/Lucchi%2B%2B.zip"),
        (5, 5, 5),
        "research use",
        _CASSER,
        members=tuple(
            Member(
                name.lower(),
                (f"Lucchi++/{name}_In", f"{name}_In"),
                (f"Lucchi++/{name}_Out", f"{name}_Out"),
                name.lower(),
                labels_as="white",
            )
            for name in ("Train", "Test")
        ),
    ),
    Entry(
        "kasthuri_pp",
        "mouse cortex, ssSEM, mitochondria annotated anew",
        ("http://www.casser.io/files/kasthuri_pp.zip",),
        (30, 6, 6),
        "research use",
        f"{_CASSER}; {_KASTHURI}",
        members=tuple(
            Member(
                name.lower(),
                (f"Kasthuri++/{name}_In", f"{name}_In"),
                (f"Kasthuri++/{name}_Out", f"{name}_Out"),
                name.lower(),
                labels_as="white",
            )
            for name in ("Train", "Test")
        ),
    ),
    Entry(
        "isbi2012",
        "fruit-fly larva ventral nerve cord, ssTEM, 30 x 512 x 512",
        (f"{_EMBL}/h0TkwqxU0PJDdMd/download", "https://www.ini.uzh.ch/~acardona/data.html"),
        (50, 4, 4),
        "non-commercial; cite",
        "Cardona et al. 2010, PLoS Biol 8:e1000502; Arganda-Carreras et al. 2015, Front. Neuroanat. 9:142",
        members=(
            Member("train", ("isbi.h5:raw", "isbi2012.h5:raw"), ("isbi.h5:labels/gt_segmentation",), "train"),
            Member("train", ("train-volume.tif",), ("train-labels.tif",), "train"),
            Member("test", ("test-volume.tif",), (), "test"),
        ),
    ),
    Entry(
        "vnc",
        "fruit-fly larva ventral nerve cord, ssTEM, two stacks of 20 x 1024 x 1024, classes",
        (
            "https://github.com/unidesigner/groundtruth-drosophila-vnc",
            "https://doi.org/10.6084/m9.figshare.856713",
        ),
        (50, 4.6, 4.6),
        "CC BY-NC-SA 3.0",
        "Gerhard et al. 2013, figshare 856713",
        members=(
            Member("stack1", ("stack1/raw",), ("stack1/labels",), "train"),
            Member("stack2", ("stack2/raw",)),
        ),
    ),
    Entry(
        "axonem",
        "human and mouse cortex, nine labelled cubes each, axons",
        tuple(f"{_HF}/pytc/AxonEM/resolve/main/EM30-{s}-train-9vol-pad-20-512-512.zip" for s in "HM"),
        None,
        "MIT on the hub",
        "Wei et al. 2021, MICCAI (AxonEM)",
        "voxels: --voxel-size 30,8,8 (human), 40,8,8 (mouse; see the paper)",
        members=(Member("{stem}", ("im_*.h5",), ("{folder}/seg_{tail}.h5",), "train", each=True),),
    ),
    Entry(
        "microns_cubes",
        "mouse cortex (basil, minnie, pinky), labelled cubes",
        tuple(f"https://zenodo.org/records/5760218/files/{name}.tar.gz" for name in ("basil", "minnie", "pinky")),
        (40, 8, 8),
        "see the record",
        "MICrONS consortium 2021, zenodo 5760218",
        "file names differ per cube: convert each with `prepare volume`",
    ),
    Entry(
        "nisb",
        "synthetic neuropil (Neuron Instance Segmentation Benchmark), nine settings",
        ("https://s3.nexus.mpcdf.mpg.de:443 (bucket nisb)", f"{_HF.removesuffix('/datasets')}/pytc/tutorial"),
        (20, 9, 9),
        "open",
        "https://structuralneurobiologylab.github.io/nisb/",
        axes="xyz",
        members=tuple(
            Member(
                f"{split}_{{parent}}",
                (f"{split}/*/data.zarr:img",),
                ("{path}:seg",),
                split,
                each=True,
                image_axes="xyzc",
                labels_axes="xyz",
            )
            for split in ("train", "val", "test")
        ),
    ),
    Entry(
        "cdeep3m_mito",
        "mouse cerebellum, SBEM, mitochondria",
        (
            "https://s3-us-west-2.amazonaws.com/cdeep3m-trainedmodels-s3/sbem/mitochrondria/xy5.9nm40nmz/"
            "sbem_mitochrondria_xy5.9nm40nmz.tar.gz",
        ),
        (40, 5.9, 5.9),
        "UC non-profit",
        "Haberl et al. 2018, Nat. Methods 15:677",
        members=(Member("train", ("images", "training/images"), ("labels", "training/labels"), "train"),),
    ),
    Entry(
        "mitoem2",
        "eight EM volumes with mitochondria, nnU-Net layout",
        ("https://zenodo.org/records/17635006",),
        None,
        "see the record",
        "MitoEM 2.0, zenodo 17635006",
        "files are NIfTI, which emjax does not read: save them as TIFF or HDF5 (x, y, z order) first",
        axes="xyz",
    ),
    Entry(
        "sam4em",
        "astrocytic processes and synapses, hippocampus (SAM4EM's benchmark)",
        ("https://github.com/Uzshah/SAM4EM",),
        None,
        "not published",
        "Shah et al. 2025, arXiv:2504.21544",
        "no public data when looked at: ask the authors",
    ),
    _streamed(
        "kasthuri2011",
        "mouse cortex, ssSEM, the whole volume",
        (30, 6, 6),
        "open",
        _KASTHURI,
        image="gs://neuroglancer-public-data/kasthuri2011/image_color_corrected",
        segmentation="gs://neuroglancer-public-data/kasthuri2011/ground_truth",
    ),
    _streamed(
        "fib25_whole",
        "fruit-fly medulla, FIB-SEM, the whole volume",
        (8, 8, 8),
        "CC-BY",
        _TAKEMURA,
        image="gs://neuroglancer-public-data/flyem_fib-25/image",
        segmentation="gs://neuroglancer-public-data/flyem_fib-25/ground_truth",
    ),
    _streamed(
        "hemibrain",
        "fruit-fly central brain, FIB-SEM",
        (8, 8, 8),
        "see its page",
        "Scheffer et al. 2020, eLife 9:e57443",
        image="gs://neuroglancer-janelia-flyem-hemibrain/emdata/clahe_yz/jpeg",
        segmentation="gs://neuroglancer-janelia-flyem-hemibrain/v1.2/segmentation",
        mitochondria="gs://neuroglancer-janelia-flyem-hemibrain/mito_20190717.27250582",
    ),
    _streamed(
        "manc",
        "fruit-fly male ventral nerve cord, FIB-SEM",
        (8, 8, 8),
        "see its page",
        "Takemura et al. 2024, eLife RP97769",
        image="gs://flyem-vnc-2-26-213dba213ef26e094c16c860ae7f4be0/v3_emdata_clahe_xy/jpeg",
        segmentation="gs://manc-seg-v1p2/manc-seg-v1.2",
    ),
    _streamed(
        "malecns",
        "fruit-fly male central nervous system, FIB-SEM",
        (8, 8, 8),
        "see its page",
        "Berg et al. 2025, bioRxiv",
        image="gs://flyem-male-cns/em/em-clahe-jpeg",
        segmentation="gs://flyem-male-cns/v0.9/segmentation",
    ),
    _streamed(
        "flywire",
        "adult fruit-fly brain (FAFB), ssTEM; the first filled scale has 40 x 16 x 16 nm",
        (40, 16, 16),
        "see its page",
        "Zheng et al. 2018, Cell 174:730; Dorkenwald et al. 2024, Nature 634:124",
        image="gs://microns-seunglab/drosophila_v0/alignment/image_rechunked",
        segmentation="gs://flywire_v141_m783",
    ),
    _streamed(
        "h01",
        "human temporal cortex, ssSEM",
        (33, 4, 4),
        "see its page",
        "Shapson-Coe et al. 2024, Science 384:eadk4858",
        image="gs://h01-release/data/20210601/4nm_raw",
        segmentation="gs://h01-release/data/20210601/c3",
    ),
    _streamed(
        "minnie65",
        "mouse visual cortex (MICrONS), ssTEM",
        (40, 8, 8),
        "see its page",
        "MICrONS consortium 2025, Nature 640:435",
        image="https://bossdb-open-data.s3.amazonaws.com/iarpa_microns/minnie/minnie65/em",
        segmentation="gs://iarpa_microns/minnie/minnie65/seg_m1300",
    ),
    _streamed(
        "zebrafinch",
        "songbird area X (j0126), SBEM, the whole volume",
        (20, 9, 9),
        "open",
        "Kornfeld et al. 2017, bioRxiv 203711; Januszewski et al. 2018, Nat. Methods 15:605",
        image="gs://j0126-nature-methods-data/GgwKmcKgrcoNxJccKuGIzRnQqfit9hnfK1ctZzNbnuU/rawdata_realigned",
        segmentation="gs://j0126-nature-methods-data/GgwKmcKgrcoNxJccKuGIzRnQqfit9hnfK1ctZzNbnuU/ffn_segmentation",
    ),
    _streamed(
        "hydra",
        "Hydra, whole animal",
        (30, 8, 8),
        "see its page",
        "Zhang et al. 2025 (BossDB zhang2025)",
        image="https://bossdb-open-data.s3.amazonaws.com/zhang2025/image",
        segmentation="https://bossdb-open-data.s3.amazonaws.com/zhang2025/neurons",
    ),
    _streamed(
        "kharris15",
        "rat hippocampus CA1, ssTEM (spine, oblique and apical volumes)",
        (50, 6, 6),
        "open",
        "Harris et al. 2015, Sci. Data 2:150046",
        **{
            f"{part}_{kind}": f"s3://open-neurodata/kharris15/{part}/{folder}"
            for part in ("spine", "oblique", "apical")
            for kind, folder in (("image", "em"), ("segmentation", "anno"))
        },
    ),
)


def entry(name: str) -> Entry:
    """The data set of a name.

    Raises:
        UserError: there is none; the message has the nearest name.
    """
    known = {found.name: found for found in CATALOGUE}
    if name not in known:
        raise UserError(
            f"no data set {name!r}{nearest(name, known)}; `python -m emjax.prepare list` shows those that are known"
        )
    return known[name]
