"""A checkpoint is whole or is not used: damage costs at most the newest one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from saved import assert_is, content, names, save, state_of, tensors_of

from preftune.engine import checkpoint
from preftune.engine.checkpoint import Checkpoints, rng_state, set_rng_state

FILES = ("tensors.safetensors", "state.json", "manifest.json")


# --- whole ------------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_found(tmp_path: Path) -> None:
    """Tensors bit for bit, state as JSON; the newest of several; nothing but three files; no word said."""
    path = save(tmp_path / "run" / "checkpoints", 9, 10).folder / "step-10"
    assert sorted(FILES) == names(path)
    assert_is(Checkpoints(path.parent).latest(pytest.fail), 10)  # 10 after 9, not before


def test_the_tensor_file_is_read_by_the_safetensors_library(tmp_path: Path) -> None:
    """Every dtype, scalars, empty and non-contiguous tensors, odd lengths before wide elements: bit for bit."""
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16]
    tensors = {f"odd/{t}": (torch.arange(9) - 4).to(t).reshape(3, 3).t() for t in dtypes}
    tensors |= {"bytes": torch.arange(5, dtype=torch.uint8), "int8": torch.tensor([-1], dtype=torch.int8)}
    tensors |= {"bool": torch.tensor([True, False]), "scalar": torch.tensor(3.5), "empty": torch.empty(0, 4)}
    tensors |= {"special": torch.tensor([float("nan"), float("inf"), -0.0]), "\u00fc": torch.ones(1)}
    tensors |= {"parameter": torch.nn.Parameter(torch.ones(2))}
    path = Checkpoints(tmp_path).save(1, tensors, {})
    with open(path / "tensors.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert all(header[n]["data_offsets"][0] % t.element_size() == 0 for n, t in tensors.items())  # each one aligned
    found = safetensors.torch.load_file(path / "tensors.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        torch.testing.assert_close(found[name], tensor.detach(), rtol=0, atol=0, equal_nan=True)


def test_nothing_is_found_where_nothing_was_saved(tmp_path: Path) -> None:
    """No folder, an empty folder, and folders of other names hold no checkpoint."""
    assert Checkpoints(tmp_path / "none").latest(pytest.fail) is None
    for other in ("step-", "step-x", "step-3.damaged", "step-3.bak", ".tmp-step-3", "best-3"):
        (tmp_path / other).mkdir()
    assert Checkpoints(tmp_path).latest(pytest.fail) is None


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept_and_older_ones_removed(keep: int, tmp_path: Path) -> None:
    """After every save the newest `keep` are there, and nothing else."""
    checkpoints = Checkpoints(tmp_path, keep)
    for step in range(8, 13):
        checkpoints.save(step, tensors_of(step), state_of(step))
        expected = [f"step-{s}" for s in range(max(8, step - keep + 1), step + 1)]
        assert names(tmp_path) == sorted(expected)
    assert_is(checkpoints.latest(pytest.fail), 12)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    """The later content counts, the previous step stays, nothing is left over."""
    checkpoints = save(tmp_path, 1, 2)
    checkpoints.save(2, tensors_of(2), {"again": True})
    found = checkpoints.latest(pytest.fail)
    assert found is not None and found.state == {"again": True}
    assert names(tmp_path) == ["step-1", "step-2"]


def test_a_crash_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    """The replaced checkpoint is found under its aside name until the new one stands; then it goes."""
    checkpoints = save(tmp_path, 2, keep=1)
    (tmp_path / "step-2").rename(tmp_path / "step-2.replaced")
    assert_is(checkpoints.latest(pytest.fail), 2)
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step-2"]
    shutil.copytree(tmp_path / "step-2", tmp_path / "step-2.replaced")  # the crash came after the second rename
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step-2"]


def test_what_a_crash_left_half_written_is_removed_by_the_next_save_only(tmp_path: Path) -> None:
    """Looking for the latest touches nothing on disk: another process may be writing there."""
    save(tmp_path, 1)
    (tmp_path / ".tmp-step-2").mkdir()
    (tmp_path / ".tmp-step-2" / "tensors.safetensors").write_bytes(b"half")
    assert_is(Checkpoints(tmp_path).latest(pytest.fail), 1)
    assert names(tmp_path) == [".tmp-step-2", "step-1"]
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-1", "step-2"]


# --- torn or altered --------------------------------------------------------------------------------------------------


def delete(path: Path, other: Path, rng: random.Random) -> None:
    path.unlink()


def truncate(path: Path, other: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def flip(path: Path, other: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def lengthen(path: Path, other: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.choice([b" ", b"\n", b"\0", b"{}"]))


def swap(path: Path, other: Path, rng: random.Random) -> None:
    """For manifest.json: a stale manifest."""
    shutil.copyfile(other, path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("damage", "cases"), [(delete, 1), (truncate, 40), (flip, 120), (lengthen, 4), (swap, 1)])
def test_a_damaged_checkpoint_is_passed_over_and_said_so(
    name: str, damage: Callable[[Path, Path, random.Random], None], cases: int, tmp_path: Path
) -> None:
    """Whatever file is deleted, cut, flipped by a bit, lengthened or taken from another checkpoint: the previous
    checkpoint is used, one sentence names the damaged one and the file, and the evidence stays as it is."""
    folder, rng = save(tmp_path / "run", 3, 4).folder, random.Random(0)
    newest, whole = folder / "step-4", content(folder / "step-4")
    for _ in range(cases):
        damage(newest / name, folder / "step-3" / name, rng)
        damaged, said = content(newest), list[str]()
        assert damaged != whole
        assert_is(Checkpoints(folder).latest(said.append), 3)
        assert len(said) == 1 and "step-4 is not whole and is not used" in said[0]
        assert name.split(".")[0] in said[0]
        assert content(newest) == damaged and names(folder) == ["step-3", "step-4"]
        for file, data in whole.items():
            (newest / file).write_bytes(data)
    assert_is(Checkpoints(folder).latest(pytest.fail), 4)


def test_a_whole_checkpoint_under_the_name_of_another_step_is_passed_over(tmp_path: Path) -> None:
    """A renamed or copied folder is not that step's checkpoint."""
    folder, said = save(tmp_path, 3, 4).folder, list[str]()
    shutil.copytree(folder / "step-3", folder / "step-9")
    assert_is(Checkpoints(folder).latest(said.append), 4)
    assert said == [f"checkpoint {folder / 'step-9'} is not whole and is not used: manifest.json belongs to step 3"]


