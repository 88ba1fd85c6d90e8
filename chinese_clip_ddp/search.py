"""Finds images by text or by image, and captions by image, in a gallery of one's own.

    python search.py output --index my.db --data_path my_folder              builds the index, or brings it up to date
    python search.py output --index my.db --text 左边有两个红色的圆 --top_k 5
    python search.py output --index my.db --image my.png                     images like it, and captions that fit it
    python search.py output --index my.db --text 猫 --filter 'path like "%/2024/%"'

The way of a gallery: read_gallery (a table, a tar or a folder; gallery.py) -> SearchIndex.update: only what is new, by
content, is embedded, what has gone leaves -> a milvus-lite file.

The file holds two collections, `images` and `captions`, whose key is the content. A write that is acknowledged survives
SIGKILL, so an update that was killed goes on where it was. One process at a time can have the file.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from batch import Pixels
from data import caption_number, hash_tokenizer
from files import UserError
from gallery import Gallery, open_reference, read_gallery
from images import ImageError, Reference
from index_file import hold, open_milvus
from infer import BATCH_SIZE, embed_captions, embed_pictures, hide_progress_bars, load_trained_model, open_picture
from model import poolings_of

INDEX = str(Path(__file__).parent / "cache_data" / "search.db")
PAGE = 10_000  # rows that are read from the index, or deleted, at a time
MAX_BYTES = 60_000  # of a text in the index, which takes 65,535; a longer one is embedded as it is and shown cut
SHOWN_CAPTIONS = 20  # of an image; what finds images is the image, so no more of them are kept beside it
MAX_TOP_K = 1000
FIELDS = {  # of the two collections, beside `id` and `vector`; a filter may ask for them
    "images": {"path": "VARCHAR", "offset": "INT64", "size": "INT64", "coding": "VARCHAR", "captions": "VARCHAR"},
    "captions": {"text": "VARCHAR"},
}


class Hit(NamedTuple):
    """An image that was found, the likest first; score is a cosine."""

    score: float
    reference: Reference
    captions: list[str]


def identify_model(model, tokenizer, image_processor) -> str:
    """16 hexadecimal digits of all that an embedding depends on: weights, pooling, tokenizer, pixels."""
    digest = hashlib.sha256(hash_tokenizer(tokenizer).encode())
    settings = [image_processor.to_dict(), poolings_of(model.config)]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def shorten(text: str) -> str:
    """A text as the index takes it: at most MAX_BYTES of UTF-8, the end of a longer one replaced by an ellipsis."""
    data = text.encode()
    return text if len(data) <= MAX_BYTES else data[:MAX_BYTES].decode(errors="ignore") + "…"


class SearchIndex:
    """A milvus-lite file of one model's embeddings; `close` it, or use it in a `with`.

    Args:
        path: of the file, which ends in .db; beside it lies `<path>.holder`, which says who has it open.
        model, tokenizer, image_processor: from `load_trained_model`.
        model_name: what the index calls the model to people; what counts is `identify_model`.
        rebuild: empty the index of another model instead of refusing it.

    Raises:
        UserError: another process has it open, another model made it, or it can't be opened.
    """

    def __init__(self, path: str, model, tokenizer, image_processor, model_name: str = "", rebuild: bool = False):
        if not path.endswith(".db"):
            raise UserError(f"--index {path}: the name of an index ends in .db.")
        self.path = os.path.abspath(path)
        self.model, self.tokenizer, self.pixels = model, tokenizer, Pixels(image_processor)
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        self.holder = hold(self.path)
        try:
            self.client = open_milvus(self.path)
            self.open_collections(model_name, identify_model(model, tokenizer, image_processor), rebuild)
        except BaseException:
            self.close()
            raise

    def open_collections(self, model_name: str, identity: str, rebuild: bool) -> None:
        for name in filter(self.client.has_collection, FIELDS):
            made_by = self.client.describe_collection(name)["properties"]
            if made_by.get("identity") == identity:
                continue
            if not rebuild:
                raise UserError(
                    f"{self.path}: holds embeddings of the model {made_by.get('model')} ({made_by.get('identity')}), "
                    f"this is {model_name} ({identity}); those of two models can't be compared. Take that model, or "
                    "another file by --index, or embed all images anew by --rebuild."
                )
            self.client.drop_collection(name)
        for name in FIELDS:
            if not self.client.has_collection(name):
                self.create_collection(name, {"model": model_name, "identity": identity})
            self.client.load_collection(name)

    def create_collection(self, name: str, properties: dict[str, str]) -> None:
        from pymilvus import DataType

        schema = self.client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        for field, kind in FIELDS[name].items():
            length = {"max_length": 65_535} if kind == "VARCHAR" else {}
            schema.add_field(field, DataType[kind], **length)
        width = embed_captions(self.model, self.tokenizer, ["?"]).shape[1]
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=width)
        exact = self.client.prepare_index_params()
        exact.add_index("vector", index_type="FLAT", metric_type="COSINE")
        self.client.create_collection(name, schema=schema, index_params=exact, properties=properties)

    def close(self) -> None:
        """Lets others have the file; may be called twice."""
        if hasattr(self, "client"):
            from milvus_lite.server_manager import server_manager_instance

            self.client.close()
            server_manager_instance.release_server(self.path)
        if not self.holder.closed:
            self.holder.truncate(0)
        self.holder.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def read_all(self, name: str) -> dict[int, dict]:
        """id -> row, without its vector, of a whole collection."""
        pages = self.client.query_iterator(name, batch_size=PAGE, output_fields=["id", *FIELDS[name]])
        found = {}
        while page := pages.next():
            found.update({row["id"]: dict(row) for row in page})
        pages.close()
        return found

    def count(self) -> dict[str, int]:
        """Rows of each collection."""
        return {name: self.client.query(name, output_fields=["count(*)"])[0]["count(*)"] for name in FIELDS}

    def examples(self, count: int = 6) -> tuple[list[str], list[Image.Image]]:
        """Some captions, and some images as pictures, to begin with."""
        pages = [self.client.query(name, limit=50 * count, output_fields=list(FIELDS[name])) for name in FIELDS]
        images, captions = (page[:: max(1, len(page) // count)][:count] for page in pages)
        pictures = []
        for row in images:
            with contextlib.suppress(ImageError):  # it may have gone
                pictures.append(open_reference(to_reference(row)))
        return [row["text"] for row in captions], pictures

    def root(self) -> str:
        """The folder that all images lie in."""
        folders = {os.path.dirname(row["path"]) for row in self.read_all("images").values()}
        return os.path.commonpath(folders) if folders else ""

    def update(self, gallery: Gallery, on_progress: Callable[[int, int], None] = lambda done, all: None) -> dict:
        """Makes the index hold the gallery and nothing else; only what is new is embedded.

        Every batch is safe as soon as it is written: killed, and called again, it goes on with what is missing.

        Args:
            on_progress: gets to know how many of how many new images are done.

        Returns:
            Counts of images: new, moved (in another place, or with other captions), removed, unchanged, copies, and
            unusable; new_captions.
        """
        images = {
            number: {**place._asdict(), "captions": join_captions(captions)}
            for number, (place, captions) in gallery.images.items()
        }
        texts = [text for _, captions in gallery.images.values() for text in captions]
        texts = {caption_number(text): {"text": shorten(text)} for text in texts}
        unusable = []
        embed = functools.partial(self.embed_image_rows, unusable=unusable)
        counts = self.bring_up_to_date("images", images, embed, on_progress)
        captions = self.bring_up_to_date("captions", texts, self.embed_text_rows, lambda *_: None)
        counts |= {"copies": gallery.copies, "unusable": len(gallery.unusable) + len(unusable)}
        return counts | {"new_captions": captions["new"]}

    def bring_up_to_date(self, name: str, wanted: dict[int, dict], embed, on_progress) -> dict[str, int]:
        """Deletes what isn't wanted, rewrites rows that have changed beside their old vectors, embeds the new ones."""
        known = self.read_all(name)
        wanted = {number: {"id": number, **row} for number, row in wanted.items()}
        gone = [number for number in known if number not in wanted]
        moved = [number for number in wanted if number in known and known[number] != wanted[number]]
        new = [row for number, row in wanted.items() if number not in known]
        for start in range(0, len(gone), PAGE):
            self.client.delete(name, ids=gone[start : start + PAGE])
        for start in range(0, len(moved), PAGE):
            old = self.client.get(name, ids=moved[start : start + PAGE], output_fields=["vector"])
            self.client.upsert(name, [{**wanted[row["id"]], "vector": row["vector"]} for row in old])
        written = 0
        for start in range(0, len(new), BATCH_SIZE):
            rows = embed(new[start : start + BATCH_SIZE])
            if rows:
                self.client.upsert(name, rows)
            written += len(rows)
            on_progress(min(start + BATCH_SIZE, len(new)), len(new))
        self.client.flush(name)
        unchanged = len(known) - len(gone) - len(moved)
        return {"new": written, "moved": len(moved), "removed": len(gone), "unchanged": unchanged}

    def embed_image_rows(self, rows: list[dict], unusable: list[str]) -> list[dict]:
        """The rows with their `vector`; those whose image isn't what was checked any more go to `unusable` instead."""
        found = []
        for row in rows:
            try:
                found.append({**row, "vector": open_reference(to_reference(row))})
            except ImageError as error:
                unusable.append(f"{row['path']}: {error}")
        if found:
            vectors = embed_pictures(self.model, self.pixels, [row["vector"] for row in found])
            for row, vector in zip(found, check_finite(vectors).tolist(), strict=True):
                row["vector"] = vector
        return found

    def embed_text_rows(self, rows: list[dict]) -> list[dict]:
        """The rows with their `vector`."""
        vectors = self.embed_texts([row["text"] for row in rows]).tolist()
        return [{**row, "vector": vector} for row, vector in zip(rows, vectors, strict=True)]

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """(texts, d)."""
        return check_finite(embed_captions(self.model, self.tokenizer, texts))

    def embed_image(self, picture: Image.Image) -> torch.Tensor:
        """(1, d), of what `load_image` gives."""
        return check_finite(embed_pictures(self.model, self.pixels, [picture]))

    def find(self, name: str, vector: torch.Tensor, top_k: int, condition: str) -> list[dict]:
        """The rows of a collection that are nearest to a vector (1, d), with their cosines as `distance`."""
        from pymilvus.exceptions import MilvusException

        if not 1 <= top_k <= MAX_TOP_K:
            raise UserError(f"top_k is {top_k}; between 1 and {MAX_TOP_K} are found.")
        try:
            fields = list(FIELDS[name])
            found = self.client.search(name, data=vector.tolist(), limit=top_k, filter=condition, output_fields=fields)
        except MilvusException as error:
            if not condition:
                raise
            reason = error.message.splitlines()[0]
            raise UserError(
                f"the filter {condition!r} can't be used: {reason}. It may ask for {', '.join(fields)}, such as "
                'path like "%/cats/%".'
            ) from None
        return found[0]

    def find_images(self, vector: torch.Tensor, top_k: int = 10, condition: str = "") -> list[Hit]:
        """The images nearest to a text's or an image's vector (1, d).

        Args:
            condition: a filter of Milvus over the fields of `FIELDS["images"]`, such as 'captions like "%红%"'.

        Raises:
            UserError: the filter can't be used, or top_k is out of range.
        """
        return [
            Hit(hit["distance"], to_reference(hit["entity"]), hit["entity"]["captions"].splitlines())
            for hit in self.find("images", vector, top_k, condition)
        ]

    def find_captions(self, vector: torch.Tensor, top_k: int = 10) -> list[tuple[float, str]]:
        """(cosine, caption) of the captions nearest to a vector (1, d)."""
        return [(hit["distance"], hit["entity"]["text"]) for hit in self.find("captions", vector, top_k, "")]


