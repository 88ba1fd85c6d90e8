"""Pictures of every kind that is found in the wild, drawn on the spot: what `images.load_image` has to deal with."""

import io

import numpy as np
from PIL import ExifTags, Image, ImageDraw

SIZE = (60, 40)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    """The picture as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def draw_arrow(mode: str = "RGB", ground=(255, 255, 255), colour=(200, 30, 30)) -> Image.Image:
    """An arrow that points up, so that a turned picture can be told."""
    image = Image.new(mode, SIZE, ground)
    ImageDraw.Draw(image).polygon([(30, 4), (42, 18), (34, 18), (34, 36), (26, 36), (26, 18), (18, 18)], fill=colour)
    return image


def turned_photo(orientation: int = 6) -> bytes:
    """A photo of a camera that was held sideways: its pixels lie, EXIF says how they're to be turned."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    turned = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    image = draw_arrow()
    image = image.transpose(turned[orientation]) if turned[orientation] is not None else image
    return encode(image, "JPEG", exif=exif, quality=95)


def palette_with_transparency() -> bytes:
    """An emoji's kind of PNG: a palette whose first colour, green, is the transparent one."""
    image = draw_arrow("P", 0, 1)
    image.putpalette([71, 112, 76, 200, 30, 30])
    return encode(image, "PNG", transparency=0)


def grey_of_16_bits() -> bytes:
    ramp = np.linspace(0, 65535, SIZE[0]).astype(np.uint16)
    return encode(Image.fromarray(np.tile(ramp, (SIZE[1], 1))), "PNG")


def animation() -> bytes:
    frames = [draw_arrow(colour=colour).convert("P") for colour in ((200, 30, 30), (30, 30, 200))]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:])


def draw_good() -> dict[str, bytes]:
    """Name -> bytes of the kinds that can be used."""
    alpha = draw_arrow("RGBA", (0, 0, 0, 0), (200, 30, 30, 255))
    return {
        "JPEG": encode(draw_arrow(), "JPEG", quality=95),
        "EXIF 6": turned_photo(6),
        "EXIF 3": turned_photo(3),
        "palette": palette_with_transparency(),
        "alpha": encode(alpha, "PNG"),
        "grey + alpha": encode(alpha.convert("LA"), "PNG"),
        "alpha WebP": encode(alpha, "WEBP", lossless=True),
        "CMYK": encode(draw_arrow().convert("CMYK"), "JPEG", quality=95),
        "16 bit": grey_of_16_bits(),
        "1 bit": encode(draw_arrow().convert("1"), "PNG"),
        "animated": animation(),
        "1 x 1": encode(Image.new("RGB", (1, 1), (200, 30, 30)), "PNG"),
    }


def draw_bad() -> dict[str, bytes]:
    """Name -> bytes of the kinds that are refused."""
    noise = np.random.default_rng(0).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)
    jpeg, png = (encode(Image.fromarray(noise), kind) for kind in ("JPEG", "PNG"))
    return {
        "empty": b"",
        "no picture": "这不是图片".encode(),
        "page": b"<html><body>404</body></html>",
        "truncated JPEG": jpeg[: len(jpeg) // 2],
        "truncated PNG": png[: len(png) // 2],
        "truncated GIF": animation()[:60],
        "damaged PNG": png[: len(png) // 2] + b"\0" * 40 + png[len(png) // 2 + 40 :],
        "20000 x 3": encode(Image.new("RGB", (20000, 3)), "PNG"),
        "100 million": encode(Image.new("1", (10000, 10000)), "PNG"),
        "float TIFF": encode(Image.new("F", SIZE), "TIFF"),
        "EPS": encode(draw_arrow(), "EPS"),
    }
