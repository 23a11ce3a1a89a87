import csv
import io
from dataclasses import replace

import pytest

from vistok.eval.protocol import preset
from vistok.eval.report.compare import ProtocolMismatch, compare
from vistok.eval.results import Results, VariantResult

PROTOCOL = preset("torch-fidelity", dataset="aa", num_images=50000, height=256, width=256)


@pytest.fixture
def save(tmp_path):
    def save(file, name, metrics, protocol=PROTOCOL, **fields):
        variant = VariantResult("reconstruction", "reconstruction", {}, fields.pop("rate", None), metrics)
        results = Results({"name": name}, {"name": "imagenet val"}, protocol, 50000, 50000, [variant], **fields)
        results.save(tmp_path / file)
        return tmp_path / file

    return save


@pytest.fixture
def three(save):
    return [
        save("a.json", "titok", {"rfid": 1.71, "psnr": 20.0, "ris_std": 3.0}, rate=0.02),
        save("b.json", "ibq | 16k", {"rfid": 1.37, "psnr": 22.0, "ris_std": 2.0}, rate=0.05),
        save("c.json", "vqgan", {"rfid": 4.5, "new": 1.0}, skipped={"psnr": "no reason", "ssim": "no reason"}),
    ]


def test_best_value_follows_the_direction_of_the_metric(three):
    comparison = compare(three)
    assert comparison.metrics == ["rfid", "ris_std", "psnr", "bits_per_pixel", "new"]
    best = {metric: comparison.best(metric) for metric in comparison.metrics}
    assert best == {"rfid": {1}, "psnr": {1}, "ris_std": set(), "bits_per_pixel": {0}, "new": set()}


def test_equal_values_are_both_best(save):
    paths = [save(f"{i}.json", f"model {i}", {"psnr": value}) for i, value in enumerate((21.0, 21.0, 20.0))]
    assert compare(paths).best("psnr") == {0, 1}


def test_text_marks_the_best_and_names_protocol_and_images(three):
    lines = compare(three).text().splitlines()
    assert lines[0] == f"50,000 images of imagenet val, protocol torch-fidelity {PROTOCOL.hash}"
    assert lines[2].split() == ["titok", "ibq", "|", "16k", "vqgan"]
    assert lines[4].split() == ["N", "50,000", "50,000", "50,000"]
    assert lines[5].split() == ["rFID", "↓", "1.710", "1.370", "★", "4.500"]
    assert lines[7].split() == ["PSNR,", "dB", "↑", "20.00", "22.00", "★", "–"]
    assert lines[8].split() == ["Rate,", "bpp", "↓", "0.0200", "★", "0.0500", "–"]
    assert lines[-1] == "vqgan, PSNR, SSIM not computed: no reason"
    assert lines[5].index("1.710") + 5 == lines[7].index("20.00") + 5 == lines[8].index("0.0200") + 6


def test_text_fits_a_terminal_whatever_the_names_and_their_number(save):
    names = [f"runs/a-very-long-name-of-a-folder-of-results/{i}" for i in range(14)]
    text = compare([save(f"{i}.json", name, {"psnr": 20.0 + i}) for i, name in enumerate(names)]).text()
    assert max(map(len, text.splitlines())) <= 120
    assert text.count("PSNR, dB ↑") == 2 and text.count("33.00 ★") == 1  # two blocks
    assert all(f"[{i}] {name}" in text for i, name in enumerate(names, 1))
    heads = " ".join(line for line in text.splitlines() if line.startswith(" ")).split()
    assert heads == [f"[{i}]" for i in range(1, 15)]
    assert all(text.count(f"{20 + i}.00") == 1 for i in range(14))


def test_metrics_can_be_chosen_and_come_in_that_order(three):
    comparison = compare(three, metrics=["psnr", "rfid"])
    assert comparison.metrics == ["psnr", "rfid"]
    assert comparison.csv().splitlines()[0].endswith(",partial,psnr,rfid")
    assert "ris" not in comparison.text() and "Rate" not in comparison.markdown()
    with pytest.raises(ValueError, match="no result has fid; they have rfid, ris_std, psnr"):
        compare(three, metrics=["fid", "psnr"])


def test_no_value_is_best_where_all_are_equal(save):
    paths = [save(f"{i}.json", f"model {i}", {"psnr": 21.0 + 1e-9 * i, "rfid": i}) for i in range(3)]
    assert compare(paths).best("psnr") == set() and compare(paths).best("rfid") == {0}


