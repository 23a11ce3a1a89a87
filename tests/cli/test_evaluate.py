"""``vistok evaluate`` on small tokenizers and images: results, refusals, interruptions, other people's files."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from vistok.cli.main import main
from vistok.data.images import read_image, save_png
from vistok.eval import evaluate as evaluation
from vistok.eval import suites
from vistok.eval.metric import MetricUnavailable
from vistok.eval.report.per_image import read_per_image
from vistok.eval.results import Results

_path = Path(__file__).parents[1] / "eval" / "fake_inception.py"
_spec = importlib.util.spec_from_file_location("vistok_test_fake_inception", _path)
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)


@pytest.fixture(autouse=True)
def no_weights(monkeypatch, tmp_path):
    """An empty torch hub cache and an empty cache of our own."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setenv("VISTOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def images(tmp_path):
    """Seven images of 32x32 pixels."""
    for number in range(7):
        draws = torch.Generator().manual_seed(number)
        coarse = torch.randint(0, 256, (1, 3, 4, 4), generator=draws).float()
        smooth = torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear").clamp(0, 255).byte()[0]
        save_png(smooth, tmp_path / "images" / f"{number}.png")
    return tmp_path / "images"


def evaluate(tokenizers, images, out, *options, name="titok"):
    return main(["evaluate", str(tokenizers / name), "--data", str(images), "--out", str(out), *options, *QUIET])


QUIET = ("--num-workers", "0", "--device", "cpu")


