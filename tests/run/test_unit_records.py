"""The units' records survive kills and resumes, whole and without a step twice."""

import numpy as np
import pyarrow.parquet
import pytest
import torch

from dist_vlcl.model.statistics import STATISTICS
from dist_vlcl.report.records import read_units
from dist_vlcl.run.unit_records import UnitRecords

UNITS = [("language", 1, "first", 7), ("vision", 1, "zeroth", 9), ("vision", 2, "frozen", 9)]


def statistics(step: int) -> torch.Tensor:
    """[U, 7]"""
    return torch.arange(21.0).view(3, 7) + 100 * step


def go_on(folder, first: int, last: int, flush_every: int = 3, **options) -> UnitRecords:
    """Record steps `first` to `last` after a checkpoint at `first - 1`, flushing as often as a run saves; then die."""
    records = UnitRecords(folder, UNITS, **{"every": 1, "step": first - 1, **options})
    for step in range(first, last + 1):
        if records.is_due(step):
            records.add(step, step // 5, statistics(step), [None, step / 4, None])
        if step % flush_every == 0:
            records.flush()
    return records


def test_what_was_recorded_is_what_is_read(tmp_path):
    go_on(tmp_path, 1, 6)
    table = read_units(tmp_path)
    assert table.column_names[:6] == ["step", "task", "branch", "layer", "order", "numel"]
    assert table["step"].to_pylist() == [s for s in range(1, 7) for _ in UNITS]
    assert table["task"].to_pylist() == [s // 5 for s in range(1, 7) for _ in UNITS]
    assert list(zip(*(table[n].to_pylist() for n in ("branch", "layer", "order", "numel")), strict=True)) == UNITS * 6
    assert table["projected_gradient"].to_pylist() == [s for step in range(1, 7) for s in (None, step / 4, None)]
    expected = torch.cat([statistics(s) for s in range(1, 7)])
    for k, name in enumerate(STATISTICS):
        assert table[name].to_pylist() == expected[:, k].tolist()
    types = dict(zip(table.column_names, map(str, table.schema.types), strict=True))
    assert (types["step"], types["task"], types["layer"], types["branch"], types["update_norm"]) == (
        ("int64", "int32", "int32", "string", "float")
    )


@pytest.mark.parametrize(("died_at", "checkpoint"), [(k, c) for k in (1, 5, 6, 10) for c in range(3 * (k // 3) + 1)])
def test_a_resume_at_any_checkpoint_leaves_every_step_once(tmp_path, died_at, checkpoint):
    """The checkpoint may be older than the newest part: a kill came between the two, or a newer checkpoint is broken."""
    go_on(tmp_path, 1, died_at)
    go_on(tmp_path, checkpoint + 1, 12)
    table = read_units(tmp_path)
    assert table["step"].to_pylist() == [s for s in range(1, 13) for _ in UNITS]
    assert table["gradient_norm"].to_pylist() == torch.cat([statistics(s) for s in range(1, 13)])[:, 0].tolist()


def test_a_small_file_that_unpacks_to_gigabytes_is_refused(tmp_path):
    go_on(tmp_path, 1, 3)
    part = tmp_path / "units" / "step-00000001.parquet"
    many = pyarrow.table({"step": pyarrow.array(np.zeros(5_000_000, dtype=np.int64))})
    pyarrow.parquet.write_table(pyarrow.table({str(k): many["step"] for k in range(14)}), part)
    assert part.stat().st_size < 1_000_000
    with pytest.raises(ValueError, match=r"step-00000001.parquet is damaged: it has more than 67,108,864 values"):
        read_units(tmp_path)


def test_an_interrupted_write_is_not_read_and_goes_with_the_next_start(tmp_path):
    go_on(tmp_path, 1, 3)
    (tmp_path / "units" / "step-00000004.parquet.tmp").write_bytes(b"PAR1")
    assert read_units(tmp_path).num_rows == 9
    go_on(tmp_path, 4, 6)
    assert sorted(p.name for p in (tmp_path / "units").iterdir()) == ["step-00000001.parquet", "step-00000004.parquet"]


def test_files_of_the_user_stay(tmp_path):
    go_on(tmp_path, 1, 3)
    (tmp_path / "units" / "notes.md").write_text("mine")
    (tmp_path / "units" / ".ipynb_checkpoints").mkdir()  # Jupyter makes it by itself
    go_on(tmp_path, 1, 3)
    assert (tmp_path / "units" / "notes.md").read_text() == "mine" and read_units(tmp_path).num_rows == 9


@pytest.mark.parametrize(("every", "steps"), [(2, [1, 3, 5]), (4, [1, 5]), (0, [])])
def test_every_n_steps(tmp_path, every, steps):
    go_on(tmp_path, 1, 6, every=every)
    assert [row["step"] for row in read_units(tmp_path).to_pylist()] == [s for s in steps for _ in UNITS]


def test_other_ranks_write_nothing(tmp_path):
    go_on(tmp_path, 1, 6, is_main=False)
    assert not list(tmp_path.iterdir()) and read_units(tmp_path).num_rows == 0
