"""Choose how a corpus is held out: by whole documents, or by tails where there are too few."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from hf_stable.data.checking import refuse_unusable
from hf_stable.data.expanding import expand
from hf_stable.data.opening import is_pipe
from hf_stable.data.report import ReadReport
from hf_stable.data.sources import Part, Source, part_of_document, read_documents


def hold_out(
    sources: Sequence[Source], holdout: float, *, each: bool
) -> tuple[list[Source], list[Source]]:
    """Return the training and the validation part of sources that are stated without parts.

    Whole documents are held out, by a hash of their text. Where that leaves a part without any, the
    tail of each document is held out. The choice depends on the content of the sources alone.

    Args:
        each: every source must have a training part, and not only all of them together.

    Raises:
        DataError: files that cannot be used.
    """
    parts: tuple[Part, Part] = ("train", "validation")
    train, validation = (
        [replace(source, part=part, holdout=holdout) for source in sources] for part in parts
    )
    groups = [[source] for source in train] if each else [train]
    # A pipe can be read only once, and is refused later.
    if any(is_pipe(Path(source.path)) for source in sources) or not _lacks_part(groups):
        return train, validation
    train = [replace(source, holdout_by="tail") for source in train]
    return train, [replace(source, holdout_by="tail") for source in validation]


def _lacks_part(groups: Sequence[Sequence[Source]]) -> bool:
    """Return whether a group has no training document, or all groups no validation document.

    Reading ends where both have been found, so that of most corpora little is read.
    """
    refuse_unusable([source for group in groups for source in expand(group)])
    has_validation = False
    for group in groups:
        has_train = False
        for is_train in _are_train(group):
            has_train, has_validation = has_train or is_train, has_validation or not is_train
            if has_train and has_validation:
                break
        if not has_train:
            return True
    return not has_validation


def _are_train(sources: Sequence[Source]) -> Iterator[bool]:
    """Tell of each document of training sources whether it is in their part."""
    for source in expand(sources):
        whole = replace(source, part="all", holdout=0.0)
        for text in read_documents(whole, ReadReport()):
            yield bool(part_of_document(source, text, text.encode("utf-8")))


def empty_part(sources: Sequence[Source], others: int) -> str:
    """Say that sources give no document, and what helps.

    Args:
        others: Number of documents that belong to the other part.
    """
    first, paths = sources[0], ", ".join(source.path for source in sources)
    if not others:
        return f"{paths}: no document"
    if first.holdout_by == "tail":
        return (
            f"{paths}: {first.part} part is empty: holdout {first.holdout:g} of {others} documents "
            "holds no text; raise it"
        )
    return (
        f"{paths}: {first.part} part is empty: holdout {first.holdout:g} chooses whole documents "
        f"by a hash, and all {others} are in the other part; give more documents (sample_by "
        "'paragraph' makes more of a text file), or name other validation text"
    )
