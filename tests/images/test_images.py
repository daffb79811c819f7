"""Preprocessing, image sources and labels: numbers, streaming, and every error."""

import gc
import itertools
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ptq_onnx.errors import ConfigError, ImageError
from ptq_onnx.images.labels import labels_for, read_labels
from ptq_onnx.images.opening import FolderSource, Preprocess, load_image, open_images
from ptq_onnx.images.source import evenly

PLAIN = Preprocess((0.0,) * 3, (1.0,) * 3, (8, 8))  # values are x / 255
Draw = Callable[..., Path]


@pytest.fixture
def draw(tmp_path: Path) -> Draw:
    """Writes a picture [H, W(, C)] of random or given pixels; returns its path."""

    def write(name: str, pixels: object = None, size: tuple[int, int] = (8, 8)) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if pixels is None:
            rng = np.random.default_rng(sum(name.encode()))
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.array(pixels))
        picture.save(path)
        return path

    return write


def drain(source: object, size: int = 3) -> np.ndarray:
    return np.concatenate(list(source.batches(size)))  # type: ignore[attr-defined]


class TestPreprocess:
    def test_named(self) -> None:
        assert Preprocess.named("imagenet").mean == (0.485, 0.456, 0.406)
        assert Preprocess.named("imagenet").std == (0.229, 0.224, 0.225)
        assert Preprocess.named("inception", size=(96, 64)).size == (96, 64)
        assert Preprocess.named("inception", size=32).std == (0.5, 0.5, 0.5)

    @given(
        mean=st.tuples(*[st.floats(-2, 2)] * 3),
        std=st.tuples(*[st.floats(0.01, 2)] * 3),
        size=st.tuples(st.integers(1, 512), st.integers(1, 512)),
        crop_pct=st.floats(0.1, 1),
        interpolation=st.sampled_from(["bicubic", "bilinear", "nearest", "lanczos"]),
    )
    def test_json_round_trip(self, **values: object) -> None:
        preprocess = Preprocess(**values)  # type: ignore[arg-type]
        assert Preprocess.from_json(preprocess.to_json()) == preprocess

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"mean": (0.5,)}, "mean needs one finite number for each of the 3"),
            ({"mean": (0.5, 0.5, float("nan"))}, "mean needs"),
            ({"std": (0.5, 0.5, 0.0)}, "std must be positive"),
            ({"std": 0.5}, "std needs"),
            ({"size": (224,)}, "size must be"),
            ({"size": (224, 0)}, "size must be"),
            ({"size": 224}, "size must be"),
            ({"crop_pct": 0}, "crop_pct must be in"),
            ({"crop_pct": 1.5}, "crop_pct must be in"),
            ({"interpolation": "box"}, "interpolation must be one of bicubic"),
            ({"channels": 4}, "channels must be 1 or 3"),
        ],
    )
    def test_refuses(self, change: dict[str, object], match: str) -> None:
        values = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "size": (8, 8)} | change
        with pytest.raises(ConfigError, match=match) as error:
            Preprocess(**values)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        "text", ["{", "[]", '{"mean": [0]}', '{"mean":0,"std":0,"size":0,"x":0}']
    )
    def test_refuses_json(self, text: str) -> None:
        with pytest.raises(ConfigError, match="Preprocessing"):
            Preprocess.from_json(text)

    def test_unknown_name(self) -> None:
        with pytest.raises(ConfigError, match="'clip': expected one of imagenet, inception"):
            Preprocess.named("clip")


