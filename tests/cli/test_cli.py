"""The command line: what it accepts, what it refuses in one line, and what it leaves behind."""

from __future__ import annotations

import errno
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from PIL import Image
from small_graph import SmallGraph, sample

from ptq_onnx.cli import app as cli
from ptq_onnx.cli import console
from ptq_onnx.cli import options as cli_options
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import PtqError
from ptq_onnx.pipeline import quantize as pipeline
from ptq_onnx.version import __version__

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "digits_vit.onnx"
DIGITS = ROOT / "img" / "digits"
QUICK = ("--images", "8", "--no-report", "--threads", "1")


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Command:
    """Runs ``ptq-onnx`` in this process, in an empty folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["ptq-onnx", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        text = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return Outcome(stop.value.code, text.out, text.err)

    return run


def assert_refused(outcome: Outcome, *words: str) -> None:
    """Exit code 2, one line that says ``words``, and nothing in the current folder."""
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    for word in words:
        assert word in outcome.err
    assert os.listdir() == []


# Help


def defaults() -> dict[str, str]:
    """What the help says after 'default:', by option."""
    values = {f.name: getattr(QuantizeConfig(), f.name) for f in fields(QuantizeConfig)}
    switches = {True: "on", False: "off"}
    return {
        name: switches[value] if isinstance(value, bool) else str(value)
        for name, value in values.items()
        if value not in (None, ())
    }


def help_sections(outcome: Outcome) -> dict[str, dict[str, str]]:
    """Help of every option by its field's name, whitespace made even, below its heading."""
    found: dict[str, dict[str, str]] = {}
    title = name = ""
    for line in outcome.out.splitlines():
        if re.fullmatch(r"[A-Z]\w+:", line):
            title, name = line[:-1], ""
            found[title] = {}
        elif title and re.match(r"  \S", line):
            option = re.search(r"--([a-z0-9-]+)", line)
            name = line.split()[0] if option is None else option[1].replace("-", "_")
            found[title][name] = ""
        if name:
            found[title][name] += " " + line.strip()
    return {t: {k: " ".join(v.split()) for k, v in s.items()} for t, s in found.items()}


def help_texts(outcome: Outcome) -> dict[str, str]:
    """The same without the headings and the arguments."""
    sections = help_sections(outcome)
    return {k: v for title, s in sections.items() if title != "Arguments" for k, v in s.items()}


def test_help_names_every_option_and_its_default(command: Command) -> None:
    texts = help_texts(command("quantize", "--help"))
    assert {f.name for f in fields(QuantizeConfig)} <= set(texts)
    assert set(cli_options.PATHS) <= set(texts)
    for name, text in texts.items():
        assert name == "help" or len(re.findall(r"\[(?:default: |required)", text)) == 1, name
    for name, default in defaults().items():
        assert f"[default: {default}]" in texts[name]


def test_help_in_groups(command: Command) -> None:
    sections = help_sections(command("quantize", "-h"))
    assert list(sections) == [
        "Arguments", "Input", "Numbers", "Target", "Analysis", "Output", "Running", "Other",
    ]  # fmt: skip
    assert set(sections["Other"]) == {"help"}  # an option without a group: see cli_help.GROUPS
    assert sections["Arguments"] == {"MODEL.onnx": "MODEL.onnx The ONNX file. [required]"}
    assert sections["Output"]["output"].startswith("-o, --output PATH ")
    for name, group in (("calib", "Input"), ("bits", "Numbers"), ("opset", "Target")):
        assert name in sections[group]


