import numpy as np
import pytest
import torch

from vistok.eval.report.per_image import read_per_image, write_per_image

parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "per_image.parquet"


def test_round_trip_sorts_by_number(path):
    columns = {"psnr": torch.tensor([3.0, 1.0, 2.0]), "num_tokens": np.array([30, 10, 20], np.int32)}
    write_per_image(path, torch.tensor([7, 2, 5]), ["seven", "two", "<five>\n"], columns)
    index, keys, found = read_per_image(path)
    assert index.tolist() == [2, 5, 7] and keys == ["two", "<five>\n", "seven"]
    assert found["psnr"].tolist() == [1.0, 2.0, 3.0] and found["psnr"].dtype == np.float32
    assert found["num_tokens"].tolist() == [10, 20, 30] and found["num_tokens"].dtype == np.int32


def test_values_that_are_not_finite_survive(path):
    write_per_image(path, [0, 1], ["a", "b"], {"lpips_alex": np.array([np.nan, np.inf])})
    assert np.array_equal(read_per_image(path)[2]["lpips_alex"], [np.nan, np.inf], equal_nan=True)


def test_file_is_ordinary_parquet_in_zstd(path):
    write_per_image(path, [1, 0], ["b", "a"], {"psnr": [2.0, 1.0]})
    table = parquet.read_table(path)
    assert table.column_names == ["index", "key", "psnr"] and table["key"].to_pylist() == ["a", "b"]
    assert parquet.read_metadata(path).row_group(0).column(0).compression == "ZSTD"


def test_no_images_make_an_empty_table(path):
    write_per_image(path, torch.empty(0, dtype=torch.int64), [], {"psnr": torch.empty(0)})
    index, keys, columns = read_per_image(path)
    assert len(index) == 0 and keys == [] and len(columns["psnr"]) == 0


@pytest.mark.parametrize(
    ("index", "keys", "columns", "words"),
    [
        ([1, 1], ["a", "b"], {}, "1 repeated"),
        ([0, 1], ["a"], {}, "2 images; got 1"),
        ([0, 1], ["a", "b"], {"key": [1, 2]}, "'key'"),
        ([0, 1], ["a", "b"], {"psnr": [1.0]}, r"'psnr' must have shape \(2,\); got \(1,\)"),
    ],
)
def test_columns_that_do_not_fit_are_refused_and_nothing_is_written(path, index, keys, columns, words):
    with pytest.raises(ValueError, match=words):
        write_per_image(path, index, keys, columns)
    assert list(path.parent.iterdir()) == []


def test_failed_write_leaves_the_old_table(path, monkeypatch):
    write_per_image(path, [0], ["a"], {"psnr": [1.0]})
    monkeypatch.setattr(parquet, "write_table", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_per_image(path, [1], ["b"], {"psnr": [2.0]})
    assert read_per_image(path)[1] == ["a"] and list(path.parent.iterdir()) == [path]


def test_other_files_are_refused(path):
    path.write_bytes(b"PNG")
    with pytest.raises(ValueError, match="not a Parquet file"):
        read_per_image(path)
    import pyarrow

    parquet.write_table(pyarrow.table({"x": [1]}), path)
    with pytest.raises(ValueError, match="'index' and 'key'"):
        read_per_image(path)