class TestLoadImage:
    def test_formula(self, draw: Draw) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        preprocess = Preprocess((0.1, 0.2, 0.3), (0.5, 0.6, 0.7), (8, 8))
        got = load_image(draw("a.png", pixels), preprocess)
        want = (pixels / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
        assert got.shape == (3, 8, 8)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want.transpose(2, 0, 1), atol=1e-6)

    @pytest.mark.parametrize(("side", "first"), [(30, 0), (31, 0), (32, 1), (33, 1)])
    def test_near_the_size_is_only_cropped(self, draw: Draw, side: int, first: int) -> None:
        tall = np.random.default_rng(0).integers(0, 256, (side, 30, 3), dtype=np.uint8)
        preprocess = Preprocess((0,) * 3, (1,) * 3, (30, 30))
        want = tall[first : first + 30]
        got = load_image(draw("tall.png", tall), preprocess)
        np.testing.assert_allclose(got.transpose(1, 2, 0) * 255, want, atol=1e-3)
        got = load_image(draw("wide.png", tall.transpose(1, 0, 2)), preprocess)
        np.testing.assert_allclose(got.transpose(2, 1, 0) * 255, want, atol=1e-3)

    @pytest.mark.parametrize("shape", [(34, 30), (29, 30), (64, 30), (10, 10), (61, 97)])
    def test_others_are_resized_like_timm(self, draw: Draw, shape: tuple[int, int]) -> None:
        path = draw("a.png", size=shape)
        got = load_image(path, Preprocess((0,) * 3, (1,) * 3, (30, 30), crop_pct=0.75))
        image, short = Image.open(path), min(shape)  # 30 / 0.75 = 40, then the centre
        height, width = (int(40 * side / short) for side in shape)
        large = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        top, left = round((height - 30) / 2), round((width - 30) / 2)
        want = large[top : top + 30, left : left + 30]
        np.testing.assert_allclose(got.transpose(1, 2, 0) * 255, want, atol=1e-3)

    def test_not_square(self, draw: Draw) -> None:
        got = load_image(draw("a.png", size=(50, 70)), Preprocess((0,) * 3, (1,) * 3, (16, 24)))
        assert got.shape == (3, 16, 24)

    @settings(max_examples=40)
    @given(
        shape=st.tuples(st.integers(1, 60), st.integers(1, 60)),
        size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
        crop=st.floats(0.3, 1),
    )
    def test_a_flat_picture_stays_flat(
        self, shape: tuple[int, int], size: tuple[int, int], crop: float
    ) -> None:
        from ptq_onnx.images.preprocess import from_pixels

        pixels = np.full((*shape, 3), 77, dtype=np.uint8)
        got = from_pixels(pixels, Preprocess((0,) * 3, (1,) * 3, size, crop_pct=crop))
        assert got.shape == (3, *size)
        np.testing.assert_allclose(got, 77 / 255, atol=1e-6)

    def test_modes(self, draw: Draw) -> None:
        gray = np.full((8, 8), 100, dtype=np.uint8)
        clear = np.dstack([gray, gray + 1, gray + 2, np.zeros_like(gray)])
        palette = Image.fromarray(np.dstack([gray, gray + 1, gray + 2])).convert(
            "P", palette=Image.Palette.ADAPTIVE
        )
        palette.info["transparency"] = b"\x00\x7f"
        deep = np.full((8, 8), 100 * 256 + 17, dtype=np.uint16)
        want = {"gray.png": (100, 100, 100), "alpha.png": (100, 101, 102)}
        want |= {"palette.png": (100, 101, 102), "deep.png": (100, 100, 100)}
        for name, pixels in zip(want, (gray, clear, palette, deep), strict=True):
            got = load_image(draw(name, pixels), PLAIN) * 255
            np.testing.assert_allclose(got[:, 0, 0], want[name], atol=1e-3, err_msg=name)
            assert np.ptp(got, axis=(1, 2)).max() == 0

    def test_one_channel(self, draw: Draw) -> None:
        got = load_image(draw("a.png"), Preprocess((0.5,), (0.5,), (8, 8), channels=1))
        assert got.shape == (1, 8, 8)

    def test_orientation_is_ignored(self, draw: Draw, tmp_path: Path) -> None:
        image = Image.open(draw("a.png"))
        exif = Image.Exif()
        exif[0x0112] = 6  # rotated by 90°
        image.save(tmp_path / "b.png", exif=exif)
        np.testing.assert_array_equal(
            load_image(tmp_path / "a.png", PLAIN), load_image(tmp_path / "b.png", PLAIN)
        )

    @pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
    def test_unreadable(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "bad.png"
        path.write_bytes(content)
        with pytest.raises(ImageError, match=r"bad\.png' cannot be read: ") as error:
            load_image(path, PLAIN)
        assert "\n" not in str(error.value)

    def test_truncated(self, draw: Draw) -> None:
        path = draw("a.jpg", size=(64, 64))
        path.write_bytes(path.read_bytes()[:700])
        with pytest.raises(ImageError, match="truncated"):
            load_image(path, PLAIN)


class TestFolder:
    def test_sorted_recursive_and_reiterable(self, draw: Draw, tmp_path: Path) -> None:
        for name in ("b/2.JPEG", "a.png", "b/1.bmp", "c.webp", "d.ppm", "e.tif", ".hidden.png"):
            draw(name)
        (tmp_path / "notes.txt").write_text("no image")
        source = open_images(tmp_path, PLAIN)
        assert source.names == ["a.png", "b/1.bmp", "b/2.JPEG", "c.webp", "d.ppm", "e.tif"]
        assert len(source) == 6
        assert [len(batch) for batch in source.batches(4)] == [4, 2]
        np.testing.assert_array_equal(drain(source, 4), drain(source, 1))
        np.testing.assert_array_equal(drain(source)[1], load_image(tmp_path / "b/1.bmp", PLAIN))

    @given(count=st.integers(1, 500), limit=st.integers(1, 600))
    def test_limit_is_even(self, count: int, limit: int) -> None:
        chosen = evenly(count, limit)
        gaps = np.diff(chosen)
        assert len(chosen) == min(limit, count)
        assert 0 <= chosen[0] <= chosen[-1] < count
        assert len(gaps) == 0 or 1 <= gaps.min() <= gaps.max() <= gaps.min() + 1

    def test_limit(self, draw: Draw, tmp_path: Path) -> None:
        for number in range(10):
            draw(f"{number}.png")
        assert open_images(tmp_path, PLAIN, limit=3).names == ["0.png", "3.png", "6.png"]
        assert len(open_images(tmp_path, PLAIN, limit=99)) == 10
        with pytest.raises(ConfigError, match="at least 1, got 0"):
            open_images(tmp_path, PLAIN, limit=0)

    def test_unreadable_is_skipped(self, draw: Draw, tmp_path: Path) -> None:
        for number in range(5):
            draw(f"{number}.png")
        (tmp_path / "2.png").write_bytes(b"nothing")
        source = open_images(tmp_path, PLAIN)
        assert (len(source), source.skipped) == (5, [])  # nothing was decoded yet
        assert len(drain(source)) == len(source) == 4
        assert source.skipped == ["2.png"]
        assert source.names == ["0.png", "1.png", "3.png", "4.png"]
        assert len(drain(source)) == 4
        assert source.skipped == ["2.png"]

    def test_unreadable_is_replaced(self, draw: Draw, tmp_path: Path) -> None:
        for number in range(6):
            draw(f"{number}.png")
        for bad in "23":
            (tmp_path / f"{bad}.png").write_bytes(b"nothing")
        source = open_images(tmp_path, PLAIN, limit=3)  # 0, 2, 4
        names = [name for batch, _ in source.named_batches(2) for name in batch]
        assert names == source.names == ["0.png", "5.png", "4.png"]
        assert source.skipped == ["2.png", "3.png"]
        np.testing.assert_array_equal(drain(source)[1], load_image(tmp_path / "5.png", PLAIN))

    def test_each_spare_stands_in_once(self, draw: Draw, tmp_path: Path) -> None:
        for number in range(6):
            draw(f"{number}.png")
        for bad in "013":
            (tmp_path / f"{bad}.png").write_bytes(b"nothing")
        source = open_images(tmp_path, PLAIN, limit=3)  # 0, 2, 4; 1 and 3 are no help
        assert len(drain(source)) == 3
        assert source.names == ["5.png", "2.png", "4.png"]
        for bad in "25":
            (tmp_path / f"{bad}.png").write_bytes(b"nothing")
        source = open_images(tmp_path, PLAIN, limit=3)
        assert len(drain(source)) == 1
        assert source.names == ["4.png"]
        assert sorted(source.skipped) == ["0.png", "1.png", "2.png", "3.png", "5.png"]

    def test_errors(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match="holds no images"):
            open_images(tmp_path, PLAIN)
        with pytest.raises(ImageError, match="does not exist"):
            open_images(tmp_path / "nowhere", PLAIN)
        (tmp_path / "a.zip").write_bytes(b"")
        with pytest.raises(ImageError, match="neither a folder of images nor"):
            open_images(tmp_path / "a.zip", PLAIN)
        with pytest.raises(ImageError, match="got int"):
            open_images(3, PLAIN)  # type: ignore[arg-type]

    def test_none_readable(self, tmp_path: Path) -> None:
        for name in "abc":
            (tmp_path / f"{name}.png").write_bytes(b"nothing")
        with pytest.raises(ImageError, match=r"None of the 3 images .*the first was 'a\.png'"):
            drain(open_images(tmp_path, PLAIN, limit=2))

    def test_links_in_a_circle(self, draw: Draw, tmp_path: Path) -> None:
        draw("a/1.png")
        (tmp_path / "a/back").symlink_to(tmp_path, target_is_directory=True)
        assert open_images(tmp_path, PLAIN).names == ["a/1.png"]

    def test_batch_size(self, draw: Draw, tmp_path: Path) -> None:
        draw("1.png")
        with pytest.raises(ConfigError, match="batch size"):
            drain(open_images(tmp_path, PLAIN), 0)

    def test_reads_ahead_a_little_and_stops(
        self, draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in range(40):
            draw(f"{number:02d}.png")
        seen: list[str] = []
        read = FolderSource._read
        monkeypatch.setattr(
            FolderSource, "_read", lambda s, i: (seen.append(str(i)), read(s, i))[1]
        )
        batches = open_images(tmp_path, PLAIN).batches(4)
        next(batches)
        batches.close()  # type: ignore[attr-defined]
        assert 4 <= len(seen) <= 8
        assert not [t for t in threading.enumerate() if t.name.startswith("images")]


class TestArrays:
    floats = np.random.default_rng(0).normal(size=(7, 3, 8, 8)).astype(np.float32)

    def test_all_spellings_agree(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", self.floats)
        np.savez_compressed(tmp_path / "a.npz", images=self.floats, labels=np.arange(7))
        sources = [
            self.floats,
            tmp_path / "a.npy",
            str(tmp_path / "a.npz"),
            list(self.floats),
            [self.floats[:4], self.floats[4:]],
            (image for image in self.floats),
            iter([self.floats[:2], self.floats[2], self.floats[3:].astype(np.float64)]),
        ]
        for given_as in sources:
            source = open_images(given_as, PLAIN)
            assert (len(source), source.names) == (7, list("0123456"))
            for _ in range(2):
                np.testing.assert_array_equal(drain(source), self.floats)

    def test_raw_pixels(self, draw: Draw, tmp_path: Path) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (4, 20, 26, 3), dtype=np.uint8)
        np.save(tmp_path / "raw.npy", pixels)
        for number, image in enumerate(pixels):
            draw(f"folder/{number}.png", image)
        want = drain(open_images(tmp_path / "folder", PLAIN))
        for source in (pixels, tmp_path / "raw.npy", iter(pixels)):
            np.testing.assert_array_equal(drain(open_images(source, PLAIN)), want)

    def test_limits(self) -> None:
        assert open_images(self.floats, PLAIN, limit=3).names == ["0", "2", "4"]
        endless = itertools.repeat(self.floats[:2])
        assert len(open_images(endless, PLAIN, limit=5)) == 5

    def test_some_are_held_apart(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", self.floats)
        np.savez_compressed(tmp_path / "a.npz", images=self.floats)
        pictures = [Image.new("RGB", (8, 8), (index, 0, 0)) for index in range(7)]
        for given_as in (self.floats, tmp_path / "a.npy", tmp_path / "a.npz", pictures):
            source = open_images(given_as, PLAIN, limit=4)
            others = source.others(2)
            assert others is not None
            assert (source.names, others.names) == (["0", "1", "3", "5"], ["2", "4"])
            whole = drain(open_images(given_as, PLAIN))
            np.testing.assert_array_equal(drain(others), whole[[2, 4]])
            assert source.reopened(2).names == ["0", "3"]
            assert open_images(given_as, PLAIN).others(2) is None

    def test_a_spool_stays_as_long_as_others_use_it(self) -> None:
        few = open_images(iter(self.floats), PLAIN).reopened(2)
        gc.collect()
        np.testing.assert_array_equal(drain(few), self.floats[[0, 3]])

    def test_a_spool_is_on_disk_and_has_no_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        source = open_images(iter(self.floats), PLAIN)
        array = source._load()  # type: ignore[attr-defined]
        assert isinstance(array, np.memmap)
        assert array.size * array.itemsize == self.floats.nbytes
        assert list(tmp_path.iterdir()) == []  # so a killed process leaves nothing

    def test_no_place_for_a_spool(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
        with pytest.raises(ImageError, match=r"kept in '/nowhere' .*: set TMPDIR"):
            open_images(iter(self.floats), PLAIN)

    @pytest.mark.parametrize(
        ("array", "match"),
        [
            (np.zeros((2, 3, 9, 8), np.float32), r"expected preprocessed images \[N, 3, 8, 8\]"),
            (np.zeros((2, 8, 8, 3), np.float32), r"got float32\[2, 8, 8, 3\]"),
            (np.zeros((8, 8), np.float32), r"got float32\[8, 8\]"),
            (np.zeros((0, 3, 8, 8), np.float32), "no images"),
            (np.zeros((2, 3, 8, 8), np.int64), "expected floats or uint8 pixels, got int64"),
            (np.zeros((2, 3, 8, 8), np.uint8), "uint8 pixels must be"),
        ],
    )
    def test_refuses(self, array: np.ndarray, match: str, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", array)
        for source in (array, tmp_path / "a.npy"):
            with pytest.raises(ImageError, match=match) as error:
                open_images(source, PLAIN)
            assert "\n" not in str(error.value)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_not_finite(self, value: float) -> None:
        bad = self.floats.copy()
        bad[4, 1, 2, 3] = value
        with pytest.raises(ImageError, match="image 4: holds NaN or infinity"):
            drain(open_images(bad, PLAIN))
        with pytest.raises(ImageError, match="image 4: holds NaN or infinity"):
            open_images(iter(bad), PLAIN)

    def test_iterables(self) -> None:
        def broken() -> Iterator[object]:
            yield self.floats[0]
            yield "picture"

        with pytest.raises(ImageError, match="image 1: expected floats or uint8 pixels, got <U7"):
            open_images(broken(), PLAIN)
        with pytest.raises(ImageError, match="yields no images"):
            open_images(iter(()), PLAIN)
        with pytest.raises(ImageError, match="image 0: expected an array, got list"):
            open_images([[[1.0], [1.0, 2.0]]], PLAIN)
        with pytest.raises(ImageError, match="image 1: expected preprocessed"):
            open_images([self.floats[0], self.floats[0, :, :4]], PLAIN)

    @pytest.mark.parametrize("name", ["a.npy", "a.npz"])
    def test_damaged_files(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"\x93NUMPY nothing")
        with pytest.raises(ImageError, match="cannot be read"):
            open_images(tmp_path / name, PLAIN)

    def test_npz_keys(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", first=self.floats, second=self.floats)
        with pytest.raises(ImageError, match="found first, second"):
            open_images(tmp_path / "a.npz", PLAIN)
        np.savez(tmp_path / "b.npz", whatever=self.floats)
        assert len(open_images(tmp_path / "b.npz", PLAIN)) == 7

    def test_pickles_are_refused(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
        with pytest.raises(ImageError, match="cannot be read"):
            open_images(tmp_path / "a.npy", PLAIN)


class TestLabels:
    def write(self, folder: Path, text: str) -> Path:
        path = folder / "labels.txt"
        path.write_text(text)
        return path

    def test_read(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "\ufeff# names\n\na.png 3\n  my cat.png\t0  \nb/c.png 999\n")
        assert read_labels(path) == {"a.png": 3, "my cat.png": 0, "b/c.png": 999}

    @pytest.mark.parametrize("line", ["a.png", "a.png x", "a.png -1", "a.png 1.0", "7", "a.png,7"])
    def test_bad_line(self, tmp_path: Path, line: str) -> None:
        with pytest.raises(ImageError, match=r"line 3: expected 'name label'"):
            read_labels(self.write(tmp_path, f"# header\nb.png 1\n{line}\n"))

    def test_bad_files(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match="cannot be read"):
            read_labels(tmp_path / "none.txt")
        with pytest.raises(ImageError, match="holds no"):
            read_labels(self.write(tmp_path, "# nothing\n"))
        with pytest.raises(ImageError, match=r"line 2: 'a\.png' is 2 here and 1 further up"):
            read_labels(self.write(tmp_path, "a.png 1\na.png 2\n"))

    def test_by_name(self, draw: Draw, tmp_path: Path) -> None:
        for name in ("pics/b.png", "pics/sub/a.png"):
            draw(name)
        source = open_images(tmp_path / "pics", PLAIN)
        labels = labels_for(source, self.write(tmp_path, "a.png 7\nb.png 2\nother.png 1\n"))
        assert labels.dtype == np.int64
        assert dict(zip(source.names, labels, strict=True)) == {"b.png": 2, "sub/a.png": 7}
        with pytest.raises(ImageError, match=r"no line for 'sub/a\.png' \(1 of 2 images"):
            labels_for(source, self.write(tmp_path, "b.png 2\n"))

    def test_by_folder(self, draw: Draw, tmp_path: Path) -> None:
        for name in ("dog/x.png", "cat/y.png", "cat/deep/z.png", "emu/w.png"):
            draw(name)
        source = open_images(tmp_path, PLAIN)
        assert source.names == ["cat/deep/z.png", "cat/y.png", "dog/x.png", "emu/w.png"]
        assert labels_for(source).tolist() == [0, 0, 1, 2]
        assert labels_for(open_images(tmp_path, PLAIN, limit=2)).tolist() == [0, 1]
        draw("loose.png")
        with pytest.raises(ImageError, match=r"'loose\.png' lies in no class folder"):
            labels_for(open_images(tmp_path, PLAIN))

    def test_arrays(self, tmp_path: Path) -> None:
        source = open_images(np.zeros((2, 3, 8, 8), np.float32), PLAIN)
        assert labels_for(source, self.write(tmp_path, "0 4\n1 5\n")).tolist() == [4, 5]
        with pytest.raises(ImageError, match="no folders to take classes from"):
            labels_for(source)
