"""The ablation's own measures and its report (``eval/fgnet.py``)."""

import importlib
import json

import h5py
import numpy as np
import pytest

from emjax.errors import UserError
from emjax.metrics import score

evaluation = importlib.import_module("eval.fgnet")
ac3 = importlib.import_module("eval.fgnet_ac3")
cremi = importlib.import_module("eval.fgnet_cremi")


def toy() -> "evaluation.Truth":
    """Two thick slabs with a thin one of three voxels between them."""
    labels = np.ones((8, 12, 40), np.int32)
    labels[:, :, 18:21] = 2
    labels[:, :, 21:] = 3
    affinities = np.ones((3, *labels.shape), bool)
    affinities[2, :, :, [18, 21]] = False
    counted = np.ones((3, *labels.shape), bool)
    kept = np.ones(labels.shape, bool)
    radius = evaluation.inscribed_radius(labels, False)
    raw = np.zeros(labels.shape, np.uint8)
    return evaluation.Truth(raw, labels, kept, radius, affinities, counted, (10.0, 10.0, 10.0))


def test_area_under_the_curve():
    values = np.array([0.1, 0.4, 0.35, 0.8])
    assert evaluation.auroc(values, np.array([False, False, True, True])) == pytest.approx(0.75)
    assert evaluation.auroc(values, np.array([False, True, False, True])) == 1
    assert evaluation.auroc(np.zeros(4), np.array([False, True, False, True])) == 0.5
    assert np.isnan(evaluation.auroc(values, np.zeros(4, bool)))


def test_radius_of_slabs():
    truth = toy()
    assert truth.radius[4, 6, 19] < 3
    assert truth.radius[4, 6, 5] > 10
    flat = evaluation.inscribed_radius(truth.labels, True)
    assert flat[4, 6, 5] == pytest.approx(truth.radius[4, 6, 5], abs=1.0)


def test_boundaries_count_by_the_thinner_object():
    truth = toy()
    perfect = evaluation.boundaries_by_calibre(np.where(truth.affinities, 255, 0).astype(np.uint8), truth)
    assert perfect["thin"]["precision"] == perfect["thin"]["recall"] == 1
    assert perfect["thick"]["boundary_voxels"] == 0
    wrong = np.full((3, *truth.labels.shape), 255, np.uint8)
    wrong[2, :, :, 5] = 0
    found = evaluation.boundaries_by_calibre(wrong, truth)
    assert found["thin"]["recall"] == 0
    assert found["middle"]["precision"] + found["thick"]["precision"] == 0


def test_right_affinities_score_right_by_both_recipes():
    truth = toy()
    found = evaluation.segmented(np.where(truth.affinities, 255, 0).astype(np.uint8), truth)
    assert found["agglomerated"]["voi_sum"] == pytest.approx(0, abs=1e-6)
    assert set(found["curve"]) == {f"{threshold:g}" for threshold in evaluation.THRESHOLDS}
    assert "voi_sum" in found["multicut"]


def test_report_and_verdict_of_made_up_runs(tmp_path):
    def scores(voi: float) -> dict:
        return {"voi_split": voi / 2, "voi_merge": voi / 2, "voi_sum": voi, "arand_skimage": 0.1, "segments": 7}

    def part(voi: float) -> dict:
        kinds = (
            "agglomerated",
            "agglomerated_fixed",
            "agglomerated_kept",
            "agglomerated_thin",
            "multicut",
            "multicut_kept",
        )
        return {kind: scores(voi) for kind in kinds} | {"threshold": 0.5}

    calibres = {name: {"precision": 1.0, "recall": 0.5} for name in evaluation.CALIBRES}
    for row, base in (("A0", 2.0), ("A4", 1.0)):
        for seed in range(3):
            entry = {
                "set": "fib25", "cpu": True, "row": row, "seed": seed, "machine": "m", "command": "c", "flips": "",
                "steps": 3, "voxels": 10**9, "parameters": 5, "start": "random", "validation": {"loss": 1.0},
                "refined": part(base + 0.01 * seed), "boundaries": calibres,
            }  # fmt: skip
            if row == "A4":
                entry |= {"coarse": part(3.0), "boundaries_coarse": calibres}
                entry["auroc"] = {"guidance": 0.7, "shuffled": 0.5, "doubt_of_coarse": 0.8, "wrong_share": 0.1}
            file = tmp_path / f"{row}_{seed}" / "evaluation" / "scores.json"
            file.parent.mkdir(parents=True)
            file.write_text(json.dumps(entry))
    text = evaluation.report(tmp_path)
    assert "| A0 | 3 | 1.005 ± 0.005" in text
    assert "| A4 below A0 | +1.000 | yes |" in text
    assert "| A4 below A2 | not run | |" in text
    assert "0.700 ± 0.000" in text
    assert "No row has been run" in evaluation.report(tmp_path / "A0_0")


def test_recipes_of_the_ac3_protocol():
    truth = toy()
    affinities = np.where(truth.affinities, 255, 0).astype(np.uint8)
    found = ac3.recipes(affinities, 1)
    assert sorted(found) == ["multicut", "watershed and agglomeration"] == sorted(ac3.PUBLISHED)
    scores = score(found["watershed and agglomeration"], truth.labels)
    # The recipe makes fragments of every section; perfect ones join along z.
    assert scores.voi_sum < 0.5
    assert "SuperHuman" in ac3.table("multicut", scores, ac3.PUBLISHED["multicut"])


def test_cremi_ground_truth_is_of_the_last_sections_without_the_unlabelled(tmp_path):
    labels = np.arange(125, dtype=np.uint64)[:, None, None] * np.ones((1, 4, 4), np.uint64)
    labels[110] = cremi.IGNORED
    with h5py.File(tmp_path / "sample_A_20160501.hdf", "w") as file:
        file["volumes/labels/neuron_ids"] = labels
    found = cremi.truth_of(str(tmp_path / "sample_A_20160501.hdf"))
    assert found.shape == (25, 4, 4)
    assert (found[:, 0, 0] == [0 if z == 110 else z for z in range(100, 125)]).all()
    with pytest.raises(UserError, match=r"sample_B_20160501\.hdf is not there"):
        cremi.main(["--checkpoint", "none", "--data", str(tmp_path), "--samples", "AB"])