COMMANDS = {
    "quantize": "MODEL.onnx",
    "analyse": "MODEL.onnx",
    "compare": "A B…",
    "evaluate": "MODEL.onnx",
    "export": "NAME",
    "check": "MODEL.onnx",
    "benchmark": "FP32.onnx Q.onnx …",
    "calibration-curve": "MODEL.onnx",
    "inspect": "MODEL.onnx",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(
    command: Command, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    outcome = command(name, "-h")
    assert outcome == command(name, "--help")
    assert outcome.out.splitlines()[0] == f"Usage: ptq-onnx {name} [OPTIONS] {COMMANDS[name]}"
    assert max(map(len, outcome.out.splitlines())) <= 80
    assert "{" not in outcome.out
    for option, text in help_texts(outcome).items():
        said = len(re.findall(r"\[(?:default: .+|required.*)\]", text))
        assert said == (option != "help"), text
    assert re.findall(r"^Other:\n((?: .*\n?)+)", outcome.out, re.M)[0].lstrip().startswith("-h")
    needed = {"compare", "evaluate", "calibration-curve"}
    texts = help_texts(outcome)
    assert ("[required]" in texts.get("val", "")) == (name in needed)


def test_options_are_the_fields_of_the_config() -> None:
    names = set(inspect.signature(cli.quantize).parameters)
    options = {f.name for f in fields(QuantizeConfig)}
    assert names == options | set(cli_options.PATHS) | {"model", "config"}
    assert all(
        parameter.default is None
        for name, parameter in inspect.signature(cli.quantize).parameters.items()
        if name != "model"
    )


def test_help_does_not_import_what_is_heavy() -> None:
    code = (
        "import sys; from ptq_onnx.cli import app as cli\n"
        "sys.argv = ['ptq-onnx', 'quantize', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "print(sorted({'torch', 'ppq', 'onnx', 'onnxruntime', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("words", [("inspect", MODEL), ("quantize", MODEL, "--calib", DIGITS)])
def test_without_onnxruntime(words: tuple[object, ...], tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        f"sys.argv = ['ptq-onnx', *{[str(word) for word in words]!r}]\n"
        "from ptq_onnx.cli import app as cli; cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ONNX Runtime cannot be imported (")
    assert "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install" in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_onnxruntime_in_python(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "import ptq_onnx\n"
        "try: ptq_onnx.quantize\n"
        "except ptq_onnx.PtqError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.startswith("ONNX Runtime cannot be imported (")


def test_without_words_and_version(command: Command) -> None:
    assert "quantize" in command().out
    outcome = command("--version")
    assert outcome.code == 0
    assert outcome.out.strip() == __import__("ptq_onnx").__version__


def test_words_that_are_no_command(command: Command) -> None:
    assert_refused(command("quantise"), "Did you mean 'quantize'? See ptq-onnx --help.")
    assert_refused(command("vit.onnx"), "The command comes first: ptq-onnx quantize vit.onnx.")
    assert_refused(command("evaluate", MODEL, "val"), "takes only MODEL.onnx, so 'val'")


# Options


@pytest.fixture
def given_options(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What reaches the pipeline; the pipeline itself is not run."""
    seen: dict[str, Any] = {}

    def quantize(model: Path, **options: Any) -> None:
        seen.update(options, model=model)
        raise PtqError("seen")

    monkeypatch.setattr(pipeline, "quantize", quantize)
    return seen


def test_every_option_reaches_the_config(command: Command, given_options: dict[str, Any]) -> None:
    words = (
        "--calib a --val b --labels c --output d --scales e --quantizer fqvit --bits 6/7/4"
        " --method omse --images 9 --batch 3 --mean 0.1,0.2,0.3 --std 1,2,3 --size 24x32"
        " --preprocess inception --crop-pct 0.9 --interpolation bilinear --keep-float fc1"
        " --keep-float fc2@1-2 --more-bits qkv --auto --min-sqnr 25.5"
        " --per-channel auto --per-channel norm1 --ptf-k 5 --no-lis"
        " --arithmetic integer --multiplier-bits 16 --target onnxruntime --opset 22"
        " --no-report --no-pictures --analysis-images 4 --threads 1 --no-check-preprocess"
    )
    command("quantize", MODEL, *words.split())
    config = given_options.pop("config")
    assert config == QuantizeConfig(
        quantizer="fqvit",
        bits="6/7/4",
        method="omse",
        images=9,
        batch=3,
        mean=(0.1, 0.2, 0.3),
        std=(1, 2, 3),
        size=(24, 32),
        preprocess="inception",
        crop_pct=0.9,
        interpolation="bilinear",
        check_preprocess=False,
        keep_float=("fc1", "fc2@1-2"),
        more_bits=("qkv",),
        auto=True,
        min_sqnr=25.5,
        per_channel=("auto", "norm1"),
        ptf_k=5,
        lis=False,
        arithmetic="integer",
        multiplier_bits=16,
        opset=22,
        report=False,
        pictures=False,
        analysis_images=4,
        threads=1,
    )
    assert given_options == {
        "model": MODEL,
        "calib": "a",
        "val": "b",
        "labels": "c",
        "output": "d",
        "scales": "e",
        "progress": None,
    }


def test_command_line_beats_config_file(command: Command, given_options: dict[str, Any]) -> None:
    Path("c.yaml").write_text(
        "quantizer: channelwise\nimages: 5\nkeep_float: [fc1, fc2]\nper_channel: auto\n"
        "size: 24\nmean: 0.1,0.2,0.3\nreport: false\ncalib: pictures\noutput: there\n"
    )
    command("quantize", MODEL, "--config", "c.yaml", "--images", 7, "--report", "--output", "x")
    config = given_options["config"]
    assert (config.quantizer, config.images, config.report) == ("channelwise", 7, True)
    assert (config.keep_float, config.per_channel) == (("fc1", "fc2"), ("auto",))
    assert (config.size, config.mean) == ((24, 24), (0.1, 0.2, 0.3))
    assert (given_options["calib"], given_options["output"]) == ("pictures", "x")


def test_defaults_are_those_of_the_config(command: Command, given_options: dict[str, Any]) -> None:
    command("quantize", MODEL)
    assert given_options == {"model": MODEL, "config": QuantizeConfig(), "progress": None}


# Bad input


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--bits", "0/8/8"), "from 2 to 8, got 0"),
        (("--bits", "99/8/8"), "from 2 to 8, got 99"),
        (("--bits", "0/99/x"), "0/99/x"),
        (("--bits", "x"), "as in 8/8/4"),
        (("--quantizer", "nix"), "vanilla, channelwise, fqvit"),
        (("--method", "nix"), "percentile"),
        (("--target", "nix"), "onnxruntime"),
        (("--images", "0"), "at least 1"),
        (("--images", "many"), "--images"),
        (("--size", "1x2x3"), "224x192"),
        (("--size", "0"), "224x192"),
        (("--mean", "a,b"), "expected numbers"),
        (("--mean", "0.5,0.5"), "mean"),
        (("--std", "0,1,1"), "std"),
        (("--crop-pct", "2"), "--crop-pct"),
        (("--interpolation", "nix"), "bicubic"),
        (("--preprocess", "nix"), "inception"),
        (("--keep-float", "fc2@x"), "fc2@x"),
        (("--ptf-k", "99"), "0 to 12"),
        (("--quantizer", "vanilla", "--no-lis"), "fqvit"),
        (("--opset", "9"), "21 to 23"),
        (("--multiplier-bits", "32"), "from 4 to 31"),
        (("--max-drop", "1"), "add --auto"),
        (("--auto", "--max-drop", "-1"), "from 0 to 100"),
        (("--auto", "--max-drop", "1"), "--val DIR and --labels FILE"),
        (("--auto", "--scales", "x.json"), "--scales x.json: --auto decides"),
        (("--auto", "--target", "integer"), "--auto would leave"),
        (("--more-bits", "nix", *QUICK), "has no role 'nix'"),
        (("--target", "integer", "--quantizer", "deploy"), "use --quantizer fqvit"),
        (("--config", "nix.yaml"), "nix.yaml"),
        (("--scales", "nix.json", *QUICK), "nix.json"),
        (("--calib", "nix"), "'nix' does not exist"),
        (("--val", "nix"), "'nix' does not exist"),
        (("--labels", "nix"), "--val"),
        (("--nix",), "--nix"),
        (("--output", MODEL), "is the model itself"),
        (("-o", MODEL.with_name("train_digits.py")), "is a file; name a folder, or a file that"),
        (("images",), "takes only MODEL.onnx, so 'images' is one too many"),
        (("--quantiser", "fqvit"), "See ptq-onnx quantize --help"),
    ],
)
def test_bad_options(command: Command, words: tuple[str, ...], said: str) -> None:
    assert_refused(command("quantize", MODEL, *words), said)


def test_unknown_key_in_the_config_file(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("quantiser: fqvit\n")
    assert_refused(command("quantize", MODEL, "--config", path), "quantiser", str(path))


def broken_models(folder: Path) -> dict[str, tuple[Path, str]]:
    """Path and a word of the message, by what is wrong."""
    digits = onnx.load(MODEL)
    whole = MODEL.read_bytes()
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    (folder / "text.onnx").write_text("This is no model.\n")
    onnx.save(
        onnx.load(MODEL), folder / "ext.onnx", save_as_external_data=True, location="gone.bin"
    )
    (folder / "gone.bin").unlink()

    onnx.save(
        onnx.load(MODEL), folder / "outside.onnx", save_as_external_data=True, location="w.bin"
    )
    outside = onnx.load(folder / "outside.onnx", load_external_data=False)
    for tensor in outside.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../w.bin"
    (folder / "w.bin").rename(folder.parent / "w.bin")
    (folder / "outside.onnx").write_bytes(outside.SerializeToString())

    name = max(digits.graph.initializer, key=lambda t: len(t.raw_data)).name
    for tensor in digits.graph.initializer:
        if tensor.name == name:
            values = numpy_helper.to_array(tensor).copy()
            values.flat[7] = np.nan
            tensor.CopyFrom(numpy_helper.from_array(values, name))
    onnx.save(digits, folder / "nan.onnx")

    two = onnx.load(MODEL)
    second = two.graph.input.add()
    second.CopyFrom(two.graph.input[0])
    second.name = "other"
    two.graph.node.add(op_type="ReduceMean", name="m", input=["other"], output=["mean"])
    two.graph.node[-1].attribute.append(onnx.helper.make_attribute("keepdims", 0))
    extra = two.graph.output.add()
    extra.CopyFrom(onnx.helper.make_tensor_value_info("mean", 1, ()))
    onnx.save(two, folder / "two.onnx")
    return {
        "missing": (folder / "missing.onnx", "missing.onnx"),
        "folder": (folder, str(folder)),
        "empty": (folder / "empty.onnx", "empty.onnx"),
        "cut": (folder / "cut.onnx", "cut.onnx"),
        "text": (folder / "text.onnx", "text.onnx"),
        "ext": (folder / "ext.onnx", "gone.bin"),
        "outside": (folder / "outside.onnx", "w.bin"),
        "nan": (folder / "nan.onnx", name),
        "two": (folder / "two.onnx", "other"),
    }


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("outer") / "inner"
    folder.mkdir()
    return broken_models(folder)


@pytest.mark.parametrize(
    "what", ["missing", "folder", "empty", "cut", "text", "ext", "outside", "nan", "two"]
)
@pytest.mark.parametrize("verb", ["quantize", "evaluate"])
def test_bad_models(
    command: Command, broken: dict[str, tuple[Path, str]], what: str, verb: str
) -> None:
    path, said = broken[what]
    measured = ("--val", DIGITS / "val", "--labels", DIGITS / "val.txt")
    words = measured if verb == "evaluate" else ("--calib", DIGITS / "calib")
    assert_refused(command(verb, path, *words), said)


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "deit_tiny_patch16_224.onnx"])
def test_missing_model_of_timm(command: Command, name: str) -> None:
    said = f"ptq-onnx export {name.removesuffix('.onnx')}"
    assert_refused(command("quantize", name), said)


def convolution(path: Path) -> Path:
    """A classifier without attention, [batch, 3, 8, 8] → [batch, 5]."""
    g = SmallGraph(("batch", 3, 8, 8))
    g.output_shape = ("batch", 5)
    hidden = g("Relu", g("Conv", "x", sample(4, 3, 3, 3), sample(4)))
    pooled = g("Flatten", g("GlobalAveragePool", hidden))
    return g.save(path, g("Gemm", pooled, sample(4, 5), sample(5)))


def test_model_without_a_block(command: Command, tmp_path: Path) -> None:
    path = convolution(tmp_path / "conv.onnx")
    given = ("quantize", path, "--calib", DIGITS / "calib")
    assert_refused(command(*given), "no transformer block", "vanilla")
    outcome = command(*given, "--quantizer", "vanilla", *QUICK)
    assert (outcome.code, outcome.err) == (0, "")
    assert Path("output/quantized.onnx").is_file()


def test_activations_that_are_not_finite(command: Command, tmp_path: Path) -> None:
    g = SmallGraph(("batch", 3, 8, 8))
    g.output_shape = ("batch", 4)
    flat = g("Flatten", g("Log", g("Sub", g("GlobalAveragePool", "x"), 10.0)))
    path = g.save(tmp_path / "log.onnx", g("Gemm", flat, sample(3, 4), sample(4)))
    words = ("--calib", DIGITS / "calib", "--quantizer", "vanilla", *QUICK)
    assert_refused(command("quantize", path, *words), "NaN", flat)


def pictures(folder: Path, good: int, bad: int) -> Path:
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(good):
        pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"good_{index}.png")
    for index in range(bad):
        (folder / f"bad_{index}.png").write_bytes(b"no picture")
    return folder


def test_empty_image_folder(command: Command, tmp_path: Path) -> None:
    assert_refused(
        command("quantize", MODEL, "--calib", pictures(tmp_path / "p", 0, 0)), "no images"
    )


def test_no_image_can_be_read(command: Command, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", 0, 3)
    assert_refused(command("quantize", MODEL, "--calib", folder), "None of the 3 images")


def test_unreadable_images_are_counted(command: Command, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", 4, 2)
    outcome = command("quantize", MODEL, "--calib", folder, *QUICK)
    assert (outcome.code, outcome.err) == (0, "")
    assert "2 calibration images could not be read" in outcome.out
    outcome = command("evaluate", MODEL, "--val", folder, "--reference", MODEL, "--json")
    found = json.loads(outcome.out)
    assert (found["count"], found["skipped"], found["agreement"]) == (4, 2, 100)
    assert (found["top1"], found["sqnr_db"]) == (None, 200)  # no labels; no noise: as of the output
    assert found["outputs"][0]["sqnr_db"] == 200


@pytest.mark.parametrize("verb", ["quantize", "evaluate"])
@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("digit_9999.png 1\n", "no line for"),
        ("digit_0021.png one\n", "line 1"),
        ("", "no 'name label' lines"),
    ],
)
def test_labels_that_do_not_match(
    command: Command, tmp_path: Path, lines: str, said: str, verb: str
) -> None:
    path = tmp_path / "labels.txt"
    path.write_text(lines)
    words = (verb, MODEL, "--val", DIGITS / "val", "--labels", path)
    assert_refused(command(*words), said)


def test_label_out_of_range(command: Command, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", 2, 0)
    path = tmp_path / "labels.txt"
    path.write_text("good_0.png 1\ngood_1.png 10\n")
    for verb in ("evaluate", "quantize"):
        words = (verb, MODEL, "--val", folder, "--labels", path)
        more = QUICK if verb == "quantize" else ()
        assert_refused(command(*words, *more), "Label 10", "10 classes")


def test_evaluate_needs_images_and_labels(command: Command, tmp_path: Path) -> None:
    assert_refused(command("evaluate", MODEL), "--val")
    folder = pictures(tmp_path / "p", 2, 0)
    assert_refused(command("evaluate", MODEL, "--val", folder), "labels file")


def test_unwritable_output(command: Command) -> None:
    outcome = command("quantize", MODEL, "--output", MODEL / "below", *QUICK)
    assert_refused(outcome, str(MODEL))


# What is done


def test_quantize_and_evaluate(command: Command, tmp_path: Path) -> None:
    labels = DIGITS / "val.txt"
    outcome = command(
        "quantize", MODEL, "--calib", DIGITS / "calib", "--val", DIGITS / "val", "--labels", labels,
        "--output", "a", *QUICK,
    )  # fmt: skip
    assert (outcome.code, outcome.err) == (0, "")
    for word in ("quantized", "top-1 of 450 images", "SQNR", "same top class", "a/quantized.onnx"):
        assert word in outcome.out
    session = onnxruntime.InferenceSession("a/quantized.onnx", providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].shape[1] == 10

    found = json.loads(
        command(
            "evaluate", "a/quantized.onnx", "--val", DIGITS / "val", "--labels", labels, "--json",
            "--reference", MODEL,
        ).out
    )  # fmt: skip
    assert found["count"] == 450
    assert found["top1"] > 95
    assert found["sqnr_db"] > 15

    # The effective configuration, read back, gives the same file
    effective = QuantizeConfig.load("a/config.yaml")
    assert (effective.images, effective.report, effective.threads) == (8, False, 1)
    again = command(
        "quantize", MODEL, "--config", "a/config.yaml", "--calib", DIGITS / "calib", "--output", "b"
    )
    assert again.code == 0
    assert Path("b/config.yaml").read_bytes() == Path("a/config.yaml").read_bytes()
    assert Path("b/quantized.onnx").read_bytes() == Path("a/quantized.onnx").read_bytes()


@pytest.mark.parametrize(
    "options", [("fqvit", "--no-rotate"), ("deploy", "--no-equalize", "--no-bias-correction")]
)
def test_scales_of_an_earlier_run(
    command: Command, options: tuple[str, ...], tmp_path: Path
) -> None:
    """A report of an earlier run instead of calibration gives the same file."""
    words = ("--quantizer", *options, *QUICK)
    command("quantize", MODEL, "--calib", DIGITS / "calib", "--output", "a", *words)
    done = command("quantize", MODEL, "--scales", "a/report.json", "--output", "c", *words)
    assert (done.code, done.err) == (0, "")
    assert Path("c/quantized.onnx").read_bytes() == Path("a/quantized.onnx").read_bytes()


def test_scales_do_not_go_with_equalisation(command: Command, tmp_path: Path) -> None:
    command("quantize", MODEL, "--calib", DIGITS / "calib", "--output", "a", *QUICK)
    done = command("quantize", MODEL, "--scales", "a/report.json", "--output", "c", *QUICK)
    assert done.code == 2
    assert "equalisation needs the images" in done.err
    assert not Path("c").exists()


def test_report_on_the_console() -> None:
    ops = [
        {"node": f"n{i}", "op_type": "Softmax", "role": f"role{i}", "block": i or None,
         "snr": 10.0**-i, "snr_db": 10.0 * i, "mse": 0, "cosine": 1, "max_abs": 0,
         "quantized": True}
        for i in (3, 1, 0, 2)
    ]  # fmt: skip
    table = console.worst_ops({"ops": ops, "images": 4, "held_apart": True}, count=3)
    assert [str(c) for c in table.columns[0].cells] == [f"role{i}" for i in range(3)]
    assert [str(c) for c in table.columns[1].cells] == ["", "1", "2"]
    assert [str(c) for c in table.columns[4].cells] == ["0.0", "10.0", "20.0"]


def test_quiet_in_a_pipe(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ptq_onnx", "quantize", MODEL, "--output", tmp_path / "o", *QUICK],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "of the logits on 8 images held out from calibration" in done.stdout
    assert "next, accuracy on labelled images: ptq-onnx evaluate" in done.stdout


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    with console.progress_bars(stream) as progress:
        assert progress is not None
        advance = progress("Calibrating", 4)
        advance(4)
    assert "Calibrating" in stream.getvalue()
    assert "4/4" in stream.getvalue()


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_termination_at_the_very_end_is_no_failure(tmp_path: Path) -> None:
    """While Python takes itself apart it has put the default handlers back."""
    code = (
        "import os, signal, sys\n"
        "class Late:\n"
        "    def __del__(self, kill=os.kill, me=os.getpid(), number=signal.SIGTERM):\n"
        "        kill(me, number)\n"
        "late = Late()\n"
        "from ptq_onnx.cli.app import main\n"
        "sys.argv = ['ptq-onnx', '--version']\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")


def test_a_termination_is_the_callers_own_again() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with console.one_line_errors():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    words = ("quantize", MODEL, "--output", folder / "o", "--images", "128", "--threads", "1")
    process = subprocess.Popen(
        [sys.executable, "-m", "ptq_onnx", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in background
    )
    for _ in range(600):  # the work folder is there as soon as calibration begins
        if any(folder.iterdir()) or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert (out, err) == ("", "")
    assert list(folder.iterdir()) == []


def test_errors_that_name_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_, console.one_line_errors():
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (exit_.value.code, capsys.readouterr().err) == (2, "error: No space left on device.\n")


def test_names_send_nothing_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        console.fail("Model a\x1b[2J\udce9.onnx\n does not exist.")
    assert capsys.readouterr().err == "error: Model a\\x1b[2J\\udce9.onnx does not exist.\n"


def test_a_terminal_that_is_not_utf_8() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ptq_onnx", "inspect", "größe×.onnx"],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "gr\\xf6\\xdfe\\xd7.onnx" in done.stderr
