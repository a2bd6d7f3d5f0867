"""Pictures with captions or classes, wherever they lie: folders, class folders, webdataset tars, IDX files.

A collection lists its pictures without reading them, and travels to other processes by its paths.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, UnidentifiedImageError

from dydit_cli.data.folder import EXTENSIONS
from dydit_cli.data.idx import is_idx_folder, read_idx
from dydit_cli.data.opening import PACKAGED
from dydit_cli.errors import DyditError, did_you_mean

METADATA = "metadata.jsonl"
CAPTION_KEYS = ("text", "caption", "prompt")
FASHION_MNIST = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
"""The classes in words that suit a prompt."""

CLASS_MARK, OR = "{class}", "|"
READ_ERRORS = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Picture:
    """One picture that was found.

    Attributes:
        key: A stable name.
        place: Where it lies: a path, a number, or (tar file, offset, size).
        caption: What it shows; None where only a class is known.
        label: Its class; None where only a caption is known.
    """

    key: str
    place: Any
    caption: str | None = None
    label: int | None = None


class Pictures(Protocol):
    """A collection of pictures.

    Attributes:
        found: What is in it, in a stable order.
        classes: Names of the classes, or none.
    """

    found: list[Picture]
    classes: tuple[str, ...]

    def open(self, picture: Picture) -> Image.Image:
        """The picture, which is decoded when its pixels are asked for.

        Raises:
            DyditError: if it cannot be read.
        """
        ...


def find_pictures(given: str | Path) -> Pictures:
    """Open a collection: a folder of captioned images or of class folders, IDX files, tars, or the shipped data.

    Raises:
        DyditError: if there is none.
    """
    path = PACKAGED.get(str(given)) or Path(given).expanduser()
    if not path.exists():
        raise DyditError(
            f"There are no pictures at {given}.",
            why=f"No file, folder or shipped data set has this name. {did_you_mean(str(given), PACKAGED)}".strip(),
            fix=f"Give a folder of images, a .tar of a webdataset, or {' or '.join(PACKAGED)}.",
        )
    if path.is_file():
        if not tarfile.is_tarfile(path):
            raise DyditError(
                f"{path} is not a collection of pictures.",
                why="A file is a tar of a webdataset: images with .txt or .json files of the same name.",
                fix="Give such a tar, or a folder.",
            )
        return TarPictures([path])
    if is_idx_folder(path):
        return IdxPictures(path)
    tars = sorted(path.glob("*.tar"))
    if tars:
        return TarPictures(tars)
    captioned = CaptionedFolder(path)
    return captioned if captioned.captions else ClassFolders(path)


@dataclass
class CaptionedFolder:
    """Images anywhere below a folder, with captions in ``.txt`` files beside them or in ``metadata.jsonl``.

    Attributes:
        path: The folder.
    """

    path: Path
    found: list[Picture] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    captions: int = 0

    def __post_init__(self) -> None:
        listed = self._metadata()
        for file in sorted(self.path.rglob("*")):
            if file.name.startswith(".") or file.suffix.lower() not in EXTENSIONS:
                continue
            key = file.relative_to(self.path).as_posix()
            caption = listed.get(key)
            beside = file.with_suffix(".txt")
            if caption is None and beside.is_file():
                caption = beside.read_text(encoding="utf-8", errors="replace").strip()
            self.captions += caption is not None
            self.found.append(Picture(key, str(file), caption))

    def open(self, picture: Picture) -> Image.Image:
        """See `Pictures`."""
        return _opened(Path(picture.place))

    def _metadata(self) -> dict[str, str]:
        captions = {}
        file = self.path / METADATA
        for number, line in enumerate(
            file.read_text(encoding="utf-8").splitlines() if file.is_file() else [], start=1
        ):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                key = next(key for key in CAPTION_KEYS if key in entry)
                captions[str(entry["file_name"])] = str(entry[key]).strip()
            except (ValueError, KeyError, TypeError, StopIteration) as error:
                raise DyditError(
                    f"Line {number} of {file} cannot be read.",
                    why=f"Each line is a JSON object with file_name and one of {', '.join(CAPTION_KEYS)}.",
                    fix='Write it as {"file_name": "a.png", "text": "what it shows"}.',
                ) from error
        return captions


@dataclass
class ClassFolders:
    """One folder of images a class; the label is the position of the folder's name in sorted order.

    Attributes:
        path: The folder of folders.
    """

    path: Path
    found: list[Picture] = field(default_factory=list)
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        folders = sorted(
            entry for entry in self.path.iterdir() if entry.is_dir() and not entry.name.startswith(".")
        )
        self.classes = tuple(folder.name for folder in folders)
        for label, folder in enumerate(folders):
            for file in sorted(folder.rglob("*")):
                if not file.name.startswith(".") and file.suffix.lower() in EXTENSIONS:
                    self.found.append(Picture(file.relative_to(self.path).as_posix(), str(file), None, label))

    def open(self, picture: Picture) -> Image.Image:
        """See `Pictures`."""
        return _opened(Path(picture.place))


@dataclass
class TarPictures:
    """Webdataset tars: members that differ in their suffix alone belong together.

    Attributes:
        paths: The tars.
    """

    paths: Sequence[Path]
    found: list[Picture] = field(default_factory=list)
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for path in self.paths:
            self.found += self._listed(path)

    def open(self, picture: Picture) -> Image.Image:
        """See `Pictures`."""
        path, offset, size = picture.place
        with Path(path).open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        try:
            image = Image.open(io.BytesIO(content))
            image.load()
        except READ_ERRORS as error:
            raise _unreadable(f"{picture.key} in {path}", error) from error
        return image

    def _listed(self, path: Path) -> list[Picture]:
        images: dict[str, tuple[str, int, int]] = {}
        captions: dict[str, str] = {}
        try:
            with tarfile.open(path) as archive:
                for member in archive:
                    folder, _, name = member.name.rpartition("/")
                    stem, dot, suffix = name.partition(".")
                    if not member.isfile() or not dot or not stem:
                        continue
                    key = f"{folder}/{stem}" if folder else stem
                    if f".{suffix.lower()}" in EXTENSIONS:
                        images[key] = (str(path), member.offset_data, member.size)
                    elif suffix == "txt":
                        captions[key] = _content(archive, member).strip()
                    elif suffix == "json" and key not in captions:
                        stated = json.loads(_content(archive, member))
                        caption = next((stated[name] for name in CAPTION_KEYS if name in stated), None)
                        if caption is not None:
                            captions[key] = str(caption).strip()
        except (tarfile.TarError, OSError, ValueError) as error:
            raise DyditError(
                f"{path} cannot be read as a webdataset.",
                why=f"{type(error).__name__}: {error}.",
                fix="Copy the tar again; it may be truncated.",
            ) from error
        return [
            Picture(f"{path.name}/{key}", place, captions.get(key)) for key, place in sorted(images.items())
        ]


@dataclass
class IdxPictures:
    """The training images of an IDX folder, whose classes are taken to be those of Fashion-MNIST.

    Attributes:
        path: The folder.
    """

    path: Path
    found: list[Picture] = field(default_factory=list)
    classes: tuple[str, ...] = FASHION_MNIST
    _images: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        labels = read_idx(self._file("labels", 1), 1)
        self.found = [Picture(str(index), index, None, label) for index, label in enumerate(labels.tolist())]

    def __getstate__(self) -> dict[str, Any]:
        """Other processes read the images themselves."""
        return self.__dict__ | {"_images": None}

    def open(self, picture: Picture) -> Image.Image:
        """See `Pictures`."""
        if self._images is None:
            self._images = read_idx(self._file("images", 3), 3)
        return Image.fromarray(self._images[picture.place])

    def _file(self, kind: str, dimensions: int) -> Path:
        for suffix in (".gz", ""):
            path = self.path / f"train-{kind}-idx{dimensions}-ubyte{suffix}"
            if path.is_file():
                return path
        raise DyditError(
            f"{self.path} has no train-{kind}-idx{dimensions}-ubyte.gz.",
            why="An IDX data set has training images and labels.",
            fix="Put the missing file beside the others, under its original name.",
        )


def captioned(pictures: Pictures, template: str | None) -> list[Picture]:
    """The pictures that have a caption: their own, or the template with the name of their class.

    Args:
        pictures: The collection.
        template: A caption in which ``{class}`` stands for the name of the class; of several, separated by ``|``, each picture has
            one, which its name decides. "a {class}" becomes "an ankle boot" where it should.

    Raises:
        DyditError: if there is none.
    """
    templates = [part.strip() for part in (template or "").split(OR) if part.strip()]
    kept = []
    for picture in pictures.found:
        caption = picture.caption
        if caption is None and templates and picture.label is not None:
            number = hashlib.blake2b(picture.key.encode(), digest_size=4).digest()
            chosen = templates[int.from_bytes(number, "little") % len(templates)]
            caption = _filled(chosen, pictures.classes[picture.label])
        if caption:
            kept.append(Picture(picture.key, picture.place, caption, picture.label))
    if kept:
        return kept
    raise DyditError(
        "None of the pictures has a caption." if pictures.found else "There are no pictures.",
        why="Captions are looked for in .txt files beside the images, in metadata.jsonl, and in the tars of a webdataset."
        if pictures.found
        else f"Images end in {', '.join(EXTENSIONS)}.",
        fix=f'Write captions there, or pass --caption "a photo of a {CLASS_MARK}" for pictures in class folders.',
    )


def _filled(template: str, name: str) -> str:
    article = "an" if name[:1].lower() in "aeiou" else "a"
    return template.replace(f"a {CLASS_MARK}", f"{article} {name}").replace(CLASS_MARK, name)


def labelled(pictures: Pictures) -> list[Picture]:
    """The pictures that have a class.

    Raises:
        DyditError: if there is none.
    """
    kept = [picture for picture in pictures.found if picture.label is not None]
    if kept:
        return kept
    raise DyditError(
        "None of the pictures has a class.",
        why="The class of a picture is its folder: FOLDER/<class>/<image>.",
        fix="Move the pictures into one sub-folder a class, or pass --pipeline to prepare captions.",
    )


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = archive.extractfile(member)
    return file.read().decode("utf-8", errors="replace") if file is not None else ""


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except READ_ERRORS as error:
        raise _unreadable(str(path), error) from error


def _unreadable(what: str, error: BaseException) -> DyditError:
    return DyditError(
        f"The image {what} cannot be read.",
        why=f"{type(error).__name__}: {error}.",
        fix="Replace the file or remove it.",
    )