def test_weights_that_were_not_published_are_announced(save):
    other = replace(PROTOCOL, other_weights="alexnet:01234567")
    paths = [save(f"{i}.json", f"model {i}", {"psnr": 21.0 + i}, other) for i in range(2)]
    comparison = compare(paths)
    for table in (comparison.text(), comparison.markdown(), comparison.html()):
        assert "NOT by the published weights (alexnet:01234567)" in table


def test_markdown_is_a_table_with_bold_best_values(three):
    lines = compare(three).markdown().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 5 and len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert "ibq \\| 16k" in table[3] and "**1.370**" in table[3] and "**22.00**" in table[3]
    assert "**0.0200**" in table[2] and "**1.710**" not in table[2]


def test_csv_holds_all_digits(save):
    path = save("a.json", "with, comma", {"rfid": 1.2345678901234567, "psnr": 20.0}, partial="a subset")
    (row,) = csv.DictReader(io.StringIO(compare([path]).csv()))
    assert float(row["rfid"]) == 1.2345678901234567 and row["result"] == "with, comma"
    assert row["protocol"] == PROTOCOL.hash and row["evaluated"] == "50000" and row["partial"] == "a subset"


def test_page_marks_the_best_and_escapes(save):
    paths = [save("a.json", "<script>x", {"psnr": 21.0}), save("b.json", "other", {"psnr": 20.0})]
    page = compare(paths).html()
    assert page.count("<strong>") == 1 and "<strong>21.00</strong>" in page and PROTOCOL.hash in page
    assert "<script>x" not in page and "&lt;script&gt;x" in page and "http" not in page.split("</style>")[1]


def test_different_protocols_are_refused_with_fields_values_and_rows(three, save):
    other = save("d.json", "other", {"rfid": 1.0}, replace(PROTOCOL, rounding="half_up", num_images=1000))
    with pytest.raises(ProtocolMismatch) as error:
        compare([*three, other])
    message = str(error.value)
    assert "rounding: 'nearest' in titok, ibq | 16k, vqgan; 'half_up' in other" in message
    assert "num_images: 50000 in titok, ibq | 16k, vqgan; 1000 in other" in message and "crop" not in message


def test_forced_table_warns_names_every_protocol_and_marks_no_best(three, save):
    other = replace(PROTOCOL, rounding="half_up")
    comparison = compare([*three, save("d.json", "other", {"rfid": 0.1}, other)], force=True)
    for form in ("text", "markdown", "html"):
        table = getattr(comparison, form)()
        assert "NOT comparable" in table and "half_up" in table
        assert table.count(PROTOCOL.hash) == 3 and table.count(other.hash) == 1
        assert "★" not in table and "**0." not in table and "<strong>0." not in table
    assert not any(comparison.best(metric) for metric in comparison.metrics)


def test_force_changes_nothing_for_one_protocol(three):
    assert compare(three, force=True).text() == compare(three).text()


def test_partial_rows_are_marked_and_never_best(three, save):
    best = save("d.json", "half", {"rfid": 0.1, "psnr": 99.0}, partial="an interrupted run")
    comparison = compare([*three, best])
    assert comparison.best("rfid") == {1} and comparison.best("psnr") == {1}
    for table in (comparison.text(), comparison.markdown(), comparison.html()):
        assert "(partial)" in table and "half is partial: an interrupted run" in table


def test_rows_of_one_name_are_told_apart_by_their_files(save):
    paths = [save(f"{i}.json", "same", {"psnr": 20.0}) for i in range(2)]
    assert [row.label for row in compare(paths).rows] == [f"same ({path})" for path in paths]


def test_folders_stand_for_their_results(save, tmp_path):
    save("run/results.json", "titok", {"psnr": 20.0})
    assert compare([tmp_path / "run"]).rows[0].label == "titok"


def test_values_that_were_not_finite_are_missing(save):
    paths = [save("a.json", "a", {"psnr": float("nan")}), save("b.json", "b", {"psnr": 20.0})]
    comparison = compare(paths)
    assert comparison.best("psnr") == set() and "–" in comparison.text()


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        compare([])
    with pytest.raises(FileNotFoundError):
        compare([tmp_path / "missing.json"])