def to_reference(row: dict) -> Reference:
    return Reference(*(row[name] for name in Reference._fields))


def join_captions(captions: list[str]) -> str:
    """The first captions of an image, one a line."""
    return shorten("\n".join(" ".join(text.split()) for text in captions[:SHOWN_CAPTIONS]))


def check_finite(vectors: torch.Tensor) -> torch.Tensor:
    """The vectors; raises UserError where the model gives no numbers."""
    if not vectors.isfinite().all():
        raise UserError("the model's embeddings hold NaN or infinity: the training has failed; take another one.")
    return vectors


def describe_update(counts: dict) -> str:
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a trained model, or a hub id")
    parser.add_argument("--index", default=INDEX, help="the index, a milvus-lite file; its name ends in .db")
    parser.add_argument("--data_path", help="a table, a tar or a folder of images that the index is to hold")
    parser.add_argument("--language", default="zh", choices=["zh", "en"], help="which of zh_prompt and prompt")
    parser.add_argument("--rebuild", action="store_true", help="empty the index of another model first")
    parser.add_argument("--text", help="find images by this text")
    parser.add_argument("--image", help="find images and captions by the image in this file")
    parser.add_argument("--top_k", type=int, default=10, help="how many are found")
    parser.add_argument("--filter", default="", help="a filter of Milvus, such as 'captions like \"%%红%%\"'")
    args = parser.parse_args(argv)
    hide_progress_bars()
    try:
        if not (args.data_path or args.text or args.image):
            raise UserError("nothing is asked: give --data_path, --text or --image.")
        # In this order: checking images forks processes, which nothing that serves should be there for.
        gallery = read_gallery(args.data_path, args.language) if args.data_path else None
        picture = open_picture(args.image) if args.image else None
        loaded = load_trained_model(args.model)
        with SearchIndex(args.index, *loaded, Path(args.model).resolve().name, args.rebuild) as index:
            if gallery:
                show_update(index, gallery)
            if not index.count()["images"]:
                raise UserError(f"{args.index}: there is no image in the index yet; fill it by --data_path.")
            if args.text:
                show_hits(index.find_images(index.embed_texts([args.text]), args.top_k, args.filter))
            if picture:
                show_hits(index.find_images(index.embed_image(picture), args.top_k, args.filter))
                for score, text in index.find_captions(index.embed_image(picture), args.top_k):
                    print(f"{score:.3f}  {text}")
    except UserError as error:
        sys.exit(f"error: {error}")


def show_update(index: SearchIndex, gallery: Gallery) -> None:
    """Updates with a progress bar, and says what came of it."""
    from tqdm import tqdm

    with tqdm(unit="image") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        counts = index.update(gallery, show)
    print(f"{index.path}: {describe_update(counts)}")
    for reason in gallery.unusable[:3]:
        print(f"note: {reason}")


def show_hits(hits: list[Hit]) -> None:
    for hit in hits:
        place = hit.reference.path + (f":{hit.reference.offset}" if hit.reference.size >= 0 else "")
        print(f"{hit.score:.3f}  {place}  {' | '.join(hit.captions[:3])}")


if __name__ == "__main__":
    main()