def failure(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_the_quick_suite_writes_results_table_and_report(tokenizers, images, tmp_path, capsys):
    assert evaluate(tokenizers, images, tmp_path / "out", "--batch-size", "3") == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["per_image.parquet", "report.html", "results.json"]
    results = Results.load(out / "results.json")
    assert (results.evaluated, results.expected, results.partial) == (7, 7, "")
    assert results.main.bits_per_pixel == 6 * 8 / 32**2
    _, keys, columns = read_per_image(out / "per_image.parquet")
    assert keys == [f"{number}.png" for number in range(7)]
    assert results.main.metrics["psnr"] == pytest.approx(columns["psnr"].astype("f8").mean(), abs=1e-9)
    printed = capsys.readouterr().out
    assert f"protocol torch-fidelity {results.protocol.hash}" in printed and "psnr" in printed
    assert "skipped rfid: no weights: fetch https://" in printed
    rate = next(line.split() for line in printed.splitlines() if line.split()[:1] == ["bits_per_pixel"])
    assert rate == ["bits_per_pixel", "↓", "0.0469", "bpp"]
    page = (out / "report.html").read_text()
    assert results.protocol.hash in page and "titok" in page


def test_numbers_are_those_of_encoding_and_decoding_by_hand(tokenizers, images, tmp_path):
    import vistok

    evaluate(tokenizers, images, tmp_path / "out")
    tokenizer = vistok.load(tokenizers / "titok")
    pixels = torch.stack([read_image(images / f"{number}.png") for number in range(7)])
    tokens = tokenizer.encode(pixels / 255)
    decoded = (tokenizer.decode(tokens) * 255).round()
    psnr = 10 * torch.log10(255**2 / (decoded.double() - pixels.double()).square().mean((1, 2, 3)))
    main_result = Results.load(tmp_path / "out" / "results.json").main
    assert main_result.metrics["psnr"] == pytest.approx(psnr.mean().item(), abs=1e-4)
    assert main_result.metrics["usage"] == len(tokens.flatten().unique()) / 256


@pytest.fixture
def inception(monkeypatch):
    """A linear map in place of Inception, everywhere in the suites."""
    network = fake.FakeInception(size=32)
    monkeypatch.setattr(suites, "Inception", lambda *args, **kwargs: network)
    monkeypatch.setattr(suites.Weights, "find", _only_inception)
    return network


def _only_inception(weights, name):
    if name == "inception":
        return Path(__file__)
    raise MetricUnavailable("no weights here")


def test_the_full_suite_measures_everything_there_is(tokenizers, images, tmp_path, inception, monkeypatch):
    monkeypatch.setattr(suites, "QUALITIES", {"jpeg": (10, 50), "webp": (10,), "avif": ()})
    monkeypatch.setattr(suites, "CODEC_SCALES", (1.0, 0.5))
    monkeypatch.setattr("vistok.eval.sections._MODEL_STEPS", 10)
    monkeypatch.setattr("vistok.eval.sections.tokbench", lambda *args, **kwargs: {"text": {"rows": {}}})
    assert evaluate(tokenizers, images, tmp_path / "out", "--suite", "full") == 0
    results = Results.load(tmp_path / "out" / "results.json")
    kinds = [variant.kind for variant in results.variants]
    assert kinds[0] == "reconstruction" and kinds.count("codec") == 6 and kinds.count("perturbed") == 15
    assert all("rfid" in variant.metrics for variant in results.variants)
    assert {"psnr", "ssim", "rfid", "rsfid", "ris", "precision", "recall", "usage"} <= results.main.metrics.keys()
    assert {"ms_ssim", "kid", "lpips_alex", "dists", "dino_similarity", "clip_similarity"} <= results.skipped.keys()
    assert results.sections["pfid"]["label"].startswith("pFID-like")
    families = {curve["family"] for curve in results.sections["rate_distortion"]["curves"]}
    assert {"tokenizer", "jpeg", "jpeg/scale=0.5", "webp"} <= families
    assert "tokbench" in results.sections
    assert "token_model" in results.sections or "token_model" in results.skipped


def test_statistics_of_the_originals_are_kept_for_the_next_evaluation(tokenizers, images, tmp_path, inception):
    assert evaluate(tokenizers, images, tmp_path / "first", "--suite", "standard") == 0
    calls = inception.calls
    assert evaluate(tokenizers, images, tmp_path / "second", "--suite", "standard") == 0
    assert inception.calls - calls < calls
    first, second = (Results.load(tmp_path / name / "results.json") for name in ("first", "second"))
    assert first.main.metrics == second.main.metrics and first.protocol == second.protocol


def test_a_part_begun_with_kept_statistics_cannot_go_on_without_them(tokenizers, images, tmp_path, inception, capsys):
    from vistok.eval.variants import TokenizerVariant

    evaluate(tokenizers, images, tmp_path / "first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenizerVariant, "reconstruct", interrupt_after(1, TokenizerVariant.reconstruct))
        assert evaluate(tokenizers, images, tmp_path / "second", "--batch-size", "4") == 130
    shutil.rmtree(tmp_path / "cache")
    assert evaluate(tokenizers, images, tmp_path / "second", "--resume") == 2
    assert "originals that are no longer kept" in failure(capsys)


def interrupt_after(batches, function):
    """The function, with a Ctrl-C when it is called once more."""
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) > batches:
            os.kill(os.getpid(), signal.SIGINT)
        return function(*arguments)

    return interrupted


def test_kept_statistics_of_other_pixels_are_refused(tokenizers, images, tmp_path, inception, monkeypatch, capsys):
    monkeypatch.setattr("vistok.eval.evaluate.manifest", lambda source: "the same")
    evaluate(tokenizers, images, tmp_path / "first")
    save_png(torch.zeros(3, 32, 32, dtype=torch.uint8), images / "3.png")
    assert evaluate(tokenizers, images, tmp_path / "second") == 2
    assert "the originals are not those whose statistics are kept in" in failure(capsys)


def test_a_changed_file_changes_the_manifest(images):
    from vistok.data.folder import ImageFolder

    before = evaluation.manifest(ImageFolder(str(images)))
    os.utime(images / "3.png", ns=(1, 1))
    assert evaluation.manifest(ImageFolder(str(images))) != before


def test_a_damaged_image_is_named_and_the_result_is_partial(tokenizers, images, tmp_path, capsys):
    (images / "4.png").write_bytes(b"not an image")
    assert evaluate(tokenizers, images, tmp_path / "out") == 1
    results = Results.load(tmp_path / "out" / "results.json")
    assert results.partial == "1 of 7 images could not be read" and results.evaluated == 6
    assert "4.png: not an image" in results.unreadable[0]
    output = capsys.readouterr()
    assert "PARTIAL: 1 of 7" in output.out and "skipped" in output.err and "4.png" in output.err
    assert "4.png" in (tmp_path / "out" / "report.html").read_text()


def test_a_folder_without_a_readable_image_gives_no_result(tokenizers, images, tmp_path, capsys):
    for path in images.iterdir():
        path.write_bytes(b"not an image")
    assert evaluate(tokenizers, images, tmp_path / "out") == 2
    assert "none of the 7 images could be read" in failure(capsys)
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_subset_is_marked_and_more_images_than_there_are_are_refused(tokenizers, images, tmp_path, capsys):
    assert evaluate(tokenizers, images, tmp_path / "out", "--num-images", "3") == 0
    assert Results.load(tmp_path / "out" / "results.json").partial == "a subset: 3 of 7 images"
    assert evaluate(tokenizers, images, tmp_path / "more", "--num-images", "50000") == 2
    assert "num_images must lie between 1 and 7, the size of the dataset; got 50000" in failure(capsys)


def test_results_are_not_overwritten_unless_asked(tokenizers, images, tmp_path, capsys):
    evaluate(tokenizers, images, tmp_path / "out", "--num-images", "3")
    assert evaluate(tokenizers, images, tmp_path / "out") == 2
    assert "results.json exists (and 2 more files); choose another --out, or give --overwrite" in failure(capsys)
    assert evaluate(tokenizers, images, tmp_path / "out", "--overwrite") == 0
    assert Results.load(tmp_path / "out" / "results.json").evaluated == 7


def test_an_interrupted_evaluation_keeps_what_it_has_and_goes_on(tokenizers, images, tmp_path, capsys, monkeypatch):
    from vistok.eval.variants import TokenizerVariant

    decode, batches = TokenizerVariant.reconstruct, []

    def interrupted(variant, originals):
        batches.append(originals.keys)
        if len(batches) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return decode(variant, originals)

    monkeypatch.setattr(TokenizerVariant, "reconstruct", interrupted)
    out = tmp_path / "out"
    assert evaluate(tokenizers, images, out, "--batch-size", "2") == 130
    assert "continue with --resume" in failure(capsys)
    assert not (out / "results.json").exists()
    assert evaluate(tokenizers, images, out, "--batch-size", "2") == 2
    assert "continue it with --resume" in failure(capsys)
    assert evaluate(tokenizers, images, out, "--suite", "standard", "--resume") == 2
    assert "was begun with other settings (suite:" in failure(capsys)
    assert evaluate(tokenizers, images, out, "--resume", name="other") == 2
    assert "was begun with other settings" in failure(capsys)
    del batches[:]
    assert evaluate(tokenizers, images, out, "--resume") == 0
    assert batches == [["6.png"]]  # the batch in which the signal came was finished
    assert evaluate(tokenizers, images, tmp_path / "whole") == 0
    resumed, whole = (Results.load(path / "results.json") for path in (out, tmp_path / "whole"))
    assert resumed.main == whole.main and resumed.protocol == whole.protocol
    assert not (out / "unfinished").exists()


def test_a_run_that_was_killed_while_it_wrote_goes_on(tokenizers, images, tmp_path, capsys):
    def killed(*arguments):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Results, "save", killed)  # after the table and the report
        assert evaluate(tokenizers, images, tmp_path / "out") == 130
    assert (tmp_path / "out" / "report.html").exists() and not (tmp_path / "out" / "results.json").exists()
    assert evaluate(tokenizers, images, tmp_path / "out", "--resume") == 0
    assert Results.load(tmp_path / "out" / "results.json").evaluated == 7
    assert evaluate(tokenizers, images, tmp_path / "out", "--resume") == 2
    assert "results.json exists" in failure(capsys)