@pytest.mark.parametrize("text", ["", "[]", "7", '{"files": 3, "step": 4}', '{"files": {}, "step": 4}', "\ud800", "{"])
def test_a_file_that_is_no_manifest_is_said_to_be_damaged(text: str, tmp_path: Path) -> None:
    """Any bytes in manifest.json are survived."""
    folder, said = save(tmp_path, 3, 4).folder, list[str]()
    (folder / "step-4" / "manifest.json").write_bytes(text.encode(errors="surrogatepass"))
    assert_is(Checkpoints(folder).latest(said.append), 3)
    assert len(said) == 1 and said[0].endswith("manifest.json is damaged")


def test_a_manifest_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    """Exactly the two known files are accepted, so a crafted name is never opened."""
    folder = save(tmp_path, 3, 4).folder
    path = folder / "step-4" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../step-3/state.json"] = manifest["files"].pop("state.json")
    path.write_bytes(checkpoint._manifest(4, manifest["files"]))
    assert_is(Checkpoints(folder).latest(lambda sentence: None), 3)


def test_a_checkpoint_that_cannot_be_read_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk error in the newest one is not the end of the run: the previous one is used."""
    folder, said, original = save(tmp_path, 3, 4).folder, list[str](), hashlib.file_digest

    def failing(file: Any, algorithm: str) -> Any:
        if "step-4" in file.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(file, algorithm)

    monkeypatch.setattr(checkpoint.hashlib, "file_digest", failing)
    assert_is(Checkpoints(folder).latest(said.append), 3)
    assert len(said) == 1 and "step-4" in said[0] and "Input/output error" in said[0]


def test_when_none_is_whole_each_is_named_and_none_is_used(tmp_path: Path) -> None:
    """latest() gives None after one sentence for every folder, newest first."""
    folder, said = save(tmp_path, 3, 4).folder, list[str]()
    for step in (3, 4):
        flip(folder / f"step-{step}" / "tensors.safetensors", folder, random.Random(0))
    assert Checkpoints(folder).latest(said.append) is None
    assert ["step-4" in said[0], "step-3" in said[1], len(said)] == [True, True, 2]


def test_evidence_survives_later_saves_and_does_not_count_as_kept(tmp_path: Path) -> None:
    """After falling back from step 4 to 3, saving 4, 5 and 6 keeps the damaged one aside and two whole ones."""
    checkpoints = save(tmp_path, 3, 4)
    for round_ in range(2):
        flip(tmp_path / "step-4" / "state.json", tmp_path, random.Random(round_))
        evidence, said = content(tmp_path / "step-4"), list[str]()
        assert_is(checkpoints.latest(said.append), 3)
        checkpoints.save(4, tensors_of(4), state_of(4))
        aside = "step-4.damaged" if round_ == 0 else "step-4.damaged-2"
        assert content(tmp_path / aside) == evidence and (tmp_path / "step-3").exists()
    for step in (5, 6):
        checkpoints.save(step, tensors_of(step), state_of(step))
    assert names(tmp_path) == ["step-4.damaged", "step-4.damaged-2", "step-5", "step-6"]


# --- random number generators -----------------------------------------------------------------------------------------


def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()), *torch.rand(3)]


def test_random_states_survive_the_checkpoint(tmp_path: Path) -> None:
    """python, numpy and torch draw the same numbers after the state has been on disk as JSON, gaussian halves too."""
    random.gauss(0, 1)  # python and numpy draw gaussians in pairs: one is now waiting
    np.random.randn()
    Checkpoints(tmp_path).save(1, {}, {"rng": rng_state()})
    expected = draws()
    assert draws() != expected
    found = Checkpoints(tmp_path).latest(pytest.fail)
    assert found is not None
    set_rng_state(found.state["rng"])
    assert draws() == expected
    set_rng_state(found.state["rng"])
    state = rng_state()
    set_rng_state(state)  # without a round trip, too
    assert draws() == expected


def test_no_pickle_is_written_or_read() -> None:
    """The module neither imports pickle nor calls torch.save or torch.load."""
    text = Path(checkpoint.__file__).read_text()
    assert not any(word in text for word in ("import pickle", "torch.save(", "torch.load(", "np.save", "np.load"))
