"""Images and videos from disk."""

import numpy as np
import pytest

pytest.importorskip("typer", reason="an extra: pip install 'zipvl-compile[demo]'")

from PIL import Image

from zipvl_compile.demo import media
from zipvl_compile.demo.media import evenly, read_image, read_media, read_video


def frame(i, size=(12, 8)):
    return Image.new("RGB", size, (i * 10, 0, 0))


@pytest.fixture
def folder(tmp_path):
    """Twelve frames, without zeros in front of their numbers, and a file that is none."""
    path = tmp_path / "frames"
    path.mkdir()
    for i in range(12):
        frame(i).save(path / f"frame{i}.png")
    (path / "notes.txt").write_text("no frame")
    return path


def test_images_are_read_as_rgb(picture, tmp_path):
    assert read_image(picture).mode == "RGB"
    (tmp_path / "text.png").write_text("no image")
    for bad in (tmp_path / "text.png", tmp_path / "none.png"):
        with pytest.raises(ValueError, match=f"image: expected an image file, got .*{bad.name}"):
            read_image(bad)


def test_a_picture_over_the_limit_of_pil_is_a_clear_error(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    Image.new("RGB", (40, 40)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(ValueError, match=r"image: expected at most 1400 pixels, got more in .*large\.png"):
        read_image(path)


def test_evenly_keeps_both_ends():
    assert evenly(10, 4) == [0, 3, 6, 9] and evenly(3, 8) == [0, 1, 2] and evenly(5, 1) == [0]


def test_a_folder_of_frames_in_the_order_of_their_numbers(folder):
    video = read_video(folder, most=4)
    assert video.numbers == [0, 4, 7, 11] and video.total == 12 and video.fps is None
    assert [one.getpixel((0, 0))[0] for one in video.frames] == [0, 40, 70, 110]
    images, videos = read_media([folder / "frame3.png"], [folder, folder], 2)
    assert images[0].getpixel((0, 0)) == (30, 0, 0) and [len(one.frames) for one in videos] == [2, 2]


def test_frames_of_two_sizes_and_no_frames(folder, tmp_path):
    frame(0, (9, 9)).save(folder / "frame5.png")
    with pytest.raises(ValueError, match=r"video: expected frames of one size, got \[\(9, 9\), \(12, 8\)\]"):
        read_video(folder)
    (tmp_path / "empty").mkdir()
    for path, words in ((tmp_path / "empty", "got none in"), (tmp_path / "none.mp4", "Check the path")):
        with pytest.raises(ValueError, match=words):
            read_video(path)


def test_an_animation_is_a_video(tmp_path):
    path = tmp_path / "moving.gif"
    frame(0).save(path, save_all=True, append_images=[frame(i) for i in range(1, 9)], duration=100)
    video = read_video(path, most=3)
    assert video.numbers == [0, 4, 8] and video.total == 9 and video.fps == 10
    assert [one.getpixel((0, 0))[0] for one in video.frames] == [0, 40, 80]


def test_without_a_decoder_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "DECODERS", {"no_such_package": "none"})
    (tmp_path / "film.mp4").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"folder of frames.*film\.mp4.*pip install av"):
        read_video(tmp_path / "film.mp4")


def test_a_file_that_no_decoder_reads_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "DECODERS", {"torch": "pyav"})  # installed, but not of use
    (tmp_path / "film.mp4").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"video: expected a video file, got .*film\.mp4.*folder of its frames"):
        read_video(tmp_path / "film.mp4")


def test_a_video_file(tmp_path):
    av = pytest.importorskip("av", reason="decodes videos")
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as film:
        stream = film.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for i in range(10):
            shot = av.VideoFrame.from_ndarray(np.full((16, 32, 3), 25 * i, np.uint8), format="rgb24")
            film.mux(stream.encode(shot))
        film.mux(stream.encode())
    video = read_video(path, most=4)
    assert video.numbers == [0, 3, 6, 9] and video.total == 10 and video.fps == 5
    assert [round(one.getpixel((9, 9))[0] / 25) for one in video.frames] == [0, 3, 6, 9] and video.frames[0].size == (
        32,
        16,
    )
