"""Choose the held-out text: whole documents, or tails if there are too few documents."""

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
    """Split sources into a training and a validation part.

    Whole documents are held out, chosen by a hash of their text. If that leaves a part without
    documents, the tail of each document is held out instead. The choice depends only on the content
    of the sources.

    Args:
        sources: Sources without a part.
        holdout: Fraction to hold out.
        each: True if every source needs a training part, False if one of them is enough.

    Raises:
        DataError: If files cannot be used.
    """
    parts: tuple[Part, Part] = ("train", "validation")
    train, validation = (
        [replace(source, part=part, holdout=holdout) for source in sources] for part in parts
    )
    groups = [[source] for source in train] if each else [train]
    # A pipe can be read only once, so it is not read here; it is rejected later.
    if any(is_pipe(Path(source.path)) for source in sources) or not _lacks_part(groups):
        return train, validation
    train = [replace(source, holdout_by="tail") for source in train]
    return train, [replace(source, holdout_by="tail") for source in validation]


def _lacks_part(groups: Sequence[Sequence[Source]]) -> bool:
    """Return True if a group has no training document, or no group a validation document.

    Reading stops once both are found, which is early in most corpora.
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
    """Yield, for each document of training sources, True if it is a training document."""
    for source in expand(sources):
        whole = replace(source, part="all", holdout=0.0)
        for text in read_documents(whole, ReadReport()):
            yield bool(part_of_document(source, text, text.encode("utf-8")))


def empty_part(sources: Sequence[Source], others: int) -> str:
    """Return the error message for sources that give no document.

    Args:
        sources: Sources of one part.
        others: Number of documents in the other part.
    """
    first, paths = sources[0], ", ".join(source.path for source in sources)
    if not others:
        return f"{paths}: no document found; give files with text"
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