def test_mistakes_do_not_cost_earlier_results(tokenizers, images, tmp_path, capsys):
    assert evaluate(tokenizers, images, tmp_path / "out") == 0
    before = (tmp_path / "out" / "results.json").read_bytes()
    for mistake in (["--data", "nowhere"], ["--size", "48"], ["--num-images", "50000"]):
        assert evaluate(tokenizers, images, tmp_path / "out", "--overwrite", *mistake) == 2
        assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_an_evaluation_at_work_is_not_overwritten(tokenizers, images, tmp_path, capsys):
    held = tmp_path / "out" / "unfinished"
    held.mkdir(parents=True)
    (held / "part").write_text("kept")
    code = "import fcntl, sys; f = open(sys.argv[1], 'wb'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True)"
    code += "; input()"
    other = subprocess.Popen([sys.executable, "-c", code, str(held / "lock")], stdin=-1, stdout=-1, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        assert evaluate(tokenizers, images, tmp_path / "out", "--overwrite") == 2
        assert "another evaluation is at work in" in failure(capsys) and (held / "part").exists()
    finally:
        other.communicate("\n")


def test_many_unreadable_images_are_named_shortly(tokenizers, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vistok.cli.evaluate._NAMED", 2)
    for number in range(5):
        (images / f"{number}.png").write_bytes(b"not an image")
    assert evaluate(tokenizers, images, tmp_path / "out") == 1
    named = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vistok: skipped")]
    assert len(named) == 3 and named[-1] == "vistok: skipped 3 more"
    assert len(Results.load(tmp_path / "out" / "results.json").unreadable) == 5


def test_lengths_are_for_tokenizers_of_variable_length(tokenizers, images, tmp_path, capsys):
    assert evaluate(tokenizers, images, tmp_path / "out", "--num-tokens", "1,2") == 2
    assert "--num-tokens is for tokenizers that are trained on prefixes" in failure(capsys)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--data", "nowhere"], "--data: the image folder 'nowhere' does not exist"),
        (["--data", "nowhere-{0..1}.tar"], "--data: 2 of 2 do not exist: nowhere-0.tar"),
        (["--probe-data", "nowhere"], "--probe-data: the image folder 'nowhere' does not exist"),
        (["--reference", "nowhere.npz"], "--reference: there is no file 'nowhere.npz'"),
        (["--seed", "-1"], "--seed must be at least 0; got -1"),
        (["--num-images", "0"], "--num-images must be at least 1; got 0"),
        (["--num-images", "all"], "--num-images: expected int. Got value: all"),
        (["--raw-weights"], "--raw-weights is for training checkpoints"),
        (["a-001.tar", "a-002.tar"], "unrecognized arguments: a-001.tar a-002.tar; put quotes around a pattern"),
        (["--weights", "nowhere"], "--weights: there is no folder 'nowhere'"),
        (["--protocol", "fid"], "expected one of 'torch-fidelity'"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--size", "48"], "takes images of 32x32 pixels"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
    ],
)
def test_mistakes_are_one_clear_line(tokenizers, images, tmp_path, capsys, options, complaint):
    assert evaluate(tokenizers, images, tmp_path / "out", *options) == 2
    assert complaint in failure(capsys)


def test_an_unknown_device_is_refused_without_torchs_list(tokenizers, images, tmp_path, capsys):
    words = ["evaluate", str(tokenizers / "titok"), "--data", str(images), "--out", str(tmp_path / "out")]
    assert main([*words, "--device", "gpu"]) == 2
    assert failure(capsys).endswith(
        "--device 'gpu' cannot be used here: there is no such kind of device; try auto or cpu"
    )


def test_weights_of_another_hash_are_refused(tokenizers, images, tmp_path, capsys):
    name = "weights-inception-2015-12-05-6726825d.pth"
    (tmp_path / name).write_bytes(b"something else")
    assert evaluate(tokenizers, images, tmp_path / "out", "--weights", str(tmp_path)) == 2
    assert f"{name} is not the published" in failure(capsys)


def test_other_peoples_reconstructions_score_as_our_own(tokenizers, images, tmp_path):
    evaluate(tokenizers, images, tmp_path / "own")
    assert main(["decode", str(_tokens(tokenizers, images, tmp_path)), "--tokenizer", str(tokenizers / "titok"),
                 "--out", str(tmp_path / "rec")]) == 0  # fmt: skip
    options = ["--rec", str(tmp_path / "rec"), "--ref", str(images), "--out", str(tmp_path / "out"), *QUIET]
    assert main(["evaluate", "images", *options]) == 0
    own, given = (Results.load(tmp_path / name / "results.json") for name in ("own", "out"))
    assert given.main.metrics["psnr"] == own.main.metrics["psnr"]
    assert given.main.metrics["ssim"] == own.main.metrics["ssim"]
    assert given.protocol.rounding == "given" and given.protocol.dataset == own.protocol.dataset
    assert given.subject["name"] == "rec"


def _tokens(tokenizers, images, tmp_path):
    path = tmp_path / "tokens.safetensors"
    assert main(["encode", str(images), "--tokenizer", str(tokenizers / "titok"), "--out", str(path)]) == 0
    return path


def test_reconstructions_that_do_not_fit_are_refused(images, tmp_path, capsys):
    rec = tmp_path / "rec"
    for number in range(6):
        save_png(torch.zeros(3, 16, 16, dtype=torch.uint8), rec / f"{number}.png")
    common = ["evaluate", "images", "--rec", str(rec), "--ref", str(images), "--out", str(tmp_path / "out"), *QUIET]
    assert main(common) == 2
    assert "6 reconstructions and 7 references do not pair up: 6: no reconstruction" in failure(capsys)
    assert main([*common, "--allow-missing"]) == 2
    assert "0.png: the reconstruction has 16x16 pixels, the reference 32x32" in failure(capsys)
    assert main([*common, "--allow-missing", "--size", "16"]) == 2
    assert "--crop and --size go together" in failure(capsys)
    assert main([*common, "--allow-missing", "--size", "16", "--crop", "adm"]) == 1
    results = Results.load(tmp_path / "out" / "results.json")
    assert results.partial == "1 image without a partner" and "6: no reconstruction" in results.unreadable[0]


def test_results_of_one_protocol_compare_and_others_do_not(tokenizers, images, tmp_path, capsys):
    for name in ("titok", "other"):
        evaluate(tokenizers, images, tmp_path / name, name=name)
    evaluate(tokenizers, images, tmp_path / "adm", "--protocol", "adm")
    capsys.readouterr()
    folders = [str(tmp_path / name) for name in ("titok", "other", "adm")]
    assert main(["evaluate", "compare", *folders[:2]]) == 0
    assert "PSNR" in capsys.readouterr().out
    assert main(["evaluate", "compare", *folders]) == 2
    complaint = failure(capsys)
    assert "rounding" in complaint and "half_up" in complaint
    assert main(["evaluate", "compare", *folders, "--force", "--format", "csv", "--out", str(tmp_path / "t.csv")]) == 0
    assert (tmp_path / "t.csv").read_text().count("\n") >= 4
    assert main(["evaluate", "compare", *folders[:2], "--metrics", "psnr, ssim", "--format", "csv"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(",partial,psnr,ssim")
    assert main(["evaluate", "compare", *folders[:2], "--metrics", "fid"]) == 2
    assert "no result has fid; they have psnr, " in failure(capsys)
    assert main(["evaluate", "compare", *folders, str(tmp_path / "nowhere")]) == 2
    assert f"no results at {tmp_path / 'nowhere'}; " in failure(capsys)
    (tmp_path / "adm" / "results.json").write_text('{"format"')
    assert main(["evaluate", "compare", *folders]) == 2
    assert "is not a result of vistok evaluate" in failure(capsys)


def test_the_command_line_knows_its_subcommands(capsys):
    for name in ("images", "compare", "tokbench"):
        assert main(["evaluate", name, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: vistok evaluate {name}")
    assert main(["evaluate", "imges", "--rec", "a", "--ref", "b", "--out", "c"]) == 2
    assert "neither a file nor a command 'imges'; did you mean 'images'?" in failure(capsys)


@pytest.mark.slow
def test_processes_started_by_torchrun_share_the_images(tokenizers, images, tmp_path):
    evaluate(tokenizers, images, tmp_path / "one")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = tmp_path / "script.py"
    script.write_text("import sys\nfrom vistok.cli.main import main\nsys.exit(main(sys.argv[1:]))\n")
    arguments = ["evaluate", str(tokenizers / "titok"), "--data", str(images), "--out", str(tmp_path / "two"), *QUIET]
    subprocess.run([*launcher, str(script), *arguments], check=True, timeout=200, env={**os.environ})
    one, two = (Results.load(tmp_path / name / "results.json") for name in ("one", "two"))
    assert one.main == two.main and one.protocol == two.protocol
    assert json.loads((tmp_path / "two" / "results.json").read_text())["evaluated"] == 7
    assert Image.open(images / "0.png").size == (32, 32)
